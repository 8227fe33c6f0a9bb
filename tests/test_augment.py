"""Augmentation: new rows out of rows, each saying what it was made of."""

import copy
import json

import pytest

from align.cli import main
from align.data import load_rows, write_rows
from align.errors import AlignError
from align.quality.augment import augment, load_thesaurus
from align.schema import Message, PreferenceRow, PromptRow, SFTRow, TextRow

ROWS = [
    SFTRow(prompt="Describe the BIG house", completion="It is big."),
    SFTRow(messages=[Message(role="user", content="Write it"), Message(role="assistant", content="big house")]),
    SFTRow(messages=[Message(role="assistant", content="nobody asked")]),
]
PAIRS = [PreferenceRow(prompt=f"q{i}", chosen=f"good {i}", rejected=f"bad {i}", margin=1.0) for i in range(10)]


def test_synonyms(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps({"Big": ["large"], "house": ["home"], "write": ["compose"]}))
    spec = f"synonyms(rate=1.0, thesaurus={str(tmp_path / 'mine.json')!r})"
    rows = augment(ROWS, [spec])
    assert rows[:3] == [row.model_dump(exclude_none=True) for row in ROWS]
    assert [row["origin"] for row in rows[3:]] == [{"row": 1, "how": spec}, {"row": 2, "how": spec}]
    assert rows[3]["prompt"] == "Describe the Large home"
    assert rows[3]["completion"] == "It is big."  # replies stay
    assert [turn["content"] for turn in rows[4]["messages"]] == ["Compose it", "big house"]


def test_files_in_the_users_folder(tmp_path, monkeypatch):
    """In quotes no shell reads the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.json").write_text('{"big": ["large"]}')
    (tmp_path / "ways.txt").write_text("Please: {prompt}\n")
    made = augment([PromptRow(prompt="A big one")], ["synonyms(rate=1.0, thesaurus='~/mine.json')"])
    assert made[1]["prompt"] == "A large one"
    assert augment([PromptRow(prompt="A big one")], ["paraphrases(templates='~/ways.txt')"])[1]["prompt"] == "Please: A big one"


def test_the_shipped_thesaurus_and_chance():
    known = load_thesaurus(None)
    assert all(word not in others and word.isalpha() for word, others in known.items())
    rows = [PromptRow(prompt="show a big house " * 50)]
    assert augment(rows, ["synonyms"]) == augment(rows, ["synonyms"])
    assert augment(rows, ["synonyms"], seed=1) != augment(rows, ["synonyms"])
    (_, made) = augment(rows, ["synonyms(rate=0.2)"])
    assert 15 < sum(a != b for a, b in zip(made["prompt"].split(), rows[0].prompt.split(), strict=True)) < 45


def test_copies_that_come_out_alike_are_one(tmp_path):
    file = tmp_path / "words.json"
    file.write_text('{"big": ["large"], "happy": ["glad", "cheerful"]}')
    rows = [PromptRow(prompt="A big one"), PromptRow(prompt="A happy one")]
    made = [row["prompt"] for row in augment(rows, [f"synonyms(rate=1.0, copies=8, thesaurus={str(file)!r})"])[2:]]
    assert sorted(made) == ["A cheerful one", "A glad one", "A large one"]


def test_paraphrases(tmp_path):
    ways = tmp_path / "ways.txt"
    ways.write_text("Please: {prompt}\n{prompt}\\nBe brief.\n")
    spec = f"paraphrases(templates={str(ways)!r}, copies=2)"
    rows = augment([PromptRow(prompt="Say {x}.", columns={"answer": 4})], [spec])
    assert {row["prompt"] for row in rows[1:]} == {"Please: Say {x}.", "Say {x}.\nBe brief."}
    assert all(row["answer"] == 4 for row in rows)
    ways.write_text("no place\n")
    with pytest.raises(AlignError, match=r"the line 'no place' has no \{prompt\} in it"):
        augment(ROWS, [spec])
    ways.write_bytes(b"caf\xe9: {prompt}\n")
    with pytest.raises(AlignError, match=r"ways\.txt: cannot be read: 'utf-8' codec can't decode byte 0xe9"):
        augment(ROWS, [spec])
    ways.write_text("\n")
    with pytest.raises(AlignError, match=r"ways\.txt: is empty, expected a way to put a request a line"):
        augment(ROWS, [spec])


def test_swaps_are_in_place_and_exactly_so_many():
    rows = augment(PAIRS, ["swapped(share=0.3)"])
    swapped = [row for row in rows if "origin" in row]
    assert (len(rows), len(swapped)) == (10, 3)
    for row in swapped:
        source = PAIRS[row["origin"]["row"] - 1]
        assert (row["chosen"], row["rejected"], row["margin"]) == (source.rejected, source.chosen, -1.0)
    with pytest.raises(AlignError, match="no preference pairs"):
        augment(ROWS, ["swapped(share=0.3)"])


@pytest.mark.parametrize(
    "spec",
    ["paraphrases(copies=-1)", "paraphrases(templates=3)", "synonyms(rate='often')", "synonyms(copies=0)", "swapped(share=2)"],
)
def test_wrong_values_are_refused_in_one_line(spec):
    with pytest.raises(AlignError, match=r"^augmentation '\w+': \w+=\S+: input should be [^\n]+$"):
        augment(PAIRS, [spec])


@pytest.fixture
def translators(tmp_path, tokenizer):
    """Two T5 models with random weights, in `there` and `back`. Nine tokens of ten end an answer, so that all are short."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, T5Config

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    for seed, name in enumerate(("there", "back")):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, **special, initializer_factor=4.0))
        model.generation_config.eos_token_id = [i for i in range(2, len(tokenizer)) if i % 10]
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return f"back_translation(there={str(tmp_path / 'there')!r}, back={str(tmp_path / 'back')!r}, max_new_tokens=%d, batch_size=2)"


def test_back_translation_by_two_models(tmp_path, tokenizer, translators):
    """What comes out is the second model's answer to the first's."""
    from transformers import AutoModelForSeq2SeqLM

    spec = translators % 12
    texts = ["one two three", "Fine, thanks!", "the cat sat on a mat"]
    rows = augment([*ROWS, *(TextRow(text=text) for text in texts)], [spec])
    made = [row for row in rows if "origin" in row]
    assert [row["origin"]["row"] for row in made] == [1, 2, 4, 5, 6]
    assert made[0]["completion"] == ROWS[0].completion
    assert made[2]["text"] != texts[0]

    def translate(name, text):
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name)
        ids = tokenizer(text, return_tensors="pt")
        out = model.generate(input_ids=ids["input_ids"], num_beams=4, do_sample=False, max_new_tokens=12)
        return tokenizer.decode(out[0], skip_special_tokens=True).strip() or text

    assert [row["text"] for row in made[2:]] == [translate("back", translate("there", text)) for text in texts]
    with pytest.raises(AlignError, match="no model folder"):
        augment(ROWS, [f"back_translation(there={str(tmp_path / 'none')!r}, back='x')"])


def test_back_translation_makes_nothing_of_a_prompt_that_it_would_cut(tmp_path, tokenizer, translators, capsys):
    """The reply would be that of a request whose end is gone."""
    rows = [PromptRow(prompt=prompt) for prompt in ("one two three", "one " * 200)]
    both = augment(rows, [translators % 12])
    assert [row["origin"]["row"] for row in both[2:]] == [1, 2]
    assert "nothing is made" not in capsys.readouterr().err
    assert len(augment(rows, [translators % 1])) == 2, "no answer ends before its last token"
    assert "nothing is made of 2 of 2 prompts: " in capsys.readouterr().err
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 50
    short.save_pretrained(tmp_path / "there")
    made = augment(rows, [translators % 12])
    assert made[2]["prompt"] == both[2]["prompt"]
    assert [row["origin"]["row"] for row in made[2:]] == [1]
    assert "nothing is made of 1 of 2 prompts: longer than a model reads" in capsys.readouterr().err


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows("pairs.jsonl", PAIRS)
    assert (
        main(["data", "augment", "pairs.jsonl", "--how", "paraphrases", "swapped(share=0.2)", "--out", "more.jsonl", "--json"]) == 0
    )
    account = json.loads(capsys.readouterr().out)
    assert account["made"] == {"paraphrases": 10, "swapped(share=0.2)": 2}
    assert len(load_rows("more.jsonl", "preference").rows) == account["written"] == 20
    assert main(["data", "augment", "pairs.jsonl", "--how", "parphrases", "--out", "more.jsonl"]) == 2
    assert "did you mean 'paraphrases'?" in capsys.readouterr().err


def test_a_column_called_origin_is_a_column(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = ["web", {"row": 7, "how": "paraphrases"}]
    write_rows("prompts.jsonl", [{"prompt": f"Say {i}", "origin": origin} for i, origin in enumerate(own)])
    assert main(["data", "augment", "prompts.jsonl", "--how", "paraphrases", "--out", "more.jsonl"]) == 0
    assert "paraphrases: 2 rows" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "more.jsonl").read_text().splitlines()]
    assert [row["origin"] for row in rows] == [*own, *({"row": i, "how": "paraphrases"} for i in (1, 2))]
