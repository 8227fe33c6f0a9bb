"""The parser of every verb."""

from __future__ import annotations

import argparse
from typing import NoReturn

from align.errors import AlignError


class Parser(argparse.ArgumentParser):
    """Tells a mistake as all others are told, in one line, instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise AlignError(f"{message}; see `{self.prog} --help`")
