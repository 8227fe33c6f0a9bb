"""Stages in one of several processes, each cut after step 2 and gone on with: ``accelerate launch … launched.py TASKS.json``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

from align.runner.launch import command
from align.runner.rank import leave
from align.runner.worker import attempt
from align.stages import stages
from align.stages.fields import Launch

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

from launch import cut_back


def run_on_two(tasks, strategy, folder):
    """Run `tasks`, of (stage, its fields, its folder), on two processes; `folder` is for what it takes to tell them."""
    (folder / "tasks.json").write_text(json.dumps(tasks))
    words = command(Launch(num_processes=2, strategy=strategy), [__file__, str(folder / "tasks.json")], str(folder))
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def main(tasks: str) -> None:
    """`tasks` is a JSON file of (stage, its fields, its folder)."""
    for name, fields, folder in json.loads(Path(tasks).read_text()):
        for again in (True, False):
            attempt(stages[name].model_validate(fields), "x", Path(folder))
            PartialState().wait_for_everyone()
            if again and torch.distributed.get_rank() == 0:
                cut_back(Path(folder), 2)
            PartialState().wait_for_everyone()
            AcceleratorState._reset_state()
            GradientState._reset_state()


if __name__ == "__main__":
    main(sys.argv[1])
    leave(0)
