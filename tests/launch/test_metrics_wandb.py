"""Weights & Biases: a fake of the package for what goes wrong, the real one offline."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.launch.metrics import MetricsWriter
from counterflow.launch.metrics_config import MetricsConfig
from counterflow.launch.metrics_wandb import WandbBoard, require_wandb

pytestmark = pytest.mark.alone

ON = MetricsConfig(tensorboard=False, wandb=True, wandb_project="moe")


class FakeRun:
    """A fake of wandb's Run."""

    def __init__(self, given: dict[str, Any], broken: bool) -> None:
        self.given = given
        self.axes: dict[str, str | None] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = False
        self.broken = broken

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        if self.broken:
            raise ConnectionError("the service has gone")
        self.logged.append(data)

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    """A fake of the package wandb: what this project calls of it, compared with it below."""

    def __init__(self, *, key: bool = True, network: bool = True, broken: bool = False) -> None:
        self.key, self.network, self.broken = key, network, broken
        self.ready = threading.Event()  # what init waits for
        self.ready.set()
        self.runs: list[FakeRun] = []

    def Settings(self, console: str, silent: bool, init_timeout: float) -> Any:  # noqa: N802
        return SimpleNamespace(console=console, silent=silent, init_timeout=init_timeout)

    def login(self, prompt: bool, verify: bool) -> bool:
        assert not prompt
        return self.key

    def init(
        self,
        project: str,
        name: str,
        id: str,  # noqa: A002
        resume: str,
        dir: str,  # noqa: A002
        config: dict[str, Any],
        settings: Any,
        mode: str | None = None,
    ) -> FakeRun:
        self.ready.wait(30)
        if mode == "online" and not self.network:
            raise ConnectionError("no such host")
        given = {k: v for k, v in locals().items() if k not in ("self", "settings")}
        self.runs.append(FakeRun(given, self.broken))
        return self.runs[-1]


OF_A_RUN = ((FakeRun, "define_metric"), (FakeRun, "log"), (FakeRun, "finish"))


@pytest.fixture(autouse=True)
def no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_the_fake_takes_what_wandb_takes() -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    for real, fake in (
        (wandb.init, FakeWandb.init),
        (wandb.login, FakeWandb.login),
        (wandb.Run.log, FakeRun.log),
        (wandb.Run.define_metric, FakeRun.define_metric),
        (wandb.Run.finish, FakeRun.finish),
    ):
        assert set(inspect.signature(fake).parameters) <= {
            "self",
            *inspect.signature(real).parameters,
        }
    wandb.Settings(console="off", silent=True, init_timeout=1.0)


def test_the_real_package_records_offline_without_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "runs" / "small"
    for resume_step in (None, 1):
        with MetricsWriter(folder, ON, resume_step=resume_step, run={"a": {"b": 1}}) as writer:
            writer.write("train", (resume_step or 0) + 1, loss=1.0)
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    recorded = list((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert recorded
    assert all(file.stat().st_size > 0 for file in recorded)


def fake(monkeypatch: pytest.MonkeyPatch, **answers: bool) -> FakeWandb:
    module = FakeWandb(**answers)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_numbers_go_to_a_run_with_the_optimizer_step_as_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    with MetricsWriter(tmp_path / "big", ON, run={"mesh": {"pp": 2}}) as writer:
        writer.write("train", 7, loss=1.5, mfu=None, load=[1, 2])
    (run,) = wandb.runs
    assert run.given["mode"] == "online"
    assert (run.given["project"], run.given["name"]) == ("moe", "big")
    assert run.given["config"] == {"mesh": {"pp": 2}}
    assert run.axes == {"step": None, "*": "step"}
    assert run.logged == [{"train/loss": 1.5, "step": 7}]
    assert run.finished


def test_a_resumed_run_goes_on_under_its_id_and_a_new_one_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    for resume_step in (None, 3, None):
        MetricsWriter(tmp_path, ON, resume_step=resume_step).close()
    first, second, third = (run.given["id"] for run in wandb.runs)
    assert first == second != third


@pytest.mark.parametrize("missing", ["key", "network"])
def test_without_credentials_or_network_it_is_recorded_offline(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = fake(monkeypatch, **{missing: False})
    MetricsWriter(tmp_path, ON).close()
    (run,) = wandb.runs
    assert run.given["mode"] == "offline"
    assert "recording offline" in caplog.text


def test_wandb_mode_decides_where_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch, key=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    MetricsWriter(tmp_path, ON).close()
    assert wandb.runs[0].given["mode"] is None


def test_what_breaks_is_said_once_and_the_lines_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake(monkeypatch, broken=True)
    with MetricsWriter(tmp_path, ON) as writer:
        for step in (1, 2, 3):
            writer.write("train", step, loss=1.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len(caplog.records) == 1
    assert "no more is sent to Weights & Biases after step 1" in caplog.text


def test_a_start_that_hangs_holds_nobody_up_and_is_given_up_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = fake(monkeypatch)
    wandb.ready.clear()
    began = time.monotonic()
    board = WandbBoard(tmp_path, "moe", {}, resumed=False, close_limit_s=0.2)
    for step in range(2000):  # more than wait
        board.write(step, {"train/loss": 1.0})
    assert time.monotonic() - began < 5
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases does not keep up: the numbers of step 1000 and more are not sent to it"
    ]
    board.close()
    assert time.monotonic() - began < 10
    assert len(caplog.records) == 2
    assert "did not take everything within 0.2 s" in caplog.text
    wandb.ready.set()  # it comes back: what waited is sent, in order
    deadline = time.monotonic() + 30
    while not (wandb.runs and wandb.runs[0].finished):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [line["step"] for line in wandb.runs[0].logged] == list(range(1000))


def test_all_calls_of_wandb_come_from_one_other_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = fake(monkeypatch)
    threads: set[int] = set()
    for owner, name in ((FakeWandb, "login"), (FakeWandb, "init"), *OF_A_RUN):
        real = getattr(owner, name)

        def noted(*given: Any, _real: Any = real, **named: Any) -> Any:
            threads.add(threading.get_ident())
            return _real(*given, **named)

        monkeypatch.setattr(owner, name, noted)
    with MetricsWriter(tmp_path, ON) as writer:
        writer.write("train", 1, loss=1.0)
    assert wandb.runs[0].finished
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_a_package_that_fails_at_its_start_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with MetricsWriter(tmp_path, ON) as writer:
        writer.write("train", 1, loss=1.0)
    assert "nothing is sent to Weights & Biases" in caplog.text


@pytest.mark.parametrize("module", [None, SimpleNamespace(__path__=["runs/small/wandb"])])
def test_a_missing_package_is_an_error_before_the_start(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch)
    require_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=r"metrics\.wandb is on.*pip install wandb, or set"):
        require_wandb()
