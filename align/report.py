"""What a run found, written for people and for programs: ``report.html``, ``report.md`` and ``results.json``."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align import __version__
from align.artifact import Artifact
from align.runner.files import write_atomically

MODES, NO_ANSWER = ("sampled", "greedy"), {"text": None, "reward": None}
RESULTS, PAGES = "results.json", ("report.md", "report.html")
SAMPLES_SHOWN = 20
"""Prompts whose answers are in the report; samples.jsonl of the evaluation may hold more."""

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

COLORS = {"#010101": "currentColor", "#020202": "var(--line)", "#030303": "var(--train)", "#040404": "var(--held)"}
"""Matplotlib's colors here to the page's, so that plots follow its light and dark themes."""
INK, GRID, TRAIN, HELD = COLORS


def write_report(out: Path, name: str, artifacts: Mapping[str, Artifact], as_json: bool = False) -> None:
    """Write the report of the finished stages of run `name` into `out`, and print the table of results.

    Nothing is written when `out` already holds the report of exactly these artifacts.

    Args:
        artifacts: in the order of the stages.
        as_json: print the content of ``results.json`` instead.
    """
    stages = {_stage_name(key, artifact): artifact for key, artifact in artifacts.items()}
    results = _results(name, stages)
    if not _up_to_date(out, results["digest"]):
        _write_pages(out, results, stages)
        write_atomically(out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
        return
    if results["models"]:
        print(as_text(results["models"]), end="\n\n")
    print("\n".join(str(out / file) for file in (*PAGES, RESULTS)))


# -- results -------------------------------------------------------------------------------------------------------------------


def _stage_name(key: str, artifact: Artifact) -> str:
    """The name in the recipe, which the runner puts into the folder's name; otherwise `key`."""
    stem, _, tail = Path(artifact.path).name.rpartition("-")
    return stem if stem and tail == artifact.identity[:8] else key


def _results(name: str, stages: Mapping[str, Artifact]) -> dict[str, Any]:
    """The content of ``results.json``."""
    models: dict[str, dict[str, Any]] = {}
    for artifact in evaluations(stages):
        for model, metrics in artifact.metrics["models"].items():
            models[model] = models.get(model, {}) | metrics
    basis = [__version__, name, *([stage, a.identity, a.reference, a.path, a.created] for stage, a in stages.items())]
    content = {
        "name": name,
        "created": max((a.created for a in stages.values()), default=""),
        "seconds": round(sum(a.seconds for a in stages.values()), 1),
        "models": models,
        "stages": {
            stage: {"reference": a.reference, "path": a.path, "seconds": a.seconds, "metrics": _scalars(a.metrics)}
            for stage, a in stages.items()
        },
        "versions": {library: version for a in stages.values() for library, version in a.versions.items()},
        "digest": hashlib.sha256(json.dumps(basis).encode()).hexdigest(),
    }
    return json.loads(json.dumps(content), parse_constant=lambda _: None)  # JSON has no infinity and no NaN


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, str | int | float)}


def evaluations(stages: Mapping[str, Artifact]) -> list[Artifact]:
    """The artifacts that measured models: their metrics have ``models``, a dictionary of metrics for each."""
    found = [(a, a.metrics.get("models")) for a in stages.values()]
    return [a for a, models in found if isinstance(models, dict) and all(isinstance(m, dict) for m in models.values())]


def _up_to_date(out: Path, digest: str) -> bool:
    try:
        old = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        return old["digest"] == digest and all((out / file).is_file() for file in PAGES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# -- tables --------------------------------------------------------------------------------------------------------------------


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


def _rewards(keys: Iterable[str]) -> list[str]:
    """The headlines among the names of metrics, of any reward's name."""
    return [key for key in keys if key.endswith("_reward") and key != "greedy_reward"]


def results_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """What was measured of each model: the columns that exist."""
    keys = list(dict.fromkeys(key for metrics in models.values() for key in metrics))
    columns = {key: key.removesuffix("_reward") + " reward" for key in _rewards(keys)}
    columns |= {"greedy_reward": "greedy reward", "perplexity": "perplexity", "mean_completion_tokens": "tokens per answer"}
    columns |= {key: "KL to " + key.removeprefix("kl_to_") for key in keys if key.startswith("kl_to_")}
    columns |= {"preference_accuracy": "preference accuracy"}
    if "accuracy_ci95" in keys:
        columns["accuracy"] = "reward-model accuracy"
    columns = {key: title for key, title in columns.items() if key in keys}
    hidden = {"n", "parts", "finished_share", *(key for key in keys if key.endswith("_ci95"))}
    columns |= {key: key.replace("_", " ") for key in keys if key not in hidden | columns.keys()}  # metrics by name
    rewards = {key for key in columns if key.endswith("_reward")}
    bounds = [bound for metrics in models.values() for key in rewards for bound in _measure(metrics, key)[1] or ()]
    scales = dict.fromkeys(rewards, (min(bounds), max(bounds))) if bounds else {}
    rows = [(model, [_cell(metrics, key, scales.get(key)) for key in columns]) for model, metrics in models.items()]
    return Table(list(columns.values()), rows)


def parts_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Means of the components of the reward, without the headline itself."""
    headlines = {key.removesuffix("_reward") for metrics in models.values() for key in _rewards(metrics)}
    parts = {model: metrics["parts"] for model, metrics in models.items() if metrics.get("parts")}
    names = [name for name in dict.fromkeys(name for means in parts.values() for name in means) if name not in headlines]
    return Table(names, [(model, [_cell(means, name) for name in names]) for model, means in parts.items()])


def _measure(metrics: Mapping[str, Any], key: str) -> tuple[Any, Sequence[float] | None]:
    """Mean and interval of `key`, in either shape that evaluations write."""
    value = metrics.get(key)
    mean, interval = (value.get("mean"), value.get("ci95")) if isinstance(value, Mapping) else (value, metrics.get(f"{key}_ci95"))
    return mean, interval if interval and None not in interval else None


def _cell(metrics: Mapping[str, Any], key: str, scale: tuple[float, float] | None = None) -> Cell:
    mean, interval = _measure(metrics, key)
    if not isinstance(mean, int | float) or interval is None:
        return Cell(number(mean, 1 if key == "mean_completion_tokens" else 2 if key.startswith(("perplexity", "kl_to_")) else 3))
    low, high = interval
    text = f"[{number(low)}, {number(high)}]"
    if scale is None or scale[0] == scale[1]:
        return Cell(number(mean), text)
    start, width = scale[0], scale[1] - scale[0]
    return Cell(number(mean), text, tuple(round(100 * (value - start) / width, 1) for value in (low, mean, high)))


def number(value: Any, decimals: int = 3) -> str:
    """A measured value; a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:.{decimals}f}" if abs(value) < 10_000 else f"{value:.3g}"


def as_text(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Results and parts as one table of aligned columns, folded only where a terminal is too narrow for it."""
    results, parts = results_table(models), parts_table(models)
    parts_of, blank = dict(parts.rows), [Cell("–")] * len(parts.header)
    rows = [results.header + parts.header, *(cells + parts_of.get(model, blank) for model, cells in results.rows)]
    names = _aligned(["model", *models], "<")
    blocks = [names]
    for column in zip(*rows, strict=True):
        cells = _aligned([str(cell) for cell in column], "<" if any(isinstance(c, Cell) and c.interval for c in column) else ">")
        if blocks[-1] is not names and len(blocks[-1][0] + cells[0]) + 2 > shutil.get_terminal_size((10_000, 24)).columns:
            blocks.append(names)
        blocks[-1] = [f"{line}  {cell}" for line, cell in zip(blocks[-1], cells, strict=True)]
    return "\n\n".join("\n".join(line.rstrip() for line in block) for block in blocks)


def _aligned(cells: Sequence[str], side: str) -> list[str]:
    return [f"{cell:{side}{max(map(len, cells))}}" for cell in cells]


def duration(seconds: float) -> str:
    """``41 s``, ``6 min 38 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"


# -- learning curves -----------------------------------------------------------------------------------------------------------


class Series(NamedTuple):
    """One line of a plot."""

    label: str
    points: list[tuple[float, float]]

    @property
    def ends(self) -> str:
        return f"{number(self.points[0][1])} → {number(self.points[-1][1])}"


class Panel(NamedTuple):
    """One plot."""

    title: str
    series: list[Series]


def panels(folder: Path) -> list[Panel]:
    """The learning curves in a stage's ``metrics.jsonl``."""
    records = _json_lines(folder / "metrics.jsonl")
    found = []
    for title, train, held_out in PANELS:
        lines = [Series(label, _points(records, key)) for label, key in (("train", train), ("held out", held_out))]
        if any(len(line.points) > 1 for line in lines):
            found.append(Panel(title, [line for line in lines if line.points]))
    return found


def _points(records: Iterable[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if isinstance(record.get(key), int | float)]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.is_file() else []


def plot(panel: Panel, index: int) -> str:
    """`panel` as an inline SVG; `index` keeps its ids apart from those of the page's other plots."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sizes = {"font.size": 7.5, "axes.labelsize": 7, "xtick.labelsize": 7, "ytick.labelsize": 7}
    inks = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "align", "axes.edgecolor": GRID, "grid.color": GRID, **sizes, **inks}):
        figure = Figure(figsize=(3.5, 2.1), layout="constrained")
        axes = figure.add_subplot()
        for label, points in panel.series:
            color = TRAIN if label == "train" else HELD
            few: dict[str, Any] = {"marker": "o", "markersize": 3.2} if len(points) < 12 else {}
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.5, label=label, solid_joinstyle="round", **few)
        axes.set_title(panel.title, loc="left", fontsize=8)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", linewidth=0.6)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        if len(panel.series) > 1:
            axes.legend(frameon=False, fontsize=7, handlelength=1.2, borderpad=0)
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _inline(buffer.getvalue(), f"p{index}-")


def _inline(svg: str, prefix: str) -> str:
    """An SVG file as a part of a page: no prolog, no style sheet that would reach the page, its own ids, the page's colors."""
    svg = re.sub(r"<style.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    return re.sub("|".join(COLORS), lambda match: COLORS[match[0]], svg)


# -- pages ---------------------------------------------------------------------------------------------------------------------


def samples(artifact: Artifact, models: Iterable[str]) -> list[dict[str, Any]]:
    """The prompts of an evaluation, each as (role, text) turns, with the answers of `models` in order."""
    rows = []
    for line in _json_lines(Path(artifact.path) / "samples.jsonl"):
        prompt = line["prompt"]
        turns = [("", prompt)] if isinstance(prompt, str) else [(turn.get("role", ""), _said(turn)) for turn in prompt]
        columns = json.dumps(line["columns"], ensure_ascii=False) if line.get("columns") else ""
        given = {model: line["answers"][model] for model in models if model in line["answers"]}
        answers = {model: {mode: {**NO_ANSWER, **modes.get(mode, {})} for mode in MODES} for model, modes in given.items()}
        rows.append({"turns": turns, "columns": columns, "answers": answers})
    return rows


def _said(turn: Mapping[str, Any]) -> str:
    """The text of a message; one without text, or with parts, as JSON."""
    content = turn.get("content")
    return content if isinstance(content, str) and content else json.dumps(content or {**turn}, ensure_ascii=False)


def _write_pages(out: Path, results: Mapping[str, Any], stages: Mapping[str, Artifact]) -> None:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    models = results["models"]
    content = {
        **results,
        "artifacts": stages,
        "table": results_table(models),
        "parts": parts_table(models),
        "prompts": sorted({m[key].get("n") for m in models.values() for key in _rewards(m) if isinstance(m[key], dict)} - {None}),
        "curves": {stage: curves for stage, a in stages.items() if (curves := panels(Path(a.path)))},
        "answered": [(a, rows) for a in evaluations(stages) if (rows := samples(a, models))],
        "shown": SAMPLES_SHOWN,
        "configs": {stage: yaml.safe_dump(a.config, sort_keys=False, allow_unicode=True, width=100) for stage, a in stages.items()},
    }
    templates, numbers = FileSystemLoader(Path(__file__).parent / "templates"), count()
    options: dict[str, Any] = {"loader": templates, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    # In both formats everything that is printed is escaped unless it is marked as safe.
    escaping: dict[str, Any] = {"report.md": {"finalize": markdown}, "report.html": {"autoescape": True}}
    for file in PAGES:
        environment = Environment(**options, **escaping[file])
        environment.filters.update(number=number, duration=duration)
        environment.filters["plot"] = lambda panel: Markup(plot(panel, next(numbers)))
        write_atomically(out / file, environment.get_template(f"{file}.jinja").render(content))


def markdown(value: Any) -> str:
    """`value` as inline Markdown text on one line, whatever it holds: no markup, no HTML, no table cell's end."""
    if hasattr(value, "__html__"):  # marked as safe
        return str(value)
    text = html.escape(str(value), quote=False)
    text = re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    return "<br>".join(text.splitlines())
