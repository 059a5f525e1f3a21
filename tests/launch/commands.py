"""Runs a command of `counterflow` in this process, as tests of its output need it, or outside."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from counterflow.launch.cli import main


@dataclass(frozen=True)
class Command:
    """One command, such as "simulate".

    Attributes:
        name: of the command.
        one_line: each of its errors is one line; otherwise some show where in a schedule they are.
    """

    name: str
    one_line: bool = True

    def shown(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        """What it prints; it has to succeed, silently on stderr."""
        assert main([self.name, *arguments]) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    def printed(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
        """What it prints as JSON."""
        return json.loads(self.shown(capsys, *arguments, "--json"))

    def error_of(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        """Its error without the prefix; it has to fail as for a user's mistake."""
        assert main([self.name, *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("counterflow: error: ")
        assert captured.err.count("\n") == 1 or not self.one_line
        return captured.err.removeprefix("counterflow: error: ").rstrip()


def processor_seconds(arguments: Sequence[str], *, without: Sequence[str]) -> float:
    """Processor time of a process of its own that runs a command and imports none of `without`.

    What other processes do meanwhile does not count; by the clock it has a minute.
    """
    program = (
        "import sys; from counterflow.launch.cli import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit: pass\n"
        f"assert not {set(without)!r} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
