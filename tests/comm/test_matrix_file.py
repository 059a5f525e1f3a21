"""Byte matrices as nccl-tests' alltoallv reads them: all bytes, and nothing that it refuses."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.matrix_file import buffer_bytes, from_text, to_text


def as_alltoallv_reads(text: str) -> list[list[int]]:
    """By the rules in the head of nccl-tests' src/alltoallv.cu: numbers by white space, a line a
    rank, square, not negative, each rounded down to a multiple of 16 bytes."""
    lines = [line.split() for line in text.split("\n") if line.strip(" \t\r\v\f")]
    assert lines
    assert all(len(line) == len(lines) for line in lines)
    values = [[float(word) for word in line] for line in lines]
    assert all(value >= 0 for line in values for value in line)
    return [[int(value) & ~15 for value in line] for line in values]


@settings(deadline=None)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(
            st.lists(st.integers(0, 2**50), min_size=n, max_size=n), min_size=n, max_size=n
        )
    )
)
def test_alltoallv_sends_all_bytes_of_a_written_matrix(matrix: list[list[int]]) -> None:
    text = to_text(np.array(matrix, dtype=np.int64))
    read = as_alltoallv_reads(text)
    for sent, asked in zip(itertools.chain(*read), itertools.chain(*matrix), strict=True):
        assert asked <= sent < asked + 16
    assert from_text(text).tolist() == read
    assert to_text(from_text(text)) == text
    totals = [sum(row) for row in read] + [sum(column) for column in zip(*read, strict=True)]
    assert buffer_bytes(np.array(matrix, dtype=np.int64)) == max(totals)


def test_a_matrix_is_read_as_alltoallv_reads_it() -> None:
    text = "\n 100  200\t150\n50 1e2 75.9\n\n300 150 200"
    assert from_text(text).tolist() == as_alltoallv_reads(text)
    assert from_text(text).tolist() == [[96, 192, 144], [48, 96, 64], [288, 144, 192]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "square, got 0 lines"),
        ("1 2\n3", "line 2: 1 numbers, but 2"),
        ("1 2 3\n4 5 6", "got 2 lines of 3 numbers"),
        ("# bytes\n1", "line 1, column 1: '#'"),
        ("16 16\n16 -1", "line 2, column 2: '-1'"),
        ("nan", "'nan'"),
        ("1e30", "'1e30'"),
    ],
)
def test_a_text_that_is_no_matrix_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_text(text)


@pytest.mark.parametrize(
    "matrix", [np.zeros((2, 3), int), np.zeros(4, int), np.zeros((2, 2)), -np.eye(2, dtype=int)]
)
def test_what_is_no_matrix_of_bytes_is_not_written(matrix: Any) -> None:
    with pytest.raises(ValueError, match="traffic matrix"):
        to_text(matrix)
