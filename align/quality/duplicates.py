"""Near duplicates: groups of texts that share most of their five-character pieces, found by MinHash (Broder 1997)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from align.errors import AlignError
from align.quality.texts import key

PIECE = 5
"""Characters in a piece."""
PERMUTATIONS = 128
BITS = 2048
"""Of what is kept of a text's pieces to see without them that another text shares too few."""
THRESHOLD = 0.7
"""Jaccard similarity of the pieces from which two texts are near duplicates: about one changed word in ten."""


class NearDuplicates:
    """Finds, for one text after another, the earlier texts that it nearly repeats.

    Candidates come from locality-sensitive hashing, tuned to miss few; each is then compared piece by piece, so none is wrong.

    Raises:
        AlignError: the threshold is not between 0 and 1; or the library is not installed.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        if not 0 < threshold <= 1:
            raise AlignError(f"threshold: got {threshold}, expected a similarity above 0 and up to 1")
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise AlignError("near duplicates need the package datasketch: pip install 'align[quality]'") from None
        from xxhash import xxh32_intdigest

        self._hash = xxh32_intdigest
        self.threshold = threshold
        self._empty = MinHash(PERMUTATIONS, hashfunc=xxh32_intdigest)
        self._index: Any = MinHashLSH(max(threshold - 0.1, 0.05), PERMUTATIONS, weights=(0.2, 0.8))
        self._texts: list[str] = []
        self._folded: list[tuple[int, int]] = []
        self._first: dict[str, int] = {}

    def add(self, text: str, worth: Callable[[int], bool] = lambda other: True) -> Iterator[int]:
        """Numbers of the earlier texts that `text` nearly repeats, in order; of equal ones only the first is compared.

        Args:
            worth: whether an earlier text, by its number, matters by now. Of texts in one wording every one is a candidate, and
                to compare each with all before it took hours for some thousands: one that does not matter is not compared.
        """
        number, text = len(self._texts), key(text)
        self._texts.append(text)
        if text in self._first:
            self._folded.append(self._folded[self._first[text]])
            return filter(worth, [self._first[text]])
        self._first[text] = number
        mine = pieces(text)
        self._folded.append((len(mine), self._fold(mine)))
        sketch = self._empty.copy()
        # Texts with other numbers share no piece of their sketches, so thousands of sums in one wording are no candidates.
        said = " ".join(numbers(text))
        sketch.update_batch([f"{piece}{said}".encode() for piece in mine])
        candidates = sorted(self._index.query(sketch))
        self._index.insert(number, sketch, check_duplication=False)
        return (
            other
            for other in candidates
            if worth(other) and self._may_repeat(number, other) and self._repeats(text, mine, self._texts[other])
        )

    def _fold(self, found: set[str]) -> int:
        """`BITS` bits, each turned over by every piece that falls on it."""
        bits = 0
        for piece in found:
            bits ^= 1 << self._hash(piece.encode()) % BITS
        return bits

    def _may_repeat(self, number: int, other: int) -> bool:
        """Whether what is kept of the pieces leaves room for the threshold. Thousands of texts in one wording are candidates for
        each other, and to take them all to pieces again took hours.

        A bit that differs is at least one piece that only one of them has; if d of them differ, the similarity of texts of m and
        n pieces is (m + n - d) / (m + n + d) at most.
        """
        (m, mine), (n, its) = self._folded[number], self._folded[other]
        d = (mine ^ its).bit_count()
        return (m + n - d) / (m + n + d) >= self.threshold

    def _repeats(self, text: str, mine: set[str], other: str) -> bool:
        """Whether the texts are as similar as that, and speak of the same numbers: 12 + 7 is another question than 12 + 8."""
        return numbers(text) == numbers(other) and similarity(mine, pieces(other)) >= self.threshold


def numbers(text: str) -> list[str]:
    """The numbers among the words of `text`."""
    return [word for word in text.split() if word.isdigit()]


def pieces(text: str) -> set[str]:
    """Every run of five characters."""
    return {text[i : i + PIECE] for i in range(max(len(text) - PIECE + 1, 1))}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard similarity: what is shared, as a part of all."""
    return len(one & other) / len(one | other)


def leaders(
    texts: Iterable[str], threshold: float = THRESHOLD, also: Callable[[int, int], bool] = lambda number, other: True
) -> list[int]:
    """Of each text, the number of the first text of its group (its own, if it repeats none).

    A text joins the group of the first earlier text that it nearly repeats, so no group changes when texts are added behind.

    Args:
        also: whether two texts, by their numbers, are alike in what else counts.
    """
    seen = NearDuplicates(threshold)
    found: list[int] = []
    for number, text in enumerate(texts):
        earlier = next(seen.add(text, partial(also, number)), None)
        found.append(number if earlier is None else found[earlier])
    return found
