"""Words for a schedule that does not get through: who waits for whom, why, and the remedy."""

from __future__ import annotations

from typing import NamedTuple

from .actions import Action
from .messages import Message, takers
from .rendezvous import Clash, Discipline, Rendezvous, rendezvous
from .replay import circle_of
from .schedule import Position, Schedule

# How to move messages so that a schedule gets through which does so under that discipline.
_REMEDY = {
    Discipline.BUFFERED: "sends that return at once, receives posted ahead and matched by name",
    Discipline.BATCHED: "the sends and receives between two steps as one group",
    Discipline.IN_ORDER: "sends that return at once and one queue a pair of ranks",
    Discipline.BLOCKING: "plain send and recv",
}


class Standstill(NamedTuple):
    """Why a schedule does not get through.

    Attributes:
        position: the first step to look at.
        action: its action whose message does not travel.
        message: what happens there, in several lines.
        also: the other steps that take part.
    """

    position: Position
    action: Action
    message: str
    also: tuple[Position, ...]


def standstill(schedule: Schedule, outcome: Rendezvous) -> Standstill:
    """Explain a rendezvous of `schedule` that does not complete."""
    if outcome.clashes:
        clash = outcome.clashes[0]
        taking_part = list(zip(sorted(_ends(clash.lower)), clash, strict=True))
        reason = _why_clashing(clash)
    else:
        awaited = {halt.rank: halt.awaited[0] for halt in outcome.halts}
        circle = circle_of({rank: _peer(message, rank) for rank, message in awaited.items()})
        taking_part = [(rank, awaited[rank]) for rank in circle]
        ranks = ", which waits for rank ".join(map(str, (*circle, circle[0])))
        reason = f"the circle: rank {ranks}"
    places = [_place(schedule, rank, message) for rank, message in taking_part]
    action, position = places[0]
    first, message = taking_part[0]
    what = "can never hand on what it made" if message.source == first else "can never start"
    lines = [
        f"{what}: {outcome.discipline} transfers stand still after {outcome.num_delivered} of "
        f"{outcome.num_messages} messages",
        *(_line(schedule, rank, message) for rank, message in taking_part),
        f"  {reason}",
        f"  {_remedy(schedule, outcome.discipline)}",
    ]
    return Standstill(position, action, "\n".join(lines), tuple(at for _, at in places))


def _why_clashing(clash: Clash) -> str:
    ranks = sorted(_ends(clash.lower))
    one, other = clash
    if one.source == other.source:
        sender, receiver = one.source, one.destination
        sent, expected = (one, other) if sender == ranks[0] else (other, one)
        return (
            f"rank {receiver} would take the message for another one: {sent} comes where it "
            f"expects {expected}; rank {sender} must send in the order in which rank {receiver} "
            "receives"
        )
    # Both cannot be receives: each rank would have to go on before it makes what the other waits
    # for, which is a deadlock however messages travel.
    return (
        f"the queue of ranks {ranks[0]} and {ranks[1]} is stuck: both send first, and each would "
        "have to receive first what the other sends"
    )


def _line(schedule: Schedule, rank: int, message: Message) -> str:
    """What a rank does and when, and when its peer would do its part."""
    peer = _peer(message, rank)
    action, at = _place(schedule, rank, message)
    there, then = _place(schedule, peer, message)
    if message.source == rank:
        return (
            f"  rank {rank}, after step {at.step} ({action}): sends {message} to rank {peer}, "
            f"which receives it before step {then.step} ({there})"
        )
    return (
        f"  rank {rank}, before step {at.step} ({action}): receives {message} from rank {peer}, "
        f"which sends it after step {then.step} ({there})"
    )


def _remedy(schedule: Schedule, failed: Discipline) -> str:
    others = [Discipline.BUFFERED]  # the schedule is known to verify
    others += [
        d for d in Discipline if d not in (*others, failed) and rendezvous(schedule, d).completes
    ]
    return "it gets through with " + "; or ".join(f"{d} transfers: {_REMEDY[d]}" for d in others)


def _place(schedule: Schedule, rank: int, message: Message) -> tuple[Action, Position]:
    """The action of `rank` that makes or needs a message, and where it stands."""
    if message.source == rank:
        return message.action, schedule.positions[message.action]
    places = schedule.positions
    action = next(a for a in takers(message.action, schedule.num_stages) if a in places)
    return action, places[action]


def _peer(message: Message, rank: int) -> int:
    return message.destination if message.source == rank else message.source


def _ends(message: Message) -> tuple[int, int]:
    return message.source, message.destination
