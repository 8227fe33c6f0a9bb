"""What a forest is trained for: from a model's answer on a forest to a loss per unit (token or pair)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from align.budget import MaxTokens
from align.forest import Forest, Tree
from align.heads import Head, TokenScores
from align.losses import LossOutput, PreferenceLogps, PreferenceLoss, bradley_terry, kto
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

    loss: PreferenceLoss
    parameters: dict[str, Any] = field(default_factory=dict)

    def units(self, forest: Forest) -> int:
        return forest.trees

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        scores: TokenScores = model(forest=forest)
        tokens = forest.target_counts()
        logps = _pairs(forest.per_sequence(scores.logps), tokens, forest.values.get("reference_logps"))
        if self.loss.needs_common:
            common = tokens.view(-1, 2).amin(1).repeat_interleave(2)
            within = _number_in_sequence(forest) < common[forest.owner]
            shared = forest.per_sequence(scores.logps * within)
            logps = replace(logps, common=_pairs(shared, common, forest.values.get("reference_common_logps")))
        output = self.loss(logps, **self.parameters)
        return _with_lengths(output, output.metrics["rewards/margins"], tokens)


def _pairs(policy: Tensor, tokens: Tensor, reference: Tensor | None) -> PreferenceLogps:
    """Values of sequences (2 x pairs,), chosen and rejected in turn, by name."""
    both = (None, None) if reference is None else (reference[::2], reference[1::2])
    return PreferenceLogps(policy[::2], policy[1::2], tokens[::2], tokens[1::2], *both)


def _with_lengths(output: LossOutput, margins: Tensor, tokens: Tensor) -> LossOutput:
    """`output`, and which pairs are ranked right (margin above 0), apart for those whose chosen answer is longer and those whose
    chosen answer is shorter, by a quarter at least.

    Args:
        margins: (pairs,)
        tokens: (2 x pairs,), chosen and rejected in turn.
    """
    right, chosen, rejected = (margins > 0).to(margins.dtype), tokens[::2], tokens[1::2]
    where = {
        "accuracies/chosen_longer": chosen >= 1.25 * rejected,
        "accuracies/chosen_shorter": rejected >= 1.25 * chosen,
    }
    return replace(output, metrics={**output.metrics, **dict.fromkeys(where, right)}, where=where)


def _number_in_sequence(forest: Forest) -> Tensor:
    """Of each target (targets,), how many targets its sequence has before it."""
    counts = forest.target_counts()
    first = counts.cumsum(0) - counts
    return torch.arange(len(forest.targets), device=counts.device) - first[forest.owner]


@dataclass(frozen=True)
class Unpaired:
    """KTO on trees of one answer, with the values ``desirable``, ``reference_logps`` and ``kl`` (z₀, nats); the unit is an
    answer.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def units(self, forest: Forest) -> int:
        return forest.trees

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        scores: TokenScores = model(forest=forest)
        logps = forest.per_sequence(scores.logps)
        good, kl = forest.values["desirable"].bool(), forest.values["kl"]
        output = kto(
            logps - forest.values["reference_logps"],
            good,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        measured = {"rewards": output.metrics["rewards"], "logps": logps.detach()}
        sides = {"chosen": good, "rejected": ~good}
        names = [(f"{name}/{side}", values, where) for name, values in measured.items() for side, where in sides.items()]
        metrics = {name: values for name, values, _ in names}
        return LossOutput(output.loss, {**metrics, "kl": kl}, {name: where for name, _, where in names})


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry on the scores at the ends of chosen and rejected; the unit is a pair.

    With a `language_head` also the chosen answer's negative log-likelihood under it, a mean over tokens, at weight `sft_coef`
    (arXiv:2406.10216, SFT regularization).
    """

    center_rewards_coefficient: float = 0.0
    use_margin: bool = False
    sft_coef: float = 0.0
    language_head: Head | None = None

    def units(self, forest: Forest) -> int:
        return forest.trees

    def __call__(self, model: nn.Module, forest: Forest) -> LossOutput:
        scores, nll = self._answers(model, forest)
        chosen, rejected = scores.view(-1, 2).unbind(1)
        margin = forest.values["margin"] if self.use_margin else None
        output = bradley_terry(chosen, rejected, margin, center_rewards_coefficient=self.center_rewards_coefficient)
        output = _with_lengths(output, output.metrics["margin"], forest.target_counts())
        if nll is None:
            return output
        return replace(output, loss=output.loss + self.sft_coef * nll, metrics={**output.metrics, "nll": nll.detach()})

    def _answers(self, model: nn.Module, forest: Forest) -> tuple[Tensor, Tensor | None]:
        """Scores of the branches (2 x pairs,), and the chosen ones' negative log-likelihood a token (pairs,), where it counts."""
        if self.language_head is None:
            return model(forest=forest, read="ends"), None
        read: TokenScores = model(forest=forest, read="ends", language_head=self.language_head)
        assert read.values is not None
        return read.values, -(forest.per_sequence(read.logps) / forest.target_counts())[::2]


def add_reference_logps(
    model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens, label: str = "trees", *, common: bool = False
) -> list[Tree]:
    """The same trees, each with the log-probs (nats) of its branches under `model` as it is now, its adapter off.

    Done once, before training: what a run starts from is its own reference, so no second copy of the model is ever held.

    Args:
        common: also those of the branches' first tokens, as many as the shortest has.
    """
    measured = {"reference_logps": trees}
    if common:
        measured["reference_common_logps"] = [_to_common_length(tree) for tree in trees]
    columns = {name: reference_logps(model, part, max_tokens, label) for name, part in measured.items()}
    return [
        replace(tree, values={**tree.values, **{name: column[i] for name, column in columns.items()}})
        for i, tree in enumerate(trees)
    ]


def _to_common_length(tree: Tree) -> Tree:
    shortest = min(map(len, tree.branches))
    return replace(tree, branches=tuple(branch[:shortest] for branch in tree.branches))
