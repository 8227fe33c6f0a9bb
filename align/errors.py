"""The one exception for mistakes that the user can fix."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class AlignError(Exception):
    """A mistake in the input: a file, a row, a config key, a name. Its message says what was wrong, where, what was expected
    and what to do. The command line prints it as one line on stderr and exits with code 2.
    """


class NonFiniteLoss(AlignError):
    """A loss that is no number. No update was made with it."""


class DiskFull(AlignError):
    """A write found no room."""


class StageFailed(AlignError):
    """A stage ended for another reason than a mistake in its input; its log tells more. Exit code 1."""


@contextmanager
def told_of(where: str) -> Iterator[None]:
    """Have an `AlignError` that is raised within begin with `where` it was."""
    try:
        yield
    except AlignError as error:
        raise type(error)(f"{where}: {error}") from error


def near_miss(word: str, options: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the option closest to `word`, or else the shortest that begins with it, if it is more than a
    letter; an empty string when there is neither.
    """
    options = list(options)
    close = difflib.get_close_matches(word, options, n=1)
    begun = sorted((option for option in options if len(word) > 1 and option.startswith(word)), key=len)
    return f" (did you mean {(close or begun)[0]!r}?)" if close or begun else ""


def near_file(path: Path) -> str:
    """`near_miss` among what lies beside `path`, where nothing is there and its folder is."""
    beside = path.parent.iterdir() if path.parent.is_dir() and not os.path.lexists(path) else ()
    return near_miss(path.name, [each.name for each in beside])


def within(message: str) -> str:
    """What pydantic says of a value, to stand within a sentence."""
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]


def first_line(error: BaseException) -> str:
    """The first line of what `error` says, and those that it announces with a colon; its type, where it says nothing."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip()
    return " ".join(str(error).split())[:400] if first.endswith(":") else first
