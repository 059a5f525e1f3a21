"""Bandwidths of collectives are those of nccl-tests."""

import pytest

from counterflow.comm.profile.bandwidth import Moved, collective_of, moved
from counterflow.comm.profile.trace import Exchange


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("_allgather_base", "all_gather"),
        ("allgather_into_tensor_coalesced", "all_gather"),
        ("_reduce_scatter_base", "reduce_scatter"),
        ("reduce_scatter_tensor_coalesced", "reduce_scatter"),
        ("allreduce", "all_reduce"),
        ("all_to_allv", "all_to_all"),
        ("broadcast_oop", "broadcast"),
        ("_reduce_oop", "reduce"),
        ("send", "send"),
        ("coalesced", "coalesced"),
    ],
)
def test_a_collective_has_its_usual_name(told: str, name: str) -> None:
    assert collective_of(told) == name


# Sent and received by a rank of four whose parts are 300 bytes, and size and bus bytes of it.
@pytest.mark.parametrize(
    ("collective", "sent", "received", "size", "bus"),
    [
        ("allreduce", 1200, 1200, 1200, 1800),  # 2 (n - 1) / n
        ("_allgather_base", 300, 1200, 1200, 900),  # (n - 1) / n
        ("_reduce_scatter_base", 1200, 300, 1200, 900),
        ("all_to_all", 1200, 1200, 1200, 900),
        ("broadcast", 1200, 1200, 1200, 1200),  # 1
        ("_reduce_oop", 1200, 1200, 1200, 1200),
        ("send", 1200, 0, 1200, 1200),
        ("coalesced", 1200, 1200, 1200, None),  # of what is not told
    ],
)
def test_sizes_and_factors_are_those_of_nccl_tests(
    collective: str, sent: int, received: int, size: int, bus: int | None
) -> None:
    assert moved([Exchange(collective, sent, received, group_size=4)]) == Moved(size, bus)


def test_several_collectives_add_up_and_one_that_does_not_tell_spoils_the_sum() -> None:
    one = Exchange("allreduce", 1000, 1000, group_size=2)
    assert moved([one, one, Exchange("send", 500, 500)]) == Moved(2500, 2500)
    assert moved([one, one._replace(group_size=None)]) == Moved(2000, None)
    assert moved([one, Exchange("allreduce", group_size=2)]) == Moved(None, None)
    assert moved([one, None]) == Moved(None, None)
    assert moved([]) == Moved(None, None)
