"""Where the optimum of the KL-regularized reward is known, π* ∝ π_ref · exp(r / β), the methods reach it: total variation ≤ 0.05.

PPO, REINFORCE, RLOO and the group-relative estimator without its deviation go there by sampling; DPO on Bradley-Terry preferences
of the same reward goes there without (arXiv:2305.18290, Eq. 4 to 6). Every distribution is computed whole, over all sequences.
"""

import copy
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from helpers import build

from align.engine import enable_forest
from align.forest import Tree, plant
from align.losses import PreferenceLogps, preference_losses
from align.progress import History
from align.rollout import Sampling
from align.trainers.ppo.critics import SeparateCritic, SharedCritic, ValueHead
from align.trainers.ppo.models import Models
from align.trainers.ppo.trainer import PPOTrainer
from align.trainers.settings import PPOSettings

STOP, BETA, DPO_STEPS = 2, 0.5, 120


class Task(NamedTuple):
    vocabulary: int
    length: int
    """Most tokens in a completion."""
    prompts: list[list[int]]
    """Two tokens each: behind one alone, attention cannot tell a repeated token from the first, whatever the weights."""
    rounds: int


TASKS = {
    "one token": Task(6, 1, [[3, 4], [5, 1]], 30),
    "two tokens": Task(6, 2, [[3, 4], [5, 1]], 90),
    "three tokens": Task(4, 3, [[3, 0], [1, 3]], 90),
}
"""With 6, 31 and 40 completions behind a prompt."""
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def model(task, seed, *, score_head=False):
    made = build("llama", seed=seed, score_head=score_head, **SIZES)
    config = copy.deepcopy(made.config)
    config.vocab_size, config.initializer_range, config.pad_token_id = task.vocabulary, 0.08, None
    torch.manual_seed(seed)
    made = type(made)(config).eval()
    if score_head:
        torch.nn.init.zeros_(made.score.weight)
    assert enable_forest(made) is None
    return made


def sequences(task):
    """Every completion: it ends with the stop token or is cut."""
    for size in range(1, task.length + 1):
        for tokens in itertools.product(range(task.vocabulary), repeat=size):
            if STOP not in tokens[:-1] and (tokens[-1] == STOP or size == task.length):
                yield list(tokens)


def reward(task, prompt, tokens):
    """At most two tokens: somewhere in [-1, 1], as different for neighbours as for strangers. Three: a sum over tokens, as a model
    of one layer learns no such table of 40 in a few seconds. What follows a token still decides what it is worth.
    """
    if task.length > 2:
        return 0.8 * sum(math.sin(7 * prompt + 3 * t) for t in tokens)
    return math.sin(7 * prompt + sum((i + 2) ** 2 * (t + 1) for i, t in enumerate(tokens)))


def distribution(policy, prompt, task):
    """Log-probs of every sequence behind `prompt`: one tree with all of them as branches."""
    forest = plant([Tree(prompt, tuple(sequences(task)))])
    return forest.per_sequence(policy(forest=forest).logps)


@torch.no_grad()
def distance(policy, reference, task):
    """The largest total variation between `policy` and the optimum, over the prompts."""
    distances = []
    for number, prompt in enumerate(task.prompts):
        ours = distribution(policy, prompt, task)
        assert ours.exp().sum().item() == pytest.approx(1, abs=1e-4)
        rewards = torch.tensor([reward(task, number, tokens) for tokens in sequences(task)])
        best = (distribution(reference, prompt, task) + rewards / BETA).softmax(0)
        distances.append(0.5 * (ours.exp() - best).abs().sum().item())
    return max(distances)


METHODS = {
    "ppo": {},
    "ppo on a shared trunk": {"vf_coef": 0.5, "critic": "shared"},
    "reinforce": {"advantage_estimator": "reinforce"},
    "rloo": {"advantage_estimator": "rloo"},
    "grpo without deviation": {"advantage_estimator": "grpo", "scale_rewards": "none"},
}


@pytest.mark.parametrize("size", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_sampling_methods_reach_the_optimum(method, size, tmp_path):
    task = TASKS[size]
    settings = dict(METHODS[method])
    critic_kind = settings.pop("critic", "separate")
    policy = model(task, 0)
    reference, critic = copy.deepcopy(policy), None
    enable_forest(reference)
    if "advantage_estimator" not in settings:
        critic = SharedCritic(ValueHead(policy)) if critic_kind == "shared" else SeparateCritic(model(task, 1, score_head=True))
    models = Models(policy, critic, temperature=1.0)
    groups = [{"params": list(named.values())} for named in models.parameters().values() if named]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    episodes = 256
    updates = 2 * task.rounds
    trainer = PPOTrainer(
        models,
        task.prompts,
        lambda indices, completions: ([reward(task, i, c.tokens) for i, c in zip(indices, completions, strict=True)], {}),
        PPOSettings(
            total_episodes=task.rounds * episodes,
            episodes_per_step=episodes,
            num_generations=16,
            num_mini_batches=2,
            kl_coef=BETA,
            whiten_advantages=False,
            loss_average="constant",  # the gradient of the objective itself, at every length of the completions
            **settings,
        ),
        sampling=Sampling(task.length, batch_size=episodes),
        stop_ids=[STOP],
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / updates))),
        history=History(tmp_path / "metrics.jsonl"),
        max_tokens=8192,
        max_grad_norm=1.0,
        seed=0,
    )
    assert distance(policy, reference, task) > 0.3, "the start must not be the end"
    trainer.train(log_every=task.rounds)
    assert distance(policy, reference, task) <= 0.05


@pytest.mark.parametrize("size", TASKS)
def test_dpo_on_preferences_of_the_reward_reaches_the_optimum(size):
    """All pairs, weighted by how often the reference draws them and Bradley-Terry prefers the first: no noise of a sample."""
    task = TASKS[size]
    policy = model(task, 0)
    reference = copy.deepcopy(policy).requires_grad_(False)
    enable_forest(reference)
    first, second = (torch.tensor(side) for side in zip(*itertools.permutations(range(len(list(sequences(task)))), 2), strict=True))
    ones = torch.ones(len(first))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DPO_STEPS)
    assert distance(policy, reference, task) > 0.3
    for _ in range(DPO_STEPS):
        optimizer.zero_grad()
        for number, prompt in enumerate(task.prompts):
            ours, prior = (distribution(m, prompt, task) for m in (policy, reference))
            rewards = torch.tensor([reward(task, number, tokens) for tokens in sequences(task)])
            pairs = PreferenceLogps(ours[first], ours[second], ones, ones, prior[first], prior[second])
            preferred = torch.sigmoid(rewards[first] - rewards[second])
            drawn = (prior[first] + prior[second]).exp()
            (drawn * preferred * preference_losses["dpo"](pairs, beta=BETA).loss).sum().backward()
        optimizer.step()
        schedule.step()
    assert distance(policy, reference, task) <= 0.05
