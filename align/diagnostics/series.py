"""What a training history says, as numbers that rules compare: levels, noise, and progress measured in learning rate."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeGuard

LARGEST = 1e100
"""What is larger is as good as infinite: sums of its squares, and the ends of an axis around it, soon are."""
UNITS = 2**1074
"""Every float is a whole number of these parts of one."""


def usable(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be reckoned with and drawn: neither NaN nor larger than `LARGEST`."""
    return isinstance(value, int | float) and abs(value) <= LARGEST


@dataclass(frozen=True)
class Series:
    """Logged values of one name, in the order of their steps; what is not `usable` is left out."""

    steps: tuple[float, ...]
    """Never falling."""
    values: tuple[float, ...]

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], name: str) -> Series:
        found = [(r["step"], r[name]) for r in records if usable(r.get(name))]
        return cls(tuple(step for step, _ in found), tuple(float(value) for _, value in found))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def first(self) -> float:
        return self.values[0]

    @property
    def last(self) -> float:
        return self.values[-1]

    def part(self, start: float, end: float = 1.0) -> list[float]:
        """The values from the share `start` of them to the share `end`, at least one."""
        low = min(int(start * len(self)), len(self) - 1)
        return list(self.values[low : max(low + 1, round(end * len(self)))])

    def head(self, share: float = 0.1) -> float:
        """Mean of the first `share`."""
        return statistics.fmean(self.part(0.0, share))

    def tail(self, share: float = 0.2) -> float:
        """Mean of the last `share`."""
        return statistics.fmean(self.part(1.0 - share))

    def after(self, step: float) -> Series:
        """What was logged later than `step`."""
        kept = [(s, v) for s, v in zip(self.steps, self.values, strict=True) if s > step]
        return Series(tuple(s for s, _ in kept), tuple(v for _, v in kept))

    def at(self, step: float) -> float:
        """The last value at or before `step`; the first where there is none."""
        return self.values[max(bisect_right(self.steps, step) - 1, 0)]

    @property
    def lowest(self) -> int:
        """Index of the smallest value."""
        return self.values.index(min(self.values))

    def smoothed(self, width: int = 0) -> Series:
        """Means over a window of `width` neighbours (a tenth of the series by default), shorter at both ends."""
        half = max(1, (width or len(self) // 10) // 2)
        # Differences of running sums, which are exact as whole numbers: a wild value leaves nothing in the means behind it.
        parts = (top * (UNITS // below) for top, below in map(float.as_integer_ratio, self.values))
        sums = list(accumulate(parts, initial=0))
        windows = ((max(0, i - half), min(len(self), i + half + 1)) for i in range(len(self)))
        return Series(self.steps, tuple((sums[end] - sums[begin]) / (UNITS * (end - begin)) for begin, end in windows))

    @property
    def noise(self) -> float:
        """Deviation of a value from the trend: robust, from differences of neighbours."""
        jumps = [abs(b - a) for a, b in zip(self.values, self.values[1:], strict=False)]
        return statistics.median(jumps) / (0.6745 * math.sqrt(2)) if jumps else 0.0

    @property
    def spread(self) -> float:
        """Standard deviation."""
        return statistics.pstdev(self.values) if len(self) > 1 else 0.0

    def slope(self) -> tuple[float, float]:
        """Least-squares change over the whole length, and its standard error."""
        n = len(self)
        if n < 4:
            return self.last - self.first, math.inf
        mean = statistics.fmean(self.values)
        xs = [i / (n - 1) - 0.5 for i in range(n)]
        square = sum(x * x for x in xs)
        slope = sum(x * (v - mean) for x, v in zip(xs, self.values, strict=True)) / square
        rest = sum((v - mean - slope * x) ** 2 for x, v in zip(xs, self.values, strict=True)) / (n - 2)
        return slope, math.sqrt(rest / square)


def spent(steps: tuple[float, ...], rates: Series) -> list[float]:
    """The sum of the learning rates up to each of `steps`, as a share of that up to the last; empty where it is 0."""
    total, before, sums = 0.0, rates.steps[0], []
    for step in steps:
        total += max(0.0, step - before) * rates.at(step)
        sums.append(total)
        before = step
    return [amount / total for amount in sums] if total else []


def learned_by(step: float, values: Series, rates: Series) -> float:
    """The share of all learning (of the sum of the learning rates) done by `step`; of the steps, where no rate is logged."""
    shares = spent(values.steps, rates) if len(rates) >= 3 else []
    done = [share for at, share in zip(values.steps, shares, strict=False) if at <= step]
    return done[-1] if done else step / values.steps[-1]


def late_share(values: Series, rates: Series) -> float | None:
    """Share of all progress that was made in the last third of the *learning*: of the sum of the learning rates, not of the steps.

    A schedule that decays to nothing makes every curve flat at its end; measured in learning rate, a curve that is far from its
    floor goes on falling (a straight line gives 1/3, an exponential of as long a time constant as the run 0.23), one that has
    arrived does not (near 0). None where too little is logged, or what was gained is within three deviations of noise.
    """
    if len(values) < 6 or len(rates) < 3:
        return None
    shares = spent(values.steps, rates)
    if not shares:
        return None
    turn = next(i for i, share in enumerate(shares) if share >= 2 / 3)
    width = max(1, len(values) // 10)
    around = values.values[max(0, turn - width // 2) : turn + width // 2 + 1]
    start, middle, end = values.head(0.05), statistics.fmean(around), values.tail(0.1)
    sure = 3 * values.noise
    if start - end <= sure or middle - end <= sure / math.sqrt(len(around)):
        return 0.0 if start - end > sure else None
    return (middle - end) / (start - end)
