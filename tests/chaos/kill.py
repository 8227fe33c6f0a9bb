"""Kills a pipeline at random moments and checks that it ends as one that was never interrupted.

    python tests/chaos/kill.py --kills 200 --seed 0

The pipeline is the demo with every stage shrunk to seconds. It is run once without disturbance; then again and again, and each time
something happens every few seconds, and it is started again with the same command, until it is done. The runner, the stage at work,
the process that forks stages, or everything at once is killed by SIGKILL; the runner is told to end by SIGTERM; the newest
checkpoint of a killed run is cut in half, or one of its bits turned over; the disk (a small tmpfs, as root) is full until the run
has ended; a second run comes in between. Four times in five the clock starts with a stage, else with Python, whose imports would
get most of the kills. Then every weight, metric, report and registry entry is compared with the first run's, and there must be no
process, lock or temporary file left.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from outcome import differences, leftovers, outcome, processes

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {
    "runner": 12,
    "stage": 8,
    "zygote": 4,
    "everything": 10,
    "SIGTERM": 8,
    "second run": 1,
    "truncated checkpoint": 3,
    "flipped bit": 3,
    "full disk": 3,
}
GRACE = 60.0
DISK = 256
"""MB of the disk that may be full."""


class Pipeline:
    """One output folder, and the command that works on it; what it says goes to `log`, which must not lie on the same disk."""

    def __init__(self, home: Path, log: Path, recipe: str, assignments: list[str]) -> None:
        self.home, self.out, self.log = home, home / "run", log
        changes = [word for assignment in assignments for word in ("--set", assignment)]
        self.command = [sys.executable, "-m", "align.cli", "run", recipe, "--out", str(self.out), *changes]

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "ALIGN_HOME": str(self.home), "ALIGN_IN_PROCESS": "0", "HF_HUB_OFFLINE": "1"}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.out.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
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
        if target == "full disk":
            with self.full():
                code = process.wait()
            assert code in (0, 2), f"a full disk should be told in one line; see {self.log}"
        if target in ("stage", "zygote"):
            below = [pid for pid in processes(self.home) if pid != process.pid]
            parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in below}
            zygotes = [pid for pid in below if parents[pid] == process.pid]
            stages = [pid for pid in below if parents[pid] in zygotes]
            for pid in stages if target == "stage" else zygotes:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return
        if target == "SIGTERM":
            process.terminate()
            process.wait(GRACE + 10)
        elif target != "full disk":
            for pid in [process.pid] if target == "runner" else processes(self.home):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        deadline = time.monotonic() + 5
        while left := processes(self.home):
            assert time.monotonic() < deadline, f"processes {left} outlive the runner"
            time.sleep(0.05)
        if target in DAMAGE:
            DAMAGE[target](max(self.out.glob("*/checkpoints/checkpoint-*/*.safetensors"), key=changed, default=None))

    @contextmanager
    def full(self) -> Iterator[None]:
        """Within, the disk has no room."""
        ballast = self.home.parent / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(2**16))
        try:
            yield
        finally:
            ballast.unlink()


def changed(path: Path) -> int:
    return path.stat().st_mtime_ns


def truncate(file: Path | None) -> None:
    """What a power cut leaves."""
    if file is not None:
        os.truncate(file, file.stat().st_size // 2)


def flip(file: Path | None) -> None:
    """What a dying disk leaves."""
    if file is not None:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


DAMAGE = {"truncated checkpoint": truncate, "flipped bit": flip}


@contextmanager
def small_disk(work: Path) -> Iterator[Path | None]:
    """A tmpfs, where it may be mounted."""
    disk = work / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "align-chaos", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    longest = "longest time to a kill (an eighth of an undisturbed run, at least 8)"
    parser.add_argument("--every", type=float, metavar="SECONDS", help=longest)
    parser.add_argument("--recipe", default="tests/chaos/small.py")
    parser.add_argument("--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--minutes", type=float, help="stop, and report, after so long")
    options = parser.parse_args(arguments)
    work = Path(tempfile.mkdtemp(prefix="align-kill-"))
    with small_disk(work) as disk:
        targets = TARGETS if disk else {name: weight for name, weight in TARGETS.items() if name != "full disk"}
        code = rounds(options, work, disk or work, targets)
    if code == 0:
        shutil.rmtree(work)
    return code


def rounds(options: argparse.Namespace, work: Path, disk: Path, targets: dict[str, int]) -> int:
    """Run and kill until it is enough; 1 where a round ended otherwise than the undisturbed run."""
    draw, begun = random.Random(options.seed), time.monotonic()
    first = Pipeline(disk / "undisturbed", work / "undisturbed.log", options.recipe, options.assignments)
    assert first.start().wait() == 0, first.log.read_text()[-3000:]
    expected = outcome(first.out, first.home)
    shutil.rmtree(first.home)
    every = options.every or max((time.monotonic() - begun) / 8, 8.0)  # in less, no stage comes to its end
    print(f"undisturbed: {time.monotonic() - begun:.0f} s, {len(expected)} files and entries to compare", flush=True)

    struck: Counter[tuple[str, str]] = Counter()
    number = 0

    def enough() -> bool:
        late = options.minutes is not None and time.monotonic() - begun > 60 * options.minutes
        return late or struck.total() >= options.kills

    while not enough():
        number += 1
        pipeline = Pipeline(disk / f"round-{number}", work / f"round-{number}.log", options.recipe, options.assignments)
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
                target = draw.choices(list(targets), list(targets.values()))[0]
                struck[target, pipeline.at_work()] += 1
                pipeline.strike(process, target)
                if target not in ("stage", "zygote", "second run"):
                    process = pipeline.start()
        wrong = differences(expected, outcome(pipeline.out, pipeline.home))
        left = leftovers(pipeline.home)
        print(f"round {number}: {struck.total()} kills so far, {len(wrong)} differences, {len(left)} leftovers", flush=True)
        if wrong or left:
            print("\n".join([f"differs: {name}" for name in wrong] + [f"left: {name}" for name in left]))
            shutil.copytree(pipeline.home, work / "failed", symlinks=True)
            print(f"see {work / 'failed'} and {pipeline.log}")
            return 1
        shutil.rmtree(pipeline.home)
    for column, name in ((0, "killed"), (1, "while")):
        counts = Counter[str]()
        for key, times in struck.items():
            counts[key[column]] += times
        print(f"{name}: {', '.join(f'{key} {times}' for key, times in counts.most_common())}")
    print(f"{struck.total()} kills in {number} rounds, {(time.monotonic() - begun) / 60:.0f} minutes: every round as undisturbed")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
