"""Cleaning: what each rule of the catalog takes away, with counts and examples, before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from align.quality.personal import mask, mask_values
from align.quality.rules import DEFAULT, rules
from align.quality.texts import whole
from align.schema import QARow, Row

EXAMPLES = 3
"""Examples kept of each rule."""
SHOWN = 160
"""Characters of a row shown as an example."""


@dataclass
class Cleaned:
    """The rows that are left, and what became of the others. Row numbers are those of the rows given, from 1."""

    kept: list[Row]
    removed: list[tuple[int, str, str, Row]] = field(default_factory=list)
    """Number, rule, what is wrong, row."""
    masked: Counter[str] = field(default_factory=Counter)
    """Findings of personal data by kind."""
    masked_rows: list[int] = field(default_factory=list)
    """Numbers of the rows that hold them."""
    asked: list[str] = field(default_factory=list)
    """The rules, in order."""

    def summary(self) -> str:
        """``697 rows = 690 kept + 7 removed (7 exact_duplicates)``: one line that adds up."""
        total = len(self.kept) + len(self.removed)
        counts = Counter(rule for _, rule, _, _ in self.removed)
        reasons = f" ({', '.join(f'{count:,} {rule}' for rule, count in counts.most_common())})" if counts else ""
        return f"{total:,} rows = {len(self.kept):,} kept + {len(self.removed):,} removed{reasons}"

    def account(self, places: Sequence[tuple[str, int]]) -> dict[str, Any]:
        """Counts and examples of every rule, for programs.

        Args:
            places: file and number there of the rows given.
        """
        by_rule: dict[str, dict[str, Any]] = {rule: {"count": 0, "examples": []} for rule in self.asked}
        for number, rule, why, row in self.removed:
            entry = by_rule[rule]
            entry["count"] += 1
            if len(entry["examples"]) < EXAMPLES:
                file, there = places[number - 1]
                entry["examples"].append({"file": file, "row": there, "why": why, "text": excerpt(row)})
        masked = {"counts": dict(self.masked), "rows": len(self.masked_rows)}
        return {"rows": len(self.kept) + len(self.removed), "kept": len(self.kept), "rules": by_rule, "masked": masked}


def excerpt(row: Row) -> str:
    """The beginning of a row on one line."""
    text = " ".join(whole(row).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def clean(rows: Sequence[Row], specs: Sequence[str] = DEFAULT, masks: Sequence[str] = ()) -> Cleaned:
    """`rows` without those that a rule names, and with personal data of the kinds `masks` masked in the rest.

    Each rule sees what the rules before it left.

    Args:
        specs: rules as ``name`` or ``name(key=value)``.

    Raises:
        AlignError: an unknown rule, argument or kind of personal data.
    """
    chosen = [rules.parse(spec) for spec in specs]
    for name, arguments in chosen:
        rules.check_values(name, arguments)
    left = list(enumerate(rows, start=1))
    removed: list[tuple[int, str, str, Row]] = []
    for name, arguments in chosen:
        problems = dict(rules[name]([row for _, row in left], **arguments))
        # A rule counts the rows that it saw; people count those that were given.
        removed += [(left[i][0], name, why, left[i][1]) for i, why in problems.items()]
        left = [numbered for i, numbered in enumerate(left) if i not in problems]
    cleaned = Cleaned([], removed, asked=[name for name, _ in chosen])
    for number, row in left:
        cleaned.kept.append(masked(row, masks, cleaned, number) if masks else row)
    return cleaned


def masked(row: Row, kinds: Sequence[str], cleaned: Cleaned, number: int) -> Row:
    """`row` with personal data masked, and counted in `cleaned`."""
    fields, counts = mask_values(row.model_dump(exclude_none=True), list(kinds))
    if not counts:
        return row
    if isinstance(row, QARow) and row.starts:  # what is masked before an answer moves it
        fields["starts"] = [len(mask(row.context[:start], list(kinds))[0]) for start in row.starts]
    cleaned.masked += counts
    cleaned.masked_rows.append(number)
    return type(row).model_validate(fields)
