"""Cases for the gradient norm of a model that is spread over ranks."""

import torch
from torch import Tensor, nn

from counterflow.launch.optim import clip_by_global_norm
from counterflow.parallel.mesh import MeshShape

SHAPE = MeshShape(pp=2, dp=2, ep=2)


def gradients() -> dict[str, Tensor]:
    """The gradients of the whole model, as one process has them."""
    generator = torch.Generator().manual_seed(3)
    names = [
        "stage0.dense",
        "stage1.dense",
        *(f"stage{s}.expert{e}" for s in (0, 1) for e in (0, 1)),
    ]
    return {
        name: torch.randn(3, 4 + i, generator=generator, dtype=torch.float64)
        for i, name in enumerate(names)
    }


def ownership(rank: int) -> tuple[list[str], list[str]]:
    """Names that a rank holds, and those of them that it owns.

    Bidirectional: both pipeline ranks hold both stages. The expert of this ep rank only; stage s is
    owned on pipeline rank s, what is replicated over dp on its first rank.
    """
    pp, dp, ep = SHAPE.pp_rank(rank), SHAPE.dp_rank(rank), SHAPE.ep_rank(rank)
    held = [f"stage{s}.dense" for s in (0, 1)] + [f"stage{s}.expert{ep}" for s in (0, 1)]
    mine = [f"stage{pp}.expert{ep}"] + ([f"stage{pp}.dense"] if dp == 0 else [])
    return held, mine


def clipped_on_rank(rank: int, world: int, max_norm: float) -> tuple[float, dict[str, Tensor]]:
    """The norm that this rank is told, and its gradients after clipping."""
    assert world == SHAPE.world_size
    held, mine = ownership(rank)
    whole = gradients()
    named = {name: nn.Parameter(torch.zeros_like(whole[name])) for name in held}
    for name, parameter in named.items():
        parameter.grad = whole[name]
    norm, _ = clip_by_global_norm(named.items(), set(mine), max_norm)
    return norm, {name: p.grad for name, p in named.items() if p.grad is not None}
