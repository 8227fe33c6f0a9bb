"""What a person sees while work goes on, and the history that is written: ``metrics.jsonl`` first, trackers optional."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tqdm.auto import tqdm

from align.runner.files import json_lines, write_atomically

SHOWN = ("loss", "eval_loss", "rewards/accuracies", "accuracy", "objective/scores", "reward", "objective/kl", "mean_token_accuracy")
"""Metrics worth a place beside the progress bar."""

OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn round the order in which letters are shown, of what stands behind them, too."""
STEERING = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f{OVERRIDES}]")


def harmless(text: str) -> str:
    """`text` with control characters, by which a model could steer the terminal, and `OVERRIDES` as their escapes."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def say(line: str) -> None:
    """One line for the person at the terminal, on stderr, without tearing a progress bar; lost where the terminal is gone."""
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        leave_terminal()  # it was closed, and the run goes on (`nohup`)


def say_once(about: Any, line: str) -> None:
    """`say`, unless that was said of `about` before."""
    said = _SAID.setdefault(about, set())
    if line not in said:
        said.add(line)
        say(line)


_SAID: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def leave_terminal() -> None:
    """Let what is still to be said go nowhere, where the terminal is gone: a write would fail, and end what is being saved."""
    for output in (1, 2):
        try:
            os.write(output, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)


class Status:
    """What a stage is doing, for whoever watches it: a small JSON file, always replaced as a whole."""

    def __init__(self, path: Path, **fields: Any) -> None:
        self.path = path
        self.fields: dict[str, Any] = {"pid": os.getpid(), "started": time.time(), **fields}
        self.update()

    def update(self, **fields: Any) -> None:
        """Change `fields`, and with them the time and the memory that was used (GB, the most so far of this process, or of one that
        it waited for, as of those of a launch).
        """
        most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        self.fields.update(fields, updated=time.time(), memory_gb=round(most / 2**20, 2))
        write_atomically(self.path, json.dumps(self.fields), durable=False)


_watched: Status | None = None
"""Where bars report to instead of drawing themselves: set in a stage's own process, whose output is a file."""


def report_progress(status: Status) -> None:
    """From now on bars in this process write to `status`."""
    global _watched
    _watched = status


class _ReportingBar(tqdm):
    """A bar that is drawn by somebody else."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        assert _watched is not None
        now = self.format_dict
        rate = now["rate"] or (now["n"] - now["initial"]) / max(now["elapsed"], 1e-9)
        left = (now["total"] - now["n"]) / rate if rate and now["total"] else None
        progress = {"label": self.desc.strip(), "n": now["n"], "total": now["total"], "unit": now["unit"], "seconds_left": left}
        _watched.update(bar={**progress, "shown": now["postfix"] or ""})


def bar(label: str, total: int | None, unit: str = "step") -> tqdm:
    """A progress bar with the time left; without a `total`, with the rate alone."""
    options: dict[str, Any] = {"total": total, "desc": f"{label:>12}", "unit": unit, "mininterval": 0.5}
    return drawn(**options) if _watched is None else _ReportingBar(file=_Nowhere(), **options)


def drawable() -> bool:
    """Whether stderr is a terminal that can draw over itself and knows its width, or a notebook."""
    terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return bool(terminal and os.get_terminal_size(sys.stderr.fileno()).columns) or "ipykernel" in sys.modules


def drawn(**options: Any) -> tqdm:
    """A bar on stderr, where that is `drawable`; elsewhere `_Lines`."""
    if drawable():
        return tqdm(file=sys.stderr, dynamic_ncols=True, **options)
    return _Lines(file=_Nowhere(), **{**options, "ncols": 0, "mininterval": SECONDS_A_LINE, "maxinterval": SECONDS_A_LINE})


SECONDS_A_LINE = 60.0
"""Between two lines of a bar where it cannot be drawn over."""


class _Lines(tqdm):
    """A bar as plain lines, one now and then and one at its end."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and self.n > self.initial:
            print(self, file=sys.stderr, flush=True)


class _Nowhere:
    """Takes what tqdm would draw."""

    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


class History:
    """The metrics of one stage, appended to a file as they come. What the file holds already belongs to a run that was cut.

    Args:
        writes: off in all processes of a stage but the first, which have the same metrics.
        watcher: called with all records after each new one.
    """

    def __init__(
        self, path: Path, *, writes: bool = True, watcher: Callable[[Sequence[dict[str, Any]]], None] | None = None
    ) -> None:
        self.path = path
        self.writes = writes
        self.watchers = [] if watcher is None else [watcher]
        path.touch()
        self.records = json_lines(path, numbers=("step", "seconds"))
        self._start = time.monotonic() - (self.records[-1]["seconds"] if self.records else 0.0)

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, because the run goes on from there."""
        self.records = [record for record in self.records if record["step"] <= step]
        if self.writes:
            write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in self.records))

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one record: the step, seconds since the start, and `metrics`."""
        record = {"step": step, "seconds": round(time.monotonic() - self._start, 3), **metrics}
        self.records.append(record)
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        for watcher in self.watchers:
            watcher(self.records)

    def last(self, name: str) -> Any:
        """The latest value of `name`, or None."""
        return next((record[name] for record in reversed(self.records) if name in record), None)


def shown(metrics: dict[str, Any]) -> str:
    """The few metrics that fit beside a progress bar."""
    return " ".join(f"{name.rsplit('/', 1)[-1]} {metrics[name]:.3f}" for name in SHOWN if name in metrics)


def duration(seconds: float) -> str:
    """``41 s``, ``6 min 38 s`` or ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60:02} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02} min"
