"""Sizes that the engine and its model share. No torch."""

from __future__ import annotations

from collections.abc import Sequence

# Fewer tokens than this make no piece of their own: a message's latency would outweigh what
# forwarding it early gains.
TOKENS_A_PIECE = 256


def num_pieces(most_tokens: int, chunks: int) -> int:
    """Pieces in which two hops work: `chunks`, or one where they would be too small.

    Args:
        most_tokens: of any rank of the expert group.
    """
    return chunks if most_tokens // chunks >= TOKENS_A_PIECE else 1


def slot_bytes(num_slots: int) -> int:
    """Bytes of a slot's index in a record: int16 as long as that is enough, then int32."""
    return 2 if num_slots <= 1 << 15 else 4


def record_starts(parts: Sequence[tuple[int, int]]) -> list[int]:
    """Where each part of a record begins, at a multiple of its item's size; and where it ends.

    Args:
        parts: (bytes of an item, columns) of each part.

    Returns:
        One number for each part, and the record's width, at a multiple of the largest item.
    """
    starts, end = [], 0
    for item, columns in parts:
        start = _round_up(end, item)
        starts.append(start)
        end = start + columns * item
    return [*starts, _round_up(end, max(item for item, _ in parts))]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
