"""The time limit of a test that is tried twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tries
from tests.inner_pytest import conftest_of, run_pytest

pytest.importorskip("pytest_rerunfailures", reason="needs pytest-rerunfailures")
pytest.importorskip("pytest_timeout", reason="needs pytest-timeout")

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
    hooks = conftest_of(tries, pytest_runtest_setup="pytest_runtest_setup")
    (tmp_path / "conftest.py").write_text(hooks)
    (tmp_path / "test_it.py").write_text(TESTS)
    ran = run_pytest(tmp_path, "--timeout=1", "--reruns=1", timeout_s=50)
    assert "1 failed, 1 passed, 2 rerun" in ran.stdout, ran.stdout + ran.stderr
