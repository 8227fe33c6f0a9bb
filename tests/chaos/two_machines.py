"""Two network namespaces as two machines: a run over both, one of them killed, and the same commands again.

    python tests/chaos/two_machines.py

Needs root and ``ip netns``. Each "machine" has an address of its own on a virtual cable and shares the disk, as `docs/scaling.md`
says. The recipe is that of `quick.py`; its SFT stage has one process on each machine. When it has saved its first checkpoint, every
process of machine 1 is killed; both commands must end, and, started again, finish from that checkpoint with the losses and
weights of one process on one machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from align.runner.checkpoints import step_of  # noqa: E402

RECIPE = ROOT / "tests" / "chaos" / "quick.py"
ADDRESSES = ("10.213.77.1", "10.213.77.2")
CLOSE = 1e-4
"""Largest relative difference of a loss to that of one process."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def permitted() -> bool:
    """Whether this process may make network namespaces."""
    try:
        with machines():
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def machines() -> Iterator[list[str]]:
    """Two namespaces, joined by a cable; gone afterwards, with all that runs in them."""
    names = [f"align-{os.getpid()}-{number}" for number in range(2)]
    ends = [f"al{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", "name", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            for device in ("lo", end):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            kill(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def processes(name: str) -> list[int]:
    """All processes of a machine."""
    found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def kill(name: str) -> None:
    for pid in processes(name):
        os.kill(pid, signal.SIGKILL)


def start(folder: Path, steps: int, rank: int | None = None, name: str = "", inside: bool = False) -> subprocess.Popen[bytes]:
    """The run's command, on the machine `rank` in the namespace `name`, or in one process on this one. `inside`: without processes
    for its stages, but for those of a launch.
    """
    words = [sys.executable, "-m", "align.cli", "run", str(RECIPE), "--out", str(folder / "run")]
    environment = {**os.environ, "ALIGN_HOME": str(folder), "ALIGN_QUICK_STEPS": str(steps), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ALIGN_IN_PROCESS": str(int(inside or rank is None))}
    settings = {"sft.per_device_train_batch_size": 8}
    if rank is not None:
        end = f"al{os.getpid()}{'ab'[rank]}"
        environment |= {"ALIGN_MACHINE_RANK": str(rank), "GLOO_SOCKET_IFNAME": end}
        settings = {"sft.per_device_train_batch_size": 4, "sft.launch.num_processes": 2, "sft.launch.num_machines": 2}
        settings |= {"sft.launch.main_process_ip": ADDRESSES[0]}
        words = ["ip", "netns", "exec", name, *words]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"terminal-{rank}.log").open("ab") as log:
        return subprocess.Popen(words, env=environment, stdout=log, stderr=log)


def losses(folder: Path) -> list[float]:
    (file,) = folder.glob("run/sft-*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [record[name] for record in records for name in ("loss", "eval_loss") if name in record]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest sealed checkpoint of the stage that both machines run."""
    sealed = folder.glob("run/sft-*/checkpoints/checkpoint-*/checksums.json")
    return max((seal.parent for seal in sealed), key=step_of, default=None)


def check(work: Path, steps: int, wait: float = 300.0) -> float:
    """Returns the largest relative difference of a loss; raises AssertionError where something went otherwise."""
    alone = start(work / "alone", steps)
    together = work / "together"
    with machines() as names:
        # Of machine 1 everything is killed, whatever it was made of.
        both = [start(together, steps, rank, name, inside=rank == 1) for rank, name in enumerate(names)]
        deadline = time.monotonic() + wait
        while newest_checkpoint(together) is None:
            assert all(process.poll() is None for process in both), tails(together)
            assert time.monotonic() < deadline, tails(together)
            time.sleep(0.01)
        kill(names[1])
        codes = [process.wait(wait) for process in both]
        assert all(codes), f"a run that lost a machine ended with the codes {codes}"
        saved = newest_checkpoint(together)
        assert saved is not None
        assert not list(together.glob("run/sft-*/artifact.json")), "it was killed too late: take more steps"
        assert not processes(names[0]), "machine 0 did not end what it began"
        both = [start(together, steps, rank, name) for rank, name in enumerate(names)]
        codes = [process.wait(wait) for process in both]
        assert codes == [0, 0], tails(together)
    assert alone.wait(wait) == 0, tails(work / "alone")
    assert f"sft: going on from step {step_of(saved)}" in tails(together, 10**6)
    pairs = list(zip(losses(work / "alone"), losses(together), strict=True))
    assert len(pairs) > steps // 3
    return max(abs(ours - theirs) / abs(ours) for ours, theirs in pairs)


def tails(folder: Path, characters: int = 2000) -> str:
    """The end of everything that was said."""
    logs = [*folder.glob("terminal-*.log"), *folder.glob("run/logs/*.log")]
    return "\n".join(f"{path}:\n{path.read_text(errors='replace')[-characters:]}" for path in logs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    begun, work = time.monotonic(), Path(tempfile.mkdtemp(prefix="align-machines-"))
    try:
        worst = check(work, options.steps)
    finally:
        shutil.rmtree(work)
    print(f"machine 1 was killed, and the run went on: losses within {worst:.1e} of one process; {time.monotonic() - begun:.0f} s")
    return 0 if worst <= CLOSE else 1


if __name__ == "__main__":
    raise SystemExit(main())
