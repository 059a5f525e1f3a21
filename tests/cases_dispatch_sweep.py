"""Random dispatches, one after another on the same ranks, each held against the reference.

All ranks draw the same settings and all ranks' tokens from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import torch

from counterflow.comm.dispatch import ExpertLayout, sizes
from counterflow.comm.dispatch.hops import Hops
from counterflow.parallel.mesh import Mesh

from .cases_dispatch import Batch, Name, Setting, deviations, found_by, same_found

NAMES: tuple[Name, ...] = ("flat", "dedup", "two_hop")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUTINGS = ("distinct", "any", "skewed", "one", "limited", "sparse", "none")


def sweep(
    rank: int, world: int, places: Sequence[tuple[int, tuple[int, ...]]], seeds: Sequence[int]
) -> list[str]:
    """Deviations over random settings, each on one of `places`, (ep, node of each rank)."""
    meshes = {(ep, nodes): Setting("flat", nodes, ep).mesh() for ep, nodes in places}
    wrong = []
    # Pieces of two tokens at least, so that few tokens make several.
    with patch.object(sizes, "TOKENS_A_PIECE", 2):
        for seed in seeds:
            draw = random.Random(seed)
            ep, nodes = draw.choice(list(places))
            setting, batches = drawn(draw, ep, nodes)
            found = deviations_and_limit(setting, meshes[ep, nodes], batches)
            wrong += [f"seed {seed}, {setting}: {what}" for what in found]
    return wrong


def drawn(draw: random.Random, ep: int, nodes: tuple[int, ...]) -> tuple[Setting, list[Batch]]:
    """A setting, and the tokens of all ranks of the world."""
    name = draw.choice(NAMES)
    if name == "two_hop" and not has_rails(nodes, ep):
        name = "dedup"
    num_experts = ep * draw.choice((1, 2, 3, 8))
    layout = drawn_layout(draw, num_experts, ep)
    setting = Setting(
        name,
        nodes,
        ep,
        num_experts,
        layout,
        payload=draw.choice(("exact", "exact", "bf16", "fp8", "logfmt8", "logfmt10")),
        alignment=draw.choice((1, 1, 4, 128)),
        chunks=draw.choice((1, 2, 4)),
    )
    hidden, top_k = draw.choice((1, 5, 16, 130)), draw.choice((1, 2, 4, 8))
    dtype = draw.choice(DTYPES)
    weights_dtype = draw.choice((dtype, torch.float32))
    most_tokens, routing = draw.choice((1, 5, 14)), draw.choice(ROUTINGS)
    batches = []
    for _ in nodes:
        tokens = draw.choice((0, most_tokens, draw.randint(0, most_tokens)))
        made = torch.Generator().manual_seed(draw.randrange(1 << 30))
        here = "none" if draw.random() < 0.1 else routing
        experts = [drawn_experts(draw, here, num_experts, top_k, ep) for _ in range(tokens)]
        batches.append(
            Batch(
                torch.randn(tokens, hidden, generator=made, dtype=torch.float64).to(dtype),
                torch.tensor(experts, dtype=torch.int64).view(tokens, top_k),
                torch.rand(tokens, top_k, generator=made, dtype=torch.float64).to(weights_dtype),
                torch.randn(tokens, hidden, generator=made, dtype=torch.float64).to(dtype),
            )
        )
    return setting, batches


def has_rails(nodes: Sequence[int], ep: int) -> bool:
    """Whether two_hop takes these: nodes of one size, met in one order by every in-node index."""
    for first in range(0, len(nodes), ep):
        group = nodes[first : first + ep]
        on_node = [[r for r in range(ep) if group[r] == node] for node in dict.fromkeys(group)]
        if len({len(ranks) for ranks in on_node}) > 1:
            return False
        if any(list(rail) != sorted(rail) for rail in zip(*on_node, strict=True)):
            return False
    return True


def drawn_layout(draw: random.Random, num_experts: int, ep: int) -> ExpertLayout | None:
    """Contiguous, permuted, or permuted with redundant experts."""
    kind = draw.choice(("contiguous", "permuted", "redundant"))
    if kind == "contiguous":
        return None
    slots = list(range(num_experts))
    if kind == "redundant":
        slots += [draw.randrange(num_experts) for _ in range(ep * draw.choice((1, 2)))]
    draw.shuffle(slots)
    return ExpertLayout(num_experts, ep, tuple(slots))


def drawn_experts(
    draw: random.Random, routing: str, num_experts: int, top_k: int, ep: int
) -> list[int]:
    """One token's choices."""
    everyone = range(num_experts)
    if routing == "distinct" and top_k <= num_experts:
        return draw.sample(everyone, top_k)
    if routing == "skewed":
        return [min(draw.choice(everyone), draw.choice(everyone)) // 2 for _ in range(top_k)]
    if routing == "one":
        return [num_experts - 1] * top_k
    if routing == "limited":  # from two ranks' experts
        allowed = [e for e in everyone if e * ep // num_experts in (draw.randrange(ep), 0)]
        return [draw.choice(allowed) for _ in range(top_k)]
    if routing == "sparse" and draw.random() < 0.7:
        return [draw.choice((-1, draw.choice(everyone))) for _ in range(top_k)]
    if routing in ("sparse", "none"):
        return [-1] * top_k
    return [draw.choice(everyone) for _ in range(top_k)]


def deviations_and_limit(setting: Setting, mesh: Mesh, batches: Sequence[Batch]) -> list[str]:
    """Deviations with the tightest node limit that these tokens keep, and whether one less raises.

    Each expert group has its own limit.
    """
    most = most_nodes(setting, mesh, batches)
    wrong = deviations(replace(setting, node_limit=max(1, most)), mesh, batches)
    if most > 1:
        mine = batches[mesh.rank]
        d = replace(setting, node_limit=most - 1).make(mesh)
        try:
            d.dispatch(mine.x_TD, mine.experts_TK, mine.weights_TK)
            wrong.append(f"a node limit of {most - 1} is not kept")
        except ValueError as error:
            if f"goes to {most} nodes, but node_limit is {most - 1}" not in str(error):
                wrong.append(str(error))
    return wrong


def most_nodes(setting: Setting, mesh: Mesh, batches: Sequence[Batch]) -> int:
    """The most nodes that a token of this rank's expert group reaches."""
    reference = setting.reference(mesh.rank, batches)
    ranks = mesh.shape.ep_peers(mesh.rank)
    reached: dict[tuple[int, int], set[int]] = {}
    for origin, (rank, _) in reference.place.items():
        token = (origin.source, origin.token)
        reached.setdefault(token, set()).add(setting.nodes[ranks[rank]])
    return max(map(len, reached.values()), default=0)


def in_pieces(
    rank: int, world: int, setting: Setting, tokens: Sequence[int]
) -> tuple[list[int], bool]:
    """How many pieces `chunks` of 1, 2 and 4 make, and whether all give the same bits."""
    made = torch.Generator().manual_seed(rank)
    shape = (tokens[rank], 4)
    experts_TK = torch.randint(-1, setting.num_experts, shape, generator=made)
    x_TD, grad_TD = (torch.randn(tokens[rank], 3, generator=made) for _ in range(2))
    given = Batch(x_TD, experts_TK, torch.randn(shape, generator=made), grad_TD)
    mesh = setting.mesh()
    pieces, found = [], []
    for chunks in (1, 2, 4):
        d = replace(setting, chunks=chunks).make(mesh)
        handle = d.start_preprocess(experts_TK).finish()
        assert isinstance(d, Hops)
        pieces.append(len(d.first_pieces(handle)))
        found.append(found_by(d, given)[0])
    return pieces, all(same_found(found[0], other) for other in found[1:])
