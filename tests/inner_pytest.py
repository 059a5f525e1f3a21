"""pytest run within a test, on tests written for it, with one file of ours as its conftest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType


def conftest_of(module: ModuleType, **hooks: str) -> str:
    """A conftest whose hooks are functions of the very file of `module`, by their names there."""
    lines = [
        "import importlib.util",
        f"spec = importlib.util.spec_from_file_location('ours', {module.__file__!r})",
        "ours = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(ours)",
        *(f"{hook} = ours.{function}" for hook, function in hooks.items()),
    ]
    return "\n".join(lines) + "\n"


def run_pytest(folder: Path, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run it there, without the options of the pytest that runs this."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
