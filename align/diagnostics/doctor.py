"""Asks the rules about the stages of a run, and writes the recipe that follows their advice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.artifact import Artifact, read_artifact
from align.diagnostics.case import Case, Finding, ask, examined
from align.errors import AlignError
from align.progress import say
from align.recipe import reference_fields
from align.registry import Registry, run_folder
from align.runner.files import json_lines, json_record, write_named
from align.runner.notes import left_over
from align.stages import stages
from align.stages.config import MADE
from align.stages.written import given_fields, make_stage, read_yaml, refuse_misfits

CURVATURE = "curvature/curvature.json"
"""Where `align curvature` leaves what it measured of a stage's model, under the stage's folder."""

ENOUGH = 5
"""Logged steps from which on it means something that no rule speaks."""


@dataclass(frozen=True)
class Patient:
    """A stage folder, finished or not."""

    name: str
    """The name of the stage in its recipe."""
    kind: str
    config: Mapping[str, Any]
    folder: Path
    artifact: Artifact | None

    @classmethod
    def read(cls, folder: Path) -> Patient | None:
        """The stage in `folder`; None where there is none."""
        artifact = read_artifact(folder)
        if artifact is not None:
            return cls(artifact.name_in(folder) or artifact.name, artifact.stage, artifact.config, folder, artifact)
        if not (folder / "config.yaml").is_file():
            return None
        config = read_yaml(folder / "config.yaml")
        if not isinstance(config, dict) or "stage" not in config:
            return None
        kind = config.pop("stage")
        if isinstance(kind, str) and kind in stages:
            refuse_misfits(stages[kind], config, str(folder / "config.yaml"))
        stem, _, tail = folder.name.rpartition("-")
        name = stem if stem and len(tail) == 8 else folder.name
        return cls(name, str(kind), config, folder, None)


def patients(reference: str, registry: Registry | None = None) -> list[Patient]:
    """The stages that `reference` means: a run's folder (those of the recipe that ran last, or, where that is not noted, the
    latest of each name), a stage's folder, a registered name, or the name of a run under the home folder.

    Raises:
        AlignError: there is none.
    """
    folder = Path(reference)
    if not folder.is_dir():
        registry, run = registry or Registry(), run_folder(reference)
        by_name = run.is_dir() and reference not in registry.names()
        folder = run if by_name else registry.folder(registry.get(reference))
    if (alone := Patient.read(folder)) is not None:
        return [alone]
    latest: dict[str, Patient] = {}
    others = []
    for path in sorted(folder.iterdir(), key=_changed):
        if not path.is_dir() or (found := Patient.read(path)) is None:
            continue
        if left_over(path):
            others.append(path.name)
            continue
        latest.pop(found.name, None)
        latest[found.name] = found
    if not latest:
        of_last = " of the recipe that ran last" if others else ""
        raise AlignError(f"{reference} holds no stage{of_last}: give the folder of a run, of a stage, or a registered name")
    if others:
        say(f"{reference}: left over, not of the recipe that ran last, and not looked at: {', '.join(sorted(others))}")
    return list(latest.values())


def _changed(path: Path) -> float:
    """When the stage in `path` last logged something (seconds since 1970); of a folder without a history, when it changed."""
    history = path / "metrics.jsonl"
    return history.stat().st_mtime if history.is_file() else path.stat().st_mtime


def diagnose(found: Sequence[Patient]) -> dict[str, list[Finding]]:
    """The findings of each stage that trains, by its name."""
    return {patient.name: ask(case) for patient, case in zip(found, cases(found), strict=True)}


def cases(found: Sequence[Patient]) -> list[Case]:
    """What the rules need to know of each stage, what the run's evaluations say of it included."""
    measured = _evaluations(found)
    return [
        Case(
            patient.name,
            patient.kind,
            patient.config,
            json_lines(patient.folder / "metrics.jsonl", numbers=["step"]),
            patient.folder,
            metrics=patient.artifact.metrics if patient.artifact is not None else {},
            measured=measured.get(patient.name, {}),
            reference=measured.get(str(patient.config.get("model")), {}),
            curvature=json_record(patient.folder / CURVATURE),
        )
        for patient in found
    ]


def _evaluations(found: Sequence[Patient]) -> dict[str, dict[str, Any]]:
    """Metrics of each model that an evaluation of the run measured, by the reference that the evaluation's config has of it."""
    measured: dict[str, dict[str, Any]] = {}
    for patient in found:
        models = patient.artifact.metrics.get("models") if patient.artifact is not None else None
        if isinstance(models, dict):
            for label, reference in (patient.config.get("models") or {}).items():
                measured[reference] = {**measured.get(reference, {}), **models.get(label, {})}
    return measured


def logged(patient: Patient) -> int:
    """At how many steps the stage's history has anything of its training; what was before it does not count."""
    return len({record["step"] for record in json_lines(patient.folder / "metrics.jsonl", numbers=["step"])} - {0})


def verdicts(found: Iterable[Patient], findings: Mapping[str, Sequence[Finding]]) -> dict[str, str]:
    """The word for each stage in `findings`: that of its first one, else ``good``, ``unclear`` where too little is logged, or
    ``unexamined`` where no rule knows what it logs.
    """

    def word(patient: Patient) -> str:
        if findings[patient.name]:
            return findings[patient.name][0].verdict
        if not examined(patient.kind, patient.config):
            return "unexamined"
        return "good" if logged(patient) >= ENOUGH else "unclear"

    return {patient.name: word(patient) for patient in found if patient.name in findings}


# -- the recipe that follows the advice -----------------------------------------------------------------------------------------


def prescription(name: str, found: Sequence[Patient], findings: Iterable[Finding]) -> str:
    """The recipe of the stages `found` with the changes of `findings`, as commented YAML.

    A stage that only its own recipe's file knows is not run again: what it wrote is named by its path. So is the output of a stage
    outside `found`.

    Raises:
        AlignError: no finding has a change, or a change does not fit its stage.
    """
    first: dict[str, Finding] = {}
    for finding in findings:
        if finding.diagnosis.changes:
            first.setdefault(finding.stage, finding)  # one knob at a time: the others may have been its consequences
    if not first:
        raise AlignError("nothing to apply: no finding suggests a change of a field")
    kept = [patient for patient in found if patient.kind in stages]
    paths = _paths(found, {patient.name for patient in kept})
    recipe: dict[str, Any] = {"name": name, "stages": {}}
    comments = []
    for patient in kept:
        changes = dict(first[patient.name].diagnosis.changes) if patient.name in first else {}
        cls = stages[patient.kind]
        given = {k: v for k, v in given_fields(cls, patient.config).items() if k in cls.model_fields} | changes
        stage = make_stage(cls, given, f"the changed stage {patient.name!r}")
        plain = json.loads(stage.model_dump_json(exclude_defaults=True))
        for field, kind, _ in reference_fields(stage):
            if field in plain and kind in MADE:
                plain[field] = _moved(plain[field], paths[patient.name], parts=kind == "data")
        recipe["stages"][patient.name] = {"stage": patient.kind, **plain}
        for field, value in changes.items():
            comments.append(f"# {patient.name}.{field}: {patient.config.get(field)} -> {value} ({first[patient.name].rule})")
    return "\n".join([*comments, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)])


def _paths(found: Sequence[Patient], kept: set[str]) -> dict[str, dict[str, str]]:
    """Of each stage, what its references mean that no stage of the new recipe makes."""
    folders = {patient.name: patient.folder for patient in found}
    outside = {name: str(folder.resolve()) for name, folder in folders.items() if name not in kept}
    registry = Registry()
    meaning = {}
    for patient in found:
        known = dict(outside)
        for reference, parent in (patient.artifact.parents if patient.artifact is not None else {}).items():
            owner = reference.split("/", 1)[0]
            by_itself = owner in folders or owner in registry.names() or Path(reference).exists()
            earlier = owner == patient.name  # an earlier model of that name, not what came of it
            if (earlier or not by_itself) and "@" in parent and "@" not in owner:  # a stage of the run that this one belongs to
                known[owner] = registry.get(parent).path
        meaning[patient.name] = known
    return meaning


def _moved(value: Any, paths: Mapping[str, str], *, parts: bool) -> Any:
    """`value`, references, with the stages that they name replaced by folders; with `parts` also where one names a part of a stage
    (``world/rows.jsonl``).
    """
    if isinstance(value, str):
        owner, slash, rest = value.partition("/") if parts else (value, "", "")
        return f"{paths[owner]}{slash}{rest}" if owner in paths else value
    if isinstance(value, list):
        return [_moved(item, paths, parts=parts) for item in value]
    return {key: _moved(item, paths, parts=parts) for key, item in value.items()} if isinstance(value, dict) else value


def write_prescription(path: Path, name: str, found: Sequence[Patient], findings: Iterable[Finding]) -> None:
    """`prescription` as a file.

    Raises:
        AlignError: from `prescription`, or `path` does not end in ``.yaml``.
    """
    if path.suffix not in {".yaml", ".yml"}:
        raise AlignError(f"--apply {path}: a recipe's file ends in .yaml")
    write_named(path, prescription(name, found, findings))
