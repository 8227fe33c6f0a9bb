import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import tensor

from align import losses
from align.errors import AlignError
from align.losses import PreferenceLogps, preference_loss, preference_losses
from align.ops import masked_moments

GOLDEN = Path(os.environ.get("ALIGN_GOLDEN", Path(__file__).parents[2] / "shared/golden/losses.json"))
CASES = {case["name"]: case for case in json.loads(GOLDEN.read_text())["cases"]} if GOLDEN.exists() else {}
needs_golden = pytest.mark.skipif(not CASES, reason=f"no {GOLDEN}")

# One honest setting of every preference loss; a new loss is added here and to GOLDEN_PREFERENCE or the hand-derived numbers.
ARGUMENTS = {
    "dpo": {"beta": 0.1},
    "robust": {"beta": 0.1, "label_smoothing": 0.1},
    "ipo": {"beta": 0.1},
    "hinge": {"beta": 0.1},
    "apo_zero": {"beta": 0.1},
    "apo_down": {"beta": 0.1},
    "dpo_norm": {"beta": 1.0},
    "ld_dpo": {"beta": 0.1, "alpha": 0.5},
    "rpo": {"beta": 0.1, "rpo_alpha": 0.5},
    "simpo": {"beta": 2.0, "gamma": 1.0},
    "orpo": {"lam": 0.1},
}
REWARD_METRICS = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
ORPO_METRICS = {"nll_loss", "log_odds_ratio", "log_odds_chosen"}


def double(values):
    return tensor(values, dtype=torch.float64)


def pair():
    """chosen: 4 tokens, policy -10, reference -12, so a log ratio of 2; rejected: 5 tokens, -15 and -14, so -1, and -11 and -10.5
    of its first 4, so -0.5.
    """
    common = PreferenceLogps(double([-10.0]), double([-11.0]), tensor([4]), tensor([4]), double([-12.0]), double([-10.5]))
    whole = PreferenceLogps(double([-10.0]), double([-15.0]), tensor([4]), tensor([5]), double([-12.0]), double([-14.0]))
    return replace(whole, common=common)


def value(name, x=None, **arguments):
    return preference_losses[name](x or pair(), **arguments).loss.item()


class TestByHand:
    """Each number follows from `pair` with β = 0.1: margin β (2 - -1) = 0.3."""

    def test_dpo(self):
        """log(1 + e^-0.3) = log 1.740818 = 0.554355; smoothing by 0.1 adds 0.1 x 0.3."""
        assert value("dpo", beta=0.1) == pytest.approx(0.554355, abs=1e-6)
        assert value("dpo", beta=0.1, label_smoothing=0.1) == pytest.approx(0.584355, abs=1e-6)

    def test_robust(self):
        """(0.9 x 0.554355 - 0.1 x 0.854355) / 0.8 = 0.516855."""
        assert value("robust", beta=0.1, label_smoothing=0.1) == pytest.approx(0.516855, abs=1e-6)

    def test_ipo(self):
        """Sums: (3 - 5)^2 = 4. Means: (2/4 + 1/5 - 5)^2 = 4.3^2 = 18.49."""
        assert value("ipo", beta=0.1) == pytest.approx(4)
        assert value("ipo", beta=0.1, average=True) == pytest.approx(18.49)

    def test_hinge(self):
        """1 - 0.3, and 0 beyond a margin of 1 (β = 0.5: 1.5)."""
        assert value("hinge", beta=0.1) == pytest.approx(0.7)
        assert value("hinge", beta=0.5) == 0

    def test_apo_zero(self):
        """1 - σ(0.2) + σ(-0.1) = 0.450166 + 0.475021."""
        assert value("apo_zero", beta=0.1) == pytest.approx(0.925187, abs=1e-6)

    def test_apo_down(self):
        """σ(0.2) + 1 - σ(0.3) = 0.549834 + 0.425557. Chosen answers are not drawn up: at 0.2 the anchor outweighs the margin."""
        assert value("apo_down", beta=0.1) == pytest.approx(0.975391, abs=1e-6)
        policy = double([-10.0]).requires_grad_()
        losses.apo_down(replace(pair(), policy_chosen=policy), beta=0.1).loss.backward()
        assert policy.grad.item() == pytest.approx(0.1 * (0.247517 - 0.244458), abs=1e-6)  # β (σ'(0.2) - σ'(0.3))

    def test_dpo_norm(self):
        """Log ratios per token 2/4 and -1/5: log(1 + e^-0.7) = log 1.496585 = 0.403186."""
        assert value("dpo_norm", beta=1.0) == pytest.approx(0.403186, abs=1e-6)

    def test_ld_dpo(self):
        """α = 0.5 of the last rejected token's -0.5: -0.75, margin 0.275, log(1 + e^-0.275) = log 1.759572 = 0.565071. α = 0
        leaves -0.5: log(1 + e^-0.25) = log 1.778801. α = 1 is DPO.
        """
        assert value("ld_dpo", beta=0.1, alpha=0.5) == pytest.approx(0.565071, abs=1e-6)
        assert value("ld_dpo", beta=0.1, alpha=0.0) == pytest.approx(math.log(1.778801), abs=1e-6)
        assert value("ld_dpo", beta=0.1, alpha=1.0) == value("dpo", beta=0.1)

    def test_rpo(self):
        """DPO's 0.554355 + 0.5 x 10/4."""
        assert value("rpo", beta=0.1, rpo_alpha=0.5) == pytest.approx(1.804355, abs=1e-6)

    def test_simpo(self):
        """Means -2.5 and -3, so 2 x 0.5 - 1 = 0 inside the sigmoid: log 2. gamma is the margin itself, not a share of beta."""
        assert value("simpo", beta=2.0, gamma=1.0) == pytest.approx(math.log(2))

    def test_orpo(self):
        """P 1/2 and 1/5 have odds 1 and 1/4: -log σ(log 4) = -log 4/5 = 0.223144; log 2 + 0.1 x 0.223144 = 0.715462."""
        x = replace(pair(), policy_chosen=double([-4 * math.log(2)]), policy_rejected=double([-5 * math.log(5)]))
        output = losses.orpo(x, lam=0.1)
        assert output.loss.item() == pytest.approx(0.715462, abs=1e-6)
        assert output.metrics["nll_loss"].item() == pytest.approx(math.log(2))
        assert output.metrics["log_odds_chosen"].item() == pytest.approx(math.log(4))
        assert output.metrics["log_odds_ratio"].item() == pytest.approx(math.log(4 / 5))

    def test_kto(self):
        """Good, log ratio 2, KL 1: σ(0.1 (1 - 2)) = 0.475021. Bad, log ratio -1, weight 2: 2 σ(0.1 (-1 - 1)) = 0.900332."""
        output = losses.kto(double([2.0, -1.0]), tensor([True, False]), 1.0, beta=0.1, undesirable_weight=2.0)
        assert output.loss.tolist() == pytest.approx([0.475021, 0.900332], abs=1e-6)
        assert output.metrics["rewards"].tolist() == pytest.approx([0.2, -0.1])

    def test_kto_takes_a_divergence_below_0_for_0_and_gives_it_no_gradient(self):
        """An estimate can be below 0. Good, log ratio 2: σ(0.1 (0 - 2)) = 0.450166."""
        kl = double(-1.0).requires_grad_()
        assert losses.kto(double([2.0]), tensor([True]), kl, beta=0.1).loss.item() == pytest.approx(0.450166, abs=1e-6)
        assert not losses.kto(double([2.0]), tensor([True]), kl + 2, beta=0.1).loss.requires_grad

    def test_bradley_terry(self):
        """Scores 1 and 0: log(1 + 1/e) = 0.313262; a margin of 1 leaves log 2; centering adds 0.01 x (1 + 0)^2."""
        one, zero = double([1.0]), double([0.0])
        output = losses.bradley_terry(one, zero)
        assert output.loss.item() == pytest.approx(0.313262, abs=1e-6)
        assert {name: metric.item() for name, metric in output.metrics.items()} == {"accuracy": 1, "margin": 1, "mean_reward": 0.5}
        asked = losses.bradley_terry(one, zero, 2 * one)
        assert asked.loss.item() == pytest.approx(1.313262), "log(1 + e^(2 - 1))"
        assert asked.metrics == output.metrics, "of the scores, whatever margin is asked for"
        assert losses.bradley_terry(one, one).metrics["accuracy"] == 0, "a tie is not right"
        assert losses.bradley_terry(one, zero, center_rewards_coefficient=0.01).loss.item() == pytest.approx(0.323262, abs=1e-6)

    def test_ppo_policy(self):
        """Ratios 3/2 and 1/2, clip 0.2: at 3/2 gains stop at 1.2 and losses count in full; at 1/2 it is the other way round."""
        ratio, advantages = double([1.5, 1.5, 0.5, 0.5]), double([1.0, -1.0, 1.0, -1.0])
        logps = ratio.log().requires_grad_()
        output = losses.ppo_policy_loss(logps, torch.zeros(4, dtype=torch.float64), advantages, cliprange=0.2)
        assert output.loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])
        assert output.metrics["clipfrac"].tolist() == [1, 0, 0, 1]
        assert output.metrics["ratio"].tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5])
        assert output.metrics["approxkl"].tolist() == pytest.approx([0.5 * math.log(r) ** 2 for r in ratio.tolist()])
        output.loss.sum().backward()
        assert logps.grad.tolist() == pytest.approx([0, 1.5, -0.5, 0])  # no pull beyond the clip

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_ppo_bounds_a_ratio_that_is_beyond_the_largest_number(self, dtype):
        """A ratio of e^1000: advantage 2 is clipped at 1.2, loss -2.4; 0 is 0; -2 has loss inf, or 3 x 2 = 6 with a dual clip of 3.
        Nothing that is bounded pulls.
        """
        zero = torch.zeros(3, dtype=dtype)
        for dual_clip, most in ((None, math.inf), (3.0, 6.0)):
            logps = (zero + 1000).requires_grad_()
            loss = losses.ppo_policy_loss(logps, zero, tensor([2.0, 0, -2], dtype=dtype), cliprange=0.2, dual_clip=dual_clip).loss
            assert loss.tolist() == pytest.approx([-2.4, 0, most])
            bounded = loss.isfinite()
            loss[bounded].sum().backward()
            assert logps.grad[bounded].tolist() == [0] * int(bounded.sum())

    def test_ppo_value(self):
        """Value 0, before -1, so held at -0.8. Return 1: the held error 1.8^2 / 2 = 1.62 is larger, no pull; return -1: 1 / 2."""
        values = double([0.0, 0.0]).requires_grad_()
        output = losses.ppo_value_loss(values, double([-1.0, -1.0]), double([1.0, -1.0]), cliprange_value=0.2)
        assert output.loss.tolist() == pytest.approx([1.62, 0.5])
        assert output.metrics["clipfrac"].tolist() == [1, 0]
        output.loss.sum().backward()
        assert values.grad.tolist() == [0, 1]

    @pytest.mark.parametrize(
        ("name", "chosen", "rejected"),
        [
            *((name, 0.2, -0.1) for name in ("dpo", "robust", "ipo", "hinge", "apo_zero", "apo_down", "rpo")),
            ("dpo_norm", 0.5, -0.2),
            ("ld_dpo", 0.2, -0.075),
            ("simpo", -5.0, -6.0),  # 2 x -10/4 and 2 x -15/5
            ("orpo", -0.25, -0.3),  # 0.1 times the same means
        ],
    )
    def test_metrics(self, name, chosen, rejected):
        """Implicit rewards, by `ARGUMENTS`; where they are equal the pair is not ranked right."""
        found = preference_losses[name](pair(), **ARGUMENTS[name]).metrics
        rewards = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        expected = {**rewards, "rewards/accuracies": 1, "logps/chosen": -10, "logps/rejected": -15}
        assert {key: found[key].item() for key in expected} == pytest.approx(expected)
        if name == "rpo":
            assert found["nll_loss"].item() == pytest.approx(2.5)
        same = PreferenceLogps(*[double([-1.0]), double([-1.0]), tensor([4]), tensor([4])] + [double([-1.0])] * 2)
        tied = preference_losses[name](replace(same, common=same), **ARGUMENTS[name]).metrics
        assert tied["rewards/accuracies"] == 0


GOLDEN_PREFERENCE = {
    "dpo": ("dpo", {}),
    "dpo_label_smoothing": ("dpo", {}),
    "robust": ("robust", {}),
    "ipo_sum": ("ipo", {}),
    "ipo_mean": ("ipo", {"average": True}),
    "hinge": ("hinge", {}),
    "apo_zero": ("apo_zero", {}),
    "rpo": ("rpo", {}),
    "simpo": ("simpo", {}),
    "orpo": ("orpo", {}),
}


@needs_golden
class TestGolden:
    @pytest.mark.parametrize("case", GOLDEN_PREFERENCE)
    def test_preference(self, case):
        name, extra = GOLDEN_PREFERENCE[case]
        x = PreferenceLogps(**{key: double(numbers) for key, numbers in CASES[case]["inputs"].items()})
        params = {"lam" if key == "lambda" else key: number for key, number in CASES[case]["params"].items()}
        loss = preference_losses[name](x, **params, **extra).loss
        torch.testing.assert_close(loss, double(CASES[case]["expected"]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("side", ["desirable", "undesirable"])
    def test_kto(self, side):
        x, params = CASES["kto"]["inputs"], dict(CASES["kto"]["params"])
        column = "chosen" if side == "desirable" else "rejected"
        logratios = double(x[f"policy_{column}"]) - double(x[f"reference_{column}"])
        kl = params.pop("z_ref") / params["beta"]
        loss = losses.kto(logratios, torch.full((3,), side == "desirable"), kl, **params).loss
        torch.testing.assert_close(loss, double(CASES["kto"]["expected"][side]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["bradley_terry", "bradley_terry_margin", "bradley_terry_centered"])
    def test_bradley_terry(self, name):
        chosen, rejected, margin = (double(CASES[name]["inputs"][key]) for key in ("chosen", "rejected", "margin"))
        margin = margin if name == "bradley_terry_margin" else None
        loss = losses.bradley_terry(chosen, rejected, margin, **CASES[name]["params"]).loss
        torch.testing.assert_close(loss, double(CASES[name]["expected"]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "function", "arguments"),
        [
            ("ppo_policy", losses.ppo_policy_loss, ("logps", "old_logps", "advantages")),
            ("ppo_value", losses.ppo_value_loss, ("values", "old_values", "returns")),
        ],
    )
    def test_ppo(self, name, function, arguments):
        inputs = CASES[name]["inputs"]
        loss = function(*(double(inputs[key]) for key in arguments), **CASES[name]["params"]).loss
        assert masked_moments(loss, tensor(inputs["mask"]))[0].item() == pytest.approx(CASES[name]["expected"], abs=1e-6)


def random_pairs(count=5, requires_grad=False):
    torch.manual_seed(0)
    tokens = torch.randint(3, 9, (2, count))
    policy, reference = -torch.rand(2, 2, count, dtype=torch.float64) * 3 * tokens - 0.1
    policy.requires_grad_(requires_grad)
    x = PreferenceLogps(policy[0], policy[1], tokens[0], tokens[1], reference[0], reference[1])
    shortest = tokens.amin(0)
    share = shortest / tokens  # as if each token had the same part in the sum
    common = [policy[0] * share[0], policy[1] * share[1], shortest, shortest, reference[0] * share[0], reference[1] * share[1]]
    return replace(x, common=PreferenceLogps(*common))


def only(x, number):
    """The pair `number` of `x` alone."""
    fields = {key: field[number : number + 1] for key, field in vars(x).items() if isinstance(field, torch.Tensor)}
    return PreferenceLogps(**fields, common=only(x.common, number) if x.common else None)


@pytest.mark.parametrize("name", preference_losses)
class TestEveryPreferenceLoss:
    def test_gradient_is_the_derivative(self, name):
        x = random_pairs()

        def loss(chosen, rejected):
            return preference_losses[name](replace(x, policy_chosen=chosen, policy_rejected=rejected), **ARGUMENTS[name]).loss

        policy = [logps.clone().requires_grad_() for logps in (x.policy_chosen, x.policy_rejected)]
        assert torch.autograd.gradcheck(loss, policy)

    def test_learning_raises_chosen_over_rejected(self, name):
        x = random_pairs()
        policy = torch.stack([x.reference_chosen, x.reference_rejected]).requires_grad_()
        common = replace(x.common, policy_chosen=x.common.reference_chosen, policy_rejected=x.common.reference_rejected)
        x = replace(x, policy_chosen=policy[0], policy_rejected=policy[1], common=common)  # the policy starts as the reference
        preference_losses[name](x, **ARGUMENTS[name]).loss.sum().backward()
        assert (policy.grad[1] > 0).all()
        if name == "apo_down":  # the anchor holds the chosen answer where it is, as strongly as the margin lifts it
            assert (policy.grad[0] == 0).all()
        else:
            assert (policy.grad[0] < 0).all()

    def test_output_is_per_pair_and_metrics_are_detached(self, name):
        output = preference_losses[name](random_pairs(requires_grad=True), **ARGUMENTS[name])
        assert output.loss.shape == (5,)
        assert output.loss.requires_grad
        assert set(output.metrics) - ORPO_METRICS == REWARD_METRICS
        assert all(metric.shape == (5,) and not metric.requires_grad for metric in output.metrics.values())
        margins = output.metrics["rewards/chosen"] - output.metrics["rewards/rejected"]
        torch.testing.assert_close(output.metrics["rewards/margins"], margins)
        assert output.metrics["rewards/accuracies"].tolist() == (margins > 0).double().tolist()

    def test_one_pair_does_not_see_another(self, name):
        x = random_pairs()
        whole, alone = (preference_losses[name](y, **ARGUMENTS[name]).loss for y in (x, only(x, 1)))
        torch.testing.assert_close(whole[1:2], alone)

    def test_says_whether_it_needs_a_reference(self, name):
        loss, x = preference_losses[name], replace(random_pairs(), reference_chosen=None, reference_rejected=None)
        if loss.needs_reference:
            with pytest.raises(ValueError, match="reference_chosen"):
                loss(x, **ARGUMENTS[name])
        else:
            assert loss(x, **ARGUMENTS[name]).loss.isfinite().all()

    def test_says_whether_it_needs_the_common_length(self, name):
        loss, x = preference_losses[name], replace(random_pairs(), common=None)
        if loss.needs_common:
            with pytest.raises(ValueError, match="pass common"):
                loss(x, **ARGUMENTS[name])
        else:
            assert loss(x, **ARGUMENTS[name]).loss.isfinite().all()

    def test_the_knobs_that_decide_have_no_default(self, name):
        for missing in ARGUMENTS[name]:
            with pytest.raises(AlignError, match=f"needs '{missing}'"):
                preference_losses.check_arguments(name, {k: v for k, v in ARGUMENTS[name].items() if k != missing})
        preference_losses.check_arguments(name, ARGUMENTS[name])


class TestNumericalExtremes:
    @pytest.mark.parametrize("name", preference_losses)
    @pytest.mark.parametrize(("chosen", "rejected"), [(0.0, 0.0), (0.0, -1e4), (-1e4, 0.0), (-1e-9, -1e-9), (-1e4, -1e4)])
    def test_loss_and_gradient_stay_finite_in_single_precision(self, name, chosen, rejected):
        policy = tensor([[chosen], [rejected]], requires_grad=True)
        x = PreferenceLogps(policy[0], policy[1], tensor([4]), tensor([5]), tensor([-12.0]), tensor([-14.0]))
        x = replace(x, common=replace(x, policy_rejected=0.8 * policy[1], rejected_tokens=tensor([4])))
        loss = preference_losses[name](x, **ARGUMENTS[name]).loss
        loss.sum().backward()
        assert loss.isfinite().all()
        assert policy.grad.isfinite().all()

    @pytest.mark.parametrize("logp", [-1e-6, -1e-3, -0.1, -5.0, -60.0])
    def test_orpo_in_single_precision_is_close_to_double(self, logp):
        fields = [[4 * logp], [-15.0], [4.0], [5.0]]
        single, exact = (
            losses.orpo(PreferenceLogps(*(tensor(f, dtype=d) for f in fields)), lam=0.1) for d in (torch.float32, torch.float64)
        )
        assert single.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5, abs=1e-7)

    def test_an_empty_completion_has_no_mean_and_says_so(self):
        x = replace(pair(), policy_chosen=double([0.0]), chosen_tokens=tensor([0]))
        assert losses.simpo(x, beta=2.0, gamma=1.0).loss.isnan()


class TestOtherGradients:
    def test_bradley_terry(self):
        torch.manual_seed(0)
        chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        margin = torch.rand(4, dtype=torch.float64)
        assert torch.autograd.gradcheck(
            lambda c, r: losses.bradley_terry(c, r, margin, center_rewards_coefficient=0.01).loss, (chosen, rejected)
        )

    def test_kto_ppo_policy_and_value(self):
        torch.manual_seed(0)
        x, old, target = (torch.randn(6, dtype=torch.float64) for _ in range(3))
        x.requires_grad_()
        good = tensor([1, 0, 1, 0, 1, 0])
        assert torch.autograd.gradcheck(lambda x: losses.kto(x, good, 0.3, beta=0.5).loss, x)
        assert torch.autograd.gradcheck(lambda x: losses.ppo_policy_loss(x, old, target, cliprange=0.2).loss, x)
        assert torch.autograd.gradcheck(lambda x: losses.ppo_value_loss(x, old, target, cliprange_value=0.2).loss, x)

    def test_ppo_trains_nothing_but_the_policy_and_the_critic(self):
        new, old, target = (torch.randn(3, requires_grad=True) for _ in range(3))
        losses.ppo_policy_loss(new, old, target, cliprange=0.2).loss.sum().backward()
        losses.ppo_value_loss(new, old, target, cliprange_value=0.2).loss.sum().backward()
        assert new.grad is not None
        assert old.grad is None
        assert target.grad is None


class TestMistakes:
    @pytest.mark.parametrize("name", preference_losses)
    def test_a_temperature_of_0_learns_nothing_and_is_refused(self, name):
        key = "lam" if name == "orpo" else "beta"
        with pytest.raises(AlignError, match=f"{key} must be greater than 0"):
            value(name, **{**ARGUMENTS[name], key: 0.0})

    @pytest.mark.parametrize("alpha", [-0.1, 1.1])
    def test_alpha_is_a_share(self, alpha):
        with pytest.raises(AlignError, match="0 <= it <= 1"):
            value("ld_dpo", beta=0.1, alpha=alpha)

    @pytest.mark.parametrize("name", ["dpo", "robust"])
    @pytest.mark.parametrize("smoothing", [0.5, -0.1])
    def test_label_smoothing_is_below_one_half(self, name, smoothing):
        with pytest.raises(AlignError, match="label_smoothing"):
            value(name, beta=0.1, label_smoothing=smoothing)

    def test_a_new_loss_is_one_decorated_function(self, monkeypatch):
        monkeypatch.setattr(preference_losses, "_entries", dict(preference_losses._entries))

        @preference_loss(needs_reference=False)
        def mine(x, *, beta):
            return losses.simpo(x, beta=beta, gamma=0.0)

        assert not preference_losses["mine"].needs_reference
        assert value("mine", beta=2.0) == value("simpo", beta=2.0, gamma=0.0)


def test_importing_losses_pulls_in_nothing_heavier_than_torch():
    code = "import align.losses, sys; sys.exit(any(m in sys.modules for m in ('transformers', 'trl', 'datasets', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
