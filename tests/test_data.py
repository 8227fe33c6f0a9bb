"""Loading: sources, bad rows, splits, writing; and the real data sets, where they are at hand."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.data import RowStream, fingerprint, load_rows, prompt_key, split_by_prompt, write_rows
from align.errors import AlignError
from align.intake.account import Account, Quarantine, family
from align.schema import PreferenceRow, PromptRow, SFTRow, TextRow

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refusal(*args: Any, **kwargs: Any) -> str:
    """The one line with which `load_rows` refuses."""
    with pytest.raises(AlignError) as caught:
        load_rows(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def csv(delimiter: str) -> bytes:
    return b"".join(delimiter.join(cells).encode() + b"\r\n" for cells in [list(PAIRS[0]), *(list(row.values()) for row in PAIRS)])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(PAIRS)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(PAIRS).replace(b"\n", b"\r\n\r\n")),  # a byte order mark, \r\n, empty lines
        ("a.json", json.dumps(PAIRS, indent=1).encode()),
        ("a.json", lines(PAIRS)),
        ("a.json", lines([{**PAIRS[0], "id": "x" * 70_000}, *PAIRS[1:]])),  # a first line longer than a first look
        ("a.jsonl.gz", gzip.compress(lines(PAIRS))),
        ("A.JSONL.GZ", gzip.compress(lines(PAIRS))),
        ("a.json.gz", gzip.compress(json.dumps(PAIRS).encode())),
        ("a.csv", csv(",")),
        ("a.tsv", csv("\t")),
    ],
)
def test_files(tmp_path: Path, name: str, content: bytes) -> None:
    loaded = load_rows(write(tmp_path / name, content), "preference")
    assert loaded.rows == [PreferenceRow(**row) for row in PAIRS]
    assert loaded.format == "native"
    assert loaded.summary() == "6 rows = 6 used + 0 set aside"


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    content, twice = zstandard.compress(lines(PAIRS)), zstandard.compress(lines(PAIRS)) * 2
    assert len(load_rows(write(tmp_path / "a.jsonl.zst", content), "preference").rows) == 6
    assert len(load_rows(write(tmp_path / "a.jsonl.zst", twice), "preference").rows) == 12
    assert len(load_rows(write(tmp_path / "a.csv.zst", zstandard.compress(csv(","))), "preference").rows) == 6
    # Of what was cut, the reader of the library gives what there is, and no error: here whole documents.
    documents = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    first = documents.compress(b"one\n\ntwo\n\n") + documents.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    cut = write(tmp_path / "a.txt.zst", first)
    assert "a.txt.zst: cannot be read: EOFError: Compressed file ended" in refusal(cut, "text")
    assert len(load_rows(write(cut, first + documents.compress(b"three\n") + documents.flush()), "text").rows) == 3


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt"])
def test_other_encodings_are_named(tmp_path: Path, name: str, encoding: str) -> None:
    """It was a row of bytes that are not UTF-8, and behind it rows of letters with zero bytes between them."""
    content = "text\r\nOnce upon a time\r\n".encode(encoding)
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    told = refusal(path, "text", on_bad_row="quarantine")
    assert told.startswith(f"{path}: is {encoding}, expected UTF-8; convert it: iconv -f {encoding} ")


@pytest.mark.parametrize(
    ("good", "bad"), [(1, 0), (1, -1), ("True", "False"), ("yes", "no"), ("Good", "Bad"), ("desirable", "undesirable")]
)
def test_a_verdict_may_be_a_word(tmp_path: Path, good: Any, bad: Any) -> None:
    rows = [{"prompt": "Name a fruit.", "completion": "Bread.", "label": label} for label in (good, bad)]
    assert [row.label for row in load_rows(write(tmp_path / "a.jsonl", lines(rows)), "unpaired").rows] == [True, False]


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    """The last of its values was taken, and nothing was said."""
    again = '{"prompt": "q", "chosen": "c", "rejected": "r", "chosen": "d"}'
    inside = '{"prompt": [{"role": "user", "content": "q", "content": "p"}], "chosen": "c", "rejected": "r"}'
    for name, content in (
        ("a.jsonl", lines(PAIRS).decode() + f"{again}\n{inside}\n"),
        ("a.json", f"[{lines(PAIRS).decode().replace(chr(10), ',')}{again}, {inside}]"),
    ):
        path = write(tmp_path / name, content.encode())
        expected = f"{name} row 7, field chosen: stands twice in one object; leave one of the two out"
        assert refusal(path, "preference").startswith(expected)
        loaded = load_rows(path, "preference", on_bad_row="quarantine")
        assert (loaded.account.used, loaded.account.set_aside) == (6, 2)
        assert "field content: stands twice" in loaded.set_aside[1][1]
    document = write(tmp_path / "b.json", f'{{"data": [{again}]}}'.encode())
    assert "b.json, field chosen: stands twice" in refusal(document, "preference")


def test_arrow_sources_forget_nulls_in_nested_dictionaries(tmp_path: Path) -> None:
    """Arrow gives every message the keys of any: here a null tool_calls beside each text, and a null content beside the call."""
    datasets = pytest.importorskip("datasets")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    table = datasets.Dataset.from_list(rows * 2)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "cut")
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    with pytest.raises(AlignError, match=r"cut: this data set cannot be read: .*; save it again"):
        load_rows(tmp_path / "cut", "sft")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "saved")
    loaded = [
        load_rows(tmp_path / "rows.parquet", "sft"),
        load_rows(tmp_path / "saved", "sft"),
        load_rows(tmp_path / "saved", "sft", split="test"),
    ]
    assert [len(each.rows) for each in loaded] == [2, 2, 1]
    (question, answer) = loaded[0].rows[0].messages
    assert (question.tool_calls, answer.content) == (None, "")
    assert "no split 'tset' (did you mean 'test'?); it has: train, test" in refusal(tmp_path / "saved", "sft", split="tset")


def test_classes_of_datasets_have_their_names(tmp_path: Path) -> None:
    """They were numbers: tags that are no entities, and measured as words."""
    datasets = pytest.importorskip("datasets")
    tags, text = datasets.ClassLabel(names=["O", "B-PER"]), datasets.Value("string")
    features = datasets.Features({"tokens": datasets.Sequence(text), "ner_tags": datasets.Sequence(tags)})
    tagged = datasets.Dataset.from_dict({"tokens": [["Ada", "sings"]], "ner_tags": [[1, 0]]}, features=features)
    features = datasets.Features({"text": text, "label": datasets.ClassLabel(names=["bad", "good"])})
    classes = datasets.Dataset.from_dict({"text": ["Fine.", "What?"], "label": [1, -1]}, features=features)  # -1: not told
    for name, data in (("tagged", tagged), ("classes", classes)):
        data.save_to_disk(tmp_path / name)
        data.to_parquet(tmp_path / f"{name}.parquet")
    for end in ("", ".parquet"):
        assert load_rows(tmp_path / f"tagged{end}", "tagging").rows[0].tags == ["B-PER", "O"]
        assert [row.label for row in load_rows(tmp_path / f"classes{end}", "classification").rows] == ["good", "-1"]


def test_folder_of_files_with_splits(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", lines(PAIRS[:2]))
    write(tmp_path / "more" / "train-1.jsonl", lines(PAIRS[2:5]))
    write(tmp_path / "test.jsonl", lines(PAIRS[5:]))
    write(tmp_path / "README.md", b"hello")
    assert len(load_rows(tmp_path, "preference").rows) == 5
    assert len(load_rows(tmp_path, "preference", split="test").rows) == 1
    assert "no files of split 'validation'; there are files of: train, test" in refusal(tmp_path, "preference", split="validation")


@pytest.mark.parametrize(
    ("table", "used", "lost"),
    [
        (b'label,text\n1,good\n0,"bad\n1,third\n0,fourth\n', ["good"], 3),  # to the end of the file
        (b'text,label\n"Well" made,1\nfine,0\n', ["fine"], 1),  # a row that would lose its quotation marks
        (b'text,label\n"Never,0\ngood,1\nthe "end",0\nfine,0\n', ["fine"], 3),  # up to the next mark
        (b'text,label\n"Say ""hi"",\nthen go.",0\n', ['Say "hi",\nthen go.'], 0),
    ],
)
def test_rows_behind_a_quotation_mark_that_is_not_closed(tmp_path: Path, table: bytes, used: list[str], lost: int) -> None:
    """They were one row, used, with the rest of the file for its text."""
    loaded = load_rows(write(tmp_path / "a.csv", table), "classification", on_bad_row="quarantine")
    assert [row.text for row in loaded.rows] == used
    assert (loaded.account.used, loaded.account.set_aside) == (len(used), lost)
    assert all("not closed" in reason for _, reason in loaded.set_aside)


@pytest.mark.parametrize("kind", ["text", None])
def test_the_numbers_of_rows_that_pandas_writes_are_no_texts(tmp_path: Path, kind: str | None) -> None:
    """The header was taken for a row, and the numbers for the texts, with the texts for their labels."""
    stream = RowStream(write(tmp_path / "a.csv", b",text\n0,A doc about lions.\n1,A doc about tigers.\n"), kind)
    assert [row.text for row in stream] == ["A doc about lions.", "A doc about tigers."]
    pairs = write(tmp_path / "b.csv", b",prompt,answer\n0,Who?,Lily\n")
    assert load_rows(pairs, "prompts").rows[0].columns == {"column 1": "0", "answer": "Lily"}


def test_the_first_line_of_a_table(tmp_path: Path) -> None:
    """Quotation marks hid that a cell is a number; and where the first line was no header, nothing said so."""
    bare = write(tmp_path / "a.csv", b'"A warm, funny film.","1"\n"Dull.","0"\n')
    assert [(row.text, row.label) for row in load_rows(bare, "classification").rows] == [
        ("A warm, funny film.", "1"),
        ("Dull.", "0"),
    ]
    for header in (b"prompt,completion,", b"prompt,completion,prompt"):
        said = refusal(write(tmp_path / "b.csv", header + b"\na,b,c\n"), "sft")
        assert "b.csv row 1, the columns fit no format of sft rows, as the first line has a number, an empty cell or one" in said


@pytest.mark.parametrize(("name", "expected"), [("a.csv", "commas"), ("a.tsv", "tabs")])
@pytest.mark.parametrize("first", [b"prompt;completion", b"Hi there;Hello"])
def test_a_table_with_semicolons(tmp_path: Path, name: str, expected: str, first: bytes) -> None:
    """As spreadsheets write them where the comma is that of numbers. It was a table of one column, which fits no format."""
    said = refusal(path := write(tmp_path / name, first + b"\nHi;Hello, you\n"), "sft")
    assert said == f"{path}: semicolons part the columns of its first line, expected {expected}: save it so, or as .jsonl"


def test_a_label_that_is_a_number_is_one_class_in_every_file(tmp_path: Path) -> None:
    """pandas writes whole numbers beside a gap as 1.0."""
    table = write(tmp_path / "a.csv", b"text,label\nGood.,1.0\nBad.,-2.00\nSo.,0.5\nNew.,v1.0\n")
    assert [row.label for row in load_rows(table, "classification").rows] == ["1", "-2", "0.5", "v1.0"]
    lines = write(tmp_path / "a.jsonl", b'{"text": "Good.", "label": 1.0}\n{"text": "Bad.", "label": -2}\n')
    assert [row.label for row in load_rows(lines, "classification").rows] == ["1", "-2"]


def test_a_label_that_pandas_has_not_is_no_class(tmp_path: Path) -> None:
    """It was a class of the name nan."""
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["Good.", "What?"], "label": [1.0, float("nan")]}), path)
    assert refusal(path, "classification").startswith("a.parquet row 2, field label: got nan, expected a name or a number")


def test_spaces_behind_the_commas_of_a_table(tmp_path: Path) -> None:
    """The second column was called " completion", so that rows were prompts without answers, and its quotes were text."""
    table = write(tmp_path / "a.csv", b'prompt, completion\nWho?, "Lily, I say"\nWhy?, So\n')
    assert [(row.prompt, row.completion) for row in load_rows(table, "sft").rows] == [("Who?", "Lily, I say"), ("Why?", "So")]
    raw = write(tmp_path / "b.csv", b"prompt ,completion\nWho?, Lily\n")
    assert load_rows(raw, "sft").rows[0].completion == " Lily"


@pytest.mark.parametrize("around", ["[%s]", '{"data": [%s]}'])
def test_bytes_of_another_encoding_in_a_json_document(tmp_path: Path, around: str) -> None:
    """In a column that no format looks at, such as an answer to compare with, they went through as halves of surrogate pairs."""
    rows = ['{"prompt": "a", "answer": "caf\xe9"}', '{"prompt": "b", "answer": "tea"}']
    file = write(tmp_path / "a.json", (around % ",\n".join(rows)).encode("latin-1"))
    loaded = load_rows(file, "prompts", on_bad_row="quarantine")
    assert loaded.rows[0].prompt == "b"
    place, reason = loaded.set_aside[0]
    assert place == "a.json row 1"
    assert re.match(r"byte 0xe9 at character \d+ is not UTF-8; convert it", reason)


def test_folders_that_are_links_are_read(tmp_path: Path) -> None:
    """Each once, also where a link leads back; its rows were left out without a word."""
    elsewhere = write(tmp_path / "elsewhere" / "b.jsonl", lines(PAIRS[2:])).parent
    folder = write(tmp_path / "data" / "a.jsonl", lines(PAIRS[:2])).parent
    before = fingerprint(str(folder))
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    assert len(load_rows(folder, "preference").rows) == len(PAIRS)
    assert fingerprint(str(folder)) != before


def test_folders_named_for_splits(tmp_path: Path) -> None:
    """Rows of a test set in ``test/`` are not trained on; a file's own name tells before its folder's does."""
    write(tmp_path / "train" / "0.jsonl", lines(PAIRS[:3]))
    write(tmp_path / "test" / "0.jsonl", lines(PAIRS[3:5]))
    write(tmp_path / "train" / "test.jsonl", lines(PAIRS[5:]))
    assert [row.prompt for row in load_rows(tmp_path, "preference").rows] == [row["prompt"] for row in PAIRS[:3]]
    assert [row.prompt for row in load_rows(tmp_path, "preference", split="test").rows] == [row["prompt"] for row in PAIRS[3:]]


def test_files_of_no_split_beside_those_of_one_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were left out without a word."""
    for name in ("train.jsonl", "test.jsonl", "more.jsonl", "old/yet.jsonl"):
        write(tmp_path / name, lines(PAIRS[:2]))
    assert len(load_rows(str(tmp_path), "preference").rows) == 2
    told = f"{tmp_path}: not read, as others are named for split 'train': 2 of its files, more.jsonl for one"
    assert told in capsys.readouterr().err.splitlines()


def test_lists_in_the_cells_of_a_table(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]).replace('"', '""')
    said = "expected a list of messages, not a string of one; tables hold no lists: save it as .jsonl"
    assert said in refusal(write(tmp_path / "a.csv", f'messages\n"{turns}"\n'.encode()), "sft")
    said = "expected a list of strings, not a string of one; tables hold no lists: save it as .jsonl"
    assert said in refusal(write(tmp_path / "b.csv", b"""tokens,tags\n"['EU']","['O']"\n"""), "tagging")


def test_sentences_in_a_text_file(tmp_path: Path) -> None:
    said = refusal(write(tmp_path / "a.txt", b"EU B-ORG\nrejects O\n"), "tagging")
    assert "by format 'text' it is of kind text (the name of a CoNLL file ends in .conll), good for text" in said


def test_folder_of_several_formats(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", lines([*PAIRS[:2], {**PAIRS[2], "rejected": "good 2 "}]))
    write(tmp_path / "b.jsonl", lines([{"instruction": "i", "output": ["x", "x"]}, {"instruction": "i", "output": ["x", "y"]}]))
    loaded = load_rows(tmp_path, "preference")
    assert loaded.format == "native, alpaca"
    same = "identical chosen and rejected"
    assert loaded.set_aside == [("a.jsonl row 3", same), ("b.jsonl row 1", same)]
    assert loaded.summary() == "5 rows = 3 used + 2 set aside (2 identical chosen and rejected)"


BAD = [PAIRS[0], {**PAIRS[1], "chosen": 3}, {**PAIRS[2], "rejected": "good 2"}, PAIRS[3]]


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    """The first has more rows than are looked at, so the format of the second can only be found in the second."""
    write(tmp_path / "a" / "data.jsonl", lines([PAIRS[0]] * 70))
    write(tmp_path / "b" / "data.jsonl", lines([{"question": "q", "response_j": "good", "response_k": "bad"}] * 8 + [{"x": 1}]))
    loaded = load_rows(tmp_path, "preference", on_bad_row="quarantine")
    assert (loaded.account.used, loaded.format) == (78, "native, stack_exchange")
    assert [place for place, _ in loaded.set_aside] == ["b/data.jsonl row 9"]


def test_a_bad_row_raises_with_its_place(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "data.jsonl", lines(BAD)), "preference")
    assert message == "data.jsonl row 2, field chosen: got 3, expected a string; mend the row, or set on_bad_row to quarantine"


def test_bad_rows_go_to_quarantine_and_are_counted(tmp_path: Path) -> None:
    broken = lines(BAD) + b'{"prompt": "x", "chosen": }\n' + b'{"prompt": "\xff"}\n' + b"[1]\n"
    path = write(tmp_path / "data.jsonl", broken)
    aside = tmp_path / "run" / "quarantine.jsonl"
    loaded = load_rows(path, "preference", on_bad_row="quarantine", quarantine=Quarantine(aside))
    expected = [
        (2, "field chosen: got 3, expected a string"),
        (3, "identical chosen and rejected"),
        (5, "column 27: invalid JSON: Expecting value (in field chosen)"),
        (6, "byte 13: not UTF-8 (in field prompt)"),
        (7, "field row: got [1], expected an object with named columns"),
    ]
    assert loaded.set_aside == [(f"data.jsonl row {row}", reason) for row, reason in expected]
    assert loaded.summary().startswith("7 rows = 2 used + 5 set aside (1 field chosen: expected a string, ")
    found = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [(each["row"], each["reason"]) for each in found] == expected
    assert {each["file"] for each in found} == {"data.jsonl"}
    contents = [BAD[1], BAD[2], '{"prompt": "x", "chosen": }', '{"prompt": "\udcff"}', "[1]"]
    assert [each["content"] for each in found] == contents


def test_a_clean_run_leaves_no_quarantine_of_an_earlier_one(tmp_path: Path) -> None:
    aside = write(tmp_path / "quarantine.jsonl", b"{}\n")
    load_rows(write(tmp_path / "a.jsonl", lines(PAIRS)), "preference", quarantine=Quarantine(aside))
    assert not aside.exists()


def test_a_row_that_its_format_would_misread_is_refused(tmp_path: Path) -> None:
    """The text of the last row is one of its columns, and not the document."""
    path = write(
        tmp_path / "data.jsonl", lines([*[{"text": "One."}] * 9, {"text": "Two.", "prompt": "Say two.", "chosen": "Two."}])
    )
    with pytest.raises(AlignError, match=r"row 10.*not those of a row of format 'text', as which the file was recognized"):
        load_rows(path, None)


def test_a_file_of_two_formats(tmp_path: Path) -> None:
    """As when two files were put together: each that one of eight rows has counts; a single broken row does not make a format."""
    alpaca = {"instruction": "Say one.", "output": "One."}
    chat = {"messages": [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One."}]}
    path = write(tmp_path / "data.jsonl", lines([alpaca] * 20 + [chat] * 12 + [{"question": "Say one.", "answer": "One."}]))
    loaded = load_rows(path, "sft", on_bad_row="quarantine")
    assert loaded.summary().startswith("33 rows = 32 used + 1 set aside (1 column 'instruction' of format 'alpaca': missing)")
    assert loaded.format == "alpaca, openai"


def test_a_bad_first_row_does_not_decide_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", lines([{"prompt": "only"}, *PAIRS]))
    assert len(load_rows(path, "preference", on_bad_row="quarantine").rows) == 6


def test_columns_and_roles_of_other_names(tmp_path: Path) -> None:
    """The refusal names the way, and the page's own example goes it."""
    asked = "Question,Answer\nOne?,Two.\n"
    (tmp_path / "asked.csv").write_text(asked)
    with pytest.raises(AlignError, match=r"found Question, Answer; .*; rename the columns, or say in a dataset_info\.json"):
        load_rows(tmp_path / "asked.csv", "sft")
    (tmp_path / "ranked.csv").write_text("Question,Better,Worse\nOne?,Two.,Three.\n")
    turns = [{"role": "Human", "content": "One?"}, {"role": "AI", "content": "Two."}]
    (tmp_path / "talks.jsonl").write_bytes(lines([{"conversation": turns}]))
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text(page.split("```json\n")[1].split("```")[0])
    (row,) = load_rows(f"{tmp_path}/dataset_info.json:talks", "sft").rows
    assert [(message.role, message.content) for message in row.messages] == [("user", "One?"), ("assistant", "Two.")]
    (row,) = load_rows(f"{tmp_path}/dataset_info.json:asked", "sft").rows
    assert row.messages[-1].content == "Two."
    (row,) = load_rows(f"{tmp_path}/dataset_info.json:ranked", "preference").rows
    assert row.rejected[-1].content == "Three."


@pytest.mark.parametrize(
    ("keys", "tags"),
    [
        (("speaker", "said"), {"role_tag": "speaker", "content_tag": "said", "user_tag": "Human", "assistant_tag": "AI"}),
        (("role", "content"), {"user_tag": "Human", "assistant_tag": "AI"}),
    ],
)
def test_tags_of_openai_messages_are_followed(tmp_path, keys, tags):
    """They were read for `sharegpt` alone; each row was refused."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [dict(zip(keys, turn, strict=True)) for turn in (("Human", "One?"), ("AI", None), ("tool", "1"), ("AI", "Two."))]
    turns[1]["tool_calls"] = [call]
    write_rows(tmp_path / "talks.jsonl", [{"talk": turns}])
    entry = {"file_name": "talks.jsonl", "formatting": "openai", "columns": {"messages": "talk"}, "tags": tags}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"talks": entry}))
    (row,) = load_rows(f"{tmp_path}/dataset_info.json:talks", "sft").rows
    found = [(message.role, message.content) for message in row.messages]
    assert found == [("user", "One?"), ("assistant", ""), ("tool", "1"), ("assistant", "Two.")]
    assert row.messages[1].tool_calls == [call]


@pytest.mark.parametrize(
    ("kind", "known"),
    [("classification", "labelled (text, label)"), ("tagging", "tagged (tokens, tags)"), ("qa", "squad (question, answers)")],
)
def test_rows_of_a_task_are_told_its_own_format(tmp_path, kind, known):
    """All formats were listed, those of conversations and pairs as well."""
    write_rows(tmp_path / "odd.jsonl", [{"words": "a b", "entities": ["x"]}])
    with pytest.raises(AlignError, match=re.escape(f"found words, entities; nearest: {known}; rename the columns")):
        load_rows(tmp_path / "odd.jsonl", kind)


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"instruction": "q", "answer": "a"}, "nearest: scored, alpaca; rename"),
        ({"query": "q", "response": "a"}, "nearest: dolly; rename"),
        ({"Prompt": "q", "Chosen": "c", "Rejected": "r"}, "nearest: native (chosen, rejected, prompt); rename"),
        ({"x": "q", "y": "a"}, "rename the columns, or say in a dataset_info.json what they are (docs/data.md); formats: svamp, "),
    ],
)
def test_the_nearest_formats_are_told(tmp_path: Path, row: dict[str, str], advice: str) -> None:
    """What to do stood behind a list of all formats."""
    write_rows(tmp_path / "a.jsonl", [row])
    stream = RowStream(tmp_path / "a.jsonl", on_bad_row="quarantine")
    assert not list(stream)
    ((_, reason),) = stream.set_aside
    assert reason.startswith(f"the columns fit no format; found {', '.join(row)}; {advice}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data.jsonl: no rows: it is empty"),
        (b"\n \n", "data.jsonl: no rows: it is empty"),
        (
            b'{"a": 1}\n{"a": 1,}\n',
            "data.jsonl row 1, the columns fit no format of preference rows; column 'chosen' is missing; found a; rename the",
        ),
        (
            lines([PAIRS[0]]) + b'{"prompt": "x" "y"}',
            "data.jsonl row 2, column 16: invalid JSON: Expecting ',' delimiter (in field",
        ),
        (
            lines([{"prompt": "p", "chosen": "c", "rejectd": "r"}]),
            "column 'rejected' is missing; found prompt, chosen, rejectd (did you mean 'rejected'?)",
        ),
        (
            lines([PAIRS[0], {"prompt": "p", "chosen": "c"}]),
            "data.jsonl row 2, column 'rejected' is missing",
        ),
        (
            lines([{"prompt": "p", "chosen": "c", "rejected": "c"}]),
            "as preference: 1 rows = 0 used + 1 set aside (1 identical",
        ),
    ],
)
def test_refused_files(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refusal(write(tmp_path / "data.jsonl", content), "preference")


def test_rows_about_pictures_are_refused(tmp_path: Path) -> None:
    """They were used, and taught to say who is on a picture that nobody saw. An empty list says that there is none."""
    turns = [{"role": "user", "content": "<image>Who is it?"}, {"role": "assistant", "content": "Mina."}]
    rows = [{"messages": turns, "images": []}, {"messages": turns, "images": ["a.jpg"]}]
    path = write(tmp_path / "data.jsonl", lines(rows))
    assert "data.jsonl row 2, field images: got ['a.jpg'], expected none, as only text is read;" in refusal(path, "sft")
    assert len(load_rows(path, "sft", on_bad_row="quarantine").rows) == 1


def test_missing_columns_of_a_named_format(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", lines([{"conversation": []}]))
    found = (
        "data.jsonl row 1, column 'conversations' of format 'sharegpt': missing; found conversation (did you mean 'conversations'?)"
    )
    assert refusal(path, "sft", format="sharegpt").startswith(found)
    assert "unknown data format 'sharegtp' (did you mean 'sharegpt'?)" in refusal(path, "sft", format="sharegtp")


def test_files_of_a_folder_that_nothing_here_reads_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jsonl", "README.md", "more/b.JSONL.bz2", "c.csv.zip", "d.xlsx", "e.v2.PDF"):
        write(tmp_path / name, lines(PAIRS[:2]))
    for _ in range(2):
        assert len(load_rows(str(tmp_path), "preference").rows) == 2
    told = f"{tmp_path}: not read, as nothing here reads their kind: 4 of its files, c.csv.zip for one"
    assert capsys.readouterr().err.splitlines() == [told]
    (tmp_path / "a.jsonl").unlink()
    found = "no data files in this folder (nothing here reads 4 of its files, c.csv.zip for one); expected .jsonl"
    assert found in refusal(tmp_path, "sft")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.conll"])
def test_utf16_without_a_mark_is_known_by_its_zero_bytes(tmp_path: Path, name: str, encoding: str) -> None:
    """Of a .txt and a .conll its letters with zero bytes between them were trained on; of others they were "invalid JSON"."""
    path = write(tmp_path / name, '{"text": "Once upon"}\r\ntime O\r\n'.encode(encoding))
    known = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    assert refusal(path, "text") == (
        f"{path}: looks like {known}, as many of its bytes are zero, expected UTF-8; convert it: iconv -f {known} -t UTF-8 {name}"
    )


def test_a_zero_byte_in_a_text_is_text(tmp_path: Path) -> None:
    (row,) = load_rows(write(tmp_path / "a.txt", b"Once\0 upon a time\n"), "text").rows
    assert row.text == "Once\0 upon a time"
    holed = write(tmp_path / "a.jsonl", lines(PAIRS) + b"\0" * 5000)  # as a crash leaves them
    assert len(load_rows(holed, "preference", on_bad_row="quarantine").rows) == len(PAIRS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", lines(PAIRS), "is not compressed as its name says; take .gz off its name, or download it again"),
        ("a.jsonl.zst", lines(PAIRS), "is not compressed as its name says; take .zst off its name, or download it again"),
        ("a.jsonl", gzip.compress(lines(PAIRS)), "is gzipped, and its name does not say so: add .gz to it"),
        ("a.csv", b"PK\x03\x04\x14", "is a zip archive or a file of Excel: unpack it, or save it as .csv"),
        ("a.parquet", b"", "has no bytes, and a parquet file without rows has some; write or download it again"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file"),
        ("a.jsonl", b"[\n {}\n]\n", "is a JSON array, expected one object a line: let its name end in .json"),
        ("a.jsonl", b'[{"a": 1}]', "is a JSON array, expected one object a line: let its name end in .json"),
        ("a.jsonl", b'{\n "a": 1\n}\n', "its objects take up several lines, expected one a line: jq -c . a.jsonl"),
        (
            "a.json",
            b'{"prompt": {"0": "a"}, "completion": {"0": "b"}}',
            "has its rows in columns, as pandas writes them; ",
        ),
        (
            "a.csv",
            b"sep=;\r\nprompt;completion\r\n",
            "its first line, sep=;, is for Excel alone, expected names of",
        ),
        (
            "a.csv",
            b"sep=,\nprompt,completion\na,b\n",
            "its first line, sep=,, is for Excel alone, expected names of",
        ),
        (
            "a.csv",
            b"prompt\tcompletion\na\tb\n",
            "tabs part the columns of its first line, expected commas: save it so, or as .jsonl",
        ),
        (
            "a.tsv",
            b"prompt,completion\na,b\n",
            "commas part the columns of its first line, expected tabs: save it so, or as .jsonl",
        ),
        (
            "a.csv",
            b"prompt|completion\na|b\n",
            "bars part the columns of its first line, expected commas: save it so, or as .jsonl",
        ),
        ("a.json", b'{\n"a": 1\n}\n{\n"a": 2\n}\n', "line 4, column 1: invalid JSON: Extra data; put all rows into one array, or"),
        ("a.csv", lines(PAIRS), "begins with JSON, expected the names of columns: let its name end in .jsonl or .json"),
    ],
)
def test_what_is_something_else_than_its_name_says(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    said = refusal(path, "preference", on_bad_row="quarantine")
    assert said.startswith((f"{path}: {message}", f"{name} {message}"))


def test_names_of_columns_with_a_quotation_mark_that_is_not_closed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'"prompt" x,completion\na,b\n')
    assert refusal(path, "sft").startswith(f"{path} line 1: a cell begins with a quotation mark that is not closed behind it")


def test_a_header_in_the_middle_of_a_table(tmp_path: Path) -> None:
    """Of tables put behind each other, the names of columns were a row: the chosen answer "chosen"."""
    path = write(tmp_path / "a.csv", b"prompt,chosen,rejected\na,b,c\nprompt, chosen,rejected\nd,e,f\n")
    loaded = load_rows(path, "preference", on_bad_row="quarantine")
    assert [row.chosen for row in loaded.rows] == ["b", "e"]
    told = "the header again, as where tables were put behind each other; take this line out"
    assert loaded.set_aside == [("a.csv row 2", told)]
    assert refusal(path, "preference").startswith(f"a.csv row 2, {told}")


def test_refused_sources(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", lines(PAIRS))
    assert refusal(tmp_path / "pair.jsonl", "sft") == f"{tmp_path}/pair.jsonl: no such file or folder (did you mean 'pairs.jsonl'?)"
    assert "cannot read .xlsx; expected .jsonl, .json" in refusal(write(tmp_path / "a.xlsx", b""), "sft")
    assert "a.jsonl.gz: cannot be read: " in refusal(write(tmp_path / "a.jsonl.gz", gzip.compress(lines(PAIRS * 99))[:50]), "sft")
    assert "row 1, field text: byte 0xe9 at character 4" in refusal(write(tmp_path / "a.txt", "café\n".encode("latin-1")), "text")
    assert "no data files in this folder" in refusal(write(tmp_path / "empty" / "x.md", b"").parent, "sft")
    assert "a.json line 2, column 1: invalid JSON" in refusal(write(tmp_path / "a.json", b"[{}\n"), "sft")
    assert "a.json line 2, column 1: invalid JSON: Expecting ',' del" in refusal(write(tmp_path / "a.json", b"[{}\n{}]"), "sft")
    two = b"[" + lines(PAIRS[:1]) + b"]\n [{}]\n"
    assert "a.json line 3, column 2: invalid JSON: extra data behind" in refusal(write(tmp_path / "a.json", two), "preference")
    assert "a.csv row 1, the table has 2 columns" in refusal(write(tmp_path / "a.csv", b"prompt,completion\r\nx\r\n"), "sft")
    assert "a.parquet: cannot be read: Arrow" in refusal(write(tmp_path / "a.parquet", b"PAR1 not really"), "sft")
    assert "is an address; name a data set of the hub as owner/name" in refusal("https://huggingface.co/datasets/a/b", "sft")
    assert "the source of data is an empty string" in refusal("", "sft")  # it was the current folder
    assert "on_bad_row: got 'skip'" in refusal(tmp_path / "pairs.jsonl", "sft", on_bad_row="skip")


def test_a_parquet_column_that_stands_twice(tmp_path: Path) -> None:
    """The first of the two was lost, in silence."""
    import pyarrow.parquet

    columns = [pyarrow.array([value]) for value in ("p", "q", "c")]
    file = tmp_path / "twice.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["prompt", "prompt", "completion"]), file)
    assert refusal(file, "sft") == f"{file}: has two columns 'prompt'; rename one or leave it out"


def test_what_is_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "rows.jsonl: is neither a file nor a folder" in refusal(tmp_path / "rows.jsonl", "preference")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """It was left out of its folder in silence; named by itself, it was "no such file (did you mean" itself."""
    write(tmp_path / "rows" / "train-0.jsonl", lines(PAIRS))
    (tmp_path / "rows" / "README.md").symlink_to("gone.md")
    assert len(load_rows(tmp_path / "rows", "preference").rows) == 6
    link = tmp_path / "rows" / "train-1.jsonl"
    link.symlink_to("gone.jsonl")
    for source in (link, tmp_path / "rows"):
        assert refusal(source, "preference") == f"{link}: is a link to gone.jsonl, where nothing is; mend the link or remove it"


def test_hub_id_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'pairs' on the Hub\n(long story)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pairs.jsonl", lines(PAIRS))
    message = refusal("pairs", "preference")
    assert message.startswith(
        "pairs: no such file or folder (did you mean 'pairs.jsonl'?), and the hub gives no data set of this name"
    )
    assert "ConnectionError: Couldn't reach 'pairs' on the Hub)" in message


def test_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []
    found = datasets.Dataset.from_list(PAIRS)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or found)
    assert len(load_rows("owner/pairs:main", "preference", split="test").rows) == 6
    assert asked == [(("owner/pairs", "main"), {"split": "test"})]


def test_limit_counts_rows_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines([{**PAIRS[0], "rejected": "good 0"}, *PAIRS]))
    assert load_rows(path, "preference", limit=2).summary() == "3 rows = 2 used + 1 set aside (1 identical chosen and rejected)"
    assert "limit: got 0" in refusal(path, "preference", limit=0)


def test_line_separators_of_unicode_are_text(tmp_path: Path) -> None:
    content = json.dumps({"text": "a\u2028b\x85c\r\nd\ufeff"}, ensure_ascii=False).encode()
    (row,) = load_rows(write(tmp_path / "a.jsonl", content), "text").rows
    assert row.text == "a\u2028b\x85c\r\nd\ufeff"


def test_written_rows_come_back(tmp_path: Path) -> None:
    rows = [
        PromptRow(prompt="Line\u2028end 海", columns={"answer": 3, "kwargs": [{}, {"n": None}]}),
        PromptRow(prompt=[{"role": "user", "content": ""}], columns={"answer": 4, "kwargs": []}),  # type: ignore[list-item]
    ]
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, rows)
    assert load_rows(path, "prompts").rows == rows
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]
    assert path.read_text(encoding="utf-8").startswith('{"answer": 3')


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [TextRow(text="old")])

    def failing() -> Any:
        yield TextRow(text="new")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_rows(path, failing())
    assert path.read_text() == '{"text": "old"}\n'
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(AlignError, match=r"rows are written as \.jsonl"):
        write_rows(tmp_path / "rows.csv", [])


KILLED = """
import os, signal, sys
from align.data import write_rows

def rows():
    yield {"text": "one"}
    os.kill(os.getpid(), signal.SIGKILL)

write_rows(sys.argv[1], rows())
"""


def test_what_a_killed_writer_left_is_gone_after_the_next(tmp_path):
    path = tmp_path / "rows.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -9
    assert [left.suffix for left in tmp_path.iterdir()] == [".tmp"]
    write_rows(path, [TextRow(text="one")])
    assert list(tmp_path.iterdir()) == [path]


def prompts(rows: list[Any]) -> set[str]:
    return {prompt_key(row) for row in rows}


def test_split_keeps_each_prompt_on_one_side() -> None:
    """2,000 rows over 500 prompts in four spellings each; 20 % of 500 is 100, standard deviation 8.9."""
    spellings = ("Question {}?", "question {}", "  QUESTION: {}!", "Question {}？")
    rows = [SFTRow(prompt=spelling.format(i), completion=str(i)) for i in range(500) for spelling in spellings]
    train, held_out = split_by_prompt(rows, 0.2)
    assert len(train) + len(held_out) == 2000
    assert not prompts(train) & prompts(held_out)
    assert len(prompts(held_out)) == pytest.approx(100, abs=27)
    assert prompts(split_by_prompt(rows, 0.2, seed=1)[1]) != prompts(held_out)


def test_split_is_stable_when_rows_are_added() -> None:
    rows = [PreferenceRow(prompt=f"Question {i}?", chosen="a", rejected="b") for i in range(300)]
    few, many = split_by_prompt(rows[:100], 0.3)[1], split_by_prompt(rows, 0.3)[1]
    assert few == [row for row in many if row in rows[:100]]
    assert 0 < len(few) < len(many)


def test_split_goes_by_the_first_user_turn() -> None:
    def chat(*turns: tuple[str, str]) -> SFTRow:
        return SFTRow.model_validate({"messages": [{"role": role, "content": content} for role, content in turns]})

    short = chat(("user", "Hi there"), ("assistant", "Hello"))
    longer = chat(("system", "s"), ("user", "hi there!"), ("assistant", "Hello"), ("user", "More"), ("assistant", "No"))
    assert prompt_key(short) == prompt_key(longer) == "hithere"
    assert prompt_key(chat(("system", "Be."), ("assistant", "A"))) == "bea"
    assert prompt_key(PromptRow(prompt="?!")) == "?!"
    assert prompt_key(TextRow(text="Some Text.")) == "sometext"


def test_split_of_nothing_and_of_a_wrong_share() -> None:
    assert split_by_prompt([TextRow(text="a")], 0.0) == ([TextRow(text="a")], [])
    with pytest.raises(AlignError, match="held_out: got 1, expected a share"):
        split_by_prompt([], 1)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "d" / "a.jsonl", lines(PAIRS))
    assert fingerprint(str(path)) == hashlib.sha256(lines(PAIRS)).hexdigest()
    folder = fingerprint(str(tmp_path / "d"))
    write(tmp_path / "d" / "a.jsonl", lines(PAIRS[:5]))
    assert fingerprint(str(tmp_path / "d")) != folder
    assert fingerprint("owner/name") == hashlib.sha256(b"owner/name").hexdigest()
    with pytest.raises(AlignError, match="no such file or folder"):
        fingerprint(str(tmp_path / "gone.jsonl"))


def test_summary_groups_reasons() -> None:
    account = Account(rows=1690, used=1690, gave=1700)
    for i in range(13):
        account.put_aside(1, f"field messages[{i}].reason{i % 6}: got {i}, expected peace")
    named = [f"{count} field messages[].reason{i}: expected peace" for i, count in enumerate([3, 2, 2, 2])]
    reasons = ", ".join([*named, "4 for other reasons"])
    assert account.summary() == f"1,703 rows = 1,690 used + 13 set aside ({reasons}); they gave 1,700"
    assert sum(account.reasons.values()) == account.set_aside


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("field chosen[0].role: got 'assitant', expected 'system' or 'user' (did you mean 'x'?)",) * 2,
        ("column 'chosen' of format 'native': missing; found a, b", "column 'chosen' of format 'native': missing"),
        ("column 27: invalid JSON: Expecting value (in field chosen)", "invalid JSON: Expecting value"),
        ("byte 13: not UTF-8 (in field prompt)", "not UTF-8"),
        ("field text: byte 0xe9 at character 4 is not UTF-8; convert it", "field text: bytes that are not UTF-8; convert it"),
        ("field messages[1].tone: unknown key (holds 'kind')", "field messages[].tone: unknown key"),
        ("x" * 500, "x" * 200 + "..."),
    ],
)
def test_reasons_are_counted_without_their_particulars(reason: str, expected: str) -> None:
    if reason == expected:
        expected = "field chosen[].role: expected 'system' or 'user'"
    assert family(reason) == expected


def test_a_name_that_begins_with_a_tilde_need_not_be_a_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors call copies so, and pathlib fails where no user has the name."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("~copy.jsonl"), [{"text": "Once."}])
    assert load_rows("~copy.jsonl", "text").rows == [TextRow(text="Once.")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_rows("~/~copy.jsonl", "text").rows) == 1


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, align.data; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
