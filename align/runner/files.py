"""Files that are whole or not there: written aside, flushed, renamed."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def write_atomically(path: Path, text: str, *, durable: bool = True) -> None:
    """Write `text` to `path` so that a reader sees the old file or the new one, never half of it.

    Args:
        durable: have it on the disk before returning, so that it also survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = socket.gethostname()
    aside = path.with_name(f".{path.name}.{host}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)
        for left in path.parent.glob(f".{path.name}.{host}.*.tmp"):  # by a process that was killed while it wrote
            if not Path(f"/proc/{left.name.split('.')[-2]}").exists() and Path("/proc/self").exists():
                left.unlink(missing_ok=True)


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
