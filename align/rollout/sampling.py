"""How a token is drawn and when a completion ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from align.errors import AlignError

LIKELIEST = 256
"""Tokens that top-p looks at before it sorts the whole vocabulary."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. ``temperature=0`` is greedy; ``top_p=1`` and ``top_k=0`` switch those filters off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 128
    stop_strings: tuple[str, ...] = ()
    """A completion also ends with the token that completes one of these in its text."""
    tokenizer: Any = None
    """Reads the text of tokens (``decode``), for `stop_strings`."""

    def __post_init__(self) -> None:
        for name, possible, expected in (
            ("max_new_tokens", self.max_new_tokens > 0, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or a number above"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0, at most 1 (off)"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("batch_size", self.batch_size > 0, "at least 1"),
        ):
            if not possible:
                raise AlignError(f"{name}: got {getattr(self, name)}, expected {expected}")
        if self.stop_strings and self.tokenizer is None:
            raise AlignError("stop_strings are found in text: Sampling needs the tokenizer, too")
        if not all(self.stop_strings):
            raise AlignError("stop_strings holds an empty string, which every completion would end with")


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, the end token included when `finished`."""

    tokens: list[int]
    finished: bool
    """Whether it ended by a stop token or stop string, not by the limit."""
    logps: list[float] = field(default_factory=list, compare=False)
    """Log-probs (nats) of the tokens: at the sampling temperature (1 where greedy), before top-k and top-p."""

    def __post_init__(self) -> None:
        if math.isnan(sum(self.logps)):  # seen here and not where it was drawn, as a GPU would have to be waited for
            raise AlignError(
                "the model's logits are not finite, so no token can be drawn: its weights hold NaN, or overflow their precision; "
                "set dtype to float32, or take an earlier checkpoint"
            )


def chances(count: int, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The numbers in [0, 1) that tokens are drawn with (count, max_new_tokens), all at once: a completion's draws depend on its
    place among the prompts alone, not on the batch that it runs in.

    They are made on the CPU, where a generator goes on by as many numbers as were drawn: a GPU's goes on by calls, so that two
    halves would not be the whole.
    """
    if sampling.temperature == 0:
        return torch.zeros(1, 1).expand(count, sampling.max_new_tokens)
    return torch.rand((count, sampling.max_new_tokens), generator=generator)


def draw(logits: Tensor, sampling: Sampling, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverse transform sampling.

    Args:
        logits: (rows, vocabulary), fp32.
        chance: (rows,), a uniform number in [0, 1) for each.

    Returns:
        Tokens (rows,) and their log-probs (rows,), see `Completion.logps`.
    """
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    probabilities = logits.softmax(1)
    if sampling.temperature == 0:
        tokens = logits.argmax(1, keepdim=True)
    elif sampling.top_k or sampling.top_p < 1:
        likeliest, ids = _likeliest(probabilities, sampling)
        tokens = ids.gather(1, _transform(likeliest, chance))
    else:
        tokens = _transform(probabilities, chance)
    # What was drawn has a probability well above fp32's smallest number, so its logarithm is exact enough.
    return tokens.squeeze(1), probabilities.gather(1, tokens).log().squeeze(1)


def _transform(weights: Tensor, chance: Tensor) -> Tensor:
    """The column (rows, 1) at which the running sum of `weights` passes the share `chance` of their total."""
    cumulative = weights.cumsum(1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the token found has a probability above zero.
    point = torch.minimum(total * chance[:, None], torch.nextafter(total, torch.zeros_like(total)))
    # Of weights that are NaN the search finds no column; see `Completion`.
    return torch.searchsorted(cumulative, point, right=True).clamp_(max=weights.shape[1] - 1)


def _likeliest(probabilities: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first, zero beyond: top-k of all, then top-p of those."""
    vocabulary = probabilities.shape[1]
    if sampling.top_k:
        kept, ids = probabilities.topk(min(sampling.top_k, vocabulary), dim=1)
        kept = kept / kept.sum(1, keepdim=True)
    else:
        kept, ids = probabilities.topk(min(LIKELIEST, vocabulary), dim=1)
        # On a GPU the question would cost more than the sort. (A graph could not ask it at all.)
        if probabilities.is_cuda or (kept.sum(1) < sampling.top_p).any():
            kept, ids = probabilities.sort(dim=1, descending=True)
    if sampling.top_p < 1:
        before = kept.cumsum(1) - kept  # probability of what is likelier than the token
        kept = kept.masked_fill(before >= sampling.top_p, 0.0)
    return kept, ids


class StopTable:
    """Which tokens end a completion, as a table: one look-up a token."""

    def __init__(self, stop_ids: Sequence[int], device: torch.device) -> None:
        self.stop_ids = torch.tensor(sorted(set(stop_ids)), dtype=torch.long, device=device)
        self._table: Tensor | None = None

    def of(self, tokens: Tensor, vocabulary: int) -> Tensor:
        """Whether each of `tokens` is one: bool of the same shape."""
        if self._table is None:
            self._table = torch.zeros(vocabulary, dtype=torch.bool, device=tokens.device)
            self._table[self.stop_ids[(self.stop_ids >= 0) & (self.stop_ids < vocabulary)]] = True  # -1 is no token, not the last
        return self._table[tokens]


class StopText:
    """Finds stop strings in the text of tokens as they come."""

    def __init__(self, sampling: Sampling) -> None:
        self.strings, self.tokenizer = sampling.stop_strings, sampling.tokenizer
        # Every token but a special one is at least a byte of the text, so so many hold any string that ends in the last.
        self.reach = max((len(string.encode()) for string in self.strings), default=0) + 1

    def ends(self, tokens: list[int]) -> bool:
        """Whether a stop string ends within the last of `tokens`; all before it are known to hold none."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-self.reach :], skip_special_tokens=False)
        return any(string in text for string in self.strings)
