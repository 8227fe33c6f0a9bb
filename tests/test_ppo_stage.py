"""PPO as a stage: what the fields say is what the trainer does, and rewards see the rows that the answers belong to."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, llama
from safetensors.torch import load_file

from align.cli import main
from align.data import write_rows
from align.engine import enable_forest
from align.forest import Tree, plant
from align.models import load_reward_model
from align.stages import PPO
from align.stages.reinforcement import CRITICS, _optimizer, _policy
from align.trainers.ppo.critics import SeparateCritic
from align.trainers.ppo.models import Models
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

REWARDS = """
import json
def low(completions, completion_ids, **columns): return [sum(i < 100 for i in ids) / len(ids) for ids in completion_ids]
def noted(completions, answer, **columns):
    with open("asked.jsonl", "a") as file: file.write(json.dumps([answer, completions]) + "\\n")
    return [float(len(c[0]["content"])) for c in completions]
"""
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
STEP = 4
COMMAND = f"ppo --max_completion_length 6 --episodes_per_step {STEP} --num_mini_batches 2 --json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("inputs")
    for name, dropout in (("model", 0.0), ("dropping", 0.5)):
        llama(attention_dropout=dropout).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [{"prompt": [{"role": "user", "content": f"say {word}"}], "answer": word} for word in WORDS]
    long = [{"prompt": [{"role": "user", "content": f"{'say it ' * 100}{word}"}], "answer": word} for word in ("him", "her")]
    write_rows(folder / "prompts.jsonl", rows)
    write_rows(folder / "uneven.jsonl", [long[0], *rows[:4], long[1], *rows[4:]])
    (folder / "mine.py").write_text(REWARDS)
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(flags, capsys, *, model="model", data="prompts.jsonl", steps=1):
    command = f"{COMMAND} --model {model} --data {data} --total_episodes {steps * STEP}"
    assert main(f"{command} {flags}".split()) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def steps_of(artifact):
    records = map(json.loads, (Path(artifact["path"]) / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "loss/policy_avg" in record]


def asked():
    """Columns and answers that `noted` was called with since the last time."""
    file = Path("asked.jsonl")
    calls = [json.loads(line) for line in file.read_text().splitlines()]
    file.unlink()
    return calls


def test_a_prompt_that_is_set_aside_leaves_its_columns_to_no_other(capsys):
    """Neither among those that are learned from, all of them in two steps, nor among those held out."""
    flags = "--eval_data uneven.jsonl --max_length 64 --reward_funcs mine.py:noted"
    run(flags, capsys, data="uneven.jsonl", steps=2)
    before, first, second, after = [answers for answers, _ in asked()]
    assert before == after == WORDS
    assert sorted(first + second) == sorted(WORDS)


def test_held_out_prompts_are_answered_with_the_same_draws_each_time(capsys):
    """The first two of them, by a model that does not move, before, between and after two steps; another seed draws others."""
    still = "--learning_rate 1e-12 --eval_data prompts.jsonl --eval_prompts 2 --eval_steps 1 --reward_funcs mine.py:noted"
    run(f"{still} --seed 1", capsys, steps=2)
    before, _, between, _, after = asked()
    assert before == between == after
    assert before[0] == WORDS[:2]
    run(f"{still} --seed 2", capsys, steps=2)
    assert asked()[0] != before


def test_text_is_mixed_in_as_it_is(capsys, tokenizer):
    """Its loss is that of the model, which does not move, on all its tokens but the first, which nothing predicts."""
    texts = ["one two three", "four five six seven"]
    write_rows("text.jsonl", [{"text": text} for text in texts])
    still = "--learning_rate 1e-12 --reward_funcs mine.py:low"
    found = run(f"{still} --ptx_coef 0.1 --ptx_data text.jsonl --ptx_rows text --ptx_batch_size 2", capsys)
    model, losses = llama(), []
    for text in texts:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        losses += (-logps.gather(1, ids[0, 1:, None])).flatten().tolist()
    (step,) = steps_of(found)
    assert step["loss/ptx_avg"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_held_out_scores_are_not_normalized_by_their_batch(capsys):
    """Their mean was 0 at every step, and which weights to keep a matter of rounding."""
    reward = ["--reward_funcs", '{"reward": "mine.py:low", "normalize": "batch"}', "--eval_data", "prompts.jsonl"]
    assert main([*COMMAND.split(), "--model", "model", "--data", "prompts.jsonl", "--total_episodes", "4", *reward]) == 0
    path = Path(json.loads(capsys.readouterr().out)["path"], "metrics.jsonl")
    before, after = (record for line in path.read_text().splitlines() if "eval_score" in (record := json.loads(line)))
    for record in (before, after):
        assert record["eval_score"] == pytest.approx(record["eval_low"], rel=1e-6)
        assert record["eval_score"] > 0


@pytest.mark.parametrize("critic", ["separate", "adapter"])
def test_dropout_is_off_in_policy_and_critic(critic, capsys):
    """The model's own and that of the adapters change nothing."""
    flags = (
        f"--critic {critic} --use_peft --lora_r 2 --learning_rate 1e-2 --num_ppo_epochs 2 --held_out 0 --reward_funcs mine.py:low"
    )
    runs = [run(f"{flags} --lora_dropout {p}", capsys, model=model, steps=2) for model, p in (("model", 0.0), ("dropping", 0.5))]
    plain, dropping = (
        [
            {name: value for name, value in record.items() if not name.startswith(("time/", "seconds"))}
            for record in steps_of(artifact)
        ]
        for artifact in runs
    )
    assert plain == dropping


def test_a_separate_critic_beside_an_adapter_that_goes_on_says_what_of_it_trains(capsys):
    flags = "--held_out 0 --reward_funcs mine.py:low --critic separate"
    first = run(f"{flags} --use_peft --lora_r 2", capsys)["path"]
    command = f"{COMMAND} --model {first} --data prompts.jsonl --total_episodes {STEP} {flags} --on_adapter continue"
    assert main(command.split()) == 0
    said = capsys.readouterr().err
    assert "ppo: the adapter goes on: " in said
    assert "ppo (critic): tuning full: " in said


def test_the_distribution_that_is_measured_is_the_one_that_is_sampled(capsys):
    """As hot as this, every token of the 320 is as likely as any other."""
    artifact = run("--temperature 1000 --held_out 0 --reward_funcs mine.py:low", capsys)
    assert steps_of(artifact)[0]["policy/entropy_avg"] == pytest.approx(5.768, abs=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["separate", "adapter"])
def test_a_critic_from_a_reward_model_starts_on_the_scale_of_the_scores(kind, normalize, tmp_path, tokenizer):
    reward = str(tmp_path / "reward")
    judge = tune(load_reward_model("model"), Tuning("lora", {"r": 2}), tmp_path / "reward")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, judge.parameters()):
            parameter.normal_(std=0.2)
    judge.save_pretrained(reward)
    tokenizer.save_pretrained(reward)
    (tmp_path / "reward/score_scale.json").write_text('{"score_mean": 1.0, "score_std": 4.0}')
    stage = PPO(model="model", data="prompts.jsonl", reward_model=reward, use_peft=True, critic=kind, normalize_scores=normalize)
    context = SimpleNamespace(name="ppo", folder=tmp_path)
    policy, _ = _policy(stage, context, tokenizer, tokenizer.eos_token_id, 16)
    critic = CRITICS[kind](stage, context, policy, tokenizer, 16)
    forest = plant([Tree([5, 6, 7], ([8, 9], [4])), Tree([3], ([2, 2, 2],))])
    alone = load_reward_model(reward)
    enable_forest(alone)
    with torch.no_grad(), critic.acting():
        assert_close(critic(forest), alone(forest=forest, read="sources") / (4 if normalize else 1), rel=1e-5)


def test_the_critic_has_a_learning_rate_of_its_own(capsys):
    flags = "--learning_rate 1e-9 --critic_learning_rate 1e-2 --lr_scheduler_type constant --save_steps 1 --warmup_ratio 0"
    path = Path(run(f"{flags} --held_out 0 --reward_funcs mine.py:low", capsys, steps=2)["path"])
    first, second = (load_file(path / f"checkpoints/checkpoint-{step}/state.safetensors") for step in (1, 2))
    moved = {
        role: max((second[n] - first[n]).abs().max().item() for n in first if n.startswith(role)) for role in ("policy/", "critic/")
    }
    assert moved["policy/"] < 1e-6
    assert moved["critic/"] > 1e-3


def test_the_optimizer_s_fields_are_the_stage_s():
    """Its moments, and the decay of all weights but norms, the critic's one score among them."""
    stage = PPO(model="m", data="d", reward_funcs=["length"], weight_decay=0.5, adam_beta1=0.5, adam_beta2=0.75)
    models = Models(llama(), SeparateCritic(llama(score_head=True)), temperature=1.0)
    optimizer, _ = _optimizer(stage, stage, models)
    groups = {id(weight): group for group in optimizer.param_groups for weight in group["params"]}
    for role, weights in models.parameters().items():
        assert any("norm" in name for name in weights), role
        for name, weight in weights.items():
            assert groups[id(weight)]["betas"] == (0.5, 0.75)
            assert groups[id(weight)]["weight_decay"] == (0 if "norm" in name else 0.5), name


@pytest.mark.parametrize(("warmup", "rates"), [(0, [5e-6, 0]), (0.25, [4 / 6 * 1e-5, 0])])
def test_a_schedule_is_spread_over_all_updates(warmup, rates, capsys):
    """Two passes over two mini-batches, of two steps: halfway after the first; behind a warm-up of 2, 4 of 6 are left."""
    schedule = f"--learning_rate 1e-5 --lr_scheduler_type linear --num_ppo_epochs 2 --warmup_ratio {warmup}"
    artifact = run(f"{schedule} --held_out 0 --reward_funcs mine.py:low", capsys, steps=2)
    assert [record["learning_rate"] for record in steps_of(artifact)] == pytest.approx(rates)
