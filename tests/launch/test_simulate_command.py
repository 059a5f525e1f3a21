"""`counterflow simulate`: what it prints and writes, and what it refuses."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from counterflow.launch import simulate_progress
from counterflow.launch.cli import main
from counterflow.launch.outputs import write_whole
from counterflow.launch.tables import print_table
from counterflow.parallel.schedule import build, names
from counterflow.parallel.simulate import Costs, Memory, Phases, simulate
from counterflow.parallel.simulate.cost_file import load_costs
from counterflow.parallel.simulate.phases import NAMES
from tests.launch.commands import Command


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine says nothing on stderr, which the tests look at."""
    monkeypatch.setattr(simulate_progress, "AFTER_S", 3600.0)


SIZES = ("--ranks", "4", "--microbatches", "8")
_UNIT = "chunks of 1/4 model"
PAIR = ("--costs", "F=1,I=1,W=1,pair=3,send=0")


_COMMAND = Command("simulate", one_line=False)
shown, printed, error_of = _COMMAND.shown, _COMMAND.printed, _COMMAND.error_of


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


# What is printed


def test_the_promised_keys_are_in_the_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, "--schedule", "dualpipe", "--ranks", "8", "--microbatches", "20", *PAIR)
    promised = (
        "schedule ranks stages microbatches makespan busy idle bubble_rate peak_activations "
        "parameter_copies op_counts"
    )
    assert set(promised.split()) <= set(found)
    assert (found["makespan"], found["idle"], found["peak_activations"]) == (66, [6] * 8, [9] * 8)


def test_json_tells_all_that_the_simulation_found(capsys: pytest.CaptureFixture[str]) -> None:
    costs = "F=1,I=1,W=1,send=0.5,message=1,bandwidth=4,reduce=1,mirror=2,optimizer=1"
    found = printed(capsys, *SIZES, "--costs", costs)
    schedule = build("dualpipe", ranks=4, microbatches=8)
    result = simulate(schedule, Costs.parse(costs))
    assert found["steps"] == [[[str(s.step), s.start, s.end] for s in row] for row in result.spans]
    assert len(found["transfers"]) == len(result.transfers) == 2 * 3 * 8
    assert [part["kind"] for part in found["finish"][0]] == ["reduce"] * 2 + ["mirror"] * 2 + [
        "optimizer"
    ] * 2
    path = found["critical_path"]
    assert (path[0]["start"], path[-1]["end"]) == (0, found["makespan"])
    assert all(one["end"] == other["start"] for one, other in pairwise(path))
    assert {link["kind"] for link in path} >= {"step", "transfer", "optimizer"}
    for idle, causes in zip(found["idle"], found["idle_by_cause"], strict=True):
        parts = [*causes["on_rank"].values(), causes["travelling"], causes["finish"], causes["end"]]
        assert sum(parts) == pytest.approx(idle)  # sums in another order
    assert [memory["peak"] for memory in found["memory"]] == found["peak_chunks"]
    for memory in found["memory"]:
        assert (
            memory["weights"] + memory["gradients"] + memory["optimizer"] == memory["static"] == 0
        )
        # One holding for each chunk: a default size is all for W where a backward is split.
        assert len({(c["stage"], c["microbatch"]) for c in memory["chunks"]}) == 8


def test_json_has_the_phases_of_each_step_where_the_costs_have_some(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    times = "".join(f'"{name}" = {number}\n' for number, name in enumerate(NAMES, 1))
    costs = written(tmp_path, "costs.toml", f"[phases]\nlayers = 2\n{times}")
    found = printed(capsys, *SIZES, "--costs", costs)
    result = simulate(build("dualpipe", ranks=4, microbatches=8), load_costs(costs).costs)
    phases = result.costs.phases
    assert phases is not None
    counted = Counter[str]()
    for row, of in zip(found["steps"], found["phases"], strict=True):
        for (step, start, end), spans in zip(row, of, strict=True):
            made = phases.pair(2, 2) if step.startswith("(") else ()
            made = made or {"F": phases.forward, "B": phases.backward, "I": phases.input_half}.get(
                step[1], phases.weight_half
            )(2)
            assert spans == [[n, lr, ln, start + s, start + e] for n, lr, ln, s, e in made]
            assert max(span[-1] for span in spans) == pytest.approx(end)
            counted.update(name for name, *_ in spans)
    # Every micro-batch passes every layer of every stage once.
    assert counted == dict.fromkeys(NAMES, 8 * 4 * 2)
    assert printed(capsys, *SIZES)["phases"] == [[]] * 4


def test_text_has_the_drawing_the_table_and_the_makespan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, *SIZES, *PAIR)
    lines = text.splitlines()
    assert lines[0].startswith("rank 0 F0F1F2f4i4w4f5F3----")
    assert "dualpipe: 4 ranks, 8 micro-batches" in lines
    assert "rank  busy  idle" in text
    assert lines[-1] == (
        "makespan 26   bubble rate 0.0769   stages 4   copies of a stage's parameters 2"
    )


@pytest.mark.parametrize("columns", [40, 50, 60, 80, 100, 160])
@pytest.mark.parametrize("schedule", ["zbv", "search"])
def test_every_line_keeps_the_width_and_no_table_is_cut(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    columns: int,
    schedule: str,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, "--schedule", schedule, *SIZES, *PAIR, "--compare")
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= columns


def test_the_columns_of_a_comparison_have_the_documented_names_at_every_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Shorter times of B than of I and W: some schedules hold more until W than until I.
    text = "F = 1\nI = 1\nW = 1\nB = 1\n[memory]\nweights = 1\n"
    costs = ("--costs", written(tmp_path, "costs.toml", text))
    documented = re.findall(r"^\| ([\w ]+?) \| .*$", _DOCS.partition("## Look into")[0], re.M)
    for columns in (40, 80, 120, 160, 300):
        monkeypatch.setenv("COLUMNS", str(columns))
        lines = shown(capsys, *SIZES, *costs, "--compare").splitlines()
        (head,) = (line for line in lines if line.startswith("schedule "))
        names_shown = [name.strip() for name in re.split(r" {2,}", head)]
        assert set(names_shown) - {"schedule", "stages"} <= set(documented)
        assert ("rolling" in names_shown) == (columns >= 120)


def test_a_terminal_gets_colours_and_a_pipe_none() -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "counterflow", "simulate", *SIZES]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    for name in ("NO_COLOR", "FORCE_COLOR"):
        environment.pop(name, None)
    with subprocess.Popen(command, stdout=follower, env=environment) as process:
        os.close(follower)
        text = b""
        try:
            while part := os.read(leader, 4096):
                text += part
        except OSError:  # how Linux says that the other end is closed
            pass
        assert process.wait() == 0
    assert b"\x1b[" in text
    piped = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"\x1b[" not in piped.stdout


def test_tables_are_plain_text_without_rich(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [["a", "12.5"], ["bc", "3"]]
    expected = "title\nname  busy\na     12.5\nbc       3\n"
    print_table("title", ["name", "busy"], rows, names=1)
    assert capsys.readouterr().out == expected
    monkeypatch.setitem(sys.modules, "rich.console", None)
    print_table("title", ["name", "busy"], rows, names=1)
    assert capsys.readouterr().out == expected


# Comparison and search


def test_a_comparison_marks_the_chosen_one_and_keeps_its_keys(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ("--ranks", "8", "--microbatches", "20")
    found = printed(capsys, "--schedule", "zbv", *sizes, *PAIR, "--compare")
    assert {row["schedule"] for row in found["schedules"]} == set(names())
    row = next(row for row in found["schedules"] if row["schedule"] == "zbv")
    assert found["schedule"] == "zbv"
    assert (found["makespan"], found["stages"]) == (row["makespan"], row["stages"])
    text = shown(capsys, "--schedule", "1f1b", *sizes, *PAIR, "--compare")
    assert [line.split()[1] for line in text.splitlines() if line.startswith("> ")] == ["1f1b"]


def test_what_does_not_exist_stands_under_the_comparison(
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = ("--ranks", "5", "--microbatches", "20", "--compare")
    text = shown(capsys, *odd)
    assert "no dualpipe: ranks=5 is odd" in text
    # Nobody asked for dualpipe, so the shortest is drawn instead; who does, gets the error.
    assert text.count(">*") == 1
    assert "dualpipe: ranks=5 is odd" in error_of(capsys, "--schedule", "dualpipe", *odd)


def test_a_file_is_compared_under_its_path(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a longer path would be cut at the edge of the terminal
    file = "mine/dualpipe.csv"
    Path("mine").mkdir()
    shown(capsys, *SIZES, "--csv", file)
    found = printed(capsys, "--schedule", file, *PAIR, "--compare")
    rows = {row["schedule"]: row["makespan"] for row in found["schedules"]}
    assert rows[file] == rows["dualpipe"] == found["makespan"] == 26
    assert found["schedule"] == file
    # One name for it, above both tables.
    assert f"{file}: 4 ranks" in shown(capsys, "--schedule", file, "--compare").replace("\n", " ")


def test_a_search_is_at_least_as_good_as_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--schedule", "search", *SIZES, "--costs", "F=1/1/1/2,I=1,W=1", "--compare")
    found = printed(capsys, *arguments)
    assert found["makespan"] <= min(row["makespan"] for row in found["schedules"])
    assert found["search"]["lower_bound"] <= found["makespan"]
    limited = printed(capsys, "--schedule", "search", *SIZES, "--memory-limit", "3")
    assert max(limited["model_peak_chunks"]) <= 3
    assert "the best named schedule" in shown(capsys, *arguments).replace("\n", " ")


def test_a_search_speaks_in_the_unit_of_its_limit(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ("--schedule", "search", *SIZES, "--memory-limit", "2")
    found = printed(capsys, *arguments)
    share = 4 / found["stages"]
    assert share < 1
    assert found["model_peak_chunks"] == [share * peak for peak in found["peak_chunks"]]
    assert found["memory_unit"] == "chunks of 1/4 model"
    assert [memory["peak"] for memory in found["memory"]] == found["model_peak_chunks"]
    file = tmp_path / "found.csv"
    lines = shown(capsys, *arguments, "--csv", str(file)).splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("rank  busy"))
    columns = re.split(r" {2,}", lines[head])
    row = re.split(r" {2,}", lines[head + 1].strip())
    assert float(row[columns.index("to W")]) == found["model_peak_chunks"][0] <= 2
    assert any("costs, activations and the limit are of the model cut in 4" in x for x in lines)
    assert f"--schedule {file} --compare takes them, as here, of the model cut in 4" in lines[-1]
    # And so it does: alone, each of its stages would cost as much as one of four.
    again = printed(capsys, "--schedule", str(file), "--compare")
    assert again["makespan"] == found["makespan"]
    assert printed(capsys, "--schedule", str(file))["makespan"] == found["makespan"] / share


def test_limits_of_a_search_go_by_rank_and_by_copies(capsys: pytest.CaptureFixture[str]) -> None:
    limits = (2, 3, 3, 4)
    text = "/".join(map(str, limits))
    found = printed(capsys, "--schedule", "search", *SIZES, "--memory-limit", text)
    held = found["model_peak_chunks"]
    assert all(peak <= limit for peak, limit in zip(held, limits, strict=True))
    costs = ("--ranks", "4", "--microbatches", "12", "--costs", "pair=2.4")
    two = printed(capsys, "--schedule", "search", *costs)
    one = printed(capsys, "--schedule", "search", *costs, "--parameter-copies", "1")
    assert two["search"]["best_named"] == "dualpipe"  # which has two copies
    assert (one["search"]["best_named"], one["parameter_copies"]) == ("dualpipev", 1)


def test_chunks_of_the_stages_and_of_the_model_have_different_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = printed(capsys, "--schedule", "zbv", *SIZES)
    assert alone["memory_unit"] == "chunks"
    assert "model_peak_activations" not in alone
    found = printed(capsys, "--schedule", "zbv", *SIZES, "--compare")
    assert found["peak_activations"] == alone["peak_activations"] == [8] * 4
    assert (found["model_peak_activations"], found["memory_unit"]) == ([4] * 4, _UNIT)
    row = next(row for row in found["schedules"] if row["schedule"] == "zbv")
    assert not {"peak_activations", "peak_chunks"} & set(row)
    assert row["model_peak_activations"] == found["model_peak_activations"]
    assert row["peak_memory"] == [memory["peak"] for memory in found["memory"]]


def test_a_picture_of_a_comparison_names_the_unit_of_its_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "step.html"
    shown(capsys, "--schedule", "zbv", *SIZES, "--compare", "--plot", str(page))
    assert _UNIT in page.read_text(encoding="utf-8")


def test_what_takes_long_says_so_where_no_terminal_is_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = threading.Event()
    say = simulate_progress.Progress._say

    def say_and_tell(progress: simulate_progress.Progress) -> None:
        say(progress)
        said.set()

    monkeypatch.setattr(simulate_progress, "AFTER_S", 0.0)
    monkeypatch.setattr(simulate_progress.Progress, "_say", say_and_tell)
    with simulate_progress.Progress() as progress:
        progress.tell("zb-2p")
        assert said.wait(60)
    assert re.fullmatch(
        "counterflow: simulating(, now at zb-2p)?; this takes a while\n", capsys.readouterr().err
    )
    said.clear()
    assert main(["simulate", *SIZES, "--compare", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["makespan"] == 26
    assert captured.err.count("\n") <= 1


# Files


def test_costs_and_sizes_come_from_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = 'unit = "ms"\nF = 1\nI = 1\nW = 1\npair = 3\n[memory]\nweights = 10\nunit = "GiB"\n'
    file = written(tmp_path, "costs.toml", text)
    found = printed(capsys, *SIZES, "--costs", file)
    assert (found["makespan"], found["unit"], found["memory_unit"]) == (26, "ms", "GiB")
    assert [memory["peak"] for memory in found["memory"]] == [25] * 4
    table = shown(capsys, *SIZES, "--costs", file, "--compare")
    assert "4 ranks, 8 micro-batches, times in ms, memory in GiB" in table
    assert "peak memory" in table


def test_the_schedule_is_written_and_read_back_without_sizes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = shown(capsys, *SIZES, "--csv", "mine.csv")
    assert text.endswith("wrote mine.csv\n")
    found = printed(capsys, "--schedule", "mine.csv")
    assert (found["schedule"], found["makespan"]) == ("mine", 26)


def test_the_text_form_keeps_the_name_and_the_documented_one_is_what_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    shown(capsys, "--ranks", "2", "--microbatches", "4", "--text", str(file))
    assert printed(capsys, "--schedule", str(file))["schedule"] == "dualpipe"
    (example,) = re.findall(r"^```text\n(.*?)^```$", _DOCS, re.M | re.S)
    assert file.read_text(encoding="utf-8") == example


def test_pictures_and_traces_are_written_beside_the_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture, trace = tmp_path / "step.svg", tmp_path / "step.json"
    printed(capsys, *SIZES, "--plot", str(picture), "--trace", str(trace), "--compare")
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert json.loads(trace.read_text(encoding="utf-8"))
    assert {path.name for path in tmp_path.iterdir()} == {"step.svg", "step.json"}


def test_a_file_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out.svg"
    target.write_text("before", encoding="utf-8")

    def fail(path: Path) -> None:
        path.write_text("half", encoding="utf-8")
        raise OSError(28, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space left") as caught:
        write_whole(target, fail)
    assert caught.value.filename == str(target)
    assert target.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link_and_a_mode_a_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("before", encoding="utf-8")
    real.chmod(0o640)
    link.symlink_to(real)
    write_whole(link, lambda path: path.write_text("after", encoding="utf-8"))
    assert link.is_symlink()
    assert real.read_text(encoding="utf-8") == "after"
    assert real.stat().st_mode & 0o777 == 0o640


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs --ranks and --microbatches"),
        (("--ranks", "8"), "schedule 'dualpipe' needs --microbatches"),
        (("--microbatches", "8"), "schedule 'dualpipe' needs --ranks"),
        (("--schedule", ""), "--schedule '': a name, a file, or search is needed"),
        (("--schedule", "serch", *SIZES), "did you mean search?; known: gpipe, "),
        (("--schedule", "serch", *SIZES), "dualpipev, search"),
        (("--schedule", "search", "--ranks", "4"), "a search needs --microbatches"),
        (("--schedule", "dualpip", *SIZES), "did you mean dualpipe?"),
        (("--schedule", "dualpip", *SIZES, "--compare"), "did you mean dualpipe?"),
        (("--schedule", "no.csv"), "no.csv: no such schedule file"),
        (("--ranks", "0", "--microbatches", "8"), "--ranks must be a whole number from 1 up"),
        (("--ranks", "4", "--microbatches", "-8"), "--microbatches must be a whole number"),
        (("--ranks", "abc"), "--ranks must be a whole number from 1 up, got 'abc'"),
        (("--ranks", "1.5"), "--ranks must be a whole number from 1 up, got '1.5'"),
        (("--ranks", "0", "--costs", "G=1"), "unknown 'G'"),
        (("--costs", "F=1,I=1"), "W missing"),
        (("--ranks", "5", "--microbatches", "20"), "use 4 or 6 ranks"),
        ((*SIZES, "--costs", "F=-1,I=1,W=1"), "cost F=-1.0 must be finite and from 0 up"),
        ((*SIZES, "--costs", "F=1,I="), "I='' is not a number"),
        ((*SIZES, "--costs", ""), "is not NAME=NUMBER"),
        ((*SIZES, "--costs", "F=1/2/3,I=1,W=1"), "cost F is a list of 3, but there are 4 stages"),
        ((*SIZES, "--costs", "F=1/2/3,I=1,W=1", "--compare"), "cost F is a list of 3"),
        ((*SIZES, "--costs", "no.toml"), "no.toml: no such file of costs"),
        ((*SIZES, "--costs", "F=1,I=1e306,W=1"), "cost I=1e+306 is too large"),
        ((*SIZES, "--costs", "F=1,I=1,W=1e306", "--trace", "x.json"), "cost W=1e+306 is too large"),
        ((*SIZES, "--costs", "message=1e200,bandwidth=1e-200"), "message / bandwidth=inf is too"),
        ((*SIZES, "--costs", "F=1e-320,I=1e-320,W=1e-320"), "the costs are too small"),
        ((*SIZES, "--memory-limit", "4"), "--memory-limit goes with --schedule search"),
        (
            (*SIZES, "--schedule", "search", "--memory-limit", "nan"),
            "--memory-limit must be a number above 0",
        ),
        (
            (*SIZES, "--schedule", "search", "--memory-limit", "4/x/4/4"),
            "--memory-limit must be a number above 0, or one a rank such as 4/4/4/6, got '4/x/4/4'",
        ),
        (
            (*SIZES, "--schedule", "search", "--memory-limit", "4/4"),
            "--memory-limit has 2 entries, but there are 4 ranks",
        ),
        ((*SIZES, "--parameter-copies", "1"), "--parameter-copies goes with --schedule search"),
        ((*SIZES, "--stages-per-rank", "2"), "how many stages a rank has is fixed"),
        ((*SIZES, "--schedule", "search", "--stages-per-rank", "2"), "goes with interleaved"),
        ((*SIZES, "--transfers", "fast"), "known: buffered, batched, in-order, blocking"),
        (("--ranks", "64", "--microbatches", "100000"), "more than this command takes, 5,000,000"),
        (("--ranks", "64", "--microbatches", "20000", "--compare"), "than this command takes, 5,"),
        (("--ranks", "3000", "--microbatches", "1"), "3,000 stages are more than this command"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    message = error_of(capsys, *arguments)
    assert words in message
    assert "\n" not in message


def test_an_order_that_stands_still_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    # Both ends of each pair of ranks send first: known of 1F1B with blocking sends.
    blocking = ("--schedule", "1f1b", *SIZES, "--transfers", "blocking")
    message = error_of(capsys, *blocking)
    assert "blocking transfers stand still" in message
    assert error_of(capsys, *blocking, "--compare", "--json") == message
    assert "makespan" in shown(capsys, "--schedule", "1f1b", *SIZES, "--transfers", "buffered")


def test_files_that_are_no_schedules_are_named_with_the_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bad = written(tmp_path, "bad.csv", "0F0,0B0\n1F0,xx,1B0\n")
    assert f"{bad}, line 2, column 2: 'xx' is not a step" in error_of(capsys, "--schedule", bad)
    # A forward and a weight gradient that nobody does: what, and where it belongs.
    short = written(tmp_path, "short.csv", "0F0,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    assert error_of(capsys, "--schedule", short).startswith(
        f"{short}: schedule 'short', rank 0, step 1: 0F1 is missing; it belongs after 0F0"
    )
    half = written(tmp_path, "half.csv", "0F0,0I0\n1F0,1B0\n")
    assert "rank 0, step 2: 0W0 is missing, though 0I0 is there" in error_of(
        capsys, "--schedule", half
    )
    fine = written(tmp_path, "fine.csv", "0F0,0B0\n1F0,1B0\n")
    wrong = error_of(capsys, "--schedule", fine, "--ranks", "3")
    assert wrong == f"{fine}: the schedule in this file has 2 ranks, not 3"


@pytest.mark.parametrize("costs", ["F=1e-320,I=1,W=1", "F=1e-300,I=1e200,W=1"])
def test_times_may_be_many_powers_of_ten_apart(
    capsys: pytest.CaptureFixture[str], costs: str
) -> None:
    assert "makespan" in shown(capsys, *SIZES, "--costs", costs)


def test_a_size_that_is_too_large_is_named_with_its_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = written(tmp_path, "c.toml", "F = 1\nI = 1\nW = 1\n[memory]\nactivations = 1e308\n")
    message = error_of(capsys, *SIZES, "--costs", file, "--json")
    assert message.startswith(f"{file}: memory activations=1e+308 is too large")
    assert "\n" not in message


@pytest.mark.parametrize("flag", ["--plot", "--trace", "--csv", "--text"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flag: str,
) -> None:
    suffix = {"--plot": ".svg", "--trace": ".json", "--csv": ".csv", "--text": ".txt"}[flag]
    # Sizes that are refused too, but later.
    late = ("--ranks", "0", "--microbatches", "8")
    nowhere = str(tmp_path / "no" / f"x{suffix}")
    assert "there is no directory" in error_of(capsys, *late, flag, nowhere)
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    assert "is a directory" in error_of(capsys, *late, flag, str(folder))
    inside = str(Path(written(tmp_path, "file", "")) / f"x{suffix}")
    assert "is no directory" in error_of(capsys, *late, flag, inside)
    too_long = str(tmp_path / ("x" * 300 + suffix))
    assert "File name too long" in error_of(capsys, *late, flag, too_long)
    # os.access, because root, who may run the tests, may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    closed = str(tmp_path / f"x{suffix}")
    assert "may not be written to" in error_of(capsys, *late, flag, closed)


def test_a_picture_that_needs_matplotlib_is_refused_without_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("counterflow.launch.simulate_options.find_spec", lambda name: None)
    for suffix in ("svg", "png"):
        message = error_of(capsys, *SIZES, "--plot", str(tmp_path / f"x.{suffix}"))
        assert "pip install 'counterflow[plots]'" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--plot", "x.pdf"), "--plot x.pdf: must end in .svg or .png or .html"),
        (("--trace", "x.txt"), "--trace x.txt: must end in .json"),
        (("--csv", "x.txt"), "--csv x.txt: must end in .csv"),
        (("--text", "x.csv"), "--text x.csv: must end in .txt"),
        (("--csv", "-"), "--csv '-': the name of a file is needed, ending in .csv"),
        (("--csv", ""), "--csv '': the name of a file is needed, ending in .csv"),
        (("--plot", "-"), "--plot '-': the name of a file is needed, ending in .svg or .png or"),
        (("--csv", "pipe.csv"), "--csv pipe.csv: is no ordinary file"),
        (("--costs", "c.json", "--trace", "./c.json"), "--trace c.json: is the same file as that"),
        (("--schedule", "s.csv", "--csv", "s.csv"), "--csv s.csv: is the same file as that of"),
    ],
)
def test_outputs_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "c.json", '{"F": 1, "I": 1, "W": 1}')
    written(tmp_path, "s.csv", "0F0,0B0\n1F0,1B0\n")
    os.mkfifo(tmp_path / "pipe.csv")

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    before = files()
    assert words in error_of(capsys, *SIZES, *arguments)
    assert files() == before


# What docs/simulate.md says

_DOCS = (Path(__file__).parents[2] / "docs" / "simulate.md").read_text(encoding="utf-8")


def test_the_documented_commands_print_what_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    examples = re.findall(r"^    counterflow ([^\n]*)\n\n```\n(.*?)\n```$", _DOCS, re.M | re.S)
    assert len(examples) == 3
    for command, output in examples:
        main(command.split())
        captured = capsys.readouterr()
        assert (captured.out + captured.err).rstrip() == output, command


def test_the_documented_files_of_costs_have_every_key(tmp_path: Path) -> None:
    keys: set[str] = set()
    for index, text in enumerate(re.findall(r"^```toml\n(.*?)^```$", _DOCS, re.M | re.S)):
        load_costs(written(tmp_path, f"{index}.toml", text))
        table = tomllib.loads(text)
        keys |= set(table) | {f"memory.{key}" for key in table.get("memory", {})}
        keys |= {f"phases.{key}" for key in table.get("phases", {})}
    known = {field.name for field in fields(Costs)} | {"memory"}
    known |= {f"memory.{field.name}" for field in fields(Memory)}
    known |= {f"phases.{field.name}" for field in fields(Phases) if field.name != "times"}
    assert keys == known | {f"phases.{name}" for name in NAMES}


def test_the_documented_python_runs() -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", _DOCS, re.M | re.S)
    exec(compile(program, "docs/simulate.md", "exec"), {})


def test_the_documented_keys_are_those_of_the_json(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "F = 1\nI = 1\nW = 1\nsend = 0.5\nreduce = 1\noptimizer = 1\n[memory]\nkept = 0.5\n"
    costs = ("--costs", written(tmp_path, "costs.toml", text))
    arguments = ("--schedule", "search", "--ranks", "3", "--microbatches", "6", *costs)
    found = printed(capsys, *arguments, "--compare")
    section = _DOCS.partition("## JSON")[2].partition("## From")[0]
    first = re.findall(r"^\| (`.*?`) \|", section, re.M)
    documented = re.findall(r"`(.*?)`", " ".join(first))
    assert len(documented) == len(set(documented))
    assert set(documented) == set(paths(found)), "documented and not there, or the reverse"


def paths(value: object, at: str = "") -> Iterator[str]:
    """Where the entries of a JSON value lie: "a.b", or "a[].b" for what the list a holds."""
    if isinstance(value, dict) and not all(key.isdigit() for key in value):  # ranks are no names
        for key, entry in value.items():
            yield from paths(entry, f"{at}.{key}" if at else key)
    elif isinstance(value, list) and has_objects(value):
        for entry in value:
            yield from paths(entry, f"{at}[]")
    elif value != [] or not at.endswith("]"):
        yield at


def has_objects(entries: list[Any]) -> bool:
    return any(
        isinstance(entry, dict) or (isinstance(entry, list) and has_objects(entry))
        for entry in entries
    )


def test_the_peak_of_memory_has_the_static_part_and_the_curve_has_not(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "F = 1\nI = 1\nW = 1\n[memory]\nweights = 16\nactivations = 2\n"
    found = printed(capsys, *SIZES, "--costs", written(tmp_path, "costs.toml", text))
    for memory in found["memory"]:
        assert memory["static"] == 32
        assert memory["peak"] == 32 + max(held for _, held in memory["curve"])


def test_waits_are_listed_with_what_was_lacking(capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, *SIZES, "--costs", "F=1,I=1,W=1,send=0.5")
    assert any(found["waits"])
    for row, causes in zip(found["waits"], found["idle_by_cause"], strict=True):
        assert sum(wait["travelling"] for wait in row) == causes["travelling"]
        assert {str(w["source"]) for w in row if w["end"] - w["start"] > w["travelling"]} == set(
            causes["on_rank"]
        )
    for rank, row in enumerate(found["waits"]):
        steps = {step: start for step, start, _ in found["steps"][rank]}
        assert all(steps[wait["step"]] == wait["end"] > wait["start"] for wait in row)
