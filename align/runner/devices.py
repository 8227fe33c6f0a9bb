"""What stages run on: the GPUs there are, or shares of the CPU."""

from __future__ import annotations

import math
import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

from align.errors import AlignError
from align.runner.launch import launched
from align.runner.plan import Step
from align.stages.base import Stage


def devices(jobs: int | None) -> list[str]:
    """One entry for each stage that may run at a time: a GPU's id, or an empty string for a share of the CPU."""
    gpus = _gpus()
    if gpus:
        return gpus if jobs is None else [gpus[i % len(gpus)] for i in range(jobs)]
    return [""] * (jobs or 1)


def _gpus() -> list[str]:
    """Ids of the GPUs that may be used, without initializing CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu and gpu != "-1"]
    if not Path("/proc/driver/nvidia/gpus").is_dir():
        return []
    found = subprocess.run(
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


def take(free: list[str], step: Step, slots: int) -> list[str] | None:
    """The devices that the stage needs, at most `slots`, taken from `free`; None while too few are free."""
    launch = getattr(step.stage, "launch", None)
    wanted = 1
    if launched(step.stage) and launch is not None:
        wanted = min(launch.num_processes // launch.num_machines, slots)
    taken = (list(dict.fromkeys(free)) if any(free) else free)[:wanted]  # of a GPU that stages share a stage gets one share
    if len(taken) < wanted:
        return None
    for device in taken:
        free.remove(device)
    return taken


MOST_A_CORE = 4
"""Processes, for whoever tries out what several do; more is a slip of the pen."""


def refuse_absent(stage: Stage) -> None:
    """Raise `AlignError` where the launch is DeepSpeed's, and that is not installed."""
    strategy = getattr(getattr(stage, "launch", None), "strategy", "")
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise AlignError(f"launch.strategy {strategy} needs deepspeed: pip install deepspeed, or take fsdp2")


def refuse_crowd(stage: Stage) -> None:
    """Raise `AlignError` where `launch` asks for more processes than this machine has GPUs, or takes on its cores without one."""
    launch = getattr(stage, "launch", None)
    if launch is None:
        return
    here, gpus = math.ceil(launch.num_processes / launch.num_machines), [] if launch.cpu else _gpus()
    most = len(gpus) or MOST_A_CORE * (os.cpu_count() or 1)
    if here > most:
        each = "one a GPU" if gpus else f"{MOST_A_CORE} a core"
        raise AlignError(f"launch.num_processes: {here} are too many for this machine, which takes {most}: {each} at most")
