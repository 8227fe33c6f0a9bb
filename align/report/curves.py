"""Learning curves: what a stage's ``metrics.jsonl`` has to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from align.diagnostics.series import usable
from align.report.tables import number
from align.runner.files import json_lines

PANELS = (
    ("loss", "loss", "eval_loss"),
    ("pairs ranked right", "accuracy", "eval_accuracy"),
    ("pairs ranked right", "rewards/accuracies", "eval_rewards/accuracies"),
    ("score", "objective/scores", "eval_score"),
    ("reward", "reward", "eval_reward"),
    ("KL to the start, nats an answer", "objective/kl", "eval_kl"),
    ("tokens an answer", "completions/mean_length", "eval_mean_length"),
)
"""Learning curves: title, and the log names of training and held-out values. A panel is drawn where a history has the values."""

WAYPOINTS = 200
"""Most points of a journey: more are a tangle, and megabytes of a page."""


class Series(NamedTuple):
    """One line of a plot."""

    label: str
    points: list[tuple[float, float]]
    left_out: int = 0
    """How many values are no points, as they are not `usable`."""

    @property
    def steps(self) -> str:
        return f"{self.points[0][0]}–{self.points[-1][0]}" if self.points else "–"

    @property
    def ends(self) -> str:
        return f"{number(self.points[0][1])} → {number(self.points[-1][1])}" if self.points else "–"


class Panel(NamedTuple):
    """One plot."""

    title: str
    series: list[Series]

    @property
    def left_out(self) -> int:
        return sum(line.left_out for line in self.series)


def panels(folder: Path) -> list[Panel]:
    """The learning curves in a stage's ``metrics.jsonl``."""
    records = json_lines(folder / "metrics.jsonl", numbers=["step"])
    found = []
    for title, train, held_out in PANELS:
        lines = [Series(label, *points_of(records, key)) for label, key in (("train", train), ("held out", held_out))]
        if any(len(line.points) + line.left_out > 1 for line in lines):
            found.append(Panel(title, [line for line in lines if line.points or line.left_out]))
    return found


class Journey(NamedTuple):
    """Where a policy went as it was trained: (divergence, score) in the order of steps."""

    title: str
    points: list[tuple[float, float]]
    left_out: int = 0
    """How many batches are no points, as their score or their divergence is not `usable`."""
    batches: int = 1
    """How many batches a point is the mean of."""


def journeys(folder: Path) -> list[Journey]:
    """The paid score against the divergence from the reference, and against the length of answers, batch by batch; of many
    batches, the means of neighbours.
    """
    records = [
        r for r in json_lines(folder / "metrics.jsonl", numbers=["step"]) if isinstance(r.get("objective/scores"), int | float)
    ]
    found = []
    for key, title in (("objective/kl", "KL to the start, nats an answer"), ("completions/mean_length", "tokens an answer")):
        given = [(r[key], r["objective/scores"]) for r in records if isinstance(r.get(key), int | float)]
        points = [point for point in given if all(map(usable, point))]
        if len(points) > 2:
            size = -(-len(points) // WAYPOINTS)
            means = [
                (fmean(x), fmean(y)) for x, y in (zip(*points[i : i + size], strict=True) for i in range(0, len(points), size))
            ]
            found.append(Journey(title, means, len(given) - len(points), size))
    return found


def points_of(records: Iterable[Mapping[str, Any]], key: str) -> tuple[list[tuple[float, float]], int]:
    """Step and value where the value of `key` is usable, and how many others there are."""
    given = [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]
    points = [point for point in given if usable(point[1])]
    return points, len(given) - len(points)
