"""Artifacts from one registry to another by way of a folder, verified on the way; and what of a run can be thrown away."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from align.artifact import MANIFEST, Artifact
from align.errors import AlignError
from align.progress import say
from align.registry import Registry, check_name
from align.runner.checkpoints import SEAL, fault, seal
from align.runner.locks import is_locked, lock


def push(registry: Registry, reference: str, target: Path) -> Path:
    """Copy a registered artifact to ``TARGET/NAME/VERSION``, with checksums. Checkpoints stay behind.

    Raises:
        AlignError: there is no such artifact, or its place is taken by another one.
    """
    artifact = registry.get(reference)
    place = target / artifact.name / str(artifact.version)
    if place.exists():
        there = Artifact.read(place)
        if there is not None and there.identity == artifact.identity and fault(place) is None:
            return place
        raise AlignError(f"{place} holds something else than {artifact.reference}; remove it first")
    aside = place.with_name(f".{place.name}.part")
    with lock(place):
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(artifact.path, aside, ignore=shutil.ignore_patterns("checkpoints", ".*"))
        seal(aside)
        os.replace(aside, place)
    adapter = place / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        say(f"{artifact.reference} is an adapter: where it is pulled, its base {base} must be found as well")
    return place


def pull(registry: Registry, source: Path, reference: str, into: Path) -> Artifact:
    """Copy ``SOURCE/NAME/VERSION`` (the latest version by default) into the folder `into` and register it.

    Raises:
        AlignError: it is not there, not whole, or not what it says.
    """
    name, _, version = reference.partition("@")
    shelf = source / check_name(name)
    known = sorted((int(path.name) for path in shelf.iterdir() if path.name.isdigit()), reverse=True) if shelf.is_dir() else []
    if not known or (version and version not in map(str, known)):
        raise AlignError(f"{source} has no {reference!r}; it has the versions: {', '.join(map(str, known)) or 'none'}")
    place = shelf / (version or str(known[0]))
    if reason := fault(place):
        raise AlignError(f"{place}: {reason}; it was not pulled")
    artifact = Artifact.read(place)
    if artifact is None or artifact.name != name:
        raise AlignError(f"{place} holds no artifact called {name!r}; it was not pulled")
    folder = (into / f"{name}-{check_name(artifact.identity)[:8]}").resolve()
    with lock(folder):
        if Artifact.read(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(place, folder, ignore=shutil.ignore_patterns(SEAL, MANIFEST))
        artifact = registry.add(replace(artifact, path=str(folder)))
        artifact.write()
    return artifact


def delete(registry: Registry, reference: str) -> Artifact:
    """Take ``NAME@VERSION`` out of the registry, and its folder away.

    Raises:
        AlignError: something descends from it, an alias stands for it, or somebody works on it.
    """
    if "@" not in reference:
        raise AlignError(f"say which version: {registry.get(reference).reference}")
    artifact = registry.get(reference)
    children = sorted({other.reference for other in registry.all() if artifact.reference in other.parents.values()})
    if children:
        raise AlignError(f"{reference} is what {', '.join(children)} descends from; delete that first")
    aliases = [alias for alias, path in registry.aliases().items() if path == artifact.path]
    if aliases:
        raise AlignError(f"the alias {aliases[0]!r} stands for {reference}; give it another target first")
    folder = Path(artifact.path)
    if is_locked(folder):
        raise AlignError(f"a run works in {folder}; wait until it is done")
    registry.remove(artifact)
    held = Artifact.read(folder) if folder.is_dir() else None
    if held is not None and held.identity == artifact.identity:
        with lock(folder):
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)
    return artifact


def unreferenced(root: Path) -> list[Path]:
    """What under `root` nothing refers to any more: checkpoints of stages that are done, and damaged ones. Checkpoints of a stage
    that is not done are where it goes on.
    """
    found = []
    for folder in sorted(root.rglob("checkpoints")):
        if folder.is_symlink() or not folder.is_dir() or is_locked(folder.parent):
            continue
        if (folder.parent / MANIFEST).is_file():
            found.append(folder)
        else:
            found += sorted(folder.glob("corrupt-*"))
    return found


def size(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
