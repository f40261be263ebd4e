"""Random numbers that are the same bits on every platform and with every library version: a counter hashed by integers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

__all__ = ["Stream", "noise", "scramble"]

_T = TypeVar("_T")
_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def scramble(value: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit integers whose output bits all depend on all input bits.

    Args:
        value: Any integer; its low 64 bits are used.

    Example:
        >>> hex(scramble(1))
        '0x5692161d100b05e5'
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


class Stream:
    """A stream of random integers that depends on nothing but its key (SplitMix64, Steele et al., OOPSLA 2014).

    Args:
        *key: Integers; streams of different keys are unrelated.

    Example:
        >>> stream = Stream(0, 7)
        >>> all(0 <= stream.below(10) < 10 for _ in range(100))
        True
        >>> Stream(0, 7).bits() == Stream(0, 7).bits()
        True
    """

    def __init__(self, *key: int) -> None:
        state = 0
        for word in key:
            state = scramble(state + scramble(word + _STEP) + _STEP)
        self._state = state

    def bits(self) -> int:
        """The next 64 random bits."""
        self._state = (self._state + _STEP) & _MASK
        return scramble(self._state)

    def below(self, stop: int) -> int:
        """A random integer in ``[0, stop)``; the bias is below ``stop / 2**64``."""
        return (self.bits() * stop) >> 64

    def between(self, low: int, high: int) -> int:
        """A random integer in ``[low, high]``."""
        return low + self.below(high - low + 1)

    def chance(self, numerator: int, denominator: int) -> bool:
        """True with probability ``numerator / denominator``."""
        return self.below(denominator) < numerator

    def choice(self, items: Sequence[_T]) -> _T:
        """One of the items, all equally likely."""
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[tuple[_T, int]]) -> _T:
        """One of the items of ``(item, weight)`` pairs; weights are integers."""
        ticket = self.below(sum(weight for _, weight in items))
        for item, weight in items:
            if ticket < weight:
                return item
            ticket -= weight
        raise AssertionError("the weights were changed while one was drawn")

    def shuffled(self, items: Sequence[_T]) -> list[_T]:
        """The items in random order."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random 64-bit integers on a grid, a hash of the seed and the position.

    Args:
        seed: Any integer; its low 64 bits are used.
        shape: Shape of the grid.

    Shape:
        - returns ``shape``, uint64.

    Example:
        >>> noise(3, (2, 2)).dtype
        dtype('uint64')
    """
    count = int(np.prod(shape, dtype=np.int64))
    with np.errstate(over="ignore"):
        value = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_STEP)) + np.uint64(seed & _MASK)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
        value = value ^ (value >> np.uint64(31))
    return value.reshape(shape)
