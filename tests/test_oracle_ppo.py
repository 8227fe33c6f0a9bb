"""Our PPO beside TRL 1.12's on the same models, episodes and settings: what both log is the same to 1e-6, where defined alike.

TRL 1.12 is not the one that is installed. What it logged is in ``trl_112_ppo.json``. To have it logged anew, put it beside:
``pip install --no-deps --target FOLDER trl==1.12.*``, and name the folder in the environment variable ALIGN_TRL_112.
"""

import copy
import json
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, build, llama, tokens
from test_trainer_ppo import SIZES, moved

from align.engine import enable_forest
from align.forest import Tree
from align.progress import History
from align.rollout import Completion, Sampling
from align.scoring import branch_scores
from align.trainers.ppo.critics import SeparateCritic
from align.trainers.ppo.models import Models
from align.trainers.ppo.trainer import PPOTrainer
from align.trainers.settings import PPOSettings

RECORD = Path(__file__).parent / "trl_112_ppo.json"
TEMPERATURE = 0.7
COMMON = {"num_ppo_epochs": 1, "kl_coef": 0.1, "kl_estimator": "k1", "gamma": 0.95, "lam": 0.9, "missing_eos_penalty": 1.0}
CASES = {
    "on policy": {},
    "two updates": {"num_ppo_epochs": 2, "vf_coef": 0.3},
    "k3": {"kl_estimator": "k3", "num_ppo_epochs": 2},
    "clipped": {"cliprange": 0.001, "cliprange_value": 0.001, "num_ppo_epochs": 3},
}


NAMES = (
    "objective/kl",
    "objective/scores",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "val/ratio",
)


@pytest.fixture(scope="module")
def trl_112():
    folder = os.environ.get("ALIGN_TRL_112")
    if folder is None or not (Path(folder) / "trl" / "experimental" / "ppo").is_dir():
        pytest.skip("TRL 1.12 is not here: pip install --no-deps --target FOLDER 'trl==1.12.*', and ALIGN_TRL_112=FOLDER")
    return folder


def episodes():
    """Prompts of uneven lengths; completions that were cut, as TRL scores one position behind an end token."""
    draw = random.Random(3)
    return [tokens(draw, draw.randint(2, 7)) for _ in range(8)], [tokens(draw, 6) for _ in range(8)]


def theirs(folder, trl_112, models, settings):
    prompts, completions = episodes()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    job = {
        "vocabulary": VOCABULARY,
        "temperature": TEMPERATURE,
        "prompts": prompts,
        "completions": completions,
        "new_tokens": 6,
        "batch": 8,
        "rounds": 1,
        "settings": {**settings, "learning_rate": 1e-3},
    }
    (folder / "job.json").write_text(json.dumps(job))
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.trl_ppo", str(folder)],
        env={**os.environ, "PYTHONPATH": f"{trl_112}:{root}"},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())["log"][0]


def ours(tmp_path, models, settings):
    prompts, completions = episodes()
    policy, reference, critic, judge = (copy.deepcopy(models[name]) for name in ("policy", "reference", "critic", "reward"))
    for model in (policy, reference, critic, judge):
        assert enable_forest(model) is None
    roles = Models(policy, SeparateCritic(critic), temperature=TEMPERATURE)
    roles.reference = lambda: nullcontext(reference)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=1e-3, weight_decay=0.0)
    batch = {"total_episodes": 8, "episodes_per_step": 8, "num_mini_batches": 1}
    trainer = PPOTrainer(
        roles,
        prompts,
        lambda *_: ([], {}),
        PPOSettings(**batch, **settings),
        sampling=Sampling(6, temperature=TEMPERATURE),
        stop_ids=[2],
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        history=History(tmp_path / "metrics.jsonl"),
        max_tokens=64,
        max_grad_norm=1e9,
        seed=0,
    )
    scores = [score for (score,) in branch_scores(judge, [Tree(p, (c,)) for p, c in zip(prompts, completions, strict=True)], 64)]
    found = trainer.estimate(prompts, [Completion(c, False) for c in completions], scores)
    return {**trainer.describe(found), **trainer.learner.update(found, settings["kl_coef"])}


def models_of():
    """In fp64: a divergence is a small difference of log-probs, which fp32 has to about 1e-5."""
    reference = llama()
    models = {
        "reference": reference,
        "policy": moved(reference),
        "critic": build("llama", seed=4, score_head=True, **SIZES),
        "reward": build("llama", seed=5, score_head=True, **SIZES),
    }
    return {name: model.double() for name, model in models.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_trl(case, tmp_path):
    """TRL whitens by the sample's variance and we by the population's: its policy loss is sqrt((n - 1) / n) of ours."""
    settings = {**COMMON, **CASES[case]}
    trl, align = json.loads(RECORD.read_text())[case], ours(tmp_path, models_of(), settings)
    n = 8 * 6
    align["loss/policy_avg"] *= math.sqrt((n - 1) / n)
    names = list(NAMES)
    if settings["kl_estimator"] == "k3":  # logged as priced by TRL, always as k1 by us
        names.remove("objective/kl")
    for name in names:
        assert align[name] == pytest.approx(trl[name], rel=1e-6, abs=2e-7), name
    if settings["num_ppo_epochs"] > 1:
        assert abs(trl["loss/policy_avg"]) > 1e-4, "nothing is compared"


@pytest.mark.parametrize("case", CASES)
def test_trl_says_what_is_on_record(case, trl_112, tmp_path):
    logged = theirs(tmp_path, trl_112, models_of(), {**COMMON, **CASES[case]})
    assert {name: logged[name] for name in NAMES} == pytest.approx(json.loads(RECORD.read_text())[case], rel=1e-6, abs=2e-7)
