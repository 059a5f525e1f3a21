"""What ranks do in tests/comm/test_deep_ep.py, all of it over the fake of DeepEP.

Values are small whole numbers and halves, which bfloat16 and E4M3 hold exactly, and so are all
their sums here: results equal the single-process computation bit for bit.

Shapes: T tokens of a rank, H hidden, K experts a token, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from counterflow.comm import Dispatcher, dispatcher
from counterflow.comm.dispatch import ExpertLayout, deep_ep, deep_ep_versions
from counterflow.fp8 import dequantize, quantize_tiles
from counterflow.parallel.mesh import Mesh, MeshShape
from tests.fake_deep_ep import installed
from tests.fake_deep_ep.legacy import Buffer

E, K, H = 8, 3, 256
VERSIONS = ("v1", "v1 over nodes", "v2", "v2 over nodes")
TOKENS: dict[str, tuple[int, ...]] = {
    "uneven": (1, 9, 4, 12),
    "a rank without tokens": (5, 0, 3, 4),
    "no tokens at all": (0, 0, 0, 0),
}
LAYOUTS: dict[str, tuple[int, ...]] = {
    "contiguous": tuple(range(E)),
    "permuted": (5, 2, 7, 0, 1, 6, 3, 4),
    "redundant": (0, 1, 2, 3, 4, 5, 6, 7, 3, 0, 3, 6),
}


@contextmanager
def fake(version: str, **facts: Any) -> Iterator[list[Any]]:
    """The fake in place of DeepEP, on the CPU; "over nodes": two ranks make a node."""
    with ExitStack() as stack:
        made = stack.enter_context(installed(version[:2], **facts))
        stack.enter_context(mock.patch.object(deep_ep, "DEVICE", "cpu"))
        if version == "v1 over nodes":
            stack.enter_context(mock.patch.object(Buffer, "nvl_peers", 2))
            stack.enter_context(mock.patch.object(deep_ep_versions.Legacy, "NODE", 2))
        yield made


def make(world: int, version: str, layout: str = "contiguous", **options: Any) -> Dispatcher[Any]:
    nodes = tuple(r // 2 for r in range(world)) if "nodes" in version else (0,) * world
    mesh = Mesh.create(MeshShape(1, world, world), nodes=nodes)
    where = ExpertLayout(E, world, LAYOUTS[layout])
    return dispatcher("deep_ep", mesh, num_experts=E, layout=where, **options)


def inputs(rank: int, load: str, top_k: int = K) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_TD bfloat16, experts_TK, weights_TK float32, gradient of y_TD) of one rank."""
    random = torch.Generator().manual_seed(100 + rank)
    T = TOKENS[load][rank]

    def whole(*shape: int) -> Tensor:
        return torch.randint(-4, 5, shape, generator=random).to(torch.bfloat16)

    experts_TK = torch.rand(T, E, generator=random).argsort(dim=1)[:, :top_k].contiguous()
    experts_TK[torch.rand(T, top_k, generator=random) < 0.2] = -1
    weights_TK = torch.randint(1, 4, (T, top_k), generator=random) / 2
    return whole(T, H), experts_TK, weights_TK, whole(T, H)


def scale(expert: int) -> float:
    """What expert e multiplies by."""
    return (1.0, 2.0, 0.5, -1.0)[expert % 4] * (1 if expert < 4 else -2)


def dense(rank: int, load: str) -> dict[str, Tensor]:
    """y and the gradients of x and of the weights, token by token in float64."""
    x_TD, experts_TK, weights_TK, grad_TD = inputs(rank, load)
    x, w, g = x_TD.double(), weights_TK.double(), grad_TD.double()
    y, dx, dw = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(w)
    for t, experts in enumerate(experts_TK.tolist()):
        for k, e in enumerate(experts):
            if e >= 0:
                y[t] += w[t, k] * scale(e) * x[t]
                dx[t] += w[t, k] * scale(e) * g[t]
                dw[t, k] = (scale(e) * x[t] * g[t]).sum()
    return {"y": y, "x": dx, "weights": dw}


def through_experts(d: Dispatcher[Any], x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    out = d.dispatch(x, experts, weights)
    of_row = [scale(e) for e, n in zip(d.local_experts, out.counts, strict=True) for _ in range(n)]
    rows = out.rows_ND.float() * torch.tensor(of_row)[:, None] * out.weights_N[:, None]
    return d.combine(rows.to(x.dtype), out.handle)


def refusal(mistake: Callable[[], object]) -> str:
    """What a ValueError says, or "nothing" without one."""
    try:
        mistake()
    except ValueError as error:
        return str(error)
    return "nothing"


def mixture(rank: int, world: int, version: str, payload: str, alignment: int) -> list[str]:
    """Names what differs from the single-process computation: nothing, it is hoped."""
    wrong = []
    with fake(version):
        for layout in LAYOUTS:
            d = make(world, version, layout, payload=payload, alignment=alignment)
            for load in TOKENS:
                x, experts, weights, grad = inputs(rank, load)
                if payload == "bf16":  # which rounds what is wider, had these values more digits
                    x, grad = x.float(), grad.float()
                x.requires_grad_()
                weights.requires_grad_()
                y = through_experts(d, x, experts, weights)
                y.backward(grad)
                found = {"y": y.detach(), "x": x.grad, "weights": weights.grad}
                for what, expected in dense(rank, load).items():
                    have = found[what]
                    if have is None or not torch.equal(have.double(), expected):
                        wrong.append(f"{what} of {load!r} with {layout} slots")
    return wrong


def grouped(rank: int, world: int, version: str) -> bool:
    """Rows lie by slot, then source rank, then token, then padding, as with any backend."""
    with fake(version):
        d = make(world, version, "redundant", payload="bf16", alignment=4)
        out = d.dispatch(*inputs(rank, "uneven")[:3])
    mesh = Mesh.create(MeshShape(1, world, world), nodes=(0,) * world)
    where = ExpertLayout(E, world, LAYOUTS["redundant"])
    other = dispatcher("dedup", mesh, num_experts=E, layout=where, alignment=4)
    expected = other.dispatch(*inputs(rank, "uneven")[:3])
    return (
        out.counts == expected.counts
        and torch.equal(out.rows_ND, expected.rows_ND)
        and torch.equal(out.weights_N, expected.weights_N)
    )


def rounded(rank: int, world: int, version: str) -> bool:
    """In FP8, rows are x quantised in tiles, they arrive as tiles too, and DeepEP gets E4M3."""
    _, experts, weights, grad = inputs(rank, "uneven")
    x = torch.randn(len(experts), H, generator=torch.Generator().manual_seed(rank)).bfloat16()
    with fake(version) as made:
        d = make(world, version, payload="fp8")
        out = d.dispatch(x, experts, weights)
        plain = make(world, version, payload="bf16")
        coarse = dequantize(quantize_tiles(x), torch.bfloat16)
        expected = plain.dispatch(coarse, experts, weights)
        d.start_combine_backward(grad, out.handle).finish()
        d.combine(out.rows_ND, out.handle)
    tiles = out.tiles
    sent = [c.arguments["x"] for c in made[0].calls if c.name == "dispatch"]
    return (
        tiles is not None
        and torch.equal(dequantize(tiles, torch.bfloat16), out.rows_ND)
        and torch.equal(out.rows_ND, expected.rows_ND)
        and len(sent) == 2
        and all(s[0].dtype == torch.float8_e4m3fn and s[1].shape[1] == 2 for s in sent)
        and not torch.equal(coarse, x)
    )


def order_of_calls(rank: int, world: int, version: str) -> list[tuple[str, list[str]]]:
    """Which of DeepEP's calls a step with recomputation makes, and the arguments that are given."""
    x, experts, weights, grad = inputs(rank, "uneven")
    x.requires_grad_()
    weights.requires_grad_()
    with fake(version) as made:
        d = make(world, version)
        out = d.dispatch(x, experts, weights)
        d.dispatch(x.detach(), experts, weights.detach(), out.handle)
        d.combine(out.rows_ND * 1, out.handle).backward(grad)
        assert isinstance(d, deep_ep.DeepEP)
        d.close()
    calls = []
    for call in made[0].calls:
        given = [k for k, v in call.arguments.items() if v is not None and v is not False]
        calls.append((call.name, given))
    return calls


def recompute(rank: int, world: int, version: str) -> bool:
    """A handle serves again, for other rows and other weights."""
    x, experts, weights, _ = inputs(rank, "uneven")
    with fake(version):
        d = make(world, version)
        first = d.dispatch(x, experts, weights)
        second = d.dispatch(2 * x, experts, 4 * weights, first.handle)
    return (
        second.handle is first.handle
        and torch.equal(second.rows_ND, 2 * first.rows_ND)
        and torch.equal(second.weights_N, 4 * first.weights_N)
    )


def split_form(rank: int, world: int, version: str) -> bool:
    """start / finish, two in flight, equal the differentiable form; one gradient may be None."""
    x, experts, weights, grad = inputs(rank, "uneven")
    with fake(version):
        d = make(world, version)
        out = d.dispatch(x, experts, weights)
        handle = d.start_preprocess(experts).finish()
        first = d.start_dispatch(x, weights, handle)
        again = d.start_dispatch(x, weights, out.handle)
        rows, weights_N, _ = first.finish()
        same = torch.equal(again.finish().rows_ND, rows) and torch.equal(rows, out.rows_ND)
        back = d.start_combine_backward(grad, handle).finish()
        both = d.start_dispatch_backward(back, weights_N, handle).finish()
        only_x = d.start_dispatch_backward(back, None, handle).finish()
        only_w = d.start_dispatch_backward(None, weights_N, handle).finish()
    assert both[0] is not None
    assert only_x[0] is not None
    assert both[1] is not None
    assert only_w[1] is not None
    chosen = experts >= 0
    return (
        same
        and only_x[1] is None
        and only_w[0] is None
        and torch.equal(both[0], only_x[0])
        and torch.equal(both[1], only_w[1])
        and torch.equal(both[1], weights * chosen)
        and torch.equal(both[0], grad * chosen.sum(1, keepdim=True))
    )


def growing(rank: int, world: int) -> list[tuple[str, list[str]]]:
    """V2: more tokens than the buffer was made for; a handle of before still serves."""
    few, many = ({"uneven": (2, 3, 1, 2)}, {"uneven": (2, 2000, 1, 2)})
    with fake("v2") as made, mock.patch.dict(TOKENS, few):
        d = make(world, "v2")
        x, experts, weights, _ = inputs(rank, "uneven")
        before = d.dispatch(x, experts, weights)
        with mock.patch.dict(TOKENS, many):
            d.dispatch(*inputs(rank, "uneven")[:3])
        again = d.dispatch(x, experts, weights, before.handle)
        assert torch.equal(again.rows_ND, before.rows_ND)
        y = d.combine(before.rows_ND, before.handle)
        assert torch.equal(y, x * (experts >= 0).sum(1, keepdim=True))
    return [(type(b).__name__, [c.name for c in b.calls]) for b in made]


def sms(rank: int, world: int, known: str) -> list[int]:
    """V2's numbers of SMs for two dispatches, where links' bandwidths are `known` or not."""
    facts: dict[str, dict[str, float]] = {
        "to all": {},
        "differently": {"nvlink_gbs": 200 + 100 * rank},
        "not to rank 1": {"nvlink_gbs": 0 if rank == 1 else 200},
        "to none": {"nvlink_gbs": 0},
        "to none over nodes": {"nvlink_gbs": 0, "rdma_gbs": 0, "nodes": 2},
        "not beyond nodes": {"rdma_gbs": 0, "nodes": 2},
    }
    x, experts, weights, _ = inputs(rank, "uneven")
    with fake("v2", **facts[known]) as made:
        d = make(world, "v2")
        for _ in range(2):
            d.dispatch(x, experts, weights)
    return [c.arguments["num_sms"] for c in made[0].calls if c.name == "dispatch"]


def room(rank: int, world: int, version: str) -> list[dict[str, Any]]:
    """With what buffers are made, for 960 tokens of a rank and all experts each."""
    experts = torch.arange(E).expand(960, E)
    x = torch.ones(960, H, dtype=torch.bfloat16)
    with fake(version) as made:
        d = make(world, version, timeout_s=41.5)
        out = d.dispatch(x, experts, torch.ones(experts.shape))
        d.combine(out.rows_ND, out.handle)
    kept = ("num_topk", "hidden", "use_fp8_dispatch", "num_max_tokens_per_rank", "deterministic",
            "num_cpu_timeout_secs", "num_gpu_timeout_secs", "num_nvl_bytes",
            "num_rdma_bytes")  # fmt: skip
    arguments = [b.calls[0].arguments for b in made]
    return [{k: a[k] for k in kept if k in a} for a in arguments]


def v1_room(world: int) -> list[tuple[int, int]]:
    """(NVLink, RDMA) bytes that each of V1's configurations asks for."""
    with fake("v1 over nodes"):
        configs = Buffer.get_dispatch_config(world), Buffer.get_combine_config(world)
        return [
            (c.get_nvl_buffer_size_hint(2 * H, world), c.get_rdma_buffer_size_hint(2 * H, world))
            for c in configs
        ]


def bytes_sent(rank: int, world: int, version: str) -> tuple[int, int]:
    """(bytes counted to other nodes, what the routing says) of a dispatch and a combine."""
    with fake(version):
        d = make(world, version)
        x, experts, weights, _ = inputs(rank, "uneven")
        out = d.dispatch(x, experts, weights)
        d.combine(out.rows_ND, out.handle)
    per_node = E // 2

    def crossings(source: int) -> int:
        node = inputs(source, "uneven")[1].div(per_node, rounding_mode="floor")
        return int((node == 1 - source // 2).any(1).sum())

    back = (rank + 2) % world  # the rank of this in-node index, whose tokens come by here
    return d.crossed_bytes, crossings(rank) * (2 * H + 12 * K) + crossings(back) * 2 * H


def node_limit(rank: int, world: int) -> tuple[int, int, str]:
    """V2's number of SMs without and with a node limit, and what is said to a token beyond it."""
    x = inputs(rank, "uneven")[0]
    home = torch.full((len(x), 1), 2 * rank)
    both = torch.tensor([[0, E - 1]]).repeat(len(x), 1)
    with fake("v2 over nodes") as made:
        make(world, "v2 over nodes").dispatch(x, home, torch.ones(home.shape))
        limited = make(world, "v2 over nodes", node_limit=1)
        limited.dispatch(x, home, torch.ones(home.shape))
        said = refusal(lambda: limited.dispatch(x, both, torch.ones(both.shape)))
        free, bound = (b.calls[1].arguments["num_sms"] for b in made)
    return free, bound, said


def peer_dies(rank: int, world: int, version: str) -> None:
    """Rank 1 dies before combine(F)."""
    with fake(version):
        d = make(world, version, timeout_s=5.0)
        x, experts, weights, _ = inputs(rank, "uneven")
        out = d.dispatch(x, experts, weights)
        if rank == 1:
            os._exit(1)
        d.combine(out.rows_ND, out.handle)


def given_sms(rank: int, world: int, version: str, num_sms: int | None) -> list[tuple[str, int]]:
    """With how many SMs each call of a step with recomputation communicates."""
    x, experts, weights, grad = inputs(rank, "uneven")
    x.requires_grad_()
    weights.requires_grad_()
    found: list[tuple[str, int]] = []
    with mock.patch.object(Buffer, "num_sms", 24), fake(version) as made:
        d = make(world, version, num_sms=num_sms)
        out = d.dispatch(x, experts, weights)
        d.dispatch(x.detach(), experts, weights.detach(), out.handle)
        d.combine(out.rows_ND * 1, out.handle).backward(grad)
        for call in made[0].calls:
            if call.name in ("dispatch", "combine"):
                given = call.arguments
                if version == "v1":
                    found.append((call.name, given["config"].num_sms))
                else:  # a combine takes those of its handle
                    sms = given["handle"].num_sms if call.name == "combine" else given["num_sms"]
                    found.append((call.name, sms))
    return found


def refused_sms(rank: int, world: int) -> list[str]:
    """What is said to numbers of SMs that cannot be."""
    mesh = Mesh.create(MeshShape(1, world, world), nodes=(0,) * world)
    with fake("v1"):
        odd = refusal(lambda: make(world, "v1", num_sms=11))
        none = refusal(lambda: make(world, "v1", num_sms=0))
    gloo = refusal(lambda: dispatcher("dedup", mesh, num_experts=E, num_sms=20))
    return [odd, none, gloo]
