"""Judges each step's loss and gradient norm: update, skip it, roll back, or stop.

A function of the losses alone, so all ranks, which see the same ones, judge alike, and a run that
goes on from a checkpoint judges as the uninterrupted one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from .section import GuardConfig

Action = Literal["update", "skip", "rollback", "stop"]

_FEWEST = 20  # losses before a spike is judged, if the window holds so many
_FLOOR = 0.01  # of the mean: a smaller standard deviation counts as this, or a flat curve spikes
_TOLD = 5  # events that a reason to stop tells of


class Verdict(NamedTuple):
    """What to do with a step.

    Attributes:
        action: "update" the parameters; "skip": leave them; "rollback": back to the last
            checkpoint, and on with the batches after this one; "stop": end with an error.
        reason: one line; "" for "update".
    """

    action: Action
    reason: str


class LossGuard:
    """Judges the steps of a run, one after another.

    A loss or norm that is not finite is an event for `on_nan`. A loss above mean + sigma * standard
    deviation of the last `window` losses that led to an update is one for `on_spike`; the standard
    deviation counts as 1 % of the mean at least, and a spike is judged from 20 losses on (or a full
    window, if that is less). One event more than `max_events` stops the run.

    Args:
        config: the section [guard].
    """

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=config.window)
        self._num_events = 0
        self._last_events: deque[str] = deque(maxlen=_TOLD)

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """The verdict on a step whose loss is `loss`, nats, and gradient norm `norm`.

        To be called once for each step, in order.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            wanted, what = self._config.on_nan, f"loss {loss:g}, gradient norm {norm:g}"
        elif self._config.on_spike != "ignore" and (spike := self._spike(loss)):
            wanted, what = self._config.on_spike, spike
        else:
            self._losses.append(loss)
            return Verdict("update", "")
        assert wanted != "ignore"
        if wanted == "stop":
            return Verdict("stop", f"step {step}: {what}")
        self._num_events += 1
        self._last_events.append(f"step {step}: {what}")
        limit = self._config.max_events
        if self._num_events > limit:
            events = "; ".join(self._last_events)
            count = f"{self._num_events} steps with bad losses (guard.max_events = {limit})"
            return Verdict("stop", f"{count}: {events}")
        return Verdict(wanted, f"{what} (event {self._num_events} of {limit} at most)")

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON."""
        return {
            "losses": list(self._losses),
            "num_events": self._num_events,
            "last_events": list(self._last_events),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state()` was taken."""
        self.roll_back(state)
        self._num_events = int(state["num_events"])
        self._last_events = deque(state["last_events"], maxlen=_TOLD)

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Judge by the losses of when `state()` was taken, which those since no longer follow.

        Events stay counted: if they were forgotten, a run could go back for ever.
        """
        self._losses = deque(state["losses"], maxlen=self._config.window)

    def _spike(self, loss: float) -> str:
        """What is wrong with this finite loss, "" if nothing is."""
        losses, sigma = self._losses, self._config.spike_sigma
        if len(losses) < min(_FEWEST, self._config.window):
            return ""
        # fsum: exact, so the same whatever the order; no running sums that drift.
        mean = math.fsum(losses) / len(losses)
        variance = math.fsum((value - mean) ** 2 for value in losses) / len(losses)
        deviation = max(math.sqrt(variance), _FLOOR * abs(mean))
        limit = mean + sigma * deviation
        if loss <= limit:
            return ""
        return (
            f"loss {loss:g} is above {limit:g}, {sigma:g} standard deviations over the mean "
            f"{mean:g} of the last {len(losses)}"
        )
