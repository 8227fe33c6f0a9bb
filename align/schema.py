"""The rows every stage speaks. A row that has passed `validate` needs no second look further in.

``python -m align.schema [folder]`` writes the JSON schemas of the rows (to ``data/schemas`` by default).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from align.errors import AlignError, near_miss


def _encodable(text: str) -> str:
    """`text`, unless it holds half of a surrogate pair: JSON can write that down, UTF-8 and every tokenizer refuse it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PydanticCustomError("text", "a string without unpaired surrogates") from error
    return text


def _encodable_inside(value: dict[str, Any]) -> dict[str, Any]:
    """`value`, unless a string somewhere in it is none that `_encodable` lets pass."""
    _encodable(json.dumps(value, ensure_ascii=False, default=str))
    return value


def _filled(name: str) -> str:
    """`name`, unless it is blank, as is the cell of a table that somebody left empty."""
    if not name.strip():
        raise PydanticCustomError("text", "a name that is not empty")
    return name


String = Annotated[str, AfterValidator(_encodable)]
Name = Annotated[String, AfterValidator(_filled)]
Object = Annotated[dict[str, Any], AfterValidator(_encodable_inside)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, cache_strings="keys")


class Message(_Strict):
    """One turn. Unknown keys are refused here; the adapters in `align.formats` drop those that published formats carry."""

    role: Literal["system", "user", "assistant", "tool"]
    content: String
    """May be empty: real data has empty replies. Null is read as empty, where there are tool calls."""
    tool_calls: list[Object] | None = None
    """``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` each."""
    tool_call_id: String | None = None
    name: String | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_content(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("content") is None and raw.get("tool_calls"):
            return {**raw, "content": ""}
        return raw


def _shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<messages>" if isinstance(value, list) else None


Text = Annotated[Annotated[String, Tag("<text>")] | Annotated[list[Message], Tag("<messages>")], Discriminator(_shape)]
"""Raw text, or messages that go through the chat template."""


SPOKEN = ("prompt", "completion", "chosen", "rejected")
"""Fields that are all strings, or all lists of messages, within a row."""


class Row(_Strict):
    """What all kinds have in common: the checks between fields."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Row:
        texts = {name: value for name in SPOKEN if (value := self.__dict__.get(name)) is not None}
        if all(type(value) is str for value in texts.values()):
            return self
        shapes = {name: "a string" if isinstance(value, str) else "a list of messages" for name, value in texts.items()}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{name} is {shape}" for name, shape in shapes.items())
            raise ValueError(f"{found}; expected all strings or all lists of messages")
        for name, value in texts.items():
            if isinstance(value, list) and name == "prompt":
                _check_prompt(value)
            elif isinstance(value, list):
                _check_reply(name, value)
        return self


def _check_prompt(messages: list[Message]) -> None:
    if not messages:
        raise ValueError(problem("prompt", [], "at least one message"))
    if messages[-1].role == "assistant":
        raise ValueError(
            problem(f"prompt[{len(messages) - 1}].role", "assistant", "a prompt that ends before the assistant's turn")
        )


def _check_reply(name: str, messages: list[Message]) -> None:
    if not messages:
        raise ValueError(problem(name, [], "at least one message"))
    for i, message in enumerate(messages):
        if message.role not in ("assistant", "tool"):
            raise ValueError(problem(f"{name}[{i}].role", message.role, "'assistant' or 'tool': the rest belongs to the prompt"))
    if messages[-1].role != "assistant":
        raise ValueError(problem(f"{name}[{len(messages) - 1}].role", messages[-1].role, "a reply that ends with the assistant"))


class TextRow(Row):
    """A document for pretraining."""

    text: String


class SFTRow(Row):
    """A demonstration: a whole conversation in `messages`, or a `prompt` and its `completion`."""

    messages: list[Message] | None = None
    prompt: Text | None = None
    completion: Text | None = None
    tools: list[Object] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> SFTRow:
        given = [name for name in ("messages", "prompt", "completion") if getattr(self, name) is not None]
        if given not in (["messages"], ["prompt", "completion"]):
            raise ValueError(f"fields {', '.join(given) or 'none'}: expected either messages, or prompt and completion")
        if self.messages is not None and all(message.role != "assistant" for message in self.messages):
            raise ValueError(problem("messages", [m.role for m in self.messages], "at least one assistant message to learn from"))
        return self


class PreferenceRow(Row):
    """Two replies to one prompt. `margin`, where given, is how much better the chosen one was scored."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None
    tools: list[Object] | None = None


class PromptRow(Row):
    """A prompt to sample from. `columns` holds what else the row had, for reward functions."""

    prompt: Text
    columns: dict[str, Any] = Field(default_factory=dict)
    tools: list[Object] | None = None


class LabelledRow(Row):
    """A reply judged by itself: wanted (true) or not."""

    prompt: Text
    completion: Text
    label: bool
    tools: list[Object] | None = None


class LabelledText(Row):
    """A text and its class, for classification. Classes are names: 1 is read as "1"."""

    text: String
    label: Name


class TaggedTokens(Row):
    """The words of a sentence and a tag for each, for token classification (BIO, IOB1 ...: as published)."""

    tokens: list[String]
    tags: list[Name]

    @model_validator(mode="after")
    def _a_tag_for_each(self) -> TaggedTokens:
        if not self.tokens:
            raise ValueError(problem("tokens", [], "at least one token"))
        if len(self.tokens) != len(self.tags):
            raise ValueError(f"field tags: got {len(self.tags)} tags, expected one for each of the {len(self.tokens)} tokens")
        return self


class QARow(Row):
    """A question about a context, and every accepted answer: none says that the context does not answer it."""

    question: String
    context: String = ""
    answers: list[String] = Field(default_factory=list)
    starts: list[int] | None = None
    """Where each answer begins in the context, in characters."""

    @model_validator(mode="after")
    def _a_start_for_each(self) -> QARow:
        if self.starts is not None and len(self.starts) != len(self.answers):
            raise ValueError(
                f"field starts: got {len(self.starts)} starts, expected one for each of the {len(self.answers)} answers"
            )
        return self


KINDS: dict[str, type[Row]] = {
    "text": TextRow,
    "sft": SFTRow,
    "preference": PreferenceRow,
    "prompts": PromptRow,
    "unpaired": LabelledRow,
    "classification": LabelledText,
    "tagging": TaggedTokens,
    "qa": QARow,
}


def row_class(kind: str) -> type[Row]:
    """The class of the rows of `kind`.

    Raises:
        AlignError: there is no such kind.
    """
    if kind not in KINDS:
        raise AlignError(f"unknown kind of rows {kind!r}{near_miss(kind, KINDS)}; known: {', '.join(KINDS)}")
    return KINDS[kind]


def validate(kind: str, raw: dict[str, Any]) -> Row:
    """The row that `raw` describes.

    Raises:
        AlignError: it is not one of `kind`. One line: the field, what was there, what was expected.
    """
    try:
        return row_class(kind).model_validate(raw)
    except ValidationError as error:
        raise AlignError(_explain(error.errors(include_url=False)[0])) from None


def problem(path: str, got: Any, expected: str) -> str:
    """``field chosen[0].role: got 'assitant', expected ...``: the one way to say that a value is wrong."""
    return f"field {path}: got {short(got)}, expected {expected}"


def short(value: Any) -> str:
    """The repr of `value`, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}"


def label_name(value: Any) -> str:
    """What a class or an answer is called: a number as it is written (51.0 as 51, in a table, too), anything else as it is."""
    if isinstance(value, str):
        return re.sub(r"^(-?\d+)\.0+$", r"\1", value)
    return str(math.floor(value)) if isinstance(value, Real) and value == value // 1 else str(value)


def missing(name: str, found: Iterable[str]) -> str:
    """``missing; found contnet (did you mean 'content'?)``: what there is instead of the key `name`."""
    hints = (f"{key} (did you mean {name!r}?)" if near_miss(name, [key]) else key for key in found)
    return f"missing; found {', '.join(hints) or 'nothing'}"


_EXPECTED = {
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a dictionary",
    "model_type": "a message: a dictionary with role and content",
    "bool_type": "true or false",
    "float_type": "a number",
    "int_type": "a whole number",
    "finite_number": "a finite number",
    "union_tag_not_found": "a string or a list of messages",
}


def _explain(error: ErrorDetails) -> str:
    """One pydantic error as ``field <path>: got ..., expected ...``."""
    context = error.get("ctx", {})
    if error["type"] == "value_error":  # raised by the checks above, which speak for themselves
        return str(context["error"])
    path = _path(error["loc"])
    if error["type"] == "missing":
        return f"field {path}: {missing(str(error['loc'][-1]), error['input'])}"
    if error["type"] == "extra_forbidden":
        return f"field {path}: unknown key (holds {short(error['input'])})"
    return problem(path, error["input"], context.get("expected") or _EXPECTED.get(error["type"], error["msg"]))


def _path(location: tuple[int | str, ...]) -> str:
    """``('chosen', '<messages>', 0, 'role')`` -> ``chosen[0].role``."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path or "row"


def json_schema(kind: str) -> str:
    """The JSON schema of the rows of `kind`, as the text of its file."""
    return json.dumps(row_class(kind).model_json_schema(), indent=2) + "\n"


def main(folder: str = "data/schemas") -> None:
    """Write the JSON schema of every kind to `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        Path(folder, f"{kind}.json").write_text(json_schema(kind), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
