"""Metrics of reward models on pairs, and pairwise win rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from align.errors import AlignError
from align.metrics.base import metrics, package


@metrics.add
def ranking_accuracy(chosen_scores: Sequence[float], rejected_scores: Sequence[float]) -> dict[str, float]:
    """Share of pairs whose chosen answer scores higher; a tie counts one half."""
    return {"ranking_accuracy": sum(preferences("ranking_accuracy", chosen_scores, rejected_scores)) / len(chosen_scores)}


@metrics.add
def calibration_error(chosen_scores: Sequence[float], rejected_scores: Sequence[float], *, bins: int = 10) -> dict[str, float]:
    """Expected calibration error of a reward model as a Bradley-Terry classifier (Guo et al. 2017, arXiv:1706.04599, equation 5).

    Its confidence is the sigmoid of the absolute difference of scores, between 1/2 and 1, in `bins` of equal width.
    """
    if bins < 1:
        raise AlignError(f"metric 'calibration_error': bins={bins}, expected at least 1")
    held: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    rights = preferences("calibration_error", chosen_scores, rejected_scores)
    for chosen, rejected, right in zip(chosen_scores, rejected_scores, rights, strict=True):
        confidence = 1 / (1 + math.exp(-min(abs(chosen - rejected), 700)))
        held[min(int((confidence - 0.5) * 2 * bins), bins - 1)].append((confidence, right))
    gaps = [abs(sum(confidence - right for confidence, right in entries)) for entries in held]
    return {"calibration_error": sum(gaps) / len(chosen_scores)}


@metrics.add
def length_bias(
    chosen_scores: Sequence[float],
    rejected_scores: Sequence[float],
    chosen_lengths: Sequence[float],
    rejected_lengths: Sequence[float],
) -> dict[str, float]:
    """How far scores follow length: the Pearson correlation of score difference and length difference over the pairs, the share of
    pairs of unequal length whose longer answer scores higher, and for comparison the share whose longer answer was chosen.
    """
    preferences("length_bias", chosen_scores, rejected_scores)  # refuses what is no number
    pairs = list(zip(chosen_scores, rejected_scores, chosen_lengths, rejected_lengths, strict=True))
    margins, gaps = [a - b for a, b, _, _ in pairs], [c - d for _, _, c, d in pairs]
    unequal = [(margin if gap > 0 else -margin, gap > 0) for margin, gap in zip(margins, gaps, strict=True) if gap]
    result = {"length_correlation": _correlation(margins, gaps)}
    if unequal:
        result["longer_preferred"] = sum(_preference(margin, 0.0) for margin, _ in unequal) / len(unequal)
        result["longer_chosen"] = sum(longer for _, longer in unequal) / len(unequal)
    return result


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's; 0 where one side does not vary."""
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    deviations = math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))
    return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / deviations if deviations else 0.0


def preferences(metric: str, ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each pair of scores, whether the first is the higher one (0, 1/2 or 1).

    Raises:
        AlignError: their difference is no number, so neither is.
    """
    for i, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if math.isnan(own - other):
            raise AlignError(f"metric {metric!r}: pair {i} has the scores {own} and {other}, expected numbers")
    return list(map(_preference, ours, theirs))


def _preference(ours: float, theirs: float) -> float:
    return 0.5 if ours == theirs else float(ours > theirs)


@metrics.add
def win_rate(
    scores: Sequence[float],
    baseline_scores: Sequence[float],
    lengths: Sequence[float],
    baseline_lengths: Sequence[float],
    *,
    resamples: Annotated[int, Field(gt=0)] = 1000,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> dict[str, float]:
    """How often an answer beats the baseline's to the same prompt (a tie counts one half), with 95 % bootstrap intervals.

    `scores` may be those of a reward model or a gold function, or a judge's probability of preferring the answer with the
    baseline's set to 1/2. ``win_rate_length_controlled`` is the win rate that a logistic regression on the length difference
    predicts for answers of the baseline's length: the length term of AlpacaEval 2 (arXiv:2404.04475, equation 2).
    """
    wins = preferences("win_rate", scores, baseline_scores)
    gaps = [ours - theirs for ours, theirs in zip(lengths, baseline_lengths, strict=True)]

    def controlled(indices: Sequence[int]) -> float:
        return length_controlled([wins[i] for i in indices], [gaps[i] for i in indices])

    result = {"win_rate": sum(wins) / len(wins)}
    result["win_rate_low"], result["win_rate_high"] = interval(
        lambda indices: sum(wins[i] for i in indices) / len(indices), len(wins), resamples, seed
    )
    result["win_rate_length_controlled"] = controlled(range(len(wins)))
    low, high = interval(controlled, len(wins), min(resamples, 200), seed)
    return {**result, "win_rate_length_controlled_low": low, "win_rate_length_controlled_high": high}


def length_controlled(wins: Sequence[float], gaps: Sequence[float]) -> float:
    """The win rate that a logistic regression of `wins` (0, 1/2 or 1) on tanh(gap / its deviation) predicts at gap 0.

    The slope is held by an L2 penalty of one observation (scikit-learn's default); the intercept is free.
    """
    if len(set(wins)) == 1:
        return wins[0]
    scale = math.sqrt(sum(gap * gap for gap in gaps) / len(gaps)) or 1.0
    x = [[math.tanh(gap / scale)] for gap in gaps]
    regression = package("sklearn.linear_model").LogisticRegression()
    weights = [*wins, *(1 - win for win in wins)]  # a tie is half a win and half a loss
    regression.fit([*x, *x], [1] * len(wins) + [0] * len(wins), sample_weight=weights)
    return float(regression.predict_proba([[0.0]])[0, 1])


def interval(statistic: Callable[[Sequence[int]], float], count: int, resamples: int, seed: int) -> tuple[float, float]:
    """The 95 % interval of `statistic` over resampled indices of `count` rows, by the percentile bootstrap (Efron 1979)."""
    import numpy

    draw = numpy.random.default_rng(seed)
    values: Any = [statistic(draw.integers(count, size=count).tolist()) for _ in range(resamples)]
    low, high = numpy.quantile(values, [0.025, 0.975])
    return float(low), float(high)
