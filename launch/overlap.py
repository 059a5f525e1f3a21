"""Whether the orders of a configuration suit the model's layers, told before any process starts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING

from ..model import ModelConfig, Part, partition
from ..parallel.schedule import Op, Pair, Schedule
from ..parallel.schedule.interleaving import DEFAULT_INTERLEAVING, Interleaving, InterleavingError
from .config import Config
from .settings import ConfigError

if TYPE_CHECKING:
    from ..parallel.overlap import Outline


def check_overlap(config: Config, schedules: Collection[Schedule]) -> None:
    """Raise unless every step of the schedules can be run in the order that is given for it.

    The published orders suit all models, so that only others cost the import of torch.

    Args:
        config: of the run.
        schedules: of its steps, all with the same stages.

    Raises:
        ConfigError: an order breaks a dependency, leaves a phase out or names one that is not; the
            message names the key, the phases and what to do.
    """
    interleaving = config.overlap.interleaving
    if interleaving is None or interleaving == DEFAULT_INTERLEAVING:
        return
    from ..parallel.overlap import Plan

    model = config.model
    num_stages = max(schedule.num_stages for schedule in schedules)
    parts = partition(model, num_stages, config.schedule.layers)
    # What a stage is made of decides, not which one it is.
    kinds = [_kind(model, part) for part in parts]
    outlines = {
        kind: _outline(model, part) for kind, part in dict(zip(kinds, parts, strict=True)).items()
    }
    _check_names(interleaving, outlines.values())
    # Those alone first: a pair of unequal chunks ends in their orders, which then are to blame.
    for key, forward, backward, weights in sorted(
        _steps(schedules, kinds), key=lambda step: step[0] == "pair"
    ):
        chunks = [None if kind is None else outlines[kind] for kind in (forward, backward)]
        try:
            Plan.of(interleaving, *chunks, weights=weights)
        except InterleavingError as error:
            reason = str(error).removeprefix("interleaving: ")
            raise ConfigError(f"overlap.{key}: {reason}") from None


_Kind = tuple[bool, tuple[bool, ...]]  # has the embedding; for each layer, has experts
_Step = tuple[str, _Kind | None, _Kind | None, bool]  # key, forward, backward, with weights


def _steps(schedules: Iterable[Schedule], kinds: list[_Kind]) -> list[_Step]:
    """The steps that differ in what they run, each once."""
    found: dict[_Step, None] = {}
    for step in (step for schedule in schedules for row in schedule.rows for step in row):
        if isinstance(step, Pair):
            forward, backward = kinds[step.forward.stage], kinds[step.backward.stage]
            found["pair", forward, backward, step.backward.op is Op.B] = None
        elif step.op is Op.F:
            found["forward", kinds[step.stage], None, True] = None
        elif step.op is not Op.W:
            found["backward", None, kinds[step.stage], step.op is Op.B] = None
    return list(found)


def _check_names(interleaving: Interleaving, outlines: Iterable[Outline]) -> None:
    """Raise if an order other than the default names a phase that no layer has."""
    layers = [layer for outline, _ in outlines for layer in outline]
    known = dict.fromkeys(phase.name for layer in layers for phase in layer.phases)
    for key in (field.name for field in fields(interleaving)):
        order = getattr(interleaving, key)
        if order == getattr(DEFAULT_INTERLEAVING, key):
            continue  # it names shared experts, which a model may lack
        unknown = next((name for name in order if name[:-3] not in known), None)
        if unknown is not None:
            raise ConfigError(
                f"overlap.{key}: no layer has a phase {unknown}; there are {', '.join(known)}"
            )


def _kind(model: ModelConfig, part: Part) -> _Kind:
    return part.embed, tuple(model.is_moe(index) for index in part.layers)


def _outline(model: ModelConfig, part: Part) -> Outline:
    """The phases of a part of the model and their wiring, without weights."""
    import torch

    from ..model import DeepSeekV3
    from ..parallel.chunk import Chunk
    from ..parallel.phased import Wiring, inputs_read

    layers = DeepSeekV3(model, part, device=torch.device("meta")).phases(Chunk())
    return layers, Wiring.of(layers, inputs_read(layers), "the model")
