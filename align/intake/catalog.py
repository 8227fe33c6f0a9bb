"""The catalog of data formats: how to recognize a format, and how to read its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from align.catalog import Catalog
from align.turns import Fields, Raw


@dataclass(frozen=True)
class SetAside:
    """A well-formed row with nothing to train on: `reason` says why. It is counted, never dropped in silence."""

    reason: str


@dataclass(frozen=True)
class Format:
    """How to recognize the rows of one format, and read them."""

    read: Callable[[Raw], Fields | SetAside | list[Fields]]
    needs: tuple[str, ...]
    """Columns without which a row is not of this format."""
    when: Callable[[Raw], bool]
    """A look at the other columns or the values, where these columns do not decide."""
    prompt: tuple[str, ...]
    """Columns that the prompt is made of; a prompt row keeps all others for the reward functions."""

    def __call__(self, raw: Raw) -> list[Fields] | list[SetAside]:
        found = self.read(raw)
        if isinstance(found, SetAside):
            return [found]
        return found if isinstance(found, list) else [found]

    def matches(self, raw: Raw) -> bool:
        return all(column in raw for column in self.needs) and self.when(raw)


formats: Catalog[Format] = Catalog("data format")


def data_format(*needs: str, when: Callable[[Raw], bool] = lambda raw: True, prompt: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Register the decorated function as the format of its name; `needs`, `when` and `prompt` are those of `Format`."""

    def register(read: Callable[[Raw], Any]) -> Callable[[Raw], Any]:
        formats.add(Format(read, needs, when, prompt or needs), read.__name__)
        return read

    return register
