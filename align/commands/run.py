"""``align run RECIPE``: a whole pipeline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from align.commands.output import print_rows
from align.errors import AlignError
from align.pipeline import Run, default_out
from align.recipe import load_recipe


def add(verbs: Any) -> None:
    parser = verbs.add_parser("run", help="run a pipeline: a recipe file or the name of a shipped one")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: runs/NAME)")
    parser.add_argument("--plan", action="store_true", help="show what would run and why, and stop")
    parser.add_argument("--only", metavar="STAGE", help="run just this stage")
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE", help="a setting, or stage.field"
    )
    parser.add_argument("--json", action="store_true", help="print results as JSON")
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, assigned(options.assignments))
    out = options.out or default_out(recipe)
    work = Run(recipe, out)
    if options.plan:
        return show_plan(work, as_json=options.json)
    artifacts = work.execute(options.only)
    if options.only is None:
        from align.report import write_report

        write_report(out, recipe.name, artifacts, as_json=options.json)
    return 0


def assigned(assignments: list[str]) -> dict[str, str]:
    """The values of ``--set KEY=VALUE`` by key.

    Raises:
        AlignError: one is written in another way.
    """
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise AlignError(f"--set {assignment}: write it as KEY=VALUE")
        found[key] = value
    return found


def show_plan(run: Run, *, as_json: bool) -> int:
    rows = [{"stage": s.name, "runs": s.done is None, "reason": s.reason, "folder": str(s.folder)} for s in run.plan()]
    print_rows(rows, as_json, lambda row: f"{'run ' if row['runs'] else 'skip'}  {row['stage']:<14} {row['reason']}")
    return 0
