"""Schedules side by side: the same model for all, and what does not exist said."""

import json
from fractions import Fraction

import pytest

from counterflow.parallel.schedule import Times, build, names
from counterflow.parallel.schedule.csv_form import from_csv
from counterflow.parallel.simulate import Costs, Memory, simulate
from counterflow.parallel.simulate.compare import Comparison, compare, evaluate, tailored

PAIR = Costs(F=1, I=1, W=1, pair=3)


def makespans(comparison: Comparison) -> dict[str, float]:
    return {entry.name: entry.makespan for entry in comparison.entries}


def test_every_name_is_compared_or_missing_with_a_reason() -> None:
    for ranks, microbatches in ((1, 1), (4, 8), (5, 3), (7, 20)):
        found = compare(ranks, microbatches, PAIR)
        there = [entry.name for entry in found.entries]
        assert sorted([*there, *(m.schedule for m in found.missing)]) == sorted(names())
        assert all(missing.reason for missing in found.missing)


def test_the_shortest_comes_first_and_closed_forms_hold() -> None:
    found = compare(8, 20, PAIR)
    times = makespans(found)
    assert list(times.values()) == sorted(times.values())
    # 60 of work, and the bubbles of facts section 9, row 8
    assert times["1f1b"] == 60 + 21
    assert times["zb-h1"] == 60 + 7
    assert times["dualpipe"] == 60 + 6
    assert found.reference == 81


def test_a_finer_cut_of_the_model_does_the_same_work() -> None:
    for entry in compare(4, 8, Costs(F=1, I=0.75, W=0.5)).entries:
        # Binary fractions, so the sums are exact.
        work = 8 * Fraction(9, 4)
        assert [Fraction(entry.makespan) - Fraction(idle) for idle in entry.idle] == [work] * 4


def test_activations_count_in_chunks_of_one_of_as_many_stages_as_ranks() -> None:
    found = compare(8, 20, PAIR)
    dualpipe, vee = found.entry("dualpipe"), found.entry("dualpipev")
    assert dualpipe is not None
    assert vee is not None
    assert (dualpipe.chunks, dualpipe.stages) == ((9,) * 8, 8)
    # 17 chunks of one of 16 stages
    assert (vee.chunks, vee.stages) == ((8.5,) * 8, 16)


def test_memory_is_cut_as_the_model_is() -> None:
    sizes = Memory(weights=6, activations=2)
    for entry in compare(4, 8, PAIR, memory=sizes).entries:
        assert list(entry.peak_memory) == [
            6 * entry.parameter_copies + 2 * held for held in entry.held
        ]


def test_all_of_one_schedule_is_kept_the_chosen_or_the_shortest() -> None:
    chosen = compare(4, 8, PAIR, keep="gpipe")
    assert (chosen.kept.name, chosen.kept.entry()) == ("gpipe", chosen.entry("gpipe"))
    assert chosen.kept.result.plan == build("gpipe", ranks=4, microbatches=8)
    for keep in (None, "dualpipe"):
        found = compare(5, 8, PAIR, keep=keep)  # on five ranks there is no dualpipe
        assert found.kept.entry() == found.entries[0]


def test_further_schedules_stand_beside_the_named_ones() -> None:
    mine = build("1f1b", ranks=4, microbatches=8)
    found = compare(4, 8, PAIR, also={"mine.csv": mine})
    times = makespans(found)
    assert times["mine.csv"] == times["1f1b"]
    assert len(times) == len(names()) + 1


def test_what_is_wrong_with_the_costs_themselves_is_one_error() -> None:
    with pytest.raises(ValueError, match="cost F is a list of 3"):
        compare(4, 8, Costs(F=(1, 1, 1)))
    with pytest.raises(ValueError, match=r"no schedule can be simulated; .*memory kept=2"):
        compare(4, 8, PAIR, memory=Memory(activations=1, kept=2))


def test_stages_that_are_no_multiple_of_the_ranks_are_refused() -> None:
    schedule = build("dualpipev", ranks=2, microbatches=4)
    assert evaluate("x", schedule, Costs()).result.stages == 4
    odd = from_csv("0F0,1F0,1B0,0B0\n2F0,2B0\n", "odd")
    with pytest.raises(ValueError, match="3 stages are no multiple of the 2 ranks"):
        evaluate("odd", odd, Costs())


def test_builders_that_go_by_costs_get_them() -> None:
    uneven = Costs(F=1, I=3, W=0.5)
    made = tailored("zb-2p", 4, 8, uneven)
    assert made == build("zb-2p", ranks=4, microbatches=8, times=uneven.times(4))
    equal = build("zb-2p", ranks=4, microbatches=8, times=Times.uniform(4))
    assert simulate(made, uneven).makespan <= simulate(equal, uneven).makespan


def test_stages_per_rank_goes_to_those_that_have_it() -> None:
    found = compare(4, 8, PAIR, stages_per_rank=3)
    stages = {entry.name: entry.stages for entry in found.entries}
    assert (stages["interleaved"], stages["1f1b"]) == (12, 4)


def test_the_json_form_can_be_written() -> None:
    shown = json.loads(json.dumps(compare(7, 20, PAIR).to_json()))
    assert {missing["schedule"] for missing in shown["missing"]} == {"dualpipe"}
    reference = next(row for row in shown["schedules"] if row["schedule"] == "1f1b")
    assert (reference["makespan"], reference["ratio"], reference["stages"]) == (78, 1, 7)
    assert reference["model_peak_activations"] == [7, 6, 5, 4, 3, 2, 1]
