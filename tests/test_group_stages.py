"""GRPO and RLOO, by TRL and on the forest: our rows and rewards go in, a trained model with its history comes out."""

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import llama
from launched import run_on_two
from transformers import AutoModelForCausalLM

from align.artifact import Artifact
from align.cli import main
from align.data import write_rows
from align.encode import Encoder
from align.errors import AlignError
from align.progress import History
from align.registry import Registry
from align.rewards import RewardSet
from align.schema import Message, PromptRow
from align.scoring import Judge
from align.stages import GRPO, RLOO
from align.stages.base import Context
from align.trainers.settings import PPOSettings
from align.trainers.trl import GROUP_TRAINERS, group_trainer

REWARDS = """
def low(completions, completion_ids, **columns): return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]
def same(completions, **columns): return [1.0] * len(completions)
def raises(completions, **columns): raise RuntimeError("the judge\\nis asleep")
def wants(completions, score): return score
def told(completions, answer, **columns): return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]
"""
FOREST = "--model model --data prompts.jsonl --max_completion_length 6 --num_generations 4 --held_out 0.3 --warmup_ratio 0 --json"
COMMAND = f"--engine trl {FOREST}"
STAGES = {"grpo": GRPO, "rloo": RLOO}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("inputs")
    llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    # A column of mixed types: it reaches the reward as it is.
    rows = [
        {"prompt": [{"role": "user", "content": f"say {word}"}], "answer": word, "extra": word if i % 2 else i}
        for i, word in enumerate(words)
    ]
    write_rows(folder / "prompts.jsonl", rows)
    write_rows(
        folder / "pairs.jsonl",
        [
            {
                "prompt": row["prompt"],
                **{k: [{"role": "assistant", "content": w}] for k, w in (("chosen", "cat"), ("rejected", "mat"))},
            }
            for row in rows
        ],
    )
    (folder / "mine.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(command, capsys):
    assert main(command.split()) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("engine", ["forest", "trl"])
def test_weights_decay_and_norms_do_not(engine, capsys):
    """Where all answers are worth the same there is no gradient, and a step is the decay alone."""
    command = f"grpo {FOREST} --engine {engine} --max_steps 1 --reward_funcs mine.py:same"
    path = run(f"{command} --learning_rate 0.1 --weight_decay 0.5 --lr_scheduler_type constant", capsys)["path"]
    before, after = (dict(AutoModelForCausalLM.from_pretrained(model).named_parameters()) for model in ("model", path))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight if "norm" in name else 0.95 * weight)


@pytest.mark.parametrize("stage", GROUP_TRAINERS)
@pytest.mark.parametrize("adapter", ["", " --use_peft --lora_r 2"])
def test_two_steps(stage, adapter, capsys):
    """Registered like any stage, with both rewards, weighted, in metrics and history; the weights moved."""
    rewards = " --reward_funcs mine.py:low mine.py:told --reward_weights 2 0.5"
    artifact = run(f"{stage} {COMMAND} --max_steps 2 --learning_rate 1e-2{rewards}{adapter}", capsys)
    metrics = artifact["metrics"]
    for when in ("", "_before"):
        total = 2 * metrics[f"eval_rewards/low{when}"] + 0.5 * metrics[f"eval_rewards/told{when}"]
        assert metrics[f"eval_reward{when}"] == pytest.approx(total, rel=1e-5)
    path = Path(artifact["path"])
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert {"reward", "rewards/low", "rewards/told", "kl", "completions/mean_length", "entropy"} <= steps[0].keys()
    assert metrics["reward"] == steps[-1]["reward"]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-4), "the reference is what the run started from"
    assert Registry().get(f"{stage}@1") == Artifact.read(path)
    assert not (path / "ref").exists()
    if adapter:
        assert (path / "adapter_model.safetensors").exists()
    else:
        start, end = (AutoModelForCausalLM.from_pretrained(folder).lm_head.weight for folder in ("model", path))
        assert not torch.equal(start, end)


def test_a_reward_model_scores_what_was_sampled(capsys):
    run("reward --model model --data pairs.jsonl --max_steps 2 --learning_rate 1e-2 --json", capsys)
    artifact = run(f"rloo {COMMAND} --max_steps 1 --reward_model reward --reward_funcs mine.py:low", capsys)
    metrics = artifact["metrics"]
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_rewards/low"] + metrics["eval_rewards/reward_model"], rel=1e-4)
    assert artifact["parents"].keys() == {"model", "reward"} or "reward" in artifact["parents"]


def test_it_learns(capsys):
    """From a third of the tokens below 100 to most of them, in 25 steps."""
    artifact = run(
        f"grpo {COMMAND} --max_steps 25 --learning_rate 1e-2 --beta 0 --per_device_train_batch_size 16 --reward_funcs mine.py:low",
        capsys,
    )
    assert artifact["metrics"]["eval_reward_before"] < 0.5
    assert artifact["metrics"]["eval_reward"] > 0.7


@pytest.mark.parametrize("stage", GROUP_TRAINERS)
def test_each_of_two_processes_has_the_reference(stage, tmp_path):
    """Where transformers lets the first process alone write what the reference is then loaded from."""
    fields = {"engine": "trl", "model": "model", "data": "prompts.jsonl", "max_completion_length": 6, "num_generations": 4}
    fields |= {"held_out": 0.3, "reward_funcs": ["mine.py:low"], "max_steps": 1, "beta": 0.1, "launch": {"num_processes": 2}}
    (metrics,) = run_on_two([(stage, fields, str(tmp_path / "two"))], "ddp", tmp_path)
    assert metrics["eval_kl_before"] == pytest.approx(0, abs=1e-4)
    assert metrics["reward"] > 0


def test_a_batch_is_filled_for_all_processes(tmp_path):
    """Each of two has 16 answers in a batch, 2 to a prompt. TRL drops what does not fill one, and trained on nothing."""
    place = {"model": "model", "data": "prompts.jsonl", "held_out": 0, "engine": "trl", "reward_funcs": ["repetition"]}
    batch = {"gradient_accumulation_steps": 2, "num_generations": 2, "launch": {"num_processes": 2}}
    with pytest.raises(AlignError, match="8 prompts do not fill a batch, which takes 16;"):
        GRPO(**place, **batch).run(Context("grpo", tmp_path, History(tmp_path / "metrics.jsonl")))


@pytest.mark.parametrize("name", GROUP_TRAINERS)
def test_the_reference_is_the_model_in_memory(name, tokenizer, tmp_path):
    """A model that lies nowhere on disk, or differs from what does: TRL would load its reference by name."""
    rows = [PromptRow(prompt=[Message(role="user", content=word)]) for word in ("one", "two")]
    encoded = Encoder(tokenizer).prompts(rows)
    llama(seed=1).save_pretrained(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    model.load_state_dict(llama().state_dict())
    arguments = {"output_dir": str(tmp_path), "per_device_train_batch_size": 4, "num_generations": 2, "beta": 0.1, "bf16": False}
    quiet = {"report_to": [], "use_cpu": True}
    judge = Judge(tokenizer, RewardSet(["repetition"]))
    trainer = group_trainer(
        name, model, copy.deepcopy(tokenizer), encoded, Encoder(tokenizer).prompts([]), judge, arguments | quiet
    )
    for ours, theirs in zip(model.parameters(), trainer.ref_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert model.config._name_or_path == str(tmp_path / "other")


def test_tools_in_a_prompt_are_refused(tokenizer, tmp_path, capsys):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    write_rows(tmp_path / "tools.jsonl", [{"prompt": [{"role": "user", "content": w}], "tools": tools} for w in ("one", "two")])
    command = COMMAND.replace("prompts.jsonl", f"{tmp_path}/tools.jsonl")
    assert main(f"grpo {command} --held_out 0 --reward_funcs mine.py:low".split()) == 2
    assert "engine 'trl' cannot show the tools of a row" in capsys.readouterr().err


@pytest.mark.parametrize("stage", GROUP_TRAINERS)
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("raises", "reward 'raises' raised RuntimeError: the judge is asleep (mine.py line 4)"),
        ("wants", "reward 'wants' needs a column 'score'; the rows have: answer, extra. The stage '{stage}' would stop there"),
    ],
)
def test_a_reward_that_fails_is_one_line_below_the_bar(stage, reward, message, capsys):
    assert main(f"{stage} {COMMAND} --held_out 0 --reward_funcs mine.py:{reward}".split()) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"align: error: {stage}: {message.format(stage=stage)}"
    assert Registry().all() == []


@pytest.mark.parametrize("name", GROUP_TRAINERS)
def test_what_is_set_is_what_trl_gets(name, tokenizer, monkeypatch, tmp_path):
    """Every field of a name that TRL has, and of the held-out prompts as many as asked; dropout is off."""
    fields = {"max_completion_length": 9, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "num_generations": 4, "num_iterations": 3}
    fields |= {"epsilon": 0.1, "beta": 0.3, "adam_beta1": 0.5, "weight_decay": 0.2}
    fields |= {"loss_type": "bnpo", "scale_rewards": "batch"} if name == "grpo" else {"normalize_advantages": True}
    llama(attention_dropout=0.5).save_pretrained(tmp_path / "dropping")
    tokenizer.save_pretrained(tmp_path / "dropping")
    stage = STAGES[name](
        **{
            "model": str(tmp_path / "dropping"),
            "data": "prompts.jsonl",
            "eval_data": "prompts.jsonl",
            "engine": "trl",
            "reward_funcs": ["repetition"],
        },
        **{"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "eval_prompts": 2, **fields},
    )

    class Enough(Exception):
        pass

    seen = []

    def watched(*given, **rest):
        seen.append(given)
        raise Enough

    monkeypatch.setattr("align.trainers.trl.group_trainer", watched)
    with pytest.raises(Enough):
        stage.run(Context(name, tmp_path, History(tmp_path / "metrics.jsonl")))
    ((_, model, _, train, held, _, arguments),) = seen
    config = GROUP_TRAINERS[name][0](**arguments)
    assert {field: getattr(config, field) for field in fields} == fields
    assert config.per_device_eval_batch_size == 4, "whole groups"
    assert (len(train.trees), len(held.trees)) == (8, 2)
    assert model.model.layers[0].self_attn.attention_dropout == 0


# -- engine forest -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", GROUP_TRAINERS)
@pytest.mark.parametrize("adapter", ["", " --use_peft --lora_r 2"])
def test_two_steps_on_the_forest(stage, adapter, capsys):
    """Registered like any stage, with both rewards, weighted, in metrics and history; the weights moved."""
    rewards = " --reward_funcs mine.py:low mine.py:told --reward_weights 2 0.5"
    artifact = run(f"{stage} {FOREST} --max_steps 2 --learning_rate 1e-2 --num_iterations 2{rewards}{adapter}", capsys)
    metrics, path = artifact["metrics"], Path(artifact["path"])
    for when in ("", "_before"):
        total = 2 * metrics[f"eval_low{when}"] + 0.5 * metrics[f"eval_told{when}"]
        assert metrics[f"eval_score{when}"] == pytest.approx(total, rel=1e-5)
    steps = [record for record in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "loss/policy_avg" in record]
    assert [(record["step"], record["episode"], record["policy/updates"]) for record in steps] == [(1, 8, 2), (2, 16, 2)]
    assert steps[0]["objective/kl"] == pytest.approx(0, abs=1e-4), "the reference is what the run started from"
    assert steps[1]["objective/kl"] != pytest.approx(0, abs=1e-4)
    assert "loss/value_avg" not in steps[0]
    assert (path / ("adapter_model.safetensors" if adapter else "model.safetensors")).exists()


def test_what_is_set_is_what_the_forest_s_trainer_gets():
    fields = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4, "num_iterations": 3}
    fields |= {"epsilon": 0.1, "missing_eos_penalty": 0.5, "target_kl": 0.2, "sample_steps": 7, "max_steps": 5, "beta": 0.3}
    common = {"total_episodes": 80, "episodes_per_step": 16, "num_generations": 4, "num_ppo_epochs": 3, "num_mini_batches": 1}
    common |= {"cliprange": 0.1, "missing_eos_penalty": 0.5, "target_kl": 0.2, "sample_steps": 7, "kl_coef": 0.3}
    place = {"model": "m", "data": "d", "reward_funcs": ["length"]}
    grpo = {"advantage_estimator": "grpo", "whiten_advantages": False, "kl_in": "loss", "kl_estimator": "k3"}
    for loss_type, average in {"grpo": "completions", "dapo": "tokens", "bnpo": "tokens", "dr_grpo": "constant"}.items():
        settings = GRPO(**place, **fields, loss_type=loss_type, scale_rewards="batch").settings(100)
        expected = {**common, **grpo, "loss_average": average, "scale_rewards": "batch"}
        assert settings == PPOSettings(**expected)
    for whiten in (False, True):
        settings = RLOO(**place, **fields, normalize_advantages=whiten).settings(100)
        assert settings == PPOSettings(**common, advantage_estimator="rloo", whiten_advantages=whiten)
    assert GRPO(**place, beta=0).settings(100).total_episodes == 800, "each prompt once, 8 answers to each"


def test_passes_over_the_data_are_counted_as_by_trl(capsys):
    """All prompts twice, 4 answers to each, 8 answers in a batch: as many steps as TRL takes."""
    command = "--num_train_epochs 2 --held_out 0 --reward_funcs mine.py:low"
    counts = {}
    for engine, common in (("forest", FOREST), ("trl", COMMAND)):
        path = Path(run(f"grpo {common} {command} --output_dir {engine}-epochs", capsys)["path"])
        counts[engine] = max(json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines())
    assert counts == {"forest": 8, "trl": 8}


def test_a_schedule_ends_at_its_least_rate(capsys):
    schedule = "--learning_rate 1e-5 --lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs.min_lr 2e-6"
    path = Path(run(f"grpo {FOREST} --max_steps 2 --reward_funcs mine.py:low {schedule}", capsys)["path"])
    rates = [rate for line in (path / "metrics.jsonl").read_text().splitlines() if (rate := json.loads(line).get("learning_rate"))]
    assert rates[-1] == pytest.approx(2e-6)


def test_it_learns_on_the_forest(capsys):
    """From a third of the tokens below 100 to most of them, in 25 steps."""
    artifact = run(
        f"grpo {FOREST} --max_steps 25 --learning_rate 1e-2 --beta 0 --per_device_train_batch_size 16 --reward_funcs mine.py:low",
        capsys,
    )
    assert artifact["metrics"]["eval_score_before"] < 0.5
    assert artifact["metrics"]["eval_score"] > 0.7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--top_p 0.9", "top_p must be 1 and top_k 0"),
        ("--engine trl --target_kl 0.1", "target_kl runs on engine 'forest' only"),
        ("--engine trl --stop_strings x", "stop_strings runs on engine 'forest' only"),
        ("--num_generations 3", "must be a multiple of num_generations (3)"),
    ],
)
def test_what_cannot_work_is_refused(flags, message, capsys):
    assert main(f"grpo {FOREST} --reward_funcs mine.py:low {flags}".split()) == 2
    assert message in capsys.readouterr().err


# -- trackers ------------------------------------------------------------------------------------------------------------------


def test_records_go_to_trackers(tmp_path, monkeypatch):
    from typing import ClassVar

    import torch.distributed as dist
    from accelerate import tracking

    from align.progress import History
    from align.trainers.trackers import tracked

    class Diary(tracking.GeneralTracker):
        name, requires_logging_directory, tracker = "diary", False, None
        written: ClassVar[list] = []
        finished = 0

        def __init__(self, run_name, **kwargs):
            super().__init__()

        def finish(self):
            Diary.finished += 1

        def log(self, values, step, **kwargs):
            self.written.append((step, values["objective/kl"]))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "diary", Diary)
    history = History(tmp_path / "metrics.jsonl")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with tracked(history, ["diary"], tmp_path):
            history.add(1, {"objective/kl": 0.5})
        history.add(2, {"objective/kl": 0.7})
        assert (Diary.written, Diary.finished) == ([(1, 0.5)], 1)
        assert dist.is_initialized()  # a stage gathers its weights afterwards
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    for words in (["none"], ["all"]):  # as transformers' Trainer reads them; "all" are those that are installed
        with tracked(history, words, tmp_path):
            history.add(3, {"objective/kl": 0.9})
    assert Diary.written == [(1, 0.5)]


@pytest.mark.parametrize(("name", "said"), [("tensorbord", "did you mean 'tensorboard'"), ("aim", "is not installed")])
def test_a_tracker_that_is_not_there_is_one_line(tmp_path, name, said):
    from align.errors import AlignError
    from align.progress import History
    from align.trainers.trackers import tracked

    with pytest.raises(AlignError, match=said), tracked(History(tmp_path / "m.jsonl"), [name], tmp_path):
        pass
