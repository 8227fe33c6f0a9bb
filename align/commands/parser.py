"""The parser of every verb."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from align.errors import AlignError, near_miss


class Help(argparse.HelpFormatter):
    """Tells the default of every flag that has one, where its own words do not."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        plain = isinstance(action.default, int | float | str) and not isinstance(action.default, bool)
        return f"{told} (default: %(default)s)" if plain and action.default != argparse.SUPPRESS and "default" not in told else told


class Parser(argparse.ArgumentParser):
    """Tells a mistake as all others are told, in one line, instead of printing its usage and leaving. A `Path` is read by
    `place`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": Help, **options})
        self.register("type", Path, place)

    def parse_known_args(self, *arguments: Any, **options: Any) -> Any:
        found, rest = super().parse_known_args(*arguments, **options)
        if rest and not getattr(found, "reads_flags", False):
            near = near_miss(rest[0].partition("=")[0], self._option_string_actions)
            raise AlignError(f"unknown argument {rest[0]!r}{near}; see `{self.prog} --help`")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            near = near_miss(str(value), [str(choice) for choice in action.choices])
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{near}; known: {', '.join(map(str, action.choices))}")

    def error(self, message: str) -> NoReturn:
        raise AlignError(f"{message}; see `{self.prog} --help`")


def place(text: str) -> Path:
    """The path `text`. A shell reads ``--out ~/x``, but not ``--out=~/x``.

    Raises:
        argparse.ArgumentTypeError: it is empty, as an unset variable of the shell is, and would be the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("it names no file or folder")
    return Path(os.path.expanduser(text))
