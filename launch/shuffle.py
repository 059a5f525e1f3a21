"""A shuffle of 0 .. size - 1 that is computed place by place, without a table of the whole.

A Feistel network over the next even number of bits is a bijection whatever its round function is;
walking the cycle until it falls inside the range makes it one of the range (format-preserving
encryption's cycle walking). The same on every machine and with every numpy.
"""

from __future__ import annotations

_ROUNDS = 6
_MASK = (1 << 64) - 1


def shuffled(place: int, size: int, seed: int, epoch: int) -> int:
    """The element at `place` of the shuffle of range(size) that belongs to (seed, epoch)."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    key = _mix(_mix(seed & _MASK) ^ epoch)
    value = place
    while True:
        left, right = value >> half, value & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key + (number << 58) + right) & mask)
        value = left << half | right
        if value < size:
            return value


def _mix(x: int) -> int:
    """A 64-bit hash with good avalanche (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
