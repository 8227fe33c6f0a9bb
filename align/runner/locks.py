"""One writer at a time for a folder. The kernel lets go of a lock when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from align.errors import AlignError
from align.progress import say
from align.runner.files import named_when_full


@contextmanager
def lock(folder: Path, label: str | None = None, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `folder`, the file ``.NAME.lock`` beside it, and remove it at the end.

    Args:
        label: who waits, to be said if it does.

    Raises:
        AlignError: another process holds it, and `wait` is off.
        DiskFull: there is no room to say who holds it.
    """
    path = lock_file(folder)
    file = _try(folder)
    if file is None:
        holder = f"{label}: {_holder(path)} works in {folder}"
        if not wait:
            raise AlignError(f"{holder}; wait until it is done, or run without --no-wait")
        if label is not None:
            say(f"{holder}; waiting for it")
        file = _acquire(path, blocking=True)
    assert file is not None
    with file:
        try:
            with named_when_full(path):
                file.truncate(0)
                os.write(file.fileno(), json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def lock_if_free(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder`, unless another process does; whether it is held. Nothing is written: the disk may be full."""
    file = _try(folder)
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            lock_file(folder).unlink(missing_ok=True)


def lock_file(folder: Path) -> Path:
    """The lock of `folder` lies beside it, because the folder itself may be taken away."""
    return folder.with_name(f".{folder.name}.lock")


def is_locked(folder: Path) -> bool:
    """Whether somebody works in `folder` now."""
    path = lock_file(folder)
    if not path.exists():
        return False
    try:
        with path.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def clear(folder: Path) -> None:
    """Remove the lock file of one who was killed."""
    path = lock_file(folder)
    if path.exists() and (file := _acquire(path, blocking=False)) is not None:
        with file:
            path.unlink()


def _try(folder: Path) -> IO[str] | None:
    """The locked file of `folder`, or None when another holds it."""
    while (file := _acquire(lock_file(folder), blocking=False)) is None and not is_locked(folder):
        pass  # somebody only looked, as `is_locked` does
    return file


def _acquire(path: Path, *, blocking: bool) -> IO[str] | None:
    """The locked file, or None when another holds it. A lock on a file that was removed meanwhile is none: try again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if blocking else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        file.close()


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
