"""What ranks do in the tests of gradient sums."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn import Parameter

from counterflow.parallel.accumulate import accumulate_in_float32
from counterflow.parallel.gradients import sum_gradients


def sums(rank: int, world: int, alone_bytes: int) -> dict[str, float | None]:
    """The value that fills each parameter's gradient after the sum, or None."""
    shapes = {"float32": (3, 5), "float64": (7,), "on rank 1 only": (2, 2), "on no rank": (4,)}
    parameters: dict[str, Parameter] = {}
    for name, shape in shapes.items():
        dtype = torch.float64 if name == "float64" else torch.float32
        parameters[name] = Parameter(torch.zeros(shape, dtype=dtype))
        if name != "on no rank" and (rank == 1 or name != "on rank 1 only"):
            parameters[name].grad = torch.full(shape, rank + 1.0, dtype=dtype)
    for name in ("bfloat16", "bfloat16 on rank 1 only"):
        parameters[name] = Parameter(torch.zeros(6, dtype=torch.bfloat16))
        accumulate_in_float32([parameters[name]])
        if rank == 1 or name == "bfloat16":
            parameters[name].grad = torch.full((6,), rank + 1 + 2.0**-12)
    group = dist.group.WORLD
    sum_gradients(list(parameters.values()), group, scale=0.5, alone_bytes=alone_bytes)
    result: dict[str, float | None] = {}
    for name, parameter in parameters.items():
        if parameter.grad is None:
            result[name] = None
            continue
        assert parameter.grad.shape == parameter.shape
        (result[name],) = parameter.grad.unique().tolist()
    return result
