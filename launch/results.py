"""What a run that has reached its last step leaves behind, gathered from all ranks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from counterflow import __version__  # the root package is no room, so no relative import finds it

from ..comm.collectives import gather
from ..model import num_active_parameters, num_parameters
from ..parallel.schedule import Schedule
from ..parallel.schedule.text_form import to_text
from . import fp8
from .conclusion import write_json
from .config import Config
from .data import Corpus, unigram_entropy
from .engine import Engine
from .history import History


def write_results(
    config: Config,
    folder: Path,
    *,
    engine: Engine,
    history: History,
    corpus: Corpus,
    schedule: Schedule,
    traces: list[str],
    device: torch.device,
) -> dict[str, Any] | None:
    """Gather what the report needs and write it; a collective. Returns the result on rank 0.

    Args:
        config, folder: of the run.
        engine, history, corpus: of the training.
        schedule: of a full step.
        traces: recorded ones, relative to `folder`.
        device: where ranks compute.
    """
    _write_timeline(engine, folder)
    dispatch = _dispatch_totals(engine, config)
    in_fp8 = fp8.totals(config, engine, device)
    if engine.mesh.rank:
        return None
    write_json(folder / "load.json", {"layers": history.loads()})
    shape, results = engine.mesh.shape, history.recent
    return {
        "train_loss": history.train_loss,
        "validation_loss": history.validation_loss,
        **history.averaged("ema_validation_loss"),
        "unigram_entropy": unigram_entropy(corpus.validation),
        "seconds": round(history.seconds, 3),
        "tokens_per_second": round(history.tokens / history.seconds, 1),
        "steps": config.train.steps,
        "world_size": shape.world_size,
        "mesh": {"pp": shape.pp, "dp": shape.dp, "ep": shape.ep},
        "schedule": schedule.name,
        "microbatches": schedule.num_microbatches,
        "dispatch": dispatch,
        "tokens": history.tokens,
        "max_vio": float(np.mean([r.max_vio for r in results])),
        "parameters": num_parameters(config.model, mtp=True),
        "active_parameters": num_active_parameters(config.model),
        "data": corpus.name,
        "device": str(device.type),
        "dtype": config.train.dtype,
        "moments": config.moments,
        "zero_stage": config.zero.stage,
        "fp8": in_fp8,
        "recompute": asdict(fp8.make_recompute(config)),
        "overlap": asdict(config.overlap),
        "resumed": history.resumed,
        "traces": traces,
        "counterflow": __version__,
        "torch": torch.__version__,
    }


def _dispatch_totals(engine: Engine, config: Config) -> dict[str, Any]:
    """Which dispatcher ran, and what all ranks sent with it since this start."""
    experts, mesh = engine.experts, engine.mesh
    mine = (sum(map(sum, experts.sent_bytes.values())), experts.crossed_bytes)
    with engine.pipeline.at("adding up what was sent"):
        told = gather(mine, mesh.world_group, "bytes sent", board=mesh.waits)
    sent, crossed = zip(*told, strict=True)
    return {
        "backend": experts.name,
        "why": experts.why,
        "payload": config.payload,
        "sent_bytes": sum(sent),
        "crossed_bytes": sum(crossed),
    }


def _write_timeline(engine: Engine, folder: Path) -> None:
    """The last step as the ranks of the first pipeline ran it."""
    mesh, schedule = engine.mesh, engine.pipeline.schedule
    spans = engine.pipeline.last_step_spans()
    with engine.pipeline.at("gathering the timeline"):
        gathered = gather(spans, mesh.pp_group, "timelines", board=mesh.waits)
    if mesh.rank or not any(gathered):  # a run may go on with no step left
        return
    rows = [
        [
            {
                "action": str(span.step),
                "start_ms": round(span.start_ms, 4),
                "end_ms": round(span.end_ms, 4),
                "waited_ms": round(span.waited_ms, 4),
            }
            for span in row
        ]
        for row in gathered
    ]
    timeline = {"name": schedule.name, "schedule": to_text(schedule), "ranks": rows}
    write_json(folder / "timeline.json", timeline)
