"""The training loop of one rank: data in, steps, evaluation, metrics, and the report at the end."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from counterflow import __version__  # the root package is no room, so no relative import finds it

from ..comm.collectives import gather, sum_over
from ..comm.marks import mark
from ..fp8 import NonFiniteError
from ..model import num_active_parameters, num_parameters
from ..parallel.mesh import Mesh
from ..parallel.schedule import Schedule
from ..parallel.schedule.text_form import to_text
from . import fp8
from .check import open_data, step_schedules
from .conclusion import conclude, write_json
from .config import Config
from .data import Loader, unigram_entropy
from .engine import AT_EMA, Engine, StepResult
from .experts import make_experts
from .folder import RESULTS
from .metrics import MetricsWriter
from .progress import Progress
from .ramps import bias_update_speed, learning_rate, microbatches, mtp_weight
from .recording import FOLDER, Recorder, profile_command, remove_traces
from .torchrun import choose_device
from .watch import SignalWatch
from .world import Place, joined, waiting_to_join

_log = logging.getLogger(__name__)

# What a result says of the end of training is a mean over this many steps.
_LAST = 10


def train(config: Config, folder: Path) -> None:
    """Train as one rank of a run that torchrun started; rank 0 writes the results to `folder`.

    Raises:
        ValueError: the configuration, the data or a step's numbers are unusable.
        CommError: another rank is gone or did not answer in time.
    """
    place, limit_s = Place.of(os.environ), config.run.timeout_s
    where = _Whereabouts(place.rank)
    with SignalWatch(where.line):
        device = _device(config, place)
        fp8.require_backend(config, device)
        # CPU tensors, such as headers of transfers, travel over gloo in either case.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with joined(place, backend, timeout_s=limit_s):
            where.doing = "making the process groups"
            with waiting_to_join(place, limit_s):
                mesh = Mesh.create(config.mesh, timeout_s=limit_s)
            where.doing = "building the model"
            run = _Run(config, mesh, device, folder)
            where.run = run
            with run.engine.ema or nullcontext():
                try:
                    run.all_steps()
                except NonFiniteError as error:  # names the layer
                    position = run.engine.pipeline.position
                    raise NonFiniteError(f"step {run.step}, {position}: {error}") from error
                result = run.finish()
            run.engine.experts.close()
            if result is not None:
                conclude(folder, result)


class _Whereabouts:
    """What this rank is doing, for whoever ends it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.doing = "joining the other ranks"
        self.run: _Run | None = None

    def line(self) -> str:
        if self.run is not None:
            return self.run.where()
        return f"rank {self.rank}, before the first step, {self.doing}"


def _device(config: Config, place: Place) -> torch.device:
    """Where this rank computes."""
    if choose_device(config.run.device, place.local_world_size) == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank)
    torch.cuda.set_device(device)
    return device


class _Run:
    """A run under way on one rank."""

    def __init__(self, config: Config, mesh: Mesh, device: torch.device, folder: Path) -> None:
        self.config, self.mesh, self.device, self.folder = config, mesh, device, folder
        self.corpus = open_data(config)
        self.schedules = step_schedules(config)
        self.full: Schedule = self.schedules[config.schedule.microbatches]
        train_config = config.train
        self.engine = Engine(
            config.model,
            mesh,
            self.full,
            experts=make_experts(config, mesh),
            dtype=getattr(torch, train_config.dtype),
            device=device,
            recipe=fp8.make_recipe(config),
            recompute=fp8.make_recompute(config),
            betas=train_config.betas,
            eps=train_config.eps,
            weight_decay=train_config.weight_decay,
            moments=getattr(torch, config.moments),
            ema_decay=train_config.ema_decay,
            overlap=config.overlap.interleaving,
            timeout_s=config.run.timeout_s,
        )
        self.recorder = Recorder(config.profile, mesh, device, folder / FOLDER, self._wait_for_all)
        self.loader = self._loader(self.corpus.train)
        self.step = 0  # under way or last run; the first is 1
        self.seconds = 0.0  # in training steps, evaluation not counted
        self.tokens = 0
        self.recent: deque[StepResult] = deque(maxlen=_LAST)
        self.validation_loss = float("nan")
        self.ema_validation_loss: float | None = None  # of the averaged parameters, if there are

    def where(self) -> str:
        """One line that says what this rank is doing."""
        position = f"rank {self.mesh.rank}, step {self.step}, {self.engine.pipeline.position}"
        return ", ".join(filter(None, (position, self.mesh.waits.now)))

    def all_steps(self) -> None:
        train = self.config.train
        with ExitStack() as open_things:
            metrics = progress = None
            if self.mesh.rank == 0:
                for name in RESULTS:
                    (self.folder / name).unlink(missing_ok=True)
                remove_traces(self.folder / FOLDER)
                metrics = open_things.enter_context(MetricsWriter(self.folder))
                progress = Progress(train.steps, log_every=train.log_every)
                progress.note(self._introduction())
                open_things.enter_context(progress)
            open_things.callback(self.recorder.close)
            for index in range(train.steps):
                self.step = step = index + 1
                self.recorder.before(step)
                began = time.perf_counter()
                with self.recorder.step(step):
                    result, num_tokens = self._step(index)
                took = time.perf_counter() - began
                traces = self.recorder.after(step)
                self.seconds += took
                self.tokens += num_tokens
                self.recent.append(result)
                rate = num_tokens / took
                if metrics and progress:
                    lr = learning_rate(index, train)
                    self._write(metrics, step, result, lr, rate)
                    progress.update(
                        step,
                        loss=result.losses["main"],
                        lr=lr,
                        tokens_per_second=rate,
                        grad_norm=result.grad_norm,
                    )
                    if traces is not None:
                        progress.note(f"step {step}: traces recorded: {profile_command(traces)}")
                if step == train.steps or (train.eval_every and step % train.eval_every == 0):
                    self.validation_loss = self._validate()
                    if step == train.steps and self.engine.ema is not None:
                        with self.engine.pipeline.at(AT_EMA):
                            self.engine.ema.wait()
                        with self.engine.ema.swapped():
                            self.ema_validation_loss = self._validate()
                    if metrics and progress:
                        self._write_validation(metrics, progress, step)

    def finish(self) -> dict[str, Any] | None:
        """Gather what the report needs and write it; returns the result on rank 0."""
        self._write_timeline()
        dispatch = self._dispatch_totals()
        in_fp8 = fp8.totals(self.config, self.engine, self.device)
        if self.mesh.rank:
            return None
        config, train = self.config, self.config.train
        results = list(self.recent)
        loads: dict[str, NDArray[np.int64]] = {}
        for result in results:
            for name, load in result.loads.items():
                layer = name.split(".")[2]
                loads[layer] = loads.get(layer, np.zeros(len(load), np.int64)) + np.array(load)
        layers = {layer: load.tolist() for layer, load in loads.items()}
        write_json(self.folder / "load.json", {"layers": layers})
        return {
            "train_loss": float(np.mean([r.losses["main"] for r in results])),
            "validation_loss": self.validation_loss,
            **self._averaged("ema_validation_loss"),
            "unigram_entropy": unigram_entropy(self.corpus.validation),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
            "steps": train.steps,
            "world_size": self.mesh.shape.world_size,
            "mesh": {"pp": config.mesh.pp, "dp": config.mesh.dp, "ep": config.mesh.ep},
            "schedule": self.full.name,
            "microbatches": self.full.num_microbatches,
            "dispatch": dispatch,
            "tokens": self.tokens,
            "max_vio": float(np.mean([r.max_vio for r in results])),
            "parameters": num_parameters(config.model, mtp=True),
            "active_parameters": num_active_parameters(config.model),
            "data": self.corpus.name,
            "device": str(self.device.type),
            "dtype": train.dtype,
            "moments": config.moments,
            "fp8": in_fp8,
            "recompute": asdict(fp8.make_recompute(config)),
            "overlap": asdict(config.overlap),
            "traces": [str(path.relative_to(self.folder)) for path in self.recorder.folders],
            "counterflow": __version__,
            "torch": torch.__version__,
        }

    def _step(self, index: int) -> tuple[StepResult, int]:
        """One optimizer step, the first at index 0; its result and the global batch's tokens."""
        config, train = self.config, self.config.train
        multiple = len(self.full.placement.routes)
        count = microbatches(index, train, config.schedule, multiple)
        schedule = self.schedules[count]
        if schedule is not self.engine.pipeline.schedule:
            self.engine.pipeline.use(schedule)
        if index + 1 == train.steps:  # whose timeline is kept: let its clocks begin together
            self._wait_for("the ranks of the pipeline", self.mesh.pp_group)
        with mark("data"):
            inputs, targets = self._batch(self.loader, count)
        result = self.engine.step(
            inputs,
            targets,
            lr=learning_rate(index, train),
            max_norm=train.grad_clip,
            mtp_weight=mtp_weight(index, train),
            bias_update_speed=bias_update_speed(index, train),
        )
        return result, inputs.numel() * self.mesh.shape.dp

    def _wait_for_all(self, what: str) -> None:
        self._wait_for(what, _world())

    def _wait_for(self, what: str, group: dist.ProcessGroup | None) -> None:
        with self.engine.pipeline.at("start together"):
            here = torch.zeros(1, device=self.device)
            sum_over(here, group, what, board=self.mesh.waits)
            here.item()

    def _validate(self) -> float:
        """Mean loss on the same held-out sequences every time, whatever the batch-size ramp."""
        pipeline = self.engine.pipeline
        training = pipeline.schedule
        if training is not self.full:
            pipeline.use(self.full)
        loader = self._loader(self.corpus.validation)
        count = self.full.num_microbatches
        batches = [self._batch(loader, count) for _ in range(self.config.train.eval_batches)]
        losses = [self.engine.evaluate(*batch) for batch in batches]
        if training is not self.full:
            pipeline.use(training)
        return float(np.mean(losses))

    def _loader(self, stream: Any) -> Loader:
        config, mesh = self.config, self.mesh
        return Loader(
            stream,
            config.data.sequence_length,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.shape.dp,
            seed=config.run.seed,
        )

    def _batch(self, loader: Loader, count: int) -> tuple[Tensor, Tensor]:
        """This data-parallel rank's share of the next batch of `count` micro-batches a rank."""
        batch = count * self.config.train.sequences * self.mesh.shape.dp
        inputs, targets = loader.next(batch)
        return (
            torch.from_numpy(np.ascontiguousarray(inputs)).to(self.device),
            torch.from_numpy(np.ascontiguousarray(targets)).to(self.device),
        )

    def _introduction(self) -> str:
        config, shape, experts = self.config, self.mesh.shape, self.engine.experts
        nodes = f"{self.mesh.num_nodes} node{'s' if self.mesh.num_nodes > 1 else ''}"
        line = (
            f"{num_parameters(config.model, mtp=True):,} parameters, {self.corpus.name}; "
            f"pp {shape.pp} x dp {shape.dp} (ep {shape.ep}) on {nodes}, {self.device.type}; "
            f"{self.full.name}, {self.full.num_microbatches} micro-batches"
        )
        if shape.ep > 1:
            line = f"{line}; dispatch {experts.name}, {config.payload} rows ({experts.why})"
        return "; ".join(filter(None, (line, fp8.introduction(config, self.device))))

    def _write(
        self, metrics: MetricsWriter, step: int, result: StepResult, lr: float, rate: float
    ) -> None:
        metrics.write(
            "train",
            step,
            loss=result.loss,
            main_loss=result.losses["main"],
            mtp_loss=result.losses["mtp"],
            balance_loss=result.losses["balance"],
            lr=lr,
            grad_norm=result.grad_norm,
            tokens=self.tokens,
            tokens_per_second=rate,
            max_vio=result.max_vio,
        )

    def _write_validation(self, metrics: MetricsWriter, progress: Progress, step: int) -> None:
        averaged = self._averaged("ema_loss")
        metrics.write("validation", step, loss=self.validation_loss, **averaged)
        line = f"step {step}: validation {self.validation_loss:.4f} nats a token"
        for loss in averaged.values():
            line += f", {loss:.4f} of the averaged parameters"
        progress.note(line)

    def _averaged(self, key: str) -> dict[str, float]:
        """The averaged parameters' loss under `key`; nothing where it was not measured."""
        loss = self.ema_validation_loss
        return {} if loss is None else {key: loss}

    def _dispatch_totals(self) -> dict[str, Any]:
        """Which dispatcher ran, and what all ranks sent with it."""
        experts = self.engine.experts
        mine = (sum(map(sum, experts.sent_bytes.values())), experts.crossed_bytes)
        with self.engine.pipeline.at("adding up what was sent"):
            sent, crossed = zip(
                *gather(mine, _world(), "bytes sent", board=self.mesh.waits), strict=True
            )
        return {
            "backend": experts.name,
            "why": experts.why,
            "payload": self.config.payload,
            "sent_bytes": sum(sent),
            "crossed_bytes": sum(crossed),
        }

    def _write_timeline(self) -> None:
        """The last step as the ranks of the first pipeline ran it."""
        spans = self.engine.pipeline.last_step_spans()
        with self.engine.pipeline.at("gathering the timeline"):
            gathered = gather(spans, self.mesh.pp_group, "timelines", board=self.mesh.waits)
        if self.mesh.rank == 0:
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
            schedule = self.engine.pipeline.schedule
            timeline = {"name": schedule.name, "schedule": to_text(schedule), "ranks": rows}
            write_json(self.folder / "timeline.json", timeline)


def _world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None
