"""Reading what `counterflow simulate --json` wrote."""

import json
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.simulated import Simulated, kind_of, read_simulated
from counterflow.launch.cli import main

PHASES = """
unit = "us"
send = 2
[phases]
layers = 2
comm_share = 0.5
"attn(F)" = 9
"dispatch(F)" = 7
"mlp(F)" = 8
"combine(F)" = 9
"combine(B)" = 9
"mlp(B)" = 8
"dispatch(B)" = 7
"attn(B)" = 11
"mlp(W)" = 7
"attn(W)" = 4
"""


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> dict[str, Any]:
    costs = tmp_path / "costs.toml"
    costs.write_text(PHASES, encoding="utf-8")
    arguments = ("--ranks", "2", "--microbatches", "4", "--costs", str(costs), "--json")
    assert main(["simulate", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def read_back(tmp_path: Path, value: object) -> Simulated:
    path = tmp_path / "simulated.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return read_simulated(path)


def test_what_the_command_wrote_is_read_with_its_phases(
    written: dict[str, Any], tmp_path: Path
) -> None:
    found = read_back(tmp_path, written)
    assert (found.schedule, found.unit, found.ns_per_unit) == ("dualpipe", "us", 1000)
    assert (found.num_ranks, found.makespan, found.has_phases) == (2, written["makespan"], True)
    assert [[[a.name, a.start, a.end] for a in row] for row in found.rows] == written["steps"]
    told = [[[list(p) for p in a.phases] for a in row] for row in found.rows]
    assert told == written["phases"]


def test_phases_fill_their_step_and_stay_in_it(written: dict[str, Any], tmp_path: Path) -> None:
    for row in read_back(tmp_path, written).rows:
        for action in row:
            assert min(phase.start for phase in action.phases) == action.start
            assert max(phase.end for phase in action.phases) == pytest.approx(action.end)
            assert action.is_pair == (len({phase.name for phase in action.phases}) == 10)


def test_without_phases_there_are_none(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["simulate", "--ranks", "2", "--microbatches", "4", "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text)["phases"] == [[], []]
    found = read_back(tmp_path, text)
    assert not found.has_phases
    assert found.ns_per_unit is None
    older = json.loads(text)
    del older["phases"]
    assert read_back(tmp_path, older) == found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"traceEvents": []}, "is a trace and no simulation"),
        ({"schedule": None}, "has no 'schedule'"),
        ({"makespan": None}, "has no 'makespan'"),
        ({"makespan": "long"}, "'makespan' holds 'long' where a time belongs"),
        ({"makespan": 0}, "'makespan' is not above 0"),
        ({"steps": None}, "has no 'steps': it is from an older version or another command"),
        ({"steps": {}}, "'steps' is no list"),
        ({"ranks": 3}, "'steps' has 2 rows, but 'ranks' is 3"),
        ({"steps": [[], []], "phases": [[], []]}, "'steps' holds no action"),
        ({"steps": [[["0F0", 0]], []], "phases": [[], []]}, "'steps[0][0]' is not [action, start"),
        ({"steps": [[["zero", 0, 1]], []], "phases": [[], []]}, "is not [action, start, end]"),
        ({"steps": [[["0F0", 2, 1]], []], "phases": [[], []]}, "'steps[0][0]' ends before it"),
        ({"steps": [[["0F0", 0, None]], []], "phases": [[], []]}, "holds None where a time"),
        ({"phases": [[]]}, "'phases' has 1 rows and 'steps' 2"),
        ({"phases": [[[]], []]}, "'phases[0]' has 1 entries, but"),
        (
            {"steps": [[["0F0", 0, 1]], []], "phases": [[[["attn(F)", 0, "lane", 0, 1]]], []]},
            "'phases[0][0]' holds what is not [phase, layer, lane, start, end]",
        ),
    ],
)
def test_what_is_no_simulation_is_refused_by_name(
    written: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    value = {k: v for k, v in {**written, **change}.items() if v is not None}
    with pytest.raises(
        ValueError, match=r"simulated\.json: .*counterflow simulate \.\.\. --json"
    ) as error:
        read_back(tmp_path, value)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no JSON: Expecting value (line 1, column 1)"),
        ('{"schedule": ', "is no JSON"),
        ("[1, 2]", "is no JSON object"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match="simulated") as error:
        read_back(tmp_path, text)
    assert words in str(error.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_simulated(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read_simulated(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="is no text"):
        read_simulated(tmp_path / "x.json")


def test_kinds_and_stages_follow_from_the_text() -> None:
    assert kind_of("12F3") == ("F", "12")
    assert kind_of("0W11") == ("W", "0")
    assert kind_of("(0F7;7B3)") == ("pair", "0;7")
    for name in ("1F1B", "F0", "0F", "(0F7)", "attn(F)", "0X1", "ProfilerStep#3", "0F3 "):
        assert kind_of(name) is None


def test_ranks_of_one_stage_are_neighbours(written: dict[str, Any], tmp_path: Path) -> None:
    found = read_back(tmp_path, written)
    assert [found.pipeline_rank(rank, 6) for rank in range(6)] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="2 pipeline ranks were simulated, and the run had 5"):
        found.pipeline_rank(0, 5)
    with pytest.raises(ValueError, match="the run had 1 ranks, which is no multiple"):
        found.pipeline_rank(0, 1)
