"""Splits that leak neither copies nor near copies of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from align.data import first_prompt, split_by_prompt
from align.quality.duplicates import THRESHOLD, NearDuplicates
from align.schema import Row

AnyRow = TypeVar("AnyRow", bound=Row)


@dataclass(frozen=True)
class Split(Generic[AnyRow]):
    """The rows of a split; every row is in exactly one list."""

    train: list[AnyRow]
    held_out: list[AnyRow]
    between: list[AnyRow]
    """Nearly repeat prompts of both sides, so on either they would leak."""


def split_rows(rows: Sequence[AnyRow], held_out: float, seed: int = 0, threshold: float = THRESHOLD) -> Split[AnyRow]:
    """`rows` in two parts, about `held_out` (0 to 1) of the groups of near-duplicate prompts in the second one.

    A group goes where `align.data.split_by_prompt` sends its first row. Rows that are added behind change no earlier row's side:
    one that would join two groups of different sides is left out of both.

    Raises:
        AlignError: `held_out` is not in [0, 1), or `threshold` not in (0, 1].
    """
    seen = NearDuplicates(threshold)
    sides: list[set[bool]] = []  # of each row, on which sides its prompt, or one that it nearly repeats, is; two when between
    split: Split[AnyRow] = Split([], [], [])

    def adds_to(side: set[bool], other: int) -> bool:
        return not sides[other] <= side

    for row in rows:
        side: set[bool] = set()
        for number in seen.add(first_prompt(row), partial(adds_to, side)):
            side |= sides[number]
        side = side or {bool(split_by_prompt([row], held_out, seed)[1])}
        sides.append(side)
        (split.between if len(side) > 1 else split.held_out if True in side else split.train).append(row)
    return split
