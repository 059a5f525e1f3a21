"""Buffers: kept, handed to one taker at a time, and no more than are in use."""

from __future__ import annotations

import pytest
import torch

from counterflow.comm.dispatch.buffers import Buffers

CPU = torch.device("cpu")


def test_a_buffer_serves_again_once_its_move_is_over() -> None:
    buffers = Buffers()
    with buffers.hold(CPU) as take:
        first = take(10, 100)
        address = first.data_ptr()
        assert buffers.num_bytes == 0
    kept = buffers.num_bytes
    assert kept >= 1000
    with buffers.hold(CPU) as take:
        assert take(9, 100).data_ptr() == address
    assert buffers.num_bytes == kept


def test_what_is_taken_within_a_move_does_not_overlap() -> None:
    buffers = Buffers()
    for _ in range(3):
        with buffers.hold(CPU) as take:
            taken = [take(rows, 7) for rows in (100, 0, 1, 5000, 100, 3)]
            for i, buffer in enumerate(taken):
                buffer.fill_(i)
            for i, buffer in enumerate(taken):
                assert buffer.shape[1] == 7
                assert bool((buffer == i).all())
            assert [len(buffer) for buffer in taken] == [100, 0, 1, 5000, 100, 3]


def test_sizes_that_vary_a_little_need_no_new_memory() -> None:
    buffers = Buffers()
    with buffers.hold(CPU) as take:
        take(100_001, 1)
    kept = buffers.num_bytes
    for size in (100_001, 90_000, 104_000):
        with buffers.hold(CPU) as take:
            take(size, 1)
        assert buffers.num_bytes == kept
    assert kept <= 100_001 * 9 / 8


def test_a_buffer_that_is_too_small_makes_room_for_the_one_that_replaces_it() -> None:
    buffers = Buffers()
    for size in (10_000, 100_000, 1_000_000):
        with buffers.hold(CPU) as take:
            take(size, 1)
    assert buffers.num_bytes <= 1_000_000 * 9 / 8


def test_buffers_come_back_from_a_move_that_failed() -> None:
    buffers = Buffers()

    def fail() -> None:
        with buffers.hold(CPU) as take:
            take(10, 100)
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fail()
    assert buffers.num_bytes >= 1000
