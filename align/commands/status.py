"""``align status RUN``: how a run, or one stage, stands, from any terminal."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from align.commands.output import print_rows
from align.errors import AlignError
from align.registry import run_folder
from align.runner.view import as_line, statuses

CLEAR = "\x1b[H\x1b[J"


def add(verbs: Any) -> None:
    parser = verbs.add_parser("status", help="how the stages of a run stand: running, done, failed, interrupted")
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="output folder of a run or a stage, or its name under the home folder"
    )
    parser.add_argument("--watch", action="store_true", help="show it again every two seconds, until nothing runs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=status)


def status(options: argparse.Namespace) -> int:
    folder = run_folder(options.run)
    found = _standing(folder)
    if not found:
        raise AlignError(f"no run folder {options.run}: no stage has begun there")
    while True:
        if options.watch and sys.stdout.isatty():
            print(CLEAR, end="")
        print_rows(found, options.json, partial(as_line, width=max(len(one["name"]) for one in found)))
        if not options.watch or not any(one["state"] == "running" for one in found):
            return 0
        time.sleep(2.0)
        found = _standing(folder)


def _standing(folder: Path) -> list[dict[str, Any]]:
    """The stages of the run in `folder`; or the one whose own folder it is, and whose log lies beside it."""
    if (folder / "logs").is_dir():
        return statuses(folder)
    return [status for status in statuses(folder.parent) if Path(status["folder"]) == folder.resolve()]
