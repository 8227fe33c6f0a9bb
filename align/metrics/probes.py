"""Forgetting: a fixed set of rows, measured before and after a stage."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align.budget import MaxTokens
from align.encode import Encoder
from align.errors import AlignError
from align.forest import Tree
from align.scoring import mean_nll, token_accuracy

POSITIONS = 256
"""Positions of a probe at which whole distributions are compared."""


class Probe:
    """Rows of one kind, documents or demonstrations: perplexity, the share of tokens that the model finds likeliest itself, and how
    far its next-token distributions have moved.

    Raises:
        AlignError: none of the rows can be used.
    """

    def __init__(self, name: str, rows: Sequence[Any], kind: str, encoder: Encoder, max_tokens: MaxTokens) -> None:
        encoded = encoder.windows(rows) if kind == "text" else encoder.sft(rows)
        if not encoded.trees:
            raise AlignError(f"probe {name!r}: none of the rows can be used: {encoded.summary()}")
        self.trees, self.max_tokens = encoded.trees, max_tokens
        self._places = _places(self.trees)
        self._start: list[Tensor] = []
        self._before: dict[str, float] = {}

    def begin(self, model: nn.Module) -> None:
        """Measure `model` as it is before training, and keep its distributions at up to `POSITIONS` tokens."""
        self._before = self._measure(model)
        self._start = self._distributions(model)

    def end(self, model: nn.Module) -> dict[str, float]:
        """Perplexity and accuracy of `model` before and after, and KL(before ‖ after), the mean in nats a token."""
        after = self._distributions(model)
        kl = [(start.exp() * (start - now)).sum(-1) for start, now in zip(self._start, after, strict=True)]
        before = {f"{key}_before": value for key, value in self._before.items()}
        return {**before, **self._measure(model), "kl": torch.cat(kl).mean().item()}

    def _measure(self, model: nn.Module) -> dict[str, float]:
        nll = mean_nll(model, self.trees, self.max_tokens)
        return {"perplexity": math.exp(min(nll, 700)), "accuracy": token_accuracy(model, self.trees, self.max_tokens)}

    @torch.no_grad()
    def _distributions(self, model: nn.Module) -> list[Tensor]:
        """Log-probs (positions, vocabulary) of the chosen positions of each tree."""
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        found = []
        for number, places in self._places.items():
            logits = model(input_ids=torch.tensor([self.trees[number].prompt], device=device)).logits[0, places]
            found.append(logits.float().log_softmax(-1).cpu())
        model.train(was_training)
        return found


def _places(trees: Sequence[Tree]) -> dict[int, list[int]]:
    """Positions that predict a target, up to `POSITIONS` of them drawn once and for all: tree number to positions."""
    every = [(n, i - 1) for n, tree in enumerate(trees) for i in range(1, len(tree.prompt)) if (tree.prompt_mask or [])[i]]
    chosen = sorted(random.Random(0).sample(every, min(POSITIONS, len(every))))
    return {n: [i for number, i in chosen if number == n] for n in dict.fromkeys(number for number, _ in chosen)}
