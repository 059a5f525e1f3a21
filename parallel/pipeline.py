"""Executes any verified schedule over torch.distributed.

A rank walks its row of the schedule. For each action it takes the chunk's input from the transport
(or from a neighbouring stage on the same rank), runs it, and starts the transfer of what it made;
the transport has posted the next receives already, so bytes move while the next action computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.collectives import sum_over
from ..comm.errors import CommError
from ..comm.marks import mark
from ..comm.messages import Message, Payload
from ..comm.p2p import Transport
from .batches import Data, microbatches
from .channels import channel_groups
from .live import LiveChunk
from .mesh import Mesh
from .overlap import Part, Plan, execute, in_turn
from .plans import Plans
from .replicas import Replicas, Ties
from .schedule import Action, Op, Pair, Schedule, Step, forward_only, verify
from .schedule.interleaving import DEFAULT_INTERLEAVING, Interleaving
from .stage import LossFn, make_runners, modules_by_stage
from .timeline import Span, Stopwatch
from .transfers import activation, gradient, receives
from .zero_ends import StageCalls

_BETWEEN = "between steps"


class PipelineError(CommError):
    """A wait within a step failed or took too long.

    Attributes:
        rank: global rank of this process.
        step: the training step under way or last run: the first call of `Pipeline.step` is 1.
        position: "action 1F3", or what the rank did outside its row.
        peers: global ranks that were waited for.
    """

    def __init__(
        self, rank: int, step: int, position: str, reason: str, peers: Sequence[int] = ()
    ) -> None:
        super().__init__(f"rank {rank}, step {step}, {position}: {reason}", peers=peers)
        self.rank = rank
        self.step = step
        self.position = position
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:  # so that it can be sent to another process
        return type(self), (self.rank, self.step, self.position, self.reason, self.peers)


@dataclass
class StepReport:
    """What the last step did on this rank.

    Attributes:
        losses: every loss by name, mean over micro-batches, the same on all ranks of the pipeline.
        peak_chunks: most chunks that were live at once on this rank: their forward begun, and their
            backward (B, or both I and W) not ended.
    """

    losses: dict[str, float] = field(default_factory=dict)
    peak_chunks: int = 0
    stopwatch: Stopwatch | None = None

    def spans(self) -> list[Span]:
        """When each step of this rank's row ran, in order."""
        return self.stopwatch.spans() if self.stopwatch else []


class Pipeline:
    """This rank's part of a pipeline.

    Args:
        stages: the modules of this rank's stages, by stage index or in the order of
            `schedule.placement.stages(mesh.pp_rank)`. Each is called with its inputs and, if its
            forward has a parameter `chunk`, with that (see `Chunk`); it returns a tensor or a tuple
            of tensors, which the next stage receives as arguments. Any shapes and dtypes; they may
            change from stage to stage and from step to step.
        schedule: verified here.
        mesh: this rank's place; `schedule` has mesh.shape.pp ranks.
        loss_fn: `loss_fn(output, ..., target, ...) -> 0-dim tensor`, needed where the last stage
            is; with a parameter `chunk` it gets that too.
        tied: sets of (stage, parameter name) that are one parameter; its gradients are summed over
            all ranks that hold it.
        loss_names: names of the auxiliary losses that stages add with `chunk.add_loss`.
        timeout_s: limit of every wait, seconds.
        lookahead: messages received ahead of their use from each peer; the same on all ranks.
        device: where stages compute and messages live; None for that of the stages' tensors.
        separate_channels: give each channel process groups of its own; None for where tensors are
            on CUDA, which needs them.
        overlap: in which order the phases of stages that tell theirs (see `Phased`) are issued, so
            that communication hides behind compute; None runs every stage in one piece. Numbers are
            the same to the last bit (but for dropout). A stage that has hooks or was compiled runs
            in one piece too, with a warning: that is looked at here and not again (see `Plans`).

    Every rank of the world makes its Pipeline at the same time: process groups are made, and
    replicas compared.

    Raises:
        ValueError: the schedule is wrong (ScheduleError), does not fit the mesh or the stages,
            ranks of the world were given different values of `overlap`, or replicas begin with
            different values.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module] | Sequence[nn.Module],
        schedule: Schedule,
        mesh: Mesh,
        loss_fn: LossFn | None = None,
        *,
        tied: Ties = (),
        loss_names: Sequence[str] = (),
        timeout_s: float = 300.0,
        lookahead: int = 2,
        device: torch.device | None = None,
        separate_channels: bool | None = None,
        overlap: Interleaving | None = DEFAULT_INTERLEAVING,
    ) -> None:
        verify(schedule)
        self.mesh = mesh
        self.modules = modules_by_stage(stages, schedule, mesh)
        self.loss_names = _distinct(("main", *loss_names))
        self.report = self._last_step = StepReport()
        self.step_number = 0
        self.position = _BETWEEN
        self._last = schedule.num_stages - 1
        if self._last in self.modules and loss_fn is None:
            raise ValueError(f"this rank holds the last stage, {self._last}: loss_fn is needed")
        self._loss_fn = loss_fn
        self._device = device or _device_of(self.modules.values())
        self._plans = Plans(self.modules, schedule.num_stages, mesh, overlap, self._device)
        self._set_schedule(schedule)
        if separate_channels is None:
            separate_channels = self._device.type == "cuda"
        groups = channel_groups(
            schedule, mesh, separate=separate_channels, device=self._device, timeout_s=timeout_s
        )
        self.replicas = Replicas(self.modules, schedule.placement, mesh, tied, timeout_s=timeout_s)
        self._transport = Transport(
            mesh.rank,
            groups,
            self._device,
            timeout_s=timeout_s,
            lookahead=lookahead,
            board=mesh.waits,
        )
        self._failed = ""
        self._arrived_locally: dict[Message, Payload] = {}

    def use(self, schedule: Schedule) -> None:
        """Run another schedule from now on, such as one with more micro-batches.

        Raises:
            ValueError: the schedule is wrong, or it places stages in another way than the first.
        """
        if set(schedule.placement.routes) != set(self.schedule.placement.routes):
            raise ValueError(
                f"schedule {schedule.name} places stages along {schedule.placement.routes}, the "
                f"pipeline was made for {self.schedule.placement.routes}; make another Pipeline"
            )
        verify(schedule)
        self._set_schedule(schedule)

    def _set_schedule(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._forward_only = forward_only(schedule)
        peers = self.mesh.shape.pp_peers(self.mesh.rank)
        self._incoming = {
            plan.name: {
                peers[r]: ms
                for r, ms in receives(plan, self.mesh.pp_rank, self._plans.ended).items()
            }
            for plan in (schedule, self._forward_only)
        }
        rows = [plan.rows[self.mesh.pp_rank] for plan in (schedule, self._forward_only)]
        self._runners = make_runners(
            self.modules, rows[0], schedule.num_stages, self._loss_fn, self._plans.cut
        )
        self._plans.use(self._runners, (step for row in rows for step in row))

    def step(
        self,
        batch: Any = None,
        targets: Any = None,
        *,
        sum_replicas: bool = True,
        on_begin: Callable[[int], object] | None = None,
        on_end: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Forward and backward of one batch; gradients are added to the parameters' `.grad`.

        Args:
            batch: a tensor or a tuple of tensors, [N, ...] with N a multiple of the number of
                micro-batches, which are slices of it in order. Needed where stage 0 is.
            targets: likewise, for the loss; needed where the last stage is.
            sum_replicas: False leaves each holder of a replicated parameter with its own share; the
                caller then calls `replicas.sum()` before the update.
            on_begin: called with each stage of this rank before its first action, which reads
                parameters.
            on_end: called with each after its last action that adds to gradients. Both are called
                in the order of the row, so ranks of the same row may start collectives there.

        Returns:
            The loss, 0-dim float64, the same on every rank of the pipeline: the mean over
            micro-batches of loss_fn plus auxiliary losses. Gradients have the same scale and are
            summed over the holders of a replicated parameter.

        Raises:
            ValueError: the batch does not divide, a stage returned something unusable, or the
                schedule only runs forward. Gradients of earlier steps are kept.
            PipelineError: a peer is gone or a wait took longer than `timeout_s`.
        """
        if not self.schedule.has_backward:
            raise ValueError(f"schedule {self.schedule.name} only runs forward; call evaluate")
        data = self._data(batch, targets)
        self.step_number += 1
        # Replicas have summed the gradients of earlier steps already: only this step's are summed.
        replicated = self.replicas.parameters if sum_replicas else []
        earlier = [parameter.grad for parameter in replicated]
        for parameter in replicated:
            parameter.grad = None
        try:
            calls = StageCalls(self.schedule.rows[self.mesh.pp_rank], on_begin, on_end)
            losses = self._run(self.schedule, data, calls)
            self._last_step = self.report
            if sum_replicas:
                with self.at("sum of the gradients of replicas"):
                    self.replicas.sum()
            loss = self._finish(losses)
        except BaseException:
            for parameter, before in zip(replicated, earlier, strict=True):
                parameter.grad = before
            raise
        for parameter, before in zip(replicated, earlier, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return loss

    def last_step_spans(self) -> list[Span]:
        """When each step of this rank's row ran in the last training step, in order."""
        return self._last_step.spans()

    def evaluate(self, batch: Any = None, targets: Any = None) -> Tensor:
        """The loss of one batch, forward only and without gradients; as `step` otherwise.

        Modules are run as they are: call their `eval()` first where dropout or the like matters.
        """
        return self._finish(self._run(self._forward_only, self._data(batch, targets), None))

    def _run(self, schedule: Schedule, data: Data, calls: StageCalls | None) -> Tensor:
        """Walk this rank's row, forward only without `calls`.

        Returns:
            float64 losses [name, micro-batch], zero where not ours.
        """
        if self._failed:
            raise RuntimeError(
                "this Pipeline cannot go on, its messages are lost, and so are those of others on "
                f"the same mesh: start the processes again. It failed earlier: {self._failed}"
            )
        run = _Run(self, data, training=calls is not None)
        self.report = StepReport(stopwatch=run.stopwatch)
        try:
            with self.at("start"):
                self._transport.begin(self._incoming[schedule.name])
            for index, step in enumerate(schedule.rows[self.mesh.pp_rank]):
                with self.at(f"action {step}"):
                    if calls is not None:
                        calls.before(index)
                    run.stopwatch.begin_step(step)
                    with mark(str(step)):
                        run.run(step)
                    run.stopwatch.end_step()
                    if calls is not None:
                        calls.after(index)
            with self.at("end of the schedule"):
                self._transport.flush()
        except BaseException as error:
            self._failed = str(error) or type(error).__name__
            raise
        finally:
            self._arrived_locally.clear()
            for runner in self._runners.values():
                runner.discard()
        return run.losses

    def _finish(self, losses: Tensor) -> Tensor:
        with self.at("sum of the losses"):
            sum_over(losses, self.mesh.pp_group, "the losses", board=self.mesh.waits)
        means = losses.mean(1)
        self.report.losses = dict(zip(self.loss_names, means.tolist(), strict=True))
        return means.sum()

    def _data(self, batch: Any, targets: Any) -> Data:
        num, where = self.schedule.num_microbatches, f"rank {self.mesh.rank}"
        return Data(
            microbatches(batch, "batch", num, 0, self.modules, where),
            microbatches(targets, "targets", num, self._last, self.modules, where),
        )

    @contextmanager
    def at(self, position: str) -> Iterator[None]:
        """Within this context errors are told with the rank, the step and this position."""
        before, self.position = self.position, position
        rank = self.mesh.rank
        try:
            yield
        except PipelineError:
            raise
        except CommError as error:
            reason = str(error).removeprefix(f"rank {rank}: ")
            raise PipelineError(rank, self.step_number, position, reason, error.peers) from error
        except Exception as error:
            error.add_note(f"rank {rank}, step {self.step_number}, {position}")
            raise
        # After an error the position stays, for whoever tells of it.
        self.position = before


class _Run:
    """One walk over a row: executes actions for its Pipeline."""

    def __init__(self, pipeline: Pipeline, data: Data, *, training: bool) -> None:
        self._pipeline = pipeline
        self._placement = pipeline.schedule.placement
        self._rank = pipeline.mesh.pp_rank
        self._peers = pipeline.mesh.shape.pp_peers(pipeline.mesh.rank)
        self._inputs, self._targets = data
        self._training = training
        num = pipeline.schedule.num_microbatches
        self._loss_scale = 1.0 / num
        device = pipeline._device
        self.losses = torch.zeros(len(pipeline.loss_names), num, dtype=torch.float64, device=device)
        self.stopwatch = Stopwatch(device)

    def run(self, step: Step) -> None:
        """Execute one step of the row."""
        if isinstance(step, Pair):
            if (plan := self._pipeline._plans.of(step)) is not None:
                self._pair(plan, step)
            else:
                self.run(step.forward)
                self.run(step.backward)
        elif step.op is Op.W:
            self._weight(step)
        else:
            plan = self._pipeline._plans.of(step)
            assert plan is not None
            if step.op is Op.F:
                execute(plan, self._forward(step), None)
            else:
                execute(plan, None, self._backward(step))

    def _pair(self, plan: Plan, pair: Pair) -> None:
        forward, backward = self._forward(pair.forward), self._backward(pair.backward)
        if self._pipeline._plans.ended(pair)[0] is pair.forward:
            in_turn(forward, backward)
        else:
            in_turn(backward, forward)
        execute(plan, forward, backward)

    def _weight(self, action: Action) -> None:
        runner = self._pipeline._runners[action.stage]
        runner.live(action.microbatch).all_weights()
        runner.end_backward(action.microbatch)

    def _forward(self, action: Action) -> Part:
        pipeline, (stage, _, microbatch) = self._pipeline, action
        runner = pipeline._runners[stage]

        def begin() -> LiveChunk:
            if stage == 0:
                inputs: Payload = self._inputs[microbatch]
            else:
                inputs = self._take(stage - 1, activation(stage - 1, microbatch))
            targets = self._targets[microbatch] if stage == pipeline._last else ()
            live = runner.begin(microbatch, inputs, targets, training=self._training)
            num_live = sum(r.num_live for r in pipeline._runners.values())
            pipeline.report.peak_chunks = max(pipeline.report.peak_chunks, num_live)
            return live

        def end(live: LiveChunk) -> None:
            outputs, losses = runner.outcome(live)
            for name, value in losses.items():
                if name not in pipeline.loss_names:
                    raise ValueError(
                        f"stage {stage} added a loss named {name!r}; the Pipeline was made with "
                        f"loss_names={list(pipeline.loss_names[1:])}: add it there"
                    )
                self.losses[pipeline.loss_names.index(name), microbatch] += value
            if stage < pipeline._last:
                self._give(stage + 1, activation(stage, microbatch), outputs)

        return Part(begin, end, runner.computing)

    def _backward(self, action: Action) -> Part:
        pipeline, (stage, op, microbatch) = self._pipeline, action
        runner = pipeline._runners[stage]

        def begin() -> LiveChunk:
            live = runner.live(microbatch)
            if stage < pipeline._last:
                live.seed(self._take(stage + 1, gradient(stage, microbatch)))
            return live

        def end(live: LiveChunk) -> None:
            input_grads = live.input_grads()
            if op is Op.B:
                runner.end_backward(microbatch)
            if stage > 0:
                self._give(stage - 1, gradient(stage - 1, microbatch), input_grads)

        return Part(begin, end, loss_scale=self._loss_scale)

    def _take(self, from_stage: int, message: Message) -> Payload:
        source = self._placement.rank(from_stage, message.microbatch)
        if source == self._rank:
            return self._pipeline._arrived_locally.pop(message)
        self.stopwatch.begin_wait()
        with mark(f"wait {message}"):
            payload = self._pipeline._transport.receive(self._peers[source], message)
        self.stopwatch.end_wait()
        return payload

    def _give(self, to_stage: int, message: Message, payload: Payload) -> None:
        destination = self._placement.rank(to_stage, message.microbatch)
        if destination == self._rank:
            self._pipeline._arrived_locally[message] = payload
        else:
            self._pipeline._transport.send(self._peers[destination], message, payload)


def _device_of(modules: Iterable[nn.Module]) -> torch.device:
    tensors = (t for m in modules for t in (*m.parameters(), *m.buffers()))
    return next((t.device for t in tensors), torch.device("cpu"))


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(
            f'loss_names={list(names[1:])}: names must differ, and "main" is loss_fn\'s'
        )
    return names
