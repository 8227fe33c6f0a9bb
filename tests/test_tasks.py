"""Tasks: what rows become, what is read from a model's answers, and that every task learns and is measured the same again."""

import json
import shutil
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import build
from launched import run_on_two
from safetensors.torch import load_file

from align.cli import main
from align.data import write_rows
from align.errors import AlignError
from align.runner.worker import attempt
from align.schema import LabelledText, QARow, SFTRow, TaggedTokens
from align.stages import TaskTraining
from align.stages.task import told_labels
from align.stages.training import TIMING
from align.tasks import tasks
from align.tasks.base import Features, labels_of_head, read_task

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

from launch import cut_back

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 1, "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "max_position_embeddings": 64}
BART |= {"decoder_layers": 1, "decoder_ffn_dim": 64, "decoder_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 2}
MODELS = {
    "bert": ("bert", SMALL),
    "roberta": ("roberta", SMALL),
    "albert": ("albert", {**SMALL, "embedding_size": 16}),
    "llama": ("llama", {**SMALL, "num_key_value_heads": 2}),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
}


@pytest.fixture(scope="module")
def words(tokenizer):
    """The tokenizer with a mask token."""
    words = deepcopy(tokenizer)
    words.add_special_tokens({"mask_token": "<|mask|>"})
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, words):
    """Tiny models of every family, and rows of every task that can be learnt by heart."""
    from transformers import AutoConfig, AutoModelForMaskedLM, BartForConditionalGeneration, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tasks")
    for name, (kind, sizes) in MODELS.items():
        if kind in ("llama", "gpt2"):
            build(kind, **sizes).save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        else:
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, vocab_size=len(words), pad_token_id=0, **sizes)
            AutoModelForMaskedLM.from_config(config).save_pretrained(folder / name)
            words.save_pretrained(folder / name)
    torch.manual_seed(0)
    config = AutoConfig.for_model("t5", vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, **T5)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    tokenizer.save_pretrained(folder / "t5")
    BartForConditionalGeneration(AutoConfig.for_model("bart", vocab_size=len(tokenizer), **BART)).save_pretrained(folder / "bart")
    tokenizer.save_pretrained(folder / "bart")
    animals = [f"{a} {b} sat on {c}" for a in ("the", "one", "my") for b in ("cat", "mat") for c in ("me", "a mat", "you")]
    write_rows(folder / "animals.jsonl", [{"text": text, "label": "cat" if "cat" in text else "mat"} for text in animals])
    tagged = [
        {"tokens": ["hello", "Fine", "two"], "tags": ["O", "B-PER", "O"]},
        {"tokens": ["Fine", "Thanks", "sat"], "tags": ["B-PER", "I-PER", "O"]},
        {"tokens": ["the", "cat"], "tags": ["O", "O"]},
    ]
    write_rows(folder / "tagged.jsonl", tagged * 4)
    parts = [{"tokens": row["tokens"], "tags": ["NOUN" if tag == "O" else "VERB" for tag in row["tags"]]} for row in tagged]
    write_rows(folder / "parts.jsonl", parts * 4)
    write_rows(folder / "outside.jsonl", [{"tokens": ["the", "cat"], "tags": ["O", "O"]}] * 2)
    write_rows(folder / "longer.jsonl", [{"text": "cat " * 160, "label": label} for label in ("cat", "mat")])
    write_rows(folder / "longer.said.jsonl", [{"prompt": "say cat", "completion": "cat " * 200}])
    write_rows(folder / "longer.asked.jsonl", [{"prompt": "cat " * 200, "completion": "cat"}])
    context = "the cat sat on a mat and said hello to me"
    asked = [("who sat?", "the cat"), ("on what?", "a mat"), ("said what?", "hello")]
    write_rows(
        folder / "asked.jsonl",
        [{"question": q, "context": context, "answers": [a], "starts": [context.index(a)]} for q, a in asked] * 4,
    )
    said = [("say one", "one two"), ("say cat", "the cat"), ("say hello", "hello")]
    write_rows(folder / "said.jsonl", [{"prompt": p, "completion": c} for p, c in said] * 4)
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(capsys, command):
    assert main([*command.split(), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


LEARN = " --max_steps 40 --eval_steps 40 --learning_rate 5e-3 --lr_scheduler_type constant --warmup_ratio 0"
LEARN += " --per_device_train_batch_size 12"

ROAD = {
    "bert, classification": ("classification", "bert", "animals", "accuracy"),
    "roberta, classification": ("classification", "roberta", "animals", "accuracy"),
    "albert, classification": ("classification", "albert", "animals", "accuracy"),
    "llama, classification": ("classification", "llama", "animals", "accuracy"),
    "bert, ner": ("ner", "bert", "tagged", "entity_f1"),
    "gpt2, ner": ("ner", "gpt2", "tagged", "entity_f1"),
    "bert, ner by word": ("ner", "bert", "tagged", "accuracy"),
    "bert, tags that are not BIO": ("ner", "bert", "parts", "f1_macro"),
    "bert, qa": ("qa", "bert", "asked", "exact_match"),
    "t5, seq2seq": ("seq2seq --max_steps 120 --eval_steps 120", "t5", "said", "rouge1"),
}


@pytest.mark.parametrize(("task", "model", "data", "metric"), ROAD.values(), ids=ROAD)
def test_a_task_is_learnt_and_measured_the_same_again(capsys, task, model, data, metric):
    command = f"task{LEARN} --task {task} --model {model} --data {data}.jsonl --eval_data {data}.jsonl --name trained"
    artifact = run(capsys, command)
    metrics = artifact["metrics"]
    assert metrics[f"eval_{metric}_before"] < 0.9 < metrics[f"eval_{metric}"]
    again = run(capsys, f"eval trained --data {data}.jsonl")["metrics"]["models"]["trained"]
    assert again[metric] == pytest.approx(metrics[f"eval_{metric}"], abs=1e-6)
    assert again["n"] == metrics["held_out_rows"]


@pytest.mark.parametrize("model", ["t5", "bart"])
def test_an_encoder_decoder_reads_at_one_end_token(capsys, folder, model):
    """Its head counts end tokens: where the tokenizer adds none, or a text holds one, training ended in an error."""
    rows = [
        {"text": f"the {label} {end}sat", "label": label}
        for label in ("cat", "mat")
        for end in ("", "", "", "<|eos|>", "<|eos|><|eos|>")
    ]
    write_rows(folder / "ends.jsonl", rows)
    command = f"task{LEARN} --task classification --model {model} --data ends.jsonl --eval_data ends.jsonl --name ended"
    metrics = run(capsys, command)["metrics"]
    again = run(capsys, "eval ended --data ends.jsonl")["metrics"]["models"]["ended"]
    assert again["accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-6) == 1.0


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_cloze_is_learnt_from_a_few_rows_without_a_new_weight(capsys, folder, model):
    config = folder / "cloze.yaml"
    arguments = 'pattern: "{text}. {mask}"\n  verbalizer: {cat: one, mat: two}'
    config.write_text(f"task: cloze\ntask_args:\n  {arguments}\n")
    command = (
        f"task --config cloze.yaml --model {model} --data animals.jsonl --eval_data animals.jsonl --shots 8{LEARN} --name filled"
    )
    artifact = run(capsys, command)
    assert artifact["metrics"]["rows"] == 16
    assert artifact["metrics"]["eval_accuracy"] > 0.9
    again = run(capsys, "eval filled --data animals.jsonl --metrics accuracy")["metrics"]["models"]["filled"]
    assert again["accuracy"] == pytest.approx(artifact["metrics"]["eval_accuracy"])
    from align.models import load_language_model

    before, after = (dict(load_language_model(str(path)).named_parameters()) for path in (folder / model, artifact["path"]))
    assert before.keys() == after.keys()


STRATEGIES = {
    "full": "full",
    "freeze": "freeze --tuning_args.freeze_first 1",
    "bias_norm": "bias_norm",
    "head": "head --tuning_args.layers 0",
    "lora": "lora --tuning_args.r 4",
    "ia3": "ia3",
    "adapter": "adapter --tuning_args.size 8",
    "prefix": "prefix --tuning_args.num_virtual_tokens 4",
    "prompt": "prompt --tuning_args.num_virtual_tokens 4",
}
"""As arguments of the command line."""


@pytest.mark.parametrize("task", ["classification", "ner"])
@pytest.mark.parametrize("tuning", STRATEGIES.values(), ids=STRATEGIES)
def test_every_strategy_on_an_encoder(capsys, folder, tuning, task):
    """It trains, is measured the same again from its folder, and what it froze is as it was, bit by bit."""
    data = {"classification": "animals", "ner": "tagged"}[task]
    command = f"task{LEARN} --max_steps 20 --eval_steps 20 --task {task} --model bert --data {data}.jsonl --eval_data {data}.jsonl"
    command += f" --tuning {tuning} --name tuned"
    if tuning.startswith("prompt") and task == "ner":
        assert main(command.split()) == 2
        assert "which moves them: use prefix" in capsys.readouterr().err
        return
    artifact = run(capsys, command)
    metrics = artifact["metrics"]
    assert metrics["eval_loss"] != metrics["eval_loss_before"]
    if task == "ner":  # the first token of a random encoder tells little of the others, whatever learns on top of it
        assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.05
    again = run(capsys, f"eval tuned --data {data}.jsonl --name again")["metrics"]["models"]["tuned"]
    for name, value in again.items():
        if name != "n":
            assert value == pytest.approx(metrics[f"eval_{name}"], abs=1e-6)
    if tuning.startswith("freeze"):
        before, after = (load_file(path / "model.safetensors") for path in (folder / "bert", Path(artifact["path"])))
        frozen = [name for name in before if "embeddings" in name or "layer.0" in name]
        assert frozen
        assert all(torch.equal(before[name], after[name]) for name in frozen)
        assert any(not torch.equal(before[name], after[name]) for name in before if "layer.1" in name)


def test_an_adapter_on_a_base_without_a_padding_token_is_measured_in_batches(capsys, folder):
    from align.models import load_causal_lm, load_tokenizer, save_model

    model = load_causal_lm(str(folder / "llama"))
    model.config.pad_token_id = None
    save_model(model, load_tokenizer(str(folder / "llama")), folder / "unpadded")
    command = f"task --task classification --model unpadded --data animals.jsonl --eval_data animals.jsonl{LEARN} --tuning lora"
    metrics = run(capsys, f"{command} --name adapted")["metrics"]
    again = run(capsys, "eval adapted --data animals.jsonl --metrics accuracy")["metrics"]["models"]["adapted"]
    assert again["accuracy"] == pytest.approx(metrics["eval_accuracy"])


EXPORTED = {
    "classification, bert": "text-classification",
    "classification, bart": "text-classification",
    "ner, llama": "token-classification",
    "qa, bert": "question-answering",
    "seq2seq, t5": "text2text-generation",
    "seq2seq, bart": "text2text-generation",
    "cloze, roberta": "fill-mask",
}


@pytest.mark.parametrize(("case", "purpose"), EXPORTED.items(), ids=EXPORTED)
def test_a_tasks_adapter_is_exported_with_its_head(capsys, folder, tmp_path, case, purpose):
    """It is measured by its task as before."""
    task, model = case.split(", ")
    data = {"classification": "animals", "ner": "tagged", "qa": "asked", "seq2seq": "said", "cloze": "animals"}[task]
    fields = {"pattern": "{text} {mask}", "verbalizer": {"cat": " cat", "mat": " mat"}} if task == "cloze" else {}
    (tmp_path / "own.yaml").write_text(json.dumps({"task": task, "task_args": fields}))
    command = f"task --config {tmp_path}/own.yaml{LEARN} --max_steps 8 --model {model} --data {data}.jsonl --held_out 0"
    run(capsys, f"{command} --tuning lora --name part")
    to = tmp_path / "whole"
    run(capsys, f"export part --merge --to {to}")
    before, after = (run(capsys, f"eval {name} --data {data}.jsonl")["metrics"]["models"].popitem()[1] for name in ("part", to))
    assert after == pytest.approx(before, abs=1e-5)
    assert f"pipeline_tag: {purpose}\n" in (to / "README.md").read_text()


def test_transformers_alone_answers_with_an_exported_classifier(capsys, folder, tmp_path):
    from transformers import pipeline

    run(capsys, f"task{LEARN} --task classification --model bert --data animals.jsonl --held_out 0 --tuning lora --name animal")
    run(capsys, f"export animal --merge --to {tmp_path}/whole")
    tell = pipeline("text-classification", model=f"{tmp_path}/whole", device="cpu")
    assert [tell(f"my {animal} sat on you")[0]["label"] for animal in ("cat", "mat")] == ["cat", "mat"]


def test_lora_leaves_the_whole_new_head_of_distilbert_to_training(capsys, folder, words):
    """Its head is two layers, of which peft keeps both whole."""
    from transformers import AutoConfig, AutoModelForMaskedLM

    sizes = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 128}
    torch.manual_seed(0)
    config = AutoConfig.for_model("distilbert", vocab_size=len(words), pad_token_id=0, **sizes)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder / "distilbert")
    words.save_pretrained(folder / "distilbert")
    command = f"task --task classification --model distilbert --data animals.jsonl --eval_data animals.jsonl{LEARN} --tuning lora"
    metrics = run(capsys, f"{command} --name distilled")["metrics"]
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.05
    again = run(capsys, "eval distilled --data animals.jsonl --metrics accuracy")["metrics"]["models"]["distilled"]
    assert again["accuracy"] == pytest.approx(metrics["eval_accuracy"])


@pytest.mark.parametrize(("model", "task", "data"), [("bert", "classification", "animals"), ("t5", "seq2seq", "said")])
@pytest.mark.parametrize("tuning", ["prefix", "prompt", "ptuning"])
def test_virtual_tokens_of_an_encoder_are_trained_further(capsys, model, task, data, tuning):
    both = f"--task {task} --data {data}.jsonl --eval_data {data}.jsonl"
    first = run(capsys, f"task --model {model} {both}{LEARN} --max_steps 2 --tuning {tuning} --name soft")["metrics"]
    second = run(capsys, f"task --model soft {both}{LEARN} --max_steps 8 --on_adapter continue --name further")["metrics"]
    assert second["trainable_parameters"] == first["trainable_parameters"]
    assert second["eval_loss_before"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert second["eval_loss"] != second["eval_loss_before"]


@pytest.mark.parametrize(("model", "family"), [("bert", "masked"), ("t5", "encoder-decoder")])
def test_a_model_that_does_not_write_from_left_to_right_is_told_so(capsys, model, family):
    """BERT was loaded, and then said to have other log-probs on the forest; T5's config was unrecognized."""
    assert main(f"eval {model} --data said.jsonl --metrics bleu".split()) == 2
    assert f"{model} is of the family '{family}', and this takes a causal language model; `align task`" in capsys.readouterr().err


ANSWERED = {
    "classification": ("my mat sat on you", "mat", "mat", {}),
    "ner": ("Fine Thanks sat", "Fine/B-PER Thanks/I-PER sat", "Fine/B-PER Thanks/I-PER sat", {}),
    "qa": ("on what?", "a mat", ["a mat"], {"--system": "the cat sat on a mat and said hello to me"}),
    "seq2seq": ("say cat", "the cat", "the cat", {}),
    "cloze": ("my mat sat on you", "mat", "mat", {}),
}
"""A task's row as people read it; the answer, the expected one, and what `align chat` needs beside it."""


@pytest.mark.parametrize(("task", "case"), ANSWERED.items(), ids=ANSWERED)
def test_single_answers_of_a_tasks_model_are_read(capsys, folder, tmp_path, task, case):
    """`align eval` left an empty samples.jsonl, and `align chat` refused what is no causal language model."""
    text, answer, expected, beside = case
    data = {"classification": "animals", "ner": "tagged", "qa": "asked", "seq2seq": "said", "cloze": "animals"}[task]
    fields = {"pattern": "{text} {mask}", "verbalizer": {"cat": " one", "mat": " two"}} if task == "cloze" else {}
    (tmp_path / "own.yaml").write_text(json.dumps({"task": task, "task_args": fields}))
    steps = 120 if task == "seq2seq" else 60
    command = f"task --config {tmp_path}/own.yaml --model {'t5' if task == 'seq2seq' else 'bert'} --data {data}.jsonl{LEARN}"
    run(capsys, f"{command} --held_out 0 --max_steps {steps} --name learnt")
    left = run(capsys, f"eval learnt --data {data}.jsonl --samples_kept 9999")
    samples = [json.loads(line) for line in (Path(left["path"]) / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == left["metrics"]["models"]["learnt"]["n"] == len((folder / f"{data}.jsonl").read_text().splitlines())
    told = {"prompt": "\n\n".join([text, *beside.values()]), "columns": {"expected": expected}}
    assert {**told, "answers": {"learnt": {"greedy": {"text": answer, "reward": None}}}} in samples
    assert main(["chat", "learnt", "--prompt", text, *(word for pair in beside.items() for word in pair)]) == 0
    assert capsys.readouterr().out == f"{answer}\n"


def test_there_is_no_vote_on_a_tasks_answers(capsys, monkeypatch, tmp_path):
    """Labels became preference rows, which teach nobody to talk."""
    for number, (task, data) in enumerate([("classification", "animals"), ("ner", "tagged")]):
        run(capsys, f"task --task {task} --model bert --data {data}.jsonl --held_out 0 --max_steps 1 --name side{number}")
    lines = iter(["one cat sat on me", "my mat sat on you", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", "side0", "side1", "--votes", str(tmp_path / "v.jsonl")]) == 0
    said = capsys.readouterr()
    answers = [line[4:] for line in said.out.splitlines() if line.startswith("[")]
    assert len(answers) == 4
    assert answers[0] != answers[1], "nobody would vote on the same"
    assert "there is no vote" in said.err
    assert not (tmp_path / "v.jsonl").exists()


def test_what_a_tasks_model_cannot_answer_is_said(capsys, folder):
    run(capsys, "task --task qa --model bert --data asked.jsonl --held_out 0 --max_steps 1 --name asker")
    run(capsys, "task --task classification --model bert --data animals.jsonl --held_out 0 --max_steps 1 --name teller")
    place = "the longest row has 256 tokens, and BertForSequenceClassification has places for 128: set max_length to 128 or less"
    for command, message in (
        (["chat", "asker", "--prompt", "who?"], "answers questions about a text: give that as the system prompt"),
        (["chat", "teller", "--prompt", " "], "cannot read this: 1 rows = 0 used + 1 set aside (1 with an empty text)"),
        (["chat", "teller", "--prompt", "cat " * 400], f"task.json: {place}"),
        (["eval", "teller", "--data", "longer.jsonl"], "task.json: the longest row has 161 tokens, and Bert"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err


def test_what_is_about_answers_is_refused_where_no_model_answers(capsys, folder):
    """It was left out without a word."""
    run(capsys, "task --task classification --model bert --data animals.jsonl --max_steps 1 --name tasked")
    assert main(["eval", "tasked", "--data", "animals.jsonl", "--reward_funcs", "length_band(low=1,high=9)"]) == 2
    assert "reward_funcs is about answers of language models; all models were trained for a task" in capsys.readouterr().err
    assert main(["eval", "tasked", "--data", "animals.jsonl", "--max_prompts", "2"]) == 2
    assert "max_prompts is about answers of language models; all models were trained for a task, so use max_rows" in (
        capsys.readouterr().err
    )
    for flag, value, instead in (
        ("max_length", "8", "theirs is the one that they were trained with"),
        ("chat_template", "plain", "leave it out"),
        ("temperature", "0", "leave it out"),
        ("greedy", "false", "leave it out"),
        ("seed", "3", "leave it out"),
    ):
        assert main(["eval", "tasked", "--data", "animals.jsonl", f"--{flag}", value]) == 2
        assert f"{flag} is about answers of language models; all models were trained for a task, so {instead}" in (
            capsys.readouterr().err
        )
    assert run(capsys, "eval tasked --data animals.jsonl --max_rows 2")["metrics"]["models"]["tasked"]["n"] == 2


def test_a_tasks_model_beside_a_language_model(capsys, folder):
    """It is compared with nothing, and nothing with it: win rates ended in a KeyError, and KL to it was 0."""
    run(capsys, "task --task seq2seq --model t5 --data said.jsonl --max_steps 1 --name written")
    both = "eval llama written --data said.jsonl --max_completion_length 4 --reward_funcs length_band(low=1,high=9)"
    found = run(capsys, f"{both} --baseline references")["metrics"]["models"]
    assert "win_rate_vs_references" in found["llama"]
    assert "win_rate_vs_references" not in found["written"]
    for role in ("baseline", "reference"):
        assert main(f"{both} --{role} written".split()) == 2
        assert f"{role}: written was trained for a task and answers no prompts; name a language model" in capsys.readouterr().err


def test_virtual_tokens_whose_network_is_not_kept_are_not_trained_further(capsys, folder):
    """As in a folder that peft alone has written."""
    both = "--task seq2seq --data said.jsonl --max_steps 1"
    run(capsys, f"task --model t5 {both} --tuning ptuning --output_dir made")
    (folder / "made" / "prompt_encoder.safetensors").unlink()
    assert main(f"task --model made {both} --on_adapter continue".split()) == 2
    assert "ptuning cannot be continued: there are its tokens, and no prompt_encoder" in capsys.readouterr().err


def test_a_trained_task_goes_on_from_its_own_head(capsys):
    command = f"task --task classification --model bert --data animals.jsonl --eval_data animals.jsonl{LEARN} --name first"
    first = run(capsys, command)
    second = run(capsys, "task --task classification --model first --data animals.jsonl --eval_data animals.jsonl --max_steps 1")
    assert second["metrics"]["eval_loss_before"] == pytest.approx(first["metrics"]["eval_loss"], rel=1e-5)


def test_a_trained_head_keeps_its_labels(capsys, folder):
    """Rows of two of its three labels train those two outputs; one that it does not know, or another task, is refused."""
    three = [{"text": text, "label": label} for text, label in (("the cat", "a"), ("a mat", "b"), ("hello you", "c"))]
    for name, rows in {"abc": three, "bc": three[1:], "bd": [three[1], {"text": "hello you", "label": "d"}]}.items():
        write_rows(folder / f"{name}.jsonl", rows * 4)
    first = run(capsys, f"task --task classification --model bert --data abc.jsonl --eval_data abc.jsonl{LEARN} --name three")
    assert first["metrics"]["eval_accuracy"] == 1
    further = "--model three --data bc.jsonl --eval_data abc.jsonl --max_steps 1 --learning_rate 1e-6"
    second = run(capsys, f"task --task classification {further} --name two")
    assert second["metrics"]["eval_accuracy"] == 1
    for command, message in (
        ("task --task classification --model three --data bd.jsonl --held_out 0", "knows the labels a, b, c, and rows have 'd'"),
        ("task --task ner --model three --data tagged.jsonl", "has a head for classification, not for ner"),
    ):
        assert main(command.split()) == 2
        assert message in capsys.readouterr().err


DAMAGED = {
    "no keys": ("{}", r"task.json is damaged \(task: field required\): put it back"),
    "no length": ('{"task": "ner", "labels": ["O"], "task_args": {}}', r"task.json is damaged \(max_length: field required\)"),
    "another type": (
        '{"task": "ner", "labels": ["O", 1], "max_length": 9, "task_args": {}}',
        r"task.json is damaged \(labels.1: input should be a valid string\)",
    ),
    "no such task": ('{"task": "nerr", "labels": [], "max_length": 9, "task_args": {}}', "task.json: unknown task 'nerr'"),
    "no such argument": (
        '{"task": "ner", "labels": ["O"], "max_length": 9, "task_args": {"a": 1}}',
        "task.json: task 'ner' takes no 'a'",
    ),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_task_file_is_told_of(folder, tmp_path, tokenizer, content, message):
    """Without its keys it ended in a KeyError where the model was measured, and was passed over where it was trained further."""
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(AlignError, match=message):
        read_task(str(tmp_path), tokenizer)
    with pytest.raises(AlignError, match=message):
        labels_of_head(str(tmp_path), "ner", ["O", "B-PER"])


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_head_for_another_number_of_labels_is_told_of(capsys, folder, tmp_path, tuning):
    """It ended in "You set `ignore_mismatched_sizes` to `False`", with a report above that was not there."""
    made = f"{tmp_path}/made"
    run(capsys, f"task --task classification --model bert --data animals.jsonl --max_steps 1 --tuning {tuning} --output_dir {made}")
    file = Path(made) / "task.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "labels": ["cat"]}))
    assert main(["eval", made, "--data", "animals.jsonl"]) == 2
    told = f"{made} has a head for another number of labels than 1: put its task.json back as `align task` wrote it"
    assert told in capsys.readouterr().err
    if tuning == "full":  # as a classifier of somebody else's
        file.unlink()
        rows = [{"text": f"the {label}", "label": label} for label in ("cat", "mat", "one")]
        write_rows(folder / "three.jsonl", rows)
        assert main(f"task --task classification --model {made} --data three.jsonl --max_steps 1 --held_out 0".split()) == 2
        assert f"{made} has a head for another number of labels than 3: start from the model" in capsys.readouterr().err


def test_accumulated_steps_are_one_big_batch(capsys):
    """Two micro-steps of 9 rows make the update of one batch of 18: the same losses after one step."""
    base = "task --task classification --model bert --data animals.jsonl --eval_data animals.jsonl --max_steps 1 --warmup_ratio 0"
    whole = run(capsys, f"{base} --per_device_train_batch_size 18 --name whole")
    halves = run(capsys, f"{base} --per_device_train_batch_size 9 --gradient_accumulation_steps 2 --name halves")
    whole, halves = whole["metrics"], halves["metrics"]
    assert halves["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-3)


@pytest.mark.parametrize(("task", "model", "data"), [("ner", "bert", "tagged"), ("qa", "bert", "asked"), ("seq2seq", "t5", "said")])
def test_all_that_is_told_in_a_step_counts_the_same(capsys, folder, tmp_path, task, model, data):
    """A micro-batch of few tokens weighed as much as one of many, and places of padding, as many as the longest row of the batch
    asks for, competed with an answer; in the held-out loss as well.
    """
    without_dropout(folder / model, tmp_path / model)
    base = f"task --task {task} --model {tmp_path / model} --data {data}.jsonl --eval_data {data}.jsonl --max_steps 2"
    whole = run(capsys, f"{base} --per_device_train_batch_size 10 --output_dir {tmp_path}/whole")
    parts = "--per_device_train_batch_size 2 --gradient_accumulation_steps 5"
    parts = run(capsys, f"{base} {parts} --output_dir {tmp_path}/parts")
    for name in ("train_loss", "eval_loss_before", "eval_loss"):
        assert parts["metrics"][name] == pytest.approx(whole["metrics"][name], rel=1e-5), name


def without_dropout(source, target):
    """Copy a model, so that it computes the same in training, too, whatever the processes draw."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    config |= {name: 0.0 for name, value in config.items() if "dropout" in name and value is not None}
    (target / "config.json").write_text(json.dumps(config))


ON_TWO = {
    "ddp": [
        ("ner", "bert"),
        ("qa", "roberta"),
        ("seq2seq", "t5"),
        ("seq2seq", "bart"),
        ("cloze", "llama"),
        ("classification", "bert"),
    ],
    "fsdp2": [("ner", "roberta"), ("qa", "bert"), ("classification", "llama")],
}


@pytest.mark.parametrize("strategy", ON_TWO)
def test_two_processes_train_every_task_as_one(strategy, folder, tmp_path):
    """Of eleven rows the third step of an epoch has three, and of ten it has two, both the first process': accelerate fills up with
    others, which must not count, in training or in the held-out measures; those of seq2seq were more than the references. A run
    that was cut after step 2 goes on, and in one process, too.
    """
    files = {"ner": "tagged", "qa": "asked", "seq2seq": "said", "classification": "animals", "cloze": "animals"}
    words = {"cloze": {"pattern": "{text} {mask}", "verbalizer": {"cat": " cat", "mat": " mat"}}}
    stages, on_two = {}, []
    for task, model in ON_TWO[strategy]:
        two, name = tmp_path / f"{task}-{model}", f"{tmp_path}/{model}"
        if not Path(name).is_dir():
            without_dropout(folder / model, Path(name))
        rows = (folder / f"{files[task]}.jsonl").read_text().splitlines(keepends=True)[-10 if task == "cloze" else -11 :]
        data = tmp_path / f"{task}.jsonl"
        data.write_text("".join(rows))
        fields = {"task": task, "model": name, "data": str(data), "eval_data": str(data), "max_steps": 5, "eval_steps": 5}
        fields |= {"save_steps": 2, "save_total_limit": 9, "logging_steps": 1, "learning_rate": 1e-3}
        fields |= {"task_args": words.get(task, {})}
        stages[two] = TaskTraining(**fields, per_device_train_batch_size=4)
        launched = {"per_device_train_batch_size": 2, "launch": {"num_processes": 2, "strategy": strategy}}
        on_two.append(("task", fields | launched, str(two)))
    on_two = run_on_two(on_two, strategy, tmp_path, cut=2)
    for (two, stage), measured in zip(stages.items(), on_two, strict=True):
        one = two.with_name(f"{two.name}-one")
        one.mkdir()
        alone = attempt(stage, "one", one)
        assert_trained_the_same(two, one)
        for name, value in alone.items():
            if name.startswith("eval_") and name.endswith("_before"):
                assert measured[name] == pytest.approx(value, rel=1e-6), (two.name, name)
        if stage.task == "cloze":
            for name in ("train_loss", "eval_loss", "eval_accuracy"):
                assert measured[name] == pytest.approx(alone[name], rel=1e-5), name
        assert measured["eval_loss"] != pytest.approx(measured["eval_loss_before"], rel=1e-5)
    cut_back(two, 2)
    attempt(stage, "one", two)
    assert_trained_the_same(two, one)


def assert_trained_the_same(two, one):
    """Losses and metrics of each step, and the weights as a whole: AdamW blows up the rounding of gradients that are 0, as those of
    the biases of attention's keys are.
    """

    def measured(run):
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        pairs = [pair for record in records for pair in record.items()]
        return [(k, v) for k, v in pairs if k == "loss" or (k.startswith("eval_") and not k.endswith(TIMING))]

    ours, theirs = measured(two), measured(one)
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-4, abs=1e-6), two.name
    ours, theirs = (load_file(run / "model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    apart = sum((ours[name] - theirs[name]).norm() ** 2 for name in ours) ** 0.5
    assert apart <= 1e-4 * sum(theirs[name].norm() ** 2 for name in ours) ** 0.5, two.name


@pytest.mark.parametrize(
    ("task", "model", "data", "what"),
    [
        ("seq2seq", "t5", "said", "shared.weight and encoder.embed_tokens.weight .*of T5ForConditionalGeneration are one"),
        ("cloze", "bert", "animals", "cls.predictions.bias and cls.predictions.decoder.bias of BertForMaskedLM are one"),
    ],
)
def test_what_cannot_be_sharded_is_refused(folder, tmp_path, task, model, data, what):
    """accelerate puts one of the two into a group of its own, and torch then ended with a message about groups."""
    words = {"pattern": "{text} {mask}", "verbalizer": {"cat": " cat", "mat": " mat"}} if task == "cloze" else {}
    fields = {"task": task, "task_args": words, "model": str(folder / model), "data": str(folder / f"{data}.jsonl")}
    stage = TaskTraining(**fields, launch={"num_processes": 2, "strategy": "fsdp2"})
    with pytest.raises(AlignError, match=f"{what}.*: strategy must be ddp, not fsdp2"):
        attempt(stage, "x", tmp_path)


def test_every_row_of_an_epochs_last_step_counts_the_same(capsys, folder):
    """Of 18 rows the second step of 12 has 6: as micro-steps of 4 and 2 they make the loss of one batch."""
    config = folder / "rows.yaml"
    config.write_text('task: cloze\ntask_args:\n  {pattern: "{text} {mask}", verbalizer: {cat: " cat", mat: " mat"}}\n')
    base = "task --config rows.yaml --model llama --data animals.jsonl --held_out 0 --learning_rate 1e-6"
    whole = run(capsys, f"{base} --per_device_train_batch_size 12 --name twelve")["metrics"]
    thirds = run(capsys, f"{base} --per_device_train_batch_size 4 --gradient_accumulation_steps 3 --name thirds")["metrics"]
    assert whole["rows"] == 18
    assert thirds["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)


def test_every_held_out_row_of_seq2seq_counts_once(capsys, folder):
    """Five rows whose completions have equally many tokens, so that the mean over tokens is one over rows. A last batch of one
    weighed as much as one of four.
    """
    five = [{"prompt": f"say {word}", "completion": "one two"} for word in ("cat", "mat", "me", "you", "hello")]
    write_rows(folder / "five.jsonl", five)
    base = "task --task seq2seq --model t5 --data said.jsonl --eval_data five.jsonl --max_steps 1"
    whole = run(capsys, f"{base} --per_device_train_batch_size 5 --name whole_five")["metrics"]
    cut = run(capsys, f"{base} --per_device_train_batch_size 4 --name four_and_one")["metrics"]
    assert cut["eval_loss_before"] == pytest.approx(whole["eval_loss_before"], rel=1e-6)
    assert cut["eval_rouge1_before"] == pytest.approx(whole["eval_rouge1_before"])


@pytest.mark.parametrize(
    ("task", "weights"),
    [
        ("classification --model bert --data animals.jsonl --eval_data animals.jsonl", "model"),
        ("seq2seq --model t5 --data said.jsonl --eval_data said.jsonl --tuning ptuning --learning_rate 0.01", "adapter_model"),
    ],
)
def test_a_cut_run_resumes(capsys, folder, tmp_path, task, weights):
    """A run of eight steps that goes on from the checkpoint at four ends as one that never stopped."""
    base = f"task --task {task} --per_device_train_batch_size 9 --max_steps 8 --save_steps 4 --save_total_limit 9"
    whole = run(capsys, f"{base} --output_dir {tmp_path}/whole")
    cut = tmp_path / "whole"
    (cut / "artifact.json").rename(cut / "begun.json")
    (cut / f"{weights}.safetensors").unlink()
    shutil.rmtree(cut / "checkpoints" / "checkpoint-8")
    again = run(capsys, f"{base} --output_dir {tmp_path}/whole")
    assert again["metrics"]["eval_loss"] == pytest.approx(whole["metrics"]["eval_loss"], rel=1e-6)


# -- what rows become ----------------------------------------------------------------------------------------------------------


def test_every_word_is_tagged_at_its_first_token(tokenizer):
    task = tasks["ner"](tokenizer, 32, ["O", "B-PER"])
    row = TaggedTokens(tokens=["hello", "Zoë,", "...", "cat"], tags=["O", "B-PER", "O", "O"])
    (item,) = task.features([row], training=True).items
    pieces = tokenizer.convert_ids_to_tokens(item["input_ids"])
    marked = [i for i, label in enumerate(item["labels"]) if label != -100]
    assert len(marked) == 4
    starts = [tokenizer.decode(item["input_ids"][i:j]).strip() for i, j in zip(marked, [*marked[1:], len(pieces)], strict=True)]
    assert starts == row.tokens
    assert [item["labels"][i] for i in marked] == [0, 1, 0, 0]


def test_words_that_were_cut_off_are_tagged_o(tokenizer):
    task = tasks["ner"](tokenizer, 3, ["O", "B-PER"])
    row = TaggedTokens(tokens=["the", "cat", "sat", "Fine"], tags=["O", "O", "O", "B-PER"])
    features = task.features([row], training=False)
    assert features.cut == 1
    logits = np.zeros((1, 3, 2))
    logits[..., 1] = 1  # all that is seen is a person
    columns = task.columns(logits, features)
    assert columns == {"predictions": [["B-PER"] * 3 + ["O"]], "references": [["O", "O", "O", "B-PER"]]}


def test_a_sentence_without_a_token_is_set_aside(tokenizer):
    """As a batch of its own it told nothing, and its loss was NaN; or, where a tokenizer adds none, it was no input at all."""
    task = tasks["ner"](tokenizer, 32, ["O", "B-PER"])
    rows = [TaggedTokens(tokens=[""], tags=["O"]), TaggedTokens(tokens=["", "cat"], tags=["O", "O"])]
    for training in (True, False):
        features = task.features(rows, training=training)
        assert features.rows == rows[1:]
        aside = "1 set aside (1 without a word that gives a token); 1 with a word that gives no token, and is tagged O"
        assert features.summary() == f"2 rows = 1 used + {aside}"


def test_a_held_out_tag_that_no_training_row_has_is_said(tokenizer):
    """It counts in the measure, and tells nothing to the loss, which was NaN where no row had another."""
    task = tasks["ner"](tokenizer, 32, ["O", "B-PER"])
    rows = [TaggedTokens(tokens=["the", "cat"], tags=[tag, "B-LOC"]) for tag in ("B-LOC", "O")]
    assert task.features(rows, training=False).summary().endswith("; 2 with the tag 'B-LOC', which no training row has")
    with pytest.raises(AlignError, match=r"none of the 1 rows has a tag of the model's \(O, B-PER\): the first has 'B-LOC'"):
        task.features(rows[:1], training=False)


def test_tags_that_are_not_bio_are_measured_by_word(capsys, tokenizer):
    """seqeval made entities of type OUN of them, without a word; now it is refused before training."""
    task = tasks["ner"](tokenizer, 32, ["O", "NOUN", "VERB"])
    assert (task.metrics, tasks["ner"](tokenizer, 32, ["O", "B-PER"]).metrics) == (("f1", "accuracy"), ("seqeval", "accuracy"))
    rows = [TaggedTokens(tokens=["the", "cat"], tags=["O", "NOUN"])]
    said = task.features(rows, training=False).summary()
    assert said == "1 rows = 1 used + 0 set aside; 1 with tags that are not BIO: words are measured, not entities"
    command = f"task{LEARN} --task ner --model bert --data tagged.jsonl --eval_data parts.jsonl --metrics seqeval"
    assert main(command.replace("tagged", "parts").split()) == 2
    said = capsys.readouterr()
    assert "sentence 0 has the tag 'NOUN', expected tags of entities" in said.err
    assert "eval_loss" not in said.out + said.err


def qa(tokenizer, **options):
    return tasks["qa"](tokenizer, 24, [], **{"stride": 6, **options})


def test_a_span_is_found_in_the_window_that_holds_it(tokenizer):
    context = "one two three four five six seven eight " * 3 + "hello to me. " + "the cat sat on a mat " * 2
    row = QARow(question="said what?", context=context, answers=["hello to me"], starts=[context.index("hello")])
    features = qa(tokenizer).features([row], training=True)
    assert len(features.items) > 2
    found = [item for item in features.items if item["end_positions"]]
    assert found
    for item in found:
        first, last = item["start_positions"], item["end_positions"]
        assert tokenizer.decode(item["input_ids"][first : last + 1]).strip() == "hello to me"
        assert context[item["offsets"][first][0] : item["offsets"][last][1]].strip() == "hello to me"
    assert all(item["start_positions"] == 0 for item in features.items if item not in found)
    covered = {i for item in features.items for pair in item["offsets"] if pair for i in range(*pair)}
    assert covered == set(range(len(context))) or len(covered) >= len(context.rstrip())


def test_the_best_span_lies_in_the_context_and_is_short_enough(tokenizer):
    row = QARow(question="who?", context="the cat sat on a mat", answers=["the cat"], starts=[0])
    task = qa(tokenizer, longest_answer=2)
    features = task.features([row], training=True)
    (item,) = features.items
    inside = [i for i, pair in enumerate(item["offsets"]) if pair is not None]
    start, end = np.zeros((1, len(item["offsets"]))), np.zeros((1, len(item["offsets"])))
    start[0, 0] = end[0, 0] = 9  # the question itself
    start[0, inside[1]] = 5
    end[0, inside[4]] = 5  # too far away
    end[0, inside[2]] = 4
    ((prediction,), _) = task.columns((start, end), features).values()
    assert prediction.split() == ["cat", "sat"]


def test_a_question_without_an_answer(tokenizer):
    row = QARow(question="who?", context="the cat sat", answers=[])
    assert qa(tokenizer).features([row], training=True).set_aside == {"unanswerable (see may_be_unanswerable)": 1}
    task = qa(tokenizer, may_be_unanswerable=True)
    features = task.features([row], training=True)
    (item,) = features.items
    assert (item["start_positions"], item["end_positions"]) == (0, 0)
    length = len(item["offsets"])
    start, end = np.zeros((1, length)), np.zeros((1, length))
    start[0, 0] = 1
    assert task.columns((start, end), features) == {"predictions": [""], "references": [[""]]}
    start[0, -1] = 3
    assert task.columns((start, end), features)["predictions"] != [""]


def test_what_a_held_out_question_lacks_is_said(tokenizer):
    """It is measured, and no model could answer it; a wrong start was mended without a word."""
    held = {"question": "who?", "context": "the cat sat"}
    rows = [QARow(**held, answers=["a dog"]), QARow(**held, answers=[]), QARow(**held, answers=["cat"], starts=[5])]
    said = qa(tokenizer).features([*rows, QARow(question="who?", answers=["cat"])], training=False).summary()
    assert said == (
        "4 rows = 3 used + 1 set aside (1 without a context); 1 without an answer in the context; 1 unanswerable (see "
        "may_be_unanswerable); 1 whose answer does not begin where its start says, and is read at its first place"
    )


@pytest.mark.parametrize("model", ["bert", "llama", "t5"])
def test_a_row_with_nothing_to_read_is_set_aside(capsys, folder, model):
    """Where a tokenizer adds no token of its own, a batch of such rows ended in a traceback of the model's."""
    task, row = (
        ("seq2seq", {"prompt": "", "completion": "cat"}) if model == "t5" else ("classification", {"text": "", "label": "cat"})
    )
    rows = (folder / f"{'said' if model == 't5' else 'animals'}.jsonl").read_text()
    (folder / "nothing.jsonl").write_text(rows + json.dumps(row) + "\n")
    command = f"task --task {task} --model {model} --data nothing.jsonl --eval_data nothing.jsonl --max_steps 20"
    assert main([*command.split(), "--per_device_train_batch_size", "1"]) == 0
    assert f"{len(rows.splitlines())} used + 1 set aside (1 with an empty" in capsys.readouterr().err


def test_a_cut_answer_is_told_from_a_cut_prompt(tokenizer):
    task = tasks["seq2seq"](tokenizer, 8, [], longest_answer=3)
    rows = [SFTRow(prompt="cat " * 20, completion="cat"), SFTRow(prompt="cat", completion="cat " * 20)]
    said = task.features(rows, training=True).summary()
    assert said == "2 rows = 2 used + 0 set aside; 1 cut to max_length; 1 with an answer cut to longest_answer"


def test_the_labels_that_were_found_are_told(capsys, folder):
    """`cat` beside `Cat` made two classes without a word."""
    rows = (folder / "animals.jsonl").read_text() + json.dumps({"text": "the cat", "label": "Cat"}) + "\n"
    (folder / "cased.jsonl").write_text(rows)
    steps = "--held_out 0 --max_steps 1 --name told"
    for command, line in (
        ("--task classification --data cased.jsonl --model bert", "3 labels: Cat 1, cat 9, mat 9"),
        ("--task classification --data animals.jsonl --model told", "3 labels: Cat 0, cat 9, mat 9"),
        ("--task ner --data tagged.jsonl --model bert", "3 labels: O 20, B-PER 8, I-PER 4"),
    ):
        assert main(f"task {command} {steps}".split()) == 0
        assert f"told: {line}\n" in capsys.readouterr().err
    many = {f"l{i:02}": 100 + i for i in range(22)} | {"L01": 1}
    line = told_labels(sorted(many), many)
    assert line.startswith("23 labels: L01 1, l00 100, l01 101, ")
    assert line.endswith("l18 118, and 3 that are more frequent")


def test_an_answer_that_the_context_does_not_hold_is_set_aside(tokenizer):
    rows = [QARow(question="who?", context="the cat sat", answers=["a dog"]), QARow(question="w?", context="cat", answers=["cat"])]
    features = qa(tokenizer).features(rows, training=True)
    assert features.summary() == "2 rows = 1 used + 1 set aside (1 without an answer in the context)"


def test_the_gap_is_read_where_the_pattern_puts_it(words):
    """Logits that name their own position: the scores are those of the mask, on either side of padding and text."""
    for pattern, expected in (("{text} is {mask}", -1), ("and {mask} : {text}", 0)):
        task = tasks["cloze"](words, 32, ["0", "1"], pattern=pattern, verbalizer={0: "one", 1: "two"})
        rows = [LabelledText(text="the cat", label="0"), LabelledText(text="my <|mask|> cat sat on", label="1")]
        batch = task.collate(task.features(rows, training=True).items)

        def model(input_ids, attention_mask, **kwargs):
            places = torch.arange(input_ids.shape[1]).float()[None, :, None].expand(*input_ids.shape, len(words))
            return type("Output", (), {"logits": places})

        found = task.scores(model, batch)[:, 0].long().tolist()
        for row, (ids, place) in enumerate(zip(batch["input_ids"].tolist(), found, strict=True)):
            masks = [i for i, token in enumerate(ids) if token == words.mask_token_id]
            assert len(masks) == row + 1
            assert place == masks[expected]


def test_the_text_is_cut_and_not_the_pattern(words):
    task = tasks["cloze"](words, 12, ["0", "1"], pattern="{text} is {mask}", verbalizer={0: "one", 1: "two"})
    item, cut = task.encode("the cat sat on a mat and said hello to me. " * 3)
    assert cut
    assert len(item["input_ids"]) <= 12
    assert item["input_ids"][-1] == words.mask_token_id


@pytest.mark.parametrize("text", ["中文" * 20, "a" + "😀" * 30, "é" * 40, "ab"])
def test_the_gap_stays_where_characters_are_several_tokens(words, text):
    """Cut inside of a character, the text would take it whole and push the gap at the end out of the row."""
    for length in range(12, 20):
        cloze = tasks["cloze"](words, length, ["0", "1"], pattern="{text}. {mask}", verbalizer={"0": "one", "1": "two"})
        item, cut = cloze.encode(text)
        assert len(item["input_ids"]) <= length
        assert item["input_ids"].count(words.mask_token_id) == 1
        assert cut == (text != "ab")


def test_seq2seq_reads_conversations_as_text(tokenizer):
    task = tasks["seq2seq"](tokenizer, 32, [], prefix="say: ")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Fine"}]
    for more in ([], [{"role": "user", "content": "thanks"}]):  # nobody learns to be the user
        (item,) = task.features([SFTRow.model_validate({"messages": messages + more})], training=True).items
        assert tokenizer.decode(item["input_ids"]) == "say: hello"
        assert tokenizer.decode(item["labels"]).startswith("Fine")


def test_features_that_were_set_aside_add_up():
    assert Features(rows=[1, 2], cut=1).summary() == "2 rows = 2 used + 0 set aside; 1 cut to max_length"


# -- mistakes ------------------------------------------------------------------------------------------------------------------

BASE = "--model bert --data animals.jsonl"
MISTAKES = {
    "no entity": (
        "task --task ner --model bert --data outside.jsonl",
        "all words of the 2 rows have the tag 'O'; there is nothing",
    ),
    "no such task": (f"task --task clasification {BASE}", r"unknown task 'clasification' \(did you mean 'classification'"),
    "no such argument": (f"task --task classification --task_args.x 1 {BASE}", "task 'classification' takes no 'x'"),
    "metrics of no rows": (f"task --task classification --metrics f1 --held_out 0 {BASE}", "metrics needs held-out rows: set"),
    "a best metric that is none": (
        f"task --task classification --load_best_model_at_end true --metric_for_best_model epoch {BASE} --eval_data animals.jsonl",
        "metric_for_best_model 'epoch' is not measured here; known: loss, accuracy, f1_micro, f1_macro, matthews$",
    ),
    "rows of another task": (f"task --task ner {BASE}", "column 'tokens' is missing"),
    "no pattern": (f"task --task cloze {BASE}", "task 'cloze' needs 'pattern'"),
    "shots of what has no label": ("task --task qa --shots 4 --model bert --data asked.jsonl", "shots draws rows by their label"),
    "more shots than rows": (f"task --task classification --shots 40 {BASE}", r"shots 40: the label '\w+' has \d+ rows"),
    "a metric that needs more": (f"task --task classification --metrics ifeval {BASE}", "a task gives predictions and references"),
    "a family without that head": (
        "task --task seq2seq --model bert --data said.jsonl",
        "bert is of the family 'masked', and task 'seq2seq' takes an encoder-decoder",
    ),
    "a field of the forest": (f"task --task ner --engine trl {BASE}", "engine has no part in a task"),
    "a loss that is skipped": (f"task --task classification --on_non_finite skip {BASE}", "leave on_non_finite at 'stop'"),
    "a loss that is not finite": (
        f"task --task classification --learning_rate 1e30 --warmup_ratio 0 --max_steps 9 {BASE}",
        r"(loss|norm) is \w+ at step \d; no update was made",
    ),
    "a row longer than the model": (
        "task --task classification --model bert --data longer.jsonl",
        "the longest row has 1.. tokens, and BertForSequenceClassification has places for 128: set max_length to 128 or less",
    ),
    "a text longer than the model": (
        "pretrain --model roberta --data longer.jsonl --max_length 200",
        "the longest row has 1.. tokens, and RobertaForMaskedLM has places for 127: ",
    ),
    "a target longer than the model": (
        "task --task seq2seq --task_args.longest_answer 200 --model bart --data longer.said.jsonl",
        "answer may have 200 tokens, and BartForConditionalGeneration has places for 64: set task_args.longest_answer to 64 or",
    ),
    "answers that may become longer than the model": (
        "task --task seq2seq --task_args.longest_answer 65 --model bart --data said.jsonl --eval_data said.jsonl",
        "answer may have 65 tokens, and BartForConditionalGeneration has places for 64: set task_args.longest_answer to 64 or",
    ),
    "a source longer than the model": (
        "task --task seq2seq --model bart --data longer.asked.jsonl",
        "the longest row has 2.. tokens, and BartForConditionalGeneration has places for 64: set max_length to 64 or less",
    ),
    "an argument of another type": (
        "task --task qa --task_args.stride x --model bert --data asked.jsonl",
        "task 'qa': stride='x': input should be a valid integer",
    ),
    "no room for an answer": (
        "task --task seq2seq --task_args.longest_answer 0 --model t5 --data said.jsonl",
        "longest_answer=0: input should be greater than 0",
    ),
    "windows that do not move": (
        "task --task qa --task_args.stride 200 --model bert --data asked.jsonl",
        "stride 200 must be below",
    ),
}


def test_a_metric_that_a_task_cannot_have_is_refused_before_a_recipe_begins(monkeypatch):
    """It was found when the stage had read its rows, whatever ran before it."""
    stage = TaskTraining(task="ner", model="bert", data="tagged.jsonl", metrics=["ifeval"])
    with pytest.raises(AlignError, match="a task gives predictions and references"):
        stage.check()
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(AlignError, match=r"this needs the package 'seqeval.*': pip install 'align\[metrics\]'"):
        TaskTraining(task="ner", model="bert", data="tagged.jsonl").check()


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(capsys, command, message):
    import re

    assert main(command.split()) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


def test_mistakes_of_a_cloze(tokenizer, words):
    def cloze(tokenizer, **changes):
        fields = {"pattern": "{text} {mask}", "verbalizer": {"0": "one", "1": "two"}, **changes}
        return tasks["cloze"](tokenizer, 32, ["0", "1"], **fields)

    with pytest.raises(AlignError, match=r"must hold \{text\} once"):
        cloze(words, pattern="{mask}")
    with pytest.raises(AlignError, match="verbalizer has words for 0; the labels are 0, 1"):
        cloze(words, verbalizer={"0": "one"})
    with pytest.raises(AlignError, match="two labels have the same word"):
        cloze(words, verbalizer={"0": "one", "1": "one"})
    with pytest.raises(AlignError, match=r"'unheard' is \d+ tokens"):
        cloze(words, verbalizer={"0": "one", "1": "unheard"})
    with pytest.raises(AlignError, match="fills the gap at the end only"):
        cloze(tokenizer, pattern="{mask} {text}")
