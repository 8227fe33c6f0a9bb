"""The two pages: what is gathered for them, and how it is escaped."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from align.artifact import Artifact
from align.diagnostics.case import figure
from align.diagnostics.doctor import CURVATURE, Patient, diagnose, verdicts
from align.progress import duration, harmless
from align.report import compare, draw
from align.report.answers import payload, samples
from align.report.curves import journeys, panels
from align.report.results import PAGES, evaluations
from align.report.road import diagram, stops
from align.report.tables import number, parts_table, results_table, rewards_of, settings_table
from align.runner.files import json_record, write_atomically

SAMPLES_SHOWN = 20
"""Prompts whose answers are in the Markdown report; the page has all of samples.jsonl, and draws those in sight."""
TEMPLATES = Path(__file__).parent / "templates"


def gathered(out: Path, results: Mapping[str, Any], stages: Mapping[str, Artifact]) -> dict[str, Any]:
    """What both pages show."""
    models = results["models"]
    answered = [(a, rows) for a in evaluations(stages) if (rows := samples(a, models))]
    road = stops(out, stages)
    patients = [Patient(stage, a.stage, a.config, Path(a.path), a) for stage, a in stages.items()]
    trained = [patient for patient in patients if "learning_rate" in patient.config]
    findings = {stage: said for stage, said in diagnose(patients).items() if said or any(p.name == stage for p in trained)}
    return {
        **results,
        "artifacts": stages,
        "road": road,
        "diagram": diagram(road),
        "table": results_table(models),
        "seeds": settings_table(results["settings"]),
        "parts": parts_table(models),
        "prompts": sorted({m[key].get("n") for m in models.values() for key in rewards_of(m) if isinstance(m[key], dict)} - {None}),
        "curves": {stage: curves for stage, a in stages.items() if (curves := panels(Path(a.path)))},
        "clouds": compare.clouds(models),
        "journeys": {stage: ways for stage, a in stages.items() if (ways := journeys(Path(a.path)))},
        "wins": compare.win_rates(answered),
        "forgotten": compare.forgetting(stages, models),
        "judges": compare.judges(stages, models),
        "findings": findings,
        "verdicts": verdicts(patients, findings),
        "preflight": preflight(out),
        "curvature": {stage: found for stage, a in stages.items() if (found := json_record(Path(a.path) / CURVATURE))},
        "answered": answered,
        "shown": SAMPLES_SHOWN,
        "configs": {stage: yaml.safe_dump(a.config, sort_keys=False, allow_unicode=True, width=100) for stage, a in stages.items()},
    }


def preflight(out: Path) -> list[dict[str, Any]]:
    """The findings that the preflight left in the run's folder."""
    path = out / "preflight.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [finding for finding in content if isinstance(finding, dict)] if isinstance(content, list) else []


def write_pages(out: Path, results: Mapping[str, Any], stages: Mapping[str, Artifact]) -> None:
    """Write ``report.md`` and ``report.html`` into `out`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    content = gathered(out, results, stages)
    script, style = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
    content |= {"script": Markup(script), "style": Markup(style), "data": Markup(payload(content["answered"]))}
    # Only this script may run: whatever a model wrote, and wherever it ends up, the browser does not execute it.
    content["script_hash"] = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    numbers = count()
    options: dict[str, Any] = {
        "loader": FileSystemLoader(TEMPLATES),
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    # In both formats everything that is printed is escaped unless it is marked as safe.
    escaping: dict[str, Any] = {"report.md": {"finalize": markdown}, "report.html": {"autoescape": True}}
    for file in PAGES:
        environment = Environment(**options, **escaping[file])
        environment.filters.update(number=number, figure=figure, duration=duration, first_words=first_words)
        for plot in (draw.curve, draw.cloud, draw.journey):
            environment.filters[plot.__name__] = lambda plotted, plot=plot: Markup(plot(plotted, next(numbers)))
        write_atomically(out / file, environment.get_template(f"{file}.jinja").render(content))


def first_words(text: str, most: int = 22) -> str:
    """`text`, cut where a box is full."""
    return text if len(text) <= most else text[: most - 1] + "…"


def markdown(value: Any) -> str:
    """`value` as inline Markdown text on one line, whatever it holds: no markup, no HTML, no table cell's end, nothing that steers
    a terminal.
    """
    if hasattr(value, "__html__"):  # marked as safe
        return str(value)
    text = html.escape(str(value), quote=False)
    text = re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)
    return "<br>".join(map(harmless, text.splitlines()))
