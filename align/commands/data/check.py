"""``align data check``: does every row load, and what becomes of it."""

from __future__ import annotations

import argparse
from typing import Any

from align.commands.output import print_rows
from align.schema import KINDS


def add(actions: Any) -> None:
    parser = actions.add_parser("check", help="does every row load, and what becomes of it")
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--kind", choices=list(KINDS), help="what the rows shall be used as")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=check)


def check(options: argparse.Namespace) -> int:
    from align.data import load_rows

    rows = []
    for file in options.files:
        loaded = load_rows(file, options.kind or "sft", on_bad_row="quarantine")
        rows.append({"file": file, "summary": loaded.summary()})
    print_rows(rows, options.json, lambda row: f"{row['file']}: {row['summary']}")
    return 0
