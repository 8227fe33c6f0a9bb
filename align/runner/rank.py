"""One of a stage's processes, as ``accelerate launch`` starts it: ``python -m align.runner.rank TASK.json OUTCOME.json``."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from align.errors import AlignError
from align.progress import Status, report_progress
from align.runner.launch import is_main_process
from align.runner.stop import Stopped, listen
from align.runner.worker import attempt, read_task
from align.runner.zygote import die_with_parent


def main(task_file: str, outcome_file: str) -> int:
    die_with_parent(signal.SIGKILL, os.getppid())
    listen()
    task = read_task(task_file)
    if is_main_process():
        report_progress(Status(Path(task.status), name=task.name, state="running", folder=task.draft["path"]))
    else:
        sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the first process says it all
    try:
        outcome: dict[str, Any] = {"metrics": attempt(task.stage(), task.name, Path(task.draft["path"]))}
    except Stopped:
        return 130
    except AlignError as error:
        outcome = {"mistake": str(error)}
    except Exception:
        traceback.print_exc(file=sys.__stderr__)
        raise
    if os.environ.get("LOCAL_RANK", "0") == "0" or "mistake" in outcome:  # each machine's first tells its own runner
        Path(outcome_file).write_text(json.dumps(outcome), encoding="utf-8")
    _leave()
    return 0


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
