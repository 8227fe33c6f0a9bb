"""Kills a pipeline at random moments and checks that it ends as one that was never interrupted.

    python tests/chaos/kill.py --kills 200 --seed 0

The pipeline is the demo with every stage shrunk to seconds. It is run once without disturbance; then again and again, and each time
something is killed every few seconds, and started again with the same command, until it is done: the runner, the stage at work, the
process that forks stages, or everything at once, by SIGKILL; or the runner is told to end by SIGTERM. Four times in five the clock
starts with a stage, else with Python, whose imports would get most of the kills. Then every weight, metric, report and registry
entry is compared with the first run's, and there must be no process, lock or temporary file left.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from outcome import differences, leftovers, outcome, processes

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"runner": 12, "stage": 8, "zygote": 4, "everything": 12, "SIGTERM": 8, "second run": 1}
GRACE = 60.0


class Pipeline:
    """One output folder, and the command that works on it."""

    def __init__(self, folder: Path, recipe: str, assignments: list[str]) -> None:
        self.home, self.out = folder / "home", folder / "home" / "run"
        changes = [word for assignment in assignments for word in ("--set", assignment)]
        self.command = [sys.executable, "-m", "align.cli", "run", recipe, "--out", str(self.out), *changes]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "ALIGN_HOME": str(self.home), "ALIGN_IN_PROCESS": "0", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.out.mkdir(parents=True, exist_ok=True)
        log = (self.home / "terminal.log").open("ab")
        with log:
            return subprocess.Popen(self.command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def at_work(self) -> str:
        """The stage that runs now, as its status file says."""
        for path in (self.out / "logs").glob("*.json"):
            try:
                status = json.loads(path.read_text())
            except (OSError, ValueError):
                continue
            if status["state"] == "running" and Path(f"/proc/{status['pid']}").exists():
                return status["name"]
        return "between"

    def wait_for_work(self, process: subprocess.Popen[bytes]) -> None:
        """Until a stage runs, or the runner has ended."""
        while process.poll() is None and self.at_work() == "between":
            time.sleep(0.02)

    def strike(self, process: subprocess.Popen[bytes], target: str) -> None:
        """Kill `target`; afterwards nothing of the run lives, but for a runner whose stage alone was killed. Or start a second run
        on the same folder, and see both to their end.
        """
        if target == "second run":
            assert self.start().wait() == 0
            return
        if target in ("stage", "zygote"):
            below = [pid for pid in processes(self.home) if pid != process.pid]
            parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in below}
            zygotes = [pid for pid in below if parents[pid] == process.pid]
            stages = [pid for pid in below if parents[pid] in zygotes]
            for pid in stages if target == "stage" else zygotes:
                os.kill(pid, signal.SIGKILL)
            return
        if target == "SIGTERM":
            process.terminate()
            process.wait(GRACE + 10)
        else:
            for pid in processes(self.home) if target == "everything" else [process.pid]:
                os.kill(pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 5
        while left := processes(self.home):
            assert time.monotonic() < deadline, f"processes {left} outlive the runner"
            time.sleep(0.05)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, metavar="SECONDS", help="longest time to a kill (an eighth of an undisturbed run)")
    parser.add_argument("--recipe", default="tests/chaos/small.py")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="stop, and report, after so long")
    options = parser.parse_args(arguments)
    draw, begun = random.Random(options.seed), time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="align-kill-"))
    first = Pipeline(work / "undisturbed", options.recipe, options.assignments)
    assert first.start().wait() == 0, (first.home / "terminal.log").read_text()[-3000:]
    expected = outcome(first.out, first.home)
    every = options.every or (time.monotonic() - begun) / 8
    print(f"undisturbed: {time.monotonic() - begun:.0f} s, {len(expected)} files and entries to compare", flush=True)

    struck: Counter[tuple[str, str]] = Counter()
    rounds = 0

    def enough() -> bool:
        late = options.minutes is not None and time.monotonic() - begun > 60 * options.minutes
        return late or struck.total() >= options.kills

    while not enough():
        rounds += 1
        pipeline = Pipeline(work / f"round-{rounds}", options.recipe, options.assignments)
        process = pipeline.start()
        while True:
            try:
                if not enough() and draw.random() < 0.8:
                    pipeline.wait_for_work(process)
                code = process.wait(None if enough() else draw.uniform(0, every))
                if code == 0:
                    break
                process = pipeline.start()  # the zygote was killed, or one stage too often: the same command goes on
            except subprocess.TimeoutExpired:
                target = draw.choices(list(TARGETS), list(TARGETS.values()))[0]
                struck[target, pipeline.at_work()] += 1
                pipeline.strike(process, target)
                if target not in ("stage", "zygote", "second run"):
                    process = pipeline.start()
        wrong = differences(expected, outcome(pipeline.out, pipeline.home))
        left = leftovers(pipeline.home)
        print(f"round {rounds}: {struck.total()} kills so far, {len(wrong)} differences, {len(left)} leftovers", flush=True)
        if wrong or left:
            print("\n".join([f"differs: {name}" for name in wrong] + [f"left: {name}" for name in left]))
            print(f"see {pipeline.home}")
            return 1
        shutil.rmtree(pipeline.home)
    for column, name in ((0, "killed"), (1, "while")):
        counts = Counter[str]()
        for key, number in struck.items():
            counts[key[column]] += number
        print(f"{name}: {', '.join(f'{key} {number}' for key, number in counts.most_common())}")
    print(f"{struck.total()} kills in {rounds} rounds, {(time.monotonic() - begun) / 60:.0f} minutes: every round as undisturbed")
    shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
