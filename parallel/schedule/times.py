"""How long each step takes and each message travels, once it is known how many stages there are."""

from __future__ import annotations

from dataclasses import dataclass

from .actions import Op, Pair, Step


@dataclass(frozen=True)
class Times:
    """Times of the steps of a pipeline, by stage, all in one unit.

    What a user writes is `simulate.Costs`; this is what it comes to for one number of stages. B is
    the full backward.

    Attributes:
        F, I, W, B: time of each kind of action, one entry a stage.
        pair: time of a pair, by the stage of its forward and then the stage of its backward.
        send: from the end of a message's transfer until it has arrived on another rank.
        occupy: how long the message between stages s and s + 1, in either direction, keeps the
            sending lane of its rank busy; one entry a boundary. All 0: messages never queue.
    """

    F: tuple[float, ...]
    I: tuple[float, ...]  # noqa: E741  the field's name for the input-gradient half
    W: tuple[float, ...]
    B: tuple[float, ...]
    pair: tuple[tuple[float, ...], ...]
    send: float = 0.0
    occupy: tuple[float, ...] = ()

    @classmethod
    def uniform(
        cls,
        stages: int,
        *,
        F: float = 1.0,
        I: float = 1.0,  # noqa: E741
        W: float = 1.0,
        pair: float | None = None,
        send: float = 0.0,
    ) -> Times:
        """The same times for every stage; B is I + W, and a pair F + B where it is not given."""
        both = F + I + W if pair is None else pair
        return cls(
            (F,) * stages,
            (I,) * stages,
            (W,) * stages,
            (I + W,) * stages,
            ((both,) * stages,) * stages,
            send,
            (0.0,) * (stages - 1),
        )

    @property
    def num_stages(self) -> int:
        return len(self.F)

    def of(self, step: Step) -> float:
        """Time that a rank is busy with `step`."""
        if isinstance(step, Pair):
            return self.pair[step.forward.stage][step.backward.stage]
        op, stage = step.op, step.stage
        if op is Op.F:
            return self.F[stage]
        if op is Op.B:
            return self.B[stage]
        return self.I[stage] if op is Op.I else self.W[stage]
