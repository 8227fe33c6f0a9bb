"""What each stage is as it would run now: its identity, where it lies, whether it is done, and why not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from align.artifact import BEGUN, Artifact, read_artifact
from align.data import fingerprint
from align.errors import AlignError, near_miss, told_of
from align.recipe import Recipe, reference_fields, references
from align.registry import Registry, check_name
from align.rewards import reward_fingerprint
from align.runner.checkpoints import SEAL, checkpoints
from align.runner.code import code_of
from align.runner.launch import is_first_machine, machine_rank, refuse_uneven
from align.runner.locks import is_locked
from align.runner.notes import status_of
from align.sources import digest_of
from align.stages import Stage
from align.stages.config import MADE
from align.stages.written import given_fields

FORCED = "forced"
"""How the reason begins of what runs though it is done."""


@dataclass(frozen=True)
class Step:
    """One stage as it would run now."""

    name: str
    stage: Stage
    """With every reference resolved to a path or hub id."""
    draft: Artifact
    """What it will leave behind, but for the metrics: its identity, config, parents and inputs."""
    done: Artifact | None
    """The finished artifact, when nothing it depends on has changed."""
    reason: str
    """Why it would run, or that it is up to date."""
    last_seconds: float | None = None
    """How long a stage of this name took the last time."""

    @property
    def runs(self) -> bool:
        """Whether it is to be run."""
        return self.done is None or self.reason.startswith(FORCED)

    @property
    def identity(self) -> str:
        return self.draft.identity

    @property
    def folder(self) -> Path:
        return Path(self.draft.path)

    @property
    def log(self) -> Path:
        """What the stage's process on this machine printed."""
        machine = "" if is_first_machine() else f".machine-{machine_rank()}"
        return self.folder.parent / "logs" / f"{self.folder.name}{machine}.log"

    @property
    def status(self) -> Path:
        """What the stage is doing, or how it ended; see `align.progress.Status`."""
        return self.log.with_suffix(".json")


@dataclass(frozen=True)
class _Found:
    """What the references of a stage mean, each by how the recipe writes it."""

    places: dict[str, str] = field(default_factory=dict)
    """Path or hub id of models and data."""
    inputs: dict[str, str] = field(default_factory=dict)
    """What it is, wherever it lies: a stage's identity, or a fingerprint."""
    parents: dict[str, str] = field(default_factory=dict)
    """What the manifest calls a model or another stage's output."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprints of data that no stage made."""


class Planner:
    """Resolves the stages of a recipe one after the other.

    Args:
        folder: for a recipe of one stage: write into exactly this folder, instead of one named after the stage's identity.
        forced: stages to run again, done or not; what follows from them runs again, too.
    """

    def __init__(
        self, recipe: Recipe, out: Path, registry: Registry, folder: Path | None = None, forced: frozenset[str] = frozenset()
    ):
        self.recipe, self.out, self.registry, self.folder, self.forced = recipe, out, registry, folder, forced
        self._fingerprints: dict[tuple[str, str], str] = {}

    def plan(self) -> list[Step]:
        """Every stage in order.

        Raises:
            AlignError: a reference leads nowhere.
        """
        steps: dict[str, Step] = {}
        self._fingerprints.clear()
        for name in self.recipe.ordered():
            steps[name] = self._resolve(name, steps)
        return list(steps.values())

    def resolve(self, name: str, earlier: Mapping[str, Step]) -> Step:
        """The stage `name`, given those that it needs, as it is now: a file may have changed since all was planned.

        Raises:
            AlignError: a reference leads nowhere, the stage's folder holds something else, or its launch is uneven.
        """
        self._fingerprints.clear()
        return self._resolve(name, earlier)

    def _resolve(self, name: str, earlier: Mapping[str, Step]) -> Step:
        stage = self.recipe.stages[name]
        refuse_uneven(name, stage)
        with told_of(f"stage {name!r}") if len(self.recipe.stages) > 1 else nullcontext():
            found = self._look_up(name, earlier)
        fields = [(key, value) for key, kind, value in reference_fields(stage) if kind in MADE]
        code = code_of(type(stage))
        config = stage.essence() | {key: _map(value, found.inputs) for key, value in fields}
        identity = _hash({"stage": stage.stage, "config": config, "inputs": sorted(found.inputs.values()), "code": code})
        folder = (self.folder or self.out / f"{name}-{identity[:8]}").resolve()
        done = read_artifact(folder)
        draft = Artifact(
            name=check_name(f"{self.recipe.name}-{name}" if self.recipe.name != name else name),
            stage=stage.stage,
            identity=identity,
            path=str(folder),
            config=json.loads(stage.model_dump_json()),
            parents=found.parents,
            data=found.data,
            inputs=found.inputs,
            code=code,
        )
        if done is not None and done.identity != identity:
            why = _changed(stage, draft, done) if done.stage == draft.stage else f"of the stage {done.stage}"
            raise AlignError(f"{folder} holds another result ({done.reference}; {why}); choose another output_dir, or remove it")
        if done is None and name not in self.forced:
            _refuse_anothers(stage, draft)
        resolved = stage.model_copy(update={key: _map(value, found.places) for key, value in fields})
        return Step(name, resolved, draft, done, *self._reason(name, stage, draft, done, earlier))

    def _look_up(self, name: str, earlier: Mapping[str, Step]) -> _Found:
        """What the references of the stage `name` mean now."""
        found, others = _Found(), [other for other in self.recipe.stages if other != name]
        for kind, reference in references(self.recipe.stages[name]):
            owner = self.recipe.stage_of(kind, reference)
            if owner is not None:
                step, rest = earlier[owner], reference[len(owner) :]
                found.places[reference], found.inputs[reference] = str(step.folder) + rest, step.identity + rest
                found.parents[reference] = step.done.reference if step.done else f"{self.recipe.name}-{owner}"
            elif kind == "model":
                resolved = self.registry.resolve(reference, others)  # where there is none, it may be a stage, misspelt
                path, artifact = resolved.path, resolved.artifact
                found.places[reference] = path
                found.inputs[reference] = artifact.identity if artifact else self._fingerprint(kind, path)
                found.parents[reference] = artifact.reference if artifact and artifact.version else path
            elif kind == "data":
                found.places[reference] = reference
                with _perhaps_a_stage(reference, others):
                    found.inputs[reference] = found.data[reference] = self._fingerprint(kind, reference)
            else:
                found.inputs[reference] = self._fingerprint(kind, reference)
        return found

    def _fingerprint(self, kind: str, reference: str) -> str:
        """Of a model that no stage made, a file, a reward or a template; each is read once in a plan."""
        key = (kind, reference)
        if key not in self._fingerprints:
            self._fingerprints[key] = FINGERPRINTS[kind](reference)
        return self._fingerprints[key]

    def _reason(
        self, name: str, stage: Stage, draft: Artifact, done: Artifact | None, earlier: Mapping[str, Step]
    ) -> tuple[str, float | None]:
        """Why the stage would run, or that it is up to date; and where it would run, how many seconds it took the last time."""
        news, seconds = ("up to date", None) if done else self._news(stage, draft)
        above = [owner for owner in self.recipe.needs(name) if earlier[owner].reason.startswith(FORCED)]
        if name not in self.forced and not above:
            return news, seconds
        why = FORCED if name in self.forced else f"{FORCED}: follows {', '.join(above)}"
        return (why, done.seconds) if done else (f"{why}; {news}", seconds)

    def _news(self, stage: Stage, draft: Artifact) -> tuple[str, float | None]:
        """What is new in `draft` beside the latest result of a stage of that name, and how long that took."""
        stem = Path(draft.path).name.removesuffix(f"-{draft.identity[:8]}")
        before = [a for folder in self.out.glob(f"{stem}-????????") if (a := read_artifact(folder))]
        latest = max(before, key=lambda artifact: artifact.created, default=None)
        told = _unfinished(draft) or ("never ran" if latest is None else _changed(stage, draft, latest))
        return told, None if latest is None else latest.seconds


@contextmanager
def _perhaps_a_stage(reference: str, others: Sequence[str]) -> Iterator[None]:
    """Where the data `reference` are nowhere, say which of the stages `others` may have been meant by its first part."""
    try:
        yield
    except AlignError as error:
        owner, slash, _ = reference.partition("/")
        if not slash or os.path.exists(owner) or not (guess := near_miss(owner, others)):
            raise
        raise AlignError(f"{error}, and no stage is called {owner!r}{guess}") from error


def _refuse_anothers(stage: Stage, draft: Artifact) -> None:
    """Raise `AlignError` where the checkpoints in the folder of `draft` are those of something else that was begun there."""
    begun, folder = Path(draft.path) / BEGUN, Path(draft.path)
    if not begun.is_file() or not (folder / "checkpoints").is_dir():
        return
    other = Artifact.load(begun)
    if other.identity != draft.identity:
        why = _changed(stage, draft, other)
        raise AlignError(f"{folder} holds what was begun of another run ({why}); choose another output_dir, or remove it")


def _unfinished(draft: Artifact) -> str | None:
    """How the last attempt at `draft` ended, and where the next one begins; None where there was none."""
    folder = Path(draft.path)
    if is_locked(folder):
        return "begun by another run"
    if not (folder / BEGUN).is_file() or Artifact.load(folder / BEGUN).identity != draft.identity:
        return None
    ended = "failed" if status_of(folder).get("state") == "failed" else "interrupted"
    kept = checkpoints(folder / "checkpoints") if draft.config.get("resume_from_checkpoint") else []
    sealed = [checkpoint.name for checkpoint in kept if (checkpoint / SEAL).is_file()]
    return f"{ended}, {f'goes on from {sealed[-1]}' if sealed else 'starts again'}"


LONGEST = 40
"""Characters of a value that is told."""


def _changed(stage: Stage, now: Artifact, before: Artifact) -> str:
    """What of the identity of `now`, a result of `stage`, is another than that of `before`."""
    parts = []
    new, old = stage.essence(), _essence(type(stage), before)
    if fields := _differ(new, old):
        parts.append(f"changed: {', '.join(_told(key, old, new) for key in fields)}")
    if inputs := [key for key in _differ(now.inputs, before.inputs) if key in now.inputs.keys() & before.inputs.keys()]:
        parts.append(f"its inputs changed: {', '.join(inputs)}")
    if code := _differ(now.code, before.code):
        parts.append(f"code changed: {', '.join(code)}")
    return "; ".join(parts) or "its inputs changed"


def _essence(cls: type[Stage], before: Artifact) -> dict[str, Any]:
    """What decided `before`, by its config: as that is, where another version wrote it."""
    try:
        return cls.model_validate(given_fields(cls, before.config)).essence()
    except ValidationError:
        return before.config


def _told(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The name of a field, and, where both are short, its values before and now."""
    if key not in old or key not in new:
        return key
    values = [json.dumps(each[key], ensure_ascii=False) for each in (old, new)]
    return key if max(map(len, values)) > LONGEST else f"{key} {' -> '.join(values)}"


def _differ(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    return [key for key in now if now[key] != before.get(key)] + [key for key in before if key not in now]


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
    """Names and contents of a model folder's files, or the hub id itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".json", ".safetensors", ".model", ".jinja", ".txt", ".py"} and file.is_file():
            digest.update(f"{file.name}:{digest_of(file)}:".encode())
    return digest.hexdigest()


def _template_fingerprint(choice: str) -> str:
    """The content of a file, or the name of a shipped template."""
    path = Path(os.path.expanduser(choice))
    return digest_of(path) if path.is_file() else choice


FINGERPRINTS = {
    "model": _model_fingerprint,
    "data": fingerprint,
    "reward": reward_fingerprint,
    "template": _template_fingerprint,
}
