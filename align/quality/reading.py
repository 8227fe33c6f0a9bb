"""Rows of a kind that nobody named."""

from __future__ import annotations

from align.data import Quarantine, Rows, RowStream, refuse_empty
from align.intake.writers import other_columns


def read(
    source: str,
    kind: str | None = None,
    *,
    format: str | None = None,
    split: str = "train",
    quarantine: Quarantine | None = None,
) -> Rows:
    """The rows of `source` as `kind`, by default as the kind that most are by themselves, with their places and other columns;
    malformed rows are set aside, with their reasons, and given to `quarantine`.

    Raises:
        AlignError: from loading.
    """
    stream = RowStream(source, kind, format=format, split=split, on_bad_row="quarantine", quarantine=quarantine)
    rows, places, others = [], [], []
    for row in stream:
        assert stream.item is not None
        rows.append(row)
        places.append((stream.item.file, stream.item.number))
        others.append(other_columns(stream.item.raw, stream.read_as, stream.kind))  # type: ignore[arg-type]
    refuse_empty(stream)
    return Rows(rows, stream.source, stream.format, stream.account, stream.set_aside, places, others)
