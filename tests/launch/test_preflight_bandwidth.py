"""Bandwidths in nccl-tests' terms, the baseline, and which node is found to be slow."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import hosts
from bench.hosts import network
from counterflow.launch.preflight import neighbours
from counterflow.launch.preflight.baseline import (
    Baseline,
    BaselineError,
    load_baseline,
    save_baseline,
)
from counterflow.launch.preflight.measured import Line, Measured, Timing
from counterflow.launch.preflight.neighbours import Pair
from counterflow.launch.preflight.survey import bandwidth_findings
from tests import cases_preflight as cases
from tests.ranks import RankPool


def test_algbw_and_busbw_are_those_of_nccl_tests() -> None:
    # PERFORMANCE.md of nccl-tests: busbw = algbw (n-1)/n for all-to-all, 2 (n-1)/n for all-reduce.
    spread = Timing("all_to_all", 8, 8_000_000_000, 2.0)
    total = replace(spread, collective="all_reduce")
    assert spread.algbw == total.algbw == 4.0
    assert (spread.busbw, total.busbw) == (3.5, 7.0)


def made_up(
    *, nodes: int = 6, inside: dict[int, float] | None = None, slow: Iterable[int] = ()
) -> Measured:
    """What a survey gives: links of 10 GB/s, in the nodes of `slow` of 2; `inside` a node 100."""
    names = [f"n{i}" for i in range(nodes)]

    def line(where: str, of: Iterable[int], busbw: float) -> Line:
        told = tuple(names[i] for i in of)
        return Line(where, told, "all_to_all", 8, 1 << 20, 1.0, busbw, busbw)  # pyright: ignore

    ill = set(slow)

    def between(pair: Pair) -> Line:
        return line("pair", pair, 2.0 if ill & set(pair) else 10.0)

    pairs = list(chain(*neighbours.rounds_of_pairs(nodes)))
    slow_ones = {pair for pair in pairs if ill & set(pair)}
    again = list(chain(*neighbours.rounds_of_second_look(nodes, slow_ones)))
    lines = [line("node", [i], (inside or {}).get(i, 100.0)) for i in range(nodes)]
    lines += [between(pair) for pair in pairs]
    return Measured("H800", "nccl", 8, tuple(names), tuple(lines), tuple(map(between, again)))


@settings(deadline=None, max_examples=39)
@given(st.integers(2, 40))
def test_in_every_round_a_node_has_one_pair_and_in_all_each_neighbour_once(num_nodes: int) -> None:
    rounds = neighbours.rounds_of_pairs(num_nodes)
    for pairs in rounds:
        assert len(set(chain(*pairs))) == 2 * len(pairs)
    wanted = {tuple(sorted((i, (i + 1) % num_nodes))) for i in range(num_nodes)}
    assert set(chain(*rounds)) == wanted
    assert len(list(chain(*rounds))) == len(wanted)


@settings(deadline=None, max_examples=50)
@given(st.integers(3, 16), st.data())
def test_slow_nodes_are_found_and_none_between_two_of_them_is_blamed(
    num_nodes: int, data: st.DataObject
) -> None:
    most = (num_nodes - 1) // 2
    ill = data.draw(st.sets(st.integers(0, num_nodes - 1), max_size=most))
    measured = made_up(nodes=num_nodes, slow=ill)
    base = Baseline("H800", "nccl", 8, num_nodes, made_up().typical())
    found = bandwidth_findings(measured, base, 0.8)
    blamed = {int(f.node[1:]) for f in found if f.verdict == "bad"}
    ring = set(chain(*neighbours.rounds_of_pairs(num_nodes)))
    rounds = neighbours.rounds_of_second_look(num_nodes, {p for p in ring if ill & set(p)})
    looked_at = [pair for pairs in rounds for pair in pairs]
    assert len(set(looked_at)) == len(looked_at)
    assert not ring & set(looked_at)  # the same ranks never measure twice
    suspected = neighbours.suspects(num_nodes, {p for p in ring if ill & set(p)})
    assert ill <= set(suspected)
    if len(looked_at) == len(suspected) < num_nodes:
        assert blamed == ill


def test_a_node_that_is_slow_inside_is_named_with_what_it_reached() -> None:
    [found] = bandwidth_findings(made_up(inside={2: 70.0}), None, 0.8)
    assert (found.verdict, found.node) == ("bad", "n2")
    assert "70 GB/s, 70% of the 100 GB/s that are expected" in found.message
    assert bandwidth_findings(made_up(inside={2: 81.0}), None, 0.8) == []


def test_two_nodes_cannot_tell_which_of_them_is_slow() -> None:
    base = Baseline("H800", "nccl", 8, 2, made_up().typical())
    [found] = bandwidth_findings(made_up(nodes=2, slow=[1]), base, 0.8)
    assert (found.verdict, found.node) == ("warning", "")
    assert "slow between n0 and n1" in found.message
    assert bandwidth_findings(made_up(nodes=2, slow=[1]), None, 0.8) == []  # nothing to go by


def test_a_network_that_is_slow_everywhere_is_no_nodes_fault() -> None:
    base = Baseline("H800", "nccl", 8, 6, made_up().typical())
    [found] = bandwidth_findings(made_up(slow=range(6)), base, 0.8)
    assert (found.verdict, found.node) == ("warning", "")


@pytest.mark.parametrize(("ill", "nodes"), [([2], ["n2"]), ([0, 2, 5], ["n0", "n2", "n5"])])
def test_a_few_nodes_that_are_slow_inside_are_named(ill: list[int], nodes: list[str]) -> None:
    base = Baseline("H800", "nccl", 8, 6, made_up().typical())
    found = bandwidth_findings(made_up(inside=dict.fromkeys(ill, 50.0)), base, 0.8)
    assert [f.node for f in found if f.verdict == "bad"] == nodes


@pytest.mark.parametrize("ill", [range(4), range(6)])
def test_most_nodes_that_are_slow_inside_are_no_nodes_fault(ill: Iterable[int]) -> None:
    base = Baseline("H800", "nccl", 8, 6, made_up().typical())
    found = bandwidth_findings(made_up(inside=dict.fromkeys(ill, 50.0)), base, 0.8)
    [told] = found
    assert (told.verdict, told.node) == ("warning", "")
    assert f"{len(list(ill))} of 6 nodes are slow in themselves" in told.message
    one = bandwidth_findings(made_up(nodes=1, inside={0: 50.0}), base, 0.8)
    assert [f.node for f in one] == ["n0"]  # of which the baseline knows better


def test_a_baseline_comes_back_and_refuses_other_machines(tmp_path: Path) -> None:
    measured, path = made_up(), tmp_path / "base.json"
    save_baseline(path, measured)
    base = load_baseline(path)
    assert base == Baseline.of(measured)
    base.require_fit(made_up(nodes=2), str(path))
    for other, what in (
        (replace(measured, ranks_per_node=4), r"other ranks a node \(8\) than these \(4\)"),
        (replace(measured, kind="H100"), r"other devices \(H800\) than these \(H100\)"),
        (replace(measured, backend="gloo"), "other backend"),
        (replace(measured, lines=(replace(measured.lines[0], num_bytes=7),)), "other sizes"),
    ):
        with pytest.raises(BaselineError, match=what):
            base.require_fit(other, str(path))
    for text, what in (("{", "is no JSON"), ("[]", "is no baseline"), ("{}", "is no baseline")):
        path.write_text(text)
        with pytest.raises(BaselineError, match=what):
            load_baseline(path)
    path.write_text(json.dumps({"format": "counterflow bandwidth 1", "kind": "a"}))
    with pytest.raises(BaselineError, match="is damaged"):
        load_baseline(path)
    with pytest.raises(BaselineError, match="No such file"):
        load_baseline(tmp_path / "none")


def test_ranks_measure_in_nodes_between_them_and_over_all(ranks: RankPool) -> None:
    found = ranks.run(cases.surveyed, world=4, per_node=2, size=1 << 16)
    measured, _ = found[0]
    assert all(one == found[0] for one in found)
    seen = [(line.where, line.nodes, line.collective, line.num_ranks) for line in measured.lines]
    assert seen == [
        ("node", ("n0",), "all_to_all", 2),
        ("node", ("n0",), "all_reduce", 2),
        ("node", ("n1",), "all_to_all", 2),
        ("node", ("n1",), "all_reduce", 2),
        ("pair", ("n0", "n1"), "all_to_all", 4),
        ("all", (), "all_to_all", 4),
        ("all", (), "all_reduce", 4),
    ]
    assert all(0 < line.seconds < 60 for line in measured.lines)


def test_an_odd_number_of_nodes_is_measured_all_round(ranks: RankPool) -> None:
    measured, _ = ranks.run(cases.surveyed, world=3, per_node=1, size=1 << 16)[0]
    pairs = {line.nodes for line in measured.lines if line.where == "pair"}
    assert pairs == {("n0", "n1"), ("n1", "n2"), ("n0", "n2")}


def test_ranks_find_out_together_what_differs(ranks: RankPool, tmp_path: Path) -> None:
    shared, alone = str(tmp_path / "runs"), str(tmp_path)
    folders = [shared, shared, shared, alone]
    found = ranks.run(cases.looked, world=4, folders=folders, ahead_s=30.0)
    assert all(one == found[0] for one in found)
    told = {(f.check, f.verdict, f.node) for f in found[0]}
    assert told >= {("versions", "bad", "n1"), ("clock", "warning", "n3")}
    assert {node for check, _, node in told if check == "gpu"} == {"n0", "n1", "n2", "n3"}
    assert list((tmp_path / "runs").iterdir()) == []  # the token is gone


@pytest.mark.parametrize(
    ("ill", "bad"),
    [([2], ["n2"]), ([0, 3], ["n0", "n3"]), ([0, 1, 2], [""]), ([0, 1, 2, 3], [""])],
)
def test_nodes_that_found_themselves_bad_decide_with_the_others(
    ill: list[int], bad: list[str], ranks: RankPool
) -> None:
    found = ranks.run(cases.decided_together, world=4, ill=ill)
    assert all(one == found[0] for one in found)
    assert [f.node for f in found[0] if f.verdict == "bad"] == bad


@pytest.mark.alone
def test_on_hosts_of_their_own_the_one_with_a_slow_link_is_named() -> None:
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(f"no network of hosts here: {reason}")
    with network(4, link_mbit=400) as made:
        # The third host's link gets a quarter of the others' rate, for what leaves it.
        shape = hosts._shape(50, hosts.BUCKET_BYTES)
        made[2].call(lambda: hosts._batch("tc", [f"qdisc replace dev {hosts.LINK} {shape}"]))
        with RankPool(hosts=made) as pool:
            _, found = pool.run(cases.surveyed, world=4, per_node=1, size=1 << 22)[0]
    # Another pair may have been disturbed, which alone makes no node bad.
    [bad] = [f for f in found if f.verdict == "bad"]
    assert bad.node == "n2"
    assert "with each of its neighbours" in bad.message
