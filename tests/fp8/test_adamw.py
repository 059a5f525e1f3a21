"""AdamW with bfloat16 moments against a definition written number by number."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from counterflow.fp8 import adamw
from counterflow.fp8.adamw import MAX_BETA, AdamW, require_betas

SHAPES = [(3, 5), (17,), (), (0, 4)]
NUMBERS = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def give_gradients(given: list[nn.Parameter], step: int) -> None:
    """Gradients of many magnitudes, zeros among them."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in given:
        powers = torch.randint(-30, 8, p.shape, generator=generator)
        grad = torch.randn(p.shape, generator=generator) * 10.0**powers
        p.grad = torch.where(powers == 0, 0.0, grad)


def grads_of(parameter: nn.Parameter) -> list[float]:
    assert parameter.grad is not None
    return parameter.grad.flatten().tolist()


def rounded(x: np.float32) -> np.float32:
    """To the nearest bfloat16, ties to even, from the bits."""
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    up = (bits & 0xFFFF) + ((bits >> 16) & 1) > 0x8000
    bits = ((bits >> 16) + up) << 16
    return np.float32(struct.unpack("<f", struct.pack("<I", bits))[0])


class OneNumber:
    """The update of a single float32 number, each operation rounded once."""

    def __init__(self, w: float) -> None:
        self.w, self.m, self.v, self.t = np.float32(w), np.float32(0), np.float32(0), 0

    def step(self, grad: float) -> None:
        f, g = np.float32, np.float32(grad)
        lr, (b1, b2), eps, decay = NUMBERS.values()
        self.t += 1
        m = self.m * f(b1) + g * f(1 - b1)
        v = self.v * f(b2) + g * f(1 - b2) * g
        self.m, self.v = rounded(m), rounded(v)
        below = np.sqrt(v) * f(1 / math.sqrt(1 - b2**self.t)) + f(eps)
        self.w = self.w * f(1 - lr * decay)
        self.w = self.w - m * f(lr / (1 - b1**self.t)) / below


@pytest.mark.parametrize("piece", [4, 1 << 22])
def test_every_bit_is_that_of_the_definition_by_numbers(
    piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "_PIECE", piece)
    given = parameters()
    numbers = [[OneNumber(x) for x in p.flatten().tolist()] for p in given]
    optimizer = AdamW(given, **NUMBERS)
    for step in range(12):
        give_gradients(given, step)
        optimizer.step()
        for p, ones in zip(given, numbers, strict=True):
            assert p.grad is not None
            for one, grad in zip(ones, p.grad.flatten().tolist(), strict=True):
                one.step(grad)
            state = optimizer.state[p]
            assert p.flatten().tolist() == [one.w for one in ones]
            assert state["exp_avg"].flatten().tolist() == [one.m for one in ones]
            assert state["exp_avg_sq"].flatten().tolist() == [one.v for one in ones]
            assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_update_is_that_of_torch(dtype: torch.dtype) -> None:
    """Moments are rounded after their use, so the first update knows nothing of bfloat16."""
    mine, reference = parameters(dtype=dtype), parameters(dtype=dtype)
    for given, make in ((mine, AdamW), (reference, torch.optim.AdamW)):
        for number, p in enumerate(given):
            generator = torch.Generator().manual_seed(number)
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
        make(given, **NUMBERS).step()
    eps = torch.finfo(dtype).eps
    for p, q in zip(mine, reference, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * eps, atol=0.04 * eps)  # of updates of 0.01


def test_a_least_squares_fit_gets_as_far_as_with_float32_moments() -> None:
    def fit(make: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        x, y = (torch.randn(64, n, generator=generator) for n in (16, 4))
        w = nn.Parameter(torch.zeros(16, 4))
        optimizer = make([w], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
        for _ in range(300):
            optimizer.zero_grad()
            (x @ w - y).square().mean().backward()
            optimizer.step()
        best = torch.linalg.lstsq(x, y).solution
        with torch.no_grad():
            return float((x @ w - y).square().mean() / (x @ best - y).square().mean()) - 1

    assert fit(torch.optim.AdamW) < 1e-3
    assert fit(AdamW) < 1e-3


class _Largest(TorchDispatchMode):
    """Counts the elements of the largest new tensor above 16 bits."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, out.numel() if out.itemsize > 2 else 0)
        return out


def test_no_float32_copy_is_larger_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "_PIECE", 64)
    p = nn.Parameter(torch.randn(10, 100))
    optimizer = AdamW([p])
    largest = _Largest()
    for _ in range(2):
        p.grad = torch.randn(10, 100)
        with largest:
            optimizer.step()
    assert largest.elements == 64


def all_normal_bfloat16() -> Tensor:
    bits = torch.arange(0x0100, 0x7F80, dtype=torch.int16)  # from 2**-125, twice the least of them
    return bits.view(torch.bfloat16)


def decayed(x: Tensor, beta: float) -> Tensor:
    return x.float().mul(beta).bfloat16()


def test_moments_decay_with_every_beta_that_is_allowed_and_not_with_all_above() -> None:
    x = all_normal_bfloat16()
    assert bool((decayed(x, MAX_BETA) < x).all())
    assert not bool((decayed(x, MAX_BETA + 1e-4) < x).all())
    assert float((decayed(x, 0.999) == x).float().mean()) > 0.99
    require_betas((0.0, MAX_BETA))
    for beta in (MAX_BETA + 1e-4, 0.999, -0.1, math.nan):
        with pytest.raises(ValueError, match="bfloat16 moments need betas"):
            AdamW(parameters(), betas=(0.9, beta))


def test_saved_state_is_bfloat16_and_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    whole, begun, resumed = parameters(), parameters(), parameters(9)
    first, second = AdamW(whole, **NUMBERS), AdamW(begun, **NUMBERS)
    for step in range(3):
        for given, optimizer in ((whole, first), (begun, second)):
            give_gradients(given, step)
            optimizer.step()
    third = AdamW(resumed)
    third.load_state_dict(second.state_dict())
    for p, q in zip(resumed, begun, strict=True):
        p.data.copy_(q.data)
        assert third.state[p]["exp_avg"].dtype == torch.bfloat16
    for step in range(3, 6):
        for given, optimizer in ((whole, first), (resumed, third)):
            give_gradients(given, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(whole, resumed, strict=True))


def test_a_parameter_without_a_gradient_stays_and_a_closure_is_called() -> None:
    given = parameters()
    before = [p.detach().clone() for p in given]

    def closure() -> float:
        loss = given[0].square().sum()
        loss.backward()
        return float(loss.detach())

    assert AdamW(given).step(closure) == pytest.approx(float(before[0].square().sum()))
    assert not torch.equal(given[0], before[0])
    assert all(torch.equal(p, b) for p, b in zip(given[1:], before[1:], strict=True))


def test_an_update_moves_the_version_by_which_a_changed_weight_is_known() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    before = p._version
    AdamW([p]).step()
    assert p._version > before


def test_moments_of_a_transposed_parameter_of_torch_are_loaded_and_updated() -> None:
    theirs = nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).t())
    first = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    theirs.grad = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    first.step()
    saved = first.state_dict()
    assert saved["state"][0]["exp_avg"].stride() == (1, 3)

    mine = nn.Parameter(theirs.detach().contiguous())
    second = AdamW([mine], **NUMBERS)
    second.load_state_dict(saved)
    numbers = [OneNumber(w) for w in mine.flatten().tolist()]
    kept = (saved["state"][0][key].flatten().tolist() for key in ("exp_avg", "exp_avg_sq"))
    for one, m, v in zip(numbers, *kept, strict=True):
        one.m, one.v, one.t = rounded(np.float32(m)), rounded(np.float32(v)), 1
    for step in range(3):
        give_gradients([mine], step)
        second.step()
        for one, grad in zip(numbers, grads_of(mine), strict=True):
            one.step(grad)
    state = second.state[mine]
    assert mine.flatten().tolist() == [one.w for one in numbers]
    assert state["exp_avg"].flatten().tolist() == [one.m for one in numbers]
    assert state["exp_avg_sq"].flatten().tolist() == [one.v for one in numbers]


@pytest.mark.parametrize(
    ("tensor", "numbers", "message"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), {}, "give its float32 master"),
        (torch.zeros(2, 3).t(), {}, "is not contiguous"),
        (torch.zeros(2), {"eps": -1.0}, "eps must be 0 or more"),
        (torch.zeros(2), {"lr": math.inf}, "lr must be 0 or more and finite"),
    ],
)
def test_what_cannot_be_updated_is_refused(
    tensor: Tensor, numbers: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [nn.Parameter(tensor)], **numbers}])
