"""What a forest is trained for: from a model's answer on a forest to a loss per unit (token or pair)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from align.budget import MaxTokens
from align.forest import Forest, Tree
from align.heads import TokenScores
from align.losses import LossOutput, PreferenceLogps, bradley_terry
from align.reference import reference_logps


class Objective(Protocol):
    """A loss over forests. The trainer sums `loss` and divides by the units of the optimizer step's whole batch."""

    def units(self, forest: Forest) -> int:
        """How many units (tokens or pairs) the loss of `forest` has."""

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        """Loss and metrics, each (units,)."""


class LanguageModel:
    """Negative log-likelihood of the target tokens; the unit is a token."""

    def units(self, forest: Forest) -> int:
        return forest.targets.numel()

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        scores: TokenScores = model(forest=forest)
        return LossOutput(-scores.logps, {"mean_token_accuracy": scores.correct.float()})


@dataclass(frozen=True)
class Preference:
    """A preference loss of the catalog on (chosen, rejected) trees; the unit is a pair."""

    loss: Callable[..., LossOutput]
    parameters: dict[str, Any] = field(default_factory=dict)

    def units(self, forest: Forest) -> int:
        return forest.trees

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        scores: TokenScores = model(forest=forest)
        policy = forest.per_sequence(scores.logps).view(-1, 2)
        tokens = forest.target_counts().view(-1, 2)
        reference = forest.values["reference_logps"].view(-1, 2) if "reference_logps" in forest.values else None
        logps = PreferenceLogps(
            policy_chosen=policy[:, 0],
            policy_rejected=policy[:, 1],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1],
            reference_chosen=None if reference is None else reference[:, 0],
            reference_rejected=None if reference is None else reference[:, 1],
        )
        return self.loss(logps, **self.parameters)


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry on the scores at the ends of chosen and rejected; the unit is a pair."""

    center_rewards_coefficient: float = 0.0
    use_margin: bool = False

    def units(self, forest: Forest) -> int:
        return forest.trees

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        scores: Tensor = model(forest=forest, read="ends").view(-1, 2)
        margin = forest.values["margin"] if self.use_margin else None
        return bradley_terry(scores[:, 0], scores[:, 1], margin, center_rewards_coefficient=self.center_rewards_coefficient)


def add_reference_logps(model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens, label: str = "preference") -> list[Tree]:
    """The same trees, each with the log-probs (nats) of its branches under `model` as it is now, its adapter off.

    Done once, before training: what a run starts from is its own reference, so no second copy of the model is ever held.
    """
    logps = reference_logps(model, trees, max_tokens, label)
    return [replace(tree, values={**tree.values, "reference_logps": values}) for tree, values in zip(trees, logps, strict=True)]
