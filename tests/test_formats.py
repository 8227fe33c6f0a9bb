"""Every format on its sample in data/samples, and the spellings of real data."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

import align.formats
from align.data import load_rows
from align.errors import AlignError
from align.formats import formats
from align.intake.catalog import SetAside
from align.intake.kinds import GIVES, convert, detect, kind_of
from align.intake.layouts import documents, parting
from align.schema import KINDS, LabelledRow, PreferenceRow, SFTRow, validate
from align.turns import turns

SAMPLES = Path(__file__).parents[1] / "data" / "samples"

COUNTS = {
    "alpaca.jsonl": ("sft", 2, 0),
    "alpaca.preference.jsonl": ("preference", 1, 1),
    "alpaca.ranked.jsonl": ("preference", 1, 1),
    "alpaca.unpaired.jsonl": ("unpaired", 2, 0),
    "choices.columns.jsonl": ("prompts", 1, 0),
    "choices.jsonl": ("prompts", 2, 0),
    "dolly.jsonl": ("sft", 2, 0),
    "graded.jsonl": ("unpaired", 2, 0),
    "hh.jsonl": ("preference", 2, 1),
    "implicit.jsonl": ("preference", 2, 0),
    "judged.jsonl": ("preference", 2, 1),
    "labelled.jsonl": ("classification", 2, 0),
    "labelled.tsv": ("classification", 3, 0),
    "native.preference.jsonl": ("preference", 2, 0),
    "native.prompts.jsonl": ("prompts", 2, 0),
    "native.sft.jsonl": ("sft", 2, 0),
    "native.unpaired.jsonl": ("unpaired", 2, 0),
    "oasst.jsonl": ("preference", 2, 1),
    "openai.jsonl": ("sft", 3, 0),
    "openai.parts.jsonl": ("sft", 3, 0),
    "openai.preference.jsonl": ("preference", 1, 0),
    "openai.unpaired.jsonl": ("unpaired", 2, 0),
    "qa.jsonl": ("sft", 1, 0),
    "questions.jsonl": ("prompts", 2, 0),
    "saferlhf.jsonl": ("preference", 1, 0),
    "scored.jsonl": ("preference", 1, 1),
    "scored.nested.jsonl": ("preference", 1, 0),
    "self_instruct.jsonl": ("sft", 2, 0),
    "sharegpt.jsonl": ("sft", 2, 0),
    "sharegpt.preference.jsonl": ("preference", 2, 0),
    "sharegpt.tools.jsonl": ("sft", 2, 0),
    "squad.json": ("qa", 2, 0),
    "squad.jsonl": ("qa", 2, 0),
    "stack_exchange.jsonl": ("preference", 1, 0),
    "svamp.jsonl": ("prompts", 2, 0),
    "tagged.conll": ("tagging", 2, 0),
    "tagged.jsonl": ("tagging", 2, 0),
    "text.jsonl": ("text", 2, 0),
    "text.txt": ("text", 3, 0),
    "ultrafeedback.jsonl": ("preference", 2, 0),
}
"""For each sample: the kind of its rows, how many are used, how many set aside. The format is the first part of its name."""


ALONE = ("native.unpaired.jsonl", "openai.unpaired.jsonl")
"""Samples with one labelled answer to each prompt, which make no pairs."""


def said(messages: Any) -> list[tuple[str, str]]:
    """Messages as (role, content) pairs."""
    return [(message.role, message.content) for message in messages]


def sample(name: str, kind: str | None = None) -> list[Any]:
    return load_rows(SAMPLES / name, kind or COUNTS[name][0]).rows


def test_every_format_has_a_sample_and_every_sample_is_listed() -> None:
    assert {path.name for path in SAMPLES.iterdir()} == {*COUNTS, "answers.jsonl"}
    assert {name.split(".")[0] for name in COUNTS} == set(formats) - {"answers"}


@pytest.mark.parametrize("name", COUNTS)
def test_sample(name: str) -> None:
    kind, used, set_aside = COUNTS[name]
    for choice in (None, name.split(".")[0]):
        loaded = load_rows(SAMPLES / name, kind, format=choice)
        assert (loaded.format, len(loaded.rows), len(loaded.set_aside)) == (name.split(".")[0], used, set_aside)
        assert all(type(row) is KINDS[kind] for row in loaded.rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", COUNTS)
def test_every_sample_as_every_kind(name: str, kind: str) -> None:
    """A file gives exactly the kinds that follow from its own; for the others the error says which it can give."""
    gives = GIVES[COUNTS[name][0]]
    if kind == "preference" and name in ALONE:
        with pytest.raises(AlignError, match="no answer with the other label to the same prompt"):
            sample(name, kind)
    elif kind in gives:
        assert sample(name, kind)
    else:
        with pytest.raises(AlignError, match=f"{name} row 1, column.*; no {kind} row; .*, good for {' or '.join(gives)}; mend"):
            load_rows(SAMPLES / name, kind)


def test_alpaca() -> None:
    first, second = sample("alpaca.jsonl")
    assert said(first.messages) == [("user", "Translate to German.\n\nGood morning"), ("assistant", "Guten Morgen")]
    assert [role for role, _ in said(second.messages)] == ["system", "user", "assistant", "user", "assistant"]
    assert said(second.messages)[-2:] == [("user", "And the evening?"), ("assistant", "Guten Abend")]


def test_alpaca_ranked_takes_best_and_worst() -> None:
    (row,) = sample("alpaca.ranked.jsonl")
    assert (row.chosen[0].content, row.rejected[0].content) == ("Lentil soup with cumin.", "I do not know.")


def test_sharegpt_tools() -> None:
    called, plain = sample("sharegpt.tools.jsonl")
    assert [message.role for message in called.messages] == ["user", "assistant", "tool", "assistant"]
    assert called.messages[1].tool_calls == [
        {"type": "function", "function": {"name": "get_weather", "arguments": {"town": "Bergen"}}}
    ]
    assert called.tools[0]["function"]["name"] == "get_weather"
    assert plain.tools is None


def test_sharegpt_preference_as_message_or_string() -> None:
    first, second = sample("sharegpt.preference.jsonl")
    assert said(first.prompt) == [("system", "Be kind."), ("user", "I lost my keys.")]
    assert said(first.rejected) == [("assistant", "Careless.")]
    assert said(second.rejected) == [("assistant", "不知道。")]


def test_openai() -> None:
    _, called, no_user = sample("openai.jsonl")
    assert called.messages[1].content == ""
    assert [call["function"]["arguments"] for call in called.messages[1].tool_calls] == [{"town": "Oslo"}, {"town": "Bergen"}]
    assert [message.tool_call_id for message in called.messages] == [None, None, "c1", "c2", None]
    assert said(no_user.messages) == [("system", "You are a parrot."), ("assistant", "Squawk!")]


def test_openai_parts_and_weights() -> None:
    reasoned, called, last_only = sample("openai.parts.jsonl")
    assert said(reasoned.messages)[1] == ("assistant", "<think>\nSix sevens are forty-two.\n</think>\n\n42")
    assert called.messages[1].tool_calls[0]["function"]["arguments"] == {"town": "Oslo"}
    assert last_only.messages is None
    assert said(last_only.prompt)[-1] == ("user", "Two?")
    assert said(last_only.completion) == [("assistant", "2")]


def test_weights_that_no_row_can_say_are_refused() -> None:
    weighed = [{"role": "user", "content": "a", "weight": 1}, {"role": "assistant", "content": "b"}]
    with pytest.raises(AlignError, match=r"field messages: got \[1, 1\], expected loss weights of 1 on every assistant turn"):
        convert("openai", {"messages": weighed}, "sft")


def test_hh_prompt_is_the_common_beginning() -> None:
    first, second = sample("hh.jsonl")
    assert [role for role, _ in said(first.prompt)] == ["user", "assistant", "user"]
    assert said(first.chosen) == [("assistant", "Five minutes.")]
    assert said(second.prompt) == [("user", "He said Human: is a tag. Is it?")]  # the bare word does not start a turn
    assert said(second.rejected) == [("assistant", "")]


def test_hh_where_one_reply_has_a_turn_more() -> None:
    """Real (row 853 of harmless-base): they part at the assistant's turn, and one has a second assistant turn behind it."""
    start = "\n\nHuman: What is a drag king?\n\nAssistant:"
    raw = {"chosen": f"{start} A performer.\n\nAssistant: On a stage.", "rejected": f"{start} No idea."}
    (fields,) = convert("hh", raw, "preference")
    assert isinstance(fields, dict)
    assert [message["content"] for message in fields["chosen"]] == ["A performer.", "On a stage."]
    assert len(fields["prompt"]) == 1


def test_hh_that_part_at_a_question_are_set_aside() -> None:
    raw = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: x\n\nAssistant: d",
    }
    assert convert("hh", raw, "preference") == [SetAside("chosen and rejected part before the last reply")]


def test_ultrafeedback_margin_is_the_difference_of_scores() -> None:
    assert [row.margin for row in sample("ultrafeedback.jsonl")] == [5.5, 0.0]
    (row, _) = sample("ultrafeedback.jsonl")
    assert (said(row.prompt), said(row.chosen)) == ([("user", "Name a bird.")], [("assistant", "The wren.")])


def test_ultrafeedback_without_a_prompt_column() -> None:
    """As in trl-lib/ultrafeedback_binarized."""
    raw = json.loads((SAMPLES / "ultrafeedback.jsonl").read_text().splitlines()[0])
    del raw["prompt"]
    assert detect(raw, "preference") == "ultrafeedback"
    assert convert("ultrafeedback", raw, "preference")[0]["margin"] == 5.5  # type: ignore[index]


def test_oasst_pairs_at_every_ranked_node() -> None:
    first, second = sample("oasst.jsonl")
    assert (first.chosen[0].content, first.rejected[0].content) == ("Take a walk.", "Sleep.")
    assert [content for _, content in said(second.prompt)] == ["How do I stay awake?", "Take a walk.", "It is raining."]


def test_judged_and_labelled_choices() -> None:
    assert [row.chosen[0].content for row in sample("judged.jsonl")] == ["Mars", "Vega"]
    assert sample("saferlhf.jsonl")[0].chosen[0].content == "A locksmith can teach you."
    assert [row.label for row in sample("graded.jsonl")] == [False, True]


def test_texts_without_a_prompt_share_whole_words() -> None:
    row = sample("implicit.jsonl")[0]
    assert (row.prompt, row.chosen, row.rejected) == ("The sea is", " blue today.", " because.")
    long = "\u6d77" * 40_000 + " "  # a text without spaces took seconds a row, and four times as long when twice as long
    began = time.process_time()
    (fields,) = formats["implicit"]({"chosen": f"{long}a b", "rejected": f"{long}a c"})
    assert time.process_time() - began < 2
    assert fields == {"prompt": f"{long}a", "chosen": " b", "rejected": " c"}


def test_prompts_keep_the_other_columns() -> None:
    assert [row.columns for row in sample("native.prompts.jsonl")] == [{"answer": "1 2 3"}, {"answer": "3"}]
    assert sample("qa.jsonl", "prompts")[0].columns == {"answer": "4*3=<<4*3=12>>12\n#### 12"}
    assert said(sample("questions.jsonl")[1].prompt) == [("user", "Sort three numbers.")]
    assert len(sample("graded.jsonl", "prompts")) == 1  # one question, though two solutions


def test_derived_rows() -> None:
    (row, *_) = sample("native.preference.jsonl", "sft")
    assert row == SFTRow(prompt="Name a fruit:", completion=" apple")
    both = sample("native.preference.jsonl", "unpaired")[:2]
    assert both == [
        LabelledRow(prompt="Name a fruit:", completion=f" {reply}", label=good)
        for reply, good in (("apple", True), ("granite", False))
    ]
    assert said(sample("sharegpt.tools.jsonl", "prompts")[0].prompt)[-1] == ("tool", '{"sky": "rain"}')
    assert isinstance(sample("alpaca.preference.jsonl")[0], PreferenceRow)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            [{"from": "humann", "value": "x"}],
            "field c[0].from: got 'humann', expected 'human', 'gpt', 'system', 'function_call' or 'observation' "
            "(did you mean 'human'?)",
        ),
        ([{"role": "user", "contnet": "x"}], "field c[0].content: missing; found role, contnet (did you mean 'content'?)"),
        ([{"role": "user", "content": None}], "field c[0].content: got None, expected a string"),
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "field c[0].content[0]: got {'type': 'image'}, expected a text, reasoning or tool_call part",
        ),
        (["hello"], "field c[0]: got 'hello', expected a message: a dictionary with role and content"),
        ("hello", "field c: got 'hello', expected a list of messages"),
    ],
)
def test_malformed_turns_are_named_by_their_place_in_the_file(raw: Any, message: str) -> None:
    with pytest.raises(AlignError) as caught:
        turns(raw, "c")
    assert str(caught.value) == message


def test_roles_in_other_words() -> None:
    found = turns([{"role": role, "content": "x"} for role in ("developer", "prompter", "bot", "function")], "c")
    assert [message["role"] for message in found] == ["system", "user", "assistant", "tool"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\nb\n<|endoftext|>\nc\n\nd", [(1, "a\nb", 3), (4, "c\n\nd", 3)]),
        ("a<|endoftext|>b\nc<|endoftext|>\n", [(1, "a", 0), (1, "b\nc", 2)]),
        (" \na\n \nb c\n\n\n", [(2, "a", 3), (4, "b c", 3)]),
        ("one article\nanother\n", [(1, "one article", 1), (2, "another", 1)]),
        ("\n\none\ntwo\n\n", [(3, "one", 3), (4, "two", 2)]),
        ("\n \n", []),
        ("", []),
    ],
)
def test_documents_and_the_lines_they_take_up(content: str, expected: list[tuple[int, str, int]]) -> None:
    """Documents are parted by the marker, else by blank lines between others, else by the ends of lines; every line is counted."""
    lines = content.splitlines(keepends=True)
    found = list(documents(lines, parting(lines)))
    assert found == expected
    assert not found or sum(taken for _, _, taken in found) == len(lines)


def test_the_examples_of_the_documentation_are_of_their_format() -> None:
    """Each format has a heading in docs/data.md, and under it rows that are recognized and load as some kind."""
    page = (SAMPLES.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^### (\w+)\n(?:(?!```).*\n)*```jsonl\n((?:.*\n)*?)```", page, flags=re.MULTILINE)
    assert [name for name, _ in examples] == re.findall(r"^### (\w+)", page, flags=re.MULTILINE)
    assert {name for name, _ in examples} == set(formats)
    for name, rows in examples:
        for raw in map(json.loads, rows.splitlines()):
            fields = formats[name](raw)[0]
            assert detect(raw, "sft") == name
            assert isinstance(fields, SetAside if name == "answers" else dict)
            if isinstance(fields, dict):
                shown = {key: value for key, value in fields.items() if key != "columns" or kind_of(fields) == "prompts"}
                validate(kind_of(fields), shown)


def test_the_documented_way_to_add_a_format() -> None:
    page = (SAMPLES.parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(@data_format.*?)```", page, flags=re.DOTALL)
    exec(code, vars(align.formats).copy())
    raw = {"query": "q", "good": "a", "bad": "b"}
    try:
        assert detect(raw, "preference") == "my_pairs"
        (fields,) = convert("my_pairs", raw, "prompts")
        assert fields == {"prompt": [{"role": "user", "content": "q"}], "columns": {"good": "a", "bad": "b"}}
    finally:
        formats._entries.pop("my_pairs")
