"""Stages in one of several processes, one after the other: ``accelerate launch … launched.py TASKS.json``.

torchrun forks the processes from one that has imported what stages need, instead of starting an interpreter for each.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

from align.runner.launch import command
from align.runner.worker import attempt
from align.stages import stages
from align.stages.fields import Launch

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

from launch import cut_back

LAUNCHER = """
import gc
gc.disable()  # nothing of what is imported is garbage
import launched, align.stages.training, align.evaluation
gc.freeze()
gc.enable()
from accelerate.commands.launch import main
main()
"""


def run_on_two(tasks, strategy, folder, cut=None):
    """Run `tasks`, of (stage, its fields, its folder), on two processes; returns the metrics of each. Those that are cut after step
    `cut` are gone on with. `folder` is for what it takes to tell the processes.
    """
    for _, _, made in tasks:
        Path(made).mkdir(exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps({"tasks": tasks, "cut": cut}))
    launch_two([__file__, str(folder / "tasks.json")], folder, strategy)
    return json.loads((folder / "metrics.json").read_text())


def launch_two(script, folder, strategy="ddp"):
    """Run `script`, a file and its arguments, in two processes."""
    words = command(Launch(num_processes=2, strategy=strategy), script, str(folder))
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    forking = {"PYTHONPATH": paths, "PET_START_METHOD": "fork", "PET_RUN_PATH": "1"}
    words = [sys.executable, "-c", LAUNCHER, *words[3:]]
    done = subprocess.run(words, env={**os.environ, **forking}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def main(file: str) -> None:
    """`file` is the JSON that `run_on_two` writes; the metrics go into one beside it."""
    told, metrics = json.loads(Path(file).read_text()), []
    for number, (name, fields, folder) in enumerate(told["tasks"]):
        metrics.append(run(stages[name].model_validate(fields), Path(folder)))
        if number == 0:  # all is imported: the Trainer's look for garbage at its every end passes over it
            gc.freeze()
        if told["cut"] is not None:
            if torch.distributed.get_rank() == 0:
                cut_back(Path(folder), told["cut"])
            PartialState().wait_for_everyone()
            metrics[-1] = run(stages[name].model_validate(fields), Path(folder))
    if torch.distributed.get_rank() == 0:
        Path(file).with_name("metrics.json").write_text(json.dumps(metrics))


def run(stage, folder):
    """The stage's metrics; all processes end it together, and accelerate forgets it."""
    metrics = attempt(stage, "x", folder)
    PartialState().wait_for_everyone()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    return metrics


if __name__ == "__main__":
    main(sys.argv[1])
