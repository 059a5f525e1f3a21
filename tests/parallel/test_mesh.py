"""The mesh: who is where, who shares a group with whom, and which shapes are impossible."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel import Mesh, MeshShape
from tests import cases_mesh as cases
from tests.ranks import RankPool

shapes = st.builds(
    lambda pp, ep, replicas: MeshShape(pp, ep * replicas, ep),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 6),
)


@given(shapes)
def test_coordinates_and_ranks_are_one_to_one(shape: MeshShape) -> None:
    places = [(shape.pp_rank(r), shape.dp_rank(r)) for r in range(shape.world_size)]
    assert places == [(p, d) for p in range(shape.pp) for d in range(shape.dp)]
    assert [shape.rank(*place) for place in places] == list(range(shape.world_size))


@given(shapes)
def test_the_groups_of_each_kind_partition_the_world(shape: MeshShape) -> None:
    sizes = {"pp": shape.pp, "dp": shape.dp, "ep": shape.ep, "edp": shape.dp // shape.ep}
    for kind, size in sizes.items():
        peers_of = getattr(shape, f"{kind}_peers")
        groups = {peers_of(r) for r in range(shape.world_size)}
        assert all(r in peers_of(r) and len(peers_of(r)) == size for r in range(shape.world_size))
        assert sorted(r for group in groups for r in group) == list(range(shape.world_size))


@given(shapes)
def test_groups_are_ordered_by_their_coordinate(shape: MeshShape) -> None:
    for r in range(shape.world_size):
        assert shape.pp_peers(r)[shape.pp_rank(r)] == r
        assert shape.dp_peers(r)[shape.dp_rank(r)] == r
        assert shape.ep_peers(r)[shape.ep_rank(r)] == r


@given(shapes)
def test_expert_groups_are_contiguous_and_cross_their_replicas_once(shape: MeshShape) -> None:
    for r in range(shape.world_size):
        ep, edp = shape.ep_peers(r), shape.edp_peers(r)
        assert ep == tuple(range(ep[0], ep[0] + shape.ep))
        assert set(ep) & set(edp) == {r}
        assert {p for e in ep for p in shape.edp_peers(e)} == set(shape.dp_peers(r))
        assert {shape.ep_rank(p) for p in edp} == {shape.ep_rank(r)}


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_fit_takes_every_shape_that_fits_and_no_other(world: int, pp: int, ep: int) -> None:
    if world % pp == 0 and (world // pp) % ep == 0:
        assert MeshShape.fit(world, pp=pp, ep=ep) == MeshShape(pp, world // pp, ep)
    else:
        with pytest.raises(ValueError, match=r"choose (pp|ep) from"):
            MeshShape.fit(world, pp=pp, ep=ep)


@pytest.mark.parametrize("name", ["pp", "dp", "ep"])
@pytest.mark.parametrize("size", [0, -1, 2.0, "2", True, None])
def test_a_size_that_is_no_count_is_refused(name: str, size: Any) -> None:
    with pytest.raises(ValueError, match=rf"mesh\.{name} must be a whole number from 1 up, got"):
        MeshShape(**{name: size})


def test_every_impossible_shape_is_refused_with_the_reason_and_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"ep=3 must divide mesh\.dp=4.*choose ep from \[1, 2, 4"):
        MeshShape(1, 4, 3)
    with pytest.raises(ValueError, match=r"ep=8 must divide mesh\.dp=4"):
        MeshShape(2, 4, 8)
    with pytest.raises(ValueError, match=r"pp=3 does not divide the 4 processes.*from \[1, 2, 4"):
        MeshShape.fit(4, pp=3)
    with pytest.raises(ValueError, match=r"mesh\.pp must be a whole number"):
        MeshShape.fit(4, pp=0)
    with pytest.raises(ValueError, match="the number of processes must be a whole number"):
        MeshShape.fit(0)
    with pytest.raises(ValueError, match=r"needs 8 processes, but 6 were started; start 8 or"):
        MeshShape(2, 4).require_world_size(6)
    with pytest.raises(ValueError, match=r"ep=4 does not divide the model's 6 routed experts"):
        MeshShape(1, 4, 4).require_experts(6)
    with pytest.raises(ValueError, match="the number of routed experts must be"):
        MeshShape(1, 4, 4).require_experts(0)
    for place in ((2, 0), (-1, 0), (0, 4), (0, -1)):
        with pytest.raises(ValueError, match="there is no rank at pp"):
            MeshShape(2, 4).rank(*place)
    for rank in (-1, 8):
        with pytest.raises(ValueError, match="outside the mesh of 8 processes"):
            Mesh(MeshShape(2, 4), rank)
    with pytest.raises(ValueError, match="node of 3 ranks, the mesh has 8"):
        Mesh(MeshShape(2, 4), 0, [0, 0, 1])


def test_without_torch_distributed_only_one_process_fits() -> None:
    mesh = Mesh.create(MeshShape())
    assert (mesh.rank, mesh.nodes, mesh.num_nodes) == (0, (0,), 1)
    assert mesh.pp_group is mesh.dp_group is mesh.ep_group is mesh.edp_group is None
    with pytest.raises(ValueError, match="needs 2 processes, but 1 were started"):
        Mesh.create(MeshShape(2))


def test_a_world_that_does_not_fit_is_refused_before_any_group_is_made(ranks: RankPool) -> None:
    for shape in ((2, 1, 1), (2, 4, 2), (1, 3, 1)):
        size = shape[0] * shape[1]
        for reason in ranks.run(cases.refused, world=4, shape=shape):
            assert f"needs {size} processes, but 4 were started" in reason
    for reason in ranks.run(cases.refused, world=4, shape=(2, 2, 1), nodes=[0, 1]):
        assert "node of 2 ranks, the mesh has 4" in reason


@pytest.mark.parametrize(
    "shape",
    [(4, 1, 1), (1, 4, 4), (2, 2, 1), (2, 2, 2), (1, 4, 2), (2, 4, 2), (2, 4, 4), (4, 2, 2)],
)
def test_groups_communicate_and_hold_their_peers_in_order(
    ranks: RankPool, shape: tuple[int, int, int]
) -> None:
    layout = MeshShape(*shape)
    for rank, heard in enumerate(ranks.run(cases.talk, world=layout.world_size, shape=shape)):
        expected = (layout.pp_rank(rank), layout.dp_rank(rank), layout.ep_rank(rank))
        assert heard["coordinates"] == expected
        for kind in cases.GROUPS:
            peers = getattr(layout, f"{kind}_peers")(rank)
            assert heard[kind] == (peers if len(peers) > 1 else None)


@pytest.mark.alone
def test_a_groups_collective_ends_after_the_meshs_limit(ranks: RankPool) -> None:
    assert "timed out" in ranks.run(cases.limit, world=2)[0].lower()


@pytest.mark.parametrize("by_group_rank", [True, False])
@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_the_node_of_every_rank_is_known_from_the_environment(
    ranks: RankPool, per_node: int, by_group_rank: bool
) -> None:
    found = ranks.run(
        cases.nodes_from_environment, world=4, per_node=per_node, by_group_rank=by_group_rank
    )
    nodes = tuple(r // per_node for r in range(4))
    assert found == [(nodes, nodes[r], 4 // per_node) for r in range(4)]


def test_nodes_that_are_given_win_over_the_environment(ranks: RankPool) -> None:
    assert ranks.run(cases.explicit_nodes, world=4) == [
        ((1, 1, 0, 0), node) for node in (1, 1, 0, 0)
    ]


def test_shapes_and_ungrouped_meshes_need_no_torch() -> None:
    code = (
        "import sys; from counterflow.parallel.mesh import Mesh, MeshShape;"
        "assert Mesh(MeshShape(2, 4, 2), 5, [0] * 4 + [1] * 4).node == 1;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_groups_of_few_blocks_tell_nccl_and_are_not_those_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in for NCCL, which this build of torch may lack."""

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace(max_ctas=None)

    asked: list[tuple[list[int], int | None]] = []

    def new_group(ranks: list[int], *, timeout: object, backend: str, pg_options: Any) -> object:
        assert backend == "cpu:gloo,cuda:nccl"
        asked.append((ranks, pg_options and pg_options.config.max_ctas))
        return object()

    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    mesh = Mesh(MeshShape(1, 4, 2))
    sets = [(0, 1), (2, 3)]
    free = mesh.group_among(sets, "dispatch")
    few = mesh.group_among(sets, "dispatch", most_blocks=20)
    fewer = mesh.group_among(sets, "dispatch", most_blocks=10)
    assert mesh.group_among(sets, "dispatch", most_blocks=20) is few
    assert len({id(group) for group in (free, few, fewer)}) == 3
    assert asked == [([a, a + 1], limit) for limit in (None, 20, 10) for a in (0, 2)]
