"""Bars: drawn over themselves on a terminal, plain lines in a file or a pipe."""

import os
import pty
import re
import resource
import termios
from contextlib import contextmanager, suppress
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


@contextmanager
def terminal(monkeypatch, kind, columns):
    """A terminal as stderr; what it was told is in the list afterwards."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    monkeypatch.setenv("TERM", kind)
    told = []
    with os.fdopen(theirs, "w") as stderr, monkeypatch.context() as patched:
        patched.setattr("sys.stderr", stderr)
        yield told
    with suppress(OSError):  # nobody writes there any more
        while piece := os.read(ours, 10_000):
            told.append(piece)
    os.close(ours)


def screen(told):
    """Lines that stand there at the end."""
    rows, row, column = [""], 0, 0
    for piece in re.split(r"(\r|\n|\x1b\[A)", b"".join(told).decode()):
        if piece == "\r":
            column = 0
        elif piece == "\n":
            row += 1
            rows += [""] * (row == len(rows))
        elif piece == "\x1b[A":
            row -= 1
        else:
            rows[row] = rows[row][:column].ljust(column) + piece + rows[row][column + len(piece) :]
            column += len(piece)
    return [row.rstrip() for row in rows if row.strip()]


def test_stages_side_by_side_leave_whole_lines(monkeypatch):
    """What waits is told below them while it does; tqdm left pieces of the bars behind whose place others took."""
    with terminal(monkeypatch, "xterm", 100) as told:
        view = View()

        def at(name, n):
            view.show(name, {"bar": {"label": name, "n": n, "total": 4, "unit": "step", "shown": "loss 0.5"}, "memory_gb": 0.4})

        view.wait(1, ["dpo", "last"], 5)
        for n in range(4):
            at("sft", n)
            at("reward", n)
        at("reward", 4)
        view.close("reward")
        progress.say("reward: done")
        view.wait(2, ["last"], 5)
        at("dpo", 1)
        at("sft", 4)
        view.close("sft")
        progress.say("sft: done")
        view.close_all()
    lines = [re.sub(r"\|.*\| (\d/4) \[.*, ", r" \1 [", line) for line in screen(told)]
    end = "4/4 [loss 0.5 0.4 GB]"
    assert lines == [f"      reward: 100% {end}", "reward: done", f"         sft: 100% {end}", "sft: done"]
    assert "stages: 1/5, wait: dpo, last" in b"".join(told).decode()
    assert "stages: 2/5, wait: last" in b"".join(told).decode()


@pytest.mark.parametrize(("kind", "columns", "drawn"), [("xterm", 40, True), ("xterm", 0, False), ("dumb", 40, False)])
def test_a_bar_on_a_terminal_is_drawn_over_itself(monkeypatch, kind, columns, drawn):
    """Unless the terminal says that it cannot do that, or does not know its width: then nothing was shown."""
    with terminal(monkeypatch, kind, columns) as pieces:
        work("sampling")
    told = b"".join(pieces).replace(b"\r\n", b"\n")
    assert b"4/4" in told
    assert (b"\r" in told) is drawn


def test_the_memory_of_a_process_that_was_waited_for_counts(tmp_path, monkeypatch):
    """That of a launched stage was told as that of the process that waits for it."""
    used = {resource.RUSAGE_SELF: 1 << 20, resource.RUSAGE_CHILDREN: 3 << 20}  # what the kernel says, in kB
    monkeypatch.setattr(progress.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=used[who]))
    assert progress.Status(tmp_path / "status.json").fields["memory_gb"] == 3.0
