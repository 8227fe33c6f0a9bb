"""One side alone in a process of its own: peak memory, losses and time. ``python -m benchmarks.probe JOB SIDE RESULT``."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from align.allocator import keep_memory, large_pages
from align.errors import AlignError
from benchmarks.training import Outcome
from benchmarks.work import Job

ROOT = Path(__file__).parents[1]
MB = 2**20


@dataclass(frozen=True)
class Probe:
    """What `probe` found."""

    peak_mb: float
    """Largest resident memory of the process, in 2^20 bytes."""
    outcome: Outcome


def probe(job: Job, side: str, folder: Path) -> Probe:
    """Run `job` on `side` (``ours`` or ``theirs``) in a fresh process.

    Raises:
        AlignError: the process failed.
    """
    work, result = folder / "job.json", folder / "result.json"
    job.write(work)
    command = [sys.executable, "-m", "benchmarks.probe", str(work), side, str(result)]
    environment = {**os.environ, **(large_pages() if side == "ours" else {})}  # as the runner starts stages
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AlignError(f"{job.method}, {side}: the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    found = json.loads(result.read_text())
    return Probe(found["peak_mb"], Outcome(found["seconds"], found["log"]))


def train(job: Job, side: str) -> Outcome:
    """Run `job` on `side` in this process. TRL is imported only where it runs."""
    return import_module(f"benchmarks.{side}").train(job)


def peak_mb() -> float:
    """Largest resident memory of this process so far.

    Linux hands a new process the peak of the one that started it (`ru_maxrss` outlives exec), so its own mark is read.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MB if sys.platform == "darwin" else 1024)


def main(work: str, side: str, result: str) -> None:
    if side == "ours":
        keep_memory()  # as in a stage's process
    outcome = train(Job.read(Path(work)), side)
    Path(result).write_text(json.dumps({"peak_mb": peak_mb(), "seconds": outcome.seconds, "log": outcome.log}))


if __name__ == "__main__":
    main(*sys.argv[1:])
