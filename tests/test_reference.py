"""Reference log-probs: the right ones, computed once, and never another model's or other rows'."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import llama, pairs

from align.data import write_rows
from align.engine import base_model, enable_forest
from align.models import save_model
from align.pipeline import Run
from align.recipe import Recipe
from align.reference import reference_logps
from align.scoring import branch_logps
from align.stages import SFT, Preference
from align.stages.training import precision
from align.tuning.strategies import Tuning
from align.tuning.tune import tune


@pytest.fixture
def model():
    return ready(llama())


def ready(model):
    assert enable_forest(model) is None
    return model


def with_lora(model, seed=0, *, trained=False, use_dora=False):
    """`model` with an adapter; a trained one is not the identity."""
    torch.manual_seed(seed)
    wrapped = tune(model, Tuning("lora", {"r": 4, "dora": use_dora}))
    if trained:
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return ready(wrapped)


@pytest.fixture
def files(tmp_path):
    """What is in the cache."""
    return lambda: sorted((tmp_path / "home" / "cache" / "reference_logps").iterdir())


def test_they_are_computed_once_and_then_read(model, files, capsys, monkeypatch):
    trees = pairs(3, 9)
    first = reference_logps(model, trees, 30, "dpo")
    assert first == branch_logps(model, trees, 30)
    assert capsys.readouterr().err == "dpo: log-probs of 9 rows under the reference: computed once\n"

    monkeypatch.setattr("align.reference.branch_logps", None)
    again = ready(llama())  # as a later process would load it
    assert reference_logps(again, trees, 500, "ipo") == first
    assert capsys.readouterr().err == "ipo: log-probs of 9 rows under the reference: from the cache\n"
    # What else travels with the rows, such as a margin, is none of the model's business.
    assert reference_logps(again, [replace(tree, values={}) for tree in trees], 500, "ipo") == first
    # Nor is where the model lies.
    again.config._name_or_path = "/another/place"
    assert reference_logps(again, trees, 500, "ipo") == first
    assert len(files()) == 1


def nudged(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    return model


def moved(tree):
    """The same tokens in the same order, the border of prompt and first answer elsewhere."""
    (first, *rest), second = tree.branches
    return replace(tree, prompt=[*tree.prompt, first], branches=(rest, second))


@pytest.mark.parametrize(
    "other",
    [
        lambda: (nudged(llama()), pairs(3)),
        lambda: (llama(seed=1), pairs(3)),
        lambda: (llama().to(torch.bfloat16), pairs(3)),
        lambda: (llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}), pairs(3)),  # the weights are the same
        lambda: (llama(), pairs(3)[::-1]),
        lambda: (llama(), pairs(3)[1:]),
        lambda: (llama(), [replace(tree, branches=tree.branches[::-1]) for tree in pairs(3)]),
        lambda: (llama(), [replace(tree, prompt=[9, *tree.prompt]) for tree in pairs(3)]),
        lambda: (llama(), [replace(tree, prompt_mask=[True] * len(tree.prompt)) for tree in pairs(3)]),
        lambda: (
            llama(),
            [replace(t, prompt=[*t.prompt, 9], branches=(t.branches[0][1:] or [9], t.branches[1])) for t in pairs(3)],
        ),
    ],
)
def test_another_model_or_other_rows_are_computed_anew(model, other, files):
    reference_logps(model, pairs(3), 100, "dpo")
    other_model, trees = other()
    found = reference_logps(ready(other_model), trees, 100, "dpo")
    assert found == branch_logps(other_model, trees, 100)
    assert len(files()) == 2


def test_another_precision_is_computed_anew(model, files):
    exact = reference_logps(model, pairs(3), 100, "dpo")
    with torch.autocast("cpu", torch.bfloat16):
        rounded = reference_logps(model, pairs(3), 100, "dpo")
        assert rounded == branch_logps(model, pairs(3), 100) != exact
    assert len(files()) == 2


def test_another_version_computes_anew(model, files, monkeypatch):
    reference_logps(model, pairs(3), 100, "dpo")
    monkeypatch.setattr("align.reference.__version__", "another")
    reference_logps(model, pairs(3), 100, "dpo")
    assert len(files()) == 2


@pytest.mark.parametrize("use_dora", [False, True])
def test_with_lora_the_reference_is_the_base_whatever_the_adapter(model, files, use_dora, monkeypatch):
    trees = pairs(3)
    adapted = with_lora(llama(), trained=True, use_dora=use_dora)
    assert adapted.get_base_model() is base_model(adapted)
    bare = branch_logps(model, trees, 100)
    assert branch_logps(adapted, trees, 100)[0] != pytest.approx(bare[0], rel=1e-3)  # else nothing would be compared
    found = reference_logps(adapted, trees, 100, "dpo")
    assert [value for values in found for value in values] == pytest.approx(
        [value for values in bare for value in values], rel=1e-6
    )

    # The bare base, and other adapters on it, find the same file.
    monkeypatch.setattr("align.reference.branch_logps", None)
    assert reference_logps(model, trees, 100, "dpo") == found
    assert reference_logps(with_lora(llama(), seed=5, use_dora=use_dora), trees, 100, "dpo") == found
    assert len(files()) == 1


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)


def garbage(path):
    path.write_bytes(b"not what it says" * 9)


def another_count(path):
    from align.reference import _write

    _write(path, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("damage", [cut_short, empty, flip, garbage, another_count])
def test_a_damaged_file_is_said_and_written_anew(model, damage, files, capsys):
    trees = pairs(3)
    first = reference_logps(model, trees, 100, "dpo")
    (path,) = files()
    whole = path.read_bytes()
    damage(path)
    capsys.readouterr()
    assert reference_logps(model, trees, 100, "dpo") == first
    said = capsys.readouterr().err.splitlines()
    assert f"the cache's {path} is damaged" in said[0]
    assert "computed once" in said[1]
    assert path.read_bytes() == whole
    assert files() == [path]


def test_reading_leaves_the_model_as_it_is(model):
    adapted = with_lora(llama(), trained=True)
    before = copy.deepcopy(adapted.state_dict())
    own = branch_logps(adapted, pairs(3), 100)
    for _ in range(2):
        reference_logps(adapted, pairs(3), 100, "dpo")
    assert all(torch.equal(before[name], value) for name, value in adapted.state_dict().items())
    assert branch_logps(adapted, pairs(3), 100) == own
    assert any(parameter.requires_grad for parameter in adapted.parameters())


def test_a_sweep_pays_once(tokenizer, tmp_path, capsys):
    """Other betas, another loss, LoRA, another budget, and a run elsewhere: one file. Another maximum length: another."""
    save_model(llama(), tokenizer, tmp_path / "base")
    rows = [
        {"prompt": f"How are you, {word}? ", "chosen": f"Fine, {word}.", "rejected": f"A cat on a mat {other}"}
        for word in ("one", "two", "three", "four five six")
        for other in ("me", "you")
    ]
    write_rows(tmp_path / "pairs.jsonl", rows)
    common = {"model": str(tmp_path / "base"), "data": str(tmp_path / "pairs.jsonl"), "held_out": 0.3, "max_steps": 1}

    def said(name, out="runs", **fields):
        Run(Recipe(name, {name: Preference(**{**common, "beta": 0.1, **fields})}), tmp_path / out).execute()
        return [line for line in capsys.readouterr().err.splitlines() if "log-probs of" in line]

    def lines(name, how):
        parts = {name: 6, f"{name} (held out)": 2}
        return [f"{part}: log-probs of {count} rows under the reference: {how}" for part, count in parts.items()]

    assert said("first") == lines("first", "computed once")
    for name, fields in {
        "beta": {"beta": 0.5},
        "ipo": {"loss": "ipo"},
        "auto": {"max_tokens_per_micro_batch": "auto"},
        "lora": {"use_peft": True, "lora_r": 4, "learning_rate": 1e-2},
        "elsewhere": {"out": "other"},
    }.items():
        assert said(name, **fields) == lines(name, "from the cache")
    assert said("short", max_length=16)[1] == lines("short", "computed once")[1]  # of the others none is longer


def test_in_bf16_the_reference_and_every_evaluation_are_in_bf16(tokenizer, tmp_path):
    """Policy and reference stay one model at this learning rate: what moved a reward off 0 would be a difference in precision."""
    save_model(llama(initializer_range=0.3), tokenizer, tmp_path / "base")
    rows = [{"prompt": f"Are you {word}? ", "chosen": f"I am {word}.", "rejected": "A cat on a mat."} for word in "abcdefgh"]
    write_rows(tmp_path / "pairs.jsonl", rows)
    stage = Preference(
        model=str(tmp_path / "base"),
        data=str(tmp_path / "pairs.jsonl"),
        held_out=0.3,
        beta=1,
        max_steps=1,
        learning_rate=1e-12,
        bf16=True,
    )
    metrics = Run(Recipe("bf16", {"dpo": stage}), tmp_path / "runs").execute()["dpo"].metrics
    for when in ("", "_before"):
        assert metrics[f"eval_loss{when}"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[f"eval_rewards/margins{when}"] == pytest.approx(0, abs=1e-6)


def test_passes_outside_of_training_are_as_precise_as_those_within():
    """Bfloat16 by the stage's own field, or by its launch."""
    for fields, expected in (({}, False), ({"bf16": True}, True), ({"launch": {"mixed_precision": "bf16"}}, True)):
        with precision(SFT(model="m", data="d", **fields)):
            assert torch.is_autocast_enabled("cpu") is expected
