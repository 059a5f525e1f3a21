"""What ranks do in tests of weights that training begins with."""

from __future__ import annotations

import torch

from counterflow.launch.convert_weights import load_weights
from counterflow.launch.engine import Engine
from counterflow.model import DeepSeekV3, ModelConfig, hf_tensors, load_hf
from counterflow.parallel.mesh import Mesh, MeshShape
from counterflow.parallel.schedule import build


def _engine(world: int, config: ModelConfig, dtype: torch.dtype, zero: int = 0) -> Engine:
    mesh = Mesh.create(MeshShape(pp=1, dp=world, ep=world), timeout_s=60)
    schedule = build("gpipe", ranks=1, microbatches=1)
    return Engine(config, mesh, schedule, dtype=dtype, zero=zero, timeout_s=60)


def begin_with_weights(
    rank: int, world: int, config: ModelConfig, path: str, reference: str, zero: int
) -> list[str]:
    """What differs from the reference: weights by Hugging Face name, and masters."""
    engine = _engine(world, config, torch.bfloat16, zero)
    load_weights(path, engine)
    expected = DeepSeekV3(config, dtype=torch.bfloat16)
    load_hf(expected, reference)
    named = dict(hf_tensors(expected))
    differing = [
        name
        for part in engine.parts.values()
        for name, tensor in hf_tensors(part)
        if not torch.equal(tensor, named[name])
    ]
    updated = engine.optimizer.parameters
    masters = engine.optimizer.masters
    assert masters
    differing += [
        f"master of {name}"
        for name, master in masters.items()
        if not torch.equal(master, updated[name].float())
    ]
    # A step without gradients, of rate 0, writes masters back: they must not undo the loading.
    for parameter in updated.values():
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    engine.optimizer.step(0.0)
    engine.experts.close()
    return differing + [
        f"{name} after a step"
        for part in engine.parts.values()
        for name, tensor in hf_tensors(part)
        if not torch.equal(tensor, named[name])
    ]


def refused(rank: int, world: int, config: ModelConfig, path: str) -> str:
    """Why the weights are not taken."""
    engine = _engine(world, config, torch.float32)
    try:
        load_weights(path, engine)
    except ValueError as error:
        return str(error)
    finally:
        engine.experts.close()
    return ""
