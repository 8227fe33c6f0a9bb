"""An artifact to a repository of the hub and back: the repository is the model's folder, each version a commit with a tag."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from align.artifact import MANIFEST, Artifact
from align.errors import AlignError, first_line
from align.registry import check_name
from align.runner.checkpoints import SEAL
from align.runner.files import disk_is_full

HUB = "hub:"
"""In front of a repository's name, OWNER/NAME; anything else is a folder."""
KEPT = ("*.safetensors", "*.json", "*.jsonl", "*.yaml", "*.txt", "*.md", "*.csv", "*.jinja", "*.model")
"""What goes to the hub and comes from it: weights as safetensors, and text. Pickles do neither."""


def is_hub(target: str) -> bool:
    """Whether `target` is a repository of the hub, and not a folder."""
    return target.startswith(HUB)


def upload(place: Path, artifact: Artifact, target: str, *, public: bool = False) -> str:
    """Make the sealed folder `place` the content of the repository `target`, tagged ``vVERSION``; returns its address. A new one is
    private; one that everybody can read must be asked for by `public`.

    Raises:
        AlignError: the repository is public, and that was not asked for; the tag is another artifact's, a file is none of `KEPT`,
            or the hub refuses or cannot be reached.
    """
    repository, tag, api = _repository(target), f"v{artifact.version}", _api()
    strange = [file.name for file in sorted(place.rglob("*")) if file.is_file() and not any(fnmatch(file.name, p) for p in KEPT)]
    if strange:
        raise AlignError(f"{artifact.reference} holds {strange[0]}; only safetensors and text are pushed to the hub")
    with _told(target):
        address = str(api.create_repo(repository, private=True, exist_ok=True))
        if not public and not api.repo_info(repository).private:
            raise AlignError(f"{target} is public, and everybody could read {artifact.reference}: --public if that is meant")
        if api.revision_exists(repository, tag):
            there = Artifact.load(Path(api.hf_hub_download(repository, MANIFEST, revision=tag)))
            if there.identity != artifact.identity:
                raise AlignError(f"{target} has another {tag}; push {artifact.reference} to another repository")
            return address
        commit = api.upload_folder(
            repo_id=repository, folder_path=place, commit_message=artifact.reference, delete_patterns="*", allow_patterns=[*KEPT]
        )
        api.create_tag(repository, tag=tag, revision=commit.oid)
    return address


def download(target: str, version: str, place: Path) -> None:
    """Fetch the repository `target`, or its tag ``vVERSION``, into the new folder `place`. What comes is not to be trusted yet.

    Raises:
        AlignError: it is not there, or the hub cannot be reached.
    """
    revision = f"v{version}" if version else None
    with _told(target):
        _api().snapshot_download(_repository(target), revision=revision, local_dir=place, allow_patterns=[*KEPT])
    shutil.rmtree(place / ".cache", ignore_errors=True)  # notes of the client
    if not (place / SEAL).is_file():
        raise AlignError(f"{target} has no {SEAL}: it was not pushed from here. Name it as a model, OWNER/NAME, and it is loaded")


def _repository(target: str) -> str:
    owner, slash, name = target.removeprefix(HUB).partition("/")
    if not slash:
        raise AlignError(f"{target!r} should read {HUB}OWNER/NAME")
    return f"{check_name(owner)}/{check_name(name)}"


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


@contextmanager
def _told(target: str) -> Iterator[None]:
    """What the hub's client raises, as one line; that the disk is full is told elsewhere."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    theirs: Any = (OSError, HFValidationError, *HfHubHTTPError.__bases__)  # with no network, those of its HTTP library
    try:
        yield
    except theirs as error:
        if disk_is_full(error):
            raise
        raise AlignError(f"{target}: {first_line(error)}; `hf auth login` logs in, and HF_HUB_OFFLINE must not be set") from error
