"""``align report RUN``: the pages of a run, written again."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from align.artifact import Artifact, read_artifact
from align.errors import AlignError
from align.registry import run_folder
from align.runner.notes import noted_recipe


def add(verbs: Any) -> None:
    parser = verbs.add_parser("report", help="write report.md, report.html and results.json of a run again")
    parser.add_argument("run", type=Path, metavar="RUN", help="output folder of a run, or its name under the home folder")
    parser.add_argument("--json", action="store_true", help="print the content of results.json")
    parser.set_defaults(handler=report)


def report(options: argparse.Namespace) -> int:
    from align.diagnostics.doctor import Patient
    from align.report import write_report

    run = run_folder(options.run)
    if not run.is_dir():
        raise AlignError(f"no run folder {options.run}")
    found = [a for folder in run.iterdir() if folder.is_dir() and (a := read_artifact(folder))]
    artifacts = {a.name: a for a in sorted(found, key=lambda a: a.created)}
    if noted := noted_recipe(run):
        lying = {Path(artifact.path).name: artifact for artifact in found}
        artifacts = {stage: lying[folder] for stage, folder in noted["stages"].items() if folder in lying}
    if not artifacts and Patient.read(run) is not None:
        raise AlignError(
            f"{run} is the folder of one stage, and a report is about a run of `align run`; `align doctor {run}` "
            "reads the history of one stage"
        )
    if not artifacts:
        raise AlignError(f"{run} holds no finished stage{' of the recipe that ran last' if found else ''}")
    write_report(run, noted.get("name") or _recipe(run, artifacts.values()), artifacts, options.json)
    return 0


def _recipe(run: Path, artifacts: Iterable[Artifact]) -> str:
    """What the recipe is called whose stages lie in the folder `run`; the folder's name, where none of them says so."""
    stages = ((artifact, artifact.name_in(Path(artifact.path))) for artifact in artifacts)
    return next((a.name.removesuffix(f"-{stage}") for a, stage in stages if stage), run.resolve().name)
