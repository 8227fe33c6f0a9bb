"""``align data clean``: take away what should not be trained on. Without --out nothing is written."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.commands.data.arguments import add_reading, check_outputs, visible
from align.errors import AlignError
from align.intake.account import Quarantine


def add(actions: Any) -> None:
    parser = actions.add_parser("clean", help="duplicates, mojibake, boilerplate and more: counted, shown, and taken away")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--rules", nargs="+", metavar="RULE", help="cleaning rules, as NAME or 'NAME(key=value)'")
    parser.add_argument("--also", nargs="+", default=[], metavar="RULE", help="rules besides the default ones")
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE", help="take away what repeats these evaluation sets")
    parser.add_argument("--mask", nargs="+", default=[], metavar="KIND", help="personal data to mask, or 'all'")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write the rows kept here, the others beside it")
    add_reading(parser)
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    from align.data import plain_fields, write_rows
    from align.quality.cleaning import clean
    from align.quality.personal import mask_values, patterns
    from align.quality.reading import read
    from align.quality.rules import DEFAULT

    if options.out is not None:
        if options.out.suffix != ".jsonl":
            raise AlignError(f"--out {options.out}: rows are written as .jsonl")
        aside = options.out.with_suffix(".removed.jsonl")
        check_outputs([options.file, *options.against], options.out, aside)
    unread = _Unread()
    loaded = read(options.file, options.kind, format=options.format, split=options.split, quarantine=unread)
    specs = [*(options.rules or DEFAULT), *options.also]
    if options.against:
        specs.append(f"contaminated(against={tuple(options.against)!r})")
    masks = list(patterns) if options.mask == ["all"] else options.mask
    cleaned = clean(loaded.rows, specs, masks)
    written = []
    if options.out is not None:
        beside = {n: mask_values(columns, masks)[0] for n, columns in enumerate(loaded.others, start=1)}
        removed = [
            _removed(*loaded.places[n - 1], rule, why, {**loaded.others[n - 1], **plain_fields(row)})
            for n, rule, why, row in cleaned.removed
        ]
        for n, *_ in cleaned.removed:
            del beside[n]
        write_rows(options.out, ({**beside[n], **plain_fields(row)} for n, row in zip(beside, cleaned.kept, strict=True)))
        write_rows(aside, [*unread.rows, *removed])
        written = [str(options.out), str(aside)]
    account = {"file": options.file, "loaded": loaded.summary(), **cleaned.account(loaded.places), "written": written}
    print(json.dumps(account, indent=1, ensure_ascii=False) if options.json else visible(_page(account, cleaned.summary())))
    return 0


class _Unread(Quarantine):
    """Keeps rows that are set aside while they are read, to be written beside those that a rule takes away."""

    def __init__(self) -> None:
        super().__init__(None)
        self.rows: list[dict[str, Any]] = []

    def add(self, file: str, row: int, reason: str, content: Any) -> None:
        self.rows.append(_removed(file, row, "reading", reason, content))


def _removed(file: str, number: int, rule: str, why: str, row: Any) -> dict[str, Any]:
    return {"file": file, "number": number, "rule": rule, "why": why, "row": row}


def _page(account: dict[str, Any], summary: str) -> str:
    lines = [f"{account['file']}: {account['loaded']}", f"cleaning: {summary}"]
    for rule, found in account["rules"].items():
        lines.append(f"  {rule:<20} {found['count']:>8,}")
        lines += [
            f"      {example['file']} row {example['row']}: {example['why']}: {example['text']}" for example in found["examples"]
        ]
    if account["masked"]["counts"]:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in account["masked"]["counts"].items())
        lines.append(f"  masked in {account['masked']['rows']:,} rows: {kinds}")
    lines.append(
        f"written: {', '.join(account['written'])}" if account["written"] else "nothing was written: name a file with --out"
    )
    return "\n".join(lines)
