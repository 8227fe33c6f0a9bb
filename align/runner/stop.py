"""Stopping in good order: SIGTERM and Ctrl-C are one request, and work that can save does so first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(KeyboardInterrupt):
    """The process was asked to end. What was worth keeping is on the disk, and the same command goes on from there."""


class _Request:
    made = False
    waits = 0


def listen() -> None:
    """From now on SIGTERM and SIGINT raise `Stopped`, or wait within `saving_first`."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)


def _on_signal(number: int, frame: Any) -> None:
    _Request.made = True
    if not _Request.waits:
        raise Stopped


def stop_requested() -> bool:
    """Whether to save now and raise `Stopped`; a loop within `saving_first` asks after every step."""
    return _Request.made


@contextmanager
def saving_first() -> Iterator[None]:
    """Within, a request to stop interrupts nothing: the work asks `stop_requested`. It is obeyed at the end at the latest."""
    _Request.waits += 1
    try:
        yield
    finally:
        _Request.waits -= 1
    if _Request.made and not _Request.waits:
        raise Stopped
