"""Files that are whole or not there: written aside, flushed, renamed; and disks that are full."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from align.errors import AlignError, DiskFull

NO_ROOM = ("No space left on device", "iostream error")
"""What libraries say when a disk is full, without its error number; the second is torch.save."""


@contextmanager
def written_aside(path: Path, *, durable: bool = True) -> Iterator[TextIO]:
    """A text file that becomes `path` at the end of the block: a reader sees the old file or the new one, never half of it. Bytes
    are written to its ``buffer``.

    Args:
        durable: have it on the disk before returning, so that it also survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    aside = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(aside)):  # a write says that there is no room, and not where
            error.filename = str(path)
        raise
    if durable:
        flush(path.parent)
        for left in path.parent.glob(f".{path.name}.{host}.*.tmp"):  # by a process that was killed while it wrote
            if not Path(f"/proc/{left.name.split('.')[-2]}").exists() and Path("/proc/self").exists():
                left.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` to `path`, as `written_aside` does."""
    with written_aside(path, durable=durable) as file:
        file.write(text)


def write_named(path: Path, text: str) -> None:
    """`write_atomically`, to a place that a person named.

    Raises:
        AlignError: nothing can be written there.
    """
    if path.is_dir():
        raise AlignError(f"{path} is a folder: name a file in it for the output")
    try:
        write_atomically(path, text)
    except OSError as error:
        if disk_is_full(error):
            raise
        raise AlignError(f"{path} cannot be written ({error.strerror}): name another file") from error


def json_lines(path: Path, *, numbers: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a .jsonl file that is appended to; none without it. A kill may have cut the last line, which is left out.

    Args:
        numbers: fields that every record has, as numbers.

    Raises:
        AlignError: another line is no record, or has no such field.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            record = dict(json.loads(line)) if line else None
            if record is not None and (absent := [name for name in numbers if not _is_number(record.get(name))]):
                raise ValueError(f"it has no number {absent[0]!r}")
        except (ValueError, TypeError) as error:
            raise AlignError(f"{path}:{number} is damaged ({error}): mend or remove that line") from error
        found.extend([] if record is None else [record])
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < math.inf


def json_record(path: Path) -> dict[str, Any]:
    """What a .json file holds; nothing without it.

    Raises:
        AlignError: it holds something else than an object.
    """
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise AlignError(f"{path} is damaged ({error}): remove it, or have it written again") from error


def refuse_unwritable_file(file: Path) -> None:
    """`refuse_unwritable`, of a file that a person named.

    Raises:
        AlignError: it is a folder, or nothing can be written beside it.
    """
    if file.is_dir():
        raise AlignError(f"{file} is a folder: name a file in it for the output")
    refuse_unwritable(file.parent)


def refuse_unwritable(folder: Path, instead: str = "name another place for the output") -> None:
    """Find out before any work whether files can be written into `folder`, which need not be there yet. Nothing is left of it.

    Args:
        instead: what a person may do about it.

    Raises:
        AlignError: a file is in the way, or nothing can be made there.
    """
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # False also where one may not look
    if not there.is_dir():
        raise AlignError(f"{there} is a file, not a folder: {instead}")
    try:
        tempfile.TemporaryDirectory(dir=there, prefix=".align-").cleanup()  # of /proc, permissions alone tell nothing
    except OSError as error:
        if not disk_is_full(error):  # that is told where it is met
            raise AlignError(f"nothing can be written into {there} ({error.strerror}): {instead}") from error


def flush(path: Path) -> None:
    """Have `path` (a file, or a folder's list of names) on the disk: a rename alone does not survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """`flush` for every file and folder under `folder`."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            flush(path)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether `error` is, or comes from, a write that found no room."""
    while error is not None:
        full = isinstance(error, DiskFull) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or any(words in str(error) for words in NO_ROOM):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def named_when_full(place: Path) -> Iterator[None]:
    """Within, a write that finds no room ends as one line that names the disk of `place`, whatever a library makes of it.

    Raises:
        DiskFull: from `no_room`.
    """
    try:
        yield
    except Exception as error:
        if not disk_is_full(error):
            raise
        raise no_room(place) from error


def no_room(folder: Path) -> DiskFull:
    """What to tell of it."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**20
    return DiskFull(f"the disk of {folder} is full ({free:.0f} MB free); make room, and the same command goes on from where it was")
