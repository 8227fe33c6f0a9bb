"""The arguments of every verb that reads rows and writes others."""

from __future__ import annotations

import argparse


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How the rows are read, and whether the account is printed as JSON."""
    from align.schema import KINDS

    parser.add_argument("--kind", choices=list(KINDS), help="what the rows are; recognised by default")
    parser.add_argument("--format", help="name of the data's format; recognised by default")
    parser.add_argument("--split", default="train", help="split of a folder or hub data set")
    parser.add_argument("--json", action="store_true", help="print JSON")
