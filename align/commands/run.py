"""``align run RECIPE``: a whole pipeline."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.commands.output import print_rows
from align.errors import AlignError
from align.pipeline import Options, Run, default_out
from align.progress import duration
from align.recipe import load_recipe
from align.runner.notify import notify
from align.runner.sweep import expand, values_of
from align.stages.sampling import RewardFields

if TYPE_CHECKING:
    from align.preflight.inspect import Looked


def add(verbs: Any) -> None:
    parser = verbs.add_parser("run", help="run a pipeline: a recipe file or the name of a shipped one")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: runs/NAME)")
    parser.add_argument("--plan", action="store_true", help="show what would run and why, and stop")
    parser.add_argument("--estimate", action="store_true", help="the plan, and what memory and time it would take here")
    parser.add_argument("--only", metavar="STAGE", help="run just this stage")
    parser.add_argument(
        "--force", metavar="STAGE", action="append", default=[], help="run this stage again, and what follows from it"
    )
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE", help="a setting, or stage.field"
    )
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="STAGE.FIELD=A,B",
        help="a branch for each value; all are compared in the report",
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each branch of the sweep")
    parser.add_argument("--jobs", type=int, help="stages side by side (default: one a GPU, and one without any)")
    parser.add_argument(
        "--no-wait", action="store_true", help="refuse where another run works on the same stage, instead of waiting"
    )
    parser.add_argument("--retries", type=int, default=Options.retries, help="new attempts after a passing fault")
    parser.add_argument(
        "--grace", type=float, default=Options.grace, help="seconds that stages may save in when the run is stopped"
    )
    parser.add_argument("--notify", metavar="URL|COMMAND", help="told by JSON when the run has ended")
    parser.add_argument("--json", action="store_true", help="print results as JSON; with --only the manifest of that stage")
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    for flag, least in (("jobs", 1), ("seeds", 1), ("retries", 0), ("grace", 0)):
        given = getattr(options, flag)
        if given is not None and not given >= least:
            raise AlignError(f"--{flag} must be at least {least}")
    recipe = load_recipe(options.recipe, assigned(options.assignments))
    if options.sweep or options.seeds > 1:
        sweeps = {key: values_of(values) for key, values in assigned(options.sweep, "--sweep").items()}
        if len(sweeps) < len(options.sweep):
            raise AlignError("--sweep names a field twice: write all of its values behind one, as in --sweep dpo.beta=0.05,0.1")
        for key, values in sweeps.items():
            if "" in values:
                raise AlignError(f"--sweep {key}={','.join(values)}: a value is missing; null is no value, '' an empty one")
        recipe = expand(recipe, sweeps, options.seeds)
    out = options.out or default_out(recipe)
    how = Options(jobs=options.jobs, wait=not options.no_wait, retries=options.retries, grace=options.grace)
    work = Run(recipe, out, force=options.force, options=how)
    if options.plan or options.estimate:
        return show_plan(work, options.only, estimated=options.estimate, as_json=options.json)
    with _notified(options.notify, recipe.name, out):
        artifacts = work.execute(options.only)
        if options.only is None:
            from align.report import write_report

            write_report(out, recipe.name, artifacts, as_json=options.json)
        elif options.json:
            print(json.dumps(asdict(artifacts[options.only]), indent=1))
    return 0


def assigned(assignments: Sequence[str], flag: str = "--set") -> dict[str, str]:
    """The values of ``--set KEY=VALUE`` by key.

    Raises:
        AlignError: one is written in another way, or a key is set twice.
    """
    found: dict[str, str] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise AlignError(f"{flag} {assignment}: write it as KEY=VALUE")
        if key in found and flag == "--set":
            raise AlignError(f"--set {key} is given twice, as {found[key]!r} and as {value!r}: leave one out")
        found[key] = value
    return found


@contextmanager
def _notified(target: str | None, name: str, out: Path) -> Iterator[None]:
    """Tell `target` how what happens within ended."""
    start = time.monotonic()
    event = {"run": name, "folder": str(out.resolve()), "state": "done", "error": None}
    try:
        yield
    except BaseException as error:
        event |= {"state": "stopped" if isinstance(error, KeyboardInterrupt) else "failed", "error": str(error)}
        raise
    finally:
        if target is not None:
            notify(target, {**event, "seconds": round(time.monotonic() - start, 1)})


def show_plan(run: Run, only: str | None = None, *, as_json: bool, estimated: bool = False) -> int:
    """Print which stages of `run` would run, and why; returns the exit code.

    Args:
        estimated: and what memory and time they would take, for which their rows are read.

    Raises:
        AlignError: see `Run.plan`; or the rewards of a stage that would run do not fit.
    """
    run.check(only)
    plan = [step for step in run.plan() if only in (None, step.name)]
    for step in plan:
        if step.runs and isinstance(step.stage, RewardFields):
            try:
                step.stage.check_rewards(hub=False)
            except AlignError as error:
                raise AlignError(f"{step.name}: {error}") from error
    rows: list[dict[str, Any]] = [
        {
            "stage": step.name,
            "runs": step.runs,
            "reason": step.reason,
            "folder": str(step.folder),
            "seconds_last_time": step.last_seconds,
        }
        for step in plan
    ]
    looked: dict[str, Looked] = {}
    if estimated:
        from align.preflight.cards import at_hand
        from align.preflight.inspect import foreseen

        looked = {each.name: each for each in foreseen(run.plan(), [step.name for step in plan if step.runs], at_hand())}
        for row in rows:
            if (each := looked.get(row["stage"])) is not None:
                row |= {"estimate": each.estimate.plain() if each.estimate else None, "no_estimate": each.unknown}

    width = max([14, *(len(step.name) for step in plan)])  # branches of a sweep have long names

    def line(row: dict[str, Any]) -> str:
        before = row["seconds_last_time"] if row["runs"] else None
        took = "" if before is None else f"  (took {duration(before)} the last time)"
        each = looked.get(row["stage"])
        ahead = f"\n      {each.outlook}" if each and each.outlook else ""
        return f"{'run ' if row['runs'] else 'skip'}  {row['stage']:<{width}} {row['reason']}{took}{ahead}"

    print_rows(rows, as_json, line)
    return 0
