"""Advantage estimators by name. To add one, write a decorated function here; what its users set are keyword-only parameters, each
also a field of `align.trainers.settings.PPOSettings`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from align import ops
from align.catalog import Catalog


@dataclass(frozen=True)
class Rewarded:
    """Episodes as an estimator sees them: matrices (episodes, steps), padded on the right, the completions of one prompt in rows
    next to each other.
    """

    rewards: Tensor  # what each token earned: the price of divergence where it is paid there, and on the last token the score
    mask: Tensor
    group_size: int
    values: Tensor | None = None  # where there is a critic
    total: ops.Total = lambda part: part

    @property
    def sums(self) -> Tensor:
        """What each episode earned, undiscounted: (episodes,)."""
        return self.rewards.sum(1)

    def spread(self, advantages: Tensor) -> Tensor:
        """One advantage an episode (episodes,), to each of its tokens."""
        return advantages[:, None] * self.mask


class Estimator(Protocol):
    """A function from `Rewarded` to advantages (episodes, steps) and, with a critic, what its values should have been."""

    needs_critic: bool
    needs_group: bool

    def __call__(self, x: Rewarded, /, **parameters: Any) -> tuple[Tensor, Tensor | None]: ...


estimators: Catalog[Estimator] = Catalog("advantage estimator")


def estimator(*, needs_critic: bool = False, needs_group: bool = False) -> Callable[[Callable[..., Any]], Estimator]:
    """Register a function as an advantage estimator."""

    def register(function: Callable[..., Any]) -> Estimator:
        made = cast(Estimator, function)
        made.needs_critic, made.needs_group = needs_critic, needs_group
        return estimators.add(made)

    return register


def parameters(name: str, settings: Any) -> dict[str, Any]:
    """What the estimator `name` takes of `settings`."""
    taken = inspect.signature(estimators[name]).parameters.values()
    return {p.name: getattr(settings, p.name) for p in taken if p.kind is p.KEYWORD_ONLY}


@estimator(needs_critic=True)
def gae(x: Rewarded, *, gamma: float, lam: float) -> tuple[Tensor, Tensor | None]:
    """Generalized advantage estimation (arXiv:1506.02438)."""
    assert x.values is not None
    return ops.gae(x.rewards, x.values, x.mask, gamma=gamma, lam=lam)


@estimator()
def reinforce(x: Rewarded, *, gamma: float) -> tuple[Tensor, Tensor | None]:
    """REINFORCE (Williams 1992): what came from the token on, minus the mean of what the other episodes of the batch earned."""
    to_go, _ = ops.gae(x.rewards, torch.zeros_like(x.rewards), x.mask, gamma=gamma, lam=1.0)
    whole = to_go[:, 0]
    count = x.total(torch.tensor(float(len(whole)), device=whole.device))
    others = (x.total(whole.sum()) - whole) / (count - 1).clamp(min=1)
    return (to_go - others[:, None]).masked_fill(~x.mask, 0), None


@estimator(needs_group=True)
def rloo(x: Rewarded) -> tuple[Tensor, Tensor | None]:
    """REINFORCE leave-one-out (arXiv:2402.14740): minus the mean of what the other completions of the prompt earned."""
    return x.spread(ops.group_advantages_rloo(x.sums, x.group_size)), None


@estimator(needs_group=True)
def grpo(x: Rewarded, *, scale_rewards: str) -> tuple[Tensor, Tensor | None]:
    """Group relative (arXiv:2402.03300): minus the group's mean, over the (sample) deviation of the group, of the batch, or of
    nothing.
    """
    advantages = ops.group_advantages_grpo(x.sums, x.group_size, scale=scale_rewards == "group")
    if scale_rewards == "batch":
        _, variance = ops.masked_moments(x.sums, torch.ones_like(x.sums), x.total)
        count = x.total(torch.tensor(float(len(x.sums)), device=x.sums.device))
        advantages = advantages / ((variance * count / (count - 1)).sqrt() + 1e-4)
    return x.spread(advantages), None
