"""Where raw rows come from: files, folders, data sets saved on disk, the hub, entries of a dataset_info.json."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from align.errors import AlignError, near_file, near_miss
from align.intake.files import READERS, Item, Raw, class_names, from_arrow, read_file, type_of
from align.intake.info import Entry, entry_of
from align.progress import say
from align.registry import home
from align.runner.files import write_atomically

SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
PACKED = (".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar")
OFFICE = (".xlsx", ".xls", ".ods", ".docx", ".doc", ".odt", ".pdf", ".html", ".xml")
STORED = (".ndjson", ".arrow", ".feather", ".avro", ".pkl", ".db", ".sqlite")
UNREAD = {*PACKED, *OFFICE, *STORED}
"""Suffixes of files that may hold data, and that nothing here reads."""
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def read_source(source: str, split: str) -> Iterator[Item]:
    """The raw rows of `source`.

    Raises:
        AlignError: there is no such file, folder or data set, it has no such split, or it cannot be read at all.
    """
    if not source:  # a variable of the shell that is not set; as a path it would be the current folder
        raise AlignError("the source of data is an empty string, expected a file, a folder or a name; '.' is the current folder")
    entry = entry_of(source)
    if entry is not None:
        yield from _entry_rows(entry, split)
        return
    path = Path(os.path.expanduser(source))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from (Item(path.name, *row) for row in _saved(path, split))
    elif path.exists():
        for file in _data_files(path, split):
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name  # two folders may have files of one name
            yield from (item._replace(file=name) for item in read_file(file))
    else:
        yield from (Item(source, *row) for row in _hub(_hub_id(source), split))


def _entry_rows(entry: Entry, split: str) -> Iterator[Item]:
    """Rows of a LLaMA-Factory data set, under the columns that its format is known by here."""
    for taken, item in enumerate(read_source(entry.source, entry.split or split), start=1):
        yield item._replace(raw=entry.standard(item.raw)) if isinstance(item.raw, dict) else item
        if taken == entry.num_samples:
            return


def files_of(source: str) -> list[Path]:
    """The files that `source` may be read from; none for a data set of the hub."""
    entry = entry_of(source)
    if entry is not None:
        return files_of(entry.source)
    path = Path(os.path.expanduser(source))
    return [path] if path.is_file() else _files(path) if path.is_dir() else []


def fingerprint(source: str) -> str:
    """SHA-256 (hex) of the content of a file, of the names and contents of a folder's files, or of a hub id.

    Raises:
        AlignError: `source` looks like a path, and there is nothing there.
    """
    entry = entry_of(source)
    if entry is not None:
        return hashlib.sha256(f"{entry!r}\n{fingerprint(entry.source)}".encode()).hexdigest()
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return digest_of(path)
    if not path.exists():
        return hashlib.sha256(_hub_id(source).encode()).hexdigest()
    whole = hashlib.sha256()
    for file in _files(path):
        whole.update(f"{file.relative_to(path).as_posix()}\n".encode() + bytes.fromhex(digest_of(file)))
    return whole.hexdigest()


def digest_of(file: Path) -> str:
    """SHA-256 (hex) of a whole file. That of a large one is kept in ``$ALIGN_HOME/cache/sha256``, until the file is written to."""
    stat = file.stat()
    identity = (str(file.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    key = hashlib.sha256(repr(identity).encode()).hexdigest()
    kept = home() / "cache" / "sha256" / key
    if kept.is_file():
        return kept.read_text()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    settled = time.time() - max(stat.st_mtime, stat.st_ctime) > 2  # sooner, another write could have the same time
    if stat.st_size > 2**20 and settled:
        with suppress(OSError):  # no room, or a home that is only read: it is computed again
            write_atomically(kept, digest)
    return digest


# Files


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` but hidden ones and the caches that `datasets` leaves in its folders. Links to folders are
    followed, to each folder once.

    Raises:
        AlignError: a data file is a link that leads nowhere.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a second way there, or a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in names if not name.startswith((".", "cache-"))]
    if lost := next((path for path in found if path.is_symlink() and not path.exists() and type_of(path) in READERS), None):
        raise AlignError(_leads_nowhere(lost))
    return sorted(path for path in found if path.is_file())


def _leads_nowhere(link: Path) -> str:
    return f"{link}: is a link to {os.readlink(link)}, where nothing is; mend the link or remove it"


def _data_files(path: Path, split: str) -> list[Path]:
    """`path` itself, or the data files of that folder: those named for `split`, or in a folder that is, if any are named
    for a split, else all.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise AlignError(f"{path}: is neither a file nor a folder; data are read more than once, so write a pipe's to a file")
    lying = _files(path)
    files = [file for file in lying if type_of(file) in READERS and file.name not in NOT_DATA]
    # A table of Excel or in a zip, say. What has nothing of a data file in its name (a README.md) is no news.
    telling = READERS.keys() | UNREAD
    left = [file for file in lying if type_of(file) not in READERS and telling & {suffix.lower() for suffix in file.suffixes}]
    unread = f"{len(left)} of its files, {left[0].relative_to(path).as_posix()} for one" if left else ""
    if not files:
        found = f" (nothing here reads {unread})" if left else ""
        raise AlignError(f"{path}: no data files in this folder{found}; expected {', '.join(READERS)}, plain or with .gz or .zst")
    if left:
        _say_once(f"{path}: not read, as nothing here reads their kind: {unread}")
    names = (*SPLITS, split)
    told = {file: _splits_of(file.relative_to(path), names) for file in files}
    named = {name: [file for file in files if name in told[file]] for name in names}
    if not any(named.values()):
        return files
    if not named[split]:
        there = ", ".join(name for name, found in named.items() if found)
        raise AlignError(f"{path}: no files of split {split!r}; there are files of: {there}")
    if nameless := [file for file in files if not told[file]]:
        example = nameless[0].relative_to(path).as_posix()
        _say_once(f"{path}: not read, as others are named for split {split!r}: {len(nameless)} of its files, {example} for one")
    return named[split]


@cache
def _say_once(line: str) -> None:
    """A folder is read several times: before a run, in it, and where rows are counted."""
    say(line)


def _splits_of(path: Path, names: Iterable[str]) -> list[str]:
    """Which of `names` a file is named for, or else the nearest folder above it that is named for any."""
    found = ([name for name in names if re.match(rf"{re.escape(name)}([-_.]|$)", part)] for part in reversed(path.parts))
    return next(filter(None, found), [])


# Data sets of the `datasets` library


def _saved(path: Path, split: str) -> Iterator[tuple[int, Raw]]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # damaged or cut files raise whatever met them first
        raise AlignError(f"{path}: this data set cannot be read: {type(error).__name__}: {error}; save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise AlignError(f"{path}: no split {split!r}{near_miss(split, saved)}; it has: {', '.join(saved)}")
        saved = saved[split]
    yield from _rows_of(saved)


def _hub_id(source: str) -> str:
    """`source`, if it can be the id of a data set on the hub: ``owner/name`` or ``name``, and ``:config`` where it has several.

    Raises:
        AlignError: it is a path, and there is nothing there; or a data file's, misspelt.
    """
    path = Path(os.path.expanduser(source))
    if path.is_symlink():
        raise AlignError(_leads_nowhere(path))
    if "://" in source:
        raise AlignError(f"{source}: is an address; name a data set of the hub as owner/name, download other data first")
    guess, kind = near_file(path), type_of(path)
    misspelt = guess and near_miss(kind, READERS)  # alpaca.jsnl, beside alpaca.jsonl
    if misspelt or kind in READERS or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source):
        raise AlignError(f"{source}: no such file or folder{guess}")
    return source


def _hub(source: str, split: str) -> Iterator[tuple[int, Raw]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises a dozen types here: no network, no such id, no such split, no config chosen
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        lost = f"no such file or folder{near_file(Path(source))}, and the hub gives no data set of this name"
        raise AlignError(
            f"{source}: {lost}, split {split!r} ({reason}); check the path, or the network and HF_HUB_OFFLINE"
        ) from error
    yield from _rows_of(found)


def _rows_of(data: Any) -> Iterator[tuple[int, Raw]]:
    """The rows of a data set."""
    named = class_names(data.features.to_dict())
    yield from enumerate((from_arrow(row, named) for row in data), start=1)
