"""Models against each other: rewards against divergence and length, wins, what was forgotten, and how good the judges are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from align.artifact import Artifact
from align.diagnostics.series import usable
from align.report.tables import Cell, Table, measured, number, rewards_of


class Point(NamedTuple):
    """A model in a plot of reward against something."""

    label: str
    x: float
    y: float
    low: float
    high: float


class Cloud(NamedTuple):
    """A plot of models."""

    title: str
    x_title: str
    points: list[Point]
    left_out: list[str] = []  # noqa: RUF012  a tuple's default, which nobody changes
    """Models that are no points, as what was measured of them is not `usable`."""


def clouds(models: Mapping[str, Mapping[str, Any]]) -> list[Cloud]:
    """The first reward of each model with its interval, against its divergence from the reference and its answers' length."""
    keys = list(dict.fromkeys(key for metrics in models.values() for key in metrics))
    rewards = rewards_of(keys)
    if not rewards:
        return []
    reward = rewards[0]
    axes = {key: f"KL to {key.removeprefix('kl_to_')}, nats an answer" for key in keys if key.startswith("kl_to_")}
    axes["mean_completion_tokens"] = "tokens an answer"
    found = []
    for key, title in axes.items():
        points, left_out = [], []
        for model, metrics in models.items():
            mean, interval = measured(metrics, reward)
            x: Any = metrics.get(key)
            low, high = interval or (mean, mean)
            if all(map(usable, (x, mean, low, high))):
                points.append(Point(model, float(x), mean, low, high))
            elif reward in metrics and key in metrics:
                left_out.append(model)
        if len(points) > 1:
            name = f"{reward.removesuffix('_reward')} reward"
            found.append(Cloud(f"{name} against {title.partition(',')[0]}", title, points, left_out))
    return found


def win_rates(answered: Iterable[tuple[Artifact, list[dict[str, Any]]]]) -> list[tuple[str, int, Table]]:
    """Of each evaluation: its name, how many prompts, and the share of them on which the row's sampled answer has the higher reward
    than the column's, ties counting half, with 95 % intervals (Wilson 1927, which a few prompts do not make narrow).
    """
    found = []
    for artifact, rows in answered:
        models = list(dict.fromkeys(model for row in rows for model in row["answers"]))
        rewards = {m: [row["answers"].get(m, {}).get("sampled", {}).get("reward") for row in rows] for m in models}
        models = [m for m in models if any(isinstance(value, int | float) for value in rewards[m])]
        table = Table(models, [(one, [_wins(rewards[one], rewards[other], one == other) for other in models]) for one in models])
        if len(models) > 1:
            found.append((artifact.name, len(rows), table))
    return found


def _wins(ours: list[Any], theirs: list[Any], same: bool) -> Cell:
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, int | float) and isinstance(b, int | float)]
    if same or not pairs:
        return Cell("–")
    wins = [(a > b) + 0.5 * (a == b) for a, b in pairs]
    mean, n, z = sum(wins) / len(wins), len(wins), 1.96
    middle = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    low, high = middle - half, middle + half
    return Cell(f"{mean:.0%}", f"[{low:.0%}, {high:.0%}]", (round(100 * low, 1), round(100 * mean, 1), round(100 * high, 1)))


def forgetting(stages: Mapping[str, Artifact], models: Mapping[str, Mapping[str, Any]]) -> Table:
    """What each stage did to the perplexity of texts that it was not trained for: its own probes, and the evaluation's rows against
    the model that it was trained from.
    """
    rows = []
    for stage, artifact in stages.items():
        for key, before in artifact.metrics.items():
            if key.startswith("probe/") and key.endswith("/perplexity_before"):
                now, probe = artifact.metrics.get(key.removesuffix("_before")), key.split("/")[1]
                rows.append((stage, _change(f"probe {probe}", before, now)))
        named = _evaluated_as(stages)
        now, then = named.get(stage), named.get(str(artifact.config.get("model")))
        if now and then and "perplexity" in models.get(now, {}) and "perplexity" in models.get(then, {}):
            rows.append((stage, _change("the evaluation's rows", models[then]["perplexity"], models[now]["perplexity"])))
    return Table(["measured on", "perplexity before", "after", "change"], rows)


def _evaluated_as(stages: Mapping[str, Artifact]) -> dict[str, str]:
    """What evaluations call the model of each stage."""
    found: dict[str, str] = {}
    for artifact in stages.values():
        models = artifact.config.get("models")
        if isinstance(models, Mapping):
            found |= {str(reference): name for name, reference in models.items()}
    return found


def _change(what: str, before: Any, after: Any) -> list[Cell]:
    known = isinstance(before, int | float) and isinstance(after, int | float) and before > 0 and after < math.inf
    percent = 100 * (after / before - 1) if known else math.nan
    change = (f"{percent:+.0f}%" if percent < 10_000 else f"{percent:+.2g}%") if known else "–"
    return [Cell(what), Cell(number(before, 2)), Cell(number(after, 2)), Cell(change)]


JUDGED = {
    "accuracy": "held-out pairs ranked right",
    "calibration_error": "calibration error",
    "length_correlation": "correlation with length",
    "longer_preferred": "prefers the longer",
    "longer_chosen": "longer is chosen",
}


def judges(stages: Mapping[str, Artifact], models: Mapping[str, Mapping[str, Any]]) -> Table:
    """How good the reward models are: what evaluations say of them, else what their own held-out pairs do."""
    found = {name: dict(metrics) for name, metrics in models.items() if "accuracy_ci95" in metrics}
    for stage, artifact in stages.items():
        if artifact.stage == "reward":
            seen = found.setdefault(stage, {"accuracy": artifact.metrics.get("eval_accuracy")})
            for side in ("longer", "shorter"):
                seen[side] = artifact.metrics.get(f"eval_accuracies/chosen_{side}")
    titles = {**JUDGED, "longer": "right where the longer is chosen", "shorter": "right where the shorter is chosen"}
    columns = [key for key in titles if any(isinstance(metrics.get(key), int | float) for metrics in found.values())]
    return Table([titles[key] for key in columns], [(name, [_judged(m, key) for key in columns]) for name, m in found.items()])


def _judged(metrics: Mapping[str, Any], key: str) -> Cell:
    mean, interval = measured(metrics, key)
    return Cell(number(mean), f"[{number(interval[0])}, {number(interval[1])}]" if interval else "")
