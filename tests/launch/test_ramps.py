"""Learning rate, batch size and weights as functions of the step."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.launch.config import ScheduleConfig, TrainConfig
from counterflow.launch.ramps import bias_update_speed, learning_rate, microbatches, mtp_weight


def test_the_learning_rate_of_deepseek_v3_in_steps_of_a_thousandth() -> None:
    """0 to 2.2e-4, constant, cosine to 2.2e-5, constant, 7.3e-6 (arXiv 2412.19437, section 4.2)."""
    train = TrainConfig(
        steps=14800,
        lr=2.2e-4,
        lr_min=2.2e-5,
        lr_final=7.3e-6,
        warmup_steps=2000,
        constant_steps=8000,
        cosine_steps=4300,
        final_steps=167,
    )
    assert learning_rate(0, train) == 2.2e-4 / 2000
    assert learning_rate(999, train) == pytest.approx(1.1e-4)
    assert learning_rate(1999, train) == learning_rate(10000, train) == 2.2e-4
    middle = learning_rate(10000 + 2150, train)
    assert middle == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert learning_rate(14300, train) == learning_rate(14632, train) == 2.2e-5
    assert learning_rate(14633, train) == learning_rate(14799, train) == 7.3e-6


@settings(deadline=None)  # other processes share the machine
@given(
    steps=st.integers(1, 400),
    warmup=st.integers(0, 50),
    constant=st.integers(0, 50),
    cosine=st.none() | st.integers(0, 100),
)
def test_the_learning_rate_rises_then_falls_and_stays_within_its_limits(
    steps: int, warmup: int, constant: int, cosine: int | None
) -> None:
    warmup = min(warmup, steps)
    train = TrainConfig(
        steps=steps,
        lr=1.0,
        lr_min=0.1,
        warmup_steps=warmup,
        constant_steps=constant,
        cosine_steps=cosine,
    )
    rates = [learning_rate(step, train) for step in range(steps)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising)
    assert all(rate > 0 for rate in rising)
    assert falling == sorted(falling, reverse=True)
    assert all(0.1 <= rate <= 1.0 and math.isfinite(rate) for rate in falling)


@settings(deadline=None)  # other processes share the machine
@given(
    start=st.integers(1, 40).map(lambda n: 2 * n),
    more=st.integers(0, 40).map(lambda n: 2 * n),
    steps=st.integers(1, 100),
)
def test_the_batch_ramp_rises_in_multiples_from_its_start_to_the_full_batch(
    start: int, more: int, steps: int
) -> None:
    train = TrainConfig(ramp_start=start, ramp_steps=steps)
    schedule = ScheduleConfig(microbatches=start + more)
    counts = [microbatches(step, train, schedule, 2) for step in range(steps + 2)]
    assert counts[0] == start
    assert counts == sorted(counts)
    assert counts[-2:] == [start + more] * 2
    assert all(count % 2 == 0 for count in counts)


def test_without_a_ramp_every_step_has_the_full_batch() -> None:
    assert microbatches(0, TrainConfig(), ScheduleConfig(microbatches=6), 2) == 6


def test_the_weights_switch_where_told_or_at_the_share_of_deepseek_v3() -> None:
    shares = TrainConfig(steps=1480, bias_update_speed=1e-3)
    assert [mtp_weight(step, shares) for step in (0, 999, 1000, 1479)] == [0.3, 0.3, 0.1, 0.1]
    speeds = [bias_update_speed(step, shares) for step in (0, 1429, 1430, 1479)]
    assert speeds == [1e-3, 1e-3, 0.0, 0.0]
    told = TrainConfig(steps=1480, mtp_switch_step=3, bias_stop_step=0)
    assert [mtp_weight(step, told) for step in (2, 3)] == [0.3, 0.1]
    assert bias_update_speed(0, told) == 0.0
