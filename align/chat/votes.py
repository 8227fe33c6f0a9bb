"""Votes between two answers, kept as preference rows that `align dpo` and `align reward` train on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from align.registry import home
from align.schema import Message


def default_votes() -> Path:
    """Where votes go unless told otherwise."""
    return home() / "votes.jsonl"


def add_vote(path: Path, prompt: Sequence[Message], chosen: tuple[str, str], rejected: tuple[str, str]) -> None:
    """Append one row to `path`, whole: the columns ``prompt``, ``chosen`` and ``rejected``, and who gave which answer.

    Args:
        chosen, rejected: the name of the model and its answer.
    """
    row = {
        "prompt": [message.model_dump(exclude_none=True) for message in prompt],
        **{side: [{"role": "assistant", "content": text}] for side, (_, text) in (("chosen", chosen), ("rejected", rejected))},
        "chosen_model": chosen[0],
        "rejected_model": rejected[0],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(row) + "\n").encode()
    # One write to a file opened for appending: two votes at a time never mix their bytes.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
