"""Bars: drawn over themselves on a terminal, plain lines in a file or a pipe."""

import os
import pty
import re
import resource
import termios
from contextlib import suppress
from types import SimpleNamespace

import pytest

from align import progress
from align.progress import bar
from align.runner.view import View

STEPS = 4


def work(label):
    with bar(label, STEPS, "answer") as shown:
        for _ in range(STEPS):
            shown.update()


def test_a_bar_in_a_pipe_is_one_plain_line_at_its_end(capsys):
    """A log had as many bars behind each other, on one line."""
    work("sampling")
    assert re.fullmatch(r" +sampling: 100% 4/4 \[.*answer.*\]\n", capsys.readouterr().err)


def test_a_long_bar_in_a_pipe_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
    work("sampling")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[2] for line in lines[:STEPS]] == ["1/4", "2/4", "3/4", "4/4"]


def test_a_stage_in_a_process_of_its_own_is_shown_in_the_same_way(capsys):
    view = View()
    for n in (1, 2, 4):
        bar = {"label": "sft", "n": n, "total": 4, "unit": "step", "shown": "loss 0.5"}
        view.show("sft", {"bar": bar, "memory_gb": 0.4})
    view.close_all()
    assert re.fullmatch(r" +sft: 100% 4/4 \[.*, loss 0.5 0.4 GB\]\n", capsys.readouterr().err)


@pytest.mark.parametrize(("kind", "columns", "drawn"), [("xterm", 40, True), ("xterm", 0, False), ("dumb", 40, False)])
def test_a_bar_on_a_terminal_is_drawn_over_itself(monkeypatch, kind, columns, drawn):
    """Unless the terminal says that it cannot do that, or does not know its width: then nothing was shown."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    monkeypatch.setenv("TERM", kind)
    with os.fdopen(theirs, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        work("sampling")
    told = b""
    with suppress(OSError):  # nobody writes there any more
        while piece := os.read(ours, 10_000):
            told += piece.replace(b"\r\n", b"\n")
    os.close(ours)
    assert b"4/4" in told
    assert (b"\r" in told) is drawn


def test_the_memory_of_a_process_that_was_waited_for_counts(tmp_path, monkeypatch):
    """That of a launched stage was told as that of the process that waits for it."""
    used = {resource.RUSAGE_SELF: 1 << 20, resource.RUSAGE_CHILDREN: 3 << 20}  # what the kernel says, in kB
    monkeypatch.setattr(progress.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=used[who]))
    assert progress.Status(tmp_path / "status.json").fields["memory_gb"] == 3.0
