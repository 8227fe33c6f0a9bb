"""Prompts to completions: a small sampling loop around the model's own forward and key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from align.engine import base_model


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens. ``temperature=0`` is greedy; ``top_p=1`` and ``top_k=0`` switch those filters off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 128


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, the end token included when `finished`."""

    tokens: list[int]
    finished: bool


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    generator: torch.Generator | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[Completion]:
    """One completion for each of `prompts` (non-empty token lists), in their order.

    Prompts run in batches of similar length, longest first; rows that have ended leave the batch.

    Args:
        stop_ids: a completion ends with, and includes, the first of these.
        generator: source of randomness; one on the model's device.
        progress: called with the number of completions after each batch.
    """
    was_training = model.training
    model.eval()
    results: list[Completion | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    try:
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            for i, completion in zip(
                batch, _complete_batch(model, [prompts[i] for i in batch], sampling, stop_ids, generator), strict=True
            ):
                results[i] = completion
            if progress is not None:
                progress(len(batch))
    finally:
        model.train(was_training)
    return [completion for completion in results if completion is not None]


def _complete_batch(
    model: nn.Module, prompts: list[list[int]], sampling: Sampling, stop_ids: Sequence[int], generator: torch.Generator | None
) -> list[Completion]:
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    # Padding on the left, so that every row's next token is in the last column.
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stops = torch.tensor(list(stop_ids), device=device)
    cache = DynamicCache(config=base_model(model).config)
    tokens: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch is

    alive = torch.ones(len(prompts), dtype=torch.bool, device=device)  # which of them go on

    for step in range(sampling.max_new_tokens):
        output = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        drawn = draw(output.logits[:, -1].float(), sampling, generator)
        ended = torch.isin(drawn, stops)
        for row, token, going, end in zip(rows.tolist(), drawn.tolist(), alive.tolist(), ended.tolist(), strict=True):
            if going:
                tokens[row].append(token)
                finished[row] = end
        alive &= ~ended
        if step == sampling.max_new_tokens - 1 or not alive.any():
            break
        # Leaving copies the whole cache, so rows leave together, once they are a quarter of the batch.
        if alive.float().mean() < 0.75:
            staying = alive.nonzero().squeeze(1)
            rows, drawn, mask, positions, alive = (x[staying] for x in (rows, drawn, mask, positions, alive))
            cache.batch_select_indices(staying)
        input_ids = drawn[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [Completion(t, f) for t, f in zip(tokens, finished, strict=True)]


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Draw one token a row from `logits` (rows, vocabulary): (rows,)."""
    if sampling.temperature == 0:
        return logits.argmax(1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kth = logits.topk(min(sampling.top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(dim=1, descending=True)
        before = ordered.softmax(1).cumsum(1) - ordered.softmax(1)  # probability of what is likelier than the token
        logits = logits.scatter(1, index, ordered.masked_fill(before >= sampling.top_p, -torch.inf))
    # Inverse transform sampling: one uniform number a row, where `torch.multinomial` draws one for each token of the vocabulary.
    cumulative = logits.softmax(1).cumsum(1)
    total = cumulative[:, -1:]
    point = total * torch.rand(total.shape, generator=generator, device=logits.device)
    # Strictly below the total, so that the token found has a probability above zero.
    point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True).squeeze(1)
