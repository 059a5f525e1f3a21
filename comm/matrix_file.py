"""Byte matrices as text that NVIDIA's nccl-tests replays: `alltoallv_perf` in matrix mode.

The form, as github.com/NVIDIA/nccl-tests documents and reads it (src/alltoallv.cu, 2.19): numbers
apart by white space, a line a rank; the one in line i and column j is the bytes that rank i sends
to rank j. Square, not negative, no comments. Each number is rounded down to a multiple of 16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

ALIGNMENT = 16  # bytes


def to_text(matrix_RR: npt.NDArray[Any]) -> str:
    """The matrix in text form; numbers are rounded up to multiples of 16, so that none is lost.

    Args:
        matrix_RR: [R, R] bytes, int64, row sends to column.

    Raises:
        ValueError: no square matrix of integers from 0 up.
    """
    if matrix_RR.ndim != 2 or matrix_RR.shape[0] != matrix_RR.shape[1] or not matrix_RR.size:
        raise ValueError(f"a traffic matrix is square, got the shape {list(matrix_RR.shape)}")
    if matrix_RR.dtype.kind not in "iu" or matrix_RR.min() < 0:
        raise ValueError("a traffic matrix holds whole numbers of bytes from 0 up")
    return "".join(" ".join(map(str, row)) + "\n" for row in _aligned(matrix_RR).tolist())


def from_text(text: str) -> npt.NDArray[np.int64]:
    """The matrix of a text, [R, R] bytes, as alltoallv takes it: rounded down to multiples of 16.

    Raises:
        ValueError: a line and column that is wrong, or lines that make no square.
    """
    rows: list[list[int]] = []
    for number, line in enumerate(text.splitlines(), 1):
        cells = [_cell(word, number, i) for i, word in enumerate(line.split(), 1)]
        if cells and rows and len(cells) != len(rows[0]):
            raise ValueError(
                f"traffic matrix, line {number}: {len(cells)} numbers, but {len(rows[0])} in the "
                "first one"
            )
        if cells:
            rows.append(cells)
    if not rows or len(rows) != len(rows[0]):
        columns = len(rows[0]) if rows else 0
        raise ValueError(
            f"a traffic matrix is square, got {len(rows)} lines of {columns} numbers; each rank "
            "has a line and a column"
        )
    return np.array(rows, dtype=np.int64)


def buffer_bytes(matrix_RR: npt.NDArray[Any]) -> int:
    """What alltoallv_perf needs as -b and -e: the most that a rank sends, or receives, in all."""
    aligned_RR = _aligned(matrix_RR)
    return int(max(aligned_RR.sum(axis=0).max(), aligned_RR.sum(axis=1).max()))


def _aligned(matrix_RR: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return -(-matrix_RR.astype(np.int64) // ALIGNMENT) * ALIGNMENT


def _cell(word: str, line: int, column: int) -> int:
    try:
        value = float(word)
        if not 0 <= value < 2**63:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"traffic matrix, line {line}, column {column}: {word!r} must be bytes, from 0 up"
        ) from None
    return int(value) // ALIGNMENT * ALIGNMENT
