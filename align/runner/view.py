"""What a person sees of stages in other processes: a bar for each, drawn from its status file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from align.progress import drawable, drawn, duration, say
from align.runner.locks import is_locked
from align.runner.notes import left_over, read_status


class View:
    """Bars at the bottom of the terminal, one a stage; lines are said above them. In a file or a pipe they are lines, too."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}
        self._stages: tqdm | None = None

    def show(self, name: str, status: dict[str, Any]) -> None:
        """Draw what the stage reports."""
        seen = status.get("bar")
        if not seen or not seen["total"]:
            return
        bar = self._bars.get(name)
        label = f"{seen['label']:>12}"
        if bar is None or (bar.desc, bar.total) != (label, seen["total"]) or bar.n > seen["n"]:
            self.close(name)
            bar = self._bars[name] = drawn(total=seen["total"], initial=seen["n"], desc=label, unit=seen["unit"], leave=False)
        shown = f"{seen['shown']} {status['memory_gb']:.1f} GB".strip()
        if (bar.n, bar.postfix) != (seen["n"], shown):
            bar.set_postfix_str(shown, refresh=False)
            bar.update(seen["n"] - bar.n)

    def wait(self, over: int, waiting: Sequence[str], total: int) -> None:
        """Draw how many of `total` stages are over, and which wait; in a file or a pipe, and of one stage, nothing."""
        if total == 1 or not drawable():
            return
        if self._stages is None:
            form = "{desc}: {n_fmt}/{total_fmt}{postfix}"
            self._stages = drawn(total=total, desc=f"{'stages':>12}", bar_format=form, leave=False)
        self._stages.n = over
        self._stages.set_postfix_str(f"wait: {', '.join(waiting)}" if waiting else "")

    def close(self, name: str) -> None:
        """Take the stage's bar away, and say how it stood: what tqdm leaves of one among others has pieces of their lines in it."""
        if (bar := self._bars.pop(name, None)) is not None:
            bar.close()
            if bar.n > bar.initial:
                say(str(bar))

    def close_all(self) -> None:
        for name in list(self._bars):
            self.close(name)
        if self._stages is not None:
            self._stages.close()


def statuses(run: Path) -> list[dict[str, Any]]:
    """How the stages of the run in the folder `run` stand: what is left over, then those of its recipe, each oldest first. Who was
    killed cannot say so: a stage that says it runs, and whose folder nobody holds the lock of, was interrupted.
    """
    found = []
    for path in (run / "logs").glob("*.json"):
        status = read_status(path)
        if not status.keys() >= {"name", "state", "folder", "started"}:
            continue
        folder = run.resolve() / Path(status["folder"]).name  # the run may have been moved or copied since
        if status["state"] == "running" and not is_locked(folder):
            status["state"] = "interrupted"
        status["folder"] = str(folder)
        found.append({**status, "log": str(path.with_suffix(".log")), "left_over": left_over(folder)})
    return sorted(found, key=lambda status: (not status["left_over"], status["started"]))


def as_line(status: dict[str, Any], width: int) -> str:
    """One stage of `align status`, its name in a column of `width`."""
    line = f"{status['name']:<{width}}  {status['state']:<12}"
    seen, running = status.get("bar"), status["state"] == "running"
    if status["state"] == "done":
        line += f" {duration(status['seconds'])}  {status['reference']}"
    elif status["state"] == "failed":
        line += f" {' '.join(status['error'].removeprefix(status['name'] + ': ').split())}"
    elif seen and seen["total"]:
        line += f" {seen['n']}/{seen['total']} {seen['unit']}s"
        if running:
            left = f", {duration(seen['seconds_left'])} left" if seen["seconds_left"] is not None else ""
            line += f"{left}  {seen['shown']}"
    if running:
        line += f"  {status['memory_gb']:.1f} GB  for {duration(time.time() - status['started'])}"
    return line + ("  (left over: not of the recipe that ran last)" if status["left_over"] else "")
