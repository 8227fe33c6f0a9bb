import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import tensor

from align import ops

GOLDEN = Path(os.environ.get("ALIGN_GOLDEN", Path(__file__).parents[2] / "shared/golden/losses.json"))
NAN = float("nan")


def golden(name):
    if not GOLDEN.exists():
        return [pytest.param(None, marks=pytest.mark.skip(f"no {GOLDEN}"))]
    return [case for case in json.loads(GOLDEN.read_text())["cases"] if case["name"] == name]


def double(values):
    return tensor(values, dtype=torch.float64)


class TestRowsAt:
    def test_a_row_taken_many_times_has_the_gradient_of_one_thread_on_several(self):
        generator = torch.Generator().manual_seed(0)
        x, weights = torch.randn(500, 128, generator=generator, requires_grad=True), torch.randn(1500, 128, generator=generator)
        index = torch.randint(0, 500, (1500,), generator=generator)
        index[::3] = 7  # at the end of a prompt with many answers

        def gradient(taken):
            return torch.autograd.grad((taken * weights).sum(), x)[0]

        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            alone = gradient(x[index])
            torch.set_num_threads(2)
            assert all(torch.equal(gradient(ops.rows_at(x, index)), alone) for _ in range(20))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(ops.rows_at(x, index), x[index])


class TestMaskedStatistics:
    def test_mean_ignores_what_is_masked(self):
        values, mask = tensor([[1.0, 3.0, NAN], [8.0, NAN, NAN]]), tensor([[1, 1, 0], [1, 0, 0]])
        assert ops.masked_moments(values, mask)[0] == 4
        assert ops.masked_moments(values[0], torch.zeros(3))[0].isnan()

    def test_mean_counts_a_broadcast_mask_in_full(self):
        assert ops.masked_moments(tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]), tensor([True, True, False]))[0] == 2.5

    def test_no_gradient_reaches_or_comes_from_the_padding(self):
        values, mask = tensor([1.0, 5.0, NAN, float("inf")], requires_grad=True), tensor([1, 1, 0, 0])
        (ops.masked_whiten(values, mask) * tensor([1.0, 3.0, 1.0, 1.0])).sum().backward()
        assert values.grad.isfinite().all()
        assert values.grad[2:].tolist() == [0, 0]

    def test_whiten_has_mean_0_and_variance_1_over_the_mask(self):
        torch.manual_seed(0)
        values, mask = 3 + 5 * torch.randn(7, 11), torch.rand(7, 11) < 0.6
        whitened = ops.masked_whiten(values.masked_fill(~mask, NAN), mask)
        assert whitened[mask].mean().abs() < 1e-6
        assert whitened[mask].var(correction=0) == pytest.approx(1, abs=1e-5)
        assert (whitened[~mask] == 0).all()

    def test_whiten_can_keep_the_mean(self):
        torch.manual_seed(0)
        values, mask = 3 + 5 * torch.randn(50), torch.ones(50)
        kept = ops.masked_whiten(values, mask, shift_mean=False)
        assert kept.mean() == pytest.approx(values.mean().item(), abs=1e-5)
        assert kept.var(correction=0) == pytest.approx(1, abs=1e-5)

    @pytest.mark.parametrize("mask", [[1, 1, 1], [1, 0, 0]])
    def test_whiten_of_equal_values_is_0(self, mask):
        assert ops.masked_whiten(tensor([2.0, 2.0, 2.0]), tensor(mask)).tolist() == [0, 0, 0]

    @pytest.mark.parametrize("value", [0.1, 1000.1, -3333.3, 1e-30])
    @pytest.mark.parametrize("count", [7, 1000, 99_991])
    @pytest.mark.parametrize("processes", [1, 3])
    def test_whiten_of_equal_values_is_0_also_where_their_sum_is_rounded(self, value, count, processes):
        """All processes have the same values."""
        values, mask = torch.full((count,), value), torch.ones(count)
        assert not ops.masked_whiten(values, mask, total=lambda part: part * processes).any()


class TestLog1mexp:
    @pytest.mark.parametrize("logp", [-1e-10, -1e-3, -0.5, -1.0, -20.0, -500.0])
    def test_equals_the_direct_formula_where_that_is_exact(self, logp):
        expected = math.log(-math.expm1(logp))
        assert ops.log1mexp(double(logp)).item() == pytest.approx(expected, rel=1e-12, abs=1e-15)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_is_finite_with_finite_gradients_at_the_ends(self, dtype):
        logp = tensor([0.0, -1e-30, -1e-8, -1e4], dtype=dtype, requires_grad=True)
        values = ops.log1mexp(logp)
        values.sum().backward()
        assert values.isfinite().all()
        assert logp.grad.isfinite().all()


class TestKL:
    def test_by_hand(self):
        """policy e^-1, reference e^-2: k1 = 1, k2 = 1/2, k3 = e^-1 - 1 + 1 = 0.367879."""
        logps, reference = tensor([-1.0]), tensor([-2.0])
        assert ops.kl_k1(logps, reference).item() == 1
        assert ops.kl_k2(logps, reference).item() == 0.5
        assert ops.kl_k3(logps, reference).item() == pytest.approx(0.367879, abs=1e-6)

    @pytest.mark.parametrize("case", [*golden("kl_k1"), *golden("kl_k3")], ids=lambda case: case and case["name"])
    def test_golden(self, case):
        estimate = getattr(ops, case["name"])(**{key: double(value) for key, value in case["inputs"].items()})
        torch.testing.assert_close(estimate, double(case["expected"]), rtol=0, atol=1e-6)

    def test_k1_and_k3_are_unbiased_and_k2_has_the_right_gradient(self):
        """Expectations over a categorical policy are exact sums, so there is nothing statistical here."""
        torch.manual_seed(0)
        logits = torch.randn(9, dtype=torch.float64, requires_grad=True)
        logps, reference = logits.log_softmax(0), torch.randn(9, dtype=torch.float64).log_softmax(0)
        kl = (logps.exp() * (logps - reference)).sum()
        probabilities = logps.exp().detach()
        for estimator in (ops.kl_k1, ops.kl_k3):
            assert (probabilities * estimator(logps, reference)).sum().item() == pytest.approx(kl.item())
        (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
        (estimated,) = torch.autograd.grad((probabilities * ops.kl_k2(logps, reference)).sum(), logits)
        torch.testing.assert_close(estimated, expected)


class TestGAE:
    def test_by_hand(self):
        """rewards 1, 0, 2 and values 1/2 each, γ = 1, λ = 1/2. From the end:
        δ = 2 - 1/2 = 3/2, 0 + 1/2 - 1/2 = 0, 1 + 1/2 - 1/2 = 1; A = 3/2, 0 + 3/4 = 3/4, 1 + 3/8 = 11/8; returns add 1/2.
        """
        rewards, values, mask = tensor([[1.0, 0.0, 2.0]]), torch.full((1, 3), 0.5), torch.ones(1, 3)
        advantages, returns = ops.gae(rewards, values, mask, gamma=1.0, lam=0.5)
        assert advantages.tolist() == [[1.375, 0.75, 1.5]]
        assert returns.tolist() == [[1.875, 1.25, 2.0]]

    @pytest.mark.parametrize("case", golden("gae"))
    def test_golden(self, case):
        rewards, values = double([case["inputs"]["rewards"]]), double([case["inputs"]["values"]])
        advantages, returns = ops.gae(rewards, values, torch.ones_like(rewards), **case["params"])
        torch.testing.assert_close(advantages, double([case["expected"]["advantages"]]), rtol=0, atol=1e-6)
        torch.testing.assert_close(returns, double([case["expected"]["returns"]]), rtol=0, atol=1e-6)

    def test_a_batch_equals_its_episodes_alone_whatever_is_in_the_padding(self):
        torch.manual_seed(0)
        rewards, values, lengths = torch.randn(4, 6), torch.randn(4, 6), tensor([6, 1, 3, 0])
        mask = torch.arange(6) < lengths[:, None]
        advantages, returns = ops.gae(
            rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, 1e9), mask.long(), gamma=0.9, lam=0.8
        )
        for i, n in enumerate(lengths.tolist()):
            alone = ops.gae(rewards[i : i + 1, :n], values[i : i + 1, :n], mask[i : i + 1, :n], gamma=0.9, lam=0.8)
            torch.testing.assert_close(advantages[i, :n], alone[0][0])
            torch.testing.assert_close(returns[i, :n], alone[1][0])
            assert (advantages[i, n:] == 0).all()
            assert (returns[i, n:] == 0).all()

    def test_lambda_1_gives_the_discounted_rewards_to_go(self):
        rewards, values = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
        returns = ops.gae(rewards, values, torch.ones(1, 5), gamma=0.9, lam=1.0)[1]
        to_go = [sum(0.9 ** (t - s) * rewards[0, t].item() for t in range(s, 5)) for s in range(5)]
        torch.testing.assert_close(returns[0], double(to_go))

    @pytest.mark.parametrize("mask", [[0, 1, 1], [1, 0, 1]])
    def test_refuses_other_paddings(self, mask):
        with pytest.raises(ValueError, match="padded on the right"):
            ops.gae(torch.zeros(1, 3), torch.zeros(1, 3), tensor([mask]), gamma=1.0, lam=1.0)

    def test_targets_carry_no_gradient_and_half_precision_is_summed_in_single(self):
        advantages, _ = ops.gae(
            torch.ones(1, 2).bfloat16(), torch.ones(1, 2, requires_grad=True).bfloat16(), torch.ones(1, 2), gamma=1, lam=1
        )
        assert not advantages.requires_grad
        assert advantages.dtype == torch.float32


class TestGroupAdvantages:
    def test_rloo_by_hand(self):
        """Group 1, 2, 6: baselines 4, 3.5, 1.5, advantages -3, -1.5, 4.5. The second group is equal rewards: 0."""
        assert ops.group_advantages_rloo(tensor([1.0, 2.0, 6.0, 7.0, 7.0, 7.0]), 3).tolist() == [-3, -1.5, 4.5, 0, 0, 0]

    def test_grpo_by_hand(self):
        """Group 1, 2, 3: mean 2, sample deviation 1, population deviation sqrt(2/3)."""
        rewards = tensor([1.0, 2.0, 3.0, 7.0, 7.0, 7.0])
        assert ops.group_advantages_grpo(rewards, 3, eps=0).tolist() == [-1, 0, 1, 0, 0, 0]
        assert ops.group_advantages_grpo(10 * rewards, 3, scale=False).tolist() == [-10, 0, 10, 0, 0, 0]
        population = ops.group_advantages_grpo(rewards, 3, eps=0, correction=0)
        assert population[2].item() == pytest.approx(math.sqrt(1.5))
        assert ops.group_advantages_grpo(rewards, 3)[2].item() == pytest.approx(1 / 1.0001)

    @pytest.mark.parametrize("reward", [0.1, 0.3, 3333.3, -1e-3])
    @pytest.mark.parametrize("eps", [0.0, 1e-4])
    def test_equal_rewards_get_0_also_where_their_mean_is_rounded(self, reward, eps):
        rewards = torch.full((14,), reward)
        rewards[7] += 1
        for correction in (0, 1):
            assert ops.group_advantages_grpo(rewards, 7, eps=eps, correction=correction)[:7].tolist() == [0] * 7
        advantages = ops.group_advantages_rloo(rewards, 7)
        assert advantages[:7].tolist() == [0] * 7
        assert advantages[7] == pytest.approx(1, rel=1e-3)

    @pytest.mark.parametrize("case", golden("rloo"))
    def test_golden_rloo(self, case):
        advantages = ops.group_advantages_rloo(double(case["inputs"]["rewards"]), 4)
        torch.testing.assert_close(advantages, double(case["expected"]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("case", golden("grpo"))
    def test_golden_grpo(self, case):
        rewards, params = double(case["inputs"]["rewards"]), case["params"]
        advantages = ops.group_advantages_grpo(rewards, 4, eps=params["eps"], correction=params["ddof"])
        torch.testing.assert_close(advantages, double(case["expected"]), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("size", [1, 4])
    def test_refuses_broken_groups(self, size):
        with pytest.raises(ValueError, match="whole groups"):
            ops.group_advantages_rloo(torch.zeros(6), size)
