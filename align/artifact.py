"""What a stage leaves behind. The manifest is written last, so its presence means that the artifact is complete."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from align import __version__
from align.errors import AlignError
from align.progress import say
from align.runner.files import write_atomically

MANIFEST = "artifact.json"
PLAIN: dict[str, Any] = {"str": str, "int": int, "float": (int, float)}
"""Types of a manifest's fields, by what their annotations call them; all others are mappings."""
BEGUN = "begun.json"
"""In place of the manifest while the stage is not finished: whose checkpoints there are."""


TRACKING = "tracking"
"""Folder of what trackers write, TensorBoard's files: no part of the result."""


@dataclass(frozen=True)
class Artifact:
    """The output of one stage, and everything needed to tell where it came from."""

    name: str
    stage: str
    """Name of the stage in the catalog."""
    identity: str
    """SHA-256 over resolved config, code, parents' identities and fingerprints of the data: same identity, same result."""
    path: str
    """Absolute path of the folder: a model folder that ``from_pretrained`` loads, or data files."""
    config: dict[str, Any]
    parents: dict[str, str] = field(default_factory=dict)
    """What each reference in the config meant: ``name@version`` of a registered artifact, a path or a hub id."""
    data: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each data source."""
    inputs: dict[str, str] = field(default_factory=dict)
    """What each reference was, wherever it lay: a parent's identity or a fingerprint of the content."""
    code: dict[str, str] = field(default_factory=dict)
    """Hash of each module that the stage's computation can reach."""
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    """UTC, ISO 8601."""
    seconds: float = 0.0
    version: int = 0
    """Version in the registry; 0 before it is registered."""

    @property
    def reference(self) -> str:
        """``name@version``, as the registry and its commands take it."""
        return f"{self.name}@{self.version}"

    def begin(self) -> None:
        """Say in the artifact's folder that this is to be made there."""
        write_atomically(Path(self.path) / BEGUN, json.dumps(asdict(self), indent=1))

    def name_in(self, folder: Path) -> str | None:
        """The stage's name in its recipe, which the runner puts into the name of its folder; None where it made no such folder."""
        stem, _, tail = folder.name.rpartition("-")
        return stem if stem and tail == self.identity[:8] else None

    def write(self) -> None:
        """Write the manifest into the artifact's folder."""
        write_atomically(Path(self.path) / MANIFEST, json.dumps(asdict(self), indent=1))
        (Path(self.path) / BEGUN).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> Artifact | None:
        """The artifact in `folder`, or None where it is missing or not complete; see `load`. Its path is where it was found: the
        manifest does not know that the folder was moved or copied.
        """
        manifest = folder / MANIFEST
        return replace(cls.load(manifest), path=str(folder.resolve())) if os.path.isfile(manifest) else None

    @classmethod
    def load(cls, file: Path) -> Artifact:
        """The artifact that a manifest or an entry of the registry tells of.

        Raises:
            AlignError: the file is damaged.
        """
        try:
            found = cls(**json.loads(file.read_text(encoding="utf-8")))
            for each in fields(cls):
                if not isinstance(getattr(found, each.name), PLAIN.get(str(each.type), dict)):
                    raise TypeError(f"its {each.name!r} is no {each.type}")
            return found
        except (ValueError, TypeError) as error:
            raise AlignError(
                f"{file} cannot be read ({error}); remove it, or restore it: an artifact's {MANIFEST} and its entry in the "
                f"registry have the same content"
            ) from error


def read_artifact(folder: Path) -> Artifact | None:
    """The finished artifact in `folder`. A manifest that cannot be read is none, and a line says so."""
    try:
        return Artifact.read(folder)
    except AlignError as error:
        say(f"{folder}: its manifest cannot be read ({error.__cause__}); the stage counts as unfinished")
        return None


def library_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "align": __version__,
        **{name: version(name) for name in ("torch", "transformers", "peft", "trl", "datasets", "accelerate")},
    }
