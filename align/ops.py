"""The arithmetic that several stages share: masked statistics, KL estimators, advantages. Imports torch and nothing else.

Masks are true (or 1) where a cell is real. Whatever stands in a masked-out cell, NaN included, reaches no result and no gradient,
and such a cell of a returned tensor is 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over processes."""


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where that is wider: what sums are taken in."""
    return torch.promote_types(dtype, torch.float32)


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` (n, d) at `index` (m,): ``x[index]``, with a gradient of the same bits every time. That of indexing is summed in
    an order that differs from run to run where a row is taken three times or more, on several CPU threads.
    """
    return embedding(index, x)


def masked_moments(values: Tensor, mask: Tensor, total: Total = lambda part: part) -> tuple[Tensor, Tensor]:
    """Mean and (population) variance of `values` where `mask` is true, over all processes that `total` sums over; NaN where nothing
    is, as for any empty mean.
    """
    mask = mask.bool().expand_as(values)
    kept, count = values.masked_fill(~mask, 0), total(mask.sum())
    mean = total(kept.sum()) / count
    mean = mean + total((kept - mean).masked_fill(~mask, 0).sum()) / count  # what was rounded off, so equal values have variance 0
    return mean, total(((kept - mean).masked_fill(~mask, 0) ** 2).sum()) / count


def masked_whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, eps: float = 1e-8, total: Total = lambda part: part
) -> Tensor:
    """`values` scaled to mean 0 and (population) variance 1 over the mask; with ``shift_mean=False`` the mean stays what it was.

    Args:
        eps: added to the variance, so equal values come out as 0 and not as NaN. (Their mean is exact.)
        total: sums over the processes whose values are one batch.
    """
    mask = mask.bool()
    mean, variance = masked_moments(values, mask, total)
    whitened = (values.masked_fill(~mask, 0) - mean) * torch.rsqrt(variance + eps)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0)


def log1mexp(logp: Tensor) -> Tensor:
    """``log(1 - exp(logp))`` for log-probabilities `logp` ≤ 0, finite and with finite gradients up to and including 0.

    A log-probability nearer to 0 than the dtype resolves around 1 counts as that resolution, and gets no gradient.
    """
    resolution = torch.finfo(logp.dtype).eps
    return torch.log(-torch.expm1(logp.clamp(max=-resolution)))


# --- KL(policy || reference), estimated per token from samples of the policy (http://joschu.net/blog/kl-approx.html), in nats ---


def kl_k1(logps: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, of either sign, high variance."""
    return logps - reference


def kl_k2(logps: Tensor, reference: Tensor) -> Tensor:
    """Biased, non-negative, low variance; its gradient is an unbiased gradient of the KL."""
    return 0.5 * (logps - reference) ** 2


def kl_k3(logps: Tensor, reference: Tensor) -> Tensor:
    """Unbiased, non-negative: ``r - 1 - log r`` with ``r = reference / policy``. Nothing is clamped, as in
    GRPO's paper (arXiv:2402.03300, Eq. 4) and in TRL: beyond 88 nats ``r`` is infinite in float32, and training stops there.
    """
    log_ratio = reference - logps
    return torch.expm1(log_ratio) - log_ratio


# --- advantages ---


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, Eq. 16).

    Args:
        rewards, values, mask: (episodes, steps), padded on the right; an episode ends at its last true step, and the value of
            what comes after the end is 0.
        gamma: discount per step.
        lam: λ; 0 is one-step temporal difference, 1 is Monte Carlo.

    Returns:
        advantages and returns (``advantages + values``, the critic's targets), both (episodes, steps), without gradient.

    Raises:
        ValueError: a mask that is not one run of true steps from the first column on.
    """
    mask = mask.bool()
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("gae needs episodes padded on the right: each row of the mask must be true steps followed by false ones")
    dtype = torch.promote_types(torch.promote_types(rewards.dtype, values.dtype), torch.float32)
    rewards, values = rewards.to(dtype).masked_fill(~mask, 0), values.to(dtype).masked_fill(~mask, 0)
    next_values = torch.cat([values[:, 1:], values.new_zeros(len(values), 1)], dim=1)
    deltas = rewards + gamma * next_values - values  # δ_t = r_t + γ V(s_{t+1}) - V(s_t); 0 in the padding
    advantages = torch.empty_like(values)
    running = values.new_zeros(len(values))
    for step in reversed(range(values.shape[1])):
        running = deltas[:, step] + gamma * lam * running  # Eq. 16, summed from the end
        advantages[:, step] = running
    return advantages, advantages + values


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} are no whole groups of {group_size}; a group needs at least 2")
    return rewards.view(-1, group_size)


def _equal(groups: Tensor) -> Tensor:
    """The groups (n, 1) of equal rewards. Their mean is rounded, and a small deviation would blow up how far they are from it."""
    return groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)


def group_advantages_rloo(rewards: Tensor, group_size: int) -> Tensor:
    """Each reward minus the mean of the others in its group (REINFORCE leave-one-out, arXiv:2402.14740).

    Args:
        rewards: (episodes,), the completions of one prompt next to each other, `group_size` at a time. A group of equal ones gets
            advantages of 0.
    """
    groups = _grouped(rewards, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).masked_fill(_equal(groups), 0).flatten()


def group_advantages_grpo(
    rewards: Tensor, group_size: int, *, scale: bool = True, eps: float = 1e-4, correction: int = 1
) -> Tensor:
    """Each reward minus its group's mean, over the group's deviation (arXiv:2402.03300, section 4.1.2).

    Args:
        rewards: (episodes,), the completions of one prompt next to each other, `group_size` at a time.
        scale: False leaves out the division, as Dr. GRPO (arXiv:2503.20783) does.
        eps: added to the deviation. A group of equal rewards gets advantages of 0, also with ``eps=0``.
        correction: 1 for the sample deviation (TRL's choice), 0 for the population's.
    """
    groups = _grouped(rewards, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True, correction=correction) + eps)
    return centred.masked_fill(_equal(groups), 0).flatten()
