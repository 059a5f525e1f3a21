"""What ranks do in tests/comm/test_dispatch.py.

T tokens of a rank, D hidden, K experts a token, E experts. The expert e multiplies by its own
matrix and squares, so that a row at the wrong expert, or with the wrong weight, shows.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch
from torch import Tensor

from counterflow.comm import Dispatcher, dispatcher
from counterflow.parallel.mesh import Mesh, MeshShape

E, K, D = 8, 3, 5

# Tokens of each rank, and which experts a routing may pick.
LOADS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "even": ((6, 6, 6, 6), tuple(range(E))),
    "uneven": ((1, 9, 4, 12), tuple(range(E))),
    "idle experts": ((5, 7, 3, 4), (0, 3, 6)),
    "one busy rank": ((5, 7, 3, 4), (6, 7)),
    "a rank without tokens": ((0, 7, 0, 4), tuple(range(E))),
    "no tokens at all": ((0, 0, 0, 0), tuple(range(E))),
}


def inputs(
    rank: int, load: str, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_TD, experts_TK, weights_TK, gradient of y_TD) of one rank."""
    tokens, allowed = LOADS[load]
    random = torch.Generator().manual_seed(100 + rank)
    T = tokens[rank]
    x_TD = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype)
    choice_TK = torch.randint(len(allowed), (T, K), generator=random)
    weights_TK = torch.rand(T, K, generator=random, dtype=torch.float64).to(dtype)
    grad_TD = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype)
    return x_TD, torch.tensor(allowed)[choice_TK], weights_TK, grad_TD


def expert_weights(dtype: torch.dtype = torch.float64) -> Tensor:
    """[E, D, D]."""
    random = torch.Generator().manual_seed(7)
    return torch.randn(E, D, D, generator=random, dtype=torch.float64).to(dtype)


def expert(rows: Tensor, matrix: Tensor) -> Tensor:
    return (rows @ matrix).square()


def dense(load: str) -> list[dict[str, Tensor]]:
    """The same in one process, token by token: y, gradients of x and weights of each rank.

    "experts" is the gradient of all experts' matrices over the four ranks.
    """
    matrices = expert_weights().requires_grad_()
    result: list[dict[str, Tensor]] = []
    for rank in range(4):
        x_TD, experts_TK, weights_TK, grad_TD = inputs(rank, load)
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        y_TD = torch.zeros(0, D, dtype=torch.float64)
        for x, experts, weights in zip(x_TD, experts_TK.tolist(), weights_TK, strict=True):
            y = torch.zeros(D, dtype=torch.float64)
            for k, e in enumerate(experts):
                y = y + weights[k] * expert(x, matrices[e])
            y_TD = torch.cat([y_TD, y[None]])
        y_TD = y_TD + 0 * (x_TD.sum() + weights_TK.sum() + matrices.sum())  # zeros, where T is 0
        y_TD.backward(grad_TD)
        assert x_TD.grad is not None
        assert weights_TK.grad is not None
        result.append({"y": y_TD.detach(), "x": x_TD.grad, "weights": weights_TK.grad})
    assert matrices.grad is not None
    return [{**r, "experts": matrices.grad} for r in result]


def through_experts(
    d: Dispatcher[Any], x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, matrices: Tensor
) -> tuple[Tensor, list[int]]:
    out = d.dispatch(x_TD, experts_TK, weights_TK)
    parts = out.rows_ND.split(out.counts)
    mine = [matrices[e] for e in d.local_experts]
    rows_ND = torch.cat([expert(rows, m) for rows, m in zip(parts, mine, strict=True)])
    return d.combine(rows_ND * out.weights_N[:, None], out.handle), out.counts


def mixture(rank: int, world: int, ep: int, load: str) -> dict[str, Any]:
    """Forward and backward of a mixture of experts spread over ep ranks."""
    mesh = Mesh.create(MeshShape(1, world, ep))
    d = dispatcher("flat", mesh, num_experts=E)
    x_TD, experts_TK, weights_TK, grad_TD = inputs(rank, load)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    matrices = expert_weights().requires_grad_()
    y_TD, counts = through_experts(d, x_TD, experts_TK, weights_TK, matrices)
    y_TD.backward(grad_TD)
    return {
        "y": y_TD.detach(),
        "x": x_TD.grad,
        "weights": weights_TK.grad,
        "experts": matrices.grad,
        "counts": counts,
        "local": list(d.local_experts),
    }


def exact_loop(rank: int, world: int, ep: int) -> bool:
    """Rows carry (rank, token, k): every one is where a loop would put it, bit for bit."""
    mesh = Mesh.create(MeshShape(1, world, ep))
    d = dispatcher("flat", mesh, num_experts=E)
    out = d.dispatch(*inputs(rank, "uneven")[:3])
    rows, weights, counts = [], [], []
    for e in d.local_experts:
        before = len(rows)
        for source in mesh.shape.ep_peers(rank):
            x_TD, experts_TK, weights_TK, _ = inputs(source, "uneven")
            for t, k in (experts_TK == e).nonzero().tolist():
                rows.append(x_TD[t])
                weights.append(weights_TK[t, k])
        counts.append(len(rows) - before)
    return (
        out.counts == counts
        and torch.equal(out.rows_ND, torch.stack(rows))
        and torch.equal(out.weights_N, torch.stack(weights))
    )


def same_sum(rank: int, world: int, ep: int, dtype: torch.dtype) -> bool:
    """combine adds k = 0 first, 1 next, ...; in float32 where the dtype is lower; then rounds."""
    d = dispatcher("flat", Mesh.create(MeshShape(1, world, ep)), num_experts=E)
    x_TD, experts_TK, weights_TK, _ = inputs(rank, "uneven", dtype)
    out = d.dispatch(x_TD, experts_TK, weights_TK)
    y_TD = d.combine(out.rows_ND * out.weights_N[:, None], out.handle)
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    expected = torch.zeros(len(x_TD), D, dtype=wide)
    for k in range(K):
        expected = expected + (x_TD * weights_TK[:, k : k + 1]).to(wide)
    return y_TD.dtype == dtype and torch.equal(y_TD, expected.to(dtype))


def split_form(rank: int, world: int, ep: int) -> bool:
    """start / finish, with other work between, equal the differentiable form bit for bit."""
    d = dispatcher("flat", Mesh.create(MeshShape(1, world, ep)), num_experts=E)
    x_TD, experts_TK, weights_TK, grad_TD = inputs(rank, "uneven")
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    out = d.dispatch(x_TD, experts_TK, weights_TK)
    y_TD = d.combine(out.rows_ND * out.weights_N[:, None], out.handle)
    y_TD.backward(grad_TD)
    with torch.no_grad():
        started = d.start_preprocess(experts_TK)
        handle = started.finish()
        first = d.start_dispatch(x_TD, weights_TK, handle)
        again = d.start_dispatch(x_TD, weights_TK, out.handle)  # two in flight, and a used handle
        rows_ND, weights_N = first.finish()
        same = torch.equal(again.finish()[0], rows_ND) and torch.equal(rows_ND, out.rows_ND)
        y = d.start_combine(rows_ND * weights_N[:, None], handle).finish()
        grad_ND = d.start_combine_backward(grad_TD, handle).finish()
        grad_N = (grad_ND * rows_ND).sum(1)
        back = d.start_dispatch_backward(grad_ND * weights_N[:, None], grad_N, handle)
        grad_x, grad_weights = back.finish()
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    assert grad_x is not None
    assert grad_weights is not None
    return (
        same
        and torch.equal(y, y_TD)
        and torch.equal(grad_x, x_TD.grad)
        and torch.equal(grad_weights, weights_TK.grad)
    )


def recompute(rank: int, world: int, ep: int) -> bool:
    """A second dispatch with the first one's handle gives the same rows."""
    d = dispatcher("flat", Mesh.create(MeshShape(1, world, ep)), num_experts=E)
    x_TD, experts_TK, weights_TK, _ = inputs(rank, "uneven")
    first = d.dispatch(x_TD, experts_TK, weights_TK)
    second = d.dispatch(2 * x_TD, experts_TK, weights_TK, first.handle)
    return second.handle is first.handle and torch.equal(second.rows_ND, 2 * first.rows_ND)


def frozen(rank: int, world: int, ep: int) -> tuple[bool, bool]:
    """With x frozen, the weights still get their gradient; and the other way round."""
    d = dispatcher("flat", Mesh.create(MeshShape(1, world, ep)), num_experts=E)
    found = []
    for learn in ("weights", "x"):
        x_TD, experts_TK, weights_TK, grad_TD = inputs(rank, "uneven")
        x_TD.requires_grad_(learn == "x")
        weights_TK.requires_grad_(learn == "weights")
        y_TD, _ = through_experts(d, x_TD, experts_TK, weights_TK, expert_weights())
        y_TD.backward(grad_TD)
        learnt, other = (x_TD, weights_TK) if learn == "x" else (weights_TK, x_TD)
        expected = dense("uneven")[rank][learn]
        assert learnt.grad is not None
        torch.testing.assert_close(learnt.grad, expected, rtol=1e-12, atol=1e-12)
        found.append(other.grad is None)
    return found[0], found[1]


def twice_differentiated(rank: int, world: int) -> str:
    d = dispatcher("flat", Mesh.create(MeshShape(1, world, world)), num_experts=E)
    x_TD, experts_TK, weights_TK, _ = inputs(rank, "even")
    y_TD, _ = through_experts(d, x_TD.requires_grad_(), experts_TK, weights_TK, expert_weights())
    (grad,) = torch.autograd.grad(y_TD.sum(), x_TD, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def stop_or_raise(rank: int, world: int, operation: str, how: str) -> None:
    """The last rank dies or falls asleep just before `operation`; the others raise CommError."""
    limit_s = 1.0
    # The groups' own limit is what ends the transfers that are left behind.
    mesh = Mesh.create(MeshShape(1, world, world), timeout_s=2 * limit_s)
    d = dispatcher("flat", mesh, num_experts=E, timeout_s=limit_s)
    x_TD, experts_TK, weights_TK, grad_TD = inputs(rank, "even")

    def here(name: str) -> None:
        if rank == world - 1 and operation == name:
            if how == "dies":
                os._exit(1)
            time.sleep(2 * limit_s)
            raise TimeoutError("slept")

    here("dispatch(F)")
    out = d.dispatch(x_TD.requires_grad_(), experts_TK, weights_TK)
    out.rows_ND.register_hook(lambda _: here("dispatch(B)"))
    rows_ND = out.rows_ND * out.weights_N[:, None]
    here("combine(F)")
    y_TD = d.combine(rows_ND, out.handle)
    here("combine(B)")
    y_TD.backward(grad_TD)
