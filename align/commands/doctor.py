"""``align doctor RUN``: what went wrong in a training, why, and what to turn."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from align.diagnostics import Finding


def add(verbs: Any) -> None:
    parser = verbs.add_parser("doctor", help="read a run's histories: what went wrong, why, and which knob to turn")
    parser.add_argument(
        "run", metavar="RUN", help="folder of a run or of a stage, a registered name, or the name of a run under the home folder"
    )
    parser.add_argument(
        "--apply", type=Path, metavar="FILE", help="write a recipe (YAML) with the suggested changes; nothing is run"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=doctor)


def doctor(options: argparse.Namespace) -> int:
    from align.diagnostics.doctor import diagnose, patients, verdicts, write_prescription
    from align.progress import say

    found = patients(options.run)
    findings = {name: said for name, said in diagnose(found).items() if said or _trains(found, name)}
    words = verdicts(found, findings)
    if options.json:
        rows = [{"stage": n, "verdict": words[n], "findings": [x.as_dict() for x in f]} for n, f in findings.items()]
        print(json.dumps(rows, indent=1))
    elif findings:
        print(as_text(findings, words))
        if unclear := [name for name, word in words.items() if word == "unclear"]:
            say(f"{', '.join(unclear)}: too few steps are logged for the rules to see anything; a lower logging_steps shows more")
        if unknown := [name for name, word in words.items() if word == "unexamined"]:
            say(f"{', '.join(unknown)}: there are no rules for what is logged there, so nothing was examined")
    else:
        say(f"{options.run}: none of its stages trains, so there is nothing to say")
    if options.apply is not None:
        name = options.apply.stem
        write_prescription(options.apply, name, found, [finding for said in findings.values() for finding in said])
        say(f"wrote {options.apply}; `align run {options.apply}` runs it")
    return 0


def _trains(found: Sequence[Any], name: str) -> bool:
    return any(patient.name == name and "learning_rate" in patient.config for patient in found)


def as_text(findings: Mapping[str, Sequence[Finding]], verdicts: Mapping[str, str]) -> str:
    """Stages with their verdicts, and under each its findings."""
    from align.diagnostics.case import figure

    width = max((len(name) for name in findings), default=0)
    lines = []
    for name, said in findings.items():
        lines.append(f"{name:<{width}}  {verdicts[name]}")
        for finding in said:
            d = finding.diagnosis
            evidence = ", ".join(f"{key} {figure(value)}" for key, value in d.evidence.items())
            changes = ", ".join(f"{field}: {value}" for field, value in d.changes.items())
            lines += [f"  {finding.rule}: {d.cause}", f"    seen   {evidence}", f"    turn   {d.advice}"]
            lines += [f"    apply  {changes}"] if changes else []
    return "\n".join(lines)
