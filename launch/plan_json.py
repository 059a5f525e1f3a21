"""What `counterflow plan --json` prints: one object, units in the names of the keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, TypeAlias

from .plan_answer import Answer, Searched
from .plan_simulation import simulation

if TYPE_CHECKING:
    from ..predict.cluster import Cluster
    from ..predict.prediction import Prediction

Json: TypeAlias = dict[str, object]


def to_json(answer: Answer) -> Json:
    """The whole answer; "simulation" has what `counterflow simulate --json` has."""
    found = answer.prediction
    return {
        "model": answer.model,
        "model_config": asdict(found.model),
        "cluster": _cluster(found.cluster),
        "calibration": answer.calibration,
        "layout_from": answer.given,
        "layout": asdict(answer.layout),
        "world_size": found.layout.world_size,
        "tokens_per_step": found.layout.tokens_per_step,
        "step_ms": found.step_ms,
        "tokens_per_second": found.tokens_per_second,
        "gpu_hours_per_trillion_tokens": found.gpu_hours_per_trillion,
        "mfu": found.mfu,
        "limit": found.limit,
        "waterfall": [
            {"name": of.name, "ms": of.ms, "share": of.ms / found.step_ms, "why": of.why}
            for of in found.waterfall
        ],
        "ranks": [
            {**{f"{name}_ms": time for name, time in of._asdict().items()}, "step_ms": of.total}
            for of in found.ranks
        ],
        **_memory(answer, found),
        "notes": [of._asdict() for of in found.notes],
        "extrapolated": any(of.kind == "extrapolated" for of in found.notes),
        "search": None if answer.searched is None else _search(answer.searched),
        "simulation": simulation(found),
    }


def _memory(answer: Answer, found: Prediction) -> Json:
    return {
        "fits": found.fits,
        "gpu_memory_bytes": found.memory_bytes or None,
        "fullest_rank": answer.fullest,
        "memory": [
            {
                "total_bytes": of.total,
                "parts_bytes": dict(of.parts),
                "host_bytes": of.host,
            }
            for of in found.memory
        ],
        "saved_bytes": dict(answer.saved),
    }


def _cluster(cluster: Cluster) -> Json:
    gpu = cluster.gpu
    return {
        "name": cluster.name,
        "gpu": asdict(gpu),
        "gpus_per_node": cluster.gpus_per_node,
        "num_gpus": cluster.num_gpus or None,
        "sources": dict(cluster.sources or {}),
    }


def _search(searched: Searched) -> Json:
    return {
        "layouts": searched.layouts,
        "timed": searched.timed,
        "pruned": searched.pruned,
        "seconds": searched.seconds,
        "best": [
            {
                "layout": asdict(of.layout),
                "step_ms": of.step_ms,
                "gpu_hours_per_trillion_tokens": of.gpu_hours,
                "mfu": of.mfu,
                "memory_bytes": of.memory_bytes,
            }
            for of in searched.best
        ],
        "infeasible": [asdict(of) for of in searched.refused],
    }
