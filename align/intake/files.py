"""Readers of files: one function a file type, from a path to numbered raw rows. Nothing here knows what a row means.

All but JSON documents are read in bounded memory, whatever their size.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from align.errors import AlignError, near_miss
from align.intake import layouts
from align.intake.opening import broken_text, decompressed, open_bytes, open_text
from align.schema import problem, short

Raw = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A row that cannot be read, where those behind it can: why, and what is there instead."""

    reason: str
    content: str


class Item(NamedTuple):
    """A raw row, or what is wrong with it."""

    file: str
    """Its name, in a folder that is read as a whole with the folders above it."""
    number: int
    """Its place in the file, from 1; in a text file, the line it begins at."""
    raw: Raw | Unreadable
    rows: int = 1
    """How many of the file's rows it stands for: a document of a text file stands for its lines."""


Numbered = tuple[int, Raw | Unreadable] | tuple[int, Raw | Unreadable, int]


def read_file(path: Path) -> Iterator[Item]:
    """The rows of one file.

    Raises:
        AlignError: no reader knows its type; or it cannot be read, or no further.
    """
    kind = type_of(path)
    if kind not in READERS:
        what = kind or "files without a suffix"
        known = ", ".join(READERS)
        raise AlignError(
            f"{path}: cannot read {what}{near_miss(kind, READERS)}; expected {known}: save or unpack it as one of these"
        )
    try:
        for numbered in READERS[kind](path):
            yield Item(path.name, *numbered)
    except AlignError:
        raise
    except Exception as error:  # each compression and file type has its own for a file that is damaged or cut
        raise AlignError(
            f"{path}: cannot be read: {type(error).__name__}: {error}; if it was cut or damaged, write or download it again"
        ) from error


def type_of(path: Path) -> str:
    """The suffix that says how to read `path`, without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


# JSON


class _Decoder(json.JSONDecoder):
    """Python's, which of a key that stands twice in an object keeps the last value in silence. This one notes it."""

    wrong: str | None = None
    """What is wrong with the value that was read last."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)

    def _object(self, pairs: list[tuple[str, Any]]) -> Raw:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for i, name in enumerate(names) if name in names[:i])
            self.wrong = f"field {short(twice)[1:-1]}: stands twice in one object; leave one of the two out"
        return found

    def raw_decode(self, s: str, idx: int = 0) -> tuple[Any, int]:
        self.wrong = None
        return super().raw_decode(s, idx)


def _json_lines(path: Path) -> Iterator[Numbered]:
    """One object a line. Lines end at the byte ``\\n`` alone: U+2028 and the like belong to the text."""
    decoder = _Decoder()
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                _check_lines(path, line.strip())
            if line.strip():
                yield number, _parsed(line, decoder)


def _check_lines(path: Path, first: bytes) -> None:
    """Refuse, by its first line, a file whose objects are no lines: each of its lines would be a row that is not JSON."""
    if first == b"[" or first.startswith(b"[{"):
        raise AlignError(f"{path}: is a JSON array, expected one object a line: let its name end in .json")
    if first == b"{":
        raise AlignError(f"{path}: its objects take up several lines, expected one a line: jq -c . {path.name}")


def _parsed(line: bytes, decoder: _Decoder) -> Raw | Unreadable:
    line = line.rstrip(b"\r\n")
    try:
        value = decoder.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"byte {error.start + 1}: not UTF-8{_field_before(line[: error.start].decode())}"
    except json.JSONDecodeError as error:
        reason = f"column {error.colno}: invalid JSON: {error.msg}{_field_before(error.doc[: error.pos])}"
    except ValueError:
        reason = "invalid JSON: a number of thousands of digits"
    except RecursionError:
        reason = "invalid JSON: nested too deeply"
    else:
        if isinstance(value, dict) and not decoder.wrong:
            return value
        reason = decoder.wrong or problem("row", value, "an object with named columns")
    return Unreadable(reason, line.decode("utf-8", "surrogateescape"))


def _field_before(text: str) -> str:
    """The last key that stands before a broken place, in words."""
    keys = re.findall(r'"([^"\\]{1,60})"\s*:', text[-100_000:])
    return f" (in field {keys[-1]})" if keys else ""


def _json(path: Path) -> Iterator[Numbered]:
    """An array of objects; or one object that holds such an array; or, as some .json files are, one object a line."""
    with open_text(path) as stream:
        start = stream.read(1 << 16)
    if start.lstrip().startswith("["):
        yield from _json_array(path)
        return
    with open_text(path) as stream:
        full = filter(str.strip, stream)
        first, second = next(full, ""), next(full, "")
    if second:
        try:
            json.loads(first)
        except ValueError:  # it goes on in the next line, so it is no row by itself
            pass
        else:
            yield from _json_lines(path)
            return
    with open_text(path) as stream:
        content = stream.read()
    if not content.strip():
        return
    decoder = _Decoder()
    try:
        document = decoder.decode(content)
    except json.JSONDecodeError as error:
        more = "; put all rows into one array, or each on a line of its own" if error.msg == "Extra data" else ""
        raise AlignError(f"{path.name} line {error.lineno}, column {error.colno}: invalid JSON: {error.msg}{more}") from error
    if decoder.wrong:
        raise AlignError(f"{path.name}, {decoder.wrong}")
    sound = broken_text(content) is None
    if isinstance(document, dict) and document and all(isinstance(cells, dict) and "0" in cells for cells in document.values()):
        raise AlignError(f"{path}: has its rows in columns, as pandas writes them; write it with to_json(..., orient='records')")
    for number, row in enumerate(layouts.rows_of(document), start=1):
        yield number, _sound(row, "" if sound else json.dumps(row, ensure_ascii=False))


def _json_array(path: Path) -> Iterator[Numbered]:
    """The elements of an array, read a piece at a time."""
    decoder, buffer, number, lines = _Decoder(), "", 0, 1
    with open_text(path) as stream:

        def more() -> bool:
            nonlocal buffer
            piece = stream.read(max(1 << 20, len(buffer)))
            buffer += piece
            return bool(piece)

        def skip(position: int) -> int:
            while True:
                while position < len(buffer) and buffer[position] in " \t\r\n":
                    position += 1
                if position < len(buffer) or not more():
                    return position

        def wrong(error: json.JSONDecodeError) -> AlignError:
            line = lines + error.lineno - 1
            return AlignError(f"{path.name} line {line}, column {error.colno}: invalid JSON: {error.msg}")

        position = skip(0) + 1  # behind the bracket
        while True:
            position = skip(position)
            if buffer[position : position + 1] == "]":
                position = skip(position + 1)
                if position < len(buffer):
                    raise wrong(json.JSONDecodeError("extra data behind the array; put all rows into one", buffer, position))
                return
            if number:
                if buffer[position : position + 1] != ",":
                    raise wrong(json.JSONDecodeError("Expecting ',' delimiter", buffer, position))
                position = skip(position + 1)
            try:
                value, end = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
                if cut and more():
                    continue
                raise wrong(error) from error
            number += 1
            text = buffer[position:end]
            yield number, Unreadable(decoder.wrong, text) if decoder.wrong else _sound(value, text)
            if end > 1 << 20:
                lines += buffer.count("\n", 0, end)
                buffer, end = buffer[end:], 0
            position = end


def _sound(value: Any, text: str) -> Raw | Unreadable:
    """`value`, if it is a row, and `text`, as which it stands in the file, was UTF-8."""
    if wrong := broken_text(text):
        return Unreadable(wrong, text)
    if not isinstance(value, dict):
        return Unreadable(problem("row", value, "an object with named columns"), json.dumps(value))
    return value


# Tables

MARKS = "a cell begins with a quotation mark that is not closed behind it; quote all of it, and double the marks inside"

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def _table(delimiter: str) -> Callable[[Path], Iterator[Numbered]]:
    def read(path: Path) -> Iterator[Numbered]:
        csv.field_size_limit(sys.maxsize)
        with open_text(path) as stream:
            line = stream.readline().rstrip("\n")
        if line.startswith(("{", "[{")):
            raise AlignError(f"{path}: begins with JSON, expected the names of columns: let its name end in .jsonl or .json")
        first = next(csv.reader([line], delimiter=delimiter), [])
        if re.fullmatch('"?sep=.?"?', line.strip("\r"), re.IGNORECASE):
            raise AlignError(f"{path}: its first line, {line.strip()}, is for Excel alone, expected names of columns; take it out")
        other = next((marks for mark, marks in SEPARATORS.items() if len(first) == 1 and mark in first[0]), None)
        if other is not None:
            expected = SEPARATORS[delimiter]
            raise AlignError(f"{path}: {other} part the columns of its first line, expected {expected}: save it so, or as .jsonl")
        columns = layouts.header(first)
        # Programs that write no header, write no quotes either.
        quoting: Any = csv.QUOTE_NONE if columns is None and delimiter == "\t" else csv.QUOTE_MINIMAL
        with open_text(path, newline="") as stream:
            taken: list[str] = []  # lines of the row that is being read

            def lines() -> Iterator[str]:
                for line in stream:
                    taken.append(line)
                    yield line

            # Where a space stands behind the commas of the header, one stands behind all of them, in front of quotes, too.
            spaced = columns is not None and any(name.startswith(" ") for name in first[1:])
            rows = csv.reader(lines(), delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=spaced)
            unquoted = line.split(delimiter) if quoting == csv.QUOTE_NONE else first
            try:
                names = layouts.columns_of(unquoted) if columns is None else next(rows, [])
            except csv.Error as error:
                raise AlignError(f"{path} line 1: {MARKS} ({error})") from error
            columns = [name.strip() or "column 1" for name in names]
            number = 0
            while True:
                taken.clear()
                try:
                    cells = next(rows, None)
                except csv.Error as error:
                    number += 1
                    yield number, Unreadable(f"{MARKS} ({error})", "".join(taken)), len(taken)
                    continue
                if cells is None:
                    return
                if cells:
                    number += 1
                    yield number, _row(columns, cells, delimiter)

    return read


def _row(columns: list[str], cells: list[str], delimiter: str) -> Raw | Unreadable:
    if [cell.strip() for cell in cells] == columns:
        return Unreadable("the header again, as where tables were put behind each other; take this line out", delimiter.join(cells))
    if len(cells) != len(columns):
        reason = f"the table has {len(columns)} columns ({', '.join(columns)}), this row has {len(cells)} cells"
        return Unreadable(reason, delimiter.join(cells))
    for column, cell in zip(columns, cells, strict=True):
        if wrong := broken_text(cell):
            return Unreadable(f"field {column}: {wrong}", delimiter.join(cells))
    return dict(zip(columns, cells, strict=True))


def _parquet(path: Path) -> Iterator[Numbered]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with decompressed(path) as stream:
        if not stream.peek(1):
            raise AlignError(f"{path}: has no bytes, and a parquet file without rows has some; write or download it again")
        file = pyarrow.parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if twice := next((name for name in names if names.count(name) > 1), None):  # a row would keep the last one alone
            raise AlignError(f"{path}: has two columns {twice!r}; rename one or leave it out")
        written = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))  # by `datasets`
        named = class_names(written.get("info", {}).get("features") or {})
        batches = file.iter_batches(batch_size=1024)
        yield from enumerate((from_arrow(row, named) for batch in batches for row in batch.to_pylist()), start=1)


def class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """The columns of numbers, or lists of numbers, that stand for classes, and the names of these; `features` are those of a data
    set of `datasets`, as its dictionary.
    """
    inner = {column: feature.get("feature", feature) for column, feature in features.items() if isinstance(feature, dict)}
    labels = {column: each for column, each in inner.items() if isinstance(each, dict) and each.get("_type") == "ClassLabel"}
    return {column: each["names"] for column, each in labels.items() if each.get("names")}


def from_arrow(row: Raw, named: dict[str, list[str]]) -> Raw:
    """`row` as it was before it was stored: `without_nulls`, and classes by their names where `named` has them."""

    def name(names: list[str], value: Any) -> Any:
        if isinstance(value, list):
            return [name(names, each) for each in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    row = without_nulls(row)
    return {**row, **{column: name(names, row[column]) for column, names in named.items() if column in row}}


def without_nulls(row: Raw) -> Raw:
    """`row` without the keys that Arrow adds to nested dictionaries (as null) because some other row has them."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(each) for key, each in value.items() if each is not None}
        return [clean(each) for each in value] if isinstance(value, list) else value

    return {column: clean(value) for column, value in row.items()}


# Text


def _documents(path: Path) -> Iterator[Numbered]:
    """The documents of a text file, each with the lines it takes up."""
    with open_text(path) as stream:
        parted = layouts.parting(stream)
    with open_text(path) as stream:
        for number, document, lines in layouts.documents(stream, parted):
            wrong = broken_text(document)
            yield number, Unreadable(f"field text: {wrong}", document) if wrong else {"text": document}, lines


def _sentences(path: Path) -> Iterator[Numbered]:
    """The sentences of a CoNLL file."""
    with open_text(path) as stream:
        for number, (content, found) in enumerate(layouts.sentences(stream), start=1):
            wrong = broken_text(content)
            wrong = f"field tokens: {wrong}" if wrong else found if isinstance(found, str) else None
            yield number, Unreadable(wrong, content) if wrong else found  # type: ignore[misc]


READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _documents,
    ".conll": _sentences,
}
