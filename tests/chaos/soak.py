"""Many tiny stages in one run: nothing may pile up.

    python tests/chaos/soak.py --stages 500 --jobs 20

A chain of stages, then some that run side by side, by one runner. Afterwards there must be no process, file handle, lock or
temporary file more than before, and the memory of the runner and of the process that forks must not have grown with the stages.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]

from outcome import leftovers, processes  # noqa: E402
from runner_stages import Act  # noqa: E402

from align.pipeline import Options, Run  # noqa: E402
from align.recipe import Recipe  # noqa: E402
from align.runner import execute  # noqa: E402

MOST_GROWTH = 20.0  # MB that the memory of a process may wander by


def memory(pid: int) -> float:
    """Resident memory in MB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def handles(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def state(home: Path) -> dict[str, float]:
    """What must not grow."""
    gc.collect()
    zygote = execute._zygote()._process.pid
    return {
        "processes": len(processes(home)),
        "runner's handles": handles(os.getpid()),
        "zygote's handles": handles(zygote),
        "runner's MB": memory(os.getpid()),
        "zygote's MB": memory(zygote),
        "temporary files": len(list(Path(tempfile.gettempdir()).iterdir())),
    }


def soak(stages: int, jobs: int, work: Path) -> None:
    """Raises AssertionError where something grew."""
    temporary = work / "scratch"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    os.environ.update(ALIGN_HOME=str(work), ALIGN_IN_PROCESS="0", TMPDIR=str(temporary))
    Run(Recipe("warm", {"a": Act()}), work / "warm").execute()
    before, start = state(work), time.monotonic()
    chain = {"s0": Act()} | {f"s{i}": Act(model=f"s{i - 1}", text=str(i)) for i in range(1, stages)}
    Run(Recipe("chain", chain), work / "chain").execute()
    middle = time.monotonic()
    Run(Recipe("wide", {f"w{i}": Act(text=f"w{i}") for i in range(jobs)}), work / "wide", options=Options(jobs=jobs)).execute()
    after = state(work)
    print(f"{stages} in a row: {(middle - start) / stages:.2f} s a stage; {jobs} side by side: {time.monotonic() - middle:.1f} s")
    for name, value in after.items():
        print(f"{name:<18} {before[name]:8.1f} -> {value:8.1f}")
        assert value <= before[name] + (MOST_GROWTH if name.endswith("MB") else 0), f"{name} grew"
    left = leftovers(work)
    assert not left, left
    assert len(list((work / "registry").iterdir())) == stages + jobs + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=20)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="align-soak-"))
    try:
        soak(options.stages, options.jobs, work)
    finally:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
