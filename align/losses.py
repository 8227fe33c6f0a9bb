"""Losses: pure functions of named tensors. Values come out per example (pair or token); the caller reduces them.

A preference loss is one decorated function of a `PreferenceLogps` and its own keyword arguments. To add one, write it at the end of
that section, with paper and equation on the line that implements it, and derive one number by hand in its test. docs/losses.md has
the formulas side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from align import ops
from align.catalog import Catalog
from align.errors import AlignError


@dataclass(frozen=True)
class PreferenceLogps:
    """What a preference loss sees of a batch of pairs; each field is (pairs,).

    Log-probabilities are sums over the completion's tokens, in nats, prompt excluded; token counts are of the same tokens. The
    reference's are None for a loss with ``needs_reference=False``. `common` is the same of the first tokens of both completions,
    as many as the shorter one has; it is None for a loss without ``needs_common=True``.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    common: PreferenceLogps | None = None

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token of chosen and rejected; NaN for an empty completion, which has none."""
        return self.policy_chosen / self.chosen_tokens, self.policy_rejected / self.rejected_tokens

    def logratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of chosen and rejected.

        Raises:
            ValueError: there are no reference log-probs.
        """
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this loss needs the reference model's log-probs: pass reference_chosen and reference_rejected")
        return self.policy_chosen - self.reference_chosen, self.policy_rejected - self.reference_rejected

    def mean_logratios(self) -> tuple[Tensor, Tensor]:
        """`logratios` per token; NaN for an empty completion."""
        chosen, rejected = self.logratios()
        return chosen / self.chosen_tokens, rejected / self.rejected_tokens


@dataclass(frozen=True)
class LossOutput:
    """`loss` and each of `metrics` have one value per example; metrics carry no gradient."""

    loss: Tensor
    metrics: dict[str, Tensor]
    where: dict[str, Tensor] = field(default_factory=dict)
    """Bool, one value per example, for metrics that count for some of them only."""


class PreferenceLoss(Protocol):
    """A function of the catalog: its name, and what the trainer has to measure for it; see `preference_loss`."""

    __name__: str
    needs_reference: bool
    needs_common: bool

    def __call__(self, x: PreferenceLogps, /, **arguments: Any) -> LossOutput: ...


preference_losses: Catalog[PreferenceLoss] = Catalog("preference loss")


def preference_loss(*, needs_reference: bool, needs_common: bool = False) -> Callable[[Callable[..., LossOutput]], PreferenceLoss]:
    """Register a preference loss under its function's name, and let the trainer ask it what it needs: a reference model's
    log-probs, those of the completions' common length.
    """

    def register(function: Callable[..., LossOutput]) -> PreferenceLoss:
        loss = cast(PreferenceLoss, function)
        loss.needs_reference, loss.needs_common = needs_reference, needs_common
        return preference_losses.add(loss)

    return register


def _positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value > 0:
            raise AlignError(f"{name} must be greater than 0, not {value}")


def _flip_probability(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise AlignError(
            f"label_smoothing is the probability that a pair's labels are swapped: 0 <= it < 0.5, not {label_smoothing}"
        )


def _output(x: PreferenceLogps, loss: Tensor, rewards: tuple[Tensor, Tensor], **extra: Tensor) -> LossOutput:
    """The loss with the metrics all preference losses share; `rewards` are the implicit rewards of chosen and rejected."""
    chosen, rejected = rewards
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(loss.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": x.policy_chosen,
        "logps/rejected": x.policy_rejected,
        **extra,
    }
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def _implicit_rewards(x: PreferenceLogps, beta: float) -> tuple[Tensor, Tensor]:
    _positive(beta=beta)
    chosen, rejected = x.logratios()
    return beta * chosen, beta * rejected  # arXiv:2305.18290, Eq. 5, without the partition term that cancels within a pair


# --- preference losses with a reference model ---


@preference_loss(needs_reference=True)
def dpo(x: PreferenceLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Direct preference optimization; `label_smoothing` > 0 is conservative DPO."""
    _flip_probability(label_smoothing)
    chosen, rejected = rewards = _implicit_rewards(x, beta)
    margin = chosen - rejected
    loss = -F.logsigmoid(margin)  # arXiv:2305.18290, Eq. 7
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)  # ericmitchell.ai/cdpo.pdf, Eq. 3
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True)
def robust(x: PreferenceLogps, *, beta: float, label_smoothing: float) -> LossOutput:
    """Robust DPO: unbiased when a share `label_smoothing` of the labels is swapped. Unlike the others it can be negative."""
    _flip_probability(label_smoothing)
    chosen, rejected = rewards = _implicit_rewards(x, beta)
    clean, flipped = -F.logsigmoid(chosen - rejected), -F.logsigmoid(rejected - chosen)
    loss = ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)  # arXiv:2403.00409
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True)
def ipo(x: PreferenceLogps, *, beta: float, average: bool = False) -> LossOutput:
    """Identity preference optimization; `beta` is the paper's τ.

    `average` picks what is compared: sums over the completion's tokens, as the paper writes it, or, as TRL does it, means.
    """
    _positive(beta=beta)
    chosen, rejected = x.mean_logratios() if average else x.logratios()
    loss = (chosen - rejected - 1 / (2 * beta)) ** 2  # arXiv:2310.12036, Eq. 17
    return _output(x, loss, (beta * chosen, beta * rejected))


@preference_loss(needs_reference=True)
def hinge(x: PreferenceLogps, *, beta: float) -> LossOutput:
    """The hinge of SLiC on DPO's margin ("hinge-norm")."""
    chosen, rejected = rewards = _implicit_rewards(x, beta)
    loss = F.relu(1 - (chosen - rejected))  # arXiv:2309.06657, hinge-norm
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True)
def apo_zero(x: PreferenceLogps, *, beta: float) -> LossOutput:
    """Anchored preference optimization for chosen completions better than the model's own: raises them, lowers the rejected."""
    chosen, rejected = rewards = _implicit_rewards(x, beta)
    loss = torch.sigmoid(-chosen) + torch.sigmoid(rejected)  # arXiv:2408.06266, Eq. 7, plus the constant 1 (TRL's form)
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True)
def apo_down(x: PreferenceLogps, *, beta: float) -> LossOutput:
    """Anchored preference optimization for chosen completions worse than the model's own: lowers both, the rejected more."""
    chosen, rejected = rewards = _implicit_rewards(x, beta)
    loss = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)  # arXiv:2408.06266, Eq. 8, plus the constant 1 (TRL's form)
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True)
def dpo_norm(x: PreferenceLogps, *, beta: float) -> LossOutput:
    """Length-normalized DPO: log ratios per token instead of their sums, so `beta` is larger than DPO's (Tülu 3 takes 5)."""
    _positive(beta=beta)
    chosen, rejected = x.mean_logratios()
    chosen, rejected = rewards = beta * chosen, beta * rejected
    loss = -F.logsigmoid(chosen - rejected)  # arXiv:2411.15124, Eq. 6
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True, needs_common=True)
def ld_dpo(x: PreferenceLogps, *, beta: float, alpha: float) -> LossOutput:
    """Length-desensitized DPO: what the longer completion has beyond the other's length counts `alpha` (0 to 1; 1 is DPO).

    Raises:
        ValueError: there are no log-probs of the common length.
    """
    _positive(beta=beta)
    if not 0 <= alpha <= 1:
        raise AlignError(f"alpha is the weight of the tokens beyond the common length: 0 <= it <= 1, not {alpha}")
    if x.common is None:
        raise ValueError("this loss needs the log-probs of the completions' common length: pass common")
    # arXiv:2409.06411: log-probs are sums over the common length plus alpha times the rest, policy's and reference's alike
    whole, common = x.logratios(), x.common.logratios()
    chosen, rejected = rewards = (
        beta * (common[0] + alpha * (whole[0] - common[0])),
        beta * (common[1] + alpha * (whole[1] - common[1])),
    )
    loss = -F.logsigmoid(chosen - rejected)
    return _output(x, loss, rewards)


@preference_loss(needs_reference=True)
def rpo(x: PreferenceLogps, *, beta: float, rpo_alpha: float) -> LossOutput:
    """DPO plus `rpo_alpha` times the chosen completion's negative log-likelihood per token (iterative RPO)."""
    chosen, rejected = rewards = _implicit_rewards(x, beta)
    nll = -x.means()[0]
    loss = -F.logsigmoid(chosen - rejected) + rpo_alpha * nll  # arXiv:2404.19733, Eq. 1
    return _output(x, loss, rewards, nll_loss=nll)


# --- preference losses without one ---


@preference_loss(needs_reference=False)
def simpo(x: PreferenceLogps, *, beta: float, gamma: float) -> LossOutput:
    """Simple preference optimization. `gamma` is the target margin itself, not γ/β, and there is no likelihood term."""
    _positive(beta=beta)
    chosen, rejected = x.means()
    chosen, rejected = rewards = beta * chosen, beta * rejected  # arXiv:2405.14734, Eq. 4
    loss = -F.logsigmoid(chosen - rejected - gamma)  # arXiv:2405.14734, Eq. 6
    return _output(x, loss, rewards)


@preference_loss(needs_reference=False)
def orpo(x: PreferenceLogps, *, lam: float) -> LossOutput:
    """Odds ratio preference optimization; `lam` is λ of Eq. 6 (TRL calls it beta).

    P is the geometric mean of the token probabilities (Eq. 3's average). The likelihood term covers the completion only.
    """
    _positive(lam=lam)
    chosen, rejected = x.means()
    nll = -chosen
    log_odds = chosen - rejected - (ops.log1mexp(chosen) - ops.log1mexp(rejected))  # arXiv:2403.07691, Eq. 4 and 5
    log_odds_ratio = F.logsigmoid(log_odds)
    loss = nll - lam * log_odds_ratio  # arXiv:2403.07691, Eq. 6 and 7
    extra = {"nll_loss": nll, "log_odds_ratio": log_odds_ratio, "log_odds_chosen": log_odds}
    return _output(x, loss, (lam * chosen, lam * rejected), **extra)


# --- other data than pairs ---


def kto(
    logratios: Tensor,
    desirable: Tensor,
    kl: Tensor | float,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Kahneman-Tversky optimization, on single completions labelled good or bad.

    Args:
        logratios: (examples,), log(policy / reference) summed over the completion's tokens.
        desirable: (examples,), true for a good completion.
        kl: z₀, the batch's estimate of KL(policy || reference) in nats; no gradient flows through it.
    """
    _positive(beta=beta)
    rewards = beta * logratios
    baseline = beta * torch.as_tensor(kl).detach().clamp(min=0)
    desirable = desirable.bool()
    gain = desirable_weight * torch.sigmoid(baseline - rewards)  # arXiv:2402.01306, Eq. 8: λ_D (1 - σ(β (r - z₀)))
    harm = undesirable_weight * torch.sigmoid(rewards - baseline)  # arXiv:2402.01306, Eq. 8: λ_U (1 - σ(β (z₀ - r)))
    return LossOutput(torch.where(desirable, gain, harm), {"rewards": rewards.detach()})


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, center_rewards_coefficient: float = 0.0
) -> LossOutput:
    """The reward model's loss.

    Args:
        chosen, rejected: (pairs,), the scores of the two completions.
        margin: (pairs,), by how much the first is better; None is 0.
        center_rewards_coefficient: weight of the term that keeps the scores' mean near 0.
    """
    difference = chosen - rejected
    loss = -F.logsigmoid(difference if margin is None else difference - margin)  # arXiv:2307.09288, Eq. 1 and 2
    if center_rewards_coefficient:
        loss = loss + center_rewards_coefficient * (chosen + rejected) ** 2  # arXiv:2312.09244, Eq. 2
    metrics = {"accuracy": (difference > 0).to(loss.dtype), "margin": difference, "mean_reward": (chosen + rejected) / 2}
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


# --- PPO, per token; every token passed in is real, so divide by the count over the whole batch ---


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, cliprange: float, dual_clip: float | None = None
) -> LossOutput:
    """PPO's clipped surrogate, as a loss. All tensors are (tokens,); only `logps` gets a gradient.

    Args:
        dual_clip: c > 1. A negative advantage's loss is at most c times its size, however large the ratio.

    Metrics per token: ``ratio`` (new probability over old), ``approxkl`` (half the squared log ratio), ``clipfrac`` (1 where the
    clip decides the loss).
    """
    log_ratio = logps - old_logps.detach()
    advantages = advantages.detach()
    # Where the loss is bounded, its gradient is 0, and 0 times a ratio that overflowed would be NaN: the log ratio is held before.
    held = log_ratio.clamp(max=math.log(torch.finfo(logps.dtype).max) / 2)
    ratio = torch.exp(held if dual_clip is not None else torch.where(advantages < 0, log_ratio, held))
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    loss = torch.maximum(free, clipped)  # arXiv:1707.06347, Eq. 7
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)  # arXiv:1912.09729, Eq. 5
    metrics = {"ratio": ratio, "approxkl": ops.kl_k2(logps, old_logps), "clipfrac": (clipped > free).to(loss.dtype)}
    return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def ppo_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, cliprange_value: float) -> LossOutput:
    """Half the squared error of the critic, the larger of it for the value and for the value held within `cliprange_value` of the
    rollout's. All tensors are (tokens,); only `values` gets a gradient. Metric per token: ``clipfrac``.
    """
    old_values, returns = old_values.detach(), returns.detach()
    held = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    free, clipped = (values - returns) ** 2, (held - returns) ** 2
    loss = 0.5 * torch.maximum(free, clipped)  # not in the PPO paper; described in arXiv:2005.12729
    return LossOutput(loss, {"clipfrac": (clipped > free).to(loss.dtype).detach()})
