"""One stage in this process: locked, run, flushed, its manifest written, registered.

A stage's process gets its `Task` as JSON; nothing is pickled. What it may not do (a mistake in the input, a full disk) ends as one
line in its status file.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from align.allocator import keep_memory
from align.artifact import BEGUN, MANIFEST, Artifact, library_versions, read_artifact
from align.diagnostics.live import Watcher
from align.errors import AlignError, DiskFull, NonFiniteLoss, StageFailed
from align.progress import History, Status, report_progress, say
from align.registry import Registry
from align.runner.checkpoints import lower_learning_rate, remove_unsealed
from align.runner.files import disk_is_full, flush_tree, no_room, write_atomically
from align.runner.launch import is_first_machine, is_main_process, launched, machine_rank, machines, run_launched
from align.runner.locks import is_locked, lock
from align.runner.notes import status_of
from align.runner.plan import Step
from align.runner.stop import Stopped, listen, saving_first
from align.stages import Stage, stages
from align.stages.base import Context

PATIENCE = 60.0
"""Seconds that the other machines give the first to begin a stage again: longer than it waits before another attempt."""


@dataclass(frozen=True)
class Task:
    """A stage to run, in plain values."""

    name: str
    reason: str
    config: dict[str, Any]
    """The fields that are set, every reference resolved."""
    draft: dict[str, Any]
    """The artifact without its metrics."""
    registry: str
    log: str
    status: str
    module: str
    """Where the stage's class is defined: its module, and the file of that."""
    file: str | None
    again: bool = False
    """Run it although it is done."""
    wait: bool = True
    """Wait for another process that works in the folder, or refuse."""
    grace: float = 60.0
    """Seconds that it has to save in when it is stopped."""

    @classmethod
    def of(cls, step: Step, registry: Registry, *, wait: bool = True, grace: float = 60.0) -> Task:
        """The task that runs `step`; `wait` for another process that works in its folder, or refuse."""
        module = type(step.stage).__module__
        return cls(
            step.name,
            step.reason,
            step.stage.model_dump(mode="json", exclude_unset=True),
            asdict(step.draft),
            str(registry.root.parent.resolve()),
            str(step.log),
            str(step.status),
            module,
            getattr(sys.modules.get(module), "__file__", None),
            again=step.done is not None,
            wait=wait,
            grace=grace,
        )

    def stage(self) -> Stage:
        """The stage; its class is looked up, and its file run if it is not in the catalog yet."""
        name = self.draft["stage"]
        if name not in stages or stages[name].__module__ != self.module:
            _import(self.module, self.file)
        return stages[name].model_validate(self.config)


def _import(module: str, file: str | None) -> None:
    if module in sys.modules and module != "__main__":
        return
    try:
        found = importlib.util.find_spec(module) if module != "__main__" else None
    except (ImportError, ValueError):
        found = None
    if found is not None:
        importlib.import_module(module)
    elif file is not None:
        name = module if module != "__main__" else f"align_main_{abs(hash(file))}"
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    else:
        raise AlignError(f"the stage's class is defined in {module!r}, which has no file; put it in one, or set ALIGN_IN_PROCESS=1")


def work(task: Task, stage: Stage) -> Artifact:
    """Run the stage, unless another process has done so meanwhile, and register the result.

    Raises:
        AlignError: the stage found a mistake; nothing half-written is left but checkpoints.
    """
    draft = Artifact(**task.draft)
    folder = Path(draft.path)
    if not is_first_machine():
        before = Artifact.read(folder) if task.again else None
        if machines(stage) > 1:
            run_launched(task, stage)
        return _await(draft, before)
    with lock(folder, task.name, wait=task.wait):
        registry = Registry(Path(task.registry))
        done = read_artifact(folder)
        if done is not None and done.identity == draft.identity and not task.again:
            say(f"{task.name}: up to date ({folder})")
            return settle(done, registry)
        say(f"{task.name}: {task.reason}; writing {folder}")
        start = time.monotonic()
        metrics = _filled(task, stage, folder)
        with saving_first():
            artifact = replace(
                draft,
                metrics=metrics,
                versions=library_versions(),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(time.monotonic() - start, 1),
            )
            flush_tree(folder)
            artifact.write()
            artifact = settle(artifact, registry)
        say(f"{task.name}: done in {artifact.seconds:.0f} s, registered as {artifact.reference}")
        return artifact


def settle(artifact: Artifact, registry: Registry) -> Artifact:
    """Register a finished artifact. The manifest is there before the registry speaks of it, and once more with the version; a run
    that was cut in between is settled by the next one, as is one whose folder was moved.
    """
    if artifact.version and not registry.lost(artifact):
        return artifact
    artifact = registry.add(artifact)
    artifact.write()
    return artifact


def refuse_foreign(folder: Path) -> None:
    """Raise `AlignError` where a folder of somebody's choice holds what is no stage's."""
    if not folder.is_dir() or any((folder / name).is_file() for name in (BEGUN, MANIFEST)):
        return
    if not all(path.name.startswith(f".{BEGUN}.") for path in folder.iterdir()):  # what a cut leaves of the first file
        raise AlignError(f"{folder} is not empty and no folder of align's; choose another output_dir, or empty it")


def _await(draft: Artifact, before: Artifact | None) -> Artifact:
    """The artifact that the first machine writes on the file system that all share.

    Args:
        before: the one that it is to replace, where the stage is run again. Where none follows, that was it: same identity, same
            result.

    Raises:
        StageFailed: the stage ended there without one, and did not begin again for `PATIENCE` seconds.
    """
    folder = Path(draft.path)
    quiet_since = time.monotonic()
    while True:
        done = Artifact.read(folder)
        if done is not None and done.identity != draft.identity:
            done = None
        if done is not None and done != before:
            return done
        state = status_of(folder).get("state")
        if state is None or (state == "running" and is_locked(folder)):
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > PATIENCE:
            if done is not None:
                return done
            raise StageFailed(f"the stage in {folder} ended on machine 0 without a result; the same commands go on from there")
        time.sleep(min(1.0, PATIENCE))


def _filled(task: Task, stage: Stage, folder: Path) -> dict[str, Any]:
    """Have the stage fill its folder; returns its metrics."""
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _disk_errors(folder):
            Artifact(**task.draft).begin()
            (folder / MANIFEST).unlink(missing_ok=True)
            if task.again:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            if not (folder / "checkpoints").is_dir():  # nothing to go on from, so no history either
                (folder / "metrics.jsonl").unlink(missing_ok=True)
            config = yaml.safe_dump({"stage": task.draft["stage"], **task.draft["config"]}, sort_keys=False)
            write_atomically(folder / "config.yaml", config)
            return run_launched(task, stage) if launched(stage) else attempt(stage, task.name, folder)
    except AlignError as error:
        if not existed:
            _remove_unfinished(folder)
        raise type(error)(f"{task.name}: {error}") from error


def attempt(stage: Stage, name: str, folder: Path) -> dict[str, Any]:
    """Run the stage; after a non-finite loss again, from the last checkpoint and at a lower learning rate, if it asks for that."""
    quiet()
    keep_memory()
    stage.check()
    while True:
        watcher = Watcher(name, stage.stage, stage.model_dump(mode="json")) if is_main_process() else None
        history = History(folder / "metrics.jsonl", writes=is_main_process(), watcher=watcher)
        try:
            return stage.run(Context(name, folder, history))
        except NonFiniteLoss as error:
            if getattr(stage, "on_non_finite", "stop") != "lower_learning_rate":
                raise
            scale = _lowered(folder / "checkpoints", error)
            say(f"{name}: {error}; going on from the last checkpoint with the learning rate times {scale:g}")


def _lowered(checkpoints: Path, error: NonFiniteLoss) -> float:
    """The new scale of the learning rate. All processes of the stage have met `error`, and the first lowers it for all.

    Raises:
        NonFiniteLoss: `error`, when it was lowered often enough.
    """
    from align import processes

    scale = None
    if is_main_process():
        with suppress(NonFiniteLoss):
            scale = lower_learning_rate(checkpoints, error)
    scale = processes.first(scale)
    if scale is None:
        raise error
    return scale


def quiet() -> None:
    """Keep the terminal for what a person must know: libraries report errors only."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft and TRL ask by the old name, which nobody here can change.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing` is deprecated", FutureWarning)


def _remove_unfinished(folder: Path) -> None:
    """Take away what a stage left that failed over its input; checkpoints, which are worth keeping, stay."""
    if not (folder / "checkpoints").exists():
        shutil.rmtree(folder)


# -- a process of its own -------------------------------------------------------------------------------------------------------


FULL = errno.ENOSPC
"""Exit code of a stage on a full disk, where neither its log nor its status file may have room to tell of it."""


def main(task: Task) -> int:
    """Run `task` as the whole of a process whose output is its log; how it ended stands in its status file."""
    try:
        return _told(task)
    except Exception as error:
        if disk_is_full(error):
            return FULL
        raise


def _told(task: Task) -> int:
    listen()
    name = task.name if is_first_machine() else f"{task.name}, machine {machine_rank()}"
    status = Status(Path(task.status), name=name, state="running", folder=task.draft["path"])
    report_progress(status)
    try:
        artifact = work(task, task.stage())
        status.update(state="done", seconds=artifact.seconds, reference=artifact.reference)
        return 0
    except Stopped:
        status.update(state="stopped")
        return 130
    except DiskFull as error:
        status.update(state="failed", kind="mistake", error=str(error))
        return FULL
    except StageFailed as error:
        status.update(state="failed", kind="crash", error=str(error))
        return 1
    except AlignError as error:
        print(f"align: error: {error}", file=sys.stderr)
        status.update(state="failed", kind="mistake", transient=is_transient(error), error=str(error))
        return 2
    except Exception as error:
        if disk_is_full(error):
            raise
        traceback.print_exc()
        told = f"{task.name}: {type(error).__name__}: {error}"
        status.update(state="failed", kind="crash", transient=is_transient(error), error=told)
        return 1


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk is not a crash but something to be told in one line; libraries dress it in errors of their own."""
    try:
        yield
    except Exception as error:
        if disk_is_full(error):
            remove_unsealed(folder / "checkpoints")
            raise no_room(folder) from error
        raise


PASSING = {"ConnectionError", "TimeoutError", "HTTPError", "URLError", "OutOfMemoryError", "MemoryError"}
"""Names of the errors of libraries that need not be installed, and their like."""
BUSY = (408, 429)
"""Status codes of a server that would answer later; others of 400 to 499 say that the question was wrong."""


def is_transient(error: BaseException) -> bool:
    """Whether another attempt may well succeed: the network, a busy server, a momentary lack of memory; also where that is the
    cause of an error of our own.
    """
    cause: BaseException | None = error
    while cause is not None:
        names = {cls.__name__ for cls in type(cause).__mro__}
        if names & PASSING:
            status = getattr(getattr(cause, "response", cause), "status_code", getattr(cause, "code", None))
            refused = isinstance(status, int) and 400 <= status < 500 and status not in BUSY
            return not refused and "OfflineModeIsEnabled" not in names
        cause = cause.__cause__
    return False


def read_task(path: str) -> Task:
    """The task in a JSON file, as `align.runner.launch.run_launched` writes it."""
    return Task(**json.loads(Path(path).read_text(encoding="utf-8")))
