"""``align data convert``: rows in the layout of another format, every field kept."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.commands.data.arguments import add_reading, check_outputs
from align.errors import AlignError


def add(actions: Any) -> None:
    parser = actions.add_parser("convert", help="write rows in the layout of another format; what it cannot hold is refused")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="native, openai, sharegpt, alpaca, hh, ultrafeedback or text")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl")
    add_reading(parser, json=None)
    parser.add_argument("--on_bad_row", default="raise", choices=["raise", "quarantine"])
    parser.set_defaults(handler=convert)


def convert(options: argparse.Namespace) -> int:
    from align.data import Quarantine, RowStream, refuse_empty, write_rows
    from align.intake.account import Account
    from align.intake.writers import other_columns, writers, written
    from align.progress import say

    writers[options.to]
    aside = options.out.with_suffix(".quarantine.jsonl") if options.on_bad_row == "quarantine" else None
    check_outputs([options.file], options.out, *([aside] if aside else []))
    quarantine = Quarantine(aside)
    stream = RowStream(
        options.file,
        options.kind,
        format=options.format,
        split=options.split,
        on_bad_row=options.on_bad_row,
        quarantine=quarantine,
    )
    account = Account()

    def rows() -> Iterator[dict[str, Any]]:
        for row in stream:
            item = stream.item
            assert item is not None
            assert stream.kind is not None
            try:
                found = written(row, stream.kind, options.to)
            except AlignError as error:
                if options.on_bad_row == "raise":
                    raise AlignError(f"{item.file} row {item.number}, {error}") from error
                account.put_aside(1, str(error))
                quarantine.add(item.file, item.number, str(error), item.raw)
                continue
            account.use(1, [])
            account.gave += 1
            yield {**other_columns(item.raw, stream.read_as, stream.kind), **found}  # type: ignore[arg-type]
        refuse_empty(stream)  # before anything takes the place of an older file
        if not account.gave:
            raise AlignError(f"{options.file}: no rows to write as {options.to}: {account.summary()}{quarantine.note(account)}")

    write_rows(options.out, rows())
    say(f"{options.file}: {stream.account.summary()}{quarantine.note(stream.account)}")
    say(f"{options.out}: {stream.kind} rows as {options.to}: {account.summary()}{quarantine.note(account)}")
    return 0
