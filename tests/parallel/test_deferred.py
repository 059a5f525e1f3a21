"""Linears whose weight gradient waits, against plain autograd, and those that do not wait."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from counterflow.parallel.chunk import WeightGradQueue
from counterflow.parallel.deferred import defer_linears, linear

Grads = dict[str, Tensor | None]
Context = Callable[[], AbstractContextManager[Any]]


class Net(nn.Module):
    """Two linears and what lies between."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(4, 6, dtype=dtype)
        self.down = nn.Linear(6, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Checkpointed(Net):
    """Its first linear lies in a recomputed region, its second does not."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: torch.tanh(self.up(x)), x, use_reentrant=False)
        assert isinstance(hidden, Tensor)
        return self.down(hidden)


class Shared(nn.Module):
    """One weight, used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


def data(dtype: torch.dtype = torch.float64, *, seed: int = 1, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 4, generator=generator, dtype=dtype).requires_grad_(grad)


def grads_of(module: nn.Module, x: Tensor) -> Grads:
    found = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def plain(module: nn.Module, x: Tensor, context: Context = nullcontext) -> tuple[Grads, int]:
    """Gradients and FLOPs of autograd's forward and backward, on copies."""
    module, x = copy.deepcopy(module), x.detach().clone().requires_grad_(x.requires_grad)
    with FlopCounterMode(display=False) as counted:
        with context():
            out = module(x)
        out.abs().square().sum().backward()
    return grads_of(module, x), counted.get_total_flops()


def split(
    module: nn.Module, x: Tensor, context: Context = nullcontext
) -> tuple[Grads, Grads, int, int]:
    """(gradients after I, after W, FLOPs of all, how many pieces of work waited for W)."""
    queue = WeightGradQueue()
    with FlopCounterMode(display=False) as counted:
        with defer_linears(queue), context():
            out = module(x)
        queue.deferring = True
        out.abs().square().sum().backward()
        after_i, waiting = grads_of(module, x), len(queue)
        queue.run()
    return after_i, grads_of(module, x), counted.get_total_flops(), waiting


def check_split(
    module: nn.Module, x: Tensor, deferred: set[str], context: Context = nullcontext
) -> None:
    """Values and FLOPs are autograd's, and of `deferred` (the parameters' names) W gives them."""
    expected, flops = plain(module, x, context)
    after_i, after_w, counted, waiting = split(module, x, context)
    assert {name for name in expected if expected[name] is not None and after_i[name] is None} == (
        deferred
    )
    # A dropped or doubled product is far outside these; the order of summation is within.
    torch.testing.assert_close(after_w, expected)
    assert counted == flops
    assert bool(waiting) == bool(deferred)


ALL = {"up.weight", "up.bias", "down.weight", "down.bias"}


@pytest.mark.parametrize("grad", [True, False], ids=["x with grad", "x without"])
def test_i_gives_the_inputs_gradient_and_w_the_rest_at_the_same_flops(grad: bool) -> None:
    check_split(Net(), data(grad=grad), ALL)


@pytest.mark.parametrize("grad", [True, False], ids=["x with grad", "x without"])
@pytest.mark.parametrize(
    "frozen", [{"up.weight"}, {"up.bias"}, {"down.weight", "up.weight"}, {"up.weight", "up.bias"}]
)
def test_frozen_weights_and_biases_get_no_gradient_and_cost_nothing(
    frozen: set[str], grad: bool
) -> None:
    net = Net()
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    check_split(net, data(grad=grad), ALL - frozen)


def test_a_linear_of_a_single_row_and_without_bias_splits() -> None:
    row = torch.ones(4, dtype=torch.float64, requires_grad=True)
    check_split(nn.Linear(4, 3, bias=False, dtype=torch.float64), row, {"weight"})


def test_the_two_uses_of_a_shared_weight_add_up() -> None:
    check_split(Shared(), data(), {"linear.weight", "linear.bias"})


@pytest.mark.parametrize("kind", [Net, Shared, Checkpointed])
def test_two_chunks_in_the_order_i_i_w_w_add_up(kind: type[nn.Module]) -> None:
    module, reference = kind(), kind()
    queues = [WeightGradQueue(), WeightGradQueue()]
    losses: list[Tensor] = []
    for seed, queue in enumerate(queues):
        with defer_linears(queue):
            losses.append(module(data(seed=seed)).square().sum())
        reference(data(seed=seed)).square().sum().backward()
    for loss, queue in zip(losses, queues, strict=True):
        queue.deferring = True
        loss.backward()
    for queue in queues:
        queue.run()
    torch.testing.assert_close(
        [p.grad for p in module.parameters()], [p.grad for p in reference.parameters()]
    )


def test_under_autocast_a_linear_takes_the_ordinary_path() -> None:
    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16)

    check_split(Net(torch.float32), data(torch.float32), set(), autocast)


def test_a_device_without_autocast_defers() -> None:
    queue = WeightGradQueue()
    queue.deferring = True
    weight = torch.ones(3, 4, device="meta", requires_grad=True)
    linear(torch.ones(2, 4, device="meta"), weight, None, queue).sum().backward()
    assert len(queue) == 1


def test_recomputed_linears_take_the_ordinary_path_and_the_others_wait() -> None:
    check_split(Checkpointed(), data(), {"down.weight", "down.bias"})


def test_saved_tensor_hooks_see_what_a_linear_saves() -> None:
    def on_cpu() -> AbstractContextManager[Any]:
        return torch.autograd.graph.save_on_cpu()

    check_split(Net(), data(), set(), on_cpu)


def test_all_of_the_functions_keywords_work() -> None:
    class Keywords(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(input=x, weight=self.up.weight, bias=self.up.bias)
            return F.linear(x, bias=self.down.bias, weight=self.down.weight)

    check_split(Keywords(), data(), ALL)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
@pytest.mark.parametrize("name", ["linear.weight", "linear.bias"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "after the forward"])
def test_hooks_of_a_parameter_see_its_whole_gradient_once(kind: str, name: str, late: bool) -> None:
    module, x = Shared(), data()
    expected, _ = plain(module, x)
    seen: list[Tensor] = []
    parameter = module.get_parameter(name)

    def hook(value: Tensor) -> None:  # of the gradient, or of the parameter that has it
        seen.append((value if value.grad is None else value.grad).clone())

    queue = WeightGradQueue()
    queue.deferring = True
    if not late:
        getattr(parameter, kind)(hook)
    with defer_linears(queue):
        out = module(x)
    if late:
        getattr(parameter, kind)(hook)
    out.square().sum().backward()
    queue.run()
    torch.testing.assert_close(seen, [expected[name]])
    torch.testing.assert_close(grads_of(module, x), expected)


def test_a_removed_hook_lets_the_gradient_wait_again() -> None:
    net = Net()
    net.up.weight.register_hook(lambda grad: grad).remove()
    check_split(net, data(), ALL)


def test_complex_linears_take_the_ordinary_path() -> None:
    check_split(Net(torch.complex128), data(torch.complex128), set())


class OneOutput(nn.Module):
    """A weight of one dimension, which F.linear allows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class OneBias(nn.Module):
    """A bias that is broadcast over the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.float64))
        self.bias = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Computed(OneBias):
    """A weight that is no leaf."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2)


class Mapped(nn.Module):
    """One weight for each entry of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(F.linear)(x, self.weight)


@pytest.mark.parametrize("kind", [OneOutput, OneBias, Computed, Mapped])
def test_what_is_no_product_with_a_leaf_matrix_takes_the_ordinary_path(
    kind: type[nn.Module],
) -> None:
    check_split(kind(), data(), set())


def test_a_compiled_module_compiles_whole_and_takes_the_ordinary_path() -> None:
    net, x = Net(), data()
    expected, _ = plain(net, x)
    # Ahead-of-time autograd without code generation, which would need a compiler.
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    queue = WeightGradQueue()
    queue.deferring = True
    with defer_linears(queue):
        out = compiled(x)
    out.square().sum().backward()
    assert len(queue) == 0
    torch.testing.assert_close(grads_of(net, x), expected)


class Subclass(Tensor):
    """Notes the functions that it is handed, as a DTensor would act on them."""

    seen: list[Any] = []  # noqa: RUF012  one list for all, as results are of this class too

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        cls.seen.append((func, torch.is_grad_enabled()))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("which", ["x", "weight"])
def test_a_subclass_of_tensor_sees_the_call_itself(which: str) -> None:
    net, x = nn.Linear(4, 3, dtype=torch.float64), data()
    expected, _ = plain(net, x)
    given = x
    if which == "x":
        given = x.as_subclass(Subclass)
    else:
        net.weight = nn.Parameter(net.weight.detach().as_subclass(Subclass))
    Subclass.seen.clear()
    queue = WeightGradQueue()
    queue.deferring = True
    with defer_linears(queue):
        out = net(given)
    assert isinstance(out, Subclass)
    assert (F.linear, True) in Subclass.seen
    out.square().sum().backward()
    assert len(queue) == 0
    for name, grad in grads_of(net, x).items():
        assert grad is not None
        torch.testing.assert_close(grad.as_subclass(Tensor), expected[name])


class Notes(TorchFunctionMode):
    """Notes the functions that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_outside_and_inside_see_each_linear_once() -> None:
    outside, inside, queue = Notes(), Notes(), WeightGradQueue()
    queue.deferring = True
    with outside, defer_linears(queue), inside:
        Net()(data()).sum().backward()
    assert len(queue) > 0
    assert outside.seen.count(F.linear) == inside.seen.count(F.linear) == 2
