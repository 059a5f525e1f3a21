"""What a pipeline stage is handed with each micro-batch, and where it puts deferred work.

A *chunk* is one stage's share of one micro-batch. A stage whose `forward` has a parameter named
`chunk` receives the `Chunk` there; it hands `chunk.weight_grads` down to its linear layers, so that
the weight-gradient half of a backward (W) can run apart from the input-gradient half (I), and adds
auxiliary losses with `chunk.add_loss`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


class WeightGradQueue:
    """Weight-gradient work of one chunk, in the order in which its backward produced it.

    A layer's backward calls `put(work)`. In a full backward (B) the work runs at once; while
    `deferring` is set (I), it is kept until `run` (W). Either way it runs exactly once, so a split
    backward costs 1.0x the FLOPs of a full one.
    """

    def __init__(self) -> None:
        self.deferring = False
        self._work: deque[Callable[[], None]] = deque()

    def put(self, work: Callable[[], None]) -> None:
        """Take one piece of work; it must add its result to the parameter's gradient itself."""
        if self.deferring:
            self._work.append(work)
        else:
            work()

    def take(self) -> WeightGrads:
        """The deferred work, which is no longer in the queue then."""
        taken, self._work = self._work, deque()
        return WeightGrads(taken)

    def run(self) -> None:
        """Do the deferred work."""
        self.take().run()

    def __len__(self) -> int:
        return len(self._work)


class WeightGrads:
    """Weight-gradient work that was deferred."""

    def __init__(self, work: deque[Callable[[], None]] | None = None) -> None:
        self._work = work or deque()

    def run(self) -> None:
        """Do it once, first in first out, letting each piece's tensors go as it ends."""
        with torch.no_grad():
            while self._work:
                self._work.popleft()()


@dataclass
class Chunk:
    """One stage's share of one micro-batch.

    Attributes:
        stage: index of the stage, from 0 at the embedding.
        microbatch: index of the micro-batch within the step.
        training: False in forward-only evaluation; load statistics are not counted then.
        weight_grads: where linear layers put the weight-gradient half of their backward.
        losses: auxiliary losses added so far, (name, 0-dim tensor) in order.
    """

    stage: int = 0
    microbatch: int = 0
    training: bool = True
    weight_grads: WeightGradQueue = field(default_factory=WeightGradQueue)
    losses: list[tuple[str, Tensor]] = field(default_factory=list)

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add `value` (0-dim) to the loss of this micro-batch under `name` (such as "balance").

        The pipeline back-propagates it together with the chunk's outputs, with the same scale as
        the main loss, and reports it averaged over micro-batches.
        """
        if value.dim() != 0:
            raise ValueError(
                f"add_loss({name!r}): a 0-dim tensor is needed, got {tuple(value.shape)}"
            )
        self.losses.append((name, value))
