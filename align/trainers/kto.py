"""KTO on forests: Kahneman-Tversky optimization (arXiv:2402.01306) of answers that are labelled good or bad, one by one.

Its loss compares each answer's reward to z₀, an estimate of KL(policy || reference) from prompts with answers of *other* prompts.
z₀ belongs to the whole batch of an optimizer step, and no gradient flows through it. So it is measured first, forward only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from align.budget import Packed
from align.forest import Forest, Tree, plant
from align.trainers.forest import ForestTrainer


def add_mismatched(trees: Sequence[Tree], answers: Sequence[list[int]], batch_size: int, max_length: int | None) -> list[Tree]:
    """The trees, each with a second branch: the answer of the tree before it among the `batch_size` of its optimizer step (the
    first gets the last one's). Where a step has one micro-step this is TRL's pairing, too, but for a tree alone in the last batch:
    it gets the answer of the tree before it, not its own.

    Args:
        answers: each tree's answer in full length; it is cut to `max_length` tokens with its new prompt.
    """
    paired = []
    for number, tree in enumerate(trees):
        start = number - number % batch_size
        last = min(start + batch_size, len(trees)) - 1
        before = last if number == start < last else number - 1
        room = None if max_length is None else max_length - len(tree.prompt)
        paired.append(replace(tree, branches=(*tree.branches, answers[before][:room])))
    return paired


class KTOTrainer(ForestTrainer):
    """Trains on trees of an answer and a mismatched one, with the values ``desirable`` (one number) and ``reference_logps`` (two).

    z₀ is the mean of log(policy / reference) over the mismatched answers of the optimizer step's whole batch (in an evaluation: of
    all held-out rows), at least 0. Like the loss it does not depend on how the batch is cut.
    """

    @torch.no_grad()
    def _ready(self, trees: list[Tree]) -> list[Tree]:
        """The trees without their mismatched answers, and with z₀ as their value ``kl``."""
        mismatched = [
            Tree(tree.prompt, tree.branches[1:], values={"reference_logps": tree.values["reference_logps"][1:]}) for tree in trees
        ]
        total = self.eval_budget.fit(mismatched, self._log_ratios, alone=self.accelerator.num_processes == 1)
        ratio_sum, number = self.accelerator.reduce(total, "sum").tolist()
        return [_answer(tree, kl=max(ratio_sum / number, 0.0)) for tree in trees]

    def _log_ratios(self, packed: Packed) -> Tensor:
        """Sum and number of the log ratios of this process."""
        total = torch.zeros(2, device=self.args.device)
        for forest, counts in self._passes([forest for _, forest in packed]):
            forest = forest.to(self.args.device)
            with self.compute_loss_context_manager():
                logps = forest.per_sequence(self.model(forest=forest).logps)
            if counts:
                ratios = logps - forest.values["reference_logps"]
                total += torch.stack([ratios.sum(), torch.tensor(float(len(ratios)), device=ratios.device)])
        return total

    def _spare(self) -> Forest:
        return plant([_answer(self.train_dataset[0], kl=0.0)])

    @staticmethod
    def _means(sums: dict[str, float]) -> dict[str, float]:
        means = ForestTrainer._means(sums)
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def _answer(tree: Tree, kl: float) -> Tree:
    """`tree` with its own answer only."""
    values = {**tree.values, "reference_logps": tree.values["reference_logps"][:1], "kl": [kl]}
    return replace(tree, branches=tree.branches[:1], values=values)
