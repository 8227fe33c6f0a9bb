"""Stages in one of several processes, each cut after step 2 and gone on with: ``accelerate launch … launched.py TASKS.json``."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState

from align.runner.rank import leave
from align.runner.worker import attempt
from align.stages import stages

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

from launch import cut_back


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
