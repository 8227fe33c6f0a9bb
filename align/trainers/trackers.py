"""Trackers beside metrics.jsonl (TensorBoard, W&B, trackio …) for trainers that are not transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from align.artifact import TRACKING
from align.errors import AlignError, near_miss
from align.progress import History


@contextmanager
def tracked(history: History, names: Sequence[str], folder: Path) -> Iterator[None]:
    """Within, every record of `history` also goes to the trackers `names`, through accelerate, as a run called like the stage's
    `folder`. ``none`` and ``all`` mean what they mean to transformers' Trainer.

    Raises:
        AlignError: accelerate knows no such tracker, or its package is not installed.
    """
    names = [name for name in names if name != "none"]
    for name in names:
        if name == "all":
            continue
        if name not in LOGGER_TYPE_TO_CLASS:
            raise AlignError(f"report_to: no tracker {name!r}{near_miss(name, LOGGER_TYPE_TO_CLASS)}")
        if name in LoggerType.list() and name not in map(str, get_available_trackers()):
            raise AlignError(f"report_to: the package of the tracker {name!r} is not installed")
    if not names:
        yield
        return
    accelerator = Accelerator(log_with=names, project_dir=str(folder / TRACKING))
    accelerator.init_trackers("align", init_kwargs={name: {"name": folder.name} for name in ("wandb", "trackio")})

    def forward(records: Sequence[dict[str, Any]]) -> None:
        numbers = {name: value for name, value in records[-1].items() if isinstance(value, int | float)}
        accelerator.log(numbers, step=numbers.pop("step"))

    history.watchers.append(forward)
    try:
        yield
    finally:
        history.watchers.remove(forward)
        for tracker in accelerator.trackers:  # accelerate's own end also ends what connects the processes, which are not done
            tracker.finish()
