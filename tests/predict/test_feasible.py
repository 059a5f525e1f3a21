"""A layout that cannot be is told apart by its constraint, with how much and what to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from counterflow.comm.dispatch.deep_ep_versions import Elastic, Legacy
from counterflow.model import ModelConfig
from counterflow.predict import feasible
from counterflow.predict.cluster import Cluster, load_cluster
from counterflow.predict.feasible import KEYS, why_not, why_not_shape
from counterflow.predict.layout import Layout

V3 = ModelConfig()
PUBLISHED = Layout(pp=16, dp=128, ep=64, microbatches=120)


def h800(num_gpus: int = 2048, memory_bytes: int = 0) -> Cluster:
    cluster = load_cluster("h800")
    gpu = replace(cluster.gpu, memory_bytes=memory_bytes)
    return replace(cluster, num_gpus=num_gpus, gpu=gpu)


def test_the_published_layout_can_be_placed() -> None:
    assert why_not(V3, h800(), PUBLISHED) is None


def test_this_trainer_needs_more_memory_for_the_published_layout_than_an_h800_has() -> None:
    # The published run did fit. This trainer keeps float32 parameters whole on every rank, beside
    # both FP8 forms of each weight (docs/predict.md).
    reason = why_not(V3, load_cluster("h800"), PUBLISHED)
    assert reason is not None
    assert reason.key == "memory"
    assert 8 * 2**30 < reason.over < 12 * 2**30
    assert f"{reason.over / 2**30:.1f} GiB more than the 79.1" in reason.what
    assert why_not(V3, load_cluster("h200"), PUBLISHED) is None


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"sequences": 0}, "mesh", "sequences=0"),
        ({"ep": 48}, "mesh", "must divide mesh.dp=128"),
        ({"pp": 32}, "gpus", "2048 more than the 2048 GPUs"),
        ({"dp": 1, "ep": 1, "pp": 15}, "gpus", "1 of a node's 8 GPUs unused"),
        ({"dp": 96, "ep": 96}, "experts", "256 routed experts"),
        ({"length": 8192}, "length", "4096 longer"),
        ({"length": 1}, "length", "nothing to predict"),
        ({"dtype": "float64"}, "formats", "float64"),
        ({"ep": 1}, "dispatch", "ep=1"),
        ({"payload": "logfmt8"}, "dispatch", "logfmt8"),
        ({"payload": "exact", "dtype": "float32"}, "dispatch", "float32"),
        ({"ep": 128}, "nodes", "at most|more than 4 of the 16 nodes"),
        ({"comm_sms": 132}, "sms", "take 1 to 131"),
        ({"microbatches": 121}, "schedule", "odd"),
        ({"schedule": "dualpip"}, "schedule", "did you mean"),
        ({"schedule": "zbv", "pp": 32, "dp": 64}, "layers", "61 layers cannot make 64 stages"),
        ({"layers": (4,) * 16}, "layers", "64 layers in all"),
    ],
)
def test_what_cannot_be_is_told_by_its_constraint(
    change: dict[str, Any], key: str, words: str
) -> None:
    reason = why_not(V3, h800(), replace(PUBLISHED, **change))
    assert reason is not None
    assert reason.key == key
    assert reason.key in KEYS
    assert any(word in str(reason) for word in words.split("|"))
    assert reason.remedy


def test_memory_names_the_worst_rank_and_what_takes_most() -> None:
    gib = 1 << 30
    reason = why_not(V3, h800(memory_bytes=10 * gib), PUBLISHED)
    assert reason is not None
    assert reason.key == "memory"
    assert "pipeline rank" in reason.what
    assert "10.0 GiB of a H800" in reason.what
    assert why_not(V3, h800(memory_bytes=1000 * gib), PUBLISHED) is None


def test_states_alone_never_refuse_what_fits() -> None:
    """Where the mean of the states is too much, so is the worst rank of every schedule."""
    model = replace(V3, num_hidden_layers=8)
    for schedule in ("1f1b", "dualpipe", "zbv"):
        layout = Layout(pp=4, dp=64, ep=64, microbatches=8, schedule=schedule)
        for gib in (5, 10, 20, 40, 80, 160):
            cluster = h800(memory_bytes=gib << 30)
            if feasible.why_no_states(model, cluster, layout) is not None:
                assert feasible.why_no_memory(model, cluster, layout) is not None


def test_deep_eps_sizes_are_those_of_the_dispatcher() -> None:
    assert feasible.DEEP_EP_RANKS == Legacy.RANKS
    assert feasible.DEEP_EP_NODE == Legacy.NODE
    assert feasible.DEEP_EP_SLOTS == Elastic.MOST_SLOTS
    assert feasible.DEEP_EP_SLOTS_A_RANK == Elastic.MOST_SLOTS_A_RANK


def test_a_group_that_lies_unevenly_on_its_nodes_is_refused() -> None:
    model = replace(V3, n_routed_experts=12, n_group=1, topk_group=1)
    layout = Layout(pp=2, dp=24, ep=12, microbatches=4, dispatcher="flat")
    reason = why_not_shape(model, h800(), layout)
    assert reason is not None
    assert (reason.key, "unevenly" in reason.what) == ("nodes", True)
