"""Mixtures of sources: how many rows of each, and which."""

from __future__ import annotations

import random
from collections.abc import Sequence


def shares(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many rows to take of each source, so that they stand to each other as `weights` and no row is taken twice: as many as
    the source that runs out first allows, and at least one of each.

    >>> shares([1000, 300], [0.5, 0.5])
    [300, 300]
    """
    whole = min(count / weight for count, weight in zip(counts, weights, strict=True))
    return [max(round(weight * whole), 1) for weight in weights]


def chosen(count: int, share: int, seed: int) -> bytearray:
    """Which `share` of `count` rows are taken: a byte for each, 1 if it is."""
    marks = bytearray(count)
    for place in random.Random(seed).sample(range(count), share):
        marks[place] = 1
    return marks
