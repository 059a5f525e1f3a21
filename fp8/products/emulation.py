"""How Hopper's tensor cores add up FP8 products, in plain PyTorch.

An H800 keeps about 14 bits where float32 has 24 (arXiv 2412.19437, section 3.3.2; its second
version says how): of each 32 products along K all are shifted to the largest exponent, what falls
below the 14 highest bits is cut off, and they are added into a register of as many bits. That is
why DeepSeek-V3 promotes the register to float32 every 128 along K.

Shapes: M, N rows; K summed over; G products that are added at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import TILE, Quantized
from .base import Backend, Product
from .reference import as_tiles, compute_by_groups, round_to_odd, wide_values

_PANEL = 1 << 19  # products in hand at a time, 2 MB in float32
_FLOAT32_BITS, _FLOAT64_BITS = 24, 53
_LEAST_PRODUCT = 2.0**-32  # of two subnormals of E5M2


@dataclass(frozen=True)
class Emulation(Backend):
    """Products as Hopper adds them up, with the width and the interval of promotion to choose.

    `group` products along K and the register are added at once: the one among these numbers with
    the largest exponent, 2**e <= |x| < 2**(e+1), decides, each keeps what is a multiple of
    2**(e + 1 - bits), the rest is cut off towards zero, the sum of what was kept is exact, and cut
    off at `bits` bits of its own it is the new register. After `interval` along K the register is
    scaled and added in float32, as the stated order of `reference` has it, and starts from zero.
    Infinities, which no quantiser here makes, come out as NaN.

    The paper leaves open whether the register takes part in the alignment or is added after. It
    does here, as in an adder of all terms at once: where it is the largest, each single product is
    cut off at its last place, so that long sums of numbers of one sign lose percents. Adding it
    after would lose a twentieth of that.

    Attributes:
        bits: significant bits that are kept, or None for exact sums; then the result is the
            reference's to the last bit, if `interval` is 128.
        group: products that are added at once; on Hopper 32.
        interval: values along K between promotions. One that is longer than 128 spans tiles, and
            as scales are applied at promotion they must not change along K: one in all, or the
            same for all tiles of a row.

    Raises:
        ValueError: bits out of range; group is no divisor of interval; interval neither divides 128
            nor is a multiple of it.
    """

    bits: int | None = 14
    group: int = 32
    interval: int = TILE

    name: ClassVar[str] = "emulation"

    def __post_init__(self) -> None:
        if self.group < 1 or self.interval < 1 or self.interval % self.group:
            raise ValueError(
                f"interval {self.interval} must be a multiple of group {self.group}, on Hopper 32"
            )
        if TILE % self.interval and self.interval % TILE:
            raise ValueError(
                f"interval {self.interval} must divide {TILE} or be a multiple of it, since scales "
                f"change every {TILE} along K"
            )
        most = _FLOAT64_BITS - self._carry
        if self.bits is not None and not 2 <= self.bits <= most:
            raise ValueError(f"bits {self.bits} must be 2 to {most}, or None for exact sums")

    def why_not(self, product: Product) -> str | None:
        if self.interval <= TILE:
            return None
        for what, q in (("a", product.a), ("b", product.b)):
            scales = as_tiles(q).scales.nan_to_num()
            if not torch.equal(scales, scales[..., :1].expand_as(scales)):
                return (
                    f"a register spans {self.interval} along K, but the scales of {what} change "
                    f"every {TILE}; take interval={TILE}, or quantise with quantize_tensor"
                )
        return None

    def _compute(self, product: Product) -> Tensor:
        return compute_by_groups(product, self._multiply)

    def _multiply(self, a: Quantized, b: Quantized, into: Tensor, add: bool) -> None:
        wide_a, wide_b = wide_values(a.values), wide_values(b.values)
        if self.bits is not None and self.bits + self._carry <= _FLOAT32_BITS:
            wide_a, wide_b = wide_a.float(), wide_b.float()
        (m, columns), n = wide_a.shape, len(wide_b)
        step = max(1, _PANEL // (n * self.group))
        for start in range(0, m, step):
            rows = slice(start, start + step)
            acc = torch.zeros_like(into[rows], dtype=torch.float32)
            for first in range(0, columns, self.interval):
                k = slice(first, first + self.interval)
                register = self._sum(wide_a[rows, k], wide_b[:, k])
                scale = a.scales[rows, first // TILE, None] * b.scales[:, first // TILE]
                acc.add_(register.float().mul_(scale))
            if add:
                into[rows].add_(acc)
            else:
                into[rows].copy_(acc)

    def _sum(self, a: Tensor, b: Tensor) -> Tensor:
        """What the register holds after one interval: [M, k] and [N, k] -> [M, N]."""
        if self.bits is None:
            return self._exact_sum(a, b)
        register = a.new_zeros(len(a), len(b))
        for start in range(0, a.shape[1], self.group):
            products_MNG = _products(a, b, slice(start, start + self.group))
            largest = torch.maximum(products_MNG.abs().amax(-1), register.abs())
            unit = self._unit(largest)
            kept = products_MNG.div_(unit[..., None]).trunc_().sum(-1)
            register = register.div_(unit).trunc_().add_(kept).mul_(unit)
            unit = self._unit(register.abs())
            register = register.div_(unit).trunc_().mul_(unit)
        return register

    def _exact_sum(self, a: Tensor, b: Tensor) -> Tensor:
        # Products of E5M2 may span 64 bits. What is whole of them and the rest each fit float64.
        whole = a.new_zeros(len(a), len(b))
        rest = torch.zeros_like(whole)
        for start in range(0, a.shape[1], self.group):
            products_MNG = _products(a, b, slice(start, start + self.group))
            whole_MNG = products_MNG.trunc()
            whole.add_(whole_MNG.sum(-1))
            rest.add_(products_MNG.sub_(whole_MNG).sum(-1))
        return round_to_odd(whole, rest)

    def _unit(self, magnitude: Tensor) -> Tensor:
        """The weight of the last bit kept where the largest magnitude is this; a power of two."""
        assert self.bits is not None
        code, exponent = (
            (torch.int32, 0x7F800000)
            if magnitude.dtype == torch.float32
            else (torch.int64, 0x7FF0000000000000)
        )
        power = magnitude.view(code).bitwise_and(exponent).view(magnitude.dtype)
        return power.clamp_(min=_LEAST_PRODUCT).mul_(2.0 ** (1 - self.bits))

    @property
    def _carry(self) -> int:
        """Bits that a sum of `group` numbers and the register may have more than they."""
        return self.group.bit_length()


def _products(a: Tensor, b: Tensor, k: slice) -> Tensor:
    """Every product along `k`, exact: [M, N, G]."""
    return a[:, None, k] * b[None, :, k]
