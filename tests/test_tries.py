"""The time limit of a test that is tried twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tries

pytest.importorskip("pytest_rerunfailures", reason="needs pytest-rerunfailures")
pytest.importorskip("pytest_timeout", reason="needs pytest-timeout")

CONFTEST = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("tries", {tries.__file__!r})
tries = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tries)
pytest_runtest_setup = tries.pytest_runtest_setup
"""
TESTS = """
import time
from pathlib import Path

def test_hangs():
    time.sleep(60)

def test_hangs_once():
    if not Path("hung").exists():
        Path("hung").touch()
        time.sleep(60)
"""


def test_a_test_that_hangs_is_ended_in_every_try(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--timeout=1", "--reruns=1", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert "1 failed, 1 passed, 2 rerun" in ran.stdout, ran.stdout + ran.stderr
