"""`align export`: what was an adapter is one folder of its own, answers the same, and says where it came from."""

import json
import random
import shutil
import subprocess

import pytest
import torch
import yaml
from helpers import assert_close, llama, tokens
from peft import PeftModel
from peft.tuners.lora import LoraModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align.cli import main
from align.data import write_rows
from align.models import load_causal_lm, save_model
from align.pipeline import Run
from align.recipe import Recipe
from align.registry import Registry
from align.rollout import Sampling, complete
from align.stages import SFT, RewardModel
from align.tuning.strategies import Tuning
from align.tuning.tune import tune


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A folder with a base, the run of two stages on it, and their registry."""
    return tmp_path_factory.mktemp("export")


@pytest.fixture(autouse=True)
def _home(ground, monkeypatch):
    monkeypatch.setenv("ALIGN_HOME", str(ground / "home"))


@pytest.fixture(scope="module")
def trained(ground, tokenizer):
    """An SFT adapter, registered as ``two-sft``, and a reward model's on top of it, ``two-reward``."""
    save_model(llama(), tokenizer, ground / "base")
    rows = [{"instruction": "How are you?", "input": "", "output": f"Fine, {n}"} for n in ("one", "two three", "four")]
    write_rows(ground / "sft.jsonl", rows)
    write_rows(ground / "pairs.jsonl", [{"prompt": "Hello?", "chosen": f"one {n}", "rejected": f"two {n}"} for n in range(3)])
    common = {"held_out": 0, "max_steps": 3, "learning_rate": 1e-2, "chat_template": "plain", "tuning": "lora", "max_length": 64}
    stages = {
        "sft": SFT(model=str(ground / "base"), data=str(ground / "sft.jsonl"), **common),
        "reward": RewardModel(model="sft", data=str(ground / "pairs.jsonl"), **common),
    }
    return Run(Recipe("two", stages), ground / "out", registry=Registry(ground / "home")).execute()


def rows_of(count, seed=0):
    draw = random.Random(seed)
    return [tokens(draw, draw.randint(2, 9)) for _ in range(count)]


def logits(model):
    ids = torch.tensor([tokens(random.Random(1), 12)])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def export(capsys, *arguments):
    code = main(["export", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


def test_the_merged_export_answers_as_the_adapter_did(trained, ground, tmp_path, capsys):
    """Logits to 1e-4, and 50 prompts greedily, word for word."""
    written, said = export(capsys, "two-sft", "--merge", "--to", tmp_path / "there", "--max_shard_size", "40KB")
    assert written["shards"] > 1
    assert len(list((tmp_path / "there").glob("*.safetensors"))) == written["shards"]
    assert written["largest_difference"] <= 1e-4
    assert "logits differ by at most" in said
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "there")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ground / "base"), trained["sft"].path)
    assert_close(logits(ours), logits(theirs), 1e-4)
    assert (logits(ours) - logits(load_causal_lm(str(ground / "base")))).abs().max() > 1e-3
    sampling = Sampling(12, temperature=0.0)
    assert complete(ours, rows_of(50), sampling, [2]) == complete(theirs, rows_of(50), sampling, [2])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "there")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(trained["sft"].path).chat_template
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_end_token_that_an_adapter_was_taught_is_exported(ground, tokenizer, tmp_path, capsys):
    """`generate` stops at it: where the chat template ends an answer with another token than the tokenizer's own."""
    model = llama()
    model.generation_config.eos_token_id = [7, 2]
    adapted = tune(model, Tuning("lora", {"r": 2}), tmp_path / "adapter")
    save_model(adapted, tokenizer, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter" / "base")
    base.generation_config.eos_token_id = 2  # as it was before training
    base.save_pretrained(tmp_path / "adapter" / "base")
    assert load_causal_lm(str(tmp_path / "adapter")).generation_config.eos_token_id == [7, 2]
    assert load_causal_lm(str(tmp_path / "adapter"), on_adapter="continue").generation_config.eos_token_id == [7, 2]
    export(capsys, tmp_path / "adapter", "--merge", "--to", tmp_path / "there")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "there").generation_config.eos_token_id == [7, 2]


def test_an_export_to_a_full_disk_names_it_and_leaves_nothing(trained, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        _, said = export(capsys, "two-sft", "--merge", "--to", disk / "there")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    assert said.startswith(f"align: error: the disk of {disk}/there is full (0 MB free); make room")
    assert said.count("\n") == 1


def test_the_card_says_where_it_came_from(trained, ground, tmp_path, capsys):
    export(capsys, "two-reward", "--merge", "--to", tmp_path / "there")
    card = (tmp_path / "there" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["align", "reward"],
    }
    for line in ("- two-reward@1 (`reward`)", "  - two-sft@1 (`sft`)", "    - base (base)", "  - data: pairs.jsonl, fingerprint `"):
        assert line in text
    assert trained["reward"].data.popitem()[1][:16] in text
    assert f"| trainable_parameters | {trained['reward'].metrics['trainable_parameters']:.4g} |" in text
    assert "tuning: lora" in text
    assert str(ground) not in card
    assert torch.__version__ in text


def test_a_model_of_another_registry_is_exported(trained, tmp_path, capsys, monkeypatch):
    """A copied folder, its ancestors left behind: what is not known here is neither followed nor called a base on the hub."""
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    export(capsys, trained["reward"].path, "--merge", "--to", tmp_path / "there")
    _, front, text = (tmp_path / "there" / "README.md").read_text().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front)
    assert "\n  - two-sft@1\n" in text


def test_a_reward_model_keeps_its_head_and_its_scale(trained, ground, tmp_path, capsys):
    export(capsys, "two-reward", "--merge", "--to", tmp_path / "there")
    adapter = trained["reward"].path
    named = json.loads((ground / "out" / adapter.rpartition("/")[2] / "adapter_config.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(named["base_model_name_or_path"], num_labels=1)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    assert expected.abs().max() > 0
    assert_close(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "there")), expected, 1e-4)
    assert (tmp_path / "there" / "score_scale.json").is_file()


def test_another_type(trained, ground, tmp_path, capsys):
    written, _ = export(capsys, "two-sft", "--merge", "--to", tmp_path / "half", "--dtype", "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.dtype == torch.bfloat16
    assert written["dtype"] == "bfloat16"
    assert 0 < written["largest_difference"] < 0.5
    assert written["bytes"] < 2.2 * written["parameters"]


def test_a_whole_model_needs_no_merge_and_no_registry(trained, ground, tmp_path, capsys):
    written, _ = export(capsys, ground / "base", "--to", tmp_path / "there")
    assert written["largest_difference"] == 0
    assert "# base\n" in (tmp_path / "there" / "README.md").read_text()


def test_what_is_refused_leaves_nothing(trained, ground, tmp_path, capsys, tokenizer):
    there = tmp_path / "there"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 320}
    labels = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("llama", num_labels=3, **sizes))
    save_model(labels, tokenizer, tmp_path / "labels")
    soft = tune(load_causal_lm(str(ground / "base")), Tuning("prompt", {"num_virtual_tokens": 2}), tmp_path / "soft")
    save_model(soft, tokenizer, tmp_path / "soft")
    for arguments, message in (
        (["two-sft", "--to", there], "two-sft is an adapter: add --merge"),
        (["two-sft", "--merge", "--to", ground / "base"], "exists, and an export overwrites nothing"),
        (["two-sft", "--merge", "--to", there, "--dtype", "int8"], "dtype 'int8' is not one of"),
        (["two-sft", "--merge", "--to", there, "--max_shard_size", "5XB"], "max_shard_size '5XB' is not a size such as"),
        (["two-sfd", "--merge", "--to", there], "two-sfd"),
        ([tmp_path / "soft", "--merge", "--to", there], "are virtual tokens (PROMPT_TUNING)"),
        ([tmp_path / "labels", "--to", there], "is a classifier of 3 labels, neither a reward model nor a task's"),
    ):
        written, said = export(capsys, *arguments)
        assert written is None
        assert message in said
        assert not there.exists()
    assert {artifact.reference for artifact in Registry().all()} == {"two-sft@1", "two-reward@1"}


def test_a_model_without_a_tokenizer_is_refused(trained, ground, tmp_path, capsys):
    shutil.copytree(ground / "base", tmp_path / "untold")
    for file in (tmp_path / "untold").glob("*token*"):
        file.unlink()
    code = main(["export", str(tmp_path / "untold"), "--to", str(tmp_path / "there")])
    assert code == 2
    assert "holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_one_that_would_answer_otherwise_is_not_written(trained, ground, tmp_path, capsys, monkeypatch):
    """The check is real: an adapter that is merged half as strong again is seen."""
    merge = LoraModel.merge_and_unload

    def stronger(self):
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "lora_B" in name:
                    p.mul_(1.5)
        return merge(self)

    monkeypatch.setattr(LoraModel, "merge_and_unload", stronger)
    written, said = export(capsys, "two-sft", "--merge", "--to", tmp_path / "there")
    assert written is None
    assert "the exported model's logits differ by" in said
    assert not (tmp_path / "there").exists()
