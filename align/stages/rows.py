"""A stage's rows: read, mixed and split; in memory, or on disk where they are larger than that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import compress, islice
from pathlib import Path
from typing import Any

from align.data import Quarantine, RowStream, all_held_out, is_held_out, refuse_empty
from align.encode import Encoded
from align.errors import AlignError
from align.forest import Tree
from align.intake.mixture import chosen, shares
from align.intake.store import RowFile, TreeFile
from align.progress import bar, say
from align.sources import files_of
from align.stages.base import Context
from align.stages.fields import DataFields

STREAMING_STAGES = ("pretrain", "sft", "reward", "preference")
"""Stages that read their rows from front to back, and after that need trees alone."""
LARGE = 256 * 2**20
"""Bytes of data from which on `streaming: auto` keeps them on disk: rows and trees in memory take about ten times as much."""
GROUP = 4096
"""Rows in memory while they are encoded."""

Rows = list[Any] | RowFile


def rows_of(stage: DataFields, kind: str, context: Context) -> tuple[Any, Any]:
    """Training and held-out rows of `kind`, with a line for each source that says what became of its rows. Rows that were set
    aside are in ``quarantine.jsonl`` in the stage's folder.

    Raises:
        AlignError: from loading; or nothing is left to train on.
    """
    quarantine = quarantine_in(context)
    folder = context.folder if streams(stage) else None
    train, held = _container(folder), _container(folder)
    share = stage.held_out if stage.eval_data is None else 0.0
    if folder is not None:
        say(f"{context.name}: rows and their tokens are kept on disk")
    for row in _mixture(stage, kind, context.name, quarantine, folder):
        (held if share and is_held_out(row, share) else train).append(row)
    for source in stage.eval_data or []:
        for row in _read(stage, source, None, kind, f"{context.name} (held out)", quarantine):
            held.append(row)
    if not len(train):
        raise all_held_out(stage.data, share)
    return train, held


def quarantine_in(context: Context, name: str = "quarantine.jsonl") -> Quarantine:
    """Where rows that are set aside are kept: of several processes, which all read them, the first writes them down."""
    return Quarantine(context.folder / name if context.history.writes else None)


def read_rows(stage: DataFields, sources: Sequence[str], kind: str, label: str, quarantine: Quarantine) -> list[Any]:
    """Rows of `kind` from each of `sources` in turn, in memory. They are not the stage's own `data`, whose `data_format` tells
    nothing of theirs: it is recognized by their columns.
    """
    stage = stage.model_copy(update={"data_format": None})
    return [row for source in sources for row in _read(stage, source, None, kind, label, quarantine)]


def _container(folder: Path | None) -> Rows:
    return [] if folder is None else RowFile(folder)


def _mixture(stage: DataFields, kind: str, label: str, quarantine: Quarantine, folder: Path | None) -> Iterator[Any]:
    """Rows of the sources of `data` one after the other; with `data_weights` as many of each as their shares ask for."""
    caps = stage.max_rows_per_source or [None] * len(stage.data)
    parts = [_read(stage, source, cap, kind, label, quarantine) for source, cap in zip(stage.data, caps, strict=True)]
    if stage.data_weights is None:
        for part in parts:
            yield from part
        return
    kept = [_container(folder) for _ in parts]
    for rows, part in zip(kept, parts, strict=True):
        for row in part:
            rows.append(row)
    wanted = shares([len(rows) for rows in kept], stage.data_weights)
    for number, (source, rows, count) in enumerate(zip(stage.data, kept, wanted, strict=True)):
        say(f"{label}: {source}: {count:,} of {len(rows):,} rows are in the mixture, by data_weights")
        yield from compress(rows, chosen(len(rows), count, number))


def _read(stage: DataFields, source: str, cap: int | None, kind: str, label: str, quarantine: Quarantine) -> Iterator[Any]:
    """The rows of one source, and at their end a line that says what became of them."""
    limit = min((number for number in (cap, stage.max_rows) if number is not None), default=None)
    stream = RowStream(
        source,
        kind,
        format=stage.data_format,
        split=stage.data_split,
        limit=limit,
        on_bad_row=stage.on_bad_row,
        quarantine=quarantine,
    )
    with bar(label, None, "row") as progress:
        for row in stream:
            yield row
            progress.update()
    refuse_empty(stream)
    say(f"{label}: {source}: {stream.account.summary()}{quarantine.note(stream.account)}")


def streams(stage: DataFields) -> bool:
    """Whether the stage's rows are kept on disk.

    Raises:
        AlignError: this is asked for, and the stage needs its rows in memory.
    """
    able = getattr(stage, "stage", None) in STREAMING_STAGES and getattr(stage, "engine", None) == "forest"
    if stage.streaming is True and not able:
        raise AlignError(f"streaming: the stages {', '.join(STREAMING_STAGES)} can, on engine 'forest'; leave it at auto")
    if getattr(stage, "replay_data", None):  # mixed into rows in memory
        if stage.streaming is True:
            raise AlignError("streaming: replay_data is mixed into rows in memory; leave it at auto, or set it to false")
        return False
    return able and (stage.streaming is True or (stage.streaming == "auto" and _size(stage.data) >= LARGE))


def _size(sources: Sequence[str]) -> int:
    """Bytes of the files of `sources`; what is no local file or folder counts nothing."""
    return sum(file.stat().st_size for source in sources for file in files_of(source))


# -- trees ---------------------------------------------------------------------------------------------------------------------


def encoded(encode: Callable[[Sequence[Any]], Encoded], rows: Rows, label: str) -> Any:
    """Trees of `rows`, on disk where these are; see `usable`."""
    if not rows:
        return []
    return usable(_encoded_on_disk(encode, rows, label) if isinstance(rows, RowFile) else encode(rows), label)


def _encoded_on_disk(encode: Callable[[Sequence[Any]], Encoded], rows: RowFile, label: str) -> Encoded:
    whole = Encoded([], [])

    def trees() -> Iterator[Tree]:
        nonlocal whole
        left = iter(rows)
        with bar(label, len(rows), "row") as progress:
            while group := list(islice(left, GROUP)):
                part = encode(group)
                whole = whole.counted(part)
                progress.update(len(group))
                yield from part.trees
                del part, group  # before the next ones are made

    file = TreeFile(rows.folder, trees())
    return replace(whole, trees=file)


def usable(result: Encoded, label: str) -> Any:
    """The trees of `result`, with a line where a row was cut or set aside.

    Raises:
        AlignError: no row survived.
    """
    if result.set_aside or result.cut_rows:
        say(f"{label}: {result.summary()}")
    if not result.trees:
        raise AlignError(f"{label}: none of the rows can be used: {result.summary()}")
    return result.trees


def longest(*groups: Sequence[Tree]) -> int:
    """Tokens in the longest path of all `groups`."""
    return max(group.longest if isinstance(group, TreeFile) else max(tree.longest for tree in group) for group in groups if group)


def rewritten(trees: TreeFile, change: Callable[[list[Tree]], list[Tree]], group: int = 1 << 15) -> TreeFile:
    """A file of what `change` makes of the trees of another, a group at a time."""
    return TreeFile(trees.folder, (tree for start in range(0, len(trees), group) for tree in change(trees[start : start + group])))
