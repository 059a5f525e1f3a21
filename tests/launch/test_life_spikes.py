"""Bad losses are met as configured, and by a run that goes on as by one that never stopped."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.launch.life.section import GuardConfig
from counterflow.launch.life.spikes import LossGuard

NAN, INF = float("nan"), float("inf")


def falling(count: int) -> list[float]:
    noise = random.Random(0)
    return [4.0 - step / 100 + noise.gauss(0, 0.05) for step in range(count)]


def guard(losses: list[float], **options: object) -> LossGuard:
    made = LossGuard(GuardConfig(**options))  # pyright: ignore[reportArgumentType]
    for step, loss in enumerate(losses, 1):
        assert made.judge(step, loss, 1.0).action == "update"
    return made


@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (2.0, NAN), (2.0, INF), (-INF, 1.0)])
@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_a_loss_or_norm_that_is_not_finite_is_met_as_configured(
    bad: tuple[float, float], action: str
) -> None:
    verdict = guard(falling(3), on_nan=action).judge(4, *bad)
    assert verdict.action == action
    assert f"loss {bad[0]:g}, gradient norm {bad[1]:g}" in verdict.reason
    assert (action == "stop") == verdict.reason.startswith("step 4: ")


@pytest.mark.parametrize("action", ["stop", "skip", "rollback"])
def test_a_spike_is_met_as_configured_and_is_no_part_of_later_means(action: str) -> None:
    judge = guard(falling(50), on_spike=action, max_events=99)
    for step in range(51, 90):  # were they taken in, they would soon be no spikes
        assert judge.judge(step, 9.0, 1.0).action == action
    assert judge.judge(90, 3.5, 1.0).action == "update"


def test_spikes_are_ignored_unless_asked_for() -> None:
    assert guard(falling(50)).judge(51, 1e9, 1.0).action == "update"


def test_a_spike_is_judged_against_mean_and_deviation_of_the_window_only() -> None:
    losses = [100.0] * 30 + [1.0, 3.0] * 10
    judge = guard(losses, on_spike="skip", window=20, spike_sigma=6.0)
    # Mean 2, deviation 1.
    assert judge.judge(51, 8.0, 1.0).action == "update"
    judge = guard(losses, on_spike="skip", window=20, spike_sigma=6.0)
    verdict = judge.judge(51, 8.1, 1.0)
    assert verdict.action == "skip"
    assert "loss 8.1 is above 8, 6 standard deviations over the mean 2 of the last 20" in (
        verdict.reason
    )


def test_a_flat_curve_has_no_spike_below_a_hundredth_of_its_mean_by_deviation() -> None:
    judge = guard([2.0] * 30, on_spike="skip", spike_sigma=6.0)
    assert judge.judge(31, 2.0 * 1.0599, 1.0).action == "update"
    judge = guard([2.0] * 30, on_spike="skip", spike_sigma=6.0)
    assert judge.judge(31, 2.0 * 1.0601, 1.0).action == "skip"


@pytest.mark.parametrize(("window", "fewest"), [(100, 20), (20, 20), (5, 5), (2, 2)])
def test_no_spike_is_judged_before_there_are_losses_enough(window: int, fewest: int) -> None:
    assert guard([2.0] * (fewest - 1), on_spike="stop", window=window).judge(
        fewest, 1e6, 1.0
    ).action == ("update")
    assert guard([2.0] * fewest, on_spike="stop", window=window).judge(
        fewest + 1, 1e6, 1.0
    ).action == ("stop")


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_one_event_more_than_allowed_stops_and_tells_the_losses(limit: int) -> None:
    judge = guard(falling(3), on_nan="skip", max_events=limit)
    for step in range(limit):
        verdict = judge.judge(10 + step, NAN, 1.0)
        assert verdict.action == "skip"
        assert f"(event {step + 1} of {limit} at most)" in verdict.reason
        assert judge.judge(100, 3.0, 1.0).action == "update"
    verdict = judge.judge(200, INF, 2.0)
    assert verdict.action == "stop"
    assert f"guard.max_events = {limit}" in verdict.reason
    assert "step 200: loss inf, gradient norm 2" in verdict.reason
    assert verdict.reason.count("loss nan") == limit


@given(st.lists(st.sampled_from([1.0, 1.3, 2.0, 50.0, NAN]), max_size=60), st.integers(0, 60))
def test_a_guard_that_is_restored_judges_as_the_one_that_went_on(
    losses: list[float], cut: int
) -> None:
    config = GuardConfig(
        on_nan="skip", on_spike="rollback", window=25, spike_sigma=3.0, max_events=8
    )
    whole, first = LossGuard(config), LossGuard(config)
    verdicts = [whole.judge(step, loss, 1.0) for step, loss in enumerate(losses)]
    for step, loss in enumerate(losses[:cut]):
        first.judge(step, loss, 1.0)
    resumed = LossGuard(config)
    resumed.restore(json.loads(json.dumps(first.state())))
    assert [
        resumed.judge(cut + index, loss, 1.0) for index, loss in enumerate(losses[cut:])
    ] == verdicts[cut:]
    assert resumed.state() == whole.state()


def test_its_state_is_plain_json_whatever_the_losses() -> None:
    judge = guard([math.pi, 1e-300], on_nan="skip")
    judge.judge(3, NAN, INF)
    text = json.dumps(judge.state(), allow_nan=False)
    restored = LossGuard(GuardConfig(on_nan="skip"))
    restored.restore(json.loads(text))
    assert restored.state() == judge.state()
