"""What a product of FP8 matrices is, and what every backend promises.

Shapes: M, N, R rows; K what is summed over, cut into tiles of 128 of which the last may be shorter;
E groups (experts); P columns of groups that are each padded to a multiple of 128.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..formats import TILE, Quantized, padded_rows, tiles_in

Kind = Literal["dense", "grouped", "grouped_along_k"]
Granularity = Literal["tiles", "blocks", "tensor"]

_OUT_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Product:
    """One product that is asked for, with its arguments checked.

    Attributes:
        kind: "dense", [M, K] x [N, K] -> [M, N]; "grouped", [R, K] x [E, N, K] -> [R, N], each
            group of rows with its own matrix; "grouped_along_k", [M, P] x [N, P] -> [E, M, N],
            each group of columns by itself.
        a, b: the operands; the sum runs along the last dimension of both.
        counts: rows of each group, before padding; empty for "dense".
        out_dtype: bfloat16 or float32; of no effect where `accumulate` is given.
        accumulate: float32 of the result's shape, to which the product is added in place.

    Raises:
        ValueError: shapes, dtypes, devices or layouts of scales do not fit together.
    """

    kind: Kind
    a: Quantized
    b: Quantized
    counts: tuple[int, ...]
    out_dtype: torch.dtype
    accumulate: Tensor | None

    def __post_init__(self) -> None:
        a, b = self.a, self.b
        _check_operand(a, "operand a", 2)
        _check_operand(b, "operand b", 3 if self.kind == "grouped" else 2)
        if a.values.shape[-1] != b.values.shape[-1]:
            raise ValueError(
                f"the sum runs along the last dimension of both operands, but a is "
                f"{list(a.values.shape)} and b {list(b.values.shape)}"
            )
        if a.values.device != b.values.device:
            raise ValueError(f"a is on {a.values.device}, b on {b.values.device}")
        if self.out_dtype not in _OUT_DTYPES:
            raise ValueError(f"out_dtype is bfloat16 or float32, got {self.out_dtype}")
        self._check_counts()
        self._check_accumulate()

    @property
    def device(self) -> torch.device:
        return self.a.values.device

    @property
    def shape(self) -> tuple[int, ...]:
        """The result's."""
        m, n = self.a.values.shape[0], self.b.values.shape[-2]
        return (len(self.counts), m, n) if self.kind == "grouped_along_k" else (m, n)

    def is_nothing(self) -> bool:
        """Whether the result is empty, or a sum of nothing."""
        return 0 in self.shape or self.a.values.shape[-1] == 0

    def nothing(self) -> Tensor:
        """The result of a product that `is_nothing`."""
        if self.accumulate is not None:
            return self.accumulate
        return self.a.values.new_zeros(self.shape, dtype=self.out_dtype)

    def _check_counts(self) -> None:
        counts, (rows, columns) = list(self.counts), self.a.values.shape
        if min(counts, default=0) < 0:
            raise ValueError(f"counts {counts} are rows of groups and cannot be negative")
        if self.kind == "grouped":
            if len(counts) != len(self.b.values):
                raise ValueError(f"{len(counts)} counts for {len(self.b.values)} matrices in b")
            if sum(counts) != rows:
                raise ValueError(f"counts {counts} do not add up to the {rows} rows of a")
        elif self.kind == "grouped_along_k" and padded_rows(counts) != columns:
            raise ValueError(
                f"groups of {counts}, each padded to a multiple of {TILE}, have "
                f"{padded_rows(counts)} columns, but a and b have {columns}: quantise both with "
                "quantize_columns(x, counts)"
            )

    def _check_accumulate(self) -> None:
        into = self.accumulate
        if into is None:
            return
        if into.dtype != torch.float32 or tuple(into.shape) != self.shape:
            raise ValueError(
                f"accumulate must be float32 {list(self.shape)}, got {into.dtype} "
                f"{list(into.shape)}"
            )
        if into.device != self.device:
            raise ValueError(f"accumulate is on {into.device}, the operands on {self.device}")


class Backend(ABC):
    """One way to compute products. Has no state: two of a class are alike.

    Every result is the stated order's of `reference`, or that up to the order of summation within
    128 along K and what the backend's own description says.
    """

    name: ClassVar[str]

    def missing(self) -> str | None:
        """Why it cannot be used on this machine at all, with the remedy; None if it can."""
        return None

    def why_not(self, product: Product) -> str | None:
        """Why it cannot compute this product, with the remedy; None if it can.

        Only called where nothing is `missing`.
        """
        del product
        return None

    def matmul(
        self,
        a: Quantized,
        b: Quantized,
        *,
        out_dtype: torch.dtype = torch.bfloat16,
        accumulate: Tensor | None = None,
    ) -> Tensor:
        """a @ b.T.

        Args:
            a: [M, K].
            b: [N, K].
            out_dtype: bfloat16 or float32; of no effect with `accumulate`.
            accumulate: float32 [M, N], to which the product is added in place.

        Returns:
            [M, N] of `out_dtype`, or `accumulate` itself.

        Raises:
            ValueError: the arguments do not fit together, or the backend cannot serve them.
        """
        return self.run(Product("dense", a, b, (), out_dtype, accumulate))

    def grouped(
        self,
        a: Quantized,
        b: Quantized,
        counts: Sequence[int],
        *,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """Each group of rows of `a` with its own matrix: a_e @ b[e].T.

        Args:
            a: [R, K], groups of rows one after another.
            b: [E, N, K].
            counts: E numbers of rows that add up to R, zeros allowed.
            out_dtype: bfloat16 or float32.

        Returns:
            [R, N] of `out_dtype`.

        Raises:
            ValueError: as of `matmul`.
        """
        return self.run(Product("grouped", a, b, tuple(int(n) for n in counts), out_dtype, None))

    def grouped_along_k(
        self, a: Quantized, b: Quantized, counts: Sequence[int], *, accumulate: Tensor
    ) -> Tensor:
        """Each group of columns by itself, as weight gradients need: accumulate[e] += a_e @ b_e.T.

        Args:
            a: [M, P] from `quantize_columns(.., counts)`.
            b: [N, P] from the same counts.
            counts: E numbers of columns before padding, zeros allowed.
            accumulate: float32 [E, M, N], added to in place.

        Returns:
            `accumulate`.

        Raises:
            ValueError: as of `matmul`.
        """
        product = Product(
            "grouped_along_k", a, b, tuple(int(n) for n in counts), torch.float32, accumulate
        )
        return self.run(product)

    def run(self, product: Product) -> Tensor:
        """Compute any of the three.

        Raises:
            ValueError: the backend cannot serve this product.
        """
        if product.is_nothing():
            return product.nothing()
        reason = self.missing() or self.why_not(product)
        if reason is not None:
            raise ValueError(f"backend {self.name!r} cannot compute this product: {reason}")
        return self._compute(product)

    @abstractmethod
    def _compute(self, product: Product) -> Tensor:
        """The result of a product that is not nothing and that it can serve."""


def granularity(q: Quantized) -> Granularity:
    """What one scale covers. Where two coincide, the first of tensor, tiles, blocks that fits."""
    rows, columns = q.values.shape[-2:]
    high, wide = q.scales.shape[-2:]
    if (high, wide) == (1, 1):
        return "tensor"
    return "tiles" if (high, wide) == (rows, tiles_in(columns)) else "blocks"


def is_in_tiles(q: Quantized) -> bool:
    """Whether the scales can be taken as those of tiles of 1x128."""
    rows, columns = q.values.shape[-2:]
    return tuple(q.scales.shape[-2:]) == (rows, tiles_in(columns))


def is_in_blocks(q: Quantized) -> bool:
    """Whether the scales can be taken as those of blocks of 128x128."""
    rows, columns = q.values.shape[-2:]
    return tuple(q.scales.shape[-2:]) == (tiles_in(rows), tiles_in(columns))


def tile_scales(q: Quantized) -> Tensor:
    """The scale of each tile of 1x128, whatever the layout: [..., R, ceil(C / 128)] float32."""
    rows, columns = q.values.shape[-2:]
    scales = q.scales.to(torch.float32)
    if scales.shape[-2] not in (1, rows):
        scales = scales.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    return scales.expand(*scales.shape[:-2], rows, tiles_in(columns))


def _check_operand(q: Quantized, what: str, dims: int) -> None:
    if q.values.dim() != dims:
        form = "a matrix [rows, K]" if dims == 2 else "matrices [groups, rows, K]"
        raise ValueError(f"{what} must be {form}, got values {list(q.values.shape)}")
    q.check(what)
    if q.scales.device != q.values.device:
        raise ValueError(f"{what} has values on {q.values.device}, scales on {q.scales.device}")
