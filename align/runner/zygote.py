"""A process that has imported what stages need, has started no thread, and forks a process for each stage.

A fresh Python takes seconds to import torch and transformers; a fork of one that has takes milliseconds, and gives its memory back
when it ends. The runner itself is no good for that: it may run in a notebook that has used torch, and a fork of threads hangs.

    runner ── one line of JSON a task ──► zygote ── fork ──► stage
           ◄── {"id", "pid"}, {"id", "exit"} ──

When the runner dies, its end of the pipe closes, and the zygote ends; when the zygote dies, so do the stages (on Linux).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

from align.allocator import large_pages

PRELOAD = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "align.stages.training",
    "align.evaluation",
    "align.trainers.ppo",
)
PR_SET_PDEATHSIG = 1


class Zygote:
    """The runner's side."""

    def __init__(self) -> None:
        # Thread pools of numpy and pyarrow would be there before the first fork; the order of a set must not depend on the process.
        settings = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false", "PYTHONHASHSEED": "0"}
        settings |= large_pages()
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from align.runner.zygote import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **settings, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the runner, which passes it on
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._rest = b""
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def submit(self, number: int, task: dict[str, Any], environment: dict[str, str], threads: int | None) -> None:
        """Start a stage; what becomes of it comes out of `events`."""
        request = {"id": number, "task": task, "cwd": os.getcwd(), "path": sys.path, "environment": environment, "threads": threads}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed, which is told where `alive` is asked
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()

    def events(self, wait: float) -> list[dict[str, Any]]:
        """What happened within `wait` seconds: ``{"id", "pid"}`` for a start, ``{"id", "exit"}`` for an end (as `os.waitpid`)."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], wait)
        if ready:
            self._rest += os.read(self._process.stdout.fileno(), 2**16)
        *lines, self._rest = self._rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self) -> None:
        """End it, and with it every stage that still runs."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # of a request that nobody reads any more
                self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        atexit.unregister(self.close)


def serve() -> None:
    """The zygote: fork a child for each line of standard input, and say when one ends."""
    requests, answers = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    die_with_parent(signal.SIGKILL, os.getppid())
    awake, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(awake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as of a shutdown, to all processes at once: the stages save first
    # Garbage is not looked for while modules are imported, which makes little, nor in them: stages do so at the end of each run.
    gc.disable()
    for module in PRELOAD:
        __import__(module)
    gc.freeze()
    gc.enable()
    children: dict[int, int] = {}
    rest = b""
    while True:
        ready, _, _ = select.select([requests, awake], [], [])
        if awake in ready:
            os.read(awake, 2**10)
            while children and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _answer(answers, {"id": children.pop(ended[0]), "exit": ended[1]})
        if requests in ready:
            data = os.read(requests, 2**16)
            if not data:
                for pid in children:
                    os.killpg(pid, signal.SIGKILL)
                os._exit(0)  # nothing is to be cleaned up, and the runner waits: Python takes seconds to take torch down
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                request = json.loads(line)
                zygote, pid = os.getpid(), os.fork()
                if pid == 0:
                    for descriptor in (requests, answers, awake, wake):
                        os.close(descriptor)
                    _become(request, zygote)
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.setpgid(pid, pid)  # the child does the same: whoever comes first
                children[pid] = request["id"]
                _answer(answers, {"id": request["id"], "pid": pid})


def _answer(answers: int, event: dict[str, Any]) -> None:
    os.write(answers, json.dumps(event).encode() + b"\n")


def _become(request: dict[str, Any], zygote: int) -> None:
    """The child: its own group, its log as output, the stage, and nothing of the zygote's after it."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.setpgid(0, 0)
        die_with_parent(signal.SIGKILL, zygote)
        log = Path(request["task"]["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.path[:] = request["path"]
        if request["threads"]:
            import torch

            torch.set_num_threads(request["threads"])
            os.environ.setdefault("OMP_NUM_THREADS", str(request["threads"]))  # of the processes of a launch
        from align.runner.worker import Task, main

        code = main(Task(**request["task"]))
        atexit._run_exitfuncs()  # trackers end their runs there
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def die_with_parent(number: int, parent: int) -> None:
    """Have the kernel send `number` to this process when `parent` ends (Linux only)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
