"""Where raw rows come from: files, folders, data sets saved on disk, the hub. Nothing here knows what a row means."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from align.errors import AlignError, near_miss
from align.formats import documents
from align.schema import problem

Raw = dict[str, Any]
Numbered = tuple[int, Raw | AlignError]
"""A row number, counted from 1, and the row; or what is wrong with it, where the rows behind it can still be read."""

SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


def read_source(source: str, split: str) -> Iterator[tuple[str, int, Raw | AlignError]]:
    """The raw rows of `source`: the name of their file, their number in it, and the row or what is wrong with it.

    Raises:
        AlignError: there is no such file, folder or data set, it has no such split, or it cannot be read at all.
    """
    path = Path(source).expanduser()
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        yield from ((path.name, *row) for row in _saved(path, split))
    elif path.exists():
        for file in _data_files(path, split):
            yield from ((file.name, *row) for row in _read_file(file))
    else:
        yield from ((source, *row) for row in _hub(_hub_id(source), split))


def fingerprint(source: str) -> str:
    """SHA-256 (hex) of the content of a file, of the names and contents of a folder's files, or of a hub id.

    Raises:
        AlignError: `source` looks like a path, and there is nothing there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _digest(path).hexdigest()
    if not path.exists():
        return hashlib.sha256(_hub_id(source).encode()).hexdigest()
    whole = hashlib.sha256()
    for file in _files(path):
        whole.update(f"{file.relative_to(path).as_posix()}\n".encode() + _digest(file).digest())
    return whole.hexdigest()


def _digest(path: Path) -> Any:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256")


# Files


def _files(folder: Path) -> list[Path]:
    """Every file below `folder` but hidden ones and the caches that `datasets` leaves in its folders."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("cache-"))
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _data_files(path: Path, split: str) -> list[Path]:
    """`path` itself, or the data files of that folder: those named for `split` if any are named for a split, else all."""
    if path.is_file():
        return [path]
    files = [file for file in _files(path) if _kind_of_file(file) in READERS and file.name not in NOT_DATA]
    if not files:
        raise AlignError(f"{path}: no data files in this folder; expected {', '.join(READERS)}, plain or with .gz or .zst")
    named = {name: [file for file in files if re.match(rf"{re.escape(name)}([-_.]|$)", file.name)] for name in (*SPLITS, split)}
    if not any(named.values()):
        return files
    if not named[split]:
        there = ", ".join(name for name, found in named.items() if found)
        raise AlignError(f"{path}: no files of split {split!r}; there are files of: {there}")
    return named[split]


def _kind_of_file(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path) -> Iterator[Numbered]:
    kind = _kind_of_file(path)
    if kind not in READERS:
        raise AlignError(
            f"{path}: cannot read {kind or 'files without a suffix'}{near_miss(kind, READERS)}; expected {', '.join(READERS)}"
        )
    try:
        with _open(path) as stream:
            yield from READERS[kind](stream)
    except UnicodeDecodeError as error:
        raise AlignError(f"{path}: not UTF-8 (byte {error.object[error.start]:#04x}: {error.reason}); convert it") from error
    except AlignError:
        raise
    except Exception as error:  # each compression and file type has its own for a file that is damaged or cut
        raise AlignError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix != ".zst":
        return path.open("rb")
    try:
        import zstandard
    except ImportError:
        raise AlignError(f"{path}: reading .zst needs the package zstandard: pip install zstandard") from None
    return io.BufferedReader(zstandard.open(path, "rb"))


def _json_lines(stream: IO[bytes]) -> Iterator[Numbered]:
    """One object a line. Lines end at the byte ``\\n`` alone: U+2028 and the like belong to the text."""
    for number, line in enumerate(stream, start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, _as_row(_parse(line))


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        return AlignError(f"column {error.colno}: invalid JSON: {error.msg}")
    except UnicodeDecodeError as error:
        return AlignError(f"byte {error.start + 1}: not UTF-8")


def _as_row(value: Any) -> Raw | AlignError:
    return value if isinstance(value, dict | AlignError) else AlignError(problem("row", value, "an object with named columns"))


def _json(stream: IO[bytes]) -> Iterator[Numbered]:
    """One array of objects, or (as some .json files are) one object a line."""
    content = stream.read().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from _json_lines(io.BytesIO(content))
        return
    try:
        values = json.loads(content.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise AlignError(f"{_name(stream)} line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}") from error
    yield from ((number, _as_row(value)) for number, value in enumerate(values, start=1))


def _name(stream: IO[bytes]) -> str:
    return Path(str(getattr(stream, "name", "file"))).name


def _table(delimiter: str) -> Callable[[IO[bytes]], Iterator[Numbered]]:
    def read(stream: IO[bytes]) -> Iterator[Numbered]:
        csv.field_size_limit(sys.maxsize)
        rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), delimiter=delimiter)
        for number, row in enumerate(rows, start=1):
            cells = [cell for column, cell in row.items() if column is not None]
            if None in row or None in cells:
                yield (
                    number,
                    AlignError(f"the header has {len(rows.fieldnames or [])} columns, this row has another number of cells"),
                )
            else:
                yield number, row

    return read


def _text(stream: IO[bytes]) -> Iterator[Numbered]:
    content = io.TextIOWrapper(stream, "utf-8-sig").read()
    yield from ((number, {"text": document}) for number, document in enumerate(documents(content), start=1))


def _parquet(stream: IO[bytes]) -> Iterator[Numbered]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    batches = pyarrow.parquet.ParquetFile(stream).iter_batches()
    yield from enumerate((_without_nulls(row) for batch in batches for row in batch.to_pylist()), start=1)


READERS: dict[str, Callable[[IO[bytes]], Iterator[Numbered]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _text,
}


# Data sets of the `datasets` library


def _without_nulls(row: Raw) -> Raw:
    """`row` without the keys that Arrow adds to nested dictionaries (as null) because some other row has them."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items() if each is not None}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return {column: clean(value) for column, value in row.items()}


def _saved(path: Path, split: str) -> Iterator[Numbered]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise AlignError(f"{path}: no split {split!r}{near_miss(split, saved)}; it has: {', '.join(saved)}")
        saved = saved[split]
    yield from enumerate(map(_without_nulls, saved), start=1)


def _hub_id(source: str) -> str:
    """`source`, if it can be the id of a data set on the hub: ``owner/name`` or ``name``, and ``:config`` where it has several.

    Raises:
        AlignError: it is a path, and there is nothing there.
    """
    path = Path(source).expanduser()
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", source) or _kind_of_file(path) in READERS:
        raise AlignError(f"{source}: no such file or folder{_neighbours(path)}")
    return source


def _neighbours(path: Path) -> str:
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    return near_miss(path.name, beside) if beside else ""


def _hub(source: str, split: str) -> Iterator[Numbered]:
    import datasets

    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the library raises a dozen types here: no network, no such id, no such split, no config chosen
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
        lost = f"no such file or folder{_neighbours(Path(source))}, and the hub gives no data set of this name"
        raise AlignError(
            f"{source}: {lost}, split {split!r} ({reason}); check the path, or the network and HF_HUB_OFFLINE"
        ) from error
    yield from enumerate(map(_without_nulls, found), start=1)
