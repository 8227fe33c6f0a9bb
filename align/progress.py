"""What a person sees while work goes on, and the history that is written: ``metrics.jsonl`` first, trackers optional."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")

SHOWN = ("loss", "eval_loss", "rewards/accuracies", "accuracy", "objective/scores", "reward", "objective/kl", "mean_token_accuracy")
"""Metrics worth a place beside the progress bar."""


def say(line: str) -> None:
    """One line for the person at the terminal, on stderr, without tearing a progress bar."""
    tqdm.write(line, file=sys.stderr)


def bar(label: str, total: int | None, unit: str = "step") -> tqdm:
    """A progress bar with the time left; without a `total`, with the rate alone."""
    return tqdm(total=total, desc=f"{label:>12}", unit=unit, file=sys.stderr, dynamic_ncols=True, mininterval=0.5)


def track(items: Sequence[Item], label: str, unit: str = "pack") -> Iterable[Item]:
    """Iterate over `items` behind a progress bar."""
    with bar(label, len(items), unit) as progress:
        for item in items:
            yield item
            progress.update()


class History:
    """The metrics of one stage, appended to a file as they come. What the file holds already belongs to a run that was cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        whole_lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a kill may have cut the last one
        self.records: list[dict[str, Any]] = [json.loads(line) for line in whole_lines]
        self._start = time.monotonic() - (self.records[-1]["seconds"] if self.records else 0.0)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, because the run goes on from there."""
        self.records = [record for record in self.records if record["step"] <= step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one record: the step, seconds since the start, and `metrics`."""
        record = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def last(self, name: str) -> Any:
        """The latest value of `name`, or None."""
        return next((record[name] for record in reversed(self.records) if name in record), None)


def shown(metrics: dict[str, Any]) -> str:
    """The few metrics that fit beside a progress bar."""
    return " ".join(f"{name.rsplit('/', 1)[-1]} {metrics[name]:.3f}" for name in SHOWN if name in metrics)
