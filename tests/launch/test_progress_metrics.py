"""What a run shows and what it writes down as it goes."""

import errno
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from counterflow.launch.engine import StepResult
from counterflow.launch.history import LAST, History
from counterflow.launch.metrics import MetricsWriter
from counterflow.launch.metrics_config import MetricsConfig
from counterflow.launch.progress import Progress

WITHOUT = MetricsConfig(tensorboard=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_through(stream: io.StringIO, steps: int, log_every: int) -> str:
    with Progress(steps, log_every=log_every, stream=stream) as progress:
        for step in range(1, steps + 1):
            progress.update(
                step, loss=5.0 - step / 10, lr=1e-3, tokens_per_second=12345.6, grad_norm=0.5
            )
        progress.note("validation loss [2.0]")
    return stream.getvalue()


def test_without_a_terminal_there_is_a_line_every_so_many_steps_and_for_first_and_last() -> None:
    lines = run_through(io.StringIO(), steps=25, log_every=10).splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[1].startswith(
        "step 10/25  loss 4.0000  lr 1.00e-03  grad norm 0.500  12,346 tokens/s"
    )
    assert "eta 0:00" in lines[-2]
    assert lines[-1] == "validation loss [2.0]"


def test_mfu_is_shown_where_it_is_known() -> None:
    stream = io.StringIO()
    with Progress(1, stream=stream) as progress:
        progress.update(1, loss=1.0, lr=1e-3, tokens_per_second=1e6, grad_norm=0.5, mfu=0.38937)
    assert "1,000,000 tokens/s  MFU 38.9%" in stream.getvalue()


def test_on_a_terminal_there_is_a_bar_and_notes_stay_whole() -> None:
    pytest.importorskip("rich")
    shown = run_through(Terminal(), steps=3, log_every=1)
    assert "3/3" in shown
    assert "loss 4.7000" in shown
    assert "validation loss [2.0]" in shown


def test_every_metrics_line_is_there_when_write_returns(tmp_path: Path) -> None:
    file = tmp_path / "run" / "metrics.jsonl"
    with MetricsWriter(tmp_path / "run") as writer:
        for step in range(3):
            writer.write("train", step, loss=1.5, load=[1, 2])
            assert len(file.read_text().splitlines()) == step + 1
    last = file.read_text().splitlines()[-1]
    assert json.loads(last) == {"kind": "train", "step": 2, "loss": 1.5, "load": [1, 2]}


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 0, loss=math.nan, grad_norm=math.inf, load=[1.0, -math.inf])

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {
        "kind": "train",
        "step": 0,
        "loss": None,
        "grad_norm": None,
        "load": [1.0, None],
    }


def test_a_new_run_begins_its_metrics_anew(tmp_path: Path) -> None:
    for _ in range(2):
        with MetricsWriter(tmp_path) as writer:
            writer.write("train", 0, loss=1.0)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    if (tmp_path / "tensorboard").exists():
        assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def steps(folder: Path) -> list[tuple[str, int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    """Killed in the middle of a line, and gone on from a checkpoint before it.

    That of step 4 was saved before step 4 was evaluated, so the evaluation is made again.
    """
    with MetricsWriter(tmp_path, WITHOUT) as writer:
        for step in range(1, 8):
            writer.write("train", step, loss=float(step))
            if step == 4:
                writer.write("validation", step, loss=0.5)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "train", "step": 8, "lo')
    with MetricsWriter(tmp_path, WITHOUT, resume_step=4) as writer:
        assert steps(tmp_path)[-1] == ("train", 4, 4.0)
        writer.write("validation", 4, loss=0.25)
        for step in range(5, 10):
            writer.write("train", step, loss=10.0 * step)
    train = [(step, loss) for kind, step, loss in steps(tmp_path) if kind == "train"]
    assert train == [(s, float(s)) for s in range(1, 5)] + [(s, 10.0 * s) for s in range(5, 10)]
    assert [line for line in steps(tmp_path) if line[0] == "validation"] == [
        ("validation", 4, 0.25)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "half",
    ['{"kind": "train", "step": 3, "loss": 3.0}', '{"kind": "tr', "\0\0\0", "[]\n", "3\n", ""],
)
def test_a_line_that_is_not_whole_is_dropped(half: str, tmp_path: Path) -> None:
    good = '{"kind": "train", "step": 2, "loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(good + half)
    with MetricsWriter(tmp_path, WITHOUT, resume_step=10) as writer:
        writer.write("train", 3, loss=4.0)
    assert steps(tmp_path) == [("train", 2, 2.0), ("train", 3, 4.0)]


def test_a_run_resumes_without_the_metrics_of_before(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new", WITHOUT, resume_step=10) as writer:
        writer.write("train", 11, loss=4.0)
    assert steps(tmp_path / "new") == [("train", 11, 4.0)]


def test_a_run_that_goes_back_forgets_what_came_after(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, WITHOUT) as writer:
        for step in range(1, 6):
            writer.write("train", step, loss=1.0)
            if step in (1, 2, 4):
                writer.write("validation", step, loss=1.0)
        writer.rewind(2)
        # Where the run goes back to, it is evaluated again.
        before = [("train", 1), ("validation", 1), ("train", 2)]
        assert [line[:2] for line in steps(tmp_path)] == before
        writer.write("rollback", 2, loss=0.0)
        writer.write("validation", 2, loss=2.0)
        writer.write("train", 3, loss=2.0)
        writer.rewind(2)
        assert steps(tmp_path)[3:] == [("rollback", 2, 0.0)]
        writer.write("validation", 2, loss=3.0)
        writer.write("rollback", 2, loss=4.0)
        writer.rewind(2)  # drops a line from between two that stay
    assert steps(tmp_path)[3:] == [("rollback", 2, 0.0), ("rollback", 2, 4.0)]


def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(name)
    for resume_step, last, loss in ((None, 6, 1.0), (4, 8, 2.0)):
        with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
            for step in range((resume_step or 0) + 1, last + 1):
                writer.write("train", step, loss=loss)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 9)]


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, WITHOUT) as writer:
        writer.write("train", 1, loss=1.0)
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_gets_the_numbers_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsWriter(tmp_path) as writer:
        writer.write("train", 0, loss=1.0, load=[1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"train/load" not in content


def test_metrics_are_written_where_tensorboard_is_broken(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['torch.utils.tensorboard'] = None\n"
        "from counterflow.launch.metrics import MetricsWriter\n"
        f"w = MetricsWriter({str(tmp_path)!r}); w.write('train', 0, loss=1.0); w.close()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] == 1.0
    assert not (tmp_path / "tensorboard").exists()


def history_with(*results: tuple[float, bool]) -> History:
    history = History()
    for loss, updated in results:
        losses = {"main": loss, "mtp": loss, "balance": 0.5}
        history.add(StepResult(losses, loss, {}, updated=updated), seconds=0.5, tokens=64)
    return history


def test_the_training_loss_is_a_mean_over_the_last_steps_that_led_to_an_update() -> None:
    assert history_with((3.0, True), (math.nan, False), (2.0, True)).train_loss == 2.5
    assert history_with((math.nan, False)).train_loss is None
    old = [(9.0, True)] * 3
    assert history_with(*old, *[(1.5, True)] * LAST).train_loss == 1.5


def test_a_history_with_nan_is_strict_json_and_comes_back_as_it_was() -> None:
    history = history_with((3.0, True), (math.nan, False))
    state = json.loads(json.dumps(history.state(), allow_nan=False))
    assert state["recent"][1]["losses"] == {"main": None, "mtp": None, "balance": 0.5}
    again = History()
    again.restore(state)
    assert math.isnan(again.validation_loss)
    assert math.isnan(again.recent[1].grad_norm)
    assert math.isnan(again.recent[1].loss)
    assert again.recent[0] == history.recent[0]
    assert (again.train_loss, again.state()) == (3.0, state)


class BrokenBoard:
    """What TensorBoard's writer does when its thread has met a full disk."""

    def __init__(self, *given: object, **named: object) -> None:
        self.asked = 0

    def add_scalar(self, *given: object) -> None:
        self.asked += 1
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tensorboard_that_fails_is_said_once_and_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    board = BrokenBoard()
    module = SimpleNamespace(SummaryWriter=lambda *given, **named: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write("train", step, loss=1.0)
        writer.rewind(2)
        writer.write("train", 3, loss=2.0)
    assert steps(tmp_path) == [("train", 1, 1.0), ("train", 2, 1.0), ("train", 3, 2.0)]
    assert board.asked == len(caplog.records) == 1
    assert "no more is written for TensorBoard after step 1" in caplog.text


# Steps that make more lines than the disk has room for, whose losses tell them apart.
FILL = """
import logging, sys
from counterflow.launch.metrics import MetricsWriter
from counterflow.launch.metrics_config import MetricsConfig

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
folder = sys.argv[1]
{before}
writer = MetricsWriter(folder, MetricsConfig(tensorboard=False))
for step in range(1, 101):
    writer.write("train", step, loss=float(step), more=[0.5] * 20)
    writer.sync()
    text = open(folder + "/metrics.jsonl").read()
    assert text.endswith("\\n") and text.count("\\n") <= step, step
assert text.count("\\n") < 100
writer.rewind(90)
writer.write("train", 91, loss=-1.0)
{after}
writer.write("train", 92, loss=-2.0)
writer.close()
"""


def fill(folder: Path, before: str, after: str) -> str:
    """Fill the disk and make room; what was logged."""
    program = FILL.format(before=before, after=after)
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


def require_whole_curve_and_one_warning(folder: Path, told: str) -> None:
    expected = [("train", s, float(s)) for s in range(1, 91)]
    assert steps(folder) == [*expected, ("train", 91, -1.0), ("train", 92, -2.0)]
    (warning,) = [line for line in told.splitlines() if line.startswith("WARNING")]
    assert f"{folder}/metrics.jsonl cannot be written: " in warning
    assert "training goes on" in warning
    assert "free space on that disk" in warning
    assert "can be written again" in told


def test_a_file_that_cannot_grow_stops_nothing_and_has_no_hole_once_it_can(tmp_path: Path) -> None:
    told = fill(
        tmp_path,
        "import resource\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))",
        "resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))",
    )
    require_whole_curve_and_one_warning(tmp_path, told)


def test_a_full_disk_stops_nothing_and_leaves_no_hole_once_there_is_room(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("a small disk can be mounted by root only, and not in every container")
    try:
        told = fill(
            disk,
            "open(folder + '/other', 'wb').write(b'x' * 8192)",
            "import os; os.unlink(folder + '/other')",
        )
        require_whole_curve_and_one_warning(disk, told)
    finally:
        subprocess.run(["umount", str(disk)], check=True, timeout=20)


def test_lines_that_are_never_written_are_counted_at_the_end(tmp_path: Path) -> None:
    told = fill(
        tmp_path,
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "from counterflow.launch import line_file; line_file.MAX_WAITING = 20",
        "",
    )
    kept = steps(tmp_path)
    assert [step for _, step, _ in kept] == list(range(1, len(kept) + 1))
    warnings = [line for line in told.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 2
    # Of 92 lines that were wanted in the end, and ten that the run went back over.
    lost = int(re.search(r": (\d+) lines could not be written and are lost", told)[1])  # type: ignore[index]
    assert lost == 92 - len(kept)


def test_sync_brings_the_lines_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.pread(descriptor, 1000, 0).decode())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with MetricsWriter(tmp_path, WITHOUT) as writer:
        writer.write("train", 1, loss=1.0)
        assert not synced
        writer.sync()
    assert synced == ['{"kind": "train", "step": 1, "loss": 1.0}\n']


def test_a_loss_is_said_to_be_under_or_above_the_unigram_entropy() -> None:
    from counterflow.launch.conclusion import verdict

    assert "2.0000 nats a token, 1.2500 under the unigram entropy" in verdict(2.0, 3.25)
    assert verdict(math.nan, 3.25) == "validation loss nan: the model has diverged"
    assert "4.4200 nats a token, 1.1700 above the unigram entropy" in verdict(4.42, 3.25)
