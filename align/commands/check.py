"""``align check RECIPE``: what would be trained, on which rows, in seconds and without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from align.commands.run import assigned
from align.errors import AlignError
from align.pipeline import Run, default_out
from align.recipe import load_recipe
from align.runner.files import refuse_unwritable_file, write_named


def add(verbs: Any) -> None:
    parser = verbs.add_parser("check", help="look at a recipe's rows, masks, memory and time before it runs")
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--out", type=Path, metavar="DIR", help="output folder of the run (default: runs/NAME)")
    parser.add_argument("--only", metavar="STAGE", help="look at just this stage")
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE", help="a setting, or stage.field"
    )
    parser.add_argument("--gpu", metavar="CARD", help="estimate for this card, H100 say, instead of this machine")
    parser.add_argument("--samples", type=int, default=2, metavar="N", help="rows of each stage to show")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the findings and the rows as a page")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=check)


def check(options: argparse.Namespace) -> int:
    if options.samples < 0:
        raise AlignError(f"--samples {options.samples}: rows to show, at least 0")
    if options.html is not None:
        refuse_unwritable_file(options.html)
    recipe = load_recipe(options.recipe, assigned(options.assignments))
    run = Run(recipe, options.out or default_out(recipe))
    run.check(options.only)
    plan = run.plan()

    from align.preflight.cards import at_hand, card
    from align.preflight.inspect import inspect
    from align.preflight.show import page, terminal
    from align.progress import say

    machine = card(options.gpu) if options.gpu else at_hand()
    names = None if options.only is None else {options.only}
    looked = inspect(plan, names, machine=machine, samples=options.samples)
    findings = [finding for each in looked for finding in each.findings]
    errors = sum(finding.level == "error" for finding in findings)
    if options.html is not None:
        write_named(options.html, page(recipe.name, looked))
        say(f"written: {options.html}")
    if options.json:
        counts = {"errors": errors, "warnings": len(findings) - errors}
        print(json.dumps({"recipe": recipe.name, **counts, "stages": [each.plain() for each in looked]}, indent=1))
    else:
        for each in looked:
            print(f"{each.name}: {each.about}")
            for line in [finding.line() for finding in each.findings] + ([each.outlook] if each.outlook else []):
                print(f"  {line}")
            for pieces in each.samples:
                print("    " + terminal(pieces, colour=sys.stdout.isatty()).replace("\n", "\n    "))
        print(f"{recipe.name}: {errors} errors, {len(findings) - errors} warnings")
    return 1 if errors else 0
