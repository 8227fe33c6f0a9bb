"""``align data check``: does every row load, and what becomes of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.commands.data.arguments import add_reading, check_outputs, visible
from align.errors import AlignError, DiskFull


def add(actions: Any) -> None:
    parser = actions.add_parser("check", help="does every row load, and what becomes of it; exit code 1 if some rows do not")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a file, a folder, or any other source of data")
    add_reading(parser, json="print a line of JSON for each file")
    parser.add_argument("--quarantine", type=Path, metavar="FILE.jsonl", help="write rows that are set aside, with their reasons")
    parser.set_defaults(handler=check)


def check(options: argparse.Namespace) -> int:
    """0: every row is used; 1: some are set aside, or a file could not be read (to its end); 2: nothing could be read."""
    from align.data import Quarantine, RowStream
    from align.intake.account import refuse_other_file
    from align.progress import say

    if options.quarantine is not None:
        check_outputs(options.files, options.quarantine)
        refuse_other_file(options.quarantine)
    quarantine = Quarantine(options.quarantine)
    read = clean = 0
    for file in options.files:
        stream = RowStream(
            file, options.kind, format=options.format, split=options.split, on_bad_row="quarantine", quarantine=quarantine
        )
        error = None
        try:
            for _ in stream:
                pass
        except DiskFull:  # of the quarantine: nothing that is wrong with the file
            raise
        except AlignError as caught:
            error = str(caught)
        account = stream.account
        read += account.rows > 0 and bool(stream.format)  # of bytes that are no text, or text that is no row, no format is known
        clean += account.rows > 0 and not account.set_aside and error is None
        if options.json:
            found = {"file": file, "format": stream.format or None, "kind": stream.kind, **account.as_dict()}
            print(json.dumps(found | ({"error": error} if error else {}), ensure_ascii=False))
        elif account.rows or error is None:
            cut = "; the rest was not read" if error else ""
            known = f"{stream.format or 'no known format'}, {stream.kind or 'no known kind'}"
            print(f"{file}: {known}: {visible(account.summary())}{cut}")
            for place, reason in stream.set_aside[:3]:
                print(f"  {place}: {visible(reason)}")
        if error or not account.rows:
            say(f"align: {error or f'{file}: no rows: it is empty'}")
    return 2 if not read else int(clean < len(options.files))
