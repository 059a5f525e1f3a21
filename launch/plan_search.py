"""The search of `counterflow plan`: over what the options leave free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import TYPE_CHECKING, Any

from .plan_answer import Candidate, Refused, Searched
from .plan_options import Sized

if TYPE_CHECKING:
    from ..predict.space import Space
    from .plan_inputs import Inputs

_PAYLOADS = ("fp8", "bf16")  # tried for a dispatcher that is given
_ALIKE = ("deep_ep", "two_hop")  # dispatchers tried for a payload that is given
# Fields of a layout that a search takes as they are.
_GIVEN = ("dtype", "moments", "ema", "overlap", "layers")


def find_best(asked: Sized, inputs: Inputs, top: int, tell: Callable[[str], None]) -> Searched:
    """The `top` best layouts, and why others cannot run.

    Raises:
        ValueError: none can, or numbers that cannot be.
    """
    from ..predict.search import search

    found = search(
        inputs.model,
        inputs.cluster,
        inputs.calibration,
        gpus=asked.gpus,
        batch_sequences=asked.batch,
        length=asked.length,
        space=space_of(asked),
        routing=inputs.routing,
        keep=top,
        progress=lambda done, total: tell(f"{done:,} of {total:,} layouts"),
    )
    refused = tuple(
        Refused(key, count, f"{found.reasons[key].what}; {found.reasons[key].remedy}")
        for key, count in sorted(found.infeasible.items(), key=lambda item: -item[1])
    )
    if not found.best:
        why = ". ".join(f"{of.count:,} break {of.constraint}: {of.example}" for of in refused)
        raise ValueError(
            f"no layout of {asked.gpus:,} GPUs and {asked.batch:,} sequences can run. {why}"
        )
    best = tuple(
        Candidate(
            of.layout,
            of.step_ms,
            1e12 / of.tokens_per_second / 3600 * of.layout.world_size,
            of.mfu,
            of.memory_bytes,
        )
        for of in found.best
    )
    return Searched(
        best, found.num_layouts, found.num_evaluated, found.num_pruned, refused, found.seconds
    )


def space_of(asked: Sized) -> Space:
    """What is searched: all that the options do not fix.

    Raises:
        ValueError: micro-batches are given, but not over how many ranks.
    """
    from ..predict.layout import Layout
    from ..predict.space import Space

    fixed = asked.fixed
    space: dict[str, Any] = {}
    for name in ("pp", "ep", "sequences", "fp8", "zero", "stages_per_rank", "comm_sms"):
        if name in fixed:
            space[name] = (fixed[name],)
    if "dp" in fixed:
        space["pp"] = (asked.gpus // fixed["dp"],)
    if "microbatches" in fixed:
        if "pp" not in space:
            raise ValueError(
                "--microbatches needs --pp or --dp: over how many ranks a step's sequences go"
            )
        dp = asked.gpus // space["pp"][0]
        space["sequences"] = (_sequences(asked, dp, fixed["microbatches"]),)
    if "schedule" in fixed:
        space["schedules"] = (fixed["schedule"],)
    space |= _recompute(fixed) | _exchanges(fixed)
    return Space(base=Layout(**{name: fixed[name] for name in _GIVEN if name in fixed}), **space)


def _sequences(asked: Sized, dp: int, microbatches: int) -> int:
    each, rest = divmod(asked.batch, dp * microbatches)
    if rest or not each:
        raise ValueError(
            f"--batch {asked.batch} is no multiple of the {dp * microbatches} micro-batches that "
            f"{dp} data-parallel ranks have"
        )
    return each


def _recompute(fixed: Mapping[str, Any]) -> dict[str, Any]:
    names = ("recompute_norms", "recompute_up_projections")
    if not fixed.keys() & set(names):
        return {}
    choices = [(fixed[name],) if name in fixed else (True, False) for name in names]
    return {"recompute": tuple(product(*choices))}


def _exchanges(fixed: Mapping[str, Any]) -> dict[str, Any]:
    if not {"dispatcher", "payload"} & fixed.keys():
        return {}
    dispatchers = (fixed["dispatcher"],) if "dispatcher" in fixed else _ALIKE
    payloads = (fixed["payload"],) if "payload" in fixed else _PAYLOADS
    return {"exchanges": tuple(product(dispatchers, payloads))}
