"""The runner: what is done is not done again, what changed is, and the plan says why."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from align import __version__
from align.artifact import Artifact, library_versions
from align.data import fingerprint
from align.errors import AlignError, near_miss
from align.progress import History, say
from align.recipe import Recipe, reference_fields, references
from align.registry import Registry, home
from align.rewards import reward_fingerprint
from align.stages import Stage
from align.stages.base import Context


@dataclass(frozen=True)
class Step:
    """One stage as it would run now."""

    name: str
    stage: Stage
    """With every reference resolved to a path or hub id."""
    identity: str
    folder: Path
    parents: dict[str, str]
    data: dict[str, str]
    done: Artifact | None
    """The finished artifact, when nothing it depends on has changed."""
    reason: str
    """Why it would run, or that it is up to date."""


@dataclass
class Run:
    """A recipe bound to an output folder."""

    recipe: Recipe
    out: Path
    folder: Path | None = None
    """For a recipe of one stage: write into exactly this folder, instead of one named after the stage's identity under `out`."""
    registry: Registry = field(default_factory=Registry)

    def plan(self) -> list[Step]:
        """Every stage in order, resolved, with what is already done.

        Raises:
            AlignError: a reference leads nowhere.
        """
        steps: dict[str, Step] = {}
        for name in self.recipe.ordered():
            steps[name] = self._resolve(name, steps)
        return list(steps.values())

    def _resolve(self, name: str, earlier: Mapping[str, Step]) -> Step:
        stage = self.recipe.stages[name]
        parents: dict[str, str] = {}
        data: dict[str, str] = {}
        inputs: dict[str, str] = {}  # reference -> what it is, independent of where it lies
        meaning: dict[str, str] = {}

        for kind, reference in references(stage):
            owner = self.recipe.stage_of(kind, reference)
            if owner is not None:
                step = earlier[owner]
                meaning[reference] = str(step.folder) + reference[len(owner) :]
                inputs[reference] = step.identity + reference[len(owner) :]
                parents[reference] = step.done.reference if step.done else f"{self.recipe.name}-{owner}"
            elif kind == "model":
                resolved = self.registry.resolve(reference)
                meaning[reference] = resolved.path
                inputs[reference] = resolved.artifact.identity if resolved.artifact else _model_fingerprint(resolved.path)
                registered = resolved.artifact is not None and resolved.artifact.version > 0
                parents[reference] = resolved.artifact.reference if resolved.artifact and registered else resolved.path
            elif kind == "data":
                meaning[reference] = reference
                inputs[reference] = data[reference] = fingerprint(reference)
            else:
                meaning[reference] = reference
                inputs[reference] = reward_fingerprint(reference)
        resolved_stage = stage.model_copy(
            update={field_name: _map(value, meaning) for field_name, kind, value in reference_fields(stage) if kind != "reward"}
        )
        config = stage.model_dump(mode="json")
        for field_name, kind, value in reference_fields(stage):
            if kind != "reward":  # rewards keep their names, beside what they were at the time
                config[field_name] = _map(value, inputs)
        identity = _hash({"stage": stage.stage, "config": config, "inputs": sorted(inputs.values()), "align": __version__})
        folder = (self.folder or self.out / f"{name}-{identity[:8]}").resolve()
        done = Artifact.read(folder)
        if done is not None and done.identity != identity:
            raise AlignError(f"{folder} holds another result ({done.reference}); choose another output_dir, or remove it")
        return Step(name, resolved_stage, identity, folder, parents, data, done, self._reason(name, stage, done))

    def _reason(self, name: str, stage: Stage, done: Artifact | None) -> str:
        if done is not None:
            return "up to date"
        before = [a for folder in self.out.glob(f"{name}-????????") if (a := Artifact.read(folder))]
        if not before:
            return "never ran"
        latest = max(before, key=lambda artifact: artifact.created)
        now = json.loads(stage.model_dump_json())
        changed = [key for key in now if now[key] != latest.config.get(key)]
        return f"changed: {', '.join(changed)}" if changed else "its inputs changed"

    def execute(self, only: str | None = None) -> dict[str, Artifact]:
        """Run what is not up to date, register it, and return the artifact of every finished stage.

        Raises:
            AlignError: `only` names no stage or needs one that has not run; or a stage fails.
        """
        if only is not None and only not in self.recipe.stages:
            raise AlignError(f"recipe {self.recipe.name!r} has no stage {only!r}{near_miss(only, self.recipe.stages)}")
        plan = self.plan()  # every reference is checked before anything runs
        looked = _look([step.name for step in plan if step.done is None and only in (None, step.name)], plan)
        finished: dict[str, Step] = {}
        for name in self.recipe.ordered():
            step = self._resolve(name, finished)
            if step.done is None and (only is None or name == only):
                missing = [parent for parent in self.recipe.needs(name) if finished[parent].done is None]
                if missing:
                    raise AlignError(
                        f"stage {name!r} needs {', '.join(missing)}, which has not run; run it first, or leave out --only"
                    )
                if name not in looked:
                    looked |= _look([name], [*finished.values(), step])
                step = replace(step, done=self._run_stage(step))
            elif step.done is not None:
                say(f"{name}: up to date ({step.folder})")
            finished[name] = step
        return {name: step.done for name, step in finished.items() if step.done is not None}

    def _run_stage(self, step: Step) -> Artifact:
        say(f"{step.name}: {step.reason}; writing {step.folder}")
        existed = step.folder.exists()
        step.folder.mkdir(parents=True, exist_ok=True)
        if not (step.folder / "checkpoints").is_dir():  # nothing to go on from, so no history either
            (step.folder / "metrics.jsonl").unlink(missing_ok=True)
        config = json.loads(self.recipe.stages[step.name].model_dump_json())
        start = time.monotonic()
        _quiet()
        try:
            (step.folder / "config.yaml").write_text(yaml.safe_dump({"stage": step.stage.stage, **config}, sort_keys=False))
            metrics = step.stage.run(Context(step.name, step.folder, History(step.folder / "metrics.jsonl")))
        except AlignError as error:
            if not existed:
                _remove_unfinished(step.folder)
            raise AlignError(f"{step.name}: {error}") from error
        artifact = Artifact(
            name=f"{self.recipe.name}-{step.name}" if self.recipe.name != step.name else step.name,
            stage=step.stage.stage,
            identity=step.identity,
            path=str(step.folder),
            config=config,
            parents=step.parents,
            data=step.data,
            metrics=metrics,
            versions=library_versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=round(time.monotonic() - start, 1),
        )
        artifact = self.registry.add(artifact)
        artifact.write()
        say(f"{step.name}: done in {artifact.seconds:.0f} s, registered as {artifact.reference}")
        return artifact


def _look(names: list[str], plan: list[Step]) -> set[str]:
    """The preflight of the stages `names`; returns those that could be looked at before what they need has run.

    Raises:
        AlignError: it found an error.
    """
    if not names:
        return set()
    from align.preflight.inspect import preflight

    return preflight(plan, names)


def _quiet() -> None:
    """Keep the terminal for what a person must know: libraries report errors only."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _remove_unfinished(folder: Path) -> None:
    """Take away what a stage left that failed over its input; checkpoints, which are worth keeping, stay."""
    if not (folder / "checkpoints").exists():
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def _map(value: Any, meaning: Mapping[str, str]) -> Any:
    """Replace references inside a field's value."""
    if isinstance(value, str):
        return meaning.get(value, value)
    if isinstance(value, dict):
        return {key: meaning.get(item, item) for key, item in value.items()}
    return [meaning.get(item, item) for item in value]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _model_fingerprint(path: str) -> str:
    """Content of a model folder (large files by size and both ends), or the hub id itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt"} and file.is_file():
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}:".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(2**20))
                stream.seek(max(0, size - 2**20))
                digest.update(stream.read())
    return digest.hexdigest()


def default_out(recipe: Recipe) -> Path:
    """Where a recipe writes unless told otherwise."""
    return home() / recipe.name
