"""The parts of PPO beside its core: estimators, the price of divergence, additions to the loss, critics, four roles on one base."""

import copy
import itertools
import json

import pytest
import torch
from helpers import Alone, assert_close, llama
from test_trainer_ppo import episodes, make, moved, spy_on  # noqa: F401

from align.engine import enable_forest
from align.forest import Tree, plant
from align.losses import ppo_policy_loss
from align.models import load_causal_lm, load_reward_model
from align.trainers.ppo.adapters import critic_on_base, reward_on_base, same_base
from align.trainers.ppo.advantages import Rewarded, estimators
from align.trainers.ppo.critics import SharedCritic, ValueHead, adapter
from align.trainers.ppo.data import Episodes
from align.trainers.ppo.kl import KLController
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

KL = 0.05
MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
REWARDS = torch.tensor([[1.0, 2, 0], [0, 0, 6], [1, 0, 0], [0, 2, 3]])
"""Sums: 3, 6, 1, 5."""


@pytest.mark.parametrize(
    ("name", "settings", "wanted"),
    [
        # The other one of the pair: 3 - 6, 6 - 3, 1 - 5, 5 - 1.
        ("rloo", {}, [[-3, -3, 0], [3, 3, 3], [-4, 0, 0], [4, 4, 4]]),
        # Minus the pair's mean: 4.5 and 3.
        ("grpo", {"scale_rewards": "none"}, [[-1.5, -1.5, 0], [1.5, 1.5, 1.5], [-2, 0, 0], [2, 2, 2]]),
        # To go: [3, 2], [6, 6, 6], [1], [5, 5, 3]. Minus the mean of the others' sums: 4, 3, 14/3, 10/3.
        ("reinforce", {"gamma": 1.0}, [[-1, -2, 0], [3, 3, 3], [1 - 14 / 3, 0, 0], [5 - 10 / 3, 5 - 10 / 3, 3 - 10 / 3]]),
    ],
)
def test_estimators_by_hand(name, settings, wanted):
    advantages, returns = estimators[name](Rewarded(REWARDS, MASK, 2), **settings)
    assert returns is None
    assert_close(advantages, torch.tensor(wanted, dtype=torch.float))


def test_the_deviation_of_the_batch():
    """Sums 3, 6, 1, 5: mean 3.75, sample variance 14.75 / 3 (that of a group is the sample's, too, and so are both of TRL's)."""
    advantages, _ = estimators["grpo"](Rewarded(REWARDS, MASK, 2), scale_rewards="batch")
    wanted = [x / ((14.75 / 3) ** 0.5 + 1e-4) for x in (-1.5, 1.5, -2, 2)]
    assert advantages[:, 0].tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_price_is_steered_to_its_target():
    """Twice the target is an error of 1, held at 0.2: 0.1 * (1 + 0.2 * 50 / 100) = 0.11. Then 5 % below: * (1 - 0.05 / 2)."""
    price = KLController(0.1, target=4.0, horizon=100)
    price.update(8.0, 50)
    assert price.coef == pytest.approx(0.11)
    price.update(3.8, 50)
    assert price.coef == pytest.approx(0.11 * 0.975)
    fixed = KLController(0.1, target=None, horizon=100)
    fixed.update(8.0, 50)
    assert fixed.coef == 0.1


def test_dual_clip_bounds_the_loss_of_a_negative_advantage():
    """Ratio 8, advantage -2: the loss is 16 without, and at most 3 * 2 with it. A positive advantage keeps its 1.2 * 2."""
    logps, old = torch.full((2,), 8.0).log(), torch.zeros(2)
    advantages = torch.tensor([-2.0, 2.0])
    assert ppo_policy_loss(logps, old, advantages, cliprange=0.2).loss.tolist() == pytest.approx([16, -2.4])
    assert ppo_policy_loss(logps, old, advantages, cliprange=0.2, dual_clip=3.0).loss.tolist() == pytest.approx([6, -2.4])


def test_answers_to_one_prompt_are_one_tree(make):  # noqa: F811
    """The same numbers as with each answer in a tree of its own."""
    _, completions, scores = episodes()
    prompts = [[5, 6, 7], [8, 9]]
    together = make(num_generations=4, max_tokens=10_000).estimate(prompts, completions, scores)
    apart = make(max_tokens=10_000).estimate([p for p in prompts for _ in range(4)], completions, scores)
    assert [len(tree.branches) for tree in together.trees] == [4, 4]
    for name in ("old_logps", "old_values", "advantages", "returns"):
        assert_close(getattr(together, name), getattr(apart, name), what=name)


ROLES = {
    "shared": lambda policy, folder: SharedCritic(ValueHead(policy)),
    "separate": lambda policy, folder: None,  # `make` builds one
    "adapter": lambda policy, folder: critic_on_base(policy, None),
}


@pytest.mark.parametrize("critic", [*ROLES, "none"])
def test_the_update_begins_with_the_passes_that_measured(make, tmp_path, monkeypatch, critic):  # noqa: F811
    """Where one forest holds the batch: a pass less, and one of a critic of its own where the budget holds both; and the same
    gradients as where it is cut and both are asked again.
    """
    llama().save_pretrained(tmp_path / "base")

    def learned(max_tokens):
        policy = load_causal_lm(str(tmp_path / "base"))
        if critic == "adapter":
            torch.manual_seed(2)
            policy = tune(policy, Tuning("lora", {"r": 4}), tmp_path)
        enable_forest(policy)
        settings = {"advantage_estimator": "reinforce"} if critic == "none" else {"critic": ROLES[critic](policy, tmp_path)}
        trainer = make(policy, max_tokens=max_tokens, num_mini_batches=1, num_ppo_epochs=2, **settings)
        forests, valued, gradients = [], [], []
        if critic in ("separate", "adapter"):
            kind = type(trainer.models.critic)
            value = kind.__call__
            monkeypatch.setattr(kind, "__call__", lambda self, forest: valued.append(forest.tokens) or value(self, forest))
        answer = trainer.models.answer
        trainer.models.answer = lambda forest, **more: forests.append(forest.tokens) or answer(forest, **more)
        parameters = [p for named in trainer.models.parameters().values() for p in named.values()]
        trainer.learner.optimizer.register_step_pre_hook(
            lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        )
        found = trainer.estimate(*episodes())
        said = trainer.learner.update(found, KL)
        assert found.first_pass == [], "memory is held no longer than needed"
        monkeypatch.undo()
        return forests, valued, gradients, said, sum(tree.tokens for tree in found.trees)

    forests, valued, gradients, said, total = learned(10_000)
    assert forests == [total] * 2, "measured, and asked again for the second epoch alone"
    assert valued == ([total] * 2 if critic in ("separate", "adapter") else [])
    forests, valued, *_ = learned(2 * total - 1)
    assert forests == [total] * 2
    assert valued == ([total] * 3 if critic in ("separate", "adapter") else [])
    cut, _, others, other_said, _ = learned(total - 1)
    assert sum(cut) == 3 * total
    assert said == pytest.approx(other_said, rel=1e-3, abs=1e-6)
    assert_close(gradients[0], others[0])
    assert_close(gradients[1], others[1], rel=1e-2)  # after a step of AdamW, which blows rounding up


@pytest.mark.parametrize("average", ["tokens", "completions", "constant"])
def test_the_gradient_is_that_of_the_stated_average(make, average):  # noqa: F811
    """By each sequence alone, the entropy bonus and the price in the loss (k2, whose slope is the log ratio) included."""
    reference, (prompts, completions, scores) = llama(), episodes()
    policy = moved(reference)
    settings = {"loss_average": average, "entropy_coef": 0.1, "kl_in": "loss", "kl_estimator": "k2", "max_tokens": 25}
    trainer = make(copy.deepcopy(policy), num_mini_batches=1, **settings)
    for (_, start), other in zip(trainer.models.reference.start, reference.parameters(), strict=True):
        start.copy_(other.detach())
    seen, found = spy_on(trainer), trainer.estimate(prompts, completions, scores)
    assert found.kl.max() > 1e-3
    assert found.rewards.sum(1).tolist() == pytest.approx(scores, rel=1e-5), "the price is paid once"
    said = trainer.learner.update(found, KL)
    answers = Alone(policy, found.trees)(temperature=0.8)
    gap = (found.old_logps - found.reference_logps)[found.mask]
    loss = -found.advantages[found.mask] * answers.logps + KL * gap * answers.logps - 0.1 * answers.entropy
    lengths = found.mask.sum(1, keepdim=True).expand_as(found.mask)[found.mask]
    weights = {
        "tokens": torch.ones(len(loss)) / len(loss),
        "completions": 1 / (8 * lengths),
        "constant": torch.ones(len(loss)) / (8 * 6),
    }
    (weights[average] * loss).sum().backward()
    value = -found.advantages[found.mask] + KL * gap**2 / 2 - 0.1 * answers.entropy.detach()
    assert said["loss/policy_avg"] == pytest.approx((weights[average] * value).sum().item(), rel=1e-4)
    for name, p in policy.named_parameters():
        assert_close(seen[0][f"0.{name}"], p.grad, rel=5e-5, what=name)


def test_passes_end_where_the_policy_is_too_far(make):  # noqa: F811
    trainer = make(num_ppo_epochs=4, num_mini_batches=2, rate=1e-2, target_kl=1e-3)
    found = trainer.estimate(*episodes())
    said = trainer.learner.update(found, KL)
    assert 1 <= said["policy/updates"] < 8
    assert trainer.learner.scheduler.last_epoch == 8  # the schedule is one of episodes


def test_the_update_that_would_go_too_far_is_not_made(make):  # noqa: F811
    """Every mini-batch has all episodes, so the second one sees how far the first one's update went, in nats a token."""

    def learned(passes, target_kl):
        trainer = make(num_ppo_epochs=passes, num_mini_batches=1, rate=1e-2, target_kl=target_kl)
        said = trainer.learner.update(trainer.estimate(*episodes()), KL)
        return said, trainer.models.policy.state_dict()

    far = 2 * learned(2, None)[0]["policy/approxkl_avg"]  # the mean of this and of 0 before the first update
    said, weights = learned(2, 0.99 * far)
    assert said["policy/updates"] == 1
    assert all(torch.equal(weights[name], weight) for name, weight in learned(1, None)[1].items())
    assert learned(2, 1.01 * far)[0]["policy/updates"] == 2


def test_each_pass_draws_its_mini_batches_anew(make):  # noqa: F811
    drawn = list(make(num_ppo_epochs=3).learner._mini_batches(list("abcdefgh"), 2))
    passes = ["".join(itertools.chain(*drawn[i : i + 4])) for i in (0, 4, 8)]
    assert [sorted(each) for each in passes] == [list("abcdefgh")] * 3
    assert len(set(passes)) == 3


def test_an_update_has_no_gradient_of_the_one_before(make):  # noqa: F811
    """At a learning rate of 0 the second pass over the same mini-batch has the gradient of the first."""
    trainer = make(rate=0.0, num_ppo_epochs=2, num_mini_batches=1)
    seen = spy_on(trainer)
    trainer.learner.update(trainer.estimate(*episodes()), KL)
    for name, gradient in seen[0].items():
        assert_close(seen[1][name], gradient, what=name)


def test_policy_and_critic_are_clipped_each_by_its_own_norm(make):  # noqa: F811
    def gradients(max_grad_norm):
        trainer = make(num_mini_batches=1)
        trainer.learner.max_grad_norm = max_grad_norm
        seen = spy_on(trainer)
        trainer.learner.update(trainer.estimate(*episodes()), KL)
        return seen[0]

    whole, clipped = gradients(1e9), gradients(0.1)
    for role in ("0.", "1."):
        mine = {name: gradient for name, gradient in whole.items() if name.startswith(role)}
        norm = torch.cat([gradient.flatten() for gradient in mine.values()]).norm()
        assert norm > 0.2
        for name, gradient in mine.items():
            assert_close(clipped[name], 0.1 / norm * gradient, what=name)


def test_the_steered_price_is_the_one_that_is_paid(make):  # noqa: F811
    """The first 8 episodes do not diverge, an error of -1 that is held at -0.2: the price falls by 0.2 * 8 / 40."""
    steered = {"kl_target": 1.0, "kl_horizon": 40, "kl_coef": 0.5, "kl_in": "loss", "kl_estimator": "k3"}
    trainer = make(total_episodes=16, num_generations=2, prompts=[[5, 6], [7], [8, 9], [10]], **steered)
    paid, update = [], trainer.learner.update
    trainer.learner.update = lambda found, price, **more: paid.append(price) or update(found, price, **more)
    trainer.train()
    assert paid == pytest.approx([0.5, 0.5 * 0.96])
    assert [record["objective/kl_coef"] for record in trainer.history.records] == pytest.approx(paid)


def test_what_is_said_of_episodes_by_hand(make):  # noqa: F811
    """Two completions that ended, of two tokens and of three; each measure is of all five tokens or of both completions."""
    old = torch.tensor([[-1.0, -2, 0], [-3, -1, -2]])
    kl = torch.tensor([[0.5, 0.5, 0], [1, 1, 1]])
    found = Episodes(
        trees=[],
        mask=torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
        scores=torch.tensor([1.0, 3]),
        finished=torch.tensor([True, True]),
        old_logps=old,
        reference_logps=old - kl,
        entropy=torch.tensor([[1.0, 2, 0], [3, 4, 5]]),
        kl=kl,
        rewards=torch.zeros(2, 3),
        advantages=torch.zeros(2, 3),
        old_values=torch.tensor([[1.0, 2, 0], [3, 4, 5]]),
        returns=torch.tensor([[2.0, 2, 0], [4, 4, 6]]),  # 1, 0, 1, 0, 1 more
        sampled_logps=old + torch.tensor([[0.1, -0.1, 0], [0.2, -0.2, 0.4]]),
    )
    assert make(kl_coef=0.05).describe(found) == pytest.approx(
        {
            "objective/kl": 2,
            "objective/entropy": 7.5,
            "objective/scores": 2,
            "objective/non_score_reward": -0.1,
            "objective/rlhf_reward": 1.9,
            "objective/kl_coef": 0.05,
            "policy/entropy_avg": 3,
            "val/num_eos_tokens": 2,
            "completions/mean_length": 2.5,
            "completions/cut_share": 0,
            "val/mean_value": 3,
            "val/explained_variance": 1 - 0.24 / 2.24,
            "sampling/sampling_logp_difference/mean": 0.2,
        }
    )


def test_the_critic_warms_up_for_as_many_rounds_as_asked(make):  # noqa: F811
    trainer = make(critic_warmup_steps=2, total_episodes=32, kl_target=1.0, kl_horizon=40, kl_coef=0.5)
    policy, moved, prices = trainer.models.policy, [], []
    start = copy.deepcopy(policy.state_dict())

    def note(step):
        moved.append(any(not torch.equal(start[name], weight) for name, weight in policy.state_dict().items()))
        prices.append(trainer.kl.coef)

    trainer.train(after_step=note)
    assert moved == [False, False, True, True]
    assert [price < 0.5 for price in prices] == moved  # what cannot diverge does not steer it


def test_the_critic_warms_up_alone(make):  # noqa: F811
    for critic in (None, "shared"):
        policy = llama()
        trainer = make(policy, SharedCritic(ValueHead(policy)) if critic else None, critic_warmup_steps=1)
        start = copy.deepcopy(policy.state_dict())
        head = next(iter(trainer.models.parameters()["critic"].values())).clone()
        trainer.learner.update(trainer.estimate(*episodes()), KL, policy=False)
        assert all(torch.equal(start[name], value) for name, value in policy.state_dict().items())
        assert not torch.equal(head, next(iter(trainer.models.parameters()["critic"].values())))


def test_rows_are_mixed_in(make):  # noqa: F811
    """With advantages of 0 the gradient is that of the rows' mean negative log-likelihood, times its weight. It is a mean over the
    tokens of both rows, though each has a pass of its own.
    """
    policy = llama()
    rows = [Tree([5, 6, 7, 8], prompt_mask=[False, True, True, True]), Tree([9, 10], prompt_mask=[False, True])]
    settings = {"ptx_coef": 0.3, "ptx_batch_size": 2, "num_mini_batches": 1, "max_tokens": 1, "rest": {"ptx": rows}}
    trainer = make(copy.deepcopy(policy), **settings)
    seen, found = spy_on(trainer), trainer.estimate(*episodes())
    found.advantages.zero_()
    said = trainer.learner.update(found, KL)
    nll = -Alone(policy, rows)().logps.mean()
    assert said["loss/ptx_avg"] == pytest.approx(nll.item(), rel=1e-5)
    (0.3 * nll).backward()
    for name, p in policy.named_parameters():
        assert_close(seen[0][f"0.{name}"], p.grad, rel=5e-5, what=name)


def test_as_many_rows_are_mixed_in_as_a_mini_batch_has_episodes(make):  # noqa: F811
    """Two mini-batches of two prompts with two answers each take 8 of 9 rows, none twice."""
    rows = [Tree([5, 6, 7 + i], prompt_mask=[False, True, True]) for i in range(9)]
    trainer = make(ptx_coef=0.3, num_generations=2, rest={"ptx": rows})
    _, completions, scores = episodes()
    trainer.learner.update(trainer.estimate([[5], [6, 7], [8], [9]], completions, scores), KL)
    assert len(trainer.learner.ptx_order.waiting) == 1


def test_scores_are_held_within_bounds(make):  # noqa: F811
    prompts, completions, _ = episodes()
    found = make(score_clip=1.0, missing_eos_penalty=0.5).estimate(prompts, completions, [9.0] * 8)
    assert sorted(set(found.scores.tolist())) == [0.5, 1.0]


def test_samples_are_left_in_the_history(make):  # noqa: F811
    trainer = make(sample_steps=2, total_episodes=32)
    trainer.train()
    records = [r for r in trainer.history.records if "samples" in r]
    assert [r["step"] for r in records] == [1, 3]
    assert records[0]["samples"][0].keys() == {"prompt", "completion", "score"}


def test_a_line_of_the_log_is_the_mean_of_the_rounds_since_the_last(make):  # noqa: F811
    """Of two rounds, and of the third, which is the end."""
    scores = iter([1.0, 2.0, 6.0])
    trainer = make(total_episodes=24, scorer=lambda indices, completions: ([next(scores)] * len(indices), {}))
    trainer.train(log_every=2)
    assert [(r["step"], r["objective/scores"]) for r in trainer.history.records] == [(2, 1.5), (3, 6.0)]


def test_one_base_four_roles(make, tmp_path):  # noqa: F811
    """Reward model, critic, policy and reference on one copy of the base's weights answer as models of their own would."""
    base = llama()
    base.save_pretrained(tmp_path / "base")
    reward = tune(load_reward_model(str(tmp_path / "base")), Tuning("lora", {"r": 4}), tmp_path / "reward")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in reward.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    reward.save_pretrained(tmp_path / "reward")
    policy = tune(load_causal_lm(str(tmp_path / "base")), Tuning("lora", {"r": 2}), tmp_path)
    count = sum(p.numel() for p in policy.parameters())
    assert same_base(policy, str(tmp_path / "reward"))
    assert not same_base(policy, str(tmp_path / "base"))
    enable_forest(policy)
    judge, critic = reward_on_base(policy, str(tmp_path / "reward")), critic_on_base(policy, str(tmp_path / "reward"))
    assert sum(p.numel() for p in policy.parameters()) < count + 2 * sum(p.numel() for p in reward.parameters() if p.requires_grad)
    trainer = make(policy, critic, rate=1e-2)
    alone = load_reward_model(str(tmp_path / "reward"))
    found = trainer.estimate(*episodes())
    with torch.no_grad():
        assert_close(found.old_values[found.mask], Alone(alone, found.trees)(read="sources"), rel=2e-5)
        assert_close(judge(forest=plant(found.trees)), Alone(alone, found.trees)(read="ends"), rel=2e-5)
        assert found.kl.abs().max() == 0
    said = trainer.learner.update(found, KL)
    assert said["val/ratio"] == pytest.approx(1, abs=0.2)
    after = trainer.estimate(*episodes())
    assert after.kl.abs().max() > 1e-4, "the policy moved"
    with torch.no_grad():
        assert_close(after.reference_logps[after.mask], Alone(base, after.trees)(temperature=0.8).logps)
        assert_close(judge(forest=plant(found.trees)), Alone(alone, found.trees)(read="ends"), rel=2e-5)
        values = Alone(alone, found.trees)(read="sources")
        assert not torch.allclose(after.old_values[after.mask], values, rtol=1e-3), "the critic moved"
    with adapter(policy, "critic"):
        assert policy.active_adapter == "critic"
    assert policy.active_adapter == "default"
    names = set(trainer.models.parameters()["policy"])
    assert names
    assert all(".default" in name for name in names)
    assert json.loads((tmp_path / "reward/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


ARGUMENTS = {"lora": {"r": 2}, "pissa": {"r": 2}, "ia3": {}, "prefix": {"num_virtual_tokens": 2}}


@pytest.mark.parametrize(
    ("policy", "reward"), [("lora", "ia3"), ("ia3", "lora"), ("lora", "prefix"), ("prefix", "prefix"), ("pissa", "lora")]
)
def test_adapters_that_cannot_share_a_base_stand_apart(policy, reward, tmp_path):
    """peft refuses two kinds on one base; PiSSA's is another than the reward model was trained on, and scored otherwise."""
    llama().save_pretrained(tmp_path / "base")
    judge = tune(load_reward_model(str(tmp_path / "base")), Tuning(reward, ARGUMENTS[reward]), tmp_path / "reward")
    judge.save_pretrained(tmp_path / "reward")
    learner = tune(load_causal_lm(str(tmp_path / "base")), Tuning(policy, ARGUMENTS[policy]), tmp_path)
    assert reward_on_base(learner, str(tmp_path / "reward")) is None
