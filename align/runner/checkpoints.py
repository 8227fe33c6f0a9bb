"""Checkpoints that can be trusted: sealed with checksums when they are complete, verified before they are used.

A checkpoint is a folder ``checkpoint-STEP``. Its seal, ``checksums.json``, is written when everything else is on the disk; without
it the folder is what a cut left of a save, and is removed. A sealed one that no longer matches is set aside as ``corrupt-STEP``,
and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from align.errors import AlignError
from align.progress import say
from align.runner.files import flush_tree, json_record, write_atomically

SEAL = "checksums.json"
SCALE = "learning_rate_scale.json"
NAME = re.compile(r"checkpoint-(\d+)")
LONGEST_HEADER = 100 * 2**20
"""Bytes of a safetensors header; the library's own limit."""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step (of PPO: the batch of episodes) that a checkpoint was made after, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def seal(checkpoint: Path) -> None:
    """Have everything on the disk, then write the checksums."""
    (checkpoint / SEAL).unlink(missing_ok=True)
    flush_tree(checkpoint)
    sums = {path.relative_to(checkpoint).as_posix(): _sha256(path) for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    write_atomically(checkpoint / SEAL, json.dumps({"sha256": sums}, indent=1))


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a sealed checkpoint, or None."""
    if checkpoint.is_symlink() or any(path.is_symlink() for path in checkpoint.rglob("*")):
        return "it contains a symbolic link"
    try:
        sums = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))["sha256"]
        names = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file()} - {SEAL}
        if missing := sorted(sums.keys() - names):
            return f"{', '.join(missing)} is missing"
        if foreign := sorted(names - sums.keys()):
            return f"{', '.join(foreign)} was not there when it was sealed"
        for name, expected in sums.items():
            if _sha256(checkpoint / name) != expected:
                return f"{name} does not match its checksum"
            if name.endswith(".safetensors") and (reason := header_fault(checkpoint / name)):
                return f"{name}: {reason}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its seal cannot be read ({error})"
    return None


def header_fault(file: Path) -> str | None:
    """What is wrong with the header of a safetensors file, or None; nothing beyond it is read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            return f"its header claims {length:,} bytes of a file of {size:,}"
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return "its header cannot be read"
    if max(ends, default=0) != size - 8 - length:
        return f"its header speaks of {max(ends, default=0):,} bytes of tensors, and there are {size - 8 - length:,}"
    return None


def best_until(checkpoint: Path) -> Path | None:
    """The checkpoint with the best weights of a transformers' training until `checkpoint`, wherever the two are by now; None where
    no best one is kept.
    """
    state = json_record(checkpoint / "trainer_state.json")
    best = state.get("best_model_checkpoint")
    return checkpoint.with_name(Path(best).name) if best else None


def _fault_of_best(checkpoint: Path) -> str | None:
    best = best_until(checkpoint)
    if best is None or best == checkpoint:
        return None
    reason = fault(best) if best.is_dir() else "it is gone"
    return reason and f"{best.name} has the best weights until then, and {reason}"


def last_good(folder: Path, fault_of_best: Callable[[Path], str | None] | None = None) -> Path | None:
    """The newest checkpoint in `folder` that is whole, and so are the best weights until then. What a cut save left is removed; a
    damaged one is set aside, with a line.

    Args:
        fault_of_best: what is wrong with the best weights until a checkpoint; by default those of a transformers' training.
    """
    remove_unsealed(folder)
    for checkpoint in reversed(checkpoints(folder)):
        reason = fault(checkpoint) or (fault_of_best or _fault_of_best)(checkpoint)
        if reason is None:
            return checkpoint
        aside = folder / f"corrupt-{step_of(checkpoint)}"
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        say(f"{checkpoint}: {reason}; set aside as {aside.name}, and the one before it is used")
    return None


@contextmanager
def resuming(checkpoint: Path) -> Iterator[None]:
    """Within, what is wrong with the content of `checkpoint`, whose seal is whole, is told in one line.

    Raises:
        AlignError: it is not what was expected.
        RuntimeError: there is no memory left, which is no fault of the checkpoint.
    """
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        from align.budget import out_of_memory  # here, for it imports torch

        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        told = " ".join(str(error).split())[:300]
        raise AlignError(f"the checkpoint {checkpoint} cannot be resumed ({told}); remove it to start before it") from error


def remove_unsealed(folder: Path) -> None:
    """Remove what cut saves left in `folder`."""
    for checkpoint in checkpoints(folder):
        if not (checkpoint / SEAL).is_file():
            shutil.rmtree(checkpoint)


def prune(folder: Path, keep: int, but: str | None) -> None:
    """Remove all but the newest `keep` sealed checkpoints, and `but`."""
    sealed = [path for path in checkpoints(folder) if (path / SEAL).is_file()]
    for checkpoint in sealed[:-keep]:
        if but is None or checkpoint.resolve() != Path(but).resolve():
            (checkpoint / SEAL).unlink()  # first: half a checkpoint must not look like a whole one
            shutil.rmtree(checkpoint)


def learning_rate_scale(folder: Path) -> float:
    """What the learning rate of the recipe is multiplied with, because a loss was not finite."""
    path = folder / SCALE
    return json.loads(path.read_text())["scale"] if path.is_file() else 1.0


def lower_learning_rate(folder: Path, error: AlignError) -> float:
    """Halve the scale of the learning rate, for this and later attempts at the stage.

    Raises:
        AlignError: `error`, when it was halved six times already.
    """
    scale = learning_rate_scale(folder) / 2
    if scale < 1 / 64:
        raise error
    write_atomically(folder / SCALE, json.dumps({"scale": scale, "because": str(error)}))
    return scale


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
