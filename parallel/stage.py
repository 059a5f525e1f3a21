"""The chunks of one stage: how they are made, and what comes out of them; no communication."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from .chunk import Chunk
from .deferred import defer_linears
from .live import LiveChunk
from .mesh import Mesh
from .overlap import Outline
from .phased import Layer, Run, Tensors, Wiring, inputs_read, whole, with_last
from .schedule import Op, Schedule, Step, actions

LossFn = Callable[..., Tensor]


class StageRunner:
    """One stage of this rank, and its live chunks.

    Args:
        stage: index of the stage.
        module: called as `module(*inputs)`, or `module(*inputs, chunk=Chunk)` if its forward has a
            parameter of that name.
        loss_fn: of the last stage, `loss_fn(*outputs, *targets)` (with `chunk=` likewise) -> 0-dim
            tensor; None elsewhere.
        split: micro-batches whose backward is split into I and W.
        cut: run the module, which tells its phases (see `Phased`), phase by phase.

    Attributes:
        cut: the stage is run phase by phase.
    """

    def __init__(
        self,
        stage: int,
        module: nn.Module,
        loss_fn: LossFn | None,
        split: frozenset[int],
        *,
        cut: bool = False,
    ) -> None:
        self.stage = stage
        self.module = module
        self.loss_fn = loss_fn
        self.cut = cut
        self._split = split
        self._takes_chunk = _takes_chunk(module.forward)
        self._loss_takes_chunk = loss_fn is not None and _takes_chunk(loss_fn)
        self._live: dict[int, LiveChunk] = {}

    @property
    def num_live(self) -> int:
        """Chunks whose forward has begun and whose backward (B, or I and W) has not ended."""
        return len(self._live)

    def outline(self) -> Outline:
        """The phases of this stage's chunks and their wiring.

        Raises:
            ValueError: the module tells phases that do not fit together.
        """
        layers = self._layers(Chunk(self.stage), 1)
        return layers, Wiring.of(layers, inputs_read(layers), self._name)

    def begin(
        self, microbatch: int, inputs: Tensors, targets: Tensors | None, *, training: bool
    ) -> LiveChunk:
        """A new chunk, none of whose phases has run.

        Args:
            inputs: the stage's inputs; those that require grad get a gradient.
            targets: the loss's targets on the last stage, else None.
            training: keep what the backward needs.
        """
        chunk = Chunk(self.stage, microbatch, training)
        layers = with_last(
            self._layers(chunk, len(inputs)),
            lambda run: self._ending(run, chunk, targets),
            self._name,
        )
        live = LiveChunk(chunk, layers, Wiring.of(layers, len(inputs), self._name), inputs)
        if training:
            self._live[microbatch] = live
        return live

    def computing(self, live: LiveChunk) -> AbstractContextManager[object]:
        """In which a chunk's forward phases compute."""
        chunk = live.chunk
        defer = chunk.training and chunk.microbatch in self._split and not self._takes_chunk
        return defer_linears(chunk.weight_grads) if defer else nullcontext()

    def outcome(self, live: LiveChunk) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
        """What a chunk's forward gave.

        Returns:
            The outputs, detached, with `requires_grad` telling which want a gradient (empty on the
            last stage), and the losses by name, detached ("main" is loss_fn's).

        Raises:
            ValueError: the stage added a loss called "main".
        """
        added = live.chunk.losses
        if sum(name == "main" for name, _ in added) > (self.loss_fn is not None):
            raise ValueError('add_loss("main", ...): that name is loss_fn\'s; choose another')
        losses: dict[str, Tensor] = {}
        for name, loss in added:
            loss = loss.detach()
            losses[name] = losses[name] + loss if name in losses else loss
        outputs, live.results = live.results, ()
        added.clear()
        return outputs, losses

    def live(self, microbatch: int) -> LiveChunk:
        """The chunk that this micro-batch's forward made."""
        return self._live[microbatch]

    def end_backward(self, microbatch: int) -> None:
        """Forget a chunk whose backward (B, or I and W) has ended."""
        del self._live[microbatch]

    def discard(self) -> None:
        """Forget all live chunks (after a step that failed)."""
        self._live.clear()

    @property
    def _name(self) -> str:
        return f"stage {self.stage} ({type(self.module).__name__})"

    def _layers(self, chunk: Chunk, num_inputs: int) -> Sequence[Layer]:
        if self.cut:
            return self.module.phases(chunk)  # pyright: ignore[reportCallIssue]

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            extra: dict[str, Any] = {"chunk": chunk} if self._takes_chunk else {}
            outputs = self.module(*inputs, **extra)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return whole(run, num_inputs)

    def _ending(self, run: Run, chunk: Chunk, targets: Tensors | None) -> Run:
        """What the last phase runs: it checks what comes out and, on the last stage, has a loss."""

        def checked(*inputs: Tensor) -> tuple[Tensor, ...]:
            outputs = self._checked(run(*inputs))
            if self.loss_fn is None:
                return outputs
            extra: dict[str, Any] = {"chunk": chunk} if self._loss_takes_chunk else {}
            loss = self.loss_fn(*outputs, *(targets or ()), **extra)
            chunk.losses.append(("main", self._checked_loss(loss)))
            return ()

        return checked

    def _checked(self, outputs: tuple[object, ...]) -> tuple[Tensor, ...]:
        for i, output in enumerate(outputs):
            where = f"output {i} of {self._name}"
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"{where} is a {type(output).__name__}; a stage returns a tensor or a tuple of "
                    "tensors"
                )
            # A reshaped whole is harmless (nn.Linear returns one for inputs of three dimensions); a
            # part would keep all of its base alive for as long as it is under way.
            if output._base is not None and output.numel() != output._base.numel():
                raise ValueError(
                    f"{where}, shape {list(output.shape)}, is a view of a tensor of another size, "
                    f"{list(output._base.shape)}, and would keep that alive while it is under way; "
                    "return output.clone()"
                )
        return outputs  # pyright: ignore[reportReturnType]

    def _checked_loss(self, loss: object) -> Tensor:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            what = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a 0-dim tensor, got {what}; return its mean()")
        return loss


def make_runners(
    modules: Mapping[int, nn.Module],
    row: Sequence[Step],
    num_stages: int,
    loss_fn: LossFn | None,
    cut: frozenset[int],
) -> dict[int, StageRunner]:
    """A runner of each of a rank's stages.

    Args:
        modules: by stage.
        row: of the rank; tells which backwards are split.
        num_stages: of the whole pipeline; the last one gets `loss_fn`.
        loss_fn: see `StageRunner`.
        cut: the stages that run phase by phase.
    """
    split = [a for step in row for a in actions(step) if a.op is Op.I]
    return {
        stage: StageRunner(
            stage,
            module,
            loss_fn if stage == num_stages - 1 else None,
            frozenset(action.microbatch for action in split if action.stage == stage),
            cut=stage in cut,
        )
        for stage, module in modules.items()
    }


def modules_by_stage(
    stages: Mapping[int, nn.Module] | Sequence[nn.Module], schedule: Schedule, mesh: Mesh
) -> dict[int, nn.Module]:
    """The modules of this rank's stages by their index, given so or in the placement's order.

    Raises:
        ValueError: they are not those of the stages that this rank holds.
    """
    if schedule.num_ranks != mesh.shape.pp:
        raise ValueError(
            f"schedule {schedule.name} is for {schedule.num_ranks} ranks, the mesh has "
            f"pp={mesh.shape.pp}"
        )
    held = schedule.placement.stages(mesh.pp_rank)
    if not isinstance(stages, Mapping):
        if len(stages) != len(held):
            raise ValueError(
                f"pipeline rank {mesh.pp_rank} holds stages {list(held)}, got {len(stages)} modules"
            )
        stages = dict(zip(held, stages, strict=True))
    if set(stages) != set(held):
        raise ValueError(
            f"pipeline rank {mesh.pp_rank} holds stages {list(held)}, got modules for "
            f"{sorted(stages)}"
        )
    return {stage: stages[stage] for stage in held}


def _takes_chunk(function: Callable[..., Any]) -> bool:
    try:
        return "chunk" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return False
