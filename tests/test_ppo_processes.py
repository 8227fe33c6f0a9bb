"""PPO on two processes: the same losses, weights and statistics as on one, and checkpoints that go on in one.

tests/chaos/launch.py has the other way round, GRPO and RLOO as well.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import assert_close
from pydantic import ValidationError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from chaos import kill_ppo

from align.pipeline import Run
from align.recipe import Recipe
from align.stages import GRPO, PPO, RLOO

REWARD = """
def varied(completions, completion_ids, **columns):
    return [len(set(ids)) / len(ids) + ids[0] / 100 for ids in completion_ids]
"""


@pytest.fixture(autouse=True)
def _inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kill_ppo.prepare(tmp_path)
    Path("mine.py").write_text(REWARD)


def two_processes(strategy):
    return {"num_processes": 2, "strategy": strategy}


def ppo(**fields):
    """With everything that is a statistic of the batch: whitening of rewards and advantages, a reward that is normalized over it,
    the price of divergence, early stopping, and rows mixed in that do not divide by two.
    """
    sizes = {"total_episodes": 32, "episodes_per_step": 8, "num_generations": 2, "num_ppo_epochs": 2, "num_mini_batches": 2}
    prices = {"kl_coef": 0.05, "kl_target": 0.01, "kl_horizon": 64, "target_kl": 0.5, "whiten_rewards": True}
    mixed = {"ptx_coef": 0.1, "ptx_data": "demonstrations.jsonl", "ptx_batch_size": 3}
    rates = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3}
    rest = {"max_completion_length": 8, "held_out": 0.4, "save_steps": 2}
    reward = [{"reward": "mine.py:varied", "normalize": "batch"}]
    return PPO(model="model", data="prompts.jsonl", reward_funcs=reward, **sizes, **prices, **mixed, **rates, **rest, **fields)


def run(stage, out):
    return Path(Run(Recipe("x", {"x": stage}), Path(out)).execute()["x"].path)


def records(folder):
    """What was logged, but for the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if not k.startswith(("seconds", "time/"))} for line in lines]


def assert_same(one, two):
    ours, theirs = records(two), records(one)
    assert [record.keys() for record in ours] == [record.keys() for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    (file,) = (path.name for path in one.glob("*model.safetensors"))
    weights = load_file(two / file)
    for name, weight in load_file(one / file).items():
        assert_close(weights[name], weight, rel=1e-4, what=name)


def cut_back(folder, step):
    """As if the run had been killed after the checkpoint of `step`."""
    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    for file in (folder / "artifact.json", *folder.glob("*.safetensors")):
        file.unlink()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_do_as_one(strategy):
    one, two = run(ppo(), "one"), run(ppo(launch=two_processes(strategy)), "two")
    assert one.name == two.name, "the number of processes is no part of a stage's identity"
    assert len(list(two.glob("checkpoints/checkpoint-4/process-*.json"))) == 2
    assert_same(one, two)
    assert "loss/ptx_avg" in records(two)[1]
    cut_back(two, 2)
    assert_same(one, run(ppo(), "two"))
    cut_back(one, 2)
    assert_same(two, run(ppo(launch=two_processes(strategy)), "one"))


LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
VARIANTS = {
    "a head on the trunk, and forests of one tree": {"critic": "shared", "max_tokens_per_micro_batch": 40},
    "lora, whose reference is its base": LORA,
    "the best weights of an evaluation": {"eval_steps": 1, "load_best_model_at_end": True},
    "probes, whose passes come before and after": {"probes": {"old": "demonstrations.jsonl"}, "gradient_checkpointing": True},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_shards_do_as_one(fields):
    assert_same(run(ppo(**fields), "one"), run(ppo(**fields, launch=two_processes("fsdp2")), "two"))


@pytest.mark.parametrize("cls", [PPO, GRPO, RLOO])
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": "deepspeed-zero3"}, "strategy must be ddp or fsdp2, not deepspeed-zero3"),
        ({"strategy": "fsdp2", "rollout_server": "http://127.0.0.1:8000"}, "these would lie in shards: strategy must be ddp"),
        ({"strategy": "fsdp2", "tuning": "adapter"}, "tuning 'adapter' trains whole in every process"),
        ({"strategy": "fsdp2", "tuning": "qlora"}, "blocks of 4 bits, which are not dealt here"),
    ],
)
def test_what_shards_do_not_do_is_refused(cls, fields, said):
    fields = {"model": "owner/name", "data": "x", "reward_funcs": ["repetition"], **fields}
    with pytest.raises(ValidationError, match=said):
        cls(launch={"num_processes": 2, "strategy": fields.pop("strategy")}, **fields)


def test_a_critic_that_is_an_adapter_is_not_sharded():
    with pytest.raises(ValidationError, match="take 'separate' or 'shared'"):
        ppo(critic="adapter", **LORA, launch=two_processes("fsdp2"))
