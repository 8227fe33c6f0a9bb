"""What the folder of a run says of itself: how each stage stands, and which stages are those of the recipe that ran last."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from align.runner.files import write_atomically


def read_status(path: Path) -> dict[str, Any]:
    """A stage's status (see `align.progress.Status`), or nothing, where the file is damaged or something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def status_of(folder: Path) -> dict[str, Any]:
    """`read_status` of the stage in `folder`: what its process, on the first of several machines, last said of itself."""
    return read_status(folder.parent / "logs" / f"{folder.name}.json")


RECIPE = "recipe.json"
"""In a run's folder: the recipe that last ran there."""


def note_recipe(run: Path, name: str, stages: Mapping[str, Path]) -> None:
    """Keep in the folder `run` what recipe runs there, and the folders of its `stages`, in their order."""
    noted = {"name": name, "stages": {stage: folder.name for stage, folder in stages.items()}}
    if noted_recipe(run) == noted:
        return
    with suppress(OSError):  # a stage that is to run tells of it; where all is done, nothing need be written
        write_atomically(run / RECIPE, json.dumps(noted, indent=1))


def noted_recipe(run: Path) -> dict[str, Any]:
    """What `note_recipe` kept; nothing, where the file is not there, damaged or something else."""
    noted = read_status(run / RECIPE)
    return noted if isinstance(noted.get("name"), str) and isinstance(noted.get("stages"), dict) else {}


def left_over(folder: Path) -> bool:
    """Whether the stage in `folder` is none of the recipe that last ran around it: of earlier settings, or of another recipe."""
    noted = noted_recipe(folder.parent)
    return bool(noted) and folder.name not in noted["stages"].values()
