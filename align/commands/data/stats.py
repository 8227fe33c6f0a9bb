"""``align data stats``: lengths, turns, languages, labels."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.commands.data.arguments import add_reading, check_outputs, visible
from align.errors import AlignError
from align.registry import Registry

PLOTS = (".png", ".svg", ".pdf", ".jpg")


def add(actions: Any) -> None:
    parser = actions.add_parser("stats", help="lengths, turns, languages, labels; with a plot if you like")
    parser.add_argument("files", nargs="+", metavar="FILE")
    add_reading(parser, json="print a line of JSON for each file")
    parser.add_argument("--model", help="count tokens of this model's tokenizer instead of characters")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the lengths of the first file")
    parser.set_defaults(handler=stats)


def stats(options: argparse.Namespace) -> int:
    from align.data import RowStream, refuse_empty
    from align.intake.statistics import Statistics
    from align.progress import say

    if options.plot is not None:
        check_outputs(options.files, options.plot)
        if options.plot.suffix not in PLOTS:
            raise AlignError(f"--plot {options.plot}: expected a file that ends in {', '.join(PLOTS)}")
    length: Any = len
    if options.model:
        from align.models import load_tokenizer

        tokenizer = load_tokenizer(Registry().resolve(options.model).path)
        length = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    unit = "tokens" if options.model else "characters"
    for number, file in enumerate(options.files):
        stream = RowStream(file, options.kind, format=options.format, split=options.split, on_bad_row="quarantine")
        found = Statistics(stream, length)
        refuse_empty(stream)
        print(json.dumps(found.as_dict(), ensure_ascii=False) if options.json else visible(_page(found, unit)))
        if options.plot and number == 0:
            found.plot(options.plot, unit)
            say(f"drawn: {options.plot}")
    return 0


def _page(found: Any, unit: str) -> str:
    values = found.as_dict()
    lines = [f"{values['file']}: {values['format']}, {values['kind']}: {found.stream.account.summary()}"]
    heads = ("mean", "10%", "50%", "90%", "max")
    lines.append(f"  {unit:<14}" + "".join(f"{head:>10}" for head in heads))
    for name, numbers in values["lengths"].items():
        lines.append(f"  {name:<14}" + "".join(f"{numbers[head]:>10,}" for head in heads))
    for title, counts in (("user turns", "user_turns"), ("labels", "labels"), ("languages", "languages")):
        if values[counts]:
            total = sum(values[counts].values())
            parts = [f"{name} {count / total:.1%}" for name, count in list(values[counts].items())[:8]]
            lines.append(f"  {title:<14}{', '.join(parts)}")
    lines += [f"  {name:<18}{share:.1%}" for name, share in values["shares"].items()]
    return "\n".join(lines)
