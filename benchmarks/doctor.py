"""The doctor's examination: ``python benchmarks/doctor.py [--only NAME …] [--json FILE]``.

Trains the runs of `benchmarks.planted`, asks the doctor about each, then follows its advice (the recipe that ``--apply`` writes)
and asks again. Prints what was planted against what was named, and what the advice did to verdict and held-out metric.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from align.artifact import Artifact
from align.diagnostics.doctor import diagnose, patients, write_prescription
from align.errors import AlignError
from align.pipeline import Run
from align.recipe import load_recipe
from benchmarks.planted import Maker, Planted, foundations, write_world

LOWER_IS_BETTER = ("eval_loss", "perplexity")
ROUNDS = 3
"""How often the advice is followed before a run counts as not repaired."""
TOLERANCE = 0.02
"""Relative loss of the held-out metric that a repair may cost."""


def examine(planted: Planted, out: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """Train `planted`, name its fault, follow the advice and look again, `rounds` times at most."""
    start = time.monotonic()
    folder = out / planted.name
    artifacts = Run(planted.recipe(), folder).execute()
    row: dict[str, Any] = {"name": planted.name, "planted": planted.fault, **_look(folder)}
    row["seconds"] = round(time.monotonic() - start, 1)
    if planted.fault is None:
        return row
    row |= {"before": _metric(artifacts, planted.metric), "rounds": [], "repaired": False}
    for number in range(1, rounds + 1):
        recipe = out / f"{planted.name}_{number}.yaml"
        try:
            changes, folder = _follow(folder, recipe), out / recipe.stem
            artifacts = Run(load_recipe(str(recipe)), folder).execute()
        except AlignError as error:
            row["why"] = str(error)
            break
        row["rounds"].append({"changes": changes, "then": _look(folder)["named"], "after": _metric(artifacts, planted.metric)})
        if row["rounds"][-1]["then"] is None:
            gain = row["rounds"][-1]["after"] - row["before"]
            row["repaired"] = (-gain if planted.metric in LOWER_IS_BETTER else gain) >= -TOLERANCE * abs(row["before"])
            break
    return row


def _look(folder: Path) -> dict[str, Any]:
    """What the doctor says of the stage ``run`` in `folder`."""
    said = diagnose(patients(str(folder)))["run"]
    return {"named": said[0].rule if said else None, "others": [finding.rule for finding in said[1:]]}


def _follow(folder: Path, recipe: Path) -> list[str]:
    """Write the recipe that follows the doctor's advice about `folder`; returns what it changes."""
    found = patients(str(folder))
    write_prescription(recipe, recipe.stem, found, [finding for said in diagnose(found).values() for finding in said])
    return [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# ")]


def _metric(artifacts: dict[str, Artifact], name: str) -> float:
    evaluation = artifacts.get("evaluate")
    return artifacts["run"].metrics[name] if evaluation is None else evaluation.metrics["models"]["run"][name]


def confusion(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How often each planted fault got each name; ``healthy`` and ``nothing`` where there is none."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        line = table.setdefault(row["planted"] or "healthy", {})
        line[row["named"] or "nothing"] = line.get(row["named"] or "nothing", 0) + 1
    return table


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The examination's marks."""
    planted, healthy = [r for r in rows if r["planted"]], [r for r in rows if not r["planted"]]
    return {
        "planted": len(planted),
        "named": sum(r["named"] == r["planted"] for r in planted),
        "healthy": len(healthy),
        "false_alarms": sum(r["named"] is not None for r in healthy),
        "repaired": sum(bool(r.get("repaired")) for r in planted),
        "confusion": confusion(rows),
    }


def as_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    lines = [
        "| run | planted | named | changed, round by round | held-out metric | then | repaired |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        rounds = r.get("rounds", [])
        changes = (
            "; ".join(", ".join(line.partition(".")[2].rpartition(" (")[0] for line in one["changes"]) for one in rounds) or "–"
        )
        numbers = " → ".join(f"{value:.3f}" for value in (r["before"], *(one["after"] for one in rounds))) if rounds else "–"
        then = rounds[-1]["then"] or "good" if rounds else r.get("why", "–")
        repaired = "–" if r["planted"] is None else "yes" if r["repaired"] else "no"
        named = r["named"] or "good"
        lines.append(f"| {r['name']} | {r['planted'] or 'healthy'} | {named} | {changes} | {numbers} | {then} | {repaired} |")
    return "\n".join(lines)


def run(out: Path, only: Sequence[str] = (), rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """Examine the runs called `only`, or all of them, in `out`."""
    os.environ["ALIGN_HOME"] = str(out / "home")
    write_world(out)
    made = Run(foundations(out), out / "foundations").execute()
    maker = Maker(out, {name: artifact.path for name, artifact in made.items()})
    runs = [planted for planted in (*maker.planted(), *maker.healthy()) if not only or planted.name in only]
    rows = []
    for planted in runs:
        rows.append(examine(planted, out, rounds))
        (out / "rows.json").write_text(json.dumps(rows, indent=1))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often the advice is followed; 0 only names the faults")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and marks as JSON")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the runs here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = run((options.out or Path(temporary)).resolve(), options.only, options.rounds)
    marks = summary(rows)
    print(as_markdown(rows), end="\n\n")
    print(json.dumps(marks, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps({**marks, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
