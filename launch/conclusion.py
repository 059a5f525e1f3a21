"""The end of a run: its report, its result on file, and a few lines on how it went."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from .folder import RESULT
from .plain import finite
from .recording import profile_command

_log = logging.getLogger(__name__)


def conclude(folder: Path, result: dict[str, Any]) -> None:
    """Write the report and the result, and say in a few lines how the run went.

    The result comes last, since a run that has one is finished: where this process is lost before,
    the run is finished when it is started again.
    """
    from .report import write_report

    report = f"report: {folder / 'report.html'}"
    try:
        write_report(folder, finite(result))
    except Exception as error:  # pictures, and a disk, fail in many ways; the training is done
        _log.warning("%s: no report: %s: %s", folder, type(error).__name__, error)
        report = "no report, which counterflow report writes again"
    write_json(folder / RESULT, result)
    print(verdict(result["validation_loss"], result["unigram_entropy"]))
    print(
        f"{result['steps']} steps in {result['seconds']:.1f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s; {report}"
    )
    for name in result["traces"]:
        print(f"traces: {profile_command(folder / name)}")


def verdict(loss: float, entropy: float) -> str:
    """How a validation loss stands to the unigram entropy, both in nats per token."""
    if not math.isfinite(loss):
        return f"validation loss {loss}: the model has diverged"
    side = "above" if loss > entropy else "under"
    return (
        f"validation loss {loss:.4f} nats a token, {abs(entropy - loss):.4f} {side} the unigram "
        f"entropy of the held-out text, {entropy:.4f}"
    )


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, which appears whole or not at all; null for what is not finite."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(finite(value), indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
