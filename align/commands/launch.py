"""``align launch``: a batch script for a cluster, around any command of this program."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.runner.files import write_named
from align.runner.launch import slurm_script


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "launch", help="write a Slurm batch script that runs a command, survives preemption and goes on by itself"
    )
    parser.add_argument("--slurm", type=Path, metavar="FILE", required=True, help="where to write the script")
    parser.add_argument("--nodes", type=int, default=1, help="machines")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each node")
    parser.add_argument("--cpus", type=int, default=4, help="cores for each GPU")
    parser.add_argument("--hours", type=float, default=24.0, help="time limit; the job queues up again when it is over")
    parser.add_argument("--partition", help="Slurm's, by default its own choice")
    parser.add_argument("--name", default="align", help="of the job")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- align run RECIPE …")
    parser.set_defaults(handler=launch)


def launch(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise AlignError("align launch: say what to run: align launch --slurm job.sh -- align run RECIPE")
    if min(options.nodes, options.gpus, options.cpus) < 1 or not 0 < options.hours < math.inf:
        raise AlignError("align launch: --nodes, --gpus, --cpus and --hours must be above 0")
    names = ("nodes", "gpus", "cpus", "hours", "partition", "name")
    script = slurm_script(command, **{name: getattr(options, name) for name in names})
    write_named(options.slurm, script)
    print(f"sbatch {options.slurm}")
    return 0
