"""Looks at every stage of a plan: findings, estimates, and rows as the model will see them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.data import load_rows, split_by_prompt
from align.errors import AlignError
from align.preflight.cards import Machine
from align.preflight.checks import Finding, broken, leaked, look
from align.preflight.estimate import Estimate, estimate
from align.preflight.show import Piece, html, paths
from align.preflight.subject import ROWS, NotYet, Planned, Subject, subject
from align.progress import say
from align.runner.files import write_atomically
from align.schema import Row
from align.scoring import row_columns


@dataclass
class Looked:
    """What a preflight says of one stage."""

    name: str
    about: str
    """What will be trained, on which rows; or why it cannot be said yet."""
    findings: list[Finding] = field(default_factory=list)
    estimate: Estimate | None = None
    unknown: str | None = None
    """Why there is no estimate, where one was asked for."""
    samples: list[list[Piece]] = field(default_factory=list)
    subject: Subject | None = None
    """None where the stage trains nothing, or cannot be looked at yet."""

    @property
    def outlook(self) -> str | None:
        """The estimate for people, or why there is none; None where none was asked for."""
        return self.estimate.line() if self.estimate else self.unknown and f"no estimate: {self.unknown}"

    def plain(self) -> dict[str, Any]:
        """For programs."""
        return {
            "stage": self.name,
            "about": self.about,
            "findings": [finding.plain() for finding in self.findings],
            "estimate": self.estimate.plain() if self.estimate else None,
            "no_estimate": self.unknown,
            "samples": [html(pieces) for pieces in self.samples],
        }


def inspect(
    plan: Sequence[Planned], names: Collection[str] | None = None, *, machine: Machine | None = None, samples: int = 0
) -> list[Looked]:
    """What there is to say of the stages `names` (by default of all) of `plan`.

    Args:
        machine: estimate memory and time for it.
        samples: rows to render of each stage.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()  # tokenizers would warn of every long row
    found = []
    for step in plan:
        if names is None or step.name in names:
            found.append(_inspect(step, plan, machine, samples))
    trained = [row for each in found if each.subject and each.subject.kind != "text" for row in each.subject.rows]
    for step, each in zip([step for step in plan if names is None or step.name in names], found, strict=True):
        if trained and getattr(step.stage, "measures", None):
            each.findings += _leaks_into(step, trained)
    return found


def _inspect(step: Planned, plan: Sequence[Planned], machine: Machine | None, samples: int) -> Looked:
    try:
        step.stage.check()
        seen = subject(step, plan)
        # A column may come in rows that were not looked at.
        if seen is not None and hasattr(step.stage, "reward_set") and not seen.capped:
            rows: list[Any] = [*seen.rows, *seen.held_out]
            step.stage.reward_set(row_columns(rows))
    except NotYet as reason:
        return Looked(step.name, f"not looked at yet: {reason}")
    except AlignError as error:
        return Looked(step.name, "cannot be looked at", [broken(step.name, error)])
    if seen is None:
        return Looked(step.name, "trains nothing")
    result = Looked(step.name, _about(seen), look(seen), subject=seen)
    if machine is not None:
        _foresee(result, machine)
        result.findings += result.estimate.findings() if result.estimate else []
    if samples and seen.encoder is not None:
        trees = seen.encoded.trees
        chosen = trees[:: max(1, len(trees) // samples)][:samples]
        result.samples = [pieces for tree in chosen for pieces in paths(seen.encoder, tree)]
    return result


def foreseen(plan: Sequence[Planned], names: Collection[str], machine: Machine) -> list[Looked]:
    """The estimates alone of the stages `names` of `plan`."""
    found = []
    for step in plan:
        if step.name not in names:
            continue
        looked = Looked(step.name, "")
        try:
            looked.subject = subject(step, plan)
            _foresee(looked, machine)
        except (NotYet, AlignError) as reason:
            looked.unknown = str(reason)
        found.append(looked)
    return found


def _foresee(looked: Looked, machine: Machine) -> None:
    try:
        looked.estimate = estimate(looked.subject, machine) if looked.subject else None
    except AlignError as reason:
        looked.unknown = str(reason)


def _about(seen: Subject) -> str:
    count = f"{'at least ' if seen.capped else ''}{len(seen.rows):,}"
    rows = f"{count} rows ({seen.kind}), {len(seen.held_out):,} held out"
    trees = seen.encoded.trees
    if not trees:
        return f"{seen.stage.stage} on {rows}"
    mean, longest = sum(tree.tokens for tree in trees) / len(trees), max(tree.longest for tree in trees)
    share = sum(tree.targets for tree in trees) / sum(tree.tokens for tree in trees)
    learned = "" if seen.kind == "prompts" else f", {share:.0%} of them with a loss"
    return f"{seen.stage.stage} on {rows}; {mean:,.0f} tokens a row (longest {longest:,}){learned}"


def _leaks_into(step: Planned, trained: Sequence[Row]) -> list[Finding]:
    """Prompts that an evaluation has in common with the training rows of the recipe."""
    stage = step.stage
    findings: list[Finding] = []
    for name, kind in stage.measures.items():
        rows = _evaluated(stage, getattr(stage, name) or [], kind)
        if stage.held_out:
            rows = split_by_prompt(rows, stage.held_out)[1]
        findings += list(leaked(trained, rows, name)) if rows else []
    return findings


def _evaluated(stage: Any, sources: Sequence[str], kind: str) -> list[Row]:
    """Rows of `sources` as an evaluation would read them; none of one that another stage makes, or that is broken: then the stage
    says so.
    """
    rows: list[Row] = []
    for source in sources:
        with suppress(AlignError):
            rows += load_rows(
                source,
                kind,
                format=stage.data_format,
                split=stage.data_split,
                limit=min(stage.max_rows or ROWS, ROWS),
                on_bad_row=stage.on_bad_row,
            ).rows
    return rows


def preflight(plan: Sequence[Planned], names: Collection[str], notes: Path | None = None) -> set[str]:
    """Look at the stages `names` before they run: warnings are said, errors stop the run. Returns those that could be looked at.

    Args:
        notes: a JSON file for the findings, those of other stages in it stay.

    Raises:
        AlignError: there is an error among the findings.
    """
    looked = inspect(plan, names)
    errors = []
    for each in looked:
        for finding in each.findings:
            if finding.level == "error":
                errors.append(f"{each.name}: {finding.message}. {finding.advice}")
            else:
                say(f"{each.name}: {finding.line()}")
    if errors:
        raise AlignError("; ".join(errors))
    if notes is not None:
        _keep(looked, notes)
    return {each.name for each in looked if not each.about.startswith("not looked at yet")}


def _keep(looked: Sequence[Looked], notes: Path) -> None:
    seen = {each.name for each in looked}
    try:
        before = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there are none yet; or they are damaged, and of stages that will be looked at again
        before = []
    found = [{"stage": each.name, **finding.plain()} for each in looked for finding in each.findings]
    if before or found:
        write_atomically(notes, json.dumps([*(note for note in before if note["stage"] not in seen), *found], indent=1))
