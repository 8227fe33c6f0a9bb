"""Loading with validation at the door: from any source to the rows of one kind, with an account of every row."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from align.errors import AlignError
from align.formats import formats
from align.intake.account import Account, Quarantine
from align.intake.catalog import SetAside
from align.intake.files import Item, Raw, Unreadable
from align.intake.kinds import UNMATCHED, derive, detect, kind_of, pair, read, recognize
from align.runner.files import written_aside
from align.schema import LabelledRow, LabelledText, Message, PromptRow, QARow, Row, TaggedTokens, TextRow, row_class, validate
from align.sources import fingerprint as fingerprint
from align.sources import read_source

AnyRow = TypeVar("AnyRow", bound=Row)

PEEKED = 64
"""Rows of a file that are looked at to recognize its format."""
OR_QUARANTINE = "; mend the row, or set on_bad_row to quarantine"
LONGEST_REASON = 1000
"""Characters; a broken row may have anything for a key."""
EXAMPLES = 1000
"""Rows set aside that are remembered with their reasons; all of them are counted."""


class RowStream:
    """The rows of one source, one at a time, in bounded memory, and an account of every row read so far.

    Each iteration reads the source anew. `kind` is None until the first row is read, unless it was given.
    """

    def __init__(
        self,
        source: str | Path,
        kind: str | None = None,
        *,
        format: str | None = None,
        split: str = "train",
        limit: int | None = None,
        on_bad_row: str = "raise",
        quarantine: Quarantine | None = None,
    ) -> None:
        """The arguments are those of `load_rows`; without a `kind`, rows are of the one that most have by themselves.

        Raises:
            AlignError: an argument is none of its options.
        """
        if kind is not None:
            row_class(kind)
        if format is not None:
            formats[format]
        if on_bad_row not in ("raise", "quarantine"):
            raise AlignError(f"on_bad_row: got {on_bad_row!r}, expected 'raise' or 'quarantine'")
        if limit is not None and limit < 1:
            raise AlignError(f"limit: got {limit}, expected at least 1")
        self.source, self.kind, self.split, self.limit = str(source), kind, split, limit
        self.account = Account()
        self.set_aside: list[tuple[str, str]] = []
        """Place and reason of the first rows that were set aside."""
        self.item: Item | None = None
        """The raw row behind the row that was given last, and in `read_as` its format."""
        self.read_as = format or ""
        self._named, self._recognized = format, dict[str, None]()
        self._asked = kind is not None
        self._own: str | None = None
        """The kind that the row read last is by itself, where nobody asked for another."""
        self._strict, self._quarantine = on_bad_row == "raise", quarantine or Quarantine(None)
        self._waiting: dict[str, list[tuple[Item, LabelledRow]]] = {}

    @property
    def format(self) -> str:
        """The format read; several, joined by commas, where the files of a folder differ."""
        return self._named or ", ".join(self._recognized)

    def __iter__(self) -> Iterator[Any]:
        self.account, self.set_aside, self._recognized, self._waiting = Account(), [], {}, {}
        files = groupby(read_source(self.source, self.split), key=itemgetter(0))
        for row in chain.from_iterable(self._file(items) for _, items in files):
            self.account.gave += 1
            yield row
            if self.account.gave == self.limit:
                break
        reason = f"{UNMATCHED} before the limit" if self.account.gave == self.limit else UNMATCHED
        for waiting in self._waiting.values():
            for item, _ in waiting:
                self._put_aside(item, reason)

    def _file(self, items: Iterator[Item]) -> Iterator[Row]:
        """The rows of one file. Its formats are those of its first rows, see `recognize`."""
        head: list[Item] = []
        unreadable: AlignError | None = None
        try:
            for item in islice(items, PEEKED):
                head.append(item)
        except AlignError as error:  # of this file or of the one behind it: the rows before that are counted
            if self._strict:
                raise
            unreadable = error
        names, self.kind = recognize((item.raw for item in head if isinstance(item.raw, dict)), self.kind, self._named)
        for item in chain(head, items):
            if not names and isinstance(item.raw, dict):
                names, self.kind = recognize([item.raw], self.kind, None)
            try:
                found = self._read(item.raw, names)
            except AlignError as error:
                reason = str(error) if len(str(error)) <= LONGEST_REASON else f"{str(error)[:LONGEST_REASON]}..."
                if self._strict:
                    raise AlignError(f"{item.file} row {item.number}, {reason}{OR_QUARANTINE}") from error
                self._put_aside(item, reason)
                continue
            rows = [row for row in found if not isinstance(row, SetAside)]
            if self.kind == "preference" and rows and isinstance(rows[0], LabelledRow):
                yield from self._paired(item, rows[0])
            elif rows:
                self.account.use(item.rows, [row.reason for row in found if isinstance(row, SetAside)])
                if self._own not in (None, self.kind):
                    self.account.derived[f"{self._own} rows as {self.kind}"] += item.rows
                self.item = item
                yield from rows
            else:
                self._put_aside(item, found[0].reason)
        if unreadable is not None:
            raise unreadable

    def _read(self, raw: Raw | Unreadable, names: Sequence[str]) -> list[Any]:
        """The rows that `raw` holds, or why it holds none.

        Raises:
            AlignError: it is malformed. The message does not say where it stands.
        """
        if isinstance(raw, Unreadable):
            raise AlignError(raw.reason)
        name = names[0] if names else detect(raw, self.kind)
        if len(names) > 1:
            name = next((each for each in names if formats[each].matches(raw)), name)
        self._recognized[name] = None
        self.read_as = name
        if self.kind is None:  # no row so far has told
            self.kind = recognize([raw], None, name)[1]
        given = read(name, raw)
        if self.kind is None:
            return list(given)
        self._own = None if self._asked else next((kind_of(each) for each in given if not isinstance(each, SetAside)), None)
        found: list[Any] = derive(given, self.kind, raw, name)
        for i, fields in enumerate(found):
            if not isinstance(fields, SetAside):
                found[i] = validate("unpaired" if self.kind == "preference" and "label" in fields else self.kind, fields)
        return found

    def _paired(self, item: Item, row: LabelledRow) -> Iterator[Row]:
        """The pair that a labelled answer makes with an earlier one to the same prompt; without one, it waits."""
        key = json.dumps(row.model_dump(include={"prompt", "tools"}), sort_keys=True)
        waiting = self._waiting.setdefault(key, [])
        if not waiting or waiting[0][1].label == row.label:
            waiting.append((item, row))
            return
        other_item, other = waiting.pop(0)
        fields = pair(*(each.model_dump(exclude_none=True) for each in ((row, other) if row.label else (other, row))))
        if isinstance(fields, SetAside):
            self._put_aside(item, fields.reason)
            self._put_aside(other_item, fields.reason)
            return
        self.account.use(item.rows + other_item.rows, [])
        self.item = item
        yield validate("preference", fields)

    def _put_aside(self, item: Item, reason: str) -> None:
        self.account.put_aside(item.rows, reason)
        if len(self.set_aside) < EXAMPLES:
            self.set_aside.append((f"{item.file} row {item.number}", reason))
        content = item.raw.content if isinstance(item.raw, Unreadable) else item.raw
        self._quarantine.add(item.file, item.number, reason, content)


@dataclass
class Rows:
    """The rows of one source, and what became of those that are not among them."""

    rows: list[Any]
    source: str
    format: str
    """The format read; several, joined by commas, where the files of a folder differ."""
    account: Account = field(default_factory=Account)
    set_aside: list[tuple[str, str]] = field(default_factory=list)
    """Place (file and row) and reason of the first 1,000 rows that were set aside."""
    places: list[tuple[str, int]] = field(default_factory=list)
    """File and number there of each row, where the reader kept them."""
    others: list[Raw] = field(default_factory=list)
    """Columns behind each row that say nothing to its format, where the reader kept them."""

    def summary(self) -> str:
        """``697 rows = 690 used + 7 set aside (7 identical chosen and rejected)``: one line that adds up."""
        return self.account.summary()


def load_rows(
    source: str | Path,
    kind: str,
    *,
    format: str | None = None,
    split: str = "train",
    limit: int | None = None,
    on_bad_row: str = "raise",
    quarantine: Quarantine | None = None,
) -> Rows:
    """The rows of `source` as rows of `kind`, one of `align.schema.KINDS`, all in memory; `RowStream` gives them one at a time.

    `source` is a file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .conll, also with .gz or .zst), a folder of such files, a data
    set saved by `datasets`, an entry of a dataset_info.json, or an id on the hub. `format` names one of `align.formats.formats`; by
    default each file's is recognized by its columns. `split` chooses within folders and data sets that have splits. `limit` stops
    after that many rows. A malformed row raises, or with ``on_bad_row="quarantine"`` is set aside, and written to `quarantine`; a
    pair whose two replies are the same is always set aside.

    Raises:
        AlignError: there is no such source, format or kind; a row is malformed or cannot give `kind`; no row is left.
    """
    stream = RowStream(source, kind, format=format, split=split, limit=limit, on_bad_row=on_bad_row, quarantine=quarantine)
    rows = list(stream)
    refuse_empty(stream)
    return Rows(rows, stream.source, stream.format, stream.account, stream.set_aside)


def all_held_out(sources: Sequence[str], share: float) -> AlignError:
    """The error for `sources` of which nothing is left to train on."""
    return AlignError(f"{', '.join(sources)}: no row is left to train on after holding out {share:.0%} of the prompts")


def refuse_empty(stream: RowStream) -> None:
    """Raise `AlignError` if `stream`, read to its end, gave no row."""
    account = stream.account
    if not account.gave:
        wanted = f" to use as {stream.kind}" if stream.kind else " that can be used"
        why = f"{wanted}: {account.summary()}" if account.rows else ": it is empty"
        raise AlignError(f"{stream.source}: no rows{why}")


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
        sides[is_held_out(row, held_out, seed)].append(row)
    return sides


def is_held_out(row: Row, share: float, seed: int = 0) -> bool:
    """Whether `row` is on the second side of `split_by_prompt`."""
    digest = hashlib.sha256(f"{seed}:{prompt_key(row)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def prompt_key(row: Row) -> str:
    """What makes two prompts the same: the letters and digits of the first user turn, in lower case."""
    text = first_prompt(row)
    if text.isascii():
        plain = re.sub(r"[^0-9a-z]+", "", text.lower())  # the same, ten times faster
    else:
        plain = "".join(letter for letter in unicodedata.normalize("NFKC", text).lower() if letter.isalnum())
    return plain or text.strip()


def first_prompt(row: Row) -> str:
    """The first user turn, or all of a prompt without one; of other rows the text that they are about."""
    if isinstance(row, TextRow | LabelledText):
        return row.text
    if isinstance(row, TaggedTokens):
        return " ".join(row.tokens)
    if isinstance(row, QARow):  # a context is on one side with all its questions
        return row.context or row.question
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
    with written_aside(path) as file:
        file.writelines(f"{_line(row)}\n" for row in rows)


def plain_fields(row: Row | Raw) -> Raw:
    """The columns that `row` is written as: a prompt's own are columns of the file."""
    fields = row.model_dump(exclude_none=True) if isinstance(row, BaseModel) else row
    if isinstance(row, PromptRow):
        return {**row.columns, **{name: value for name, value in fields.items() if name != "columns"}}
    return fields


def _line(row: Row | Raw) -> str:
    """One line of JSON. Escaped are the line ends of Unicode, for readers that split lines at them, and halves of surrogate pairs,
    which UTF-8 cannot write.
    """
    return re.sub(
        "[\x85\u2028\u2029\ud800-\udfff]",
        lambda match: f"\\u{ord(match[0]):04x}",
        json.dumps(plain_fields(row), ensure_ascii=False, default=str),
    )
