"""Pairs that speak against what the rest of them agrees on: a hint at swapped labels, from words alone."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence

from align.quality.texts import texts, words
from align.schema import PreferenceRow

FOLDS = 5
AGREEMENT = 0.7
"""Share of pairs that the words of the others must get right before they are believed."""
FEWEST = 100
MOST = 2000
"""Pairs looked at."""


def suspicious(pairs: Sequence[PreferenceRow]) -> list[int]:
    """Indices of the pairs whose words say clearly that the rejected answer is the better one.

    A word's weight is the logarithm of its odds to be in the chosen answer only, against the rejected one only, in the pairs of the
    other folds (naive Bayes), less what those odds are for all words, so that length says nothing. Where that ranks less than 70 %
    of the pairs right, or there are fewer than 100, words say nothing here and no pair is suspicious. Clearly means: by more than
    half of what a typical pair is ranked right by.
    """
    if len(pairs) < FEWEST:
        return []
    pairs = pairs[:MOST]
    sides = [(set(words(said["chosen"])), set(words(said["rejected"]))) for said in map(texts, pairs)]
    folds = [_fold(pair) for pair in pairs]
    scores = [0.0] * len(pairs)
    for fold in range(FOLDS):
        chosen: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        for (good, bad), other in zip(sides, folds, strict=True):
            if other != fold:
                chosen.update(good - bad)
                rejected.update(bad - good)
        length = math.log((chosen.total() + 1) / (rejected.total() + 1))
        weights = {word: math.log((chosen[word] + 1) / (rejected[word] + 1)) - length for word in chosen.keys() | rejected.keys()}
        for i, (good, bad) in enumerate(sides):
            if folds[i] == fold:
                scores[i] = sum(weights.get(word, 0.0) for word in good - bad) - sum(weights.get(word, 0.0) for word in bad - good)
    right = sorted(score for score in scores if score > 0)
    if not scores or len(right) / len(scores) < AGREEMENT:
        return []
    clear = right[len(right) // 2] / 2
    return [i for i, score in enumerate(scores) if score < -clear]


def _fold(pair: PreferenceRow) -> int:
    digest = hashlib.sha256("\n".join(texts(pair).values()).encode()).digest()
    return digest[0] % FOLDS
