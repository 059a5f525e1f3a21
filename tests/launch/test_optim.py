"""AdamW, float32 masters and the gradient norm of the whole model."""

import logging
import math

import pytest
import torch
from torch import nn

from counterflow.fp8.adamw import AdamW
from counterflow.launch.optim import Optimizer, clip_by_global_norm
from tests.cases_optim import clipped_on_rank, gradients, ownership
from tests.ranks import RankPool


def parameters(dtype: torch.dtype, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (7, 5), "experts": (3, 5, 4), "norm": (5,), "gain": ()}
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for name, shape in shapes.items()
    }


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    for number, parameter in enumerate(named.values()):
        generator = torch.Generator().manual_seed(100 * step + number)
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = grad.to(parameter.dtype)


def test_matrices_decay_and_norms_do_not() -> None:
    named = parameters(torch.float64)
    before = {name: p.detach().clone() for name, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(named.items(), weight_decay=0.1).step(lr=0.5)
    for name, parameter in named.items():
        shrunk = before[name] * (1 - 0.5 * 0.1) if parameter.dim() >= 2 else before[name]
        assert torch.equal(parameter, shrunk), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_parameters_are_updated_as_by_adamw(dtype: torch.dtype) -> None:
    mine, reference = parameters(dtype), parameters(dtype)
    optimizer = Optimizer(mine.items(), betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    adam = torch.optim.AdamW(reference.values(), betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    for step in range(5):
        give_gradients(mine, step)
        give_gradients(reference, step)
        optimizer.step(lr=0.1 / (step + 1))
        adam.param_groups[0]["lr"] = 0.1 / (step + 1)
        adam.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in mine.values())
    for name, parameter in mine.items():
        assert torch.equal(parameter, reference[name]), name


def test_bfloat16_parameters_are_the_rounding_of_masters_that_follow_adamw() -> None:
    mine = parameters(torch.bfloat16)
    reference = {n: nn.Parameter(p.detach().float()) for n, p in mine.items()}
    optimizer = Optimizer(mine.items(), weight_decay=0.0)
    adam = torch.optim.AdamW(reference.values(), betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(20):
        give_gradients(mine, step)
        for name, parameter in reference.items():
            grad = mine[name].grad
            assert grad is not None
            parameter.grad = grad.float()
        optimizer.step(lr=1e-4)
        adam.param_groups[0]["lr"] = 1e-4
        adam.step()
    for name, parameter in mine.items():
        assert torch.equal(optimizer.state_dict()[name]["master"], reference[name]), name
        assert torch.equal(parameter, reference[name].bfloat16()), name


def test_updates_below_the_resolution_of_bfloat16_are_not_lost() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = Optimizer([("p", parameter)], weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step(lr=1e-4)  # the step of bfloat16 at 1 is 4e-3 downwards
    assert parameter.tolist() == pytest.approx([0.99] * 4, abs=2e-3)


def test_bfloat16_moments_are_those_of_fp8s_adamw_for_parameters_and_masters() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        mine = parameters(dtype)
        reference = {n: nn.Parameter(p.detach().float()) for n, p in mine.items()}
        optimizer = Optimizer(mine.items(), weight_decay=0.0, moments=torch.bfloat16)
        adam = AdamW(reference.values(), weight_decay=0.0)
        for step in range(5):
            give_gradients(mine, step)
            for name, parameter in reference.items():
                grad = mine[name].grad
                assert grad is not None
                parameter.grad = grad.float()
            optimizer.step(lr=1e-2)
            adam.param_groups[0]["lr"] = 1e-2
            adam.step()
        state = optimizer.state_dict()
        for name, parameter in mine.items():
            assert torch.equal(parameter, reference[name].to(dtype)), name
            for key in ("exp_avg", "exp_avg_sq"):
                assert state[name][key].dtype == torch.bfloat16
                assert torch.equal(state[name][key], adam.state[reference[name]][key]), name


def test_moments_of_the_other_kind_are_rounded_or_raised() -> None:
    low, high = torch.bfloat16, torch.float32
    for dtype, moments, other in ((torch.bfloat16, low, high), (torch.float32, high, low)):
        given = parameters(dtype)
        optimizer = Optimizer(given.items(), moments=moments)
        give_gradients(given, 0)
        optimizer.step(lr=0.1)
        taker = Optimizer(parameters(dtype).items(), moments=other)
        taker.load_state_dict(optimizer.state_dict())
        state, taken = optimizer.state_dict(), taker.state_dict()
        for name in given:
            assert int(taken[name]["step"]) == 1
            for key in ("exp_avg", "exp_avg_sq"):
                assert taken[name][key].dtype == other, name
                assert torch.equal(taken[name][key], state[name][key].to(other)), name
        give_gradients(given, 1)
        optimizer.load_state_dict(taken)
        optimizer.step(lr=0.1)


def test_moments_of_another_dtype_or_betas_beyond_them_are_refused() -> None:
    named = parameters(torch.float32)
    with pytest.raises(ValueError, match=r"float32 or torch\.bfloat16, got torch\.float16"):
        Optimizer(named.items(), moments=torch.float16)
    with pytest.raises(ValueError, match=r"bfloat16 moments need betas .* got 0\.999"):
        Optimizer(named.items(), betas=(0.9, 0.999), moments=torch.bfloat16)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_optimizer_goes_on_bit_for_bit(dtype: torch.dtype, moments: torch.dtype) -> None:
    whole, begun = parameters(dtype), parameters(dtype)
    optimizer = Optimizer(whole.items(), moments=moments)
    first = Optimizer(begun.items(), moments=moments)
    for step in range(3):
        for named, it in ((whole, optimizer), (begun, first)):
            give_gradients(named, step)
            it.step(lr=0.01)
    other = parameters(dtype, seed=9)
    for name, parameter in other.items():
        parameter.data.copy_(begun[name].data)
    resumed = Optimizer(other.items(), moments=moments)
    resumed.load_state_dict(first.state_dict())
    for step in range(3, 6):
        for named, it in ((whole, optimizer), (other, resumed)):
            give_gradients(named, step)
            it.step(lr=0.01)
    for name, parameter in whole.items():
        assert torch.equal(parameter, other[name]), name


def test_the_state_of_other_parameters_or_another_dtype_is_refused() -> None:
    named = parameters(torch.float32)
    state = Optimizer(named.items()).state_dict()
    del state["norm"]
    with pytest.raises(ValueError, match="1 names differ, such as norm"):
        Optimizer(named.items()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"no master weight.*train\.dtype"):
        Optimizer(parameters(torch.bfloat16).items()).load_state_dict(
            Optimizer(named.items()).state_dict()
        )


def test_a_parameter_without_a_gradient_stays() -> None:
    named = parameters(torch.bfloat16)
    before = named["embed"].detach().clone()
    optimizer = Optimizer(named.items(), weight_decay=0.1)
    give_gradients(named, 0)
    named["embed"].grad = None
    optimizer.step(lr=0.1)
    assert torch.equal(named["embed"], before)


def test_clipping_in_one_process_is_that_of_torch() -> None:
    mine, reference = parameters(torch.float64), parameters(torch.float64)
    give_gradients(mine, 1)
    give_gradients(reference, 1)
    norm, _ = clip_by_global_norm(mine.items(), mine.keys(), max_norm=0.5)
    assert norm == pytest.approx(
        float(nn.utils.clip_grad_norm_(reference.values(), 0.5)), rel=1e-12
    )
    for name, parameter in mine.items():
        # torch divides by norm + 1e-6, this by norm
        torch.testing.assert_close(parameter.grad, reference[name].grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 1e6])
def test_gradients_within_the_limit_or_without_one_are_left_alone(max_norm: float) -> None:
    named = parameters(torch.float32)
    give_gradients(named, 2)
    before = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
    assert clip_by_global_norm(named.items(), named.keys(), max_norm)[0] > 1
    assert all(torch.equal(before[n], p.grad) for n, p in named.items() if p.grad is not None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_told_and_scales_nothing(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    named = parameters(torch.float32)
    give_gradients(named, 2)
    assert named["norm"].grad is not None
    assert named["embed"].grad is not None
    named["norm"].grad[0] = bad
    before = named["embed"].grad.clone()
    with caplog.at_level(logging.WARNING, "counterflow.launch.optim"):
        assert not math.isfinite(clip_by_global_norm(named.items(), named.keys(), 1.0)[0])
    assert "norm" in caplog.text
    assert torch.equal(named["embed"].grad, before)


@pytest.mark.parametrize("max_norm", [0.0, 0.25])
def test_every_parameter_counts_once_over_replicas_and_shards(
    ranks: RankPool, max_norm: float
) -> None:
    """pp 2 x dp 2 x ep 2, a stage held twice and experts in shards, against one process."""
    everything = gradients()
    expected = math.sqrt(sum(float(g.square().sum()) for g in everything.values()))
    answers = ranks.run(clipped_on_rank, world=4, max_norm=max_norm)
    held = [name for rank in range(4) for name in ownership(rank)[1]]
    assert sorted(held) == sorted(everything)  # the case itself owns each once
    factor = max_norm / expected if max_norm else 1.0
    for norm, grads in answers:
        assert norm == pytest.approx(expected, rel=1e-14)
        assert norm == answers[0][0]
        for name, grad in grads.items():
            torch.testing.assert_close(grad, everything[name] * factor, rtol=1e-14, atol=0)
