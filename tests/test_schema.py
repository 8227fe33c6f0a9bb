"""The rows: what is accepted, and what is said about what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from align.errors import AlignError
from align.schema import KINDS, LabelledRow, PreferenceRow, PromptRow, SFTRow, json_schema, validate

SCHEMAS = Path(__file__).parents[1] / "data" / "schemas"
USER = {"role": "user", "content": "q"}
BOT = {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("text", {"text": ""}),
        ("sft", {"messages": [USER, BOT]}),
        ("sft", {"messages": [{"role": "system", "content": "s"}, BOT]}),  # published: a conversation without a user turn
        ("sft", {"messages": [USER, USER, BOT, BOT]}),  # published: two turns of one role
        ("sft", {"messages": [USER, {"role": "assistant", "content": ""}]}),  # published: an empty reply
        ("sft", {"prompt": "p", "completion": "c"}),
        ("sft", {"prompt": [USER, CALL, TOOL], "completion": [BOT], "tools": [{"type": "function"}]}),
        ("preference", {"prompt": "p", "chosen": "", "rejected": "r", "margin": 1}),
        ("preference", {"prompt": [USER], "chosen": [CALL, TOOL, BOT], "rejected": [BOT]}),
        ("prompts", {"prompt": [USER], "columns": {"answer": 42.0, "kwargs": [{}, {"n": 3}]}}),
        ("unpaired", {"prompt": "p", "completion": "c", "label": False}),
        ("classification", {"text": "", "label": "good"}),
        ("tagging", {"tokens": ["Ada", "sat"], "tags": ["B-PER", "O"]}),
        ("qa", {"question": "q"}),
        ("qa", {"question": "q", "context": "c", "answers": ["c", "c"], "starts": [0, 0]}),
    ],
)
def test_accepted(kind: str, raw: dict[str, Any]) -> None:
    row = validate(kind, raw)
    assert type(row) is KINDS[kind]
    assert type(row).model_validate(row.model_dump()) == row


@pytest.mark.parametrize(
    ("kind", "raw", "message"),
    [
        (
            "preference",
            {"prompt": [USER], "chosen": [{"role": "assitant", "content": "a"}], "rejected": [BOT]},
            "field chosen[0].role: got 'assitant', expected 'system', 'user', 'assistant' or 'tool'",
        ),
        (
            "preference",
            {"prompt": "p", "chosen": [BOT], "rejected": "r"},
            "prompt is a string, chosen is a list of messages, rejected is a string; expected all strings or all lists of messages",
        ),
        ("classification", {"text": "t", "label": " "}, "field label: got ' ', expected a name that is not empty"),
        ("tagging", {"tokens": ["t"], "tags": [""]}, "field tags[0]: got '', expected a name that is not empty"),
        ("tagging", {"tokens": [], "tags": []}, "field tokens: got [], expected at least one token"),
        (
            "tagging",
            {"tokens": ["t", "u"], "tags": ["O"]},
            "field tags: got 1 tags, expected one for each of the 2 tokens",
        ),
        ("qa", {"question": "q", "answers": ["a"], "starts": ["0"]}, "field starts[0]: got '0', expected a whole number"),
        (
            "qa",
            {"question": "q", "answers": ["a"], "starts": []},
            "field starts: got 0 starts, expected one for each of the 1 answers",
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "c", "rejectd": "r"},
            "field rejected: missing; found prompt, chosen, rejectd (did you mean 'rejected'?)",
        ),
        (
            "preference",
            {"prompt": [USER, BOT], "chosen": [BOT], "rejected": [BOT]},
            "field prompt[1].role: got 'assistant', expected a prompt that ends before the assistant's turn",
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [], "rejected": [BOT]},
            "field chosen: got [], expected at least one message",
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [BOT], "rejected": [USER, BOT]},
            "field rejected[0].role: got 'user', expected 'assistant' or 'tool': the rest belongs to the prompt",
        ),
        (
            "preference",
            {"prompt": [USER], "chosen": [CALL, TOOL], "rejected": [BOT]},
            "field chosen[1].role: got 'tool', expected a reply that ends with the assistant",
        ),
        (
            "preference",
            {"prompt": "p", "chosen": "c", "rejected": "r", "margin": float("nan")},
            "field margin: got nan, expected a finite number",
        ),
        ("prompts", {"prompt": []}, "field prompt: got [], expected at least one message"),
        ("prompts", {"prompt": 3}, "field prompt: got 3, expected a string or a list of messages"),
        (
            "sft",
            {"messages": [USER]},
            "field messages: got ['user'], expected at least one assistant message to learn from",
        ),
        (
            "sft",
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "field messages[1].content: got None, expected a string",
        ),
        (
            "sft",
            {"messages": [USER, BOT], "prompt": "p"},
            "fields messages, prompt: expected either messages, or prompt and completion",
        ),
        ("sft", {}, "fields none: expected either messages, or prompt and completion"),
        (
            "sft",
            {"messages": [USER, {**BOT, "tone": "kind"}]},
            "field messages[1].tone: unknown key (holds 'kind')",
        ),
        (
            "unpaired",
            {"prompt": "p", "completion": "c", "label": 1},
            "field label: got 1, expected true or false",
        ),
        (
            "text",
            {"text": "a\ud83d"},
            r"field text: got 'a\ud83d', expected a string without unpaired surrogates",
        ),
        (
            "sft",
            {"messages": [USER, BOT], "tools": [{"type": "function", "function": {"name": "f", "description": "\ud83d"}}]},
            r"field tools[0]: got {'type': 'function', 'function': {'name'...on': '\ud83d'}}, expected "
            "a string without unpaired surrogates",
        ),
        (
            "sft",
            {"messages": [{**CALL, "tool_calls": [{"id": "\ud83d"}]}]},
            r"field messages[0].tool_calls[0]: got {'id': '\ud83d'}, expected "
            "a string without unpaired surrogates",
        ),
        (
            "prefrence",
            {},
            "unknown kind of rows 'prefrence' (did you mean 'preference'?); known: text, sft, preference, prompts, unpaired, "
            "classification, tagging, qa",
        ),
    ],
)
def test_refused_in_one_line(kind: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(AlignError) as caught:
        validate(kind, raw)
    assert str(caught.value) == message


def test_long_values_are_shortened() -> None:
    with pytest.raises(AlignError) as caught:
        validate("sft", {"messages": "x" * 100_000})
    assert len(str(caught.value)) < 140


def test_null_content_beside_tool_calls_is_empty() -> None:
    row = validate("sft", {"messages": [USER, CALL, TOOL, BOT]})
    assert isinstance(row, SFTRow)
    assert row.messages is not None
    assert row.messages[1].content == ""


def test_rows_are_frozen() -> None:
    row = PromptRow(prompt="p")
    with pytest.raises(ValueError, match="frozen"):
        row.prompt = "q"  # type: ignore[misc]


def test_rows_built_in_code_meet_the_same_checks() -> None:
    assert PreferenceRow(prompt="p", chosen="c", rejected="r").margin is None
    with pytest.raises(ValueError, match="all strings or all lists"):
        LabelledRow(prompt="p", completion=[], label=True)


@pytest.mark.parametrize("kind", KINDS)
def test_written_schemas_are_current(kind: str) -> None:
    """On failure: ``python -m align.schema`` and look at the difference."""
    assert (SCHEMAS / f"{kind}.json").read_text(encoding="utf-8") == json_schema(kind)


def test_no_schema_is_left_over() -> None:
    assert {path.stem for path in SCHEMAS.glob("*.json")} == set(KINDS)
    assert json.loads((SCHEMAS / "preference.json").read_text())["required"] == ["prompt", "chosen", "rejected"]
