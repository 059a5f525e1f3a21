"""A site's own check of a node: a program whose exit status says whether the node is fit."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tempfile
from contextlib import suppress
from typing import IO

from .finding import Finding

CHECK = "command"
_TAIL_BYTES = 4096
_REASON = 300  # characters of a line that are shown


def command_findings(command: str, *, timeout_s: float, node: str) -> list[Finding]:
    """Run `command` without a shell; it is ended with all it started when the limit is over.

    Args:
        command: a program with its arguments, as in a shell; "" runs nothing.
        timeout_s: limit, seconds.
        node: this node's name.

    Returns:
        Nothing if it ends with 0. A program that cannot be started may be the job's mistake.
    """
    if not command:
        return []
    words = shlex.split(command)
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            message = f"{words[0]}: {error.strerror or error}; correct preflight.command"
            return [Finding(CHECK, "bad", message, node, kind="no program", configured=True)]
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            message = f"{words[0]} does not end within {timeout_s:g} s"
            return [Finding(CHECK, "bad", message, node, kind="refuses")]
        finally:
            # Also what it left behind in its session.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if not status:
            return []
        how = f"is ended by signal {-status}" if status < 0 else f"ends with exit status {status}"
        said = _last_line(output)
        message = f"{words[0]} {how}{f': {said}' if said else ''}"
        return [Finding(CHECK, "bad", message, node, kind="refuses")]


def _last_line(output: IO[bytes]) -> str:
    """The last line that holds something, without what would steer a terminal."""
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _TAIL_BYTES))
    text = output.read().decode(errors="replace")
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return "".join(c for c in found[-1] if c.isprintable())[:_REASON] if found else ""
