"""A reward tried on completions before anything is trained on it: what its values look like, and what would go wrong."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.errors import AlignError
from align.rewards.composition import RewardSet
from align.rewards.protocol import short, text_of

BARS = 10
"""Bars of a histogram."""

TOTAL = "total"


@dataclass(frozen=True)
class Summary:
    """One reward's values, or their total's. Shares are of all completions; statistics are over those that have a value."""

    name: str
    scored: int
    abstained: float
    """Share, failures that count as abstentions left out."""
    failed: float
    mean: float | None = None
    deviation: float | None = None
    lowest: float | None = None
    highest: float | None = None
    length_correlation: float | None = None
    """Pearson's correlation with the number of words in the completion; None where one of them does not vary."""
    histogram: tuple[tuple[float, float, int], ...] = ()
    """From, up to, how many."""
    separates: float | None = None
    """Share of pairs whose chosen completion has the higher value, ties counted half; None without pairs."""


@dataclass(frozen=True)
class Trial:
    """What `run_trial` found."""

    completions: int
    pairs: int
    seconds: float
    """Of the first call."""
    per_second: float
    """Completions."""
    deterministic: bool
    """Whether a second call gave the same."""
    difference: str | None
    """The first value that was another one."""
    failure: str | None
    """The first failure that was forgiven."""
    components: tuple[Summary, ...]


def run_trial(
    rewards: RewardSet,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    *,
    pairs: int = 0,
    **more: Any,
) -> Trial:
    """Score `completions` twice.

    Args:
        pairs: so many first completions are chosen ones; as many rejected ones follow, in the same order.
        more: further arguments of `RewardSet.measure`.

    Raises:
        AlignError: as `RewardSet.measure`; of an exception, the row that causes it is named.
    """
    start = time.perf_counter()
    try:
        components, failures = rewards.measure(prompts, completions, columns, **more)
    except AlignError as error:
        raise _located(error, rewards, prompts, completions, columns, more) from error
    seconds = time.perf_counter() - start
    again, _ = rewards.measure(prompts, completions, columns, **more)
    difference = _difference(components, again, prompts)
    words = [len(text_of(completion).split()) for completion in completions]
    described = []
    for name, values in components.items():
        failed = len(failures.get(name, []))
        abstained = values.count(None) - (failed if rewards.components[name].spec.on_error == "abstain" else 0)
        described.append(_component(name, values, words, abstained, failed, pairs))
    totals = rewards.totals(components)
    if totals != next(iter(components.values())):
        described.append(_component(TOTAL, totals, words, totals.count(None), 0, pairs))
    first = next((failed[0] for failed in failures.values()), None)
    per_second = len(completions) / max(seconds, 1e-9)
    return Trial(len(completions), pairs, seconds, per_second, difference is None, difference, first, tuple(described))


def _component(name: str, values: Sequence[float | None], words: Sequence[int], abstained: int, failed: int, pairs: int) -> Summary:
    shares = (abstained / len(values), failed / len(values))
    kept = [(value, count) for value, count in zip(values, words, strict=True) if value is not None]
    if not kept:
        return Summary(name, 0, *shares)
    numbers = [value for value, _ in kept]
    counts = [count for _, count in kept]
    varied = len(set(numbers)) > 1 and len(set(counts)) > 1
    return Summary(
        name,
        len(kept),
        *shares,
        statistics.fmean(numbers),
        statistics.pstdev(numbers),
        min(numbers),
        max(numbers),
        statistics.correlation(numbers, counts) if varied else None,
        histogram(numbers),
        _separation(values, pairs),
    )


def histogram(values: Sequence[float]) -> tuple[tuple[float, float, int], ...]:
    """Equal steps from the lowest to the highest value; one bar for each value where they are few."""
    distinct = sorted(set(values))
    if len(distinct) <= BARS:
        return tuple((value, value, values.count(value)) for value in distinct)
    low, step = distinct[0], (distinct[-1] - distinct[0]) / BARS
    counts = [0] * BARS
    for value in values:
        counts[min(int((value - low) / step), BARS - 1)] += 1
    return tuple((low + i * step, low + (i + 1) * step, count) for i, count in enumerate(counts))


def _separation(values: Sequence[float | None], pairs: int) -> float | None:
    both = [(c, r) for c, r in zip(values[:pairs], values[pairs : 2 * pairs], strict=True) if c is not None and r is not None]
    return sum((c > r) + (c == r) / 2 for c, r in both) / len(both) if both else None


def _difference(one: Mapping[str, Sequence[Any]], other: Mapping[str, Sequence[Any]], prompts: Sequence[Any]) -> str | None:
    for name, values in one.items():
        for row, (a, b) in enumerate(zip(values, other[name], strict=True)):
            if a != b:
                return f"{name}, row {row} (prompt {short(prompts[row])}): {a} and then {b}"
    return None


def _located(
    error: AlignError, rewards: RewardSet, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any], more: Any
) -> AlignError:
    """`error`, and which row raises it alone, where it comes from an exception."""
    if error.__cause__ is None:
        return error
    for row, prompt in enumerate(prompts):
        one = {key: None if value is None else [value[row]] for key, value in more.items()}
        try:
            rewards.measure([prompt], [completions[row]], {key: [value[row]] for key, value in columns.items()}, **one)
        except AlignError as alone:
            return AlignError(f"{alone} (row {row}, prompt {short(prompt)})")
    return AlignError(f"{error} (on {len(prompts)} completions together; on none of them alone)")
