"""The command line: ``align <verb> [--config file.yaml] [--same_named_flag value]``. Mistakes in the input end with one line and
exit code 2.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import io
import os
import sys
from pathlib import Path

from align import __version__
from align.commands import (
    chat,
    check,
    curvature,
    data,
    doctor,
    export,
    launch,
    models,
    report,
    run,
    serve,
    stage,
    status,
    ui,
)
from align.commands.parser import Parser
from align.errors import AlignError, StageFailed, first_line
from align.runner.files import disk_is_full, no_room
from align.runner.stop import Stopped

COMMANDS = (
    run,
    stage,
    status,
    models,
    report,
    doctor,
    curvature,
    launch,
    chat,
    check,
    data,
    export,
    serve,
    ui,
)

REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give this user the right to it"),
    errno.ENAMETOOLONG: "name something shorter",
}
"""What a person may do about a path that the system refuses."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # OpenMP's threads wait for each other by spinning. On a busy machine that can cost a factor of ten; a short spin costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # At its end Python looks for garbage in all that was imported: a second or two after torch, and it goes with the process.
    atexit.register(gc.freeze)
    _open_closed()
    if isinstance(sys.stdout, io.TextIOWrapper):  # data may hold half of a surrogate pair, and a terminal know fewer characters
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _dispatch(arguments)
    except AlignError as error:
        print(f"align: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, StageFailed) else 2
    except KeyboardInterrupt as stop:
        if not {"chat", "serve", "status", "ui"}.intersection(arguments[:1]):  # that is how these end, `status` with --watch
            told = "; the same command continues with the stage that was cut" if isinstance(stop, Stopped) else ""
            print(f"align: interrupted{told}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        from align.budget import out_of_memory

        if not out_of_memory(error):
            raise
        told = "out of memory; take a smaller model, shorter texts or fewer at a time, or end other programs"
        print(f"align: error: {told} ({first_line(error)})", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno in REMEDIES and error.filename is not None:
            print(f"align: error: {error.filename}: {error.strerror}; {REMEDIES[error.errno]}", file=sys.stderr)
            return 2
        if isinstance(error, FileNotFoundError) and error.filename is None and _is_nowhere():
            print("align: error: the folder that this command was given in is gone: change to one that is there", file=sys.stderr)
            return 2
        if not disk_is_full(error):
            raise
        full = no_room(Path(error.filename)) if error.filename else "the disk is full; make room, and give the same command again"
        print(f"align: error: {full}", file=sys.stderr)
        return 2


def _open_closed() -> None:
    """Have what is said go nowhere where who called has closed stdout or stderr (``2>&-``). Python would say on stdout what is for
    stderr, and the next file to be opened would be taken for one of the two.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - as long as the process


def _is_nowhere() -> bool:
    """Whether the working folder was deleted or moved away."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def parser() -> argparse.ArgumentParser:
    """The parser of every verb."""
    root = Parser(prog="align", description="From a base language model to an aligned chat model, on one machine.")
    root.add_argument("--version", action="version", version=__version__)
    verbs = root.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    for command in COMMANDS:
        command.add(verbs)
    return root


def _dispatch(arguments: list[str]) -> int:
    root = parser()
    options, rest = root.parse_known_args(arguments)
    if options.verb is None:
        root.print_help()
        return 0
    if getattr(options, "reads_flags", False):
        return options.handler(options, rest)
    return options.handler(options)


if __name__ == "__main__":
    raise SystemExit(main())
