"""Ways to use a dispatcher: with experts, split, again with a handle, in a layer of the model.

The expert e multiplies by its own matrix and squares, so that a row at the wrong expert, or with
the wrong weight, shows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from counterflow.comm import Dispatcher
from counterflow.comm.dispatch.exchange import Peers
from counterflow.model import ModelConfig
from counterflow.model.build import Build
from counterflow.model.moe import MoE
from counterflow.parallel.mesh import Mesh

from .cases_dispatch import (
    LOADS,
    Batch,
    D,
    E,
    Found,
    K,
    Setting,
    batch,
    found_by,
    on_meshes,
    record_bytes,
    same_bits,
    same_found,
    through,
)


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
        x_TD, experts_TK, weights_TK, grad_TD = batch(rank, load)
        x_TD.requires_grad_()
        weights_TK.requires_grad_()
        y_TD = torch.zeros(0, D, dtype=torch.float64)
        for x, experts, weights in zip(x_TD, experts_TK.tolist(), weights_TK, strict=True):
            y = torch.zeros(D, dtype=torch.float64)
            for k, e in enumerate(experts):
                if e >= 0:
                    y = y + weights[k] * expert(x, matrices[e])
            y_TD = torch.cat([y_TD, y[None]])
        y_TD = y_TD + 0 * (x_TD.sum() + weights_TK.sum() + matrices.sum())  # zeros, where T is 0
        y_TD.backward(grad_TD)
        assert x_TD.grad is not None
        assert weights_TK.grad is not None
        result.append({"y": y_TD.detach(), "x": x_TD.grad, "weights": weights_TK.grad})
    assert matrices.grad is not None
    return [{**r, "experts": matrices.grad} for r in result]


def through_experts(d: Dispatcher[Any], given: Batch, matrices: Tensor) -> tuple[Tensor, list[int]]:
    out = d.dispatch(given.x_TD, given.experts_TK, given.weights_TK)
    parts = out.rows_ND.split(out.counts)
    mine = [matrices[e] for e in d.local_experts]
    rows_ND = torch.cat([expert(rows, m) for rows, m in zip(parts, mine, strict=True)])
    return d.combine(rows_ND * out.weights_N[:, None], out.handle), out.counts


def mixtures(
    rank: int, world: int, setting: Setting, loads: Sequence[str] = tuple(LOADS)
) -> dict[str, dict[str, Any]]:
    """By load, forward and backward of a mixture of experts."""
    d = setting.make(setting.mesh())
    found = {}
    for load in loads:
        given = batch(rank, load)
        given.x_TD.requires_grad_()
        given.weights_TK.requires_grad_()
        matrices = expert_weights().requires_grad_()
        y_TD, counts = through_experts(d, given, matrices)
        y_TD.backward(given.grad_TD)
        found[load] = {
            "y": y_TD.detach(),
            "x": given.x_TD.grad,
            "weights": given.weights_TK.grad,
            "experts": matrices.grad,
            "counts": counts,
            "local": list(d.local_experts),
        }
    return found


class InFlight:
    """One pass in the split form, started and finished step by step."""

    def __init__(self, d: Dispatcher[Any], given: Batch) -> None:
        self.d, self.given = d, given

    def steps(self) -> list[tuple[Any, Any]]:
        """(start, finish) of each step, in order."""
        return [
            (self._preprocess, self._preprocessed),
            (self._dispatch, self._dispatched),
            (self._combine, self._combined),
            (self._combine_backward, self._combined_backward),
            (self._dispatch_backward, self._dispatched_backward),
        ]

    def _preprocess(self) -> Any:
        return self.d.start_preprocess(self.given.experts_TK)

    def _preprocessed(self, handle: Any) -> None:
        self.handle = handle

    def _dispatch(self) -> Any:
        return self.d.start_dispatch(self.given.x_TD, self.given.weights_TK, self.handle)

    def _dispatched(self, arrived: Any) -> None:
        self.rows_ND, self.weights_N = arrived.rows_ND, arrived.weights_N
        self.leaves = [t.clone().requires_grad_() for t in (self.rows_ND, self.weights_N)]
        rows, weights = self.leaves
        self.output = through(rows, weights, self.d.local_experts, self.handle.counts)

    def _combine(self) -> Any:
        return self.d.start_combine(self.output.detach(), self.handle)

    def _combined(self, y_TD: Tensor) -> None:
        self.y_TD = y_TD

    def _combine_backward(self) -> Any:
        return self.d.start_combine_backward(self.given.grad_TD, self.handle)

    def _combined_backward(self, grad_ND: Tensor) -> None:
        self.output.backward(grad_ND)

    def _dispatch_backward(self) -> Any:
        rows, weights = self.leaves
        return self.d.start_dispatch_backward(rows.grad, weights.grad, self.handle)

    def _dispatched_backward(self, grads: tuple[Tensor, Tensor]) -> None:
        counts = self.handle.counts
        self.found = Found(self.rows_ND, self.weights_N, counts, self.y_TD, *grads)


def split_form(rank: int, world: int, settings: Sequence[Setting]) -> list[str]:
    """Three passes at once, finished in another order than started, against the whole form."""
    wrong = []
    for setting, mesh in on_meshes(settings):
        d = setting.make(mesh)
        given = [batch(rank, load, torch.float32) for load in ("uneven", "one busy rank", "even")]
        expected = [found_by(d, g)[0] for g in given]
        passes = [InFlight(d, g) for g in given]
        for step in range(5):
            started = [p.steps()[step][0]() for p in passes]
            for i in (1, 2, 0):
                passes[i].steps()[step][1](started[i].finish())
        wrong += [
            f"{setting}, pass {i}"
            for i, (p, e) in enumerate(zip(passes, expected, strict=True))
            if not same_found(p.found, e)
        ]
    return wrong


def mixed_steps(rank: int, world: int, setting: Setting) -> bool:
    """A combine, a dispatch and both backwards of three passes under way at once.

    Each pass has a dispatcher of its own, as layers have, over one mesh.
    """
    mesh = setting.mesh()
    made = [setting.make(mesh), replace(setting, name="dedup").make(mesh), setting.make(mesh)]
    given = [batch(rank, load, torch.float32) for load in ("uneven", "one busy rank", "even")]
    expected = [found_by(d, g)[0] for d, g in zip(made, given, strict=True)]
    passes = [InFlight(d, g) for d, g in zip(made, given, strict=True)]
    reached = [0, 0, 0]
    # Pass i is i steps behind the one before it, as in a pipeline.
    for tick in range(5 + 2):
        active = [i for i in range(3) if 0 <= tick - i < 5]
        started = [(i, passes[i].steps()[tick - i][0]()) for i in active]
        for i, pending in reversed(started):
            passes[i].steps()[tick - i][1](pending.finish())
            reached[i] += 1
    assert reached == [5, 5, 5]
    return all(same_found(p.found, e) for p, e in zip(passes, expected, strict=True))


def recompute(rank: int, world: int, settings: Sequence[Setting]) -> list[str]:
    """A second dispatch with the first one's handle: same rows, neither indices nor counts sent."""
    wrong = []
    for setting, mesh in on_meshes(settings):
        d = setting.make(mesh)
        x_TD, experts_TK, weights_TK, _ = given = batch(rank, "uneven", torch.bfloat16)
        with patch.object(Peers, "_exchange", autospec=True, side_effect=Peers._exchange) as calls:
            first = d.dispatch(x_TD, experts_TK, weights_TK)
            exchanges = [calls.call_count]
            sent = list(d.sent_bytes["dispatch(F)"])
            second = d.dispatch(2 * x_TD, experts_TK, weights_TK, first.handle)
            exchanges.append(calls.call_count - exchanges[0])
        again = [b - a for a, b in zip(sent, d.sent_bytes["dispatch(F)"], strict=True)]
        size = record_bytes(setting, given)["dispatch(F)"]
        smaller = record_bytes(setting, given, first=False)["dispatch(F)"]
        assert size - smaller == 2 * (1 if setting.name == "flat" else K)
        if again != [n // size * smaller for n in sent]:
            wrong.append(f"{setting}: bytes {sent}, then {again}")
        if exchanges != [exchanges[1] + (mesh.ep_group is not None), exchanges[1]]:
            wrong.append(f"{setting}: {exchanges} exchanges")
        if second.handle is not first.handle or not same_bits(second.rows_ND, 2 * first.rows_ND):
            wrong.append(f"{setting}: rows")
        if second.counts != first.counts or not same_bits(second.weights_N, first.weights_N):
            wrong.append(f"{setting}: weights")
    return wrong


def frozen(rank: int, world: int, setting: Setting) -> tuple[bool, bool]:
    """With x frozen, the weights still get their gradient; and the other way round."""
    d = setting.make(setting.mesh())
    found = []
    for learn in ("weights", "x"):
        given = batch(rank, "even")
        given.x_TD.requires_grad_(learn == "x")
        given.weights_TK.requires_grad_(learn == "weights")
        y_TD, _ = through_experts(d, given, expert_weights())
        y_TD.backward(given.grad_TD)
        learnt, other = given.x_TD, given.weights_TK
        if learn == "weights":
            learnt, other = other, learnt
        assert learnt.grad is not None
        expected = dense("even")[rank][learn]
        torch.testing.assert_close(learnt.grad, expected, rtol=1e-12, atol=1e-12)
        found.append(other.grad is None)
    return found[0], found[1]


def strided(rank: int, world: int, setting: Setting) -> bool:
    """Tensors that do not lie row after row are taken for what they hold."""
    d = setting.make(setting.mesh())
    given = batch(rank, "uneven", torch.float32)
    given = given._replace(weights_TK=given.weights_TK[:, :1].expand(-1, K))
    odd = Batch(
        given.x_TD.t().contiguous().t(),
        given.experts_TK.repeat(1, 2)[:, :K],
        given.weights_TK,
        given.grad_TD[:, :1].expand(-1, D),
    )
    plain = Batch(*(t.contiguous() for t in odd))
    assert not any(t.is_contiguous() for t in odd if len(t) > 1)
    found = []
    for g in (plain, odd):
        x_TD = g.x_TD.detach().requires_grad_()
        weights_TK = g.weights_TK.detach().requires_grad_()
        out = d.dispatch(x_TD, g.experts_TK, weights_TK)
        rows_ND = through(out.rows_ND, out.weights_N, d.local_experts, out.counts)
        if g is odd:
            rows_ND = rows_ND.t().contiguous().t()
        y_TD = d.combine(rows_ND, out.handle)
        found.append([y_TD.detach(), *torch.autograd.grad(y_TD, (x_TD, weights_TK), g.grad_TD)])
    return all(same_bits(a, b) for a, b in zip(*found, strict=True))


def twice_differentiated(rank: int, world: int, setting: Setting) -> str:
    d = setting.make(setting.mesh())
    given = batch(rank, "even")
    y_TD, _ = through_experts(d, given._replace(x_TD=given.x_TD.requires_grad_()), expert_weights())
    (grad,) = torch.autograd.grad(y_TD.sum(), given.x_TD, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


def kept_buffers(rank: int, world: int, settings: Sequence[Setting]) -> list[tuple[int, ...]]:
    """By setting, bytes of its buffers after each of five steps, which leave results alone."""
    sizes = []
    for setting, mesh in on_meshes(settings):
        d: Any = setting.make(mesh)
        results: list[Found] = []
        copies: list[Found] = []
        after: list[int] = []
        for step in range(5):
            given = batch(rank, "uneven", torch.float32)
            results.append(found_by(d, given._replace(x_TD=given.x_TD + step))[0])
            copies.append(copy.deepcopy(results[-1]))
            after.append(d.lane.buffers.num_bytes)
        assert all(same_found(a, b) for a, b in zip(results, copies, strict=True))
        assert not same_bits(results[0].y_TD, results[1].y_TD) or not len(results[0].y_TD)
        sizes.append(tuple(after))
    return sizes


LAYER = ModelConfig(
    hidden_size=16,
    moe_intermediate_size=12,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
)


def layer(dispatcher: Dispatcher[Any]) -> MoE:
    """The model's layer with this rank's part of the same weights on all ranks."""
    moe = MoE(LAYER, dispatcher, Build())
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            local = name.startswith("experts.")
            shape = (LAYER.n_routed_experts, *parameter.shape[1:]) if local else parameter.shape
            whole = 0.3 * torch.randn(shape, generator=random)
            parameter.copy_(whole[list(dispatcher.local_experts)] if local else whole)
    return moe


def layer_batch(rank: int) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output, [2 sequences, some tokens, D]."""
    random = torch.Generator().manual_seed(20 + rank)
    shape = (2, (5, 9, 1, 12)[rank], LAYER.hidden_size)
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random)


def layer_pass(moe: MoE, x_BLD: Tensor, grad_BLD: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input, and of all parameters by name."""
    x_BLD.requires_grad_()
    arrived = moe.dispatch(x_BLD, moe.route(x_BLD))
    y_BLD = moe.combine(moe.compute_routed(arrived), arrived).view_as(x_BLD)
    shared = moe.compute_shared(x_BLD)
    assert shared is not None
    (y_BLD + shared).backward(grad_BLD)
    grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(moe.parameters()))
    assert x_BLD.grad is not None
    return {"y": (y_BLD + shared).detach(), "x": x_BLD.grad, **grads}


def layers(rank: int, world: int, setting: Setting) -> dict[str, Tensor]:
    """A pass through this rank's part of the layer."""
    return layer_pass(layer(setting.make(setting.mesh())), *layer_batch(rank))


def whole_layer() -> list[dict[str, Tensor]]:
    """The same in one process with all experts: each rank's batch in turn.

    Gradients of parameters add up, so that the last has those of all ranks.
    """
    alone = Setting("flat", (0,), num_experts=LAYER.n_routed_experts)
    moe = layer(alone.make(Mesh(alone.shape)))
    found = [layer_pass(moe, *layer_batch(rank)) for rank in range(4)]
    return [{name: t.clone() for name, t in f.items()} for f in found]
