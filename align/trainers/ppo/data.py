"""What goes through a step: prompts in turn, what was sampled, and episodes ready to be learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from align.forest import Tree
from align.heads import TokenScores
from align.rollout import Completion


class Shuffled:
    """Indices below `count` in a random order, each once before any comes again, without end."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator
        self.waiting: list[int] = []

    def take(self, number: int) -> list[int]:
        """The next `number`."""
        while len(self.waiting) < number:
            self.waiting += torch.randperm(self.count, generator=self.generator).tolist()
        taken, self.waiting = self.waiting[:number], self.waiting[number:]
        return taken


@dataclass(frozen=True)
class Sampled:
    """Completions with their scores. Those of one prompt lie next to each other."""

    completions: list[Completion]
    scores: list[float]
    components: dict[str, float]
    """Means of what the scores are made of."""

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**vars(self), "completions": [vars(completion) for completion in self.completions]}

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Sampled:
        """The inverse of `plain`."""
        return cls(**{**plain, "completions": [Completion(**completion) for completion in plain["completions"]]})


def sampled_logps(completions: Sequence[Completion], mask: Tensor) -> Tensor | None:
    """The log-probs that came with `completions`, in the shape of `mask`; None where some have none."""
    if any(len(completion.logps) != len(completion.tokens) for completion in completions):
        return None
    column = torch.tensor([logp for completion in completions for logp in completion.logps], device=mask.device)
    return torch.zeros(mask.shape, device=mask.device).masked_scatter_(mask, column)


@dataclass(frozen=True)
class Episodes:
    """A batch of episodes. Matrices are (episodes, longest completion), zero where `mask` is false; episodes are the branches of
    `trees` in their order.
    """

    trees: list[Tree]
    mask: Tensor
    scores: Tensor  # (episodes,)
    finished: Tensor  # (episodes,) bool
    old_logps: Tensor
    reference_logps: Tensor
    entropy: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    old_values: Tensor | None = None  # with a critic
    returns: Tensor | None = None
    sampled_logps: Tensor | None = None
    """What the engine that sampled says `old_logps` are, if it says so. Nothing is trained on them."""
    first_pass: list[TokenScores] = field(default_factory=list)
    """The pass of the policy that `old_logps` come from, to learn from before any update; whoever does takes it out."""

    def with_columns(self) -> list[Tree]:
        """The trees, with what the losses need of each of their tokens."""
        names = ("old_logps", "reference_logps", "advantages", "old_values", "returns")
        matrices = {name: matrix for name in names if (matrix := getattr(self, name)) is not None}
        columns = {name: matrix[self.mask].tolist() for name, matrix in matrices.items()}
        trees, first = [], 0
        for tree in self.trees:
            last = first + tree.targets
            trees.append(replace(tree, values={name: column[first:last] for name, column in columns.items()}))
            first = last
        return trees
