"""A peer that is gone ends a dispatch in time and is named; wrong input is refused by all ranks."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests import cases_dispatch_faults as cases
from tests.cases_dispatch import SETTINGS, Setting
from tests.ranks import RankError, RankPool

pytestmark = pytest.mark.alone

OPERATIONS = cases.OPERATIONS
PAIR = {name: Setting(name, (0, 0)) for name in ("flat", "dedup")}
GRID = SETTINGS["two_hop"]  # ranks 0 and 1 on one node, 2 and 3 on the other


def killed(case: Callable[..., None], world: int, **kwargs: Any) -> dict[int, str]:
    """The errors of the ranks where the last one dies."""
    with RankPool() as pool, pytest.raises(RankError) as caught:
        # The first pool of a process imports torch within the limit, tens of seconds of it if busy.
        pool.run(case, world=world, timeout_s=120, **kwargs)
    errors = caught.value.errors
    assert errors.pop(world - 1) == "the process died"
    assert set(errors) == set(range(world - 1))
    return errors


@pytest.mark.parametrize("name", PAIR)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_peer_that_dies_is_named_with_the_operation(name: str, operation: str) -> None:
    began = time.monotonic()
    text = killed(cases.dies, 2, setting=PAIR[name], operation=operation, limit_s=100.0)[0]
    assert time.monotonic() - began < 100  # the limit was not waited for
    assert re.fullmatch(
        re.escape(f"CommError: rank 0: {operation} failed while waiting for rank 1: ")
        + r".*Connection (reset|closed) by peer.*",
        text,
    ), text


def test_a_peer_that_is_gone_before_the_start_is_named_alone() -> None:
    setting = Setting("flat", (0,) * 4)
    for rank, text in killed(cases.is_gone, 4, setting=setting, limit_s=60.0).items():
        start = f"CommError: rank {rank}: dispatch(F) failed while waiting for rank 3: "
        assert re.match(re.escape(start) + r".*Connection (reset|closed) by peer", text), text


# Rank 3 is gone. Counts are exchanged among all; after that, rank 2 shares a node with rank 3, rank
# 1 a rail, and rank 0 waits for one of those two.
HOPS = {0: ("rank 1", "rank 2"), 1: ("rank 3", "rank 0"), 2: ("rank 3", "rank 0")}
ALL = dict.fromkeys(range(3), ("rank 3",))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_in_two_hops_a_death_ends_the_wait_of_all_and_the_hops_peers_are_named(
    operation: str,
) -> None:
    errors = killed(cases.dies, 4, setting=GRID, operation=operation, limit_s=3.0)
    for rank, text in errors.items():
        peers = "|".join((ALL if operation == "dispatch(F)" else HOPS)[rank])
        start = re.escape(f"CommError: rank {rank}: {operation} failed while waiting for ")
        assert re.fullmatch(f"{start}({peers}): .*", text), text
    assert any("by peer" in text for text in errors.values())


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_a_peer_that_is_silent_is_named_once_the_limit_is_over_and_later_starts_fail_too(
    name: str,
) -> None:
    setting = GRID if name == "two_hop" else PAIR[name]
    # It is waited for in full, and holds for what succeeds before that, too: no shorter than a
    # busy machine may stop a process for.
    limit_s, world = 3.0, len(setting.nodes)
    with RankPool() as pool:
        found = pool.run(
            cases.is_silent, world=world, setting=setting, limit_s=limit_s, timeout_s=200
        )
    assert found[-1] == dict.fromkeys(OPERATIONS)
    for rank, of_rank in enumerate(found[:-1]):
        for operation, seen in of_rank.items():
            assert seen is not None
            named = ("rank 1",)
            if name == "two_hop":
                named = (ALL if operation == "dispatch(F)" else HOPS)[rank]
            start = f"rank {rank}: {operation} failed while waiting for "
            assert seen.error in [f"{start}{who}: no answer within 3 s" for who in named]
            assert f"rank{'s' * (len(seen.peers) > 1)} {', '.join(map(str, seen.peers))}" in named
            # A lane's moves run one after another, and a hop waits once for each piece.
            assert limit_s <= seen.seconds < limit_s + 20
            assert seen.again == (
                f"rank {rank}: not started, because an earlier {operation} failed: {seen.error}"
            )


def test_an_index_out_of_range_on_one_rank_is_refused_by_all_at_once(ranks: RankPool) -> None:
    settings = [SETTINGS[name] for name in ("flat", "dedup", "two_hop")]
    for found in ranks.run(cases.strange_index, world=4, settings=settings):
        for high, low, fine in found:
            text = r"experts_TK of rank 2 holds experts {}, but .* has 8: 0\.\.7, or -1 for none"
            assert re.match(text.format(r"\d\.\.8"), high[0])
            assert re.match(text.format(r"-2\.\.\d"), low[0])
            assert max(high[1], low[1]) < 50  # nobody waited for the limit of 60 s
            assert fine[0] == "no error"


def test_a_token_that_reaches_too_many_nodes_is_refused_by_all_at_once(ranks: RankPool) -> None:
    names = ("two_hop", "two_hop, a rank a node", "two_hop, ranks dealt to nodes in turn")
    settings = [SETTINGS[name] for name in names]
    settings += [replace(settings[0], name="dedup"), replace(settings[2], name="flat")]
    for found in ranks.run(cases.too_many_nodes, world=4, settings=settings):
        for text, seconds in found:
            assert text.startswith("a token of rank 1 goes to 2 nodes, but node_limit is 1")
            assert seconds < 50


def test_nodes_that_two_hop_cannot_use_are_refused_with_what_to_do(ranks: RankPool) -> None:
    for unequal, crossed in ranks.run(cases.unlike_sizes, world=4):
        assert "unevenly on their nodes (3 on node 0, 1 on node 1)" in unequal
        assert "the dispatcher 'dedup'" in unequal
        assert "in a changing order ([0, 1, 1, 0])" in crossed
        assert "the dispatcher 'dedup'" in crossed


@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_what_one_rank_refuses_ends_the_dispatch_of_all_and_the_next_one_is_whole(
    ranks: RankPool, name: str
) -> None:
    found = ranks.run(cases.refuses_alone, world=4, setting=SETTINGS[name])
    for rank, steps in enumerate(found):
        for own, (text, seconds) in zip(cases.MISTAKES, steps[::2], strict=True):
            expected = own if rank == 1 else "rank 1 refused the tensors that it was given"
            assert re.match(expected, text), text
            assert seconds < 50
        assert [text for text, _ in steps[1::2]] == ["no error"] * len(cases.MISTAKES)


def test_ranks_whose_tensors_differ_are_told_which_and_where(ranks: RankPool) -> None:
    for found in ranks.run(cases.differ, world=4, setting=GRID):
        reasons = (
            r"experts a token \(K\): 3 on rank 0, 2 on rank 1",
            r"columns of x_TD \(D\): 5 on rank 0, 6 on rank 1",
            "dtype of x_TD: torch.float64 on rank 0, torch.float32 on rank 1",
            "dtype of weights_TK: torch.float64 on rank 0, torch.float32 on rank 1",
            "tensors that need a gradient: none on rank 0, x_TD on rank 1",
        )
        for reason, text in zip(reasons, found, strict=True):
            assert re.match(f"ranks differ in the {reason}", text), text


def test_a_rank_that_leaves_out_a_call_is_waited_for_and_nothing_is_mixed() -> None:
    with RankPool() as pool:
        found = pool.run(cases.skips, world=2, setting=PAIR["dedup"], limit_s=3.0, timeout_s=120)
    assert found[1] is None
    assert re.fullmatch(
        r"rank 0: combine\(F\) failed while waiting for rank 1: no answer within 3 s",
        str(found[0]),
    )


def test_a_handle_serves_only_the_dispatcher_that_made_it(ranks: RankPool) -> None:
    for found in ranks.run(cases.foreign_handle, world=4):
        assert len(found) == 4
        assert all("made by another dispatcher" in text for text in found), found


def test_ranks_that_ask_for_different_dispatchers_are_told_in_what(ranks: RankPool) -> None:
    for payload, layout, name in ranks.run(cases.unlike_options, world=4):
        start = "ranks ask for different dispatchers: "
        assert payload.startswith(f"{start}payload is 'exact' on rank 0, 'bf16' on rank 2;")
        assert layout.startswith(f"{start}layout is (0, 1, 2, 3, 4, 5, 6, 7) on rank 0, (7, 6, ")
        assert name.startswith(f"{start}name is 'dedup' on rank 0, 'flat' on rank 2;")
