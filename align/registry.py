"""The model registry: base models by alias, and every stage's output as ``name@version`` with its lineage.

A registered artifact is one small JSON file, ``registry/NAME/VERSION.json`` under the home folder (``$ALIGN_HOME``, ``runs`` by
default).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from align.artifact import BEGUN, Artifact
from align.errors import AlignError, near_file, near_miss
from align.runner.files import refuse_unwritable, write_atomically
from align.runner.locks import lock

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

ALIASES = {
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B-Base",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "gpt2": "openai-community/gpt2",
}
"""Short names of base models; `Registry.add_alias` adds your own."""


def home() -> Path:
    """Where runs and the registry live; an empty ``ALIGN_HOME``, as an unset variable of a shell gives, is none. A ``~`` that no
    shell has read, in quotes or in a file of settings, is the user's folder.

    Raises:
        AlignError: a file is in its place.
    """
    place = Path(os.path.expanduser(os.environ.get("ALIGN_HOME") or "runs"))
    if os.path.isfile(place):
        raise AlignError(f"{place} is a file, and runs and the registry live in a folder: set ALIGN_HOME to one")
    return place


def run_folder(run: str | Path) -> Path:
    """The folder `run`, or else what is called so under the home folder, there or not."""
    return Path(run) if Path(run).is_dir() else home() / run


def check_name(name: str) -> str:
    """`name`, if it can be a file name.

    Raises:
        AlignError: it cannot.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 100:
        raise AlignError(
            f"the name {name!r} must be letters (A-Z, a-z), digits, '.', '_' or '-', start with a letter or digit, and have "
            f"at most 100 of them{'' if isinstance(name, str) else '; here it is no text: put it in quotes'}"
        )
    return name


@dataclass(frozen=True)
class Resolved:
    """What a model reference means: a path or hub id to load, and the artifact behind it, if there is one."""

    path: str
    artifact: Artifact | None = None


class Registry:
    """Reads and adds artifacts. Every call looks at the disk, so several processes can share one."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or home()) / "registry"

    def add(self, artifact: Artifact) -> Artifact:
        """Register `artifact` under the next free version and return it with that version. The same identity and path is not
        added twice: where it ran again, or its folder was moved, its entry is replaced.
        """
        folder = self.root / check_name(artifact.name)
        with lock(folder):
            # Only what speaks of this identity is parsed: thousands would take long, and a damaged one is none of them.
            entries = [path for path in self.entries(artifact.name) if artifact.identity in path.read_text("utf-8", "replace")]
            alike = [known for known in map(Artifact.load, entries) if known.identity == artifact.identity]
            same = [known for known in alike if known.path == artifact.path] or [a for a in alike if not Path(a.path).is_dir()]
            version = same[0].version if same else 1 + max(self._taken(artifact.name), default=0)
            numbered = replace(artifact, version=version)
            write_atomically(folder / f"{version}.json", json.dumps(asdict(numbered), indent=1))
        return numbered

    def lost(self, artifact: Artifact) -> bool:
        """Whether `artifact`, which was registered, is looked for in a folder that is gone: it was moved to where it is now."""
        try:
            known = Artifact.load(self.root / artifact.name / f"{artifact.version}.json")
        except (OSError, AlignError):  # another registry's; or damaged, which `get` tells
            return False
        return known.identity == artifact.identity and known.path != artifact.path and not Path(known.path).is_dir()

    def remove(self, artifact: Artifact) -> None:
        """Take `artifact` out; see `align.runner.share.delete` for what is checked before. Its version is not given again."""
        entry = self.root / artifact.name / f"{artifact.version}.json"
        entry.rename(entry.with_suffix(".deleted"))

    def _taken(self, name: str) -> list[int]:
        """Version numbers that are, or were, somebody's."""
        return [int(path.stem) for path in (self.root / name).glob("[0-9]*.*") if path.stem.isdigit()]

    def names(self) -> list[str]:
        """Registered names."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if path.is_dir() and self.entries(path.name))

    def entries(self, name: str) -> list[Path]:
        """The files of all versions of `name`, oldest first; a copy that somebody made of one (``1 (copy).json``) is none."""
        return sorted((p for p in (self.root / name).glob("[0-9]*.json") if p.stem.isdigit()), key=lambda path: int(path.stem))

    def versions(self, name: str) -> list[Artifact]:
        """All versions of `name`, oldest first.

        Raises:
            AlignError: an entry is damaged.
        """
        return [Artifact.load(path) for path in self.entries(name)]

    def all(self) -> list[Artifact]:
        """Everything, by name and version; see `versions`."""
        return [artifact for name in self.names() for artifact in self.versions(name)]

    def get(self, reference: str) -> Artifact:
        """The artifact ``NAME`` (its latest version) or ``NAME@VERSION``.

        Raises:
            AlignError: there is none, or its entry is damaged.
        """
        name, _, version = reference.partition("@")
        entries = self.entries(name) if NAME.fullmatch(name) else []
        if not entries:
            known = self.names()
            raise AlignError(
                f"no model {name!r} in the registry {self.root}{near_miss(name, known)}; `align models list` shows what there is"
            )
        found = next((path for path in reversed(entries) if version in ("", path.stem)), None)
        if found is None:
            raise AlignError(f"{name!r} has no version {version!r}; it has {', '.join(path.stem for path in entries)}")
        return Artifact.load(found)

    def folder(self, artifact: Artifact) -> Path:
        """Where `artifact`, which is registered, lies.

        Raises:
            AlignError: it is gone or not whole, or something else has taken its place.
        """
        folder = Path(artifact.path)
        if not folder.is_dir():
            raise AlignError(
                f"{artifact.reference} was at {folder}, and that folder is gone; where it was moved, name the folder, or give its "
                f"command again with the new place as --out or --output_dir, which tells the registry"
            )
        held = Artifact.read(folder)
        if held is None and (folder / BEGUN).is_file():
            raise AlignError(f"{artifact.reference} at {folder} is not whole: its stage runs again, or was cut; let that end first")
        if held is not None and held.identity != artifact.identity:
            raise AlignError(f"{artifact.reference} was at {folder}, and that folder holds {held.reference} now")
        return folder

    def resolve(self, reference: str, known: Iterable[str] = (), *, through: tuple[str, ...] = ()) -> Resolved:
        """What ``model: REFERENCE`` means: a folder, a registered name, an alias or a hub id, in this order.

        Args:
            known: other names that may have been meant.
            through: aliases that led here.

        Raises:
            AlignError: it looks like a path or a version and there is none, or aliases stand for each other.
        """
        path = Path(os.path.expanduser(reference)).resolve()
        if reference and path.is_dir():
            return Resolved(str(path), Artifact.read(path))
        if reference.startswith((".", "/", "~")) or reference.count("/") > 1:
            raise AlignError(f"no model folder {reference!r}{near_file(path)}")
        if "@" in reference or reference in self.names():
            artifact = self.get(reference)
            return Resolved(str(self.folder(artifact)), artifact)
        aliases = self.aliases()
        if reference in through:
            raise AlignError(f"the alias {reference!r} stands for itself in {self.root / 'aliases.json'}; give it another target")
        if reference in aliases:
            return self.resolve(aliases[reference], known, through=(*through, reference))
        if "/" not in reference:
            guess = near_miss(reference, [*known, *self.names(), *aliases]) or near_file(path)
            raise AlignError(
                f"no model {reference!r}{guess}: it is not a folder, not in the registry ({self.root}), not an alias, and a hub id "
                f"reads OWNER/NAME"
            )
        return Resolved(reference)

    def lineage(self, of: str | Artifact) -> list[tuple[int, str, Artifact | None]]:
        """`of` and its ancestors, depth first: (depth, reference, artifact). The artifact is None for a base model, and for
        one that this registry does not know, as its child was pulled from another. Who is met again is told of without ancestors.
        """
        found: list[tuple[int, str, Artifact | None]] = []
        seen = set[str]()

        def visit(artifact: Artifact, depth: int) -> None:
            found.append((depth, artifact.reference, artifact))
            if artifact.reference in seen:
                return
            seen.add(artifact.reference)
            for name, key in {name: key for key, name in artifact.parents.items()}.items():
                parent = self._parent(artifact, key)
                if parent is None:
                    found.append((depth + 1, name, None))
                else:
                    visit(parent, depth + 1)

        visit(of if isinstance(of, Artifact) else self.get(of), 0)
        return found

    def _parent(self, child: Artifact, key: str) -> Artifact | None:
        """What ``child.parents[key]`` names, if it is registered here: another registry's ``sft@1`` may be somebody else here."""
        name, _, version = child.parents[key].partition("@")
        entries = self.entries(name) if NAME.fullmatch(name) else []
        if not any(version in ("", path.stem) for path in entries):
            return None
        parent = self.get(child.parents[key])
        return parent if child.inputs.get(key, parent.identity).startswith(parent.identity) else None

    def aliases(self) -> dict[str, str]:
        """Short names of base models: the shipped ones and the user's.

        Raises:
            AlignError: the user's file of them is damaged.
        """
        path = self.root / "aliases.json"
        if not path.is_file():
            return dict(ALIASES)
        try:
            own = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(own, dict) or not all(isinstance(target, str) for target in own.values()):
                raise ValueError("expected an object of names and what they stand for")
        except ValueError as error:
            raise AlignError(
                f"{path} cannot be read ({error}); mend it, or remove it and name the aliases again (`align models alias`)"
            ) from error
        return {**ALIASES, **own}

    def own_aliases(self) -> dict[str, str]:
        """The user's alone."""
        return {alias: target for alias, target in self.aliases().items() if ALIASES.get(alias) != target}

    def add_alias(self, alias: str, target: str) -> None:
        """Let `alias` stand for what `target` means now: the folder of a registered NAME[@VERSION], any other folder, or a hub id.

        Raises:
            AlignError: `target` leads nowhere, a registered model has the name `alias` and would hide it, or the registry cannot be
                written.
        """
        if check_name(alias) in self.names():
            raise AlignError(f"{alias!r} is the name of a registered model; choose another alias")
        path = self.resolve(target).path
        refuse_unwritable(self.root, "set ALIGN_HOME to a folder that can take the registry")
        file = self.root / "aliases.json"
        with lock(file):
            write_atomically(file, json.dumps({**self.own_aliases(), alias: path}, indent=1))

    def remove_alias(self, alias: str) -> str:
        """Forget `alias`, one of `own_aliases`; returns what it stood for."""
        file = self.root / "aliases.json"
        with lock(file):
            own = self.own_aliases()
            target = own.pop(alias)
            write_atomically(file, json.dumps(own, indent=1))
        return target
