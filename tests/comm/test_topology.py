"""Where ranks are: by every launcher's word, over a whole world, and in groups."""

from __future__ import annotations

import dataclasses
import logging
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.dispatch.layout import ExpertLayout
from counterflow.comm.topology import (
    Machine,
    ProcessPlace,
    Seat,
    Topology,
    order_by_node,
    place_of_process,
    rank_told,
    require_node_limit,
    spread_of_groups,
    this_machine,
    warn_of_spread,
    why_spread,
)
from counterflow.comm.topology.place import tasks_per_node
from tests import cases_topology as cases
from tests.ranks import RankPool

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "GROUP_RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "16",  # of the job, not of the step
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1",
}


def test_without_a_launcher_a_process_is_alone() -> None:
    alone = ProcessPlace(0, 1, 0, 0, 1, "alone")
    assert place_of_process({}) == alone
    # A rank that its program hands over by itself, without a world, is nobody's word.
    assert place_of_process({"RANK": "17"}) == alone


def test_torchrun_tells_the_place() -> None:
    assert place_of_process(TORCHRUN) == ProcessPlace(5, 8, 1, 1, 4, "torchrun")


def test_torchrun_is_believed_before_mpi_and_slurm_which_may_have_started_it() -> None:
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert place_of_process(TORCHRUN | SRUN | mpi) == place_of_process(TORCHRUN)


def test_other_launchers_number_their_processes_node_by_node() -> None:
    told = {"RANK": "17", "WORLD_SIZE": "24", "LOCAL_WORLD_SIZE": "8"}
    assert place_of_process(told) == ProcessPlace(17, 24, 2, 1, 8, "environment")
    del told["LOCAL_WORLD_SIZE"]
    assert place_of_process(told) == ProcessPlace(17, 24, None, None, None, "environment")


@pytest.mark.parametrize(
    ("name", "text", "range_"),
    [
        ("GROUP_RANK", "a", "from 0 up"),
        ("GROUP_RANK", "-1", "from 0 up"),
        ("GROUP_RANK", "\u0663", "from 0 up"),
        ("RANK", "8", "from 0 to 7"),
        ("WORLD_SIZE", "0", "from 1 up"),
        ("LOCAL_WORLD_SIZE", "9", "from 1 to 8"),
        ("LOCAL_RANK", "4", "from 0 to 3"),
    ],
)
def test_a_variable_that_makes_no_sense_is_named(name: str, text: str, range_: str) -> None:
    with pytest.raises(ValueError, match=rf"environment's {name}='.*' is not .* {range_}; start"):
        place_of_process(TORCHRUN | {name: text})


def test_srun_tells_the_place_by_the_step_not_by_the_job() -> None:
    assert place_of_process(SRUN) == ProcessPlace(5, 8, 2, 0, 2, "slurm")


def test_a_batch_script_is_one_process_though_slurm_has_given_it_a_number() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    assert place_of_process(script).source == "alone"


def test_srun_is_believed_where_it_sets_mpis_variables_itself() -> None:
    told = SRUN | {"PMI_RANK": "5", "PMI_SIZE": "8"}
    assert place_of_process(told) == place_of_process(SRUN)


@pytest.mark.parametrize("name", ["PMI_RANK", "PMI_SIZE"])
def test_where_mpis_variables_are_not_sruns_own_mpi_is_believed(name: str) -> None:
    """Another launcher inside the step, one that sets nothing by which it is known."""
    step = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "0"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": "2", "PMI_RANK": "0", "PMI_SIZE": "2"}
    assert place_of_process(step).source == "slurm"
    assert place_of_process(step | {name: "1"}).source == "mpi"


def test_under_mpirun_slurms_variables_are_those_of_its_daemon() -> None:
    daemon = SRUN | {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    daemon |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_NODEID": "1"}
    open_mpi = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    mpich = {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"}
    for told in (open_mpi, mpich):
        assert place_of_process(daemon | told) == ProcessPlace(0, 1, 0, 0, 1, "mpi")
    # Also where there happen to be as many daemons as processes, and in the same order.
    same = daemon | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"}
    same["SLURM_STEP_TASKS_PER_NODE"] = "1"
    for told in (open_mpi, mpich):
        assert place_of_process(same | told).source == "mpi"


def test_slurm_variables_of_a_batch_script_are_refused_in_a_step() -> None:
    with pytest.raises(ValueError, match=r"='1\(x2\)' does not fit SLURM_STEP_NUM_TASKS=8"):
        place_of_process(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"})


def test_a_heterogeneous_slurm_step_is_refused_with_what_to_do() -> None:
    told = SRUN | {"SLURM_PROCID": "8"}
    with pytest.raises(
        ValueError, match=r"=8 is beyond SLURM_STEP_NUM_TASKS=8, .* set RANK and WORLD_SIZE"
    ):
        place_of_process(told)
    assert place_of_process(told | TORCHRUN) == place_of_process(TORCHRUN)


@pytest.mark.parametrize(
    ("told", "rank"),
    [
        (TORCHRUN | {"GROUP_RANK": "x"}, 5),
        ({"RANK": "8", "WORLD_SIZE": "8"}, None),
        ({"RANK": "-1", "WORLD_SIZE": "8"}, None),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "junk"}, 5),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, 1),
        ({}, None),
    ],
)
def test_a_rank_is_told_though_other_variables_be_wrong(
    told: dict[str, str], rank: int | None
) -> None:
    assert rank_told(told) == rank


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 9)), min_size=1))
def test_tasks_per_node_are_read_as_slurm_writes_them(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{tasks}(x{n})" if n > 1 else str(tasks) for tasks, n in runs)
    assert tasks_per_node(text) == [tasks for tasks, n in runs for _ in range(n)]


@pytest.mark.parametrize("text", ["", "4(x2", "a", "4,,3", "4(2)"])
def test_other_lists_of_tasks_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no list of tasks per node"):
        tasks_per_node(text)


def seats(nodes: list[int | None], hosts: list[str], **changes: Any) -> list[Seat]:
    place = ProcessPlace(0, len(nodes), None, None, None, "torchrun")
    return [
        Seat(
            dataclasses.replace(place, rank=r, node=node, **changes), Machine(host, f"boot {host}")
        )
        for r, (node, host) in enumerate(zip(nodes, hosts, strict=True))
    ]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_a_topology_follows_the_launcher_and_numbers_nodes_without_gaps(told: list[int]) -> None:
    found = Topology.of(seats(list(told), [f"host{node}" for node in told], source="torchrun"))
    assert found.nodes == tuple(sorted(set(told)).index(node) for node in told)
    for node in range(found.num_nodes):
        ranks = found.ranks_of(node)
        assert [found.local_ranks[r] for r in ranks] == list(range(len(ranks)))
    assert found.is_even == (len({told.count(node) for node in told}) == 1)
    uneven = [note for note in found.notes if "different numbers of ranks" in note]
    assert list(found.notes) == uneven
    assert bool(uneven) != found.is_even


def test_in_node_indices_are_those_that_the_ranks_told() -> None:
    told = [
        dataclasses.replace(seat, place=dataclasses.replace(seat.place, local_rank=local))
        for seat, local in zip(seats([0, 0, 1, 1], ["a", "a", "b", "b"]), [1, 0, 0, 0], strict=True)
    ]
    # Node 1's make no sense: two ranks of one index.
    assert Topology.of(told).local_ranks == (1, 0, 0, 1)


def test_nodes_on_one_host_are_followed_and_noted() -> None:
    found = Topology.of(seats([0, 0, 1, 1], ["a"] * 4))
    assert found.nodes == (0, 0, 1, 1)
    (note,) = found.notes
    assert note.startswith("nodes 0, 1 are all on host a: the launcher's nodes are followed")


def test_a_node_on_different_hosts_is_followed_and_noted() -> None:
    found = Topology.of(seats([0, 0, 1, 1], ["a", "b", "c", "c"]))
    assert found.nodes == (0, 0, 1, 1)
    (note,) = found.notes
    assert "node 0 has ranks on different hosts (a, b)" in note


def test_containers_of_one_machine_are_not_taken_for_different_hosts() -> None:
    told = seats([0, 0], ["a", "b"])
    alike = [dataclasses.replace(s, machine=Machine(s.machine.host, "one boot")) for s in told]
    assert Topology.of(alike).notes == ()


def test_where_no_launcher_tells_nodes_hosts_do() -> None:
    found = Topology.of(seats([None] * 4, ["b", "a", "b", "a"], source="environment"))
    assert found.nodes == (0, 1, 0, 1)
    assert found.local_ranks == (0, 0, 1, 1)
    assert found.notes == (
        "no launcher tells the node of every rank, so the ranks of a host are a node",
    )
    alone = ProcessPlace(0, 1, 0, 0, 1, "alone")
    by_hand = [Seat(alone, Machine(host)) for host in ("x", "y", "y")]
    assert Topology.of(by_hand).nodes == (0, 1, 1)
    assert Topology.of(by_hand[:1]) == Topology((0,), (0,), tuple(by_hand[:1]), ())


def test_ranks_that_believe_different_launchers_are_noted() -> None:
    mixed = [*seats([0], ["a"]), *seats([1], ["b"], source="slurm")]
    assert any("different launchers: torchrun, slurm" in note for note in Topology.of(mixed).notes)


def test_every_rank_gets_the_same_topology(ranks: RankPool) -> None:
    found = ranks.run(cases.gathered, world=4, per_node=2)
    assert found[0].nodes == (0, 0, 1, 1)
    assert found[0].local_ranks == (0, 1, 0, 1)
    assert [seat.device for seat in found[0].seats] == ["device 0", "device 1"] * 2
    assert {seat.machine for seat in found[0].seats} == {this_machine()}
    assert all(other == found[0] for other in found)


def test_where_mpi_cannot_be_asked_hosts_are_nodes_and_rank_0_says_so_once(
    ranks: RankPool,
) -> None:
    found = ranks.run(cases.without_mpi4py, world=2)
    assert [topology.nodes for topology, _ in found] == [(0, 0)] * 2
    by_host, problem = found[0][0].notes
    assert by_host.endswith("the ranks of a host are a node")
    assert problem.startswith("rank 0 cannot ask MPI for its node, ")
    assert "Mesh.create(nodes=...)" in problem
    assert "mpi4py" in problem
    assert [said for _, said in found] == [[problem], []]


def test_one_ranks_wrong_environment_is_told_on_every_rank(ranks: RankPool) -> None:
    for reason in ranks.run(cases.one_wrong, world=3):
        assert reason.startswith("rank 1 does not know its node: the environment's GROUP_RANK='x'")


@pytest.mark.alone
def test_a_rank_that_does_not_come_is_named_within_the_limit(ranks: RankPool) -> None:
    limit_s = 0.5
    said, seconds = ranks.run(cases.one_missing, world=2, limit_s=limit_s)[0]
    assert said == (
        "rank 0: waiting for the nodes of all ranks (peers: rank 1): no answer within the limit "
        "(1,)"
    )
    assert limit_s <= seconds < limit_s + 20  # a busy machine may take a while to say it


@given(st.lists(st.integers(0, 4), min_size=1, max_size=16))
def test_the_order_by_node_puts_nodes_together_and_moves_nothing_else(nodes: list[int]) -> None:
    order = order_by_node(nodes)
    assert sorted(order) == list(range(len(nodes)))
    in_order = [nodes[rank] for rank in order]
    assert list(dict.fromkeys(in_order)) == list(dict.fromkeys(nodes))
    changes = sum(a != b for a, b in pairwise(in_order))
    assert changes == len(set(nodes)) - 1
    for node in set(nodes):
        mine = [rank for rank in order if nodes[rank] == node]
        assert mine == sorted(mine)
    if in_order == nodes:
        assert order == tuple(range(len(nodes)))


@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.data())
def test_the_fewest_nodes_are_those_that_no_choice_of_ranks_undercuts(
    nodes: list[int], data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, len(nodes)))
    ranks = data.draw(st.permutations(range(len(nodes))))[:size]
    (found,) = spread_of_groups([ranks], nodes)
    every = [len({nodes[r] for r in some}) for some in combinations(range(len(nodes)), size)]
    assert found.fewest == min(every)
    assert set(found.nodes) == {nodes[r] for r in ranks}


def groups_of(world: int, ep: int) -> list[tuple[int, ...]]:
    return [tuple(range(first, first + ep)) for first in range(0, world, ep)]


@pytest.mark.parametrize(("world", "ep", "per_node"), [(8, 2, 4), (8, 4, 4), (8, 8, 4), (12, 6, 3)])
def test_groups_that_fit_nodes_need_no_word_and_mixed_up_ranks_are_told_their_order(
    world: int, ep: int, per_node: int
) -> None:
    groups = groups_of(world, ep)
    assert why_spread(groups, [rank // per_node for rank in range(world)]) is None
    mixed = [rank % (world // per_node) for rank in range(world)]
    reason = why_spread(groups, mixed)
    if ep == world:
        assert reason is None
    else:
        assert reason is not None
        order = ", ".join(map(str, order_by_node(mixed)))
        assert "start the ranks node by node (torchrun with --node-rank" in reason
        assert f"in the order {order} of the present ranks" in reason


def test_groups_that_no_order_can_fit_are_told_to_choose_other_sizes() -> None:
    reason = why_spread(groups_of(6, 2), [0, 0, 0, 1, 1, 1])
    assert reason is not None
    assert reason.startswith(
        "1 of 3 expert groups lie on more nodes than they need: ranks 2, 3 on 2 nodes (0, 1) "
        "instead of 1"
    )
    assert "choose mesh.ep and the processes per node so that one is a multiple" in reason


def test_a_mesh_with_wide_expert_groups_says_so_once(
    ranks: RankPool, caplog: pytest.LogCaptureFixture
) -> None:
    assert [len(said) for said in ranks.run(cases.warned, world=4, nodes=[0, 1, 0, 1])] == [
        1,
        0,
        0,
        0,
    ]
    assert ranks.run(cases.warned, world=4, nodes=[0, 0, 1, 1]) == [[]] * 4
    with caplog.at_level(logging.WARNING):
        warn_of_spread([(0,), (1,), (2,)], [0, 1, 2])
    assert not caplog.records


@st.composite
def limited(draw: st.DrawFn) -> tuple[ExpertLayout, list[int], int, int]:
    num_groups = draw(st.integers(1, 4))
    num_experts = num_groups * draw(st.integers(1, 3))
    num_ranks = draw(st.integers(1, 5))
    nodes = draw(st.lists(st.integers(0, 4), min_size=num_ranks, max_size=num_ranks))
    spare = -num_experts % num_ranks + num_ranks * draw(st.integers(0, 1))
    extra = draw(st.lists(st.integers(0, num_experts - 1), min_size=spare, max_size=spare))
    slots = draw(st.permutations([*range(num_experts), *extra]))
    layout = ExpertLayout(num_experts, num_ranks, tuple(slots))
    return layout, nodes, num_groups, draw(st.integers(1, num_groups))


@given(limited())
def test_the_node_limit_is_refused_exactly_where_some_choice_of_groups_breaks_it(
    case: tuple[ExpertLayout, list[int], int, int],
) -> None:
    layout, nodes, num_groups, limit = case
    size = layout.num_experts // num_groups
    on = {group: set[int]() for group in range(num_groups)}
    for slot, expert in enumerate(layout.slots):
        on[expert // size].add(nodes[slot // layout.slots_per_rank])
    most = max(len(set().union(*(on[g] for g in some))) for some in combinations(on, limit))
    if most <= limit:
        require_node_limit(layout, nodes, num_groups=num_groups, limit=limit)
    else:
        with pytest.raises(ValueError, match=rf"limited to {limit} groups can reach more than"):
            require_node_limit(layout, nodes, num_groups=num_groups, limit=limit)


def test_deepseek_v3_keeps_its_promise_on_eight_nodes_and_not_on_six() -> None:
    on_eight = [rank // 8 for rank in range(64)]
    require_node_limit(ExpertLayout.contiguous(256, 64), on_eight, num_groups=8, limit=4)
    with pytest.raises(
        ValueError,
        match=r"group 1 of 8 \(experts 30\.\.59\) lie on nodes 0, 1, .* 4 of the 6 nodes; give a "
        r"layout that keeps each group on one node",
    ):
        require_node_limit(
            ExpertLayout(240, 48, tuple(range(240))),
            [r // 8 for r in range(48)],
            num_groups=8,
            limit=4,
        )


def test_numbers_that_do_not_fit_the_layout_are_refused() -> None:
    layout = ExpertLayout.contiguous(8, 4)
    with pytest.raises(ValueError, match="node of 3 ep ranks, the expert layout has 4"):
        require_node_limit(layout, [0, 0, 1], num_groups=4, limit=2)
    with pytest.raises(ValueError, match="8 experts do not divide into 3 groups"):
        require_node_limit(layout, [0, 0, 1, 1], num_groups=3, limit=2)
    for limit in (0, 5):
        with pytest.raises(ValueError, match="choose topk_group from 1 to 4"):
            require_node_limit(layout, [0, 0, 1, 1], num_groups=4, limit=limit)
