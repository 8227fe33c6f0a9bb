"""A stage that does what a test of the runner tells it to."""

from __future__ import annotations

import os
import signal
import sys
import time
import urllib.error
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from align.errors import AlignError, StageFailed, told_of
from align.progress import bar
from align.runner.stop import saving_first, stop_requested
from align.stages.base import Context, DataRefs, ModelRef, Stage, stage
from align.stages.fields import Launch


@stage("act")
class Act(Stage):
    """Does one thing."""

    does: Literal["write", "mistake", "crash", "die", "die_once", "flaky", "unreached", "meet", "fill", "hang", "ended", "save"] = (
        "write"
    )
    """What."""
    text: str = ""
    """What to write."""
    where: str = ""
    """A folder that stages meet in."""
    models: dict[str, ModelRef] = Field(default_factory=dict)
    """Parents by name."""
    model: ModelRef | None = None
    """A parent."""
    data: DataRefs | None = None
    """Files."""
    seed: int = 0
    """A seed."""
    launch: Launch | None = None
    """Processes."""

    def run(self, context: Context) -> dict[str, Any]:
        print(f"{context.name} prints")
        (context.folder / "text.txt").write_text(self.text)
        first = not (Path(self.where) / "tried").exists()
        if self.does in ("die_once", "flaky"):
            (Path(self.where) / "tried").touch()
        if self.does == "mistake":
            raise AlignError("row 3 is\nno row")
        if self.does == "ended":  # as where a process of its launch was killed
            raise StageFailed("one of its processes ended")
        if self.does == "crash":
            raise RuntimeError("a bug")
        if self.does == "flaky" and first:
            raise ConnectionError("the server is busy")
        if self.does == "unreached" and (first or self.text == "down"):
            (Path(self.where) / "tried").touch()
            with told_of("judge"):
                raise AlignError("no server answers") from urllib.error.URLError(ConnectionRefusedError("refused"))
        if self.does == "die" or (self.does == "die_once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.does == "fill":
            with (context.folder / "large").open("wb") as file:
                while True:
                    file.write(bytes(2**20))
        if self.does in ("meet", "hang"):
            (Path(self.where) / context.name).touch()
            with bar(context.name, 10) as progress:
                progress.update(3)
                progress.refresh()
                deadline = time.monotonic() + 60
                while len(list(Path(self.where).iterdir())) < 2 or self.does == "hang":
                    time.sleep(0.02)
                    assert time.monotonic() < deadline, "nobody came"
        if self.does == "save":
            with saving_first():
                (Path(self.where) / "begun").touch()
                while not stop_requested():
                    time.sleep(0.02)
                time.sleep(0.3)  # a checkpoint takes its time
                (Path(self.where) / "saved").touch()
        threads = len(list(Path("/proc/self/task").iterdir())) if Path("/proc/self/task").exists() else 1
        torch = sys.modules.get("torch")
        met = torch is not None and torch.distributed.is_initialized()
        seen = {"pid": os.getpid(), "parent": os.getppid(), "torch": torch is not None, "threads": threads, "met": met}
        seen["share"] = torch.get_num_threads() if torch is not None else 0
        return {**seen, "patience": int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 0))}
