"""Times that differ from rank to rank and from phase to phase, though the work is the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .loads import Floats

# Seeds of what is drawn by itself.
_SPEEDS, _COMPUTATION, _EXCHANGE = 2, 3, 4


@dataclass(frozen=True)
class Jitter:
    """How times vary. Factors are log-normal with mean 1, and independent; pauses are left out.

    Attributes:
        computation: the deviation of the logarithm of each phase's time on each rank, about its
            relative deviation.
        exchange: the same of each dispatch and combine of a group.
        speed: the same of how long ranks take for all their computation, throughout a step.
        stragglers: ranks (pp_rank * dp + dp_rank) with a factor on their computation's time.

    Raises:
        ValueError: a deviation below 0, or a factor that is not above 0.
    """

    computation: float = 0.0
    exchange: float = 0.0
    speed: float = 0.0
    stragglers: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("computation", "exchange", "speed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"jitter: {name}={value!r} must be a deviation from 0 up, such as 0.01"
                )
        for rank, factor in self.stragglers:
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(
                    f"jitter: rank {rank} is slower by the factor {factor!r}, which must be above "
                    "0, such as 1.1"
                )

    def noise(self, shape: tuple[int, int, int], seed: int) -> Noise:
        """What it comes to for some ranks.

        Args:
            shape: pipeline ranks, expert groups of each, ranks of each group.
            seed: of all that is drawn.

        Raises:
            ValueError: a straggler is no rank.
        """
        speeds: Floats | None = None
        if self.speed or self.stragglers:
            drawn = np.random.default_rng([seed, _SPEEDS]).standard_normal(shape)
            speeds = _factors(drawn, self.speed)
            for rank, factor in self.stragglers:
                if not 0 <= rank < speeds.size:
                    raise ValueError(
                        f"jitter: there is no rank {rank} of {speeds.size}, 0..{speeds.size - 1}"
                    )
                speeds.flat[rank] *= factor
        return Noise(self, shape[1:], speeds, seed)


class Noise:
    """Factors of times, drawn as they are asked for.

    Args:
        jitter: how times vary.
        shape: (g, R): expert groups, and ranks of each.
        speeds: [p, g, R], of each rank; None: all are alike.
        seed: of all that is drawn.
    """

    def __init__(
        self, jitter: Jitter, shape: tuple[int, int], speeds: Floats | None, seed: int
    ) -> None:
        self._jitter, self._shape, self._speeds = jitter, shape, speeds
        self._rng = _fast(seed, _COMPUTATION)
        self._exchange_rng = _fast(seed, _EXCHANGE)

    def computation(self, times: Floats, p: int) -> Floats:
        """[n, g, R], times of n phases of pipeline rank p, made to vary.

        Args:
            times: [n, g, R], or [n, 1, 1] where ranks are alike.
            p: pipeline rank.
        """
        if self._jitter.computation:
            drawn = self._rng.standard_normal((len(times), *self._shape))
            times = times * _factors(drawn, self._jitter.computation)
        return times if self._speeds is None else times * self._speeds[p]

    def exchange(self, ms: float | Floats, groups: int) -> float | Floats:
        """The time of a dispatch or combine, or [g, 1] times of them, made to vary."""
        if not self._jitter.exchange:
            return ms
        drawn = self._exchange_rng.standard_normal((groups, 1))
        return ms * _factors(drawn, self._jitter.exchange)


def _fast(seed: int, what: int) -> np.random.Generator:
    """SFC64 is the fastest of numpy's, and much of the simulation is drawing."""
    return np.random.Generator(np.random.SFC64([seed, what]))


def _factors(drawn: Floats, deviation: float) -> Floats:
    """Log-normal factors of standard normal numbers, in their place; the mean is 1."""
    drawn *= deviation
    drawn -= deviation * deviation / 2
    return np.exp(drawn, out=drawn)
