"""One of a stage's processes, as ``accelerate launch`` starts it: ``python -m align.runner.rank TASK.json OUTCOME.json``. Where it
is the only one, the stage itself starts it.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from align import processes
from align.errors import AlignError
from align.progress import Status, report_progress
from align.runner.files import disk_is_full
from align.runner.launch import MISTAKE, RANK, end_with_parent, is_main_process
from align.runner.stop import Stopped, listen
from align.runner.worker import attempt, read_task


def main(task_file: str, outcome_file: str) -> int:
    """Do this process' part of the stage; returns the exit code. The metrics are in `outcome_file`, and a mistake in a file beside
    it, which is empty where the disk is full: with an exit code of its own torchrun would tell of it in thirty lines.
    """
    end_with_parent()
    listen()
    task, mistake = read_task(task_file), Path(outcome_file).with_name(f"{MISTAKE}{os.environ.get(RANK, 0)}")
    if is_main_process():
        report_progress(Status(Path(task.status), name=task.name, state="running", folder=task.draft["path"]))
    else:
        sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process says it all
    try:
        processes.meet()
        metrics = attempt(task.stage(), task.name, Path(task.draft["path"]))
        if os.environ.get("LOCAL_RANK", "0") == "0":  # each machine's first tells its own runner
            Path(outcome_file).write_text(json.dumps(metrics), encoding="utf-8")
    except Stopped:
        return 130
    except AlignError as error:
        with suppress(OSError):  # no room for the words: the file stays empty
            mistake.write_text("" if disk_is_full(error) else str(error), encoding="utf-8")
        return 0
    except Exception as error:
        if disk_is_full(error):
            mistake.touch()
            return 0
        if any(mistake.parent.glob(f"{MISTAKE}*")):  # it failed because another left over that
            return 0
        traceback.print_exc(file=sys.__stderr__)
        return 1
    return 0


def leave(code: int) -> NoReturn:
    """End the process, and run what was registered for its end, but no destructors: that of a process group holds the interpreter's
    lock while it waits for a thread of its own, and where that thread waits for the lock, neither ever ends (torch 2.13).
    """
    import torch

    if torch.distributed.is_initialized():
        group = torch.distributed.group.WORLD  # noqa: F841 - lives as long as the process
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(*sys.argv[1:]))
