"""Votes between two answers, kept as preference rows that `align dpo` and `align reward` train on."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path

from align.registry import home
from align.runner.files import disk_is_full, no_room
from align.schema import Message

NO_VOTE = "A model of a task answers with labels, or to the last text alone: there is no vote."
"""What is said where one of two models is of a task: such answers are no preference rows."""


def default_votes() -> Path:
    """Where votes go unless told otherwise."""
    return home() / "votes.jsonl"


def add_vote(path: Path, prompt: Sequence[Message], chosen: tuple[str, str], rejected: tuple[str, str]) -> None:
    """Append one row to `path`, whole or not at all: ``prompt``, ``chosen``, ``rejected``, and who gave which answer.

    Args:
        chosen, rejected: the name of the model and its answer.

    Raises:
        DiskFull: there is no room for it.
    """
    row = {
        "prompt": [message.model_dump(exclude_none=True) for message in prompt],
        **{side: [{"role": "assistant", "content": text}] for side, (_, text) in (("chosen", chosen), ("rejected", rejected))},
        "chosen_model": chosen[0],
        "rejected_model": rejected[0],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    with path.open("ab+", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # two votes at a time never mix their bytes
        end = file.seek(0, os.SEEK_END)
        if end:  # a row that somebody wrote by hand may lack its line's end
            file.seek(end - 1)
            line = (b"" if file.read(1) == b"\n" else b"\n") + line
        try:
            if file.write(line) < len(line):
                raise no_room(path)
            os.fsync(file.fileno())
        except BaseException as error:
            file.truncate(end)  # half a row would spoil the next one, too
            if disk_is_full(error):
                raise no_room(path) from error
            raise
