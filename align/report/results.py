"""The content of ``results.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from align import __version__
from align.artifact import Artifact
from align.diagnostics.doctor import CURVATURE
from align.report.road import stops
from align.report.seeds import settings

RESULTS, PAGES = "results.json", ("report.md", "report.html")


def results_of(out: Path, name: str, stages: Mapping[str, Artifact]) -> dict[str, Any]:
    """The content of ``results.json`` of the run in `out`."""
    models: dict[str, dict[str, Any]] = {}
    for artifact in evaluations(stages):
        for model, metrics in artifact.metrics["models"].items():
            models[model] = models.get(model, {}) | metrics
    measured = [path for a in stages.values() for path in Path(a.path).glob(CURVATURE)]
    beside = [[path.name, path.stat().st_mtime_ns] for path in (*measured, *out.glob("preflight.json"))]
    unfinished = [[stop.name, stop.state] for stop in stops(out, stages) if stop.name not in stages]
    finished = [[stage, a.identity, a.reference, a.path, a.created] for stage, a in stages.items()]
    basis = [__version__, name, beside, unfinished, finished]
    content = {
        "name": name,
        "created": max((a.created for a in stages.values()), default=""),
        "seconds": round(sum(a.seconds for a in stages.values()), 1),
        "models": models,
        "settings": settings(models),
        "stages": {
            stage: {"reference": a.reference, "path": a.path, "seconds": a.seconds, "metrics": _scalars(a.metrics)}
            for stage, a in stages.items()
        },
        "versions": {library: version for a in stages.values() for library, version in a.versions.items()},
        "digest": hashlib.sha256(json.dumps(basis).encode()).hexdigest(),
    }
    return finite(content)


def finite(content: Any) -> Any:
    """`content` as JSON can hold it: null for infinity and NaN."""
    return json.loads(json.dumps(content), parse_constant=lambda _: None)


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is None or isinstance(value, str | int | float)}


def evaluations(stages: Mapping[str, Artifact]) -> list[Artifact]:
    """The artifacts that measured models: their metrics have ``models``, a dictionary of metrics for each."""
    found = [(a, a.metrics.get("models")) for a in stages.values()]
    return [a for a, models in found if isinstance(models, dict) and all(isinstance(m, dict) for m in models.values())]


def up_to_date(out: Path, digest: str) -> bool:
    """Whether `out` holds a whole report of what has this digest."""
    try:
        old = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        return old["digest"] == digest and all((out / file).is_file() for file in PAGES)
    except (OSError, ValueError, KeyError, TypeError):
        return False
