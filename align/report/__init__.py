"""What a run found, written for people and for programs: ``report.html``, ``report.md`` and ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from align.artifact import Artifact
from align.report import pages
from align.report.results import PAGES, RESULTS, results_of, up_to_date
from align.report.tables import as_text, in_terminal, settings_table
from align.runner.files import write_atomically

__all__ = ["PAGES", "RESULTS", "write_report"]


def write_report(out: Path, name: str, artifacts: Mapping[str, Artifact], as_json: bool = False) -> None:
    """Write the report of the finished stages of run `name` into `out`, and print the tables of results.

    Nothing is written when `out` already holds the report of exactly these artifacts, beside the same unfinished stages.

    Args:
        artifacts: in the order of the stages.
        as_json: print the content of ``results.json`` instead.
    """
    stages = {artifact.name_in(Path(artifact.path)) or key: artifact for key, artifact in artifacts.items()}
    results = results_of(out, name, stages)
    if not up_to_date(out, results["digest"]):
        pages.write_pages(out, results, stages)
        write_atomically(out / RESULTS, json.dumps(results, indent=1, allow_nan=False) + "\n")
    if as_json:
        print(json.dumps(results, indent=1, allow_nan=False))
        return
    if results["models"]:
        print(as_text(results["models"]), end="\n\n")
    if results["settings"]:
        print(in_terminal(settings_table(results["settings"]), "over seeds"), end="\n\n")
    print("\n".join(str(out / file) for file in (*PAGES, RESULTS)))
