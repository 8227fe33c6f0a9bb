"""Rows of a kind that nobody named: the richest that the source's format gives."""

from __future__ import annotations

from align.data import GIVES, Rows, detect, kind_of, load_rows
from align.errors import AlignError
from align.formats import SetAside, formats
from align.sources import read_source


def read(
    source: str, kind: str | None = None, *, format: str | None = None, split: str = "train", limit: int | None = None
) -> Rows:
    """The rows of `source` as `kind`, by default as what its first row is; malformed rows are set aside, with their reasons.

    Raises:
        AlignError: from loading.
    """
    kind = kind or native_kind(source, format=format, split=split)
    return load_rows(source, kind, format=format, split=split, limit=limit, on_bad_row="quarantine")


def native_kind(source: str, *, format: str | None = None, split: str = "train") -> str:
    """The kind of the first row of `source` that can be read.

    Raises:
        AlignError: there is none.
    """
    for _, _, raw in read_source(source, split):
        if isinstance(raw, AlignError):
            continue
        try:
            name = format or detect(raw, "prompts" if "text" not in raw else "text")
            found = [fields for fields in formats[name](raw) if not isinstance(fields, SetAside)]
        except (AlignError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue  # `load_rows` will say what is wrong with it
        if found:
            return kind_of(found[0])
    raise AlignError(f"{source}: no row can be read, so what kind they are is unknown; name it: {', '.join(GIVES)}")
