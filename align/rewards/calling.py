"""Calls of reward functions: what they get, how long they may take, and what their results must be."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import signal
import threading
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from align.errors import AlignError, near_miss
from align.rewards.protocol import RewardFunction, parameters_of, short, takes_any


class Failure(AlignError):
    """A reward function did not give its rewards: what `on_error` is about. (A mistake in its settings or columns is not.)"""


class _TimeIsUp(BaseException):
    """Not an Exception, which the function itself might catch."""


AGAIN = 0.1
"""Seconds until an alarm rings again."""

RAISED = (Exception, SystemExit, GeneratorExit, asyncio.CancelledError)
"""What a function of somebody's own may raise without ending the run: not Ctrl-C. The last is that of a client which gave up."""

LARGEST = 3.4028234663852886e38
"""Of float32, in which rewards are trained on: a larger one is infinite there."""

TRL_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")
"""Arguments by which TRL's trainer hands itself to a reward function."""


OWN = ("prompts", "completions", "completion_ids")
"""The arguments of the protocol that are no columns."""


def refuse_missing_columns(name: str, function: RewardFunction, columns: Collection[str]) -> None:
    """Raise `AlignError` where the function needs a column that is not among `columns`."""
    for p in parameters_of(function).values():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in (*OWN, *columns):
            if p.name in TRL_ONLY:
                raise AlignError(
                    f"reward {name!r} wants {p.name!r}, which TRL's trainer passes and nothing here does: give it a default"
                )
            known = ", ".join(columns) or "none"
            answers = "" if "completions" in parameters_of(function) else "; answers come as `completions` (docs/rewards.md)"
            raise AlignError(
                f"reward {name!r} needs a column {p.name!r}{near_miss(p.name, columns)}; the rows have: {known}{answers}"
            )


def arguments_for(name: str, function: RewardFunction, own: Mapping[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of the lists that the function's signature takes, and of what is in them: ids are what is trained on, and a column's
    cells come again with each completion and each epoch.

    Raises:
        AlignError: it needs a column that is not there.
    """
    parameters = parameters_of(function)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    passed = {**own, **{key: value for key, value in columns.items() if key not in bound}}
    refuse_missing_columns(name, function, columns)
    if not takes_any(parameters):
        passed = {key: value for key, value in passed.items() if key in parameters}
    return {key: value if value is None else _copies(key, value) for key, value in passed.items()}


def _copies(key: str, value: Any) -> list[Any]:
    """One for each cell: completions of one prompt share its cells."""
    return [*map(copy.copy if key == "completion_ids" else copy.deepcopy, value)]  # numbers need no deep copy, which takes long


def call(name: str, function: RewardFunction, arguments: Mapping[str, Any], timeout: float | None) -> Any:
    """The function's result, or the awaitable it returned.

    Raises:
        AlignError: a mistake in its settings.
        Failure: it raised (the cause is kept) or took more than `timeout` seconds.
    """
    try:
        return function(**arguments) if timeout is None else _within(timeout, functools.partial(function, **arguments))
    except AlignError:
        raise
    except _TimeIsUp:
        raise Failure(_too_long(name, timeout)) from None
    except RAISED as error:
        raise raised(name, error) from error


def raised(name: str, error: BaseException) -> AlignError:
    """What is said of an exception in the function `name`."""
    if isinstance(error, AlignError):
        return error
    try:
        said = str(error)
    except RAISED:
        said = "it cannot say what"
    return Failure(f"reward {name!r} raised {type(error).__name__}: {said}{_place(error)}")


def _place(error: BaseException) -> str:
    """The line of the function's file that was at work, behind the calls of this package."""
    calls = ((Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__))
    return next((f" ({file.name} line {line})" for file, line in calls if file.parent != Path(__file__).parent), "")


def _too_long(name: str, timeout: float | None) -> str:
    return f"reward {name!r} took more than its timeout of {timeout:g} s"


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """`work`'s result, unless it takes more than `seconds`.

    On the main thread an alarm ends it, wherever it is in Python (a loop, a sleep, a regular expression). It rings until it is
    heard: a bare ``except`` in a loop catches it. Elsewhere, and on Windows, it runs on a thread that is left behind when time is
    up.
    """
    if hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread():
        with _alarm(seconds) as rung:
            result = work()
        if rung:
            raise _TimeIsUp
        return result
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((work(), None))
        except RAISED as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True, name="align-reward")
    thread.start()
    thread.join(seconds)
    if not results:
        raise _TimeIsUp
    value, error = results[0]
    if error is not None:
        raise error
    return value


@contextmanager
def _alarm(seconds: float) -> Iterator[list[int]]:
    rung: list[int] = []
    over = False

    def ring(number: int, frame: Any) -> None:
        if not over:
            rung.append(number)
            signal.setitimer(signal.ITIMER_REAL, AGAIN)
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield rung
    finally:
        over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


BLOCKED = 1.0
"""Seconds behind the last timeout after which what is awaited is taken to block the loop, which then knows no timeouts."""


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop on one thread for the whole process: works inside a notebook's running loop, and lets clients outlive a call."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True, name="align-rewards").start()
    return loop


def await_all(pending: Mapping[str, tuple[Awaitable[Any], float | None]]) -> dict[str, Any]:
    """Their results, awaited together, each for as long as its timeout says; an `AlignError` in place of a result that is none.
    Where one blocks the loop (`time.sleep`, say), all that have not ended took too long, and the loop is left behind.
    """
    if not pending:
        return {}
    ended: dict[str, Any] = {}
    begin = asyncio.Event()

    async def limited(name: str, awaitable: Awaitable[Any], timeout: float | None) -> None:
        try:
            async with asyncio.timeout(timeout) as limit:
                ended[name] = await awaitable
        except AlignError as error:
            ended[name] = error
        except RAISED as error:
            failure = Failure(_too_long(name, timeout)) if timeout is not None and limit.expired() else raised(name, error)
            failure.__cause__ = error
            ended[name] = failure

    async def gather() -> None:
        await begin.wait()
        await asyncio.gather(*(limited(name, *entry) for name, entry in pending.items()))

    limits = [timeout for _, timeout in pending.values() if timeout is not None]
    loop = _event_loop()
    work = asyncio.run_coroutine_threadsafe(gather(), loop)
    try:
        loop.call_soon_threadsafe(begin.set)  # not before: Ctrl-C in front of `try` would leave what has begun behind
        work.result(max(limits) + BLOCKED if len(limits) == len(pending) else None)
    except TimeoutError:
        _event_loop.cache_clear()
    except BaseException:  # Ctrl-C
        work.cancel()
        if _blocked(loop):
            _event_loop.cache_clear()
        raise
    return {name: ended[name] if name in ended else Failure(_too_long(name, limit)) for name, (_, limit) in pending.items()}


def _blocked(loop: asyncio.AbstractEventLoop) -> bool:
    turn = threading.Event()
    loop.call_soon_threadsafe(turn.set)
    return not turn.wait(BLOCKED)


def close(results: Mapping[str, Any]) -> None:
    """Close coroutines that nobody will await, or Python warns of them."""
    for result in filter(inspect.iscoroutine, results.values()):
        result.close()


def checked(name: str, result: Any, prompts: Sequence[Any]) -> list[float | Failure | None]:
    """The result as plain numbers, with a `Failure` where one is no finite number nor None.

    Raises:
        Failure: it is no list, or has not one entry per completion.
    """
    values = _plain(result)
    if not isinstance(values, list | tuple):
        raise Failure(f"reward {name!r} returned {short(result)}; expected a list of {len(prompts)} numbers, one per completion")
    if len(values) != len(prompts):
        first = f" (the first prompt is {short(prompts[0])})" if prompts else ""
        raise Failure(f"reward {name!r} returned {len(values)} values; expected {len(prompts)}, one per completion{first}")
    found: list[float | Failure | None] = []
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        number = _plain(value)
        if number is None or _finite(number):
            found.append(None if number is None else float(number))
        else:
            where = f"reward {name!r}, row {row} (prompt {short(prompt)})"
            found.append(Failure(f"{where}: got {short(value)}; expected a finite number (of float32), or None to abstain"))
    return found


def _plain(value: Any) -> Any:
    """`value`, of numpy's and torch's as Python's own; as it is where it cannot be had, as of a tensor without data."""
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except RAISED:
        return value


def _finite(number: Any) -> bool:
    try:
        return isinstance(number, Real) and abs(float(number)) <= LARGEST
    except RAISED:  # an integer that no float holds, or an object that fails at being a number
        return False
