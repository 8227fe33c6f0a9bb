"""Evaluation every N steps, early stopping and the best checkpoint, on any metric of any stage."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import llama
from pydantic import ValidationError
from safetensors.torch import load_file

from align.data import write_rows
from align.errors import AlignError
from align.models import load_causal_lm, save_model
from align.pipeline import Run
from align.progress import History
from align.recipe import Recipe
from align.stages import GRPO, KTO, PPO, SFT, Preference, Pretrain, RewardModel
from align.stages.base import Context
from align.stages.selection import Best

STAGES = {
    "pretrain": (Pretrain, "text", {}, "perplexity", min),
    "sft": (SFT, "sft", {}, "mean_token_accuracy", max),
    "reward": (RewardModel, "pairs", {}, "margin", max),
    "dpo": (Preference, "pairs", {"beta": 0.5}, "rewards/margins", max),
    "orpo": (Preference, "pairs", {"loss": "orpo", "lam": 0.1}, "loss", min),
    "kto": (KTO, "pairs", {"beta": 0.5}, "kl", min),
}


@pytest.fixture
def ground(tmp_path, tokenizer):
    save_model(llama(), tokenizer, tmp_path / "base")
    said = ["one two", "three four five", "six", "seven eight"]
    write_rows(tmp_path / "text.jsonl", [{"text": f"the cat said {words}. hello to me {words}"} for words in said])
    write_rows(tmp_path / "sft.jsonl", [{"instruction": "How are you?", "input": "", "output": f"Fine, {words}"} for words in said])
    pairs = [{"prompt": "How are you?", "chosen": f"Fine, {words}", "rejected": f"sat on a mat {words}"} for words in said]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    # What is held out says the opposite of what is learned, so that learning makes it worse sooner or later.
    write_rows(tmp_path / "text-held.jsonl", [{"text": "mat a on sat cat the"}])
    write_rows(tmp_path / "sft-held.jsonl", [{"instruction": "How are you?", "input": "", "output": "sat on a mat, thanks!"}])
    write_rows(tmp_path / "pairs-held.jsonl", [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs[:2]])
    return tmp_path


def go(ground, cls, rows, **fields):
    stage = cls(
        model=str(ground / "base"),
        data=str(ground / f"{rows}.jsonl"),
        eval_data=str(ground / f"{rows}-held.jsonl"),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        chat_template="plain",
        max_length=64,
        **fields,
    )
    return Run(Recipe("try", {"try": stage}), ground / "out").execute()["try"]


def history(artifact, name):
    """Values of a held-out metric by step, the one before training left out."""
    records = [json.loads(line) for line in (Path(artifact.path) / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[name] for record in records if name in record and record["step"] > 0}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_stops_early_and_keeps_the_best_of_any_metric(kind, ground, capsys):
    cls, rows, fields, metric, better = STAGES[kind]
    stage = {**fields, "eval_steps": 1, "early_stopping_patience": 1, "metric_for_best_model": metric, "num_train_epochs": 12}
    artifact = go(ground, cls, rows, **stage)
    values = history(artifact, f"eval_{metric}")
    best = better(values.values())
    step = artifact.metrics["best_step"]
    assert values[step] == pytest.approx(best)
    assert artifact.metrics[f"eval_{metric}"] == values[step]
    assert len(values) == step + 1 < 12  # one evaluation without a better one, and no more
    assert f"kept the weights of step {step}, of {step + 1}" in capsys.readouterr().err
    # Started from what was kept, it measures the same before a step is made.
    again = cls(
        **{
            **{"model": artifact.path, "data": str(ground / f"{rows}.jsonl"), "eval_data": str(ground / f"{rows}-held.jsonl")},
            **{"learning_rate": 1e-9, "max_steps": 1, "max_length": 64, "chat_template": "plain", **fields},
        }
    )
    if not rows.startswith("pairs") or kind in ("reward", "orpo"):  # the others measure from the model they start from
        metrics = Run(Recipe("again", {"again": again}), ground / "out").execute()["again"].metrics
        assert metrics[f"eval_{metric}_before"] == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("eval_steps", [2, None])
def test_what_was_trained_until_an_early_stop_has_its_loss(ground, eval_steps):
    """It comes long before the first log, by the step and by the end of an epoch (which is one step here)."""
    stage = {"eval_steps": eval_steps, "early_stopping_patience": 1, "num_train_epochs": 24, "logging_steps": 100}
    artifact = go(ground, SFT, "sft", **stage)
    evaluated, logged = history(artifact, "eval_loss"), history(artifact, "loss")
    assert {1, *evaluated} == set(logged)  # the first step is always logged
    assert max(logged) < 24
    assert artifact.metrics["train_loss"] == logged[artifact.metrics["best_step"]]


def test_the_best_without_stopping_early(ground):
    """All steps are made; what is kept is the best all the same, adapters included."""
    artifact = go(
        ground,
        SFT,
        "sft",
        eval_steps=1,
        load_best_model_at_end=True,
        max_steps=6,
        tuning="prompt",
        tuning_args={"num_virtual_tokens": 2},
    )
    values = history(artifact, "eval_loss")
    assert len(values) == 6
    assert artifact.metrics["eval_loss"] == min(values.values())
    assert isinstance(load_causal_lm(artifact.path), torch.nn.Module)


SAMPLED = {
    "ppo": (PPO, {"total_episodes": 48, "episodes_per_step": 4, "num_mini_batches": 1}),
    "grpo": (GRPO, {"max_steps": 12, "per_device_train_batch_size": 4, "num_generations": 2, "warmup_ratio": 0.0, "beta": 0.0}),
}


def sampled(ground, kind, **more):
    """A stage whose reward on held-out prompts falls with every call, so that the first evaluation is the best."""
    (ground / "calls.py").write_text(
        "count = [0]\n"
        "def falls(completions, **columns):\n"
        "    count[0] += 1\n"
        "    return [-float(count[0]) + 0.1 * (i % 2) for i in range(len(completions))]\n"
    )
    write_rows(ground / "prompts.jsonl", [{"prompt": words} for words in ("How are you?", "hello to me", "one two", "and said")])
    cls, fields = SAMPLED[kind]
    common = {
        "model": str(ground / "base"),
        "data": str(ground / "prompts.jsonl"),
        "eval_data": str(ground / "prompts.jsonl"),
        "reward_funcs": [f"{ground / 'calls.py'}:falls"],
        "learning_rate": 1e-3,
        "max_completion_length": 3,
        "max_length": 64,
        "eval_steps": 1,
        "chat_template": "plain",
        "metric_for_best_model": "score",
    }
    return cls(**{**common, **fields, **more})


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_stage_that_samples_stops_early_too(kind, tuning, ground, capsys):
    """The weights are those that the first evaluation saw."""
    stage = sampled(ground, kind, tuning=tuning, early_stopping_patience=2)
    artifact = Run(Recipe("p", {"p": stage}), ground / "out").execute()["p"]
    values = history(artifact, "eval_score")
    assert list(values) == [1, 2, 3]
    assert artifact.metrics["best_step"] == 1
    assert artifact.metrics["eval_score"] == values[1] > values[2] > values[3]
    assert "kept the weights of step 1, of 3" in capsys.readouterr().err
    saw = load_file(Path(artifact.path) / "checkpoints" / "best-1" / "weights.safetensors")
    found = load_causal_lm(artifact.path).state_dict()
    assert tuning == "lora" or all(torch.equal(found[name], tensor) for name, tensor in saw.items())
    wrong = sampled(ground, kind, tuning=tuning, metric_for_best_model="scroe", load_best_model_at_end=True)
    with pytest.raises(AlignError, match=r"metric_for_best_model 'scroe' is not measured here \(did you mean 'score'"):
        Run(Recipe("q", {"q": wrong}), ground / "out").execute()


def test_the_rounds_before_an_early_stop_are_logged(ground):
    """Though the next line of the log was not due yet."""
    stage = sampled(ground, "ppo", logging_steps=4, early_stopping_patience=2)
    artifact = Run(Recipe("p", {"p": stage}), ground / "out").execute()["p"]
    assert list(history(artifact, "objective/kl")) == [3]


@pytest.fixture
def cut_behind_training(monkeypatch):
    """Training ends, and what follows it fails."""

    def fail(*args):
        raise RuntimeError("cut")

    monkeypatch.setattr("align.stages.training.save_model", fail)
    return monkeypatch


@pytest.mark.parametrize("metric", ["loss", "rouge"])
def test_what_is_not_asked_to_keep_the_best_ends_with_the_last(metric, ground, cut_behind_training, capsys):
    """It is evaluated on its way and has a checkpoint of its best step, or would look for a metric that nobody measures; cut
    between its last step and its end, it goes on to its last weights.
    """
    fields = {"eval_steps": 1, "save_steps": 1, "max_steps": 12, "save_total_limit": 12, "metric_for_best_model": metric}
    with pytest.raises(RuntimeError, match="cut"):
        go(ground, SFT, "sft", **fields)
    cut_behind_training.undo()
    artifact = go(ground, SFT, "sft", **fields)
    losses = history(artifact, "eval_loss")
    assert min(losses, key=losses.get) < 12
    assert "going on from step 12" in capsys.readouterr().err
    last = load_file(Path(artifact.path) / "checkpoints" / "checkpoint-12" / "model.safetensors")
    found = load_file(Path(artifact.path) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in last.items())


@pytest.mark.parametrize("engine", ["forest", "trl"])
def test_a_run_of_one_step_makes_that_step(engine, ground):
    """Five hundredths of it, rounded up as a warm-up is, would be all of it, at a learning rate of 0."""
    place = {"model": str(ground / "base"), "data": str(ground / "sft.jsonl"), "chat_template": "plain", "max_length": 64}
    stage = SFT(**place, per_device_train_batch_size=4, learning_rate=1e-2, engine=engine)
    artifact = Run(Recipe("try", {"try": stage}), ground / "out").execute()["try"]
    before, after = (load_file(folder / "model.safetensors") for folder in (ground / "base", Path(artifact.path)))
    assert not all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_an_early_stop_is_remembered(ground, cut_behind_training):
    """Cut between its early stop and its end, a run that goes on trains no further."""
    stage = sampled(ground, "ppo", save_steps=1, early_stopping_patience=2)
    run = Run(Recipe("p", {"p": stage}), ground / "out")
    with pytest.raises(RuntimeError, match="cut"):
        run.execute()
    cut_behind_training.undo()
    artifact = Run(Recipe("p", {"p": stage}), ground / "out").execute()["p"]
    assert list(history(artifact, "eval_score")) == [1, 2, 3]
    assert artifact.metrics["best_step"] == 1


def best_in(folder, metric="score"):
    """Who keeps the best weights in `folder`, the history that it goes by, and the model."""
    history, model = History(folder / "metrics.jsonl"), torch.nn.Linear(2, 2, bias=False)
    stage = PPO(model="m", data="d", reward_funcs=["length"], metric_for_best_model=metric, load_best_model_at_end=True)
    return Best(stage, Context("x", folder, history), model), history, model


def test_the_best_weights_survive_a_power_cut(tmp_path, monkeypatch):
    """They are on the disk before their seal is: the checkpoint that a run goes on from is, and speaks of them."""
    flushed, fsync = [], os.fsync

    def noted(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".json")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    best, history, _ = best_in(tmp_path)
    history.add(1, {"eval_score": 1.0})
    best.see(1)
    assert flushed == ["weights.safetensors", "best-1", ".checksums", "best-1", "checkpoints"]


def test_damaged_best_weights_are_not_used(tmp_path):
    """Neither to go on with nor to end with; a checkpoint before them is."""
    best, history, model = best_in(tmp_path)
    history.add(0, {"eval_score": 0.0})
    history.add(1, {"eval_score": 1.0})
    best.see(1)
    earlier, later = (tmp_path / "checkpoints" / f"checkpoint-{step}" for step in (0, 1))
    assert best.fault_until(later) is None
    file = tmp_path / "checkpoints" / "best-1" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    before = model.weight.clone()
    damaged = "weights.safetensors does not match its checksum"
    assert best.fault_until(later) == f"best-1 has the best weights until then, and {damaged}"
    assert best.fault_until(earlier) is None
    with pytest.raises(AlignError, match=rf"those of .*best-1, and {damaged}; the same command goes on from"):
        best.restore()
    assert torch.equal(model.weight, before)
    shutil.rmtree(file.parent)
    assert best.fault_until(later) == "best-1 has the best weights until then, and it is gone"


def test_a_run_that_samples_goes_on_before_best_weights_that_are_damaged(ground, cut_behind_training, capsys):
    """The scores rise with every evaluation, so that those of the last step are the best."""
    stage = sampled(ground, "ppo", save_steps=1, save_total_limit=2, load_best_model_at_end=True, greater_is_better=False)
    with pytest.raises(RuntimeError, match="cut"):
        Run(Recipe("p", {"p": stage}), ground / "out").execute()
    cut_behind_training.undo()
    (damaged,) = (ground / "out").glob("p-*/checkpoints/best-12/weights.safetensors")
    *whole, last = damaged.read_bytes()
    damaged.write_bytes(bytes([*whole, last ^ 1]))
    capsys.readouterr()
    artifact = Run(Recipe("p", {"p": stage}), ground / "out").execute()["p"]
    told = capsys.readouterr().err
    assert "checkpoint-12: best-12 has the best weights until then, and weights.safetensors does not match its checksum" in told
    assert "going on from step 11 of 12" in told
    assert artifact.metrics["best_step"] == 12


def test_the_best_weights_are_those_of_the_run_that_went_on(tmp_path):
    """Cut after step 2, which was better than step 1 but has no checkpoint; the second time step 2 is worse."""

    def evaluated(step, score):
        history.add(step, {"eval_score": score})
        model.weight.data.fill_(10 * step + score)
        best.see(step)

    best, history, model = best_in(tmp_path)
    evaluated(1, 1.0)
    (tmp_path / "checkpoints" / "checkpoint-1").mkdir()
    evaluated(2, 2.0)
    history.rewind(1)
    evaluated(2, 0.5)
    assert best.restore() == 1
    assert model.weight.unique().tolist() == [11.0]
    evaluated(3, 3.0)
    (tmp_path / "checkpoints" / "checkpoint-1").rmdir()
    evaluated(4, 4.0)
    evaluated(5, 4.0)  # no better
    assert [file.name for file in (tmp_path / "checkpoints").iterdir()] == ["best-4"]


@pytest.mark.parametrize(("metric", "expected"), [("toxicity_error", 2), ("eval_toxicity_error", 2), ("score", 3)])
def test_the_best_of_a_stage_that_samples_may_be_the_least(metric, expected, tmp_path):
    best, history, model = best_in(tmp_path, metric)
    for step, error in enumerate((0.5, 0.3, 0.1, 0.2)):
        history.add(step, {"eval_toxicity_error": error, "eval_score": step})
        model.weight.data.fill_(step)
        assert step == 0 or not best.see(step)
    assert best.restore() == expected
    assert model.weight.unique().tolist() == [expected]


def test_the_direction_follows_from_the_name():
    falls = ("loss", "eval_loss", "perplexity", "nll_loss", "kl", "calibration_error", "objective/kl")
    for name in falls:
        assert not SFT(model="m", data="d", metric_for_best_model=name).best_is_greatest
    for name in ("accuracy", "rewards/margins", "rewards/accuracies", "f1", "bleu", "reward", "score", "log_odds_chosen"):
        assert SFT(model="m", data="d", metric_for_best_model=name).best_is_greatest
    assert SFT(model="m", data="d", metric_for_best_model="loss", greater_is_better=True).best_is_greatest


def test_mistakes_are_named_before_training(ground):
    with pytest.raises(AlignError, match=r"metric_for_best_model 'perplexty' is not measured here \(did you mean 'perplexity'\?\)"):
        go(ground, SFT, "sft", load_best_model_at_end=True, metric_for_best_model="perplexty")
    stage = SFT(model=str(ground / "base"), data=str(ground / "sft.jsonl"), held_out=0, load_best_model_at_end=True)
    with pytest.raises(AlignError, match="load_best_model_at_end needs held-out rows"):
        Run(Recipe("x", {"x": stage}), ground / "out").execute()
    with pytest.raises(ValidationError, match="set metric_for_best_model to score"):
        GRPO(model="m", data="d", early_stopping_patience=2, reward_funcs=["length"])
