"""Several processes for one stage: the command line of ``accelerate launch``, and the batch script for Slurm."""

from __future__ import annotations

import errno
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.allocator import large_pages
from align.errors import AlignError, StageFailed
from align.runner.stop import Stopped, saving_first, stop_requested
from align.runner.zygote import die_with_parent
from align.stages.base import Stage
from align.stages.fields import Launch

RANK, MACHINE, PARENT = "RANK", "ALIGN_MACHINE_RANK", "ALIGN_PARENT"
MISTAKE = "mistake-"
"""Beside the outcome, with its number behind: what a process of the stage found wrong; empty where the disk is full, and has no
room to tell.
"""
PATIENCE = 5.0
"""Seconds that the others have to meet a mistake that one process met. They may wait for that one for ever, and are ended then."""
MARGIN = 10
"""Seconds that the launcher gives its processes beyond those that the runner gives the stage."""


def launched(stage: Stage) -> bool:
    """Whether the stage runs in processes of its own launch."""
    return getattr(stage, "launch", None) is not None


def machines(stage: Stage) -> int:
    """On how many machines the stage runs."""
    return launch.num_machines if (launch := getattr(stage, "launch", None)) is not None else 1


def refuse_uneven(name: str, stage: Stage) -> None:
    """Raise `AlignError` where the processes of the launch of the stage `name` do not spread evenly over its machines."""
    launch = getattr(stage, "launch", None)
    if launch is not None and launch.num_processes % launch.num_machines:
        spread = f"{launch.num_processes} processes do not spread evenly over {launch.num_machines} machines"
        raise AlignError(f"{name}: launch: {spread}")


def is_main_process() -> bool:
    """Whether this is the only process of a stage, or the first of several."""
    return int(os.environ.get(RANK, 0)) == 0


def machine_rank() -> int:
    """This machine's number, where several work on one run: set by hand, or by Slurm."""
    return int(os.environ.get(MACHINE, os.environ.get("SLURM_NODEID", 0)))


def is_first_machine() -> bool:
    """Whether this is the only machine of a run, or the one that registers what comes out."""
    return machine_rank() == 0


def end_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone; those that it starts itself are told its number."""
    # The parent is named by itself: it may have ended before this line, and this process be somebody else's by now.
    die_with_parent(signal.SIGKILL, int(os.environ.get(PARENT, os.getppid())))
    os.environ[PARENT] = str(os.getpid())


def port_of(identity: str) -> int:
    """The same on every machine, and for each of the stages that run at a time most likely another."""
    return 20000 + int(identity, 16) % 10000


def command(launch: Launch, script: Sequence[str], folder: str | None = None, identity: str = "0") -> list[str]:
    """``accelerate launch`` with every choice spelled out: the user's configuration file of accelerate's changes nothing. A whole
    replica that is alone needs no launcher.

    Args:
        folder: for torchrun's logs, of which we ask for none; without it torchrun makes one in /tmp, and leaves it there.
        identity: the stage's, in hexadecimal. It gives the port that several machines meet at, where the launch names none.
    """
    if launch.num_processes == 1 and launch.strategy == "ddp":
        return [sys.executable, *script]
    words = [sys.executable, "-m", "align.runner.launcher", "--config_file", str(Path(__file__).with_name("accelerate.yaml"))]
    words += ["--num_processes", str(launch.num_processes), "--num_machines", str(launch.num_machines)]
    words += ["--mixed_precision", launch.mixed_precision, "--dynamo_backend", "no"]
    words += ["--num_cpu_threads_per_process", os.environ.get("OMP_NUM_THREADS", "1")]
    words += [] if folder is None else ["--log_dir", folder]
    if launch.num_machines > 1:
        ip = launch.main_process_ip or os.environ.get("ALIGN_MAIN_IP")
        if ip is None:
            raise AlignError("launch: several machines need main_process_ip (or ALIGN_MAIN_IP): the address of machine 0")
        words += ["--machine_rank", str(machine_rank()), "--main_process_ip", ip]
        words += ["--main_process_port", str(launch.main_process_port or port_of(identity)), "--rdzv_backend", "static"]
    else:
        words += ["--main_process_port", str(launch.main_process_port or 0)]
    if launch.strategy == "fsdp2":
        words += ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
        words += ["--fsdp_state_dict_type", "FULL_STATE_DICT", "--fsdp_reshard_after_forward", "true"]
        # Else a second try, when the processes have met, would load the weights in the first alone.
        words += ["--fsdp_cpu_ram_efficient_loading", "false"]
    elif launch.strategy.startswith("deepspeed"):
        words += ["--use_deepspeed", "--zero_stage", launch.strategy[-1], "--gradient_accumulation_steps", "1"]
        words += ["--zero3_save_16bit_model", "true", "--deepspeed_multinode_launcher", "standard"]
    else:
        words += ["--multi_gpu"]  # accelerate's name for torchrun; without a GPU the processes meet over gloo
    return [*words, *script]


def run_launched(task: Any, stage: Stage) -> dict[str, Any]:
    """Run the stage in processes of its own; returns the metrics that the first of them leaves.

    Raises:
        AlignError: what the stage found wrong; OSError: the disk is full; StageFailed: a process died.
    """
    launch = getattr(stage, "launch", None) or Launch()
    with _fresh(Path(task.log).with_suffix(".launch")) as folder:
        task_file, outcome = folder / "task.json", folder / "outcome.json"
        task_file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        words = command(launch, ["-m", "align.runner.rank", str(task_file), str(outcome)], str(folder), task.draft["identity"])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        environment |= {PARENT: str(os.getpid()), "ACCELERATE_MIXED_PRECISION": launch.mixed_precision, **large_pages()}
        environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(min(task.grace, 1e6)) + MARGIN)
        if launch.cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        process, deadline = subprocess.Popen(words, env=environment), math.inf
        with saving_first():
            while process.poll() is None:
                try:
                    process.wait(0.2)
                except subprocess.TimeoutExpired:
                    if any(folder.glob(f"{MISTAKE}*")):
                        deadline = min(deadline, time.monotonic() + PATIENCE)
                    if stop_requested() or time.monotonic() > deadline:
                        # A killed launcher says nothing, and on Linux its processes end with it: there is nothing to save.
                        kill = sys.platform == "linux" and not stop_requested()
                        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
                        process.wait()
        if stop_requested():
            raise Stopped
        for mistake in sorted(folder.glob(f"{MISTAKE}*")):
            if not (said := mistake.read_text(encoding="utf-8")):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise AlignError(said)
        if outcome.is_file() and process.returncode == 0:
            return json.loads(outcome.read_text(encoding="utf-8"))
    raise StageFailed(f"a process of its launch ended with code {process.returncode}")


@contextmanager
def _fresh(folder: Path) -> Iterator[Path]:
    """An empty `folder`, which is taken away at the end. What a killed process left in it goes first: therefore it lies beside
    the stage's log, and not where the system keeps temporary files.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def slurm_script(
    command: Sequence[str], *, nodes: int, gpus: int, cpus: int, hours: float, partition: str | None, name: str
) -> str:
    """A batch script that runs `command` on each of `nodes`, is requeued when it is preempted or out of time, and then goes on."""
    minutes = max(1, round(hours * 60))  # to Slurm, none is no limit
    options = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": gpus,
        "cpus-per-task": cpus * gpus,
        "time": f"{minutes // 60}:{minutes % 60:02d}:00",
        "output": f"{name}-%j.log",
        "open-mode": "append",
        "signal": "B:TERM@120",
    }
    if partition is not None:
        options["partition"] = partition
    header = "\n".join(f"#SBATCH --{key}={value}" for key, value in options.items())
    return f"""#!/bin/bash
{header}
#SBATCH --requeue
set -u
export ALIGN_MAIN_IP=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Two minutes before the time is up, or when the job is preempted: let the stages save, and queue up again.
stop() {{
    kill -TERM "$work"
    wait "$work"
    again
}}
again() {{
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}
trap stop TERM
srun --kill-on-bad-exit=1 --cpus-per-task={cpus * gpus} {shlex.join(command)} &
work=$!
wait "$work"
code=$?
# Slurm may have told the command alone, which ends with 130 when it has saved.
[ "$code" -eq 130 ] && again
exit "$code"
"""
