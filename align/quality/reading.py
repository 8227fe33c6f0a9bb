"""Rows of a kind that nobody named."""

from __future__ import annotations

from align.data import Quarantine, Rows, RowStream, refuse_empty


def read(
    source: str,
    kind: str | None = None,
    *,
    format: str | None = None,
    split: str = "train",
    quarantine: Quarantine | None = None,
) -> Rows:
    """The rows of `source` as `kind`, by default as the kind that most are by themselves; malformed rows are set aside, with their
    reasons, and given to `quarantine`.

    Raises:
        AlignError: from loading.
    """
    stream = RowStream(source, kind, format=format, split=split, on_bad_row="quarantine", quarantine=quarantine)
    rows, places = [], []
    for row in stream:
        assert stream.item is not None
        rows.append(row)
        places.append((stream.item.file, stream.item.number))
    refuse_empty(stream)
    return Rows(rows, stream.source, stream.format, stream.account, stream.set_aside, places)
