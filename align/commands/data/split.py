"""``align data split``: two files that share no prompt and no near copy of one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.commands.data.arguments import add_reading, check_outputs


def add(actions: Any) -> None:
    parser = actions.add_parser("split", help="part rows by prompt, near copies kept together, stable when rows are added")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--held_out", type=float, default=0.05, metavar="SHARE", help="share of the prompts held out")
    parser.add_argument("--threshold", type=float, help="similarity of near copies (default: 0.7)")
    parser.add_argument("--seed", type=int, default=0, help="of which prompts are held out")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="for train.jsonl and test.jsonl")
    add_reading(parser)
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    from align.data import plain_fields, write_rows
    from align.quality.duplicates import THRESHOLD
    from align.quality.reading import read
    from align.quality.splits import split_rows

    files = {name: options.out / f"{name}.jsonl" for name in ("train", "test", "between")}
    check_outputs([options.file], *files.values())
    loaded = read(options.file, options.kind, format=options.format, split=options.split)
    split = split_rows(loaded.rows, options.held_out, options.seed, THRESHOLD if options.threshold is None else options.threshold)
    others = {id(row): columns for row, columns in zip(loaded.rows, loaded.others, strict=True)}
    parts = {"train": split.train, "test": split.held_out, "between": split.between}
    for name, rows in parts.items():
        if rows or name != "between":
            write_rows(files[name], ({**others[id(row)], **plain_fields(row)} for row in rows))
        else:
            files[name].unlink(missing_ok=True)  # that of an earlier split
    counts = {"rows": len(loaded.rows), **{name: len(rows) for name, rows in parts.items()}}
    if options.json:
        print(json.dumps({"file": options.file, "loaded": loaded.summary(), **counts}))
    else:
        print(f"{options.file}: {loaded.summary()}")
        print("{rows:,} rows = {train:,} train + {test:,} test + {between:,} near prompts of both sides".format(**counts))
    return 0
