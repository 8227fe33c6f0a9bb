"""Artifacts from one registry to another by way of a folder or the hub, verified; and what of a run can be thrown away."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from align.artifact import BEGUN, MANIFEST, TRACKING, Artifact, read_artifact
from align.errors import AlignError, near_miss
from align.progress import say
from align.registry import Registry, check_name, home
from align.runner.checkpoints import SEAL, fault, seal
from align.runner.files import flush_tree, json_record, named_when_full, refuse_unwritable
from align.runner.hub import download, is_hub, upload
from align.runner.locks import is_locked, lock, lock_if_free
from align.runner.notes import left_over


def push(registry: Registry, reference: str, target: str, *, public: bool = False) -> str:
    """Copy a registered artifact, with checksums, to the folder ``TARGET/NAME/VERSION`` or the repository ``hub:OWNER/NAME``;
    returns where it is. Checkpoints stay behind.

    Args:
        public: the repository may be one that everybody can read.

    Raises:
        AlignError: there is no such artifact or its folder is gone, its place is taken by another one or cannot be written, or the
            hub refuses.
    """
    artifact = registry.get(reference)
    folder = registry.folder(artifact)
    if is_hub(target):
        with tempfile.TemporaryDirectory(prefix="align-push-") as shelf:
            place = _put(artifact, Path(shelf))
            where = upload(place, artifact, target, public=public)
    else:
        refuse_unwritable(Path(target))
        place = _put(artifact, Path(target))
        where = str(place)
    base = _base(folder)
    if base is not None:
        say(f"{artifact.reference} is an adapter: where it is pulled, its base {base} must be found as well")
    return where


def _base(folder: Path) -> str | None:
    """What the adapter in `folder` was trained on; None where there is none."""
    return json_record(folder / "adapter_config.json").get("base_model_name_or_path")


def _put(artifact: Artifact, shelf: Path) -> Path:
    place = shelf / artifact.name / str(artifact.version)
    with lock(place):
        if place.exists():
            there = Artifact.read(place)
            if there is not None and there.identity == artifact.identity and fault(place) is None:
                return place
            raise AlignError(f"{place} holds something else than {artifact.reference}; remove it first")
        aside = place.with_name(f".{place.name}.part")
        with _whole(aside):
            shutil.copytree(artifact.path, aside, ignore=shutil.ignore_patterns("checkpoints", TRACKING, ".*"))
            seal(aside)
            os.replace(aside, place)
    return place


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """`folder` anew; what is half made of it when the block is cut is taken away."""
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with named_when_full(folder):
            yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def pull(registry: Registry, source: str, reference: str, into: Path) -> Artifact:
    """Copy what `push` wrote (the latest version by default) into the folder `into` and register it.

    Raises:
        AlignError: it is not there, not whole, or not what it says; or nothing can be written into `into`.
    """
    name, _, version = reference.partition("@")
    check_name(name)
    refuse_unwritable(into, "set ALIGN_HOME to a folder that can take the model")
    if not is_hub(source):
        place = _on_shelf(Path(source), name, version)
        return _take(registry, place, name, into, str(place))
    if version and not version.isdigit():
        raise AlignError(f"{reference!r}: a version is a number")
    with tempfile.TemporaryDirectory(prefix="align-pull-") as folder:
        download(source, version, Path(folder) / "model")
        return _take(registry, Path(folder) / "model", name, into, source)


def _on_shelf(source: Path, name: str, version: str) -> Path:
    found: dict[str, list[int]] = {}
    for path in source.glob("*/*"):
        if path.name.isdigit():
            found.setdefault(path.parent.name, []).append(int(path.name))
    if name not in found:
        pushed = f"it has: {', '.join(sorted(found))}" if found else "nothing was pushed there"
        raise AlignError(f"{source} has no {name!r}{near_miss(name, found)}; {pushed}")
    known = sorted(found[name], reverse=True)
    if version and version not in map(str, known):
        raise AlignError(f"{source} has no '{name}@{version}'; it has the versions: {', '.join(map(str, known))}")
    return source / name / (version or str(known[0]))


def _take(registry: Registry, place: Path, name: str, into: Path, where: str) -> Artifact:
    """Verify the folder `place`, to be called `where`, then copy and register it."""
    if reason := fault(place):
        raise AlignError(f"{where}: {reason}; it was not pulled")
    artifact = read_artifact(place)
    if artifact is None or artifact.name != name:
        raise AlignError(f"{where} holds no artifact called {name!r}; it was not pulled")
    folder = (into / f"{name}-{check_name(artifact.identity)[:8]}").resolve()
    with lock(folder):
        if Artifact.read(folder) is None:
            with _whole(folder):
                shutil.copytree(place, folder, ignore=shutil.ignore_patterns(SEAL, MANIFEST))
                flush_tree(folder)  # before the manifest says that it is whole
        artifact = registry.add(replace(artifact, path=str(folder)))
        artifact.write()
    return artifact


def delete(registry: Registry, reference: str) -> Artifact:
    """Take ``NAME@VERSION`` out of the registry, and its folder away.

    Raises:
        AlignError: something descends from it or is being made of it, an alias stands for it, or somebody works on it.
    """
    if "@" not in reference:
        raise AlignError(f"say which version: {registry.get(reference).reference}")
    artifact = registry.get(reference)
    children = sorted({other.reference for other in registry.all() if artifact.reference in other.parents.values()})
    if children:
        they, those = ("descend", "those") if len(children) > 1 else ("descends", "that")
        raise AlignError(f"{reference} is what {', '.join(children)} {they} from; delete {those} first")
    if running := _running_children(registry, artifact):
        raise AlignError(f"{reference} is what the run in {running[0]} works with; wait until it is done")
    aliases = [alias for alias, path in registry.aliases().items() if path == artifact.path]
    if aliases:
        raise AlignError(f"the alias {aliases[0]!r} stands for {reference}; delete it, or give it another target, first")
    folder = Path(artifact.path)
    if is_locked(folder):
        raise AlignError(f"a run works in {folder}; wait until it is done")
    held = Artifact.read(folder) if folder.is_dir() else None
    if held is None or held.identity != artifact.identity:
        registry.remove(artifact)
        return artifact
    with lock(folder):
        (folder / MANIFEST).unlink()  # first: what the registry does not know must not look finished
        registry.remove(artifact)
        shutil.rmtree(folder)
    return artifact


def _running_children(registry: Registry, artifact: Artifact) -> list[Path]:
    """Folders in which something is made of `artifact` now, of the runs that the registry or the home folder has."""
    runs = {Path(other.path).parent for other in registry.all()} | {path.resolve() for path in home().glob("*")}
    found = []
    for begun in (file for run in runs for file in run.glob(f"*/{BEGUN}") if is_locked(file.parent)):
        with suppress(FileNotFoundError):  # it was finished meanwhile
            found += [begun.parent] if artifact.reference in Artifact.load(begun).parents.values() else []
    return sorted(found)


def unreferenced(root: Path) -> list[Path]:
    """What under `root` nothing refers to any more: checkpoints of stages that are done or of settings that the recipe has
    left, and damaged ones. Checkpoints of any other stage that is not done are where it goes on.
    """
    return [path for folder in sorted(root.rglob("checkpoints")) if not is_locked(folder.parent) for path in _unused(folder)]


def _unused(checkpoints: Path) -> list[Path]:
    if checkpoints.is_symlink() or not checkpoints.is_dir():
        return []
    stage = checkpoints.parent
    over = (stage / MANIFEST).is_file() or ((stage / BEGUN).is_file() and left_over(stage))
    return [checkpoints] if over else sorted(checkpoints.glob("corrupt-*"))


def remove_unreferenced(path: Path) -> bool:
    """Remove one of `unreferenced`; False where a run has begun to use it since."""
    checkpoints = path if path.name == "checkpoints" else path.parent
    with lock_if_free(checkpoints.parent) as free:
        unused = free and path in _unused(checkpoints)
        if unused:
            shutil.rmtree(path)
    return unused


def size(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
