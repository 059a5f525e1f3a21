"""Weights in FP8: quantised once until one changes, and never stale."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from counterflow.fp8 import (
    GroupedLinear,
    Linear,
    Quantized,
    Recipe,
    forget,
    quantize_blocks,
    quantize_tensor,
)
from counterflow.fp8.adamw import AdamW
from counterflow.fp8.linear import Call
from counterflow.fp8.weights import QuantizedWeight
from tests.fp8.linears import broadcast_weight, weight
from tests.ranks import RankPool


def check(cache: QuantizedWeight, weights: list[Tensor], recipe: Recipe | None = None) -> int:
    """How often the weights have been quantised, after a look at what is kept of them."""
    recipe = recipe or Recipe()
    stack = torch.cat([w.detach() for w in weights], dim=-2)
    expected = quantize_blocks(stack, power_of_two=recipe.power_of_two)
    found, turned = cache.get(weights, recipe)
    for q, e in ((found, expected), (turned, Quantized(expected.values.mT, expected.scales.mT))):
        assert torch.equal(q.values.float(), e.values.float())
        assert torch.equal(q.scales, e.scales)
    return cache.times_quantized


def test_a_weight_is_quantised_once_for_all_micro_batches() -> None:
    w, cache = weight(130, 200), QuantizedWeight()
    assert [check(cache, [w]) for _ in range(3)] == [1, 1, 1]
    assert cache.nbytes() == 130 * 200 + 4 * 2 * 2
    cache.forget()
    assert cache.nbytes() == 0
    assert check(cache, [w]) == 2


@torch.no_grad()
def _add(w: nn.Parameter) -> None:
    w.add_(1)


@torch.no_grad()
def _through_a_view(w: nn.Parameter) -> None:
    w[5].zero_()


@torch.no_grad()
def _copy(w: nn.Parameter) -> None:
    w.copy_(weight(130, 200, seed=7))


def _through_detach(w: nn.Parameter) -> None:
    w.detach().mul_(3)


def _sgd(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.SGD([w], lr=0.1).step()


def _adamw(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], lr=0.1).step()


def _adamw_fused(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], lr=0.1, fused=True).step()


def _adamw_foreach(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    torch.optim.AdamW([w], lr=0.1, foreach=True).step()


def _our_adamw(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    AdamW([w], lr=0.1).step()


class Unseen(torch.optim.Optimizer):
    """Changes weights by its own kernel, of which autograd knows nothing."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: object = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1)


def _unseen(w: nn.Parameter) -> None:
    w.grad = torch.ones_like(w)
    Unseen([w]).step()


def _other_memory(w: nn.Parameter) -> None:
    w.data = w.data * 2


def _memory_of_the_same_address(w: nn.Parameter) -> None:
    # Other numbers of the same dtype, shape and version, as a module that is moved away and back.
    address = w.data_ptr()
    kept = w.data.bfloat16()
    w.data = kept
    taken: list[Tensor] = []  # until the allocator gives the freed memory back
    while len(taken) < 50 and (not taken or taken[-1].data_ptr() != address):
        taken.append(torch.empty(w.shape))
    taken[-1].copy_(kept)
    w.data = taken[-1]


def _turned(w: nn.Parameter) -> None:
    w.data = w.data[:130, :130].t()


CHANGES = [
    _add,
    _through_a_view,
    _copy,
    _through_detach,
    _sgd,
    _adamw,
    _adamw_fused,
    _adamw_foreach,
    _our_adamw,
    _unseen,
    _other_memory,
    _memory_of_the_same_address,
    _turned,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: Callable[[nn.Parameter], None]) -> None:
    w, cache = weight(130, 200), QuantizedWeight()
    check(cache, [w])
    change(w)
    assert check(cache, [w]) == 2
    assert check(cache, [w]) == 2


def test_a_step_is_noticed_once_and_one_without_gradients_not_at_all() -> None:
    w, other, cache = weight(130, 200), weight(3, 5), QuantizedWeight()
    optimizer = torch.optim.Adam([w, other], lr=0.1, fused=True)
    check(cache, [w])
    other.grad = torch.ones_like(other)
    version = w._version
    for _ in range(2):
        optimizer.step()
        assert check(cache, [w]) == 1
    assert w._version == version
    w.grad = torch.ones_like(w)
    for times in (2, 3):
        optimizer.step()
        assert check(cache, [w]) == times


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_leaves_other_graphs_alone_whose_parameters_it_did_not_change(fused: bool) -> None:
    Linear(8, 8)  # from here on steps are noted
    g, d = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1)
    optimizer = torch.optim.Adam([*g.parameters(), *d.parameters()], lr=0.1, fused=fused)
    y = g(torch.randn(3, 4)).sum()
    d(g(torch.randn(3, 4)).detach()).sum().backward()
    optimizer.step()
    y.backward()  # through weights of g that its graph has saved
    assert all(parameter.grad is not None for parameter in g.parameters())


class Holder(nn.Module):
    """Holds weights as models do: side by side in a call of its own, and in layers below."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(200, 130), nn.Linear(200, 130)
        self._up_call = Call(Recipe(), QuantizedWeight())
        self.below = nn.ModuleList([Linear(200, 130), GroupedLinear(2, 200, 130)])

    def caches(self) -> list[tuple[QuantizedWeight, list[Tensor]]]:
        linear, grouped = self.below
        assert isinstance(linear, Linear)
        assert isinstance(grouped, GroupedLinear)
        return [
            (self._up_call.quantized, [self.gate_proj.weight, self.up_proj.weight]),
            (linear.quantized, [linear.weight]),
            (grouped.quantized, [grouped.weight]),
        ]


def test_forget_reaches_every_weight_below_a_module() -> None:
    holder = Holder()
    outer = nn.Sequential(holder, nn.Linear(3, 4))
    for cache, weights in holder.caches():
        check(cache, weights)
        for w in weights:
            w.data.mul_(3)  # past autograd, so that what is kept is stale
        found, _ = cache.get(weights, Recipe())
        stack = torch.cat([w.detach() for w in weights], dim=-2)
        assert not torch.equal(found.scales, quantize_blocks(stack).scales)
    forget(outer)
    for cache, weights in holder.caches():
        assert cache.nbytes() == 0
        assert check(cache, weights) == 2


def test_a_broadcast_is_not_noticed_until_the_weights_are_forgotten(ranks: RankPool) -> None:
    assert ranks.run(broadcast_weight, world=2) == [[True, True], [False, True]]


def test_get_gives_weights_also_where_another_thread_forgets_them() -> None:
    w, cache = weight(16, 16), QuantizedWeight()
    over = threading.Event()

    def keep_forgetting() -> None:
        while not over.is_set():
            cache.forget()

    thread = threading.Thread(target=keep_forgetting, daemon=True)
    thread.start()
    try:
        found = [cache.get([w], Recipe()) for _ in range(200)]
    finally:
        over.set()
        thread.join(timeout=10)
    first = found[0][0]
    assert all(torch.equal(q.scales, first.scales) for q, _ in found)


@pytest.mark.parametrize("alive", [False, True])
def test_another_tensor_is_noticed_also_at_the_same_address(alive: bool) -> None:
    w, cache = weight(130, 200), QuantizedWeight()
    check(cache, [w])
    if alive:
        other = weight(130, 200, seed=9)
    else:
        numbers, address = weight(130, 200, seed=9).detach(), w.data_ptr()
        del w
        other = nn.Parameter(torch.empty(130, 200))
        tries = [other]
        while other.data_ptr() != address and len(tries) < 50:
            other = nn.Parameter(torch.empty(130, 200))
            tries.append(other)
        assert other._version == 0
        other.data = other.data.copy_(numbers)
    assert check(cache, [other]) == 2


def test_one_of_several_stacked_weights_may_change_or_be_replaced() -> None:
    a, b, c = (weight(size, 200, seed=size) for size in (130, 70, 70))
    cache = QuantizedWeight()
    assert check(cache, [a, b]) == 1
    _add(b)
    assert check(cache, [a, b]) == 2
    assert check(cache, [a, c]) == 3
    assert check(cache, [c, a]) == 4
    assert check(cache, [a]) == 5
    assert check(cache, [a]) == 5


def test_another_recipe_quantises_anew() -> None:
    w, cache = weight(130, 200), QuantizedWeight()
    check(cache, [w])
    assert check(cache, [w], Recipe(scales="float32")) == 2
    tensor, _ = cache.get([w], Recipe(weights="tensor"))
    assert torch.equal(tensor.scales, quantize_tensor(w.detach()).scales)


def test_weights_that_nobody_counts_are_quantised_each_time() -> None:
    with torch.inference_mode():
        w = torch.randn(130, 200)
        cache = QuantizedWeight()
        check(cache, [w])
        w.add_(1)
        assert check(cache, [w]) == 2


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign: bool) -> None:
    layer, x = Linear(200, 130), torch.randn(4, 200)
    before = layer(x)
    old = layer.weight  # alive, and yet not the layer's any more where the new one is assigned
    state = Linear(200, 130).state_dict()
    layer.load_state_dict(state, assign=assign)
    assert (old is layer.weight) != assign
    check(layer.quantized, [layer.weight])
    assert not torch.equal(layer(x), before)


def test_a_module_that_goes_to_another_dtype_and_back_is_not_stale() -> None:
    layer, x = Linear(200, 130), torch.randn(4, 200)
    layer(x)
    check(layer.bfloat16().quantized, [layer.weight])
    check(layer.float().quantized, [layer.weight])
    assert layer.quantized.times_quantized == 3


def _pickled(layer: Linear) -> Linear:
    return pickle.loads(pickle.dumps(layer))


def _saved(layer: Linear) -> Linear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_a_copy_of_a_module_quantises_its_own_weights(copied: Callable[[Linear], Linear]) -> None:
    layer, x = Linear(200, 130, recipe=Recipe(scales="float32")), torch.randn(4, 200)
    y = layer(x)
    other = copied(layer)
    assert other.quantized is not layer.quantized
    assert other.quantized.nbytes() == 0
    assert torch.equal(other(x), y)
    _add(other.weight)
    assert not torch.equal(other(x), y)
    assert torch.equal(layer(x), y)
    assert layer.quantized.times_quantized == 1
    assert list(other.state_dict()) == ["weight"]


def test_what_is_kept_does_not_keep_the_weights() -> None:
    cache = QuantizedWeight()
    w = weight(130, 200)
    cache.get([w], Recipe())
    tensor, storage = ref(w), StorageWeakRef(w.untyped_storage())
    assert not storage.expired()
    del w
    assert tensor() is None
    assert storage.expired()
