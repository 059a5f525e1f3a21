"""How many GPUs and sequences a step of a plan has: what is given has to fit, the rest follows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GPUS, BATCH = 2048, 15360  # DeepSeek-V3's (arXiv 2412.19437, sections 4.1 and 4.2)
# Sequences of a step for each of another number of GPUs: whole for every number of pipeline ranks.
SEQUENCES_A_GPU = 8


def known_gpus(given: int | None, fixed: Mapping[str, Any]) -> int | None:
    """GPUs that the options themselves tell, by number or by their mesh; None: they do not."""
    if given is not None:
        return given
    pp, dp = fixed.get("pp"), fixed.get("dp")
    return None if pp is None or dp is None else pp * dp


def check_mesh(gpus: int, fixed: Mapping[str, Any]) -> None:
    """Check what is given of pp, dp and ep.

    Raises:
        ValueError: it does not fit the number of GPUs.
    """
    pp, dp, ep = (fixed.get(name) for name in ("pp", "dp", "ep"))
    if pp is not None and dp is not None and pp * dp != gpus:
        raise ValueError(f"--pp {pp} x --dp {dp} are {pp * dp} GPUs, but --gpus is {gpus}")
    for flag, number in (("--pp", pp), ("--dp", dp)):
        if number is not None and gpus % number:
            raise ValueError(f"{flag} {number} does not divide --gpus {gpus}")
    copies = dp if dp is not None else gpus // pp if pp is not None else gpus
    if ep is not None and copies % ep:
        what = f"the {copies} data-parallel ranks" if copies != gpus else f"--gpus {gpus}"
        raise ValueError(f"--ep {ep} does not divide {what}")


def batch_of(given: int | None, gpus: int, fixed: Mapping[str, Any]) -> int:
    """Sequences of a step.

    Args:
        given: by the user; None: as many as the layout says, or V3's, or some for each GPU, rounded
            up to what the layout needs.
        gpus: how many.
        fixed: fields of the layout that are given.

    Raises:
        ValueError: what is given of dp, micro-batches and sequences does not fit.
    """
    pp, microbatches = fixed.get("pp"), fixed.get("microbatches")
    dp = fixed.get("dp", gpus // pp if pp else None)
    sequences = fixed.get("sequences")
    unit = (dp or 1) * (microbatches or 1) * (sequences or 1)
    if given is None:
        if microbatches and dp:
            return unit
        usual = BATCH if gpus == GPUS else SEQUENCES_A_GPU * gpus
        return -(-usual // unit) * unit
    if dp and microbatches and sequences and unit != given:
        raise ValueError(
            f"{dp} data-parallel ranks x --microbatches {microbatches} x --sequences {sequences} "
            f"are {unit} sequences, but --batch is {given}"
        )
    if given % unit:
        raise ValueError(f"--batch {given} is no multiple of {unit}, which the layout needs")
    return given
