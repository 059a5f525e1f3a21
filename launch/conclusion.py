"""The end of a run: its result on file, its report, and a few lines on how it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .recording import profile_command


def conclude(folder: Path, result: dict[str, Any]) -> None:
    """Write the result and the report, and say in a few lines how the run went."""
    write_json(folder / "result.json", result)
    from .report import write_report

    report = write_report(folder)
    print(verdict(result["validation_loss"], result["unigram_entropy"]))
    print(
        f"{result['steps']} steps in {result['seconds']:.1f} s, "
        f"{result['tokens_per_second']:,.0f} tokens/s; report: {report}"
    )
    for name in result["traces"]:
        print(f"traces: {profile_command(folder / name)}")


def verdict(loss: float, entropy: float) -> str:
    """How a validation loss stands to the unigram entropy, both in nats per token."""
    side = "above" if loss > entropy else "under"
    return (
        f"validation loss {loss:.4f} nats a token, {abs(entropy - loss):.4f} {side} the unigram "
        f"entropy of the held-out text, {entropy:.4f}"
    )


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, which appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
