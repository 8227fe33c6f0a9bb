"""The order of all stages: each in a process of its own as soon as what it needs is done and a device is free.

A stage that fails takes nothing with it but what needs its output. `ALIGN_IN_PROCESS=1` runs the stages one after the other inside
the runner's own process instead, for debuggers.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from align.artifact import read_artifact
from align.errors import AlignError, DiskFull, StageFailed
from align.progress import leave_terminal, say
from align.recipe import Recipe
from align.registry import Registry
from align.runner.devices import devices, take
from align.runner.files import no_room
from align.runner.locks import clear
from align.runner.notes import read_status
from align.runner.plan import Step
from align.runner.stop import Stopped
from align.runner.view import View
from align.runner.worker import FULL, Task, settle, work
from align.runner.zygote import Zygote

POLL = 0.2  # seconds between two looks at what the stages do
LINES_SHOWN = 12
"""Last lines of its log that a failed stage is shown with."""


@dataclass(frozen=True)
class Options:
    """How stages are run; nothing of it changes what comes out."""

    jobs: int | None = None
    """Stages side by side; by default one a GPU, and one without any."""
    wait: bool = True
    """Wait for another run that works on the same stage, or refuse."""
    retries: int = 2
    """New attempts at a stage whose process was killed, or that met a passing fault."""
    backoff: float = 5.0
    """Seconds before the first of them; each waits twice as long as the one before."""
    grace: float = 60.0
    """Seconds that stages have to save in when the run is stopped."""


def in_process() -> bool:
    """Whether stages run inside this process."""
    return os.environ.get("ALIGN_IN_PROCESS", "0") not in ("", "0")


@dataclass
class _Running:
    """A stage at work."""

    step: Step
    devices: list[str]
    pid: int | None = None
    attempts: int = 0
    offset: int = 0
    """How much of its log was shown."""


class _Jobs:
    """The stages that wait, those at work, and the devices that are free.

    Args:
        waiting: names, in the order of the recipe.
        free: see `devices`.
    """

    def __init__(self, waiting: list[str], free: list[str]) -> None:
        self.waiting, self.free = waiting, free
        self.slots = len(set(free)) if any(free) else len(free)
        """Most devices that a stage can have at a time: there may be several shares of a GPU."""
        self.threads = None if self.slots == 1 or free[0] else max(1, (os.cpu_count() or 1) // self.slots)
        """Of each stage, where several share the CPU; None leaves it to torch."""
        self.running: dict[int, _Running] = {}
        """By the number that each has for the zygote."""
        self.later: list[tuple[float, _Running]] = []
        """What is to be tried again, and from when on."""
        self.view = View()
        self._number = 0

    @property
    def at_work(self) -> set[str]:
        """Names of the stages that have begun, and may begin again."""
        return {job.step.name for job in (*self.running.values(), *(job for _, job in self.later))}

    def enter(self, job: _Running) -> int:
        """Count `job` among those that run; returns its number."""
        self._number += 1
        self.running[self._number] = job
        return self._number


@dataclass
class Graph:
    """Runs the stages of a recipe.

    Args:
        resolve: a stage's step, given the steps of what it needs.
    """

    recipe: Recipe
    resolve: Callable[[str, dict[str, Step]], Step]
    registry: Registry
    options: Options
    looked: set[str]
    """Stages that the preflight has seen; the others are looked at when what they need has run."""
    notes: Path | None = None
    """Where the preflight keeps its findings."""
    begun: dict[str, Step] = field(default_factory=dict)
    """What ran, as it was when it began."""
    entered: bool = False
    """Whether a stage is, or was, at work."""
    finished: dict[str, Step] = field(default_factory=dict)
    failed: dict[str, AlignError] = field(default_factory=dict)
    """Why each failed."""
    skipped: dict[str, set[str]] = field(default_factory=dict)
    """Stages that did not run, and what they wait for."""

    def run(self, only: str | None = None) -> dict[str, Step]:
        """All steps, by name, in the order of the recipe; see `Step.done`.

        Raises:
            AlignError: stages failed. The others have run.
            Stopped: of a `KeyboardInterrupt` after a stage has begun.
        """
        order = self.recipe.ordered()
        try:
            (self._one_by_one if in_process() else self._side_by_side)(order, only)
        except KeyboardInterrupt as stop:
            raise (Stopped if self.entered else KeyboardInterrupt) from stop
        if self.failed:
            raise self._summary()
        return {name: self.finished[name] for name in order if name in self.finished}

    # -- what is ready ----------------------------------------------------------------------------------------------------------

    def _settled(self, name: str, only: str | None) -> Step | None:
        """The step of `name` if it must run now; otherwise it is noted as finished or skipped."""
        needs = self.recipe.needs(name)
        if blocked := {need for need in needs if need in self.failed or need in self.skipped}:
            self.skipped[name] = blocked
            return None
        try:
            step = self.resolve(name, self.finished)
        except AlignError as error:  # a file is gone that was there when all was planned
            self.failed[name] = error
            return None
        if step.runs and (only is None or name == only):
            if missing := sorted(need for need in needs if self.finished[need].done is None):
                raise AlignError(f"stage {name!r} needs {', '.join(missing)}, which has not run; run it first, or leave out --only")
            try:
                if name not in self.looked:
                    self.looked |= look([name], [*self.finished.values(), step], self.notes)
            except AlignError as error:
                self.failed[name] = error
                return None
            self.begun[name] = step
            return step
        if not step.runs:
            assert step.done is not None
            say(f"{name}: up to date ({step.folder})")
            clear(step.folder)
            step = _with(step, settle(step.done, self.registry))
        self.finished[name] = step
        return None

    # -- inside this process ----------------------------------------------------------------------------------------------------

    def _one_by_one(self, order: list[str], only: str | None) -> None:
        for name in order:
            step = self._settled(name, only)
            if step is None:
                continue
            self.entered = True
            try:
                self.finished[name] = _with(step, work(self._task(step), step.stage))
            except AlignError as error:
                self.failed[name] = error

    # -- in processes of their own ----------------------------------------------------------------------------------------------

    def _side_by_side(self, order: list[str], only: str | None) -> None:
        jobs = _Jobs(list(order), devices(self.options.jobs))
        if _shared and not _shared[0].alive:
            _shared.pop().close()
        with _terminable():
            try:
                while jobs.waiting or jobs.running or jobs.later:
                    self._begin_ready(jobs, only)
                    self._begin_again(jobs)
                    left = [*jobs.waiting, *(job.step.name for _, job in jobs.later)]
                    jobs.view.wait(len(order) - len(jobs.waiting) - len(jobs.at_work), left, len(order))
                    if jobs.running or jobs.later:
                        self._listen(jobs)
            except BaseException:
                _stop(jobs.running, self.options.grace, lambda job: self._show(job, jobs.view))
                raise
            finally:
                jobs.view.close_all()

    def _begin_ready(self, jobs: _Jobs, only: str | None) -> None:
        """Begin the stages whose needs are done, in the order of the recipe, while there are devices for the next one."""
        for name in list(jobs.waiting):
            if any(need in jobs.waiting or need in jobs.at_work for need in self.recipe.needs(name)):
                continue
            if not jobs.free:
                return
            jobs.waiting.remove(name)
            if (step := self._settled(name, only)) is not None:
                taken = take(jobs.free, step, jobs.slots)
                if taken is None:
                    jobs.waiting.insert(0, name)
                    return
                self._submit(_Running(step, taken), jobs)

    def _begin_again(self, jobs: _Jobs) -> None:
        """Begin the new attempts whose time has come."""
        for due, job in list(jobs.later):
            if time.monotonic() >= due:
                jobs.later.remove((due, job))
                self._submit(job, jobs)

    def _listen(self, jobs: _Jobs) -> None:
        """Hear for a moment what has begun and ended, and show how the others stand."""
        for event in _zygote().events(POLL):
            if "pid" in event:
                jobs.running[event["id"]].pid = event["pid"]
                self.entered = True
            else:
                job = jobs.running.pop(event["id"])
                self._show(job, jobs.view)
                jobs.view.close(job.step.name)
                if not self._ended(job, event["exit"], jobs.later):
                    jobs.free += job.devices
        _check_zygote()
        for job in jobs.running.values():
            self._show(job, jobs.view)

    def _task(self, step: Step) -> Task:
        return Task.of(step, self.registry, wait=self.options.wait, grace=self.options.grace)

    def _submit(self, job: _Running, jobs: _Jobs) -> None:
        environment = dict(os.environ)
        if any(job.devices):
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(job.devices)
        log, status = job.step.log, job.step.status
        status.unlink(missing_ok=True)
        job.offset = log.stat().st_size if log.exists() else 0
        job.pid = None
        job.attempts += 1
        _zygote().submit(jobs.enter(job), asdict(self._task(job.step)), environment, jobs.threads)

    def _show(self, job: _Running, view: View) -> None:
        """New lines of the stage's log, and its bar."""
        if job.step.log.exists():
            with job.step.log.open("rb") as log:
                log.seek(job.offset)
                lines, newline, _ = log.read().rpartition(b"\n")
            job.offset += len(lines + newline)
            for line in lines.decode(errors="replace").splitlines():
                if line.strip() and not line.startswith("align: error: "):
                    say(line)
        view.show(job.step.name, read_status(job.step.status))

    def _ended(self, job: _Running, code: int, later: list[tuple[float, _Running]]) -> bool:
        """Note how a stage ended; True when it is to be tried again."""
        step = job.step
        if code == 0:
            done = read_artifact(step.folder)
            assert done is not None
            self.finished[step.name] = _with(step, done)
            return False
        status = read_status(step.status)
        killed = os.WIFSIGNALED(code)
        if killed or status.get("state") == "stopped":
            what = "its process was told to stop"
            if killed:
                number = signal.Signals(os.WTERMSIG(code))
                what = f"its process was ended by {number.name}{' (is memory short?)' if number is signal.SIGKILL else ''}"
            error: AlignError = StageFailed(f"{step.name}: {what}")
        elif os.waitstatus_to_exitcode(code) == FULL:
            error = DiskFull(status.get("error") or f"{step.name}: {no_room(step.folder)}")
        else:
            told = status.get("error") or f"{step.name}: its process ended with code {os.waitstatus_to_exitcode(code)}"
            error = AlignError(told) if status.get("kind") == "mistake" else StageFailed(f"{told}; {step.log} tells more")
        if (killed or status.get("transient")) and job.attempts <= self.options.retries:
            pause = self.options.backoff * 2 ** (job.attempts - 1)
            say(f"{error}; trying again in {pause:g} s ({job.attempts} of {self.options.retries})")
            later.append((time.monotonic() + pause, job))
            return True
        self.failed[step.name] = error
        return False

    def _summary(self) -> AlignError:
        """One error for all failures; what each left in its log is said before."""
        several = len(self.recipe.stages) > 1
        for name, error in self.failed.items():
            log = self.begun[name].log if name in self.begun else None
            if isinstance(error, StageFailed) and log is not None and log.exists() and several:
                say(f"-- {name} failed; the end of {log}:")
                for line in log.read_text(errors="replace").splitlines()[-LINES_SHOWN:]:
                    say(f"   {line}")
        text = "; ".join(str(error) for error in self.failed.values())
        for name, needs in self.skipped.items():
            text += f"; {name} waits for {', '.join(sorted(needs))}"
        kinds = {type(error) for error in self.failed.values()}
        return (kinds.pop() if len(kinds) == 1 else StageFailed)(text)


def look(names: list[str], plan: list[Step], notes: Path | None) -> set[str]:
    """The preflight of the stages `names`; returns those that could be looked at before what they need has run.

    Args:
        notes: file that the findings are kept in, for the report.

    Raises:
        AlignError: it found an error.
    """
    if not names:
        return set()
    from align.preflight.inspect import preflight

    return preflight(plan, names, notes)


def _with(step: Step, done: Any) -> Step:
    return replace(step, done=done)


# -- the process that forks -------------------------------------------------------------------------------------------------------

_shared: list[Zygote] = []


def _zygote() -> Zygote:
    """The zygote of this process, started when it is first needed."""
    if not _shared:
        _shared.append(Zygote())
    return _shared[0]


def _check_zygote() -> None:
    if _shared and not _shared[0].alive:
        _shared.pop().close()
        raise StageFailed("the process that starts the stages was killed; the same command goes on from here")


def _stop(running: dict[int, _Running], grace: float, show: Callable[[_Running], None]) -> None:
    """Ask the stages to save and end; those that are still there after `grace` seconds are killed."""
    if not running:
        return
    if begun := [job.step for job in running.values() if job.pid is not None]:
        say(stopping(begun, grace))
    deadline = time.monotonic() + grace
    try:
        _signal(running, signal.SIGTERM)
        while begun and running and time.monotonic() < deadline and _shared and _shared[0].alive:
            for event in _zygote().events(POLL):
                if "exit" in event:
                    show(running.pop(event["id"]))
                else:  # it was only just started
                    running[event["id"]].pid = event["pid"]
                    _signal({0: running[event["id"]]}, signal.SIGTERM)
    finally:
        if running:
            _signal(running, signal.SIGKILL)
            if _shared:
                _shared.pop().close()


def stopping(steps: list[Step], grace: float) -> str:
    """What becomes of `steps` when they are stopped: those with checkpoints save, within `grace` seconds."""
    saving = [step.name for step in steps if hasattr(step.stage, "save_steps")]
    anew = [step.name for step in steps if step.name not in saving]
    told = [f"{', '.join(saving)} may save for up to {grace:g} s (again: at once)"] if saving else []
    told += [f"{', '.join(anew)} will begin anew"] if anew else []
    return f"stopping: {'; '.join(told)}"


def _signal(running: dict[int, _Running], number: int) -> None:
    for job in running.values():
        if job.pid is not None:
            with suppress(ProcessLookupError):
                os.kill(job.pid, number) if number == signal.SIGTERM else os.killpg(job.pid, number)


@contextmanager
def _terminable() -> Iterator[None]:
    """Within, SIGTERM is what Ctrl-C is, and so is a terminal that closes, unless that is ignored (``nohup``)."""

    def stop(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)  # the shell sends it, and the kernel again
        leave_terminal()
        raise Stopped

    ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, stop) for number in ends}
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
