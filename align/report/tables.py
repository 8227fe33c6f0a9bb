"""Numbers as people read them: tables of models, and the same in a terminal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """A measured value as it is shown."""

    text: str
    interval: str = ""
    """``[low, high]``"""
    span: tuple[float, ...] | None = None
    """Low, mean and high in percent of the scale that the cells of a table share."""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".rstrip()


class Table(NamedTuple):
    """Rows are models."""

    header: list[str]
    rows: list[tuple[str, list[Cell]]]


def rewards_of(keys: Iterable[str]) -> list[str]:
    """The headlines among the names of metrics, of any reward's name."""
    return [key for key in keys if key.endswith("_reward") and key != "greedy_reward"]


def results_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """What was measured of each model: the columns that exist."""
    columns = _columns(models)
    rewards = {key for key in columns if key.endswith("_reward")}
    bounds = [bound for metrics in models.values() for key in rewards for bound in measured(metrics, key)[1] or ()]
    scales = dict.fromkeys(rewards, (min(bounds), max(bounds))) if bounds else {}
    rows = [(model, [_cell(metrics, key, scales.get(key)) for key in columns]) for model, metrics in models.items()]
    return Table(list(columns.values()), rows)


def _columns(models: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The titles of what was measured, in the order of the columns."""
    keys = list(dict.fromkeys(key for metrics in models.values() for key in metrics))
    columns = {key: key.removesuffix("_reward") + " reward" for key in rewards_of(keys)}
    columns |= {"greedy_reward": "greedy reward", "perplexity": "perplexity", "mean_completion_tokens": "tokens per answer"}
    columns |= {key: "KL to " + key.removeprefix("kl_to_") for key in keys if key.startswith("kl_to_")}
    columns |= {"preference_accuracy": "preference accuracy"}
    if "accuracy_ci95" in keys:
        columns["accuracy"] = "reward-model accuracy"
    columns = {key: title for key, title in columns.items() if key in keys}
    hidden = {"n", "parts", "finished_share", *(key for key in keys if key.endswith("_ci95"))}
    return columns | {key: key.replace("_", " ") for key in keys if key not in hidden | columns.keys()}  # metrics by name


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    """What `align.report.seeds.settings` found: the mean over seeds, with the standard deviation, or of two seeds both ends."""
    columns = _columns({setting: found["metrics"] for setting, found in settings.items()})
    rows = []
    for setting, found in settings.items():
        means = [_over_seeds(found["metrics"].get(key), _decimals(key)) for key in columns]
        rows.append((setting, [Cell(str(len(found["models"]))), *means]))
    return Table(["seeds", *columns.values()], rows)


def _over_seeds(found: Mapping[str, Any] | None, decimals: int) -> Cell:
    if found is None:
        return Cell("–")
    if "sd" in found:
        return Cell(number(found["mean"], decimals), f"± {number(found['sd'], decimals)}")
    return Cell(number(found["mean"], decimals), f"[{', '.join(number(end, decimals) for end in found['range'])}]")


def parts_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Means of the components of the reward, without the headline itself."""
    headlines = {key.removesuffix("_reward") for metrics in models.values() for key in rewards_of(metrics)}
    parts = {model: metrics["parts"] for model, metrics in models.items() if metrics.get("parts")}
    names = [name for name in dict.fromkeys(name for means in parts.values() for name in means) if name not in headlines]
    return Table(names, [(model, [_cell(means, name) for name in names]) for model, means in parts.items()])


def measured(metrics: Mapping[str, Any], key: str) -> tuple[Any, Sequence[float] | None]:
    """Mean and interval of `key`, in either shape that evaluations write."""
    value = metrics.get(key)
    mean, interval = (value.get("mean"), value.get("ci95")) if isinstance(value, Mapping) else (value, metrics.get(f"{key}_ci95"))
    return mean, interval if interval and None not in interval else None


def _cell(metrics: Mapping[str, Any], key: str, scale: tuple[float, float] | None = None) -> Cell:
    mean, interval = measured(metrics, key)
    if not isinstance(mean, int | float) or interval is None:
        return Cell(number(mean, _decimals(key)))
    low, high = interval
    text = f"[{number(low)}, {number(high)}]"
    start, width = (scale[0], scale[1] - scale[0]) if scale is not None else (0.0, 0.0)
    if not 0 < width < math.inf:
        return Cell(number(mean), text)
    return Cell(number(mean), text, tuple(round(100 * (value - start) / width, 1) for value in (low, mean, high)))


def _decimals(key: str) -> int:
    return 1 if key == "mean_completion_tokens" else 2 if key.startswith(("perplexity", "kl_to_")) else 3


def number(value: Any, decimals: int = 3) -> str:
    """A measured value; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:.{decimals}f}" if abs(value) < 10_000 else f"{value:.3g}"


def as_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Results and parts as one table of aligned columns."""
    results, parts = results_table(models), parts_table(models)
    parts_of, blank = dict(parts.rows), [Cell("–")] * len(parts.header)
    rows = [(model, cells + parts_of.get(model, blank)) for model, cells in results.rows]
    return in_terminal(Table(results.header + parts.header, rows))


def in_terminal(table: Table, first: str = "model") -> str:
    """`table` as aligned columns, folded only where a terminal is too narrow for it."""
    names = _aligned([first, *(name for name, _ in table.rows)], "<")
    blocks = [names]
    for column in zip(table.header, *(cells for _, cells in table.rows), strict=True):
        cells = _aligned([str(cell) for cell in column], "<" if any(isinstance(c, Cell) and c.interval for c in column) else ">")
        if blocks[-1] is not names and len(blocks[-1][0] + cells[0]) + 2 > shutil.get_terminal_size((10_000, 24)).columns:
            blocks.append(names)
        blocks[-1] = [f"{line}  {cell}" for line, cell in zip(blocks[-1], cells, strict=True)]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def _aligned(cells: Sequence[str], side: str) -> list[str]:
    return [f"{cell:{side}{max(map(len, cells))}}" for cell in cells]
