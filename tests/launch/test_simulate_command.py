"""`counterflow simulate`: what it prints and writes, and what it refuses."""

import json
import os
import pty
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from counterflow.launch.cli import main
from counterflow.launch.outputs import write_whole
from counterflow.launch.tables import print_table
from counterflow.parallel.schedule import build, names
from counterflow.parallel.simulate import Costs, Memory, Phases, simulate
from counterflow.parallel.simulate.cost_file import load_costs
from counterflow.parallel.simulate.phases import NAMES

SIZES = ("--ranks", "4", "--microbatches", "8")
PAIR = ("--costs", "F=1,I=1,W=1,pair=3,send=0")


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["simulate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    return json.loads(shown(capsys, *arguments, "--json"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["simulate", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("counterflow: error: ")
    return captured.err.removeprefix("counterflow: error: ").rstrip()


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


@pytest.mark.parametrize("columns", [50, 60, 80, 100, 160])
def test_no_table_is_cut_whatever_the_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, *SIZES, *PAIR, "--compare")
    assert "…" not in text
    widths = [len(line) for line in text.splitlines() if not line.startswith(("makespan", "steps"))]
    assert max(widths) <= columns


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
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = str(tmp_path / "dualpipe.csv")
    shown(capsys, *SIZES, "--csv", file)
    found = printed(capsys, "--schedule", file, *PAIR, "--compare")
    rows = {row["schedule"]: row["makespan"] for row in found["schedules"]}
    assert rows[file] == rows["dualpipe"] == found["makespan"] == 26


def test_a_search_is_at_least_as_good_as_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--schedule", "search", *SIZES, "--costs", "F=1/1/1/2,I=1,W=1", "--compare")
    found = printed(capsys, *arguments)
    assert found["makespan"] <= min(row["makespan"] for row in found["schedules"])
    assert found["search"]["lower_bound"] <= found["makespan"]
    limited = printed(capsys, "--schedule", "search", *SIZES, "--memory-limit", "3")
    share = 4 / limited["stages"]
    assert max(limited["peak_chunks"]) * share <= 3
    assert "the best named schedule" in shown(capsys, *arguments).replace("\n", " ")


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
        (("--schedule", "search", "--ranks", "4"), "a search needs --ranks and --microbatches"),
        (("--schedule", "dualpip", *SIZES), "did you mean 'dualpipe'?"),
        (("--schedule", "dualpip", *SIZES, "--compare"), "did you mean 'dualpipe'?"),
        (("--schedule", "no.csv"), "no.csv: no such schedule file"),
        (("--ranks", "0", "--microbatches", "8"), "--ranks must be a whole number from 1 up"),
        (("--ranks", "4", "--microbatches", "-8"), "--microbatches must be a whole number"),
        (("--ranks", "5", "--microbatches", "20"), "use 6 ranks"),
        ((*SIZES, "--costs", "F=-1"), "cost F=-1.0 must be finite and from 0 up"),
        ((*SIZES, "--costs", "F=1,I="), "I='' is not a number"),
        ((*SIZES, "--costs", ""), "is not NAME=NUMBER"),
        ((*SIZES, "--costs", "F=1/2/3"), "cost F is a list of 3, but there are 4 stages"),
        ((*SIZES, "--costs", "F=1/2/3", "--compare"), "cost F is a list of 3"),
        ((*SIZES, "--costs", "no.toml"), "no.toml: no such file of costs"),
        ((*SIZES, "--costs", "F=1e308"), "the costs are too large"),
        ((*SIZES, "--memory-limit", "4"), "--memory-limit goes with --schedule search"),
        (
            (*SIZES, "--schedule", "search", "--memory-limit", "nan"),
            "--memory-limit must be a number above 0",
        ),
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


@pytest.mark.parametrize("flag", ["--plot", "--trace", "--csv"])
def test_a_path_that_cannot_be_written_is_refused_before_the_work(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    flag: str,
) -> None:
    suffix = {"--plot": ".svg", "--trace": ".json", "--csv": ".csv"}[flag]
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
    monkeypatch.setattr("counterflow.launch.simulate_command.find_spec", lambda name: None)
    for suffix in ("svg", "png"):
        message = error_of(capsys, *SIZES, "--plot", str(tmp_path / f"x.{suffix}"))
        assert "pip install 'counterflow[plots]'" in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--plot", "x.pdf"), "--plot x.pdf: must end in .svg or .png or .html"),
        (("--trace", "x.txt"), "--trace x.txt: must end in .json"),
        (("--csv", "/dev/null"), "--csv /dev/null: is no ordinary file"),
        (("--csv", "x.json", "--trace", "./x.json"), "--csv x.json: is the same file as that of"),
        (("--costs", "c.toml", "--csv", "c.toml"), "--csv c.toml: is the same file as that of"),
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
    written(tmp_path, "c.toml", "F = 1\nI = 1\nW = 1\n")
    written(tmp_path, "s.csv", "0F0,0B0\n1F0,1B0\n")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert words in error_of(capsys, *SIZES, *arguments)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
