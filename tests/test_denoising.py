"""Pretraining of encoders and encoder-decoders: what is corrupted can be put together again, and the loss falls."""

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from launched import run_on_two
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

from align.cli import main
from align.data import write_rows
from align.errors import AlignError
from align.models import family_of, load_language_model, load_tokenizer
from align.schema import TextRow
from align.trainers.denoising import IGNORED, DenoisingTrainer, MaskedWords, SpanCorruption

WORDS = "the cat sat on a mat and said hello to me. How are you? Fine, thanks! one two three four five six seven eight"
TEXTS = [f"{WORDS[i:]} {WORDS[:i]}" for i in range(0, 40, 4)]


@pytest.fixture
def masked(tokenizer):
    return MaskedWords(deepcopy(tokenizer), 64)


@pytest.fixture
def spans(tokenizer):
    return SpanCorruption(deepcopy(tokenizer), 64)


def test_sentinels_stand_for_what_is_gone(spans):
    """Put each sentinel's words back where it stands, and the text is whole; 15 % are gone, in spans of 3."""
    ids = list(range(3, 63))
    torch.manual_seed(0)
    for _ in range(20):
        item = spans.corrupt({"input_ids": ids})
        gone, current = {}, None
        for token in item["labels"][:-1]:
            if token in spans.sentinels:
                current = gone.setdefault(token, [])
            else:
                current.append(token)
        assert sum(map(len, gone.values())) == 9  # of 60
        assert len(gone) == 3
        assert list(gone) == spans.sentinels[:3]
        whole = [token for each in item["input_ids"][:-1] for token in gone.get(each, [each])]
        assert whole == ids
        assert item["input_ids"][-1] == item["labels"][-1] == spans.tokenizer.eos_token_id


def test_special_tokens_are_looked_up_once(masked, monkeypatch):
    """The tokenizer makes its list anew each time, of 100 sentinels with T5's: for every token of the data that took minutes."""
    asked = 0
    ids = masked.tokenizer.all_special_ids

    def counted(self):
        nonlocal asked
        asked += 1
        return ids

    monkeypatch.setattr(type(masked.tokenizer), "all_special_ids", property(counted), raising=False)
    assert len(masked.blocks([TextRow(text=text) for text in TEXTS])) == len(TEXTS)
    assert asked == 1


@pytest.mark.parametrize("length", [2, 3, 7])
def test_a_short_text_keeps_a_word_and_loses_one(spans, length):
    item = spans.corrupt({"input_ids": list(range(3, 3 + length))})
    assert len(item["labels"]) >= 3
    assert item["input_ids"][0] == 3


def test_masked_words_are_told_and_the_others_are_not(masked):
    ids = [i % 300 + 3 for i in range(4000)]
    torch.manual_seed(0)
    item = masked.corrupt({"input_ids": ids})
    told = [i for i, label in enumerate(item["labels"]) if label != IGNORED]
    assert len(told) / len(ids) == pytest.approx(0.15, abs=0.02)
    assert all(item["labels"][i] == ids[i] for i in told)
    assert all(now == before for i, (now, before) in enumerate(zip(item["input_ids"], ids, strict=True)) if i not in set(told))
    share = sum(item["input_ids"][i] == masked.tokenizer.mask_token_id for i in told) / len(told)
    assert share == pytest.approx(0.8, abs=0.05)


def test_of_a_short_block_a_word_is_told_too(masked):
    """Drawn word by word, two in three would have none, and a batch without any no mean."""
    torch.manual_seed(0)
    for _ in range(50):
        item = masked.corrupt({"input_ids": [50, 60]})
        assert any(label != IGNORED for label in item["labels"])


def test_held_out_text_is_corrupted_the_same_way_each_time_and_chance_goes_on(masked):
    blocks = masked.blocks([TextRow(text=text) for text in TEXTS])
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    first = masked.fixed(blocks, 0)
    assert torch.rand(1) == wanted
    assert first == masked.fixed(blocks, 0)
    assert first != masked.fixed(blocks, 1)


def test_a_block_is_corrupted_alike_whatever_stands_beside_it(masked):
    """So that the batch of an optimizer step is the same, however processes and micro-steps share it."""
    blocks = masked.blocks([TextRow(text=text) for text in TEXTS])
    assert masked.fixed(blocks[::2], 5) + masked.fixed(blocks[1::2], 5) == [
        *masked.fixed(blocks, 5)[::2],
        *masked.fixed(blocks, 5)[1::2],
    ]


def test_the_words_of_a_block_are_others_at_each_step_and_with_another_seed(masked, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, seen = BertForMaskedLM(BertConfig(vocab_size=len(masked.tokenizer), **sizes)), []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["labels"].tolist()), with_kwargs=True)
    quiet = {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
    blocks = masked.blocks([TextRow(text=TEXTS[0])])
    for seed in (1, 2, 1):
        arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=1, seed=seed, **quiet)
        DenoisingTrainer(model, arguments, train_dataset=blocks[:1], denoiser=masked).train()
    assert len(set(map(str, seen[:6]))) == 6
    assert seen[6:] == seen[:3]


def test_blocks_hold_every_token_once(masked):
    text = WORDS * 5
    blocks = masked.blocks([TextRow(text=text), TextRow(text="a")])
    assert [token for block in blocks for token in block["input_ids"]] == masked.tokenizer(text)["input_ids"]
    assert max(len(block["input_ids"]) for block in blocks) == 64


def test_a_tokenizer_without_enough_sentinels_is_refused(tokenizer):
    few = deepcopy(tokenizer)
    few.add_special_tokens({"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>"]})
    with pytest.raises(AlignError, match="up to 10 spans, and the tokenizer 2 sentinels"):
        SpanCorruption(few, 200)


# -- the stage -----------------------------------------------------------------------------------------------------------------

SMALL = "--architecture.hidden_size 32 --architecture.intermediate_size 64 --architecture.num_hidden_layers 2"
SMALL += " --architecture.num_attention_heads 4 --architecture.max_position_embeddings 128"
T5 = "--architecture.d_model 32 --architecture.d_ff 64 --architecture.d_kv 8 --architecture.num_layers 2 --architecture.num_heads 4"
FAMILIES = {
    "bert": (f"--architecture.model_type bert {SMALL}", "masked"),
    "roberta": (f"--architecture.model_type roberta {SMALL}", "masked"),
    "albert": (f"--architecture.model_type albert {SMALL} --architecture.embedding_size 16", "masked"),
    "t5": (f"--architecture.model_type t5 {T5}", "encoder-decoder"),
}
NO_DROPOUT = {
    "bert": f"{FAMILIES['bert'][0]} --architecture.hidden_dropout_prob 0 --architecture.attention_probs_dropout_prob 0",
    "t5": f"{FAMILIES['t5'][0]} --architecture.dropout_rate 0",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, command):
    assert main([*command.split(), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("architecture", "family"), FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_pretrained_by_its_own_objective_and_goes_on(capsys, folder, architecture, family):
    def pretrain(fields, steps):
        common = "--data texts.jsonl --eval_data texts.jsonl --max_length 64 --warmup_ratio 0"
        return run(capsys, f"pretrain {fields} {common} --max_steps {steps} --eval_steps {steps}")

    first = pretrain(f"{architecture} --vocab_size 300 --learning_rate 5e-3 --name first", 30)
    metrics = first["metrics"]
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.5
    assert metrics["eval_token_accuracy"] > metrics["eval_token_accuracy_before"]
    model = load_language_model(first["path"])
    assert family_of(model.config) == family
    second = pretrain("--model first --tuning lora --learning_rate 1e-2 --name second", 120)["metrics"]
    assert second["eval_loss_before"] == pytest.approx(metrics["eval_loss"], rel=1e-4)
    assert second["eval_loss"] < second["eval_loss_before"]
    assert second["trainable_share"] < 0.6


@pytest.mark.parametrize("architecture", NO_DROPOUT.values(), ids=NO_DROPOUT)
def test_accumulated_steps_are_one_big_batch(capsys, folder, architecture):
    """Without dropout the same words are drawn, and all told tokens of the step count alike, in loss and in gradient."""

    def first_step(sizes):
        command = f"pretrain {architecture} --data texts.jsonl --held_out 0 --max_length 24 --vocab_size 300 --max_steps 1 {sizes}"
        path = run(capsys, command)["path"]
        return json.loads((Path(path) / "metrics.jsonl").read_text().splitlines()[0])

    whole = first_step("--per_device_train_batch_size 6 --output_dir whole")
    parts = first_step("--per_device_train_batch_size 1 --gradient_accumulation_steps 6 --output_dir parts")
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_run_that_goes_on_in_the_middle_of_an_epoch_draws_the_same_words(capsys, folder, family):
    """The loader is a batch ahead of the steps: what it had drawn by the time of a checkpoint was drawn anew."""
    sizes = "--max_length 64 --num_train_epochs 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2"
    command = f"pretrain {FAMILIES[family][0]} --data texts.jsonl --held_out 0 --vocab_size 300 --save_steps 1 {sizes}"
    command += " --save_total_limit 99 --output_dir out"
    out = Path(run(capsys, command)["path"])
    whole = load_file(out / "model.safetensors")
    (out / "artifact.json").rename(out / "begun.json")
    (out / "model.safetensors").unlink()
    for checkpoint in (out / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-1":
            shutil.rmtree(checkpoint)
    run(capsys, command)
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_held_out_loss_is_over_all_tokens_of_the_set(capsys, folder):
    """Against the direct computation, block by block without padding."""
    common = "--data texts.jsonl --eval_data texts.jsonl --max_length 64 --max_steps 1 --per_device_train_batch_size 3"
    artifact = run(capsys, f"pretrain {FAMILIES['bert'][0]} {common} --vocab_size 300")
    model, tokenizer = load_language_model(artifact["path"]).eval(), load_tokenizer(artifact["path"])
    denoiser = MaskedWords(tokenizer, 64)
    loss = right = count = 0
    for item in denoiser.fixed(denoiser.blocks([TextRow(text=text) for text in TEXTS]), 0):
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([item["input_ids"]])).logits[0].double().log_softmax(-1)
        for i, label in enumerate(item["labels"]):
            if label != IGNORED:
                loss, count = loss - log_p[i, label].item(), count + 1
                right += log_p[i].argmax().item() == label
    assert artifact["metrics"]["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
    assert artifact["metrics"]["eval_token_accuracy"] == pytest.approx(right / count)
    assert math.isfinite(loss)


def test_two_processes_tell_the_same_words_and_measure_every_held_out_block_once(capsys, folder):
    """Ten blocks in batches of four: accelerate fills up the last ones of both with six from the start, which must not count, in
    the second step as little as in the measure. And the words of a step were drawn by the number of the process.
    """
    command = f"pretrain {NO_DROPOUT['bert']} --data texts.jsonl --eval_data texts.jsonl --max_length 64 --max_steps 2"
    command += " --vocab_size 300 --logging_steps 1"
    one = run(capsys, f"{command} --per_device_train_batch_size 8 --name one")["metrics"]
    names = command.replace("--", "").split()[1:]
    architecture, fields = {}, {"per_device_train_batch_size": 4, "launch": {"num_processes": 2}}
    for name, value in zip(names[::2], names[1::2], strict=True):
        into = architecture if name.startswith("architecture.") else fields
        into[name.removeprefix("architecture.")] = yaml.safe_load(value)
    (two,) = run_on_two([("pretrain", fields | {"architecture": architecture}, str(folder / "two"))], "ddp", folder)
    for name in ("eval_loss_before", "train_loss", "eval_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-5), name


class Steep(DenoisingTrainer):
    """The same loss with gradients of about 1e30, whose squares have no number."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss + (loss - loss.detach()) * 1e30


def test_a_gradient_whose_norm_overflows_stops_the_run(masked, tmp_path):
    """Clipping by that norm makes 0 of it: the step would be lost without a word."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=len(masked.tokenizer), **sizes))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True, remove_unused_columns=False)
    blocks = masked.blocks([TextRow(text=text) for text in TEXTS])
    with pytest.raises(AlignError, match="the gradient's norm is inf at step 1; no update was made"):
        Steep(model, arguments, train_dataset=blocks, denoiser=masked).train()


def test_probes_are_for_causal_models(capsys, folder):
    command = f"pretrain {FAMILIES['bert'][0]} --data texts.jsonl --vocab_size 300 --probes.old texts.jsonl"
    assert main(command.split()) == 2
    assert "probes and replay_data are for causal models" in capsys.readouterr().err


def test_a_compiled_model_is_a_causal_one(capsys, folder):
    """The field was read by nobody, without a word."""
    assert main(f"pretrain {FAMILIES['bert'][0]} --data texts.jsonl --vocab_size 300 --torch_compile".split()) == 2
    assert "torch_compile is for causal models" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", [FAMILIES["bert"][0], FAMILIES["t5"][0]], ids=["bert", "t5"])
def test_a_loss_that_is_not_finite_stops_before_the_update(capsys, folder, architecture):
    command = f"pretrain {architecture} --data texts.jsonl --held_out 0 --vocab_size 300 --max_steps 9 --learning_rate 1e30"
    assert main(f"{command} --warmup_ratio 0".split()) == 2
    assert "no update was made" in capsys.readouterr().err.splitlines()[-1]
    assert main(f"{command} --on_non_finite skip".split()) == 2
    assert "leave on_non_finite at 'stop'" in capsys.readouterr().err.splitlines()[-1]


def test_a_tokenizer_beside_a_model_is_refused(capsys, folder):
    assert main(["pretrain", "--model", "here", "--tokenizer", "there", "--data", "texts.jsonl"]) == 2
    assert "a model that is continued has its own" in capsys.readouterr().err
