"""The drawing with letters: proportional to time, within its width, and legible."""

import pytest

from counterflow.parallel.schedule import build
from counterflow.parallel.simulate import Costs, Result, simulate
from counterflow.parallel.simulate.draw.text import timeline


def result(name: str, ranks: int, microbatches: int, costs: Costs | None = None) -> Result:
    return simulate(build(name, ranks=ranks, microbatches=microbatches), costs or Costs())


def test_a_step_is_as_wide_as_it_is_long() -> None:
    drawn = timeline(result("1f1b", 2, 2, Costs(unit="ms")), 40)
    # The shortest step has a whole number of columns: 33 of the 40 are left, for 9 units.
    assert drawn.plain().splitlines() == [
        "rank 0 F0-F1-......B0----...B1----",
        "rank 1 ...F0-B0----F1-B1----......",
        "time   0 ms           5",
    ]
    assert drawn.legend == "F forward, B full backward, . idle"


def test_a_pair_has_its_backward_under_its_forward() -> None:
    lines = timeline(result("dualpipe", 2, 4), 80).plain().splitlines()
    pairs = [line for line in lines if line.startswith(" ")]
    assert len(pairs) == 2
    for upper, lower in zip(lines[::2], lines[1::2], strict=False):
        for column, letter in enumerate(lower):
            if letter in "Bb":
                assert upper[column] in "Ff"


def test_small_letters_tell_directions_and_later_stages() -> None:
    both = timeline(result("dualpipe", 2, 4), 80)
    assert "f2" in both.plain()
    assert "f0" not in both.plain()
    assert "entered at the other end" in both.legend
    vee = timeline(result("dualpipev", 2, 4), 200)
    assert "f0" in vee.plain()
    assert "F0" in vee.plain()
    assert "later stage" in vee.legend


def test_what_follows_the_rows_is_drawn_and_explained() -> None:
    drawn = timeline(result("dualpipe", 2, 4, Costs(reduce=1, mirror=1, optimizer=2)), 100)
    assert drawn.legend.count("R reduce, M mirror, O optimizer") == 1
    upper = drawn.plain().splitlines()[0]
    assert all(letter in upper for letter in "RMO")


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "costs"),
    [
        ("1f1b", 1, 1, Costs(F=1e-6, I=1e-6, W=1e-6)),
        ("1f1b", 4, 8, Costs(F=1.3, I=1.1, W=0.7, send=0.21)),
        ("dualpipe", 8, 20, Costs(pair=2.6, reduce=1)),
        ("dualpipe", 8, 400, Costs(pair=2.6, mirror=3)),
        ("interleaved", 100, 100, Costs(F=1e6)),
    ],
)
def test_every_width_is_kept(
    width: int, name: str, ranks: int, microbatches: int, costs: Costs
) -> None:
    drawn = timeline(result(name, ranks, microbatches, costs), width)
    assert max(map(len, drawn.plain().splitlines())) <= width


def test_a_long_step_shows_per_column_what_takes_most_of_its_time() -> None:
    drawn = timeline(result("dualpipe", 8, 400, Costs(pair=3)), 80)
    lines = drawn.plain().splitlines()
    assert len(lines) == 9
    # Rank 3 has 391 pairs of 3 in 1206.
    assert lines[3].count("P") >= 0.95 * (len(lines[3]) - len("rank 3 "))
    assert "P pair" in drawn.legend
    assert "what takes more than half of it" in drawn.legend


def test_a_column_in_which_nothing_takes_half_says_so() -> None:
    # A third each of F, I and W, but for the warm-up.
    drawn = timeline(result("zbv", 8, 600), 80)
    lines = drawn.plain().splitlines()
    for line in lines[:8]:
        letters = line.removeprefix(line[:7])
        assert letters.count("*") >= 0.95 * len(letters)
    assert "* where nothing does" in drawn.legend
    # 1F1B: two of three units are B.
    steady = timeline(result("1f1b", 2, 600), 80).plain().splitlines()[0]
    assert set(steady.removeprefix("rank 0 ")) == {"B"}


@pytest.mark.parametrize("times", [(1e-320, 1, 1), (1e-300, 1e200, 1), (1, 1, 1e-320)])
def test_times_may_be_as_far_apart_as_numbers_can_be(times: tuple[float, float, float]) -> None:
    drawn = timeline(result("1f1b", 2, 2, Costs(*times)), 40)
    assert max(map(len, drawn.plain().splitlines())) <= 40


def test_many_ranks_are_drawn_from_both_ends() -> None:
    lines = timeline(result("1f1b", 100, 2), 80).plain().splitlines()
    assert len(lines) == 16 + 1 + 16 + 1
    assert lines[16] == "... 68 more ranks"
    assert lines[17].startswith("rank 84")
