"""`counterflow profile --against` a plan: where the prediction was wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.by_phase import by_phase
from counterflow.comm.profile.comparison import Comparison
from counterflow.comm.profile.simulated import Planned, Simulated, read_simulated
from counterflow.launch.plan_json import to_json
from counterflow.launch.profile_plan import check_plan, find_run
from tests.comm.profile.staged import compared, ran_as_simulated, simulated_of
from tests.launch.made_up_plan import GIB, made_up_answer


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    return json.loads(json.dumps(to_json(made_up_answer())))


def read_back(folder: Path, value: object) -> Simulated:
    path = folder / "plan.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return read_simulated(path)


def run_folder(folder: Path, lines: list[dict[str, object]]) -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    (folder / "traces" / "step5").mkdir(parents=True)
    return folder


def test_a_plan_is_read_as_its_simulation_and_what_it_says_besides(
    plan: dict[str, Any], tmp_path: Path
) -> None:
    found = read_back(tmp_path, plan)
    assert found.planned == Planned(97.0, (61 * GIB, 61 * GIB), 4)
    assert (found.unit, found.num_ranks) == ("ms", 2)
    assert found.has_phases
    alone = read_back(tmp_path, plan["simulation"])
    assert alone.planned is None
    assert alone.rows == found.rows


def test_phases_of_a_planned_step_lie_within_it(plan: dict[str, Any], tmp_path: Path) -> None:
    for row in read_back(tmp_path, plan).rows:
        for action in row:
            assert action.phases[0].start == action.start
            assert max(phase.end for phase in action.phases) <= action.end


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(simulation=3), "'simulation' is no JSON object"),
        (lambda plan: plan.pop("step_ms"), "no 'step_ms'"),
        (lambda plan: plan.update(step_ms="long"), "'step_ms' holds 'long'"),
        (lambda plan: plan.update(memory=plan["memory"][:1]), "'memory' has 1 entries"),
        (lambda plan: plan["memory"][1].pop("total_bytes"), "'memory[1]' holds None"),
        (lambda plan: plan["memory"].__setitem__(0, 7), "'memory[0]' is no JSON object"),
    ],
)
def test_a_damaged_plan_is_refused_in_one_line(
    plan: dict[str, Any],
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    words: str,
) -> None:
    damaged = json.loads(json.dumps(plan))
    change(damaged)
    with pytest.raises(ValueError, match=r"plan\.json: ") as told:
        read_back(tmp_path, damaged)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.fixture(scope="module")
def later() -> Comparison:
    """Of a run that went as simulated, 5 ms later."""
    simulated = simulated_of("dualpipe", ranks=2, microbatches=4)
    return compared(simulated, ran_as_simulated(simulated), [0, 0])


def test_what_each_phase_added_is_what_the_row_took_longer(later: Comparison) -> None:
    assert later.longest is not None
    shares = by_phase(later.longest)
    assert sum(share.difference for share in shares) == later.longest.difference
    assert sum(share.measured for share in shares) == later.longest.measured
    assert {share.name for share in shares} >= {"attn(F)", "dispatch(F)", "mlp(W)"}
    assert all(share.ratio == 1 for share in shares if share.simulated)


def test_the_whole_step_and_the_memory_are_those_of_the_run_s_metrics(
    later: Comparison, tmp_path: Path
) -> None:
    seconds = [9.0, 5.0, 0.4, 0.2, 0.3]  # the first two are of a run that gets going
    lines: list[dict[str, object]] = [
        {"kind": "train", "step": step, "seconds": s, "memory_gib_max": 1.5}
        for step, s in enumerate(seconds, 1)
    ]
    folder = run_folder(tmp_path, [*lines, {"kind": "validation", "loss": 1.0}])
    planned = Planned(250.0, (GIB, 2 * GIB), 2)
    found = check_plan(planned, later, [folder / "traces" / "step5"], 2)
    numbers = {of.name: of for of in found.numbers}
    assert numbers["step"][2:] == (250.0, pytest.approx(300.0))
    assert numbers["fullest rank"][2:] == (2.0, 1.5)
    rows, rest = numbers["rows of actions"], numbers["the rest: reductions, optimizer"]
    assert rows.predicted + rest.predicted == pytest.approx(250.0)
    assert rows.measured + rest.measured == pytest.approx(300.0)
    assert not found.missing


def test_the_memory_is_what_was_held_before_the_profiler_ran(
    later: Comparison, tmp_path: Path
) -> None:
    # Peaks since the run began; step 5 was recorded.
    held = [1.0, 1.5, 1.5, 1.5, 9.0, 9.0]
    lines: list[dict[str, object]] = [
        {"kind": "train", "step": step, "seconds": 0.3, "memory_gib_max": gib}
        for step, gib in enumerate(held, 1)
    ]
    planned = Planned(250.0, (GIB, 2 * GIB), 2)
    folder = run_folder(tmp_path, lines)
    found = check_plan(planned, later, [folder / "traces" / "step5"], 2)
    assert found.numbers[-1] == ("fullest rank", "GiB", 2.0, 1.5)
    assert not found.missing
    (folder / "traces" / "steps1-3").mkdir()
    found = check_plan(planned, later, [folder / "traces" / "step5"], 2)
    assert found.numbers[-1].measured == 9.0
    assert "has the profiler's own in it: no step ran before" in found.missing[0]


def test_without_a_run_s_folder_the_rows_alone_are_compared(
    later: Comparison, tmp_path: Path
) -> None:
    found = check_plan(Planned(1.0, (1, 1), 8), later, [tmp_path], 2)
    assert [of.name for of in found.numbers] == ["rows of actions"]
    assert found.numbers[0].ratio == 1
    assert "8 ranks were planned and the run had 2" in found.missing[0]
    assert "runs/NAME" in found.missing[1]


def test_metrics_that_are_no_json_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\nno\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        find_run([tmp_path])


def test_what_a_plan_counts_to_mlp_is_compared_with_it() -> None:
    alone = simulated_of("1f1b", ranks=1, microbatches=1)
    (trace,) = ran_as_simulated(alone)
    marks = [mark._replace(name=mark.name.replace("mlp(", "shared(")) for mark in trace.annotations]
    renamed = replace(trace, annotations=tuple(marks))
    names = {phase.name for phase in compared(alone, [trace], [0]).phases}
    told = {phase.name for phase in compared(alone, [renamed], [0]).phases}
    assert told == {name.replace("mlp(", "shared(") for name in names} != names
    planned = replace(alone, planned=Planned(1.0, (1.0,), 1))
    found = compared(planned, [renamed], [0])
    assert {phase.name for phase in found.phases} == names
    assert all(phase.ratio == 1 for phase in found.phases)
