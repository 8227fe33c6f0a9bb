"""What a set of rows is like: lengths, turns, languages, labels."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.data import RowStream
from align.errors import AlignError
from align.runner.files import written_aside
from align.schema import Message

LANGUAGES_OF = 500
"""Rows whose language is told: that is slow."""
QUANTILES = (0.1, 0.5, 0.9)


class Statistics:
    """Counts over the rows of a stream, read once; four bytes are kept of each text."""

    def __init__(self, stream: RowStream, length: Callable[[str], int] = len) -> None:
        """`length` says how long a text is: in characters, or in tokens."""
        self.stream = stream
        self.lengths: dict[str, array[int]] = {}
        self.turns: Counter[int] = Counter()
        self.labels: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.shares: Counter[str] = Counter()
        self._length, self._tell = length, _teller()
        for number, row in enumerate(stream):
            self._add(row.__dict__, told=number < LANGUAGES_OF)

    def _add(self, fields: dict[str, Any], *, told: bool) -> None:
        texts = {name: text for name, value in fields.items() if (text := _text(value)) is not None}
        counts = {name: self._length(text) for name, text in texts.items()}
        for name, count in counts.items():
            self.lengths.setdefault(name, array("I")).append(count)
        if "chosen" in counts:
            self.shares["chosen is longer"] += counts["chosen"] > counts["rejected"]
        turns = fields.get("messages") or fields.get("prompt")
        if isinstance(turns, list):
            self.turns[sum(message.role == "user" for message in turns)] += 1
            self.shares["has a system turn"] += any(message.role == "system" for message in turns)
            self.shares["has tools"] += bool(fields.get("tools"))
        if (label := fields.get("label")) is not None:
            self.labels[str(label).lower() if isinstance(label, bool) else label] += 1
        self.labels.update(fields.get("tags") or ())
        if told and self._tell and texts:
            self.languages[self._tell(max(texts.values(), key=len)[:1000])] += 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, as numbers."""
        account = self.stream.account
        found: dict[str, Any] = {"file": self.stream.source, "format": self.stream.format, "kind": self.stream.kind}
        found |= {**account.as_dict(), "gave": account.gave}
        found["lengths"] = {name: _quantiles(values) for name, values in self.lengths.items()}
        found["user_turns"] = {str(turns): count for turns, count in sorted(self.turns.items())}
        found["languages"] = dict(self.languages.most_common(8))
        found["labels"] = dict(self.labels.most_common(20))
        found["shares"] = {name: round(count / account.gave, 4) for name, count in self.shares.items() if count}
        return found

    def plot(self, path: Path, unit: str) -> None:
        """A histogram of the lengths of each field, as an image."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        longest = max((max(values) for values in self.lengths.values()), default=1) or 1
        edges = sorted({round(longest ** (i / 40)) for i in range(41)} | {0})
        for name, values in self.lengths.items():
            axes.hist(values, bins=edges, histtype="step", label=name)
        axes.set(xlabel=unit, ylabel="rows", xscale="symlog", title=Path(self.stream.source).name)
        axes.legend()
        with written_aside(path) as file:
            figure.savefig(file.buffer, dpi=120, format=path.suffix[1:])
        pyplot.close(figure)


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and isinstance(value[0], Message):
        return "\n".join(message.content for message in value)
    return None


def _quantiles(values: array[int]) -> dict[str, float]:
    ordered = sorted(values)
    picked = {f"{share:.0%}": ordered[min(int(share * len(ordered)), len(ordered) - 1)] for share in QUANTILES}
    return {"mean": round(sum(ordered) / len(ordered), 1), **picked, "max": ordered[-1]}


def _teller() -> Callable[[str], str] | None:
    """A function that tells the language of a text, where the package for it is installed."""
    from align.quality.rules import language_of

    try:
        language_of("hello")
    except AlignError:
        return None
    return lambda text: language_of(text)[0]
