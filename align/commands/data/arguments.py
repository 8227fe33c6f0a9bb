"""What the verbs that read rows and write others share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from align.errors import AlignError
from align.schema import KINDS


def add_reading(parser: argparse.ArgumentParser, json: str | None = "print JSON") -> None:
    """How the rows are read, and the flag ``--json`` with the help `json`, if any."""
    parser.add_argument("--kind", choices=list(KINDS), help="what the rows shall be used as (default: what they are)")
    parser.add_argument("--format", help="name of the data's format (default: recognized)")
    parser.add_argument("--split", default="train", help="split of a folder or data set")
    if json is not None:
        parser.add_argument("--json", action="store_true", help=json)


def check_outputs(sources: Iterable[str], *outputs: Path) -> None:
    """Look, before any work, whether files can be written to `outputs`.

    Raises:
        AlignError: one of them is among what is read, whose other rows would be lost; or is a folder, or its folder cannot be made.
    """
    from align.runner.files import refuse_unwritable_file
    from align.sources import files_of

    read = [file for source in sources for file in files_of(source)]
    for output in outputs:
        if output.exists() and any(output.samefile(file) for file in read):
            raise AlignError(f"{output} is what is read, and would be overwritten: name another file for the output")
        refuse_unwritable_file(output)


def visible(text: str) -> str:
    """`text` with control characters (which could steer the terminal) as their escapes."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
