"""Views and conversions: what is counted, what is shown, and that a row that goes to another format and back is the same row."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from align.cli import main
from align.data import load_rows, write_rows
from align.errors import AlignError
from align.intake.writers import other_columns, writers, written
from align.schema import PreferenceRow, PromptRow, SFTRow, validate

SAMPLES = Path(__file__).parents[1] / "data" / "samples"


def raw_rows(path):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file if line.strip()]


# -- there and back ------------------------------------------------------------------------------------------------------------

THERE = {
    "alpaca.jsonl": ("sft", ("openai", "sharegpt", "alpaca", "native")),
    "alpaca.preference.jsonl": ("preference", ("openai", "sharegpt", "hh", "ultrafeedback")),
    "openai.jsonl": ("sft", ("openai", "native")),
    "openai.parts.jsonl": ("sft", ("openai", "native")),
    "openai.unpaired.jsonl": ("unpaired", ("openai", "sharegpt", "native")),
    "native.prompts.jsonl": ("prompts", ("native",)),
    "sharegpt.tools.jsonl": ("sft", ("sharegpt", "openai")),
    "sharegpt.preference.jsonl": ("preference", ("openai", "ultrafeedback", "native")),
    "ultrafeedback.jsonl": ("preference", ("openai", "sharegpt", "alpaca", "ultrafeedback")),
    "text.jsonl": ("text", ("text", "native")),
    "labelled.jsonl": ("classification", ("native",)),
    "tagged.jsonl": ("tagging", ("native",)),
    "squad.jsonl": ("qa", ("native",)),
}


@pytest.mark.parametrize(("name", "kind", "to"), [(name, kind, to) for name, (kind, all_of) in THERE.items() for to in all_of])
def test_samples_there_and_back(tmp_path, name, kind, to):
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(SAMPLES / name), "--to", to, "--out", str(out)]) == 0
    assert load_rows(out, kind).rows == load_rows(SAMPLES / name, kind).rows
    back = tmp_path / "back.jsonl"
    assert main(["data", "convert", str(out), "--to", "native", "--out", str(back), "--kind", kind]) == 0
    assert load_rows(back, kind).rows == load_rows(SAMPLES / name, kind).rows


REAL_THERE = {
    "sft/alpaca_en_demo.jsonl": ("sft", "sharegpt"),
    "sft/oaast_sft_zh.jsonl": ("sft", "openai"),
    "sft/fastchat_dummy_conversation.jsonl": ("sft", "openai"),
    "sft/glaive_toolcall_en_demo.jsonl": ("sft", "openai"),
    "sft/reason_tool_use_demo_50.jsonl": ("sft", "openai"),
    "sft/v1_sft_demo.jsonl": ("sft", "alpaca"),
    "sft/litgpt_dolly_fixture.jsonl": ("sft", "alpaca"),
    "pref/hh_rlhf_harmless_base_test.jsonl.gz": ("preference", "openai"),
    "pref/dpo_en_demo.jsonl": ("preference", "ultrafeedback"),
    "pref/ultrafeedback_messages_sample.jsonl": ("preference", "sharegpt"),
    "kto/kto_en_demo.jsonl": ("unpaired", "sharegpt"),
    "rlvr/ifeval_input_data.jsonl": ("prompts", "native"),
    "rlvr/gsm8k_test.jsonl": ("sft", "alpaca"),
    "qa/xquad_zh.json": ("qa", "native"),
}


@pytest.mark.parametrize("name", REAL_THERE)
def test_real_files_there_and_back(tmp_path, real, name):
    """Every row comes back as it was, and every column that says nothing to the format is carried along."""
    kind, to = REAL_THERE[name]
    out = tmp_path / "out.jsonl"
    arguments = ["--to", to, "--out", str(out), "--kind", kind, "--on_bad_row", "quarantine"]
    assert main(["data", "convert", str(real / name), *arguments]) == 0
    before, after = load_rows(real / name, kind).rows, load_rows(out, kind).rows
    aside = tmp_path / "out.quarantine.jsonl"
    refused = len(raw_rows(aside)) if aside.exists() else 0
    assert len(after) + refused == len(before)
    # What is refused: in HH and oaast, two turns of one role, or two answers in a row, which pairs of messages cannot say.
    assert refused <= 1
    if refused:
        assert all(row in before for row in after)
    else:
        assert after == before
    if not name.endswith((".json", ".gz")) and kind != "prompts" and not refused:
        for one, other in zip(raw_rows(real / name), raw_rows(out), strict=True):
            kept = other_columns(one, load_rows(real / name, kind, limit=1).format, kind)
            assert {column: other[column] for column in kept} == kept


def test_other_columns_are_carried_along(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"id": 7, "instruction": "Say one.", "input": "", "output": "One.", "topic": ["x"]}])
    out = tmp_path / "out.jsonl"
    assert main(["data", "convert", str(tmp_path / "a.jsonl"), "--to", "openai", "--out", str(out)]) == 0
    (row,) = raw_rows(out)
    assert (row["id"], row["topic"]) == (7, ["x"])
    assert "instruction" not in row


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "kind", "to"),
    [
        (SFTRow(prompt="p", completion="c"), "sft", "openai"),
        (validate("sft", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2}), "sft", "hh"),
        (
            validate("sft", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [CALL]}]}),
            "sft",
            "alpaca",
        ),
        (
            validate(
                "sft",
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "so", "tool_calls": [CALL]}]},
            ),
            "sft",
            "sharegpt",
        ),
        (PreferenceRow(prompt="p", chosen="c", rejected="r"), "preference", "ultrafeedback"),
        (PromptRow(prompt="p"), "prompts", "alpaca"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(row, kind, to):
    with pytest.raises(AlignError, match=f"format '{to}' (cannot hold all of|has no place for)"):
        written(row, kind, to)


def test_a_row_that_cannot_be_held_is_named_or_set_aside(tmp_path, capsys):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, {"prompt": "p"}]
    rows[1] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}
    write_rows(tmp_path / "a.jsonl", rows)
    arguments = ["data", "convert", str(tmp_path / "a.jsonl"), "--to", "alpaca", "--out", str(tmp_path / "out.jsonl")]
    assert main(arguments) == 2
    assert "a.jsonl row 2, format 'alpaca'" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert main([*arguments, "--on_bad_row", "quarantine"]) == 0
    assert "2 rows = 1 used + 1 set aside" in capsys.readouterr().err
    assert len(raw_rows(tmp_path / "out.quarantine.jsonl")) == 1
    assert main([*arguments[:4], "alpaka", *arguments[5:]]) == 2
    assert "did you mean 'alpaca'" in capsys.readouterr().err


def test_a_conversion_of_nothing_leaves_an_older_file_alone(tmp_path, capsys):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    out.write_text("an older file\n")
    for content, why in (("", "it is empty"), ('{"prompt": "raw", "completion": "text"}\n', "has no place for")):
        path.write_text(content)
        assert main(["data", "convert", str(path), "--to", "openai", "--out", str(out), "--on_bad_row", "quarantine"]) == 2
        assert why in capsys.readouterr().err
        assert out.read_text() == "an older file\n"


def test_every_writer_is_of_a_format():
    from align.formats import formats

    assert set(writers) <= set(formats)


# -- check ---------------------------------------------------------------------------------------------------------------------


def test_check_prints_a_line_for_each_file(tmp_path, capsys):
    good, mixed, gone = tmp_path / "good.jsonl", tmp_path / "mixed.jsonl", tmp_path / "gone.jsonl"
    write_rows(good, [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3)
    write_rows(mixed, [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3 + [{"prompt": "p", "chosen": 3, "rejected": "b"}])
    assert main(["data", "check", str(good), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "file": str(good),
        "format": "native",
        "kind": "preference",
        "rows": 3,
        "used": 3,
        "set_aside": 0,
        "reasons": {},
    }
    aside = tmp_path / "aside.jsonl"
    assert main(["data", "check", str(good), str(mixed), "--json", "--quarantine", str(aside)]) == 1
    _, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert second["reasons"] == {"field chosen: expected a string": 1}
    assert (second["rows"], second["used"], second["set_aside"]) == (4, 3, 1)
    assert raw_rows(aside)[0]["row"] == 4
    assert main(["data", "check", str(good), "--quarantine", str(aside)]) == 0
    assert not aside.exists(), "that of an earlier run"
    for options in ([], ["--format", "native"]):
        capsys.readouterr()
        assert main(["data", "check", str(gone), *options]) == 2
        assert (said := capsys.readouterr()).out == "", "of what was never opened there is no account"
        assert said.err.startswith(f"align: {gone}: no such file or folder")
    assert main(["data", "check", str(good), str(gone)]) == 1
    assert "no such file" in capsys.readouterr().err
    (folder := tmp_path / "folder").mkdir()
    write_rows(folder / "a.jsonl", [{"prompt": "p", "completion": "a"}] * 3)
    write_rows(folder / "b.jsonl", [{"prompt": "p", "completion": "a"}])
    (folder / "c.json").write_text('{"a": [1,')
    assert main(["data", "check", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.out.endswith("4 rows = 4 used + 0 set aside; the rest was not read\n")
    assert "c.json line 1, column 10: invalid JSON" in said.err
    (cut := tmp_path / "cut.json").write_text('[{"prompt": "p", "completion": "a"},\n{"prompt": "q", ')
    assert main(["data", "check", str(cut)]) == 1
    assert capsys.readouterr().out.endswith("1 rows = 1 used + 0 set aside; the rest was not read\n")
    (noise := tmp_path / "noise.jsonl").write_bytes(b"\x93\xff\x00\xfe\n\x80\n")
    assert main(["data", "check", str(noise)]) == 2
    assert main(["data", "check", str(good), str(noise)]) == 1
    capsys.readouterr()
    assert main(["data", "check", str(good), "--kind", "sft"]) == 0
    assert main(["data", "check", str(good), "--kind", "text"]) == 1
    assert "good for preference or sft" in capsys.readouterr().out


# -- stats and show ------------------------------------------------------------------------------------------------------------


def test_stats(tmp_path, capsys):
    """Lengths of 1 to 10 characters: worked out by hand."""
    path, plot = tmp_path / "a.jsonl", tmp_path / "plots" / "a.png"
    write_rows(path, [{"prompt": "p" * i, "completion": "cc", "label": i % 5 == 0} for i in range(1, 11)])
    assert main(["data", "stats", str(path), "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lengths"]["prompt"] == {"mean": 5.5, "10%": 2, "50%": 6, "90%": 10, "max": 10}
    assert found["labels"] == {"false": 8, "true": 2}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["data", "stats", str(SAMPLES / "sharegpt.preference.jsonl")]) == 0
    page = capsys.readouterr().out
    assert "user turns" in page
    assert "chosen is longer" in page


def test_stats_of_conversations(tmp_path, capsys):
    """Of four rows one has a system turn, and the chosen answer is the longer one in three (of two equal ones it is not)."""
    asked = [{"role": "user", "content": "Say one."}]
    prompts = [
        [{"role": "system", "content": "Be brief."}, *asked],
        asked,
        [*asked, {"role": "assistant", "content": "1"}, *asked],
        asked,
    ]
    sides = [("One.", "1"), ("One.", "2"), ("One.", "3"), ("1", "2")]
    said = [[[{"role": "assistant", "content": text}] for text in both] for both in sides]
    rows = [{"prompt": prompt, "chosen": a, "rejected": b} for prompt, (a, b) in zip(prompts, said, strict=True)]
    write_rows(tmp_path / "a.jsonl", rows)
    assert main(["data", "stats", str(tmp_path / "a.jsonl"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shares"] == {"chosen is longer": 0.75, "has a system turn": 0.25}
    assert found["user_turns"] == {"1": 3, "2": 1}


@pytest.mark.parametrize(
    "command",
    [
        "convert sft.jsonl --to native --out disk/x.jsonl",
        "check pairs.jsonl --quarantine disk/x.jsonl",
        "stats sft.jsonl --plot disk/x.svg",
        "clean sft.jsonl --out disk/x.jsonl",
    ],
)
def test_a_full_disk_is_named_and_nothing_is_left_of_the_file(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sft.jsonl"), [{"prompt": f"Say {n}:", "completion": f" {n} of {n}"} for n in range(999)])
    write_rows(Path("pairs.jsonl"), [{"prompt": f"Say {n}:", "chosen": " one", "rejected": " one"} for n in range(999)])
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        assert main(["data", *command.split()]) == 2
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"align: error: the disk of {command.split()[-1]} is full (0 MB free); make room")


def test_stats_in_tokens(tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "a.jsonl", [{"text": "the cat sat"}])
    assert main(["data", "stats", str(tmp_path / "a.jsonl"), "--json", "--model", str(tmp_path / "model")]) == 0
    expected = len(tokenizer("the cat sat", add_special_tokens=False)["input_ids"])
    assert json.loads(capsys.readouterr().out)["lengths"]["text"]["max"] == expected


def test_show(tmp_path, capsys, tokenizer):
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["data", "show", str(SAMPLES / "sharegpt.preference.jsonl"), "--rows", "1"]) == 0
    page = capsys.readouterr().out
    assert "--- sharegpt.preference.jsonl row 1 (sharegpt, preference)" in page
    assert "[user] I lost my keys." in page
    assert (
        main(["data", "show", str(SAMPLES / "sharegpt.preference.jsonl"), "--rows", "1", "--model", str(tmp_path / "model")]) == 0
    )
    rendered = capsys.readouterr().out
    assert "<|eos|>" in rendered
    write_rows(tmp_path / "a.jsonl", [{"text": f"{i} \x1b[31mred"} for i in range(5)])
    assert main(["data", "show", str(tmp_path / "a.jsonl"), "--skip", "2", "--rows", "2"]) == 0
    page = capsys.readouterr().out
    assert ("2 \\x1b[31mred" in page, "0 \\x1b" in page, "\x1b" in page) == (True, False, False)


def test_what_utf8_cannot_write_is_printed_as_an_escape(tmp_path, capsys):
    """Half of a surrogate pair in a column that is not trained on, and in the name of one."""
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"prompt": "Hi", "note": "\ud83d"}] * 8 + [{"\ud83d": 1}])
    assert main(["data", "show", str(path), "--rows", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["columns"] == {"note": "\ud83d"}
    assert main(["data", "check", str(path)]) == 1
    assert "found \\ud83d" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows is at least 1"),
        (["--rows", "-1"], "--rows is at least 1"),
        (["--skip", "-1"], "--skip at least 0"),
        (["--skip", "5"], "--skip 5 leaves nothing to show of 5 rows"),
    ],
)
def test_nothing_to_show_is_one_line(tmp_path, capsys, arguments, said):
    write_rows(tmp_path / "a.jsonl", [{"text": str(i)} for i in range(5)])
    assert main(["data", "show", str(tmp_path / "a.jsonl"), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_rows_of_no_kind_are_told_without_one(tmp_path, capsys):
    (tmp_path / "words.jsonl").write_text("no JSON\n" * 5)
    assert main(["data", "show", str(tmp_path / "words.jsonl")]) == 2
    assert "words.jsonl: no rows that can be used: 5 rows = 0 used + 5 set aside (" in capsys.readouterr().err


def test_rows_of_another_kind_than_most_are_told(tmp_path, capsys):
    """Conversations that mostly have no answer were prompts, and the answers of the others went without a word."""
    asked = {"from": "human", "value": "Who?"}
    rows = [{"conversations": [asked]}] * 3 + [{"conversations": [asked, {"from": "gpt", "value": "Mina."}]}] * 2
    write_rows(tmp_path / "talks.jsonl", rows)
    said = "5 rows = 5 used + 0 set aside; among the used 2 sft rows as prompts"
    assert main(["data", "check", str(tmp_path / "talks.jsonl")]) == 0
    assert f"sharegpt, prompts: {said}\n" in capsys.readouterr().out
    assert main(["data", "convert", str(tmp_path / "talks.jsonl"), "--to", "native", "--out", str(tmp_path / "out.jsonl")]) == 0
    assert said in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "talks.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["derived"] == {"sft rows as prompts": 2}
    assert main(["data", "check", str(tmp_path / "talks.jsonl"), "--kind", "prompts"]) == 0  # asked for
    assert "5 rows = 5 used + 0 set aside\n" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "talks.jsonl"), "--kind", "sft"]) == 1
    assert "5 rows = 2 used + 3 set aside" in capsys.readouterr().out


def test_a_pair_of_two_rows_is_shown_where_it_was_completed(tmp_path, capsys):
    rows = [{"prompt": "q", "completion": text, "label": text == "good"} for text in ("good", "bad")]
    write_rows(tmp_path / "a.jsonl", rows)
    assert main(["data", "show", str(tmp_path / "a.jsonl"), "--kind", "preference"]) == 0
    assert "--- a.jsonl row 2 (" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['{"prompt": "p", "completion": "c"}\n', "[1]\n", "notes\n"])
def test_a_quarantine_does_not_take_the_place_of_another_file(tmp_path, capsys, text):
    """It was deleted, even where nothing was set aside."""
    write_rows(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c"}])
    other = tmp_path / "other.jsonl"
    other.write_text(text)
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--quarantine", str(other)]) == 2
    assert other.read_text() == text
    assert f"{other} holds something else than rows that were set aside" in capsys.readouterr().err
    other.write_text("")
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--quarantine", str(other)]) == 0


# -- derivations ---------------------------------------------------------------------------------------------------------------


def test_labels_make_pairs_across_rows(tmp_path):
    rows = [("q1", "good", True), ("q2", "alone", True), ("q1", "bad", False), ("q1", "worse", False), ("q1", "fine", True)]
    path = tmp_path / "a.jsonl"
    write_rows(path, [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in rows])
    loaded = load_rows(path, "preference")
    assert [(row.chosen, row.rejected) for row in loaded.rows] == [("good", "bad"), ("fine", "worse")]
    assert loaded.summary() == ("5 rows = 4 used + 1 set aside (1 no answer with the other label to the same prompt); they gave 2")
    limited = load_rows(path, "preference", limit=1)  # q2, which waited, was read and is in the account
    assert limited.summary() == (
        "3 rows = 2 used + 1 set aside (1 no answer with the other label to the same prompt before the limit); they gave 1"
    )
    again = tmp_path / "pairs.jsonl"
    write_rows(again, loaded.rows)
    assert [(row.completion, row.label) for row in load_rows(again, "unpaired").rows][:2] == [("good", True), ("bad", False)]
    assert [row.completion for row in load_rows(path, "sft").rows] == ["good", "alone", "fine"]


def test_scored_answers_make_pairs_with_margins():
    (row,) = load_rows(SAMPLES / "scored.jsonl", "preference").rows
    assert (row.chosen[0].content, row.rejected[0].content, row.margin) == ("The wren.", "A cat.", 6.5)
    (row,) = load_rows(SAMPLES / "scored.nested.jsonl", "preference").rows
    assert (row.chosen[0].content, row.margin) == ("The Rhine.", 7.0)


def test_questions_become_prompts_with_reference_answers():
    when, who = load_rows(SAMPLES / "squad.jsonl", "prompts").rows
    assert when.prompt[0].content == "Mina wrote the letter in May.\n\nWhen was the letter written?"
    assert when.columns["answers"] == ["in May", "May"]
    assert (when.columns["answer"], who.columns["answer"], who.columns["answers"]) == ("in May", None, [])
    assert [row.columns["answer"] for row in load_rows(SAMPLES / "svamp.jsonl", "prompts").rows] == ["5", "24"]
    (first, _) = load_rows(SAMPLES / "choices.jsonl", "prompts").rows
    assert first.prompt[0].content == "Where does a lighthouse stand?\nA. in a desert\nB. on a coast"
    assert first.columns["answer"] == "B"
    assert len(load_rows(SAMPLES / "squad.jsonl", "sft").rows) == 1


# -- dataset_info.json ---------------------------------------------------------------------------------------------------------

INFO = {
    "plain": {"file_name": "plain.json"},
    "nulls": {"file_name": "plain.json", "columns": None, "tags": None},
    "renamed": {
        "file_name": "renamed.jsonl",
        "columns": {"prompt": "question", "query": "about", "response": "answer", "system": "role"},
        "num_samples": 2,
    },
    "pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "dialog"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"},
    },
    "messages": {"file_name": "messages.jsonl", "formatting": "openai", "columns": {"messages": "conversation"}},
    "labels": {"file_name": "labels.jsonl", "columns": {"kto_tag": "liked"}},
    "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "content"}},
    "seen": {"file_name": "seen.jsonl", "columns": {"images": "pictures"}},
    "script": {"script_url": "run_me"},
    "odd": {"file_name": "x.jsonl", "columns": {"promt": "q"}},
    "listed": {"file_name": "plain.json", "columns": ["prompt"]},
    "numbered": {"file_name": 3},
}


@pytest.fixture
def info(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps(INFO))
    (tmp_path / "plain.json").write_text(json.dumps([{"instruction": "Say one.", "input": "", "output": "One."}]))
    write_rows(tmp_path / "renamed.jsonl", [{"question": "Q", "about": "x", "answer": "A", "role": "Be.", "output": "no"}] * 3)
    write_rows(tmp_path / "pairs.jsonl", [{"q": "Q", "good": "G", "bad": "B"}])
    write_rows(tmp_path / "chats.jsonl", [{"dialog": [{"who": "U", "what": "Hi"}, {"who": "A", "what": "Hello"}]}])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_rows(tmp_path / "messages.jsonl", [{"conversation": turns}])
    write_rows(tmp_path / "labels.jsonl", [{"instruction": "Q", "output": "A", "liked": False}])
    write_rows(tmp_path / "seen.jsonl", [{"instruction": "<image>Who?", "output": "Mina.", "pictures": ["a.jpg"]}])
    write_rows(tmp_path / "texts.jsonl", [{"content": "A document."}])
    return tmp_path


def test_a_llama_factory_dataset_info_is_read_as_it_is(info):
    def load(name, kind):
        return load_rows(f"{info}/dataset_info.json:{name}", kind).rows

    assert load("plain", "sft")[0].messages[1].content == "One."
    assert load("nulls", "sft") == load("plain", "sft")
    renamed = load("renamed", "sft")
    assert len(renamed) == 2
    assert [(turn.role, turn.content) for turn in renamed[0].messages] == [
        ("system", "Be."),
        ("user", "Q\n\nx"),
        ("assistant", "A"),
    ]
    assert load("pairs", "preference")[0].rejected[0].content == "B"
    assert [(turn.role, turn.content) for turn in load("chats", "sft")[0].messages] == [("user", "Hi"), ("assistant", "Hello")]
    assert load("messages", "sft")[0].messages[0].content == "Hi"
    assert load("labels", "unpaired")[0].label is False
    assert load("texts", "text")[0].text == "A document."
    assert load_rows(f"{info}:plain", "sft").rows == load("plain", "sft")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":plian", "no data set 'plian' \\(did you mean 'plain'\\?\\); it has: plain, nulls, renamed"),
        ("", "name one of its data sets, as in .*:NAME; it has: plain"),
        (":script", "expected file_name or hf_hub_url"),
        (":odd", "field columns.promt: unknown \\(did you mean 'prompt'\\?\\)"),
        (":listed", "field columns: got \\['prompt'\\], expected names, each with its name in the file"),
        (":seen", "seen.jsonl row 1, field images: got \\['a.jpg'\\], expected none, as only text is read"),
        (":numbered", "expected file_name or hf_hub_url"),
    ],
)
def test_a_dataset_info_that_does_not_say_it(info, name, message):
    with pytest.raises(AlignError, match=message):
        load_rows(f"{info}/dataset_info.json{name}", "sft")


def test_a_dataset_info_has_a_fingerprint(info):
    from align.data import fingerprint

    one, other = (fingerprint(f"{info}/dataset_info.json:{name}") for name in ("plain", "pairs"))
    assert one != other
    (info / "plain.json").write_text("[]")
    assert fingerprint(f"{info}/dataset_info.json:plain") != one
