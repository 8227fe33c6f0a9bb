"""Loading with validation at the door: from any source to the rows of one kind, with an account of every row."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from align.errors import AlignError
from align.formats import SetAside, formats
from align.schema import Message, PromptRow, Row, TextRow, missing, row_class, validate
from align.sources import fingerprint as fingerprint
from align.sources import read_source
from align.turns import Fields, Raw, cut, same_reply

AnyRow = TypeVar("AnyRow", bound=Row)

GIVES = {
    "text": ("text",),
    "sft": ("sft", "prompts"),
    "preference": ("preference", "sft", "prompts", "unpaired"),
    "unpaired": ("unpaired", "prompts"),
    "prompts": ("prompts",),
    "classification": ("classification", "text"),
    "tagging": ("tagging",),
    "qa": ("qa", "prompts"),
}
"""What rows of one kind can be used as."""

NATIVE = {
    "text": ("text",),
    "sft": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "unpaired": ("prompt", "completion", "label"),
    "prompts": ("prompt",),
    "classification": ("text", "label"),
    "tagging": ("tokens", "tags"),
    "qa": ("question", "context", "answers"),
}
"""The native columns of each kind."""


@dataclass
class Rows:
    """The rows of one source, and what became of those that are not among them."""

    rows: list[Any]
    source: str
    format: str
    """The format read; several, joined by commas, where the files of a folder differ."""
    set_aside: list[tuple[int, str]] = field(default_factory=list)
    """Row number and reason. In a folder the numbers run on from file to file."""

    def summary(self) -> str:
        """``697 rows = 690 used + 7 set aside (7 identical chosen and rejected)``: one line that adds up."""
        line = f"{len(self.rows) + len(self.set_aside):,} rows = {len(self.rows):,} used + {len(self.set_aside):,} set aside"
        return f"{line} ({self.reasons()})" if self.set_aside else line

    def reasons(self) -> str:
        """How many rows were set aside for which reason, the most frequent first."""
        counts = Counter(reason for _, reason in self.set_aside).most_common()
        shown = [f"{count:,} {reason}" for reason, count in counts[:4]]
        rest = sum(count for _, count in counts[4:])
        return ", ".join([*shown, f"{rest:,} for other reasons"] if rest else shown)


def load_rows(
    source: str | Path,
    kind: str,
    *,
    format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    on_bad_row: str = "raise",
) -> Rows:
    """The rows of `source` as rows of `kind`, one of `align.schema.KINDS`.

    `source` is a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, also with .gz or .zst), a folder of such files, a data set saved
    by `datasets`, or an id on the hub. `format` names one of `align.formats.formats`; by default each file's is recognised by its
    columns. `split` chooses within folders and data sets that have splits. `limit` stops after that many rows. A malformed row
    raises, or with ``on_bad_row="quarantine"`` is set aside; a pair whose two replies are the same is always set aside.

    Raises:
        AlignError: there is no such source, format or kind; a row is malformed or cannot give `kind`; no row is left.
    """
    row_class(kind)
    if format is not None:
        formats[format]
    if on_bad_row not in ("raise", "quarantine"):
        raise AlignError(f"on_bad_row: got {on_bad_row!r}, expected 'raise' or 'quarantine'")
    if limit is not None and limit < 1:
        raise AlignError(f"limit: got {limit}, expected at least 1")
    loaded = Rows([], str(source), format or "")
    recognised: dict[str, str] = {}
    count = number = offset = 0
    last_file = None
    for file, number_in_file, raw in read_source(str(source), split):
        offset, last_file = (offset, file) if file == last_file else (number, file)
        number, count = offset + number_in_file, count + 1
        where = f"{file} row {number_in_file}"
        try:
            name = format or recognised.get(file) or detect(_sound(raw), kind)
            found = [row if isinstance(row, SetAside) else validate(kind, row, where) for row in convert(name, _sound(raw), kind)]
        except AlignError as error:
            reason = str(error).removeprefix(f"{where}, ")
            if on_bad_row == "raise":
                raise AlignError(f"{where}, {reason}") from error
            loaded.set_aside.append((number, reason))
            continue
        recognised[file] = name
        loaded.set_aside += [(number, row.reason) for row in found if isinstance(row, SetAside)]
        loaded.rows += [row for row in found if not isinstance(row, SetAside)]
        if limit is not None and len(loaded.rows) >= limit:
            del loaded.rows[limit:]
            break
    if not loaded.rows:
        raise AlignError(f"{source}: no rows" + (f" to use as {kind}: {loaded.reasons()}" if count else ": it is empty"))
    loaded.format = format or ", ".join(dict.fromkeys(recognised.values()))
    return loaded


def _sound(raw: Raw | AlignError) -> Raw:
    if isinstance(raw, AlignError):
        raise raw
    return raw


# From a raw row to the fields of a kind


def detect(raw: Raw, kind: str) -> str:
    """The name of the first format that `raw` matches.

    Raises:
        AlignError: none does; the message lists the columns found, and the one that a row of `kind` would have.
    """
    if kind == "text" and "text" in raw:
        return "text"
    for name in formats:
        if formats[name].matches(raw):
            return name
    raise AlignError(f"the columns fit no format; {_lacking(raw, kind)}; formats: {', '.join(formats)}")


def convert(name: str, raw: Raw, kind: str) -> list[Fields | SetAside]:
    """Read `raw` as format `name` and give the fields of rows of `kind`.

    Raises:
        AlignError: the row lacks a column, is malformed, or cannot give `kind`. The message does not say where it stands.
    """
    entry = formats[name]
    for column in entry.needs:
        if column not in raw:
            raise AlignError(f"column {column!r} of format {name!r}: {missing(column, raw)}")
    if not entry.when(raw):
        raise AlignError(f"not a row of format {name!r}; {_lacking(raw, kind)}")
    try:
        read = entry(raw)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:  # a shape that the format did not foresee
        raise AlignError(f"not a well-formed row of format {name!r}: {type(error).__name__}: {error}") from error
    rows = [row for found in read for row in ([found] if isinstance(found, SetAside) else _as_kind(found, kind, raw, name))]
    if kind != "prompts":
        return rows
    kept = {column: value for column, value in raw.items() if column not in (*entry.prompt, "prompt", "tools")}
    unique = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return [row if isinstance(row, SetAside) else {**row, "columns": kept} for row in unique]


def _as_kind(fields: Fields, kind: str, raw: Raw, name: str) -> list[Fields | SetAside]:
    """`fields` as rows of `kind`: as they are, or derived where there is one obvious way."""
    have = kind_of(fields)
    if have == "preference" and kind in ("preference", "unpaired") and same_reply(fields["chosen"], fields["rejected"]):
        return [SetAside("identical chosen and rejected")]
    if (kind == "sft" and "messages" in fields) or (have == kind and have != "prompts"):
        return [fields]  # messages without an assistant's turn included: the schema says best what is wrong with them
    if kind not in GIVES[have]:
        usable = " or ".join(GIVES[have])
        raise AlignError(f"format {name!r} gives {have} rows here, which can be used as {usable}; {_lacking(raw, kind)}")
    shared = {"tools": fields["tools"]} if "tools" in fields else {}
    if "messages" in fields:
        prompt = cut(fields["messages"])[0]
        return [{"prompt": prompt, **shared} if prompt else SetAside("no turn before the assistant's")]
    shared["prompt"] = fields["prompt"]
    if kind == "prompts":
        return [shared]
    if kind == "sft":
        return [{**shared, "completion": fields["chosen"]}]
    return [{**shared, "completion": fields[side], "label": side == "chosen"} for side in ("chosen", "rejected")]


def kind_of(fields: Fields) -> str:
    """The kind of row that `fields` are, before any derivation."""
    if "messages" in fields:
        return "sft" if any(message["role"] == "assistant" for message in fields["messages"]) else "prompts"
    telling = {"label": "unpaired", "chosen": "preference", "completion": "sft", "prompt": "prompts", "text": "text"}
    return next(kind for column, kind in telling.items() if column in fields)


def _lacking(raw: Raw, kind: str) -> str:
    column = next((column for column in NATIVE[kind] if column not in raw), NATIVE[kind][0])
    return f"for {kind} rows, column {column!r} is {missing(column, raw)}"


# Splitting and writing


def split_by_prompt(rows: Sequence[AnyRow], held_out: float, seed: int = 0) -> tuple[list[AnyRow], list[AnyRow]]:
    """`rows` in two parts, about `held_out` (0 to 1) of the prompts in the second one.

    The side is a hash of the first user prompt (its letters and digits, in lower case), so no prompt is on both sides and no row
    changes sides when others are added. Rows without a prompt go by their text. Of few rows, none may be held out.

    Raises:
        AlignError: `held_out` is not in [0, 1).
    """
    if not 0 <= held_out < 1:
        raise AlignError(f"held_out: got {held_out}, expected a share from 0 up to, but not including, 1")
    sides: tuple[list[AnyRow], list[AnyRow]] = ([], [])
    for row in rows:
        digest = hashlib.sha256(f"{seed}:{prompt_key(row)}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") < held_out * 2**64].append(row)
    return sides


def prompt_key(row: Row) -> str:
    """What makes two prompts the same: the letters and digits of the first user turn, in lower case."""
    text = first_prompt(row)
    plain = "".join(letter for letter in unicodedata.normalize("NFKC", text).lower() if letter.isalnum())
    return plain or text.strip()


def first_prompt(row: Row) -> str:
    """The first user turn, or all of a prompt without one, or a document."""
    if isinstance(row, TextRow):
        return row.text
    prompt: str | list[Message] = getattr(row, "prompt", None) or getattr(row, "messages", None) or ""
    if isinstance(prompt, str):
        return prompt
    asked = next((message.content for message in prompt if message.role == "user"), None)
    return "\n".join(message.content for message in prompt) if asked is None else asked


def write_rows(path: str | Path, rows: Iterable[Row | Raw]) -> None:
    """Write `rows` to a .jsonl file that `load_rows` reads back: whole, or not at all.

    Raises:
        AlignError: `path` does not end in .jsonl.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise AlignError(f"{path}: rows are written as .jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(f"{_line(row)}\n" for row in rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def plain_fields(row: Row | Raw) -> Raw:
    """The columns that `row` is written as: a prompt's own are columns of the file."""
    fields = row.model_dump(exclude_none=True) if isinstance(row, BaseModel) else row
    if isinstance(row, PromptRow):
        return {**row.columns, **{name: value for name, value in fields.items() if name != "columns"}}
    return fields


def _line(row: Row | Raw) -> str:
    """One line of JSON. The line ends of Unicode are escaped, for readers that split lines at them."""
    return re.sub(
        "[\x85\u2028\u2029]",
        lambda match: f"\\u{ord(match[0]):04x}",
        json.dumps(plain_fields(row), ensure_ascii=False, default=str),
    )
