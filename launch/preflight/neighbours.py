"""Which node is slow: every node alone, with the next, and suspects with one that is well.

Nodes stand in a ring, and each measures with both of its neighbours. A link that is slow from one
side only is no node's fault. A node that is slow with both is a suspect, as is the good one between
two bad ones; so suspects measure once more, each with a node that is fast with some neighbour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Pair = tuple[int, int]


def rounds_of_pairs(num_nodes: int) -> list[list[Pair]]:
    """The ring's pairs, in rounds in which no node has two of them.

    Two nodes are one pair, one has none.
    """
    if num_nodes < 2:
        return []
    pairs = [(i, i + 1) for i in range(num_nodes - 1)]
    rounds = [pairs[0::2], pairs[1::2]]
    if num_nodes > 2:
        last = (0, num_nodes - 1)
        if num_nodes % 2:
            rounds.append([last])
        else:
            rounds[1].append(last)
    return [found for found in rounds if found]


def suspects(num_nodes: int, slow: set[Pair]) -> tuple[int, ...]:
    """Nodes that are slow with both neighbours."""
    if num_nodes < 3:
        return ()
    count = [0] * num_nodes
    for first, second in slow:
        count[first] += 1
        count[second] += 1
    return tuple(node for node, pairs in enumerate(count) if pairs == 2)


def rounds_of_second_look(num_nodes: int, slow: set[Pair]) -> list[list[Pair]]:
    """Each suspect with a node that is neither suspect nor its neighbour, in rounds.

    A suspect for which there is no such node has no second look.
    """
    suspected = suspects(num_nodes, slow)
    well = [node for node in range(num_nodes) if node not in suspected]

    def may(node: int, other: int) -> bool:
        return abs(node - other) not in (1, num_nodes - 1)

    waiting = [node for node in suspected if any(may(node, other) for other in well)]
    rounds: list[list[Pair]] = []
    while waiting:
        free, pairs, rest = list(well), list[Pair](), list[int]()
        for node in waiting:
            partner = next((other for other in free if may(node, other)), None)
            if partner is None:
                rest.append(node)
                continue
            free.remove(partner)
            pairs.append((min(node, partner), max(node, partner)))
        rounds.append(pairs)
        waiting = rest
    return rounds


def slow_nodes(
    num_nodes: int, slow: set[Pair], second_look: Mapping[Pair, bool]
) -> tuple[int, ...]:
    """The nodes at fault: suspects that were slow at the second look as well.

    Args:
        num_nodes: in the ring.
        slow: pairs of the ring that are.
        second_look: whether each pair of `rounds_of_second_look` was slow.
    """
    suspected = suspects(num_nodes, slow)
    if not second_look:
        return suspected
    cleared = {n for pair, is_slow in second_look.items() if not is_slow for n in pair}
    return tuple(node for node in suspected if node not in cleared)


def unexplained(slow: set[Pair], nodes: Sequence[int]) -> tuple[Pair, ...]:
    """Slow pairs of which neither node is known to be slow: a link between, or one of two nodes."""
    return tuple(sorted(pair for pair in slow if not set(pair) & set(nodes)))
