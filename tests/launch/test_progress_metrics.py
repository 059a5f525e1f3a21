"""What a run shows and what it writes down as it goes."""

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

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
    """Killed in the middle of a line, and gone on from a checkpoint before it."""
    with MetricsWriter(tmp_path, WITHOUT) as writer:
        for step in range(1, 8):
            writer.write("train", step, loss=float(step))
            if step == 4:
                writer.write("validation", step, loss=0.5)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "train", "step": 8, "lo')
    with MetricsWriter(tmp_path, WITHOUT, resume_step=4) as writer:
        assert steps(tmp_path)[-1] == ("validation", 4, 0.5)
        for step in range(5, 10):
            writer.write("train", step, loss=10.0 * step)
    train = [(step, loss) for kind, step, loss in steps(tmp_path) if kind == "train"]
    assert train == [(s, float(s)) for s in range(1, 5)] + [(s, 10.0 * s) for s in range(5, 10)]
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
        writer.rewind(2)
        assert [step for _, step, _ in steps(tmp_path)] == [1, 2]
        writer.write("train", 3, loss=2.0)
    assert steps(tmp_path)[2:] == [("train", 3, 2.0)]


def test_tensorboard_shows_every_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, last, loss in ((None, 6, 1.0), (4, 8, 2.0)):
        with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
            for step in range((resume_step or 0) + 1, last + 1):
                writer.write("train", step, loss=loss)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
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


def test_a_loss_is_said_to_be_under_or_above_the_unigram_entropy() -> None:
    from counterflow.launch.conclusion import verdict

    assert "2.0000 nats a token, 1.2500 under the unigram entropy" in verdict(2.0, 3.25)
    assert "4.4200 nats a token, 1.1700 above the unigram entropy" in verdict(4.42, 3.25)
