"""Data larger than memory: rows and trees on disk are those in memory, and every stage that can trains on them."""

import json
import random
import tracemalloc
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import llama

from align.artifact import MANIFEST
from align.data import load_rows, write_rows
from align.encode import Encoder
from align.errors import AlignError
from align.forest import Tree
from align.intake.mixture import chosen, shares
from align.intake.store import RowFile, TreeFile
from align.progress import History
from align.schema import PreferenceRow, PromptRow, SFTRow
from align.stages import SFT, Preference, Pretrain, RewardModel
from align.stages.base import Context
from align.stages.kto import KTO
from align.stages.rows import encoded, rewritten, rows_of, streams

SAMPLES = Path(__file__).parents[1] / "data" / "samples"


def context(folder):
    folder.mkdir(exist_ok=True)
    return Context("stage", folder, History(folder / "metrics.jsonl"))


def pairs(path, count, seed=0):
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "said", "hello", "to", "me"]
    chance = random.Random(seed)
    with path.open("w") as file:
        for i in range(count):
            said = [" ".join(chance.choices(words, k=chance.randint(1, 6))) for _ in range(2)]
            file.write(json.dumps({"prompt": f"{i} the cat?", "chosen": said[0] + " one", "rejected": said[1] + " two"}) + "\n")
    return path


def preference(path, **changes):
    return Preference(loss="orpo", beta=0.1, model="m", data=[str(path)], held_out=0.2, **changes)


def test_rows_in_a_file_are_those_in_memory(tmp_path):
    for name, kind in (("openai.jsonl", "sft"), ("sharegpt.tools.jsonl", "sft"), ("native.prompts.jsonl", "prompts")):
        rows = load_rows(SAMPLES / name, kind).rows
        file = RowFile(tmp_path)
        for row in rows:
            file.append(row)
        assert list(file) == rows
        assert (len(file), file[0], file[-1]) == (len(rows), rows[0], rows[-1])
        one, other = iter(file), iter(file)
        assert next(one) == next(other)
    assert list(RowFile(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "trees",
    [
        [Tree([1, 2, 3], ([4], [5, 6]), values={"margin": [0.5]}), Tree([7], ([], [70_000]), values={"margin": [-1.0]})],
        [Tree([1, 2, 3], prompt_mask=[False, True, True]), Tree([4, 5], prompt_mask=[True, False])],
        [Tree([1], ([2],), values={"a": [1.0], "b": [2.0, 3.0]})] * 3,
        [],
    ],
)
def test_trees_in_a_file_are_those_in_memory(tmp_path, trees):
    file = TreeFile(tmp_path, iter(trees))
    assert list(file) == trees == file[:]
    assert file.longest == max((tree.longest for tree in trees), default=0)
    assert not trees or (file[-1], file[1:2]) == (trees[-1], trees[1:2])
    with pytest.raises(IndexError):
        file[len(trees)]
    assert list(tmp_path.iterdir()) == []


def test_trees_of_different_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="among trees of"):
        TreeFile(tmp_path, [Tree([1], ([2],)), Tree([1], ([2], [3]))])


def test_a_file_of_trees_is_rewritten_a_group_at_a_time(tmp_path):
    """Two groups of two and what is left."""
    trees, seen = [Tree([n], ([n, n],), values={"margin": [float(n)]}) for n in range(1, 6)], []

    def doubled(group):
        seen.append(len(group))
        return [Tree(tree.prompt, tree.branches, values={"margin": [2 * x for x in tree.values["margin"]]}) for tree in group]

    found = rewritten(TreeFile(tmp_path, iter(trees)), doubled, group=2)
    assert list(found) == doubled(trees)
    assert seen[:-1] == [2, 2, 1]


def test_a_stream_gives_the_trees_and_the_account_of_memory(tmp_path, tokenizer, capsys, monkeypatch):
    """Encoded in four groups, and what became of the rows is counted over all of them."""
    monkeypatch.setattr("align.stages.rows.GROUP", 64)
    path = pairs(tmp_path / "pairs.jsonl", 300)
    path.write_text(path.read_text() + '{"prompt": "p", "chosen": "same", "rejected": "same "}\n')
    path.write_text(path.read_text() + json.dumps({"prompt": "the cat " * 30, "chosen": "a", "rejected": "b"}) + "\n")
    encoder, found, said = Encoder(tokenizer, 14), {}, {}
    for streaming in (False, True):
        stage, place = preference(path, streaming=streaming), context(tmp_path / str(streaming))
        train, held = rows_of(stage, "preference", place)
        trees = [encoded(encoder.preference, rows, "stage") for rows in (train, held)]
        assert isinstance(trees[0], TreeFile) is streaming
        found[streaming] = [list(part) for part in trees]
        said[streaming] = [
            line.replace(str(place.folder), "") for line in capsys.readouterr().err.splitlines() if " rows = " in line
        ]
        assert "identical" in (place.folder / "quarantine.jsonl").read_text()
    assert found[True] == found[False]
    assert all(found[True])
    assert said[True] == said[False]
    assert "302 rows = 301 used + 1 set aside (1 identical chosen and rejected); they are in" in said[True][0]
    assert any("leave no room for an answer" in line for line in said[True])
    assert any("tokens cut from" in line for line in said[True])


def test_of_several_processes_the_first_writes_what_is_set_aside(tmp_path):
    """All of them read the rows, each at its own pace."""
    path, first = pairs(tmp_path / "pairs.jsonl", 20), context(tmp_path / "stage")
    path.write_text(path.read_text() + '{"prompt": "p", "chosen": "same", "rejected": "same "}\n')
    rows_of(preference(path), "preference", first)
    (first.folder / "quarantine.jsonl").write_text("of the first\n")
    second = replace(first, history=History(first.history.path, writes=False))
    rows_of(preference(path), "preference", second)
    assert (first.folder / "quarantine.jsonl").read_text() == "of the first\n"


def test_memory_does_not_grow_with_the_rows(tmp_path, tokenizer, monkeypatch):
    """Python's own memory at its peak, over five times the rows; benchmarks/data.py does it with millions."""
    monkeypatch.setattr("align.stages.rows.GROUP", 256)
    peaks = []
    for count in (1_000, 4_000):
        path, place = pairs(tmp_path / f"{count}.jsonl", count), context(tmp_path / f"at-{count}")
        stage = preference(path, streaming=True)
        rows_of(stage, "preference", place)  # what is made once, such as the validators of the rows
        tracemalloc.start()
        train, _ = rows_of(stage, "preference", place)
        encoded(Encoder(tokenizer, 24).preference, train, "stage")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.6 * peaks[0]  # in memory it is four times as much


@pytest.mark.parametrize("cls", [SFT, RewardModel, Preference, Pretrain])
def test_stages_train_on_a_stream_as_in_memory(tmp_path, tokenizer, cls):
    """The same metrics, to the last bit."""
    path = pairs(tmp_path / "pairs.jsonl", 40)
    if cls is Pretrain:
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": f"the cat {i} sat on a mat and said hello"}) + "\n" for i in range(40)))
    model = tmp_path / "model"
    llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    losses = {"loss": "dpo", "beta": 0.1} if cls is Preference else {}
    results = []
    for streaming in (False, True):
        stage = cls(
            model=str(model), data=[str(path)], held_out=0.2, learning_rate=1e-3, max_steps=3, streaming=streaming, **losses
        )
        place = context(tmp_path / f"run-{streaming}")
        results.append(stage.run(place))
        assert not [file for file in place.folder.iterdir() if file.name.startswith(".") or file.name == MANIFEST]
    timeless = [{key: value for key, value in result.items() if "seconds" not in key} for result in results]
    assert timeless[0] == timeless[1]


def test_a_stage_that_needs_its_rows_in_memory_says_so(tmp_path):
    path = pairs(tmp_path / "pairs.jsonl", 4)
    with pytest.raises(AlignError, match="streaming: the stages pretrain, sft, reward, preference can"):
        rows_of(KTO(model="m", beta=0.1, data=[str(path)], streaming=True), "unpaired", context(tmp_path / "run"))


def test_rows_that_old_ones_are_mixed_into_stay_in_memory(tmp_path, monkeypatch):
    """With large files this was refused after all rows had been read, tokenized and written."""
    monkeypatch.setattr("align.stages.rows.LARGE", 1)
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"say {i}", "completion": "one"} for i in range(8)])
    stage = SFT(model="m", data=str(tmp_path / "a.jsonl"), learning_rate=1e-3, held_out=0.0)
    assert streams(stage)
    mixed = stage.model_copy(update={"replay_data": stage.data})
    assert not streams(mixed)
    with pytest.raises(AlignError, match="streaming: replay_data is mixed into rows in memory"):
        streams(mixed.model_copy(update={"streaming": True}))


# -- mixtures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ([1000, 300], [0.5, 0.5], [300, 300]),
        ([1000, 300], [9, 1], [1000, 111]),
        ([1000, 300], [3, 1], [900, 300]),
        ([5, 5], [1, 1000], [1, 5]),
    ],
)
def test_shares(counts, weights, expected):
    """Worked out by hand: the source that runs out first is taken whole."""
    assert shares(counts, weights) == expected


def test_chosen_rows_are_a_sample():
    assert sum(chosen(1000, 300, 0)) == 300
    assert chosen(1000, 300, 0) == chosen(1000, 300, 0) != chosen(1000, 300, 1)
    assert sum(chosen(1000, 300, 0)[:500]) == pytest.approx(150, abs=35)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_of_sources(tmp_path, streaming, capsys):
    sources = [str(pairs(tmp_path / name, count)) for name, count in (("a.jsonl", 60), ("b.jsonl", 20))]
    stage = Preference(
        loss="orpo", beta=0.1, model="m", data=sources, data_weights=[1, 1], held_out=0.0, max_rows_per_source=[None, 10]
    ).model_copy(update={"streaming": streaming})
    rows, held = rows_of(stage, "preference", context(tmp_path / "run"))
    assert (len(rows), len(held)) == (20, 0)
    assert len({row.prompt for row in rows}) > 10
    assert "a.jsonl: 10 of 60 rows are in the mixture" in capsys.readouterr().err


def test_a_number_for_each_source():
    with pytest.raises(ValueError, match="data_weights has 1 numbers, and data 2 sources"):
        SFT(model="m", data=["a", "b"], data_weights=[1])


# -- texts ahead ---------------------------------------------------------------------------------------------------------------


def test_texts_tokenized_ahead_are_those_tokenized_one_by_one(tokenizer, monkeypatch, real):
    """Every kind of row, with the plain tokenizer and a real one that adds a begin token; and with one whose file says to cut and
    to fill up, as those of published encoders do, which transformers heeds only when asked.
    """
    from transformers import AutoTokenizer

    stories = AutoTokenizer.from_pretrained(real / "models" / "stories260k")
    stories.chat_template = tokenizer.chat_template
    turns = [{"role": "user", "content": "Hello to me"}, {"role": "assistant", "content": " said the cat"}]
    strings = {"prompt": "the cat", "chosen": " sat", "rejected": ""}
    rows = {
        "preference": [
            PreferenceRow.model_validate(strings),
            PreferenceRow.model_validate({"prompt": turns[:1], "chosen": turns[1:], "rejected": turns[1:]}),
            PreferenceRow.model_validate({**strings, "prompt": ""}),
        ],
        "sft": [
            SFTRow.model_validate({"messages": turns}),
            SFTRow.model_validate({"messages": turns * 2}),
            SFTRow.model_validate({"messages": turns[1:]}),
            SFTRow.model_validate({"prompt": "<s> the", "completion": "cat"}),
        ],
        "prompts": [PromptRow.model_validate({"prompt": turns[:1]}), PromptRow.model_validate({"prompt": "two three"})],
    }
    cutting = deepcopy(tokenizer)
    for each in (tokenizer, stories, cutting):
        encoder = Encoder(each, 200)
        for name, group in rows.items():
            if each is cutting:
                each.backend_tokenizer.enable_truncation(3)
                each.backend_tokenizer.enable_padding(length=20)
            ahead = getattr(encoder, name)(group).trees
            with monkeypatch.context() as patch:
                patch.setattr(Encoder, "_ahead", lambda self, rows: iter(rows))
                assert ahead == getattr(Encoder(each, 200), name)(group).trees
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    assert Encoder(tokenizer, 200).prompts(rows["prompts"]).trees, "no text is left to be tokenized by itself"
