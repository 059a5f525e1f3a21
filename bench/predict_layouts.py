"""What small runs there are to be predicted: models, layouts, networks, calibrations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from counterflow.model import ModelConfig
from counterflow.predict.layout import Layout

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=192,
    intermediate_size=512,
    moe_intermediate_size=192,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=6,
    q_lora_rank=96,
    kv_lora_rank=48,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    routed_scaling_factor=1.0,
    max_position_embeddings=256,
    num_nextn_predict_layers=0,
)
WITH_MTP = replace(MODEL, num_nextn_predict_layers=1)


def layout(**given: Any) -> Layout:
    """A layout of small runs on CPUs; what is not given is as of most of them."""
    usual: dict[str, Any] = {
        "schedule": "1f1b",
        "microbatches": 8,
        "sequences": 2,
        "length": 128,
        "dtype": "float32",
        "fp8": False,
        "dispatcher": "dedup" if given.get("ep", 1) > 1 else "flat",
        "payload": "exact",
        "comm_sms": None,
        "recompute_norms": False,
        "recompute_up_projections": False,
        "moments": "float32",
        "zero": 0,
    }
    return Layout(**(usual | given))


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: of it.
        layout: that it has.
        calibration: name of the one that it is predicted from.
        model: that it trains.
    """

    name: str
    layout: Layout
    calibration: str
    model: ModelConfig = MODEL


@dataclass(frozen=True)
class Group:
    """Runs that share ranks and a network.

    Attributes:
        name: of it.
        world: ranks.
        calibrations: what is timed, by name: the expert-parallel ranks, micro-batch and model of a
            layout.
        runs: what is predicted.
        link_mbit: of each of two hosts; None: no hosts.
    """

    name: str
    world: int
    calibrations: Mapping[str, tuple[Layout, ModelConfig]]
    runs: tuple[Run, ...]
    link_mbit: float | None = None


def groups() -> list[Group]:
    """All that is run."""
    one, two = layout(), layout(dp=2, ep=2)
    here = Group(
        "one host",
        2,
        {"ep1": (one, WITH_MTP), "ep2": (two, MODEL)},
        (
            Run("pp2 1f1b", layout(pp=2), "ep1"),
            Run("pp2 1f1b, multi-token prediction", layout(pp=2), "ep1", WITH_MTP),
            Run("pp2 1f1b, whole stages", layout(pp=2, overlap=False), "ep1"),
            Run("pp2 1f1b, 4 sequences", layout(pp=2, sequences=4, microbatches=4), "ep1"),
            Run("pp2 zb-h1", layout(pp=2, schedule="zb-h1"), "ep1"),
            Run("pp2 dualpipe", layout(pp=2, schedule="dualpipe"), "ep1"),
            Run("pp2 dualpipev", layout(pp=2, schedule="dualpipev"), "ep1"),
            Run("pp2 zbv", layout(pp=2, schedule="zbv"), "ep1"),
            Run("pp2 gpipe", layout(pp=2, schedule="gpipe", microbatches=4), "ep1"),
            Run("dp2 1f1b", layout(dp=2, microbatches=4), "ep1"),
            Run("dp2 1f1b, ZeRO-1", layout(dp=2, microbatches=4, zero=1), "ep1"),
            Run("dp2 ep2 1f1b", layout(dp=2, ep=2, microbatches=4), "ep2"),
            Run(
                "dp2 ep2 dualpipev",
                layout(dp=2, ep=2, schedule="dualpipev", microbatches=6),
                "ep2",
            ),
        ),
    )
    shaped = layout(dp=2, ep=2, schedule="dualpipev", microbatches=6)
    hosts = Group(
        "two hosts, a link of 200 Mbit/s",
        2,
        {"ep1": (one, MODEL), "ep2": (two, MODEL)},
        (
            Run("dp2 ep2 dualpipev", shaped, "ep2"),
            Run("dp2 ep2 dualpipev, no overlap", replace(shaped, overlap=False), "ep2"),
            Run("dp2 ep2 dualpipev, 128 tokens", replace(shaped, sequences=1), "ep2"),
            Run("dp2 ep2 1f1b", layout(dp=2, ep=2, microbatches=4), "ep2"),
            Run("pp2 1f1b", layout(pp=2), "ep1"),
            Run("pp2 dualpipe", layout(pp=2, schedule="dualpipe"), "ep1"),
        ),
        link_mbit=200.0,
    )
    across = layout(pp=2, dp=2, ep=2, schedule="dualpipev", microbatches=6)
    four = Group(
        "two hosts of two ranks, a link of 200 Mbit/s",
        4,
        {"ep2": (layout(dp=4, ep=2), MODEL)},
        (
            Run("pp2 dp2 ep2 dualpipev", across, "ep2"),
            Run("pp2 dp2 ep2 dualpipev, no overlap", replace(across, overlap=False), "ep2"),
            Run("pp2 dp2 ep2 1f1b", replace(across, schedule="1f1b"), "ep2"),
        ),
        link_mbit=200.0,
    )
    return [here, hosts, four]
