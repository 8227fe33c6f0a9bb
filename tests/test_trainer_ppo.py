"""PPO: its numbers on hand-made episodes, its gradient, its reference, and that it raises the reward."""

import copy
import math
import random
import statistics
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import Alone, assert_close, build, llama, tokens
from pydantic import ValidationError

from align.engine import enable_forest
from align.errors import AlignError, NonFiniteLoss
from align.progress import History
from align.rollout import Completion, Sampling
from align.runner.checkpoints import checkpoints
from align.runner.stop import Stopped
from align.trainers.ppo.checkpoint import Checkpoints
from align.trainers.ppo.critics import SeparateCritic
from align.trainers.ppo.kl import KLController
from align.trainers.ppo.models import Models
from align.trainers.ppo.trainer import PPOTrainer
from align.trainers.settings import PPOSettings
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
STOP = 2


def critic_model(**fields):
    return build("llama", seed=4, score_head=True, **{**SIZES, **fields})


@pytest.fixture
def make(tmp_path):
    """Builds a PPO trainer on two enabled models."""

    def build_trainer(
        policy=None, critic=None, scorer=None, prompts=((5, 6, 7),), sampling=None, rate=1e-3, max_tokens=64, rest=None, **settings
    ):
        rest = rest or {}
        policy, settings = policy or llama(), {"total_episodes": 8, "episodes_per_step": 8, "num_mini_batches": 2, **settings}
        assert enable_forest(policy) is None
        if critic is None and settings.get("advantage_estimator", "gae") == "gae":
            critic = critic_model()
        if isinstance(critic, torch.nn.Module):
            assert enable_forest(critic) is None
            critic = SeparateCritic(critic)
        sampling = sampling or Sampling(6, temperature=0.8)
        models = Models(policy, critic, temperature=sampling.temperature)
        groups = [{"params": list(named.values())} for named in models.parameters().values() if named]
        optimizer = torch.optim.AdamW(groups, lr=rate)
        return PPOTrainer(
            models,
            [list(prompt) for prompt in prompts],
            scorer or (lambda indices, completions: ([0.0] * len(indices), {})),
            PPOSettings(**settings),
            sampling=sampling,
            stop_ids=[STOP],
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
            history=History(tmp_path / "metrics.jsonl"),
            max_tokens=max_tokens,
            max_grad_norm=1e9,
            seed=0,
            **rest,
        )

    return build_trainer


def episodes(count=8, seed=0):
    """Prompts and completions of uneven lengths with scores; every third was cut before its end token."""
    draw = random.Random(seed)
    prompts = [tokens(draw, draw.randint(1, 7)) for _ in range(count)]
    completions = [
        Completion(tokens(draw, draw.randint(1, 5)), False)
        if i % 3 == 0
        else Completion([*tokens(draw, draw.randint(0, 5)), STOP], True)
        for i in range(count)
    ]
    return prompts, completions, [draw.gauss(0, 2) for _ in range(count)]


def moved(model):
    """A copy of `model` some steps away from it."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return other


def slowly(policy, reference, critic, prompts, completions, scores, s, temperature):
    """The same numbers episode by episode, token by token, in plain Python."""
    rows, whole = [], []
    for prompt, completion, score in zip(prompts, completions, scores, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + completion.tokens])
            at = range(len(prompt), ids.shape[1])
            logps, priors = (
                [(model(input_ids=ids).logits[0, t - 1] / temperature).log_softmax(0)[ids[0, t]].item() for t in at]
                for model in (policy, reference)
            )
            values = [critic.score(critic.model(input_ids=ids).last_hidden_state[0, t - 1]).item() for t in at]
        gaps = [a - b for a, b in zip(logps, priors, strict=True)]
        kl = gaps if s.kl_estimator == "k1" else [math.exp(-gap) - 1 + gap for gap in gaps]
        if s.missing_eos_penalty is not None and not completion.finished:
            score -= s.missing_eos_penalty
        rewards = [-s.kl_coef * nats for nats in kl]
        rewards[-1] += score
        rows.append({"logps": logps, "reference": priors, "values": values, "kl": kl, "rewards": rewards, "score": score})
    if s.whiten_rewards:
        every = [r for row in rows for r in row["rewards"]]
        mean, deviation = statistics.fmean(every), statistics.pstdev(every)
        for row in rows:
            row["rewards"] = [(r - mean) / deviation + mean for r in row["rewards"]]
    for row in rows:
        # A_t = sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V behind the end is 0.
        values = [*row["values"], 0.0]
        deltas = [r + s.gamma * values[t + 1] - values[t] for t, r in enumerate(row["rewards"])]
        row["advantages"] = [sum((s.gamma * s.lam) ** j * d for j, d in enumerate(deltas[t:])) for t in range(len(deltas))]
        row["returns"] = [a + v for a, v in zip(row["advantages"], row["values"], strict=True)]
        whole += row["advantages"]
    if s.whiten_advantages:
        mean, deviation = statistics.fmean(whole), statistics.pstdev(whole)
        for row in rows:
            row["advantages"] = [(a - mean) / deviation for a in row["advantages"]]
    return rows


@pytest.mark.parametrize(
    "settings",
    [
        {"whiten_advantages": False, "gamma": 1.0, "lam": 0.95},
        {"whiten_advantages": True, "kl_estimator": "k3", "kl_coef": 0.3},
        {"whiten_advantages": True, "whiten_rewards": True, "gamma": 0.9, "lam": 0.5},
        {"whiten_advantages": False, "missing_eos_penalty": 1.5, "lam": 1.0, "gamma": 0.99},
    ],
    ids=lambda settings: " ".join(settings),
)
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_estimates_equal_a_slow_computation(make, settings, max_tokens):
    reference, critic = llama(), critic_model()
    policy, (prompts, completions, scores) = moved(reference), episodes()
    trainer = make(copy.deepcopy(policy), copy.deepcopy(critic), max_tokens=max_tokens, **settings)
    other = copy.deepcopy(reference)
    enable_forest(other)
    trainer.models.reference = lambda: nullcontext(other)
    found = trainer.estimate(prompts, completions, scores)
    wanted = slowly(policy, reference, critic, prompts, completions, scores, trainer.settings, temperature=0.8)

    assert found.mask.sum(1).tolist() == [len(completion.tokens) for completion in completions]
    columns = {"old_logps": "logps", "reference_logps": "reference", "old_values": "values"}
    for name in ("old_logps", "reference_logps", "old_values", "kl", "rewards", "advantages", "returns"):
        matrix = getattr(found, name)
        assert (matrix[~found.mask] == 0).all(), name
        flat = torch.tensor([value for row in wanted for value in row[columns.get(name, name)]])
        assert_close(matrix[found.mask], flat, rel=2e-5, what=name)
    assert found.scores.tolist() == pytest.approx([row["score"] for row in wanted])

    said = trainer.describe(found)
    k1 = [sum(a - b for a, b in zip(row["logps"], row["reference"], strict=True)) for row in wanted]
    price = [-trainer.settings.kl_coef * sum(row["kl"]) for row in wanted]
    assert said["objective/kl"] == pytest.approx(statistics.fmean(k1), rel=1e-4)
    assert said["objective/non_score_reward"] == pytest.approx(statistics.fmean(price), rel=1e-4)
    assert said["objective/rlhf_reward"] == pytest.approx(
        statistics.fmean(r["score"] for r in wanted) + statistics.fmean(price), rel=1e-4
    )
    assert said["val/num_eos_tokens"] == sum(completion.finished for completion in completions)


def test_one_token_by_hand(make):
    """One token, policy = reference: the reward is the score, delta = score - V, advantage = delta, return = score."""
    trainer = make(whiten_advantages=False, episodes_per_step=1, num_mini_batches=1)
    found = trainer.estimate([[5, 6]], [Completion([STOP], True)], [3.0])
    value = found.old_values.item()
    assert found.kl.item() == pytest.approx(0, abs=1e-6)
    assert found.rewards.item() == pytest.approx(3)
    assert found.advantages.item() == pytest.approx(3 - value, rel=1e-6)
    assert found.returns.item() == pytest.approx(3, rel=1e-6)


def spy_on(trainer):
    """Records the gradients of each optimizer step."""
    seen = []

    def record(*_):
        seen.append(
            {
                f"{i}.{n}": p.grad.clone()
                for i, m in enumerate((trainer.models.policy, trainer.models.critic.model))
                for n, p in m.named_parameters()
            }
        )

    trainer.learner.optimizer.register_step_pre_hook(record)
    return seen


def test_the_first_mini_batch_is_on_policy(make):
    """Before the first optimizer step the ratio is 1 everywhere, nothing is clipped, the value loss is half the squared error."""
    trainer = make(num_mini_batches=1, num_ppo_epochs=1)
    prompts, completions, scores = episodes()
    found = trainer.estimate(prompts, completions, scores)
    said = trainer.learner.update(found, 0.05)
    assert said["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert said["policy/approxkl_avg"] == pytest.approx(0, abs=1e-9)
    assert said["policy/clipfrac_avg"] == said["val/clipfrac_avg"] == 0
    assert said["loss/policy_avg"] == pytest.approx(-found.advantages[found.mask].mean().item(), abs=1e-6)
    assert said["loss/value_avg"] == pytest.approx(
        0.5 * ((found.old_values - found.returns)[found.mask] ** 2).mean().item(), rel=1e-5
    )
    assert trainer.learner.update(found, 0.05)["policy/approxkl_avg"] > 1e-7  # the update did move the policy


def test_gradients_do_not_depend_on_max_tokens(make):
    prompts, completions, scores = episodes()
    results = {}
    for max_tokens in (1, 25, 10_000):
        trainer = make(max_tokens=max_tokens, num_ppo_epochs=2)
        seen = spy_on(trainer)
        said = trainer.learner.update(trainer.estimate(prompts, completions, scores), 0.05)
        results[max_tokens] = seen, said
    seen, said = results.pop(10_000)
    assert len(seen) == 4  # 2 epochs of 2 mini-batches
    for others, other_said in results.values():
        assert other_said == pytest.approx(said, rel=1e-3, abs=1e-6)
        for name, gradient in seen[0].items():
            assert_close(others[0][name], gradient, what=name)
        for name, gradient in seen[3].items():  # after three AdamW steps, which blow rounding up
            assert_close(others[3][name], gradient, rel=1e-2, what=name)


def test_the_gradient_is_that_of_the_mean_over_the_mini_batch_s_tokens(make):
    """At the first step the surrogate's gradient is -A grad logp, the value's (V - R) grad V: by each sequence alone."""
    policy, critic, (prompts, completions, scores) = llama(), critic_model(), episodes()
    trainer = make(copy.deepcopy(policy), copy.deepcopy(critic), num_mini_batches=1, vf_coef=0.3)
    seen, found = spy_on(trainer), trainer.estimate(prompts, completions, scores)
    trainer.learner.update(found, 0.05)
    logps = Alone(policy, found.trees)(temperature=0.8).logps
    values = Alone(critic, found.trees)(read="sources")
    (-found.advantages[found.mask] * logps).mean().backward()
    (0.3 * 0.5 * (values - found.returns[found.mask]) ** 2).mean().backward()
    for i, model in enumerate((policy, critic)):
        for name, p in model.named_parameters():
            assert_close(seen[0][f"{i}.{name}"], p.grad, rel=2e-5, what=name)


def test_a_frozen_copy_is_the_reference_of_full_weights(make):
    trainer = make(rate=1e-2)
    start = copy.deepcopy(trainer.models.policy.state_dict())
    trainer.train()
    with trainer.models.reference() as reference:
        assert all(torch.equal(start[name], value) for name, value in reference.state_dict().items())
    assert any(not torch.equal(start[name], value) for name, value in trainer.models.policy.state_dict().items())
    found = trainer.estimate(*episodes())
    assert found.kl.abs().max() > 1e-3
    with torch.no_grad():
        theirs = Alone(llama(), found.trees)(temperature=0.8).logps
    assert_close(found.reference_logps[found.mask], theirs)


def test_an_adapter_switched_off_is_the_reference_of_lora(make):
    policy = tune(llama(), Tuning("lora", {"r": 4}))
    trainer = make(policy, rate=1e-2)
    assert trainer.models.reference.start == []
    assert trainer.estimate(*episodes()).kl.abs().max() == 0
    trainer.train()
    found = trainer.estimate(*episodes())
    assert found.kl.abs().max() > 1e-3
    with torch.no_grad():
        theirs = Alone(llama(), found.trees)(temperature=0.8).logps
    assert_close(found.reference_logps[found.mask], theirs)


def test_a_loss_that_is_not_finite_stops_before_the_update(make):
    trainer = make()
    prompts, completions, scores = episodes()
    found = trainer.estimate(prompts, completions, [*scores[:-1], math.nan])
    before = copy.deepcopy(trainer.models.policy.state_dict())
    with pytest.raises(AlignError, match="PPO's loss is nan; no update was made"):
        trainer.learner.update(found, 0.05)
    assert all(torch.equal(before[name], value) for name, value in trainer.models.policy.state_dict().items())


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_p": 0.9}, "top_p must be 1 and top_k 0"),
        ({"top_k": 50}, "top_p must be 1 and top_k 0"),
    ],
)
def test_sampling_that_cannot_work_is_refused(make, sampling, message):
    with pytest.raises(AlignError, match=message):
        make(sampling=replace(Sampling(4), **sampling))


def test_a_dual_clip_is_above_1():
    """At 1 a bad token that became likelier would have no gradient (arXiv:1912.09729 asks for c > 1)."""
    assert PPOSettings(dual_clip=1.5).dual_clip == 1.5
    with pytest.raises(ValidationError, match="dual_clip"):
        PPOSettings(dual_clip=1.0)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValidationError, match=r"episodes_per_step \(10\) must be a multiple of num_mini_batches \(4\)"):
        PPOSettings(episodes_per_step=10, num_mini_batches=4)
    with pytest.raises(ValidationError, match=r"total_episodes \(7\) is less than one step's episodes_per_step \(8\)"):
        PPOSettings(total_episodes=7, episodes_per_step=8)
    with pytest.raises(ValidationError, match="kl_target multiplies kl_coef, and 0 stays 0"):
        PPOSettings(kl_target=6.0, kl_coef=0.0)
    with pytest.raises(ValidationError, match=r"kl_horizon \(25\) must be above a fifth of episodes_per_step \(128\)"):
        PPOSettings(kl_target=6.0, kl_horizon=25)


def test_the_shortest_horizon_leaves_a_price():
    """128 episodes at no divergence and a horizon of 26: 0.05 x (1 - 0.2 x 128 / 26) is 0.00077."""
    settings = PPOSettings(kl_target=6.0, kl_horizon=26)
    price = KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
    price.update(0.0, settings.episodes_per_step)
    assert price.coef == pytest.approx(0.00077, rel=1e-2)


def test_every_prompt_comes_once_before_any_comes_again(make):
    order = make(prompts=[[i] for i in range(3, 15)], episodes_per_step=8).order
    drawn = [i for _ in range(6) for i in order.take(8)]  # 48 = 4 rounds of 12
    rounds = [drawn[i : i + 12] for i in range(0, 48, 12)]
    assert all(sorted(one) == list(range(12)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


def test_it_raises_a_simple_reward(make):
    """The score is the share of the token 17 in the completion: 1/320 by chance. 40 steps of 64 episodes, a few seconds."""

    def share(indices, completions):
        return [c.tokens.count(17) / len(c.tokens) for c in completions], {"rewards/length": float(len(completions))}

    trainer = make(
        llama(initializer_range=0.02),
        critic_model(initializer_range=0.02),
        share,
        prompts=[[5, 6, 7], [8, 9], [10]],
        sampling=Sampling(6),
        rate=5e-3,
        max_tokens=4096,
        total_episodes=2560,
        episodes_per_step=64,
        num_mini_batches=2,
        num_ppo_epochs=2,
        kl_coef=0.001,
    )
    trainer.train(log_every=5)
    scores = [record["objective/scores"] for record in trainer.history.records]
    assert [record["episode"] for record in trainer.history.records] == list(range(320, 2561, 320))
    assert scores[0] < 0.1
    assert scores[-1] > 0.5
    assert trainer.history.last("objective/kl") > 1
    assert trainer.history.last("rewards/length") == 64


def test_asked_to_stop_it_keeps_the_step_and_a_damaged_checkpoint_is_set_aside(make, tmp_path, monkeypatch, capsys):
    """Checkpoints each second step, and one for the request in the third, which is then damaged."""
    folder = tmp_path / "checkpoints"

    def trainer():
        return make(total_episodes=40, rest={"checkpoints": Checkpoints(folder, 2, None, keep=2)})

    cut, asked = trainer(), iter([False, False, True])
    monkeypatch.setattr("align.trainers.ppo.trainer.stop_requested", lambda: next(asked))
    with pytest.raises(Stopped):
        cut.train()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    weights = folder / "checkpoint-3" / "state.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = trainer()
    assert again.resume()
    assert again.done == 2
    assert "does not match its checksum; set aside as corrupt-3" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["policy", "critic"])
def test_a_gradient_that_is_no_number_stops_before_the_update(make, role):
    """Clipping would make NaN of the weights."""
    ppo = make()
    before = {name: weight.clone() for name, weight in ppo.models.parameters()[role].items()}
    next(iter(ppo.models.parameters()[role].values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLoss, match=f"the norm of the {role}'s gradient is (inf|nan); no update was made"):
        ppo.step()
    assert all(torch.equal(weight, before[name]) for name, weight in ppo.models.parameters()[role].items())
