"""The training loop of one rank: data in, steps, evaluation, checkpoints, the report at the end."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..comm.collectives import gather, sum_over
from ..comm.errors import CommError
from ..comm.marks import mark
from ..fp8 import NonFiniteError
from ..model import num_parameters
from ..parallel.mesh import Mesh
from ..parallel.schedule import Schedule
from . import fp8
from .check import open_data, step_schedules
from .conclusion import conclude, write_json
from .config import Config
from .convert_weights import load_weights
from .data import Loader
from .engine import AT_EMA, Engine, StepResult
from .errors import SaveError, ToldError, alike_on_all, rank_0_first
from .experts import make_experts
from .folder import STOPPED_FILE
from .history import History
from .life.spikes import LossGuard, Verdict
from .life.status import DONE, STOPPED
from .life.stop import StopRequests
from .life.watchdog import Watchdog
from .ramps import bias_update_speed, learning_rate, microbatches, mtp_weight
from .recording import FOLDER, Recorder, profile_command
from .reporter import Reporter
from .results import write_results
from .saver import Saver, seed_generators
from .slurm.placement import Told, placement_lines, require_order, told_by
from .telemetry import Telemetry
from .torchrun import choose_device
from .world import Place, joined, waiting_to_join

# How a start of a run ends: at its last step, or where it was asked to stop, or before it began,
# because this launch has ended the run already.
End = Literal["ended", "stopped", "done before"]


def train(config: Config, folder: Path) -> int:
    """Train as one rank of a run that torchrun started; rank 0 writes the results to `folder`.

    Returns:
        The exit status: that of a run that is done, or of one that was asked to stop and has saved
        where it stood (under torchrun, which would start it again, as if done).

    Raises:
        ValueError: the configuration, the data, a checkpoint or a step's numbers are unusable.
        CommError: another rank is gone or did not answer in time.
        ToldError: the same, and rank 0 or another has said so for all.
        SaveError: the run was asked to stop, and could not save where it stood.
    """
    place, limit_s = Place.of(os.environ), config.run.timeout_s
    where = _Whereabouts(place.rank)
    section = config.checkpoint
    with StopRequests(where.line, graceful=section.enabled, grace_s=section.grace_s) as stop:
        device = _device(config, place)
        fp8.require_backend(config, device)
        # CPU tensors, such as headers of transfers, travel over gloo in either case.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        # A wait's own error knows more, so it comes before the watchdog's.
        limit_of_all_s = 1.1 * limit_s + 5
        with (
            joined(place, backend, timeout_s=limit_s),
            Watchdog(where.line, place, limit_s=limit_of_all_s) as watchdog,
        ):
            try:
                end = _train(config, folder, device, place, where, stop)
            except CommError as error:
                if watchdog.report(str(error), error.peers):
                    raise ToldError(str(error)) from error
                raise
    # torchrun would start a run that ended otherwise again; `torchrun.start` finds stopped.json.
    stopped = end == "stopped" and "TORCHELASTIC_RUN_ID" not in os.environ
    return STOPPED if stopped else DONE


def _train(
    config: Config,
    folder: Path,
    device: torch.device,
    place: Place,
    where: _Whereabouts,
    stop: StopRequests,
) -> End:
    """Train among ranks that have joined."""
    limit_s = config.run.timeout_s
    where.doing = "making the process groups"
    with waiting_to_join(place, limit_s):
        mesh = Mesh.create(config.mesh, timeout_s=limit_s)
        placement = gather(told_by(), mesh.world_group, "their places", board=mesh.waits)
    with alike_on_all(place.rank):
        require_order(placement)
    seed_generators(config.run.seed, place.rank)
    where.doing = "building the model"
    run = _Run(config, mesh, device, folder, stop)
    where.run = run
    if place.rank == 0 and isinstance(told := placement[0], Told):
        run.placement = placement_lines(config.mesh, told.nodes, told.switches)
    with run.engine.ema or nullcontext():
        try:
            end = run.all_steps()
        except NonFiniteError as error:  # names the layer
            position = run.engine.pipeline.position
            raise NonFiniteError(f"step {run.step}, {position}: {error}") from error
        if end == "ended":
            run.finish()
    run.close()
    return end


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

    def __init__(
        self, config: Config, mesh: Mesh, device: torch.device, folder: Path, stop: StopRequests
    ) -> None:
        self.config, self.mesh, self.device, self.folder = config, mesh, device, folder
        self.stop = stop
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
            layers=config.schedule.layers,
            overlap=config.overlap.interleaving,
            zero=config.zero.stage,
            zero_backend=config.zero.backend,
            timeout_s=config.run.timeout_s,
        )
        self.recorder = Recorder(config.profile, mesh, device, folder / FOLDER, self._wait_for_all)
        self.loader = self._loader(self.corpus.train)
        self.history = History()
        self.guard = LossGuard(config.guard)
        self.saver = Saver(config, folder, self.engine, self.loader, self.history, self.guard)
        self.telemetry = Telemetry(config, mesh, device)
        self.placement: list[str] = []  # of a job's ranks on its nodes, for a person
        self.step = 0  # under way or last run; the first is 1

    def where(self) -> str:
        """One line that says what this rank is doing."""
        position = f"rank {self.mesh.rank}, step {self.step}, {self.engine.pipeline.position}"
        return ", ".join(filter(None, (position, self.mesh.waits.now)))

    def all_steps(self) -> End:
        """Go on from where the run stands to its last step, or until it is asked to stop."""
        at = self.engine.pipeline.at("looking for a checkpoint")
        with alike_on_all(self.mesh.rank), at:
            decision = self.saver.begin()
        history, rank = self.history, self.mesh.rank
        if decision == "done":
            if rank == 0:
                print(f"{self.folder}: this run has ended already", flush=True)
            return "done before"
        if decision == "begin" and self.config.checkpoint.weights:
            weights = self.config.checkpoint.weights
            at = self.engine.pipeline.at("reading the weights to begin with")
            with rank_0_first(rank), at:
                load_weights(weights, self.engine)
        self.step = history.step
        goes_on = decision == "go on"
        with Reporter(
            self.config, self.folder, history, goes_on=goes_on, speaks=rank == 0
        ) as reporter:
            for line in (*self.placement, self._introduction()):
                reporter.note(line)
            if goes_on:
                reporter.event("resume", f"going on from the checkpoint of step {history.step}")
            try:
                return self._steps(reporter)
            finally:
                self.recorder.close()

    def _steps(self, reporter: Reporter) -> End:
        """The loop. What is due after a step comes in this order: save, stop, evaluate."""
        if self.history.step:  # the earlier start may have been ended before it evaluated
            self._evaluate(reporter)
        while self.history.step < self.config.train.steps:
            result = self._one_step(reporter)
            if result is None:  # rolled back, and the evaluation there with it
                self._evaluate(reporter)
                continue
            reporter.saved(self.saver.poll())
            if self.saver.is_due():
                reporter.sync()
                with self.engine.pipeline.at("saving a checkpoint"):
                    self.saver.save()
            if result.asked:
                self.stop.granted()
            if result.asked and self.history.step < self.config.train.steps:
                self._stop(reporter)
                return "stopped"
            self._evaluate(reporter)
        self._save_now(reporter, "after the last step")
        return "ended"

    def _save_now(self, reporter: Reporter, when: str) -> None:
        """See that the run as it stands is on disk.

        Raises:
            SaveError: it is not, and cannot be brought there.
        """
        reporter.sync()
        with self.engine.pipeline.at("saving the last checkpoint"):
            error = self.saver.save_now()
        reporter.saved(self.saver.poll())
        if error:
            with alike_on_all(self.mesh.rank):
                where = f"rank {self.mesh.rank}, step {self.step}"
                raise SaveError(f"{where}: {when}, not saved: {error}")

    def _one_step(self, reporter: Reporter) -> StepResult | None:
        """Run a step and tell of it; None where its loss led back to a checkpoint."""
        history, index = self.history, self.history.step
        self.step = step = index + 1
        self.recorder.before(step)
        with self.telemetry.step(), self.recorder.step(step):
            result, num_tokens, verdict = self._step(index)
        took = self.telemetry.seconds
        traces = self.recorder.after(step)
        if verdict.action == "rollback" and self._rolled_back(reporter, verdict):
            return None
        history.add(result, seconds=took, tokens=num_tokens)
        lr = learning_rate(index, self.config.train)
        values = self.telemetry.values(step, result, num_tokens)
        reporter.step(result, lr=lr, rate=num_tokens / took, values=values)
        if not result.updated:
            reporter.event("skip", f"{verdict.reason}: the batch was skipped")
        if traces is not None:
            reporter.note(f"step {step}: traces recorded: {profile_command(traces)}")
        return result

    def _rolled_back(self, reporter: Reporter, verdict: Verdict) -> bool:
        """Go back to the newest checkpoint; False where there is none."""
        failed = self.step
        at = self.engine.pipeline.at("going back to a checkpoint")
        with alike_on_all(self.mesh.rank), at:
            step = self.saver.roll_back()
        if step is None:
            return False
        self.step = step
        text = f"step {failed}: {verdict.reason}: back to the checkpoint of step {step}"
        reporter.rolled_back(text, failed_step=failed)
        return True

    def _stop(self, reporter: Reporter) -> None:
        """Save and leave word; asked for by a signal to any rank.

        Raises:
            SaveError: what this start has trained could not be saved.
        """
        self._save_now(reporter, "asked to stop")
        name = self.stop.signal.name if self.stop.signal else "another rank's signal"
        step = self.history.step
        if self.mesh.rank == 0:
            write_json(self.folder / STOPPED_FILE, {"signal": name, "step": step})
        reporter.event("stop", "asked to stop, and saved; start the run again and it goes on")

    def finish(self) -> None:
        """Gather what the report needs and write it."""
        result = write_results(
            self.config,
            self.folder,
            engine=self.engine,
            history=self.history,
            corpus=self.corpus,
            schedule=self.full,
            traces=[str(path.relative_to(self.folder)) for path in self.recorder.folders],
            device=self.device,
        )
        if result is not None:
            conclude(self.folder, result)

    def close(self) -> None:
        """Wait for what goes on beside the training."""
        self.saver.close()
        self.engine.experts.close()

    def _step(self, index: int) -> tuple[StepResult, int, Verdict]:
        """The optimizer step at `index`, the first is 0; its result, the global batch's tokens, and
        what the guard said of it."""
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
        verdicts: list[Verdict] = []

        def judge(loss: float, norm: float) -> bool:
            verdict = self.guard.judge(index + 1, loss, norm)
            if verdict.action == "stop":
                with alike_on_all(self.mesh.rank):
                    raise ValueError(verdict.reason)
            verdicts.append(verdict)
            return verdict.action == "update"

        result = self.engine.step(
            inputs,
            targets,
            lr=learning_rate(index, train),
            max_norm=train.grad_clip,
            mtp_weight=mtp_weight(index, train),
            bias_update_speed=bias_update_speed(index, train),
            judge=judge,
            asked=self.stop.asked,
        )
        return result, inputs.numel() * self.mesh.shape.dp, verdicts[0]

    def _wait_for_all(self, what: str) -> None:
        self._wait_for(what, self.mesh.world_group)

    def _wait_for(self, what: str, group: Any) -> None:
        with self.engine.pipeline.at("start together"):
            here = torch.zeros(1, device=self.device)
            sum_over(here, group, what, board=self.mesh.waits)
            here.item()

    def _evaluate(self, reporter: Reporter) -> None:
        """Evaluate where that is due after the step that has ended."""
        train, step = self.config.train, self.history.step
        last = step == train.steps
        if not last and not (train.eval_every and step % train.eval_every == 0):
            return
        self.history.validation_loss = self._validation_loss()
        if last and self.engine.ema is not None:
            with self.engine.pipeline.at(AT_EMA):
                self.engine.ema.wait()
            with self.engine.ema.swapped():
                self.history.ema_validation_loss = self._validation_loss()
        reporter.validation()

    def _validation_loss(self) -> float:
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
