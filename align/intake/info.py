"""LLaMA-Factory's dataset_info.json, read as it is: ``FOLDER/dataset_info.json:NAME`` is the data set NAME that it describes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.errors import AlignError, near_miss
from align.schema import problem

FILE = "dataset_info.json"

COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "messages": "conversations",
    "tools": "tools",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
}
"""What LLaMA-Factory calls a column, and the column that `align.formats` knows it by, which is also its default."""

TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""What LLaMA-Factory calls the keys and roles of a message, and their defaults."""

OPENAI_KEYS = {"role_tag": "role", "content_tag": "content"}
"""The keys of a message in OpenAI's form, where its roles alone have other names."""

ROLES = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")


@dataclass(frozen=True)
class Entry:
    """One data set of a dataset_info.json."""

    source: str
    split: str | None = None
    num_samples: int | None = None
    columns: dict[str, str] = field(default_factory=dict)
    """A column of the file to the column that stands for it here."""
    tags: dict[str, str] = field(default_factory=dict)

    def standard(self, raw: dict[str, Any]) -> dict[str, Any]:
        """`raw` with its columns, and the keys and roles of its messages, under their standard names. What it has under a standard
        name that the entry gives to another column is not that column, and goes.
        """
        given = set(self.columns.values())
        row = {self.columns.get(name, name): value for name, value in raw.items() if name in self.columns or name not in given}
        if self.tags != TAGS and not row.keys().isdisjoint(("conversations", "messages")):
            names = ("conversations", "messages", "chosen", "rejected")
            row = {name: self._messages(value) if name in names else value for name, value in row.items()}
        return row

    def _messages(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._messages(each) for each in value]
        if not isinstance(value, dict):
            return value
        roles = {self.tags[tag]: TAGS[tag] for tag in ROLES}
        keys = {self.tags["role_tag"]: "from", self.tags["content_tag"]: "value"}
        message = {keys.get(key, key): each for key, each in value.items()}
        said = message.get("from")
        return {**message, "from": roles.get(said, said)} if isinstance(said, str) else message


def entry_of(source: str) -> Entry | None:
    """The entry that ``FOLDER/dataset_info.json:NAME`` (or ``FOLDER:NAME``, where that folder has the file) names, or None.

    Raises:
        AlignError: the file has no such entry, or the entry cannot be understood.
    """
    place, colon, name = source.rpartition(":")
    path = Path(os.path.expanduser(place if colon else source))
    path = path / FILE if path.is_dir() else path
    if path.name != FILE or not path.is_file() or (not colon and Path(source).is_dir()):
        return None
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AlignError(f"{path}: invalid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise AlignError(f"{path}: {problem('row', entries, 'an object: a name and a description for each data set')}")
    if not colon or name not in entries:
        asked = f"no data set {name!r}{near_miss(name, entries)}" if colon else f"name one of its data sets, as in {path}:NAME"
        raise AlignError(f"{path}: {asked}; it has: {', '.join(entries)}")
    return _entry(entries[name], path.parent, f"{path}:{name}")


def _entry(given: dict[str, Any], folder: Path, where: str) -> Entry:
    if not isinstance(given, dict):
        raise AlignError(f"{where}: {problem(where.rpartition(':')[2], given, 'a description of a data set')}")
    columns, renamed = given.get("columns") or {}, given.get("tags") or {}
    for names, what in ((columns, "columns"), (renamed, "tags")):
        if not isinstance(names, dict) or not all(isinstance(theirs, str) for theirs in names.values()):
            raise AlignError(f"{where}, {problem(what, names, 'names, each with its name in the file')}")
    tags = {**TAGS, **renamed}
    for names, known, what in ((columns, COLUMNS, "columns"), (tags, TAGS, "tags")):
        for name in names:
            if name not in known:
                raise AlignError(f"{where}, field {what}.{name}: unknown{near_miss(name, known)}; known: {', '.join(known)}")
    formatting = given.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise AlignError(f"{where}, {problem('formatting', formatting, 'alpaca, sharegpt or openai')}")
    standard = {theirs: COLUMNS[name] for name, theirs in columns.items() if name in COLUMNS}
    if formatting == "alpaca" and set(columns) == {"prompt"}:
        standard = {columns["prompt"]: "text"}  # documents for pretraining
    if formatting == "openai":
        standard[columns.get("messages", "messages")] = "messages"
        if renamed:
            tags = {**tags, **OPENAI_KEYS, **renamed}
    samples = given.get("num_samples")
    if samples is not None and (not isinstance(samples, int) or samples < 1):
        raise AlignError(f"{where}, {problem('num_samples', samples, 'a whole number of at least 1')}")
    return Entry(_source(given, folder, where), given.get("split"), samples, standard, tags)


def _source(given: dict[str, Any], folder: Path, where: str) -> str:
    if isinstance(given.get("file_name"), str):
        return str(folder / given["file_name"])
    if isinstance(given.get("hf_hub_url"), str):
        return given["hf_hub_url"] + (f":{given['subset']}" if given.get("subset") else "")
    found = ", ".join(given) or "nothing"
    raise AlignError(f"{where}: expected file_name or hf_hub_url (a script or another hub is not read); found {found}")
