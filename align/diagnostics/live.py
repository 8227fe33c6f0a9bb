"""The doctor at the bedside: asks the rules while a stage trains, and says each finding once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.diagnostics.case import Case, ask
from align.progress import say

FIRST, GROWTH = 12, 1.1
"""Records before the rules are asked, and by which factor the history must have grown until they are asked again. So all the asking
of a run costs as much as a few passes over its history."""


class Watcher:
    """Called with the history after every new record; see `align.progress.History`."""

    def __init__(self, name: str, kind: str, config: Mapping[str, Any]) -> None:
        self.name, self.kind, self.config = name, kind, config
        self._said: set[str] = set()
        self._next = float(FIRST)

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> None:
        if len(records) < self._next:
            return
        self._next = max(len(records) + 1, len(records) * GROWTH)
        for finding in ask(Case(self.name, self.kind, self.config, records, running=True)):
            if finding.rule not in self._said:
                self._said.add(finding.rule)
                say(f"{self.name}: {finding.rule.replace('_', ' ')}: {finding.diagnosis.cause}. {finding.diagnosis.advice}")
