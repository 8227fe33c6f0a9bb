"""The account of every row of a source: rows = used + set aside. And where rows that were set aside are kept."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import AlignError, DiskFull
from align.runner.files import named_when_full

MOST_REASONS = 1000
"""Reasons that an account tells apart; whatever comes behind them is counted together."""


@dataclass
class Account:
    """What became of the rows of a source."""

    rows: int = 0
    """Rows read (a text file's are its lines, a SQuAD file's its questions, a CoNLL file's its sentences)."""
    used: int = 0
    """Those that gave something."""
    gave: int = 0
    """Rows of the kind that they gave: one raw row may hold several, a document takes several lines."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows set aside, by reason."""
    derived: Counter[str] = field(default_factory=Counter)
    """Rows used as another kind than they are by themselves, where nobody asked for that ("sft rows as prompts")."""
    parts: Counter[str] = field(default_factory=Counter)
    """Parts set aside of rows that are used otherwise (one pair of several), by reason."""

    @property
    def set_aside(self) -> int:
        return self.rows - self.used

    def use(self, rows: int, parts: list[str]) -> None:
        """Count `rows` as used; `parts` are the reasons why some of what they held was not."""
        self.rows += rows
        self.used += rows
        self.parts.update(map(family, parts))

    def put_aside(self, rows: int, reason: str) -> None:
        """Count `rows` as set aside."""
        self.rows += rows
        name = family(reason)
        self.reasons[name if name in self.reasons or len(self.reasons) < MOST_REASONS else "other reasons"] += rows

    def summary(self) -> str:
        """``697 rows = 690 used + 7 set aside (7 identical chosen and rejected)``: one line that adds up."""
        line = f"{self.rows:,} rows = {self.used:,} used + {self.set_aside:,} set aside"
        line += f" ({_counts(self.reasons)})" if self.reasons else ""
        line += f"; they gave {self.gave:,}" if self.gave != self.used else ""
        line += f"; among the used {_counts(self.derived)}" if self.derived else ""
        return line + (f", without {sum(self.parts.values()):,} parts ({_counts(self.parts)})" if self.parts else "")

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        counts = {"rows": self.rows, "used": self.used, "set_aside": self.set_aside, "reasons": dict(self.reasons.most_common())}
        return counts | ({"derived": dict(self.derived)} if self.derived else {})


def _counts(reasons: Counter[str]) -> str:
    """The four most frequent reasons, and how many rows have others."""
    counts = reasons.most_common()
    shown = [f"{count:,} {reason}" for reason, count in counts[:4]]
    rest = sum(count for _, count in counts[4:])
    return ", ".join([*shown, f"{rest:,} for other reasons"] if rest else shown)


_PARTICULARS = (
    (re.compile(r"got .*?, expected", re.DOTALL), "expected"),
    (re.compile(r"; found .*|; formats: .*| \(holds .*| \(did you mean .*?\)| \(in field .*?\)", re.DOTALL), ""),
    (re.compile(r"\[-?\d+\]"), "[]"),
    (re.compile(r"^(column|byte|line) \d+(, | of the sentence, )?:? ?"), ""),
    (re.compile(r"byte 0x.. at character \d+ is"), "bytes that are"),
)


def family(reason: str) -> str:
    """The kind of mistake that `reason` tells of: without what stood there, and without its place in a list."""
    for pattern, instead in _PARTICULARS:
        reason = pattern.sub(instead, reason)
    return reason if len(reason) <= 200 else f"{reason[:200]}..."


def refuse_other_file(path: Path) -> None:
    """Look whether `path`, which a `Quarantine` would take the place of, is one of an earlier run, or empty, or not there.

    Raises:
        AlignError: it holds something else.
    """
    if not path.exists():
        return
    with path.open("rb") as stream:
        first = stream.readline()
    try:
        ours = not first or json.loads(first).keys() == {"file", "row", "reason", "content"}
    except (ValueError, AttributeError):  # no JSON, or no object
        ours = False
    if not ours:
        raise AlignError(f"{path} holds something else than rows that were set aside, and would be lost: name another file")


class Quarantine:
    """A file of rows that were set aside, one object a line: file, row, reason, content. It exists if there is any."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.unlink(missing_ok=True)  # that of an earlier run

    def add(self, file: str, row: int, reason: str, content: Any) -> None:
        """Append one row.

        Raises:
            DiskFull: there is no room for it; the file is taken away.
        """
        if self.path is None:
            return
        line = json.dumps({"file": file, "row": row, "reason": reason, "content": content}, ensure_ascii=False, default=str)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # JSON can write half of a surrogate pair down, as an escape; UTF-8 cannot.
        how: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
        try:
            with named_when_full(self.path), self.path.open("a", **how) as stream:
                stream.write(re.sub("[\x85\u2028\u2029]", lambda match: f"\\u{ord(match[0]):04x}", line) + "\n")
        except DiskFull:
            self.path.unlink()  # its last row is half a one
            raise

    def note(self, account: Account) -> str:
        """Where rows that `account` set aside can be found, for the end of a line."""
        return f"; they are in {self.path}" if self.path is not None and account.set_aside else ""
