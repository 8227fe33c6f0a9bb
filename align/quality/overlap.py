"""Decontamination: training rows that repeat what an evaluation asks, by n-gram overlap (as Brown et al., arXiv:2005.14165, C)."""

from __future__ import annotations

from collections.abc import Iterable

from align.quality.texts import ngrams, words

N = 13
"""Words in a run that is taken as a repetition."""
SHORTEST = 5
"""A text of fewer words is no evidence when it is found inside another; it must be all of it."""


class Overlap:
    """The runs of `n` words in evaluation texts. A text of fewer words is one run, of all its words.

    >>> Overlap(["Who wrote the letter to the king in May?"]).with_text("... who wrote the letter to the king, in May ...")
    'who wrote the letter to the king in may'
    """

    def __init__(self, texts: Iterable[str], n: int = N) -> None:
        self._runs: dict[int, set[str]] = {}
        self._short: set[str] = set()
        for text in texts:
            said = words(text)
            if len(said) < SHORTEST:
                self._short.add(" ".join(said))
            else:
                size = min(n, len(said))
                self._runs.setdefault(size, set()).update(ngrams(said, size))

    def with_text(self, text: str) -> str | None:
        """The first run that `text` has in common with the evaluation texts, or None."""
        said = words(text)
        if said and " ".join(said) in self._short:
            return " ".join(said)
        for size, runs in self._runs.items():
            for run in ngrams(said, size):
                if run in runs:
                    return run
        return None
