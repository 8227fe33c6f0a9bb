"""Rows in the layout of a format: the reverse of `align.formats`, for the formats that people exchange.

Every row is read back before it is given out: what a format cannot hold (tools in Alpaca, raw text in a chat) is refused, not lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from align.catalog import Catalog
from align.errors import AlignError
from align.intake.catalog import SetAside, formats
from align.intake.kinds import convert, known_columns
from align.schema import SPOKEN, Row, validate
from align.turns import Fields, Raw, cut

writers: Catalog[Callable[[str, Fields], Raw]] = Catalog("format to write")


def written(row: Row, kind: str, to: str) -> Raw:
    """`row`, of `kind`, as a row of format `to`.

    Raises:
        AlignError: `to` cannot hold it. The message does not say where the row stands.
    """
    fields = row.model_dump(exclude_none=True)
    if kind == "prompts":
        fields = {**fields.pop("columns", {}), **fields}
    try:
        raw = writers[to](kind, fields)
    except (KeyError, TypeError, ValueError, IndexError) as error:  # a shape that the format has no place for
        raise AlignError(f"format {to!r} has no place for {kind} rows such as this one ({_shape(fields)})") from error
    if to == "native":
        return raw
    back = [found for found in convert(to, raw, kind) if not isinstance(found, SetAside)] if formats[to].matches(raw) else []
    if len(back) != 1 or validate(kind, back[0]) != row:
        raise AlignError(f"format {to!r} cannot hold all of this row ({_shape(fields)}); native can")
    return raw


def _shape(fields: Fields) -> str:
    """Which fields a row has, and what kind of value they hold."""
    return ", ".join(f"{name}: {'text' if isinstance(value, str) else type(value).__name__}" for name, value in fields.items())


@writers.add
def native(kind: str, fields: Fields) -> Raw:
    """The fields themselves."""
    return fields


@writers.add
def openai(kind: str, fields: Fields) -> Raw:
    """`messages`, with `label`; pairs as `chosen_messages` and `rejected_messages`."""
    rest = _beside_speech(fields)
    if kind == "preference":
        return {f"{side}_messages": _messages(fields["prompt"]) + fields[side] for side in ("chosen", "rejected")} | rest
    if "messages" in fields or kind == "prompts":
        return {"messages": fields.get("messages") or _messages(fields["prompt"]), **rest}
    if kind == "sft":  # the reply alone is learnt
        prompt = [{**turn, "weight": 0} for turn in _messages(fields["prompt"])]
        return {"messages": prompt + [{**turn, "weight": 1} for turn in fields["completion"]], **rest}
    return {"messages": _messages(fields["prompt"]) + fields["completion"], **rest}


def _beside_speech(fields: Fields) -> Fields:
    """The fields that hold neither strings nor messages that somebody says: label, margin, tools, columns."""
    return {name: value for name, value in fields.items() if name not in ("messages", *SPOKEN)}


def _messages(value: Any) -> list[Fields]:
    if not isinstance(value, list):
        raise TypeError("raw text")
    return value


SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


@writers.add
def sharegpt(kind: str, fields: Fields) -> Raw:
    """`conversations`, with `chosen` and `rejected` as a message each, or with `label`."""
    rest = _beside_speech(fields)
    if "tools" in rest:
        rest["tools"] = json.dumps(rest["tools"], ensure_ascii=False)
    turns = fields.get("messages") or _messages(fields["prompt"]) + fields.get("completion", [])
    found = {"conversations": [_said(turn) for turn in turns]}
    if kind == "preference":
        for side in ("chosen", "rejected"):
            (reply,) = fields[side]
            found[side] = _said(reply)  # type: ignore[assignment]
    return {**found, **rest}


def _said(turn: Fields) -> Fields:
    if "tool_calls" not in turn:
        return {"from": SPEAKERS[turn["role"]], "value": turn["content"]}
    calls = [call["function"] for call in turn["tool_calls"]]
    return {"from": "function_call", "value": json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)}


@writers.add
def alpaca(kind: str, fields: Fields) -> Raw:
    """`instruction`, `input`, `output` with `system` and `history`; pairs with `chosen` and `rejected`."""
    rest = _beside_speech(fields)
    turns, reply = cut(fields["messages"]) if "messages" in fields else (_messages(fields["prompt"]), fields.get("completion", []))
    found: Raw = {}
    if turns[0]["role"] == "system":
        found["system"], turns = turns[0]["content"], turns[1:]
    *history, asked = turns
    found |= {"instruction": asked["content"], "input": ""}
    if history:
        found["history"] = [[a["content"], b["content"]] for a, b in zip(history[::2], history[1::2], strict=True)]
    if kind == "preference":
        for side in ("chosen", "rejected"):
            (answer,) = fields[side]
            found[side] = answer["content"]
    else:
        (answer,) = reply
        found["output"] = answer["content"]
    return {**found, **rest}


@writers.add
def hh(kind: str, fields: Fields) -> Raw:
    """Anthropic's transcripts."""
    speakers = {"user": "Human", "assistant": "Assistant"}

    def transcript(turns: list[Fields]) -> str:
        return "".join(f"\n\n{speakers[turn['role']]}: {turn['content']}" for turn in turns)

    return {side: transcript(_messages(fields["prompt"]) + fields[side]) for side in ("chosen", "rejected")}


@writers.add
def ultrafeedback(kind: str, fields: Fields) -> Raw:
    """`chosen` and `rejected` repeat the prompt."""
    rest: Raw = {name: fields[name] for name in ("margin", "tools") if name in fields}
    whole = {side: _messages(fields["prompt"]) + fields[side] for side in ("chosen", "rejected")}
    return {"prompt": fields["prompt"][-1]["content"], **whole, **rest}


@writers.add
def text(kind: str, fields: Fields) -> Raw:
    """Documents."""
    return {"text": fields["text"]}


class _Watched(dict[str, Any]):
    """A raw row that remembers which of its columns were looked into."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw)
        self.seen: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.seen.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.seen.add(column)
        return super().get(column, default)

    def values(self) -> Any:
        self.seen.update(self)
        return super().values()


KNOWN = {"messages", "chosen_messages", "rejected_messages", "label", "kto_tag", "margin", "tools", "history", "output", "text"}
"""Columns, besides those that a format needs or makes its prompt of, that would change how a row is read."""


def other_columns(raw: Raw, name: str, kind: str) -> Raw:
    """The columns of `raw` that say nothing to its format, such as an id or a category. Those that would say something to another
    format are called ``source_...``.
    """
    if kind == "prompts":
        return {}  # they are columns of the prompt row
    watched = _Watched(raw)
    convert(name, watched, kind)
    known = KNOWN | known_columns()
    left = {column: value for column, value in raw.items() if column not in watched.seen}
    return {f"source_{column}" if column in known else column: value for column, value in left.items()}
