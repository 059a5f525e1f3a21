"""V-shaped schedules that repeat one building block: V-Half and V-Min."""

from __future__ import annotations

from collections.abc import Sequence

from ..schedule import Schedule
from .vee import Kind, Rule, Seat, run_clock

# Ticks from one micro-batch's block to the next: as many as a rank has actions for a micro-batch.
PERIOD = 6


def repeat_block(
    name: str,
    ranks: int,
    microbatches: int,
    limit: int,
    block: Sequence[tuple[int, int, int, int]],
) -> Schedule:
    """A building block repeated every six ticks, all of it moved to as early as it can go.

    As in arXiv 2405.15362, section 3 and appendix A, but by other means: here the block gives only
    the order in which a rank would do things, and a clock does them as soon as they are ready. Two
    exceptions keep ranks busy. Before its first input half a rank takes forwards of its first stage
    ahead of their turn, up to half of its limit. Weight halves take the ticks in which nothing else
    is ready, or come when a forward whose turn it is finds no room.

    Args:
        name: of the schedule.
        ranks: pipeline ranks.
        microbatches: micro-batches a step.
        limit: chunks that a rank may hold, from F to W; even.
        block: by rank, the ticks of micro-batch 0: F of the stage on the way down, F of that on the
            way up, I of that on the way up, I of that on the way down.
    """
    return run_clock(name, ranks, microbatches, limit, _rule(microbatches, limit, block))


def _rule(microbatches: int, limit: int, block: Sequence[tuple[int, int, int, int]]) -> Rule:
    f_down, f_up, i_up, _, w = Kind

    def rule(seat: Seat, ready: Sequence[Kind]) -> Kind | None:
        # Weight halves, the last kind, have no turn.
        turn = [t + PERIOD * n for t, n in zip(block[seat.rank], seat.done, strict=False)]
        left_down, left_up = seat.done[f_down] < microbatches, seat.done[f_up] < microbatches
        up_next = not left_down or (left_up and turn[f_up] < turn[f_down])
        forward, other = (f_up, f_down) if up_next else (f_down, f_up)
        # Were forwards free to overtake, chunks of one stage could take all the room of a rank and
        # leave none for the other stage, without which no backward begins.
        filling = not seat.done[i_up] and seat.chunks_down < limit - limit // 2
        best = None
        for kind in ready:
            if kind is w or (kind is other and not (kind is f_down and filling)):
                continue
            if best is None or turn[kind] < turn[best]:
                best = kind
        if w not in ready:
            return best
        blocked = seat.chunks >= limit and (left_down or left_up)
        if best is None or (blocked and turn[forward] < turn[best]):
            return w
        return best

    return rule
