"""A key-value cache of slots, and the attention of a pass: of prompts that enter it, and of one new token a row over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from align.attention import AttentionPlan, forest_attention
from align.forest import Forest
from align.ops import at_least_fp32

ROLLOUT = "align_rollout"
"""The name of the attention function in transformers' registry."""


class Prompts:
    """Prompts on their way into the cache.

    Args:
        forest: the prompts.
        rows: the row of the cache for each entry (entries,); a token may go to several.
        columns: the column (entries,).
        tokens: which token of the forest it is (entries,).
    """

    def __init__(self, forest: Forest, rows: Tensor, columns: Tensor, tokens: Tensor) -> None:
        self.forest, self.rows, self.columns, self.tokens = forest, rows, columns, tokens
        self.plan = AttentionPlan(forest)


Spans = Sequence[tuple[int, int, int]]
"""Neighbouring rows of similar length: first row, the row after the last, and the columns that hold all of theirs."""


class Pass:
    """A forward pass over one line of tokens: those of prompts that arrive, which attend as a forest, and behind them a new token
    for each of the first rows, which attends to its row of the cache. Every layer stores keys and values before it reads them, so
    a prompt may arrive in the pass of its row's first new token.

    Args:
        input_ids: the new tokens (n,).
        rows: 0, 1, 2 …: (n,).
        positions: column of each row's new token (n,).
        spans: all the rows; each span is one call of attention, which need not read more columns than it has.
        arriving: the prompts.
    """

    def __init__(self, input_ids: Tensor, rows: Tensor, positions: Tensor, spans: Spans, arriving: Prompts | None = None) -> None:
        self.positions, self.spans, self.arriving = positions, spans, arriving
        self.count, self.width = len(rows), max(width for _, _, width in spans)
        self.input_ids, self.position_ids, self.rows, self.columns = input_ids, positions, rows, positions
        self.first = 0
        """The number of prompts' tokens."""
        self.tokens: Tensor | None = None
        """Which of the line's tokens go to `rows` and `columns` of the cache (entries,); None is all, in order."""
        if arriving is not None:
            forest = arriving.forest
            self.first = forest.input_ids.numel()
            self.input_ids = torch.cat([forest.input_ids, input_ids])
            self.position_ids = torch.cat([forest.position_ids, positions])
            self.tokens = torch.cat([arriving.tokens, self.first + rows])
            self.rows = torch.cat([arriving.rows, rows])
            self.columns = torch.cat([arriving.columns, positions])
        self.keys: Tensor
        self.values: Tensor
        """What the new tokens attend to in the layer that is at work: (n, key-value heads, width, head_dim)."""
        self._masks: dict[Any, Tensor] = {}

    def mask(self, window: int | None) -> Tensor:
        """Which columns a row sees, the last `window` ones with a sliding window: bool (n, 1, 1, width)."""
        if window is not None and window >= self.width:
            window = None
        if window not in self._masks:
            columns = torch.arange(self.width, device=self.positions.device)
            mask = columns <= self.positions[:, None]
            if window is not None:
                mask &= columns > self.positions[:, None] - window
            self._masks[window] = mask[:, None, None]
        return self._masks[window]

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """`mask` as numbers to add to the logits, made once a pass: every layer would make them anew from a bool."""
        key = (window, dtype)
        if key not in self._masks:
            mask = self.mask(window)
            self._masks[key] = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
        return self._masks[key]


class SlotCache(Cache):
    """Keys and values of rows, each in a slot of its own from column 0: (slots, heads, columns, head_dim) in every layer.

    The pass that comes is set in `now` beforehand. Columns double when they no longer suffice; nothing is copied otherwise.
    On a CPU they are fp32 at least, as attention over them is.

    Args:
        columns: to begin with.
        most: that doubling need not exceed.
    """

    def __init__(self, slots: int, columns: int, most: int) -> None:
        super().__init__(layers=[])
        self.slots, self.columns, self.most = slots, columns, most
        self.now: Pass
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.generation = 0
        """How often the buffers have moved: a CUDA graph lives no longer."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what a layer computed, and show the pass what its new tokens attend to; returns what came."""
        if layer_idx >= len(self._layers):
            self._layers.append((self._buffer(key_states), self._buffer(value_states)))
        keys, values = self._layers[layer_idx]
        now = self.now
        key, value = key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        if now.tokens is not None:
            key, value = key[now.tokens], value[now.tokens]
        keys[now.rows, :, now.columns] = key.to(keys.dtype)
        values[now.rows, :, now.columns] = value.to(values.dtype)
        now.keys, now.values = keys[: now.count, :, : now.width], values[: now.count, :, : now.width]
        return key_states, value_states

    def _buffer(self, states: Tensor) -> Tensor:
        dtype = at_least_fp32(states.dtype) if states.is_cpu else states.dtype
        return states.new_zeros((self.slots, states.shape[1], self.columns, states.shape[3]), dtype=dtype)

    def reach(self, columns: int) -> None:
        """Make room for `columns` columns."""
        if columns <= self.columns:
            return
        before, self.columns = self.columns, max(columns, min(2 * self.columns, self.most))
        self.generation += 1
        for number, layer in enumerate(self._layers):
            # One layer after the other, so that no more than one is there twice.
            grown = []
            for buffer in layer:
                larger = buffer.new_zeros((self.slots, buffer.shape[1], self.columns, buffer.shape[3]))
                larger[:, :, :before] = buffer
                grown.append(larger)
            self._layers[number] = (grown[0], grown[1])

    def copy(self, moves: Sequence[tuple[int, int]], columns: int) -> None:
        """Copy the first `columns` columns, or more, of rows to others; each of `moves` is from and to."""
        buffers = [buffer for layer in self._layers for buffer in layer]
        if buffers and buffers[0].is_cuda:
            columns = self.columns  # whole rows lie in one piece, and go in one call
        sources, targets = ([b[move[end], :, :columns] for b in buffers for move in moves] for end in (0, 1))
        if sources:
            torch._foreach_copy_(targets, sources)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: rows have positions of their own, which every pass is given."""
        return 0


def rollout_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    rollout: Pass,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' protocol: query (1, heads, tokens, head_dim) to output (1, tokens, heads, head_dim)."""
    first, arriving = rollout.first, rollout.arriving
    out = _of_new_tokens(module, query[0, :, first:].transpose(0, 1), rollout, scaling, **kwargs)
    if arriving is None:
        return out, None
    query, key, value = (x[:, :, :first] for x in (query, key, value))
    before, _ = forest_attention(module, query, key, value, attention_mask, scaling, forest=arriving.plan, **kwargs)
    return torch.cat([before, out], dim=1), None


def _of_new_tokens(
    module: nn.Module,
    query: Tensor,
    now: Pass,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention of one query a row (n, heads, head_dim) over the row's columns of the cache: (1, n, heads, head_dim)."""
    key, value = now.keys, now.values
    if softcap is not None or s_aux is not None or kwargs.get("position_bias") is not None:
        mask = now.mask(sliding_window)
        out, _ = forest_attention(module, query[:, :, None], key, value, mask, scaling, softcap=softcap, s_aux=s_aux, **kwargs)
        return out.transpose(0, 1)
    # Heads that share keys are queries side by side: nothing is repeated.
    grouped = query.reshape(now.count, key.shape[1], -1, query.shape[2]).to(key.dtype)
    bias = now.bias(sliding_window, key.dtype)
    parts = [
        scaled_dot_product_attention(
            grouped[a:b], key[a:b, :, :width], value[a:b, :, :width], attn_mask=bias[a:b, ..., :width], scale=scaling
        )
        for a, b, width in now.spans
    ]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out.reshape(1, now.count, -1, value.shape[3]).to(query.dtype)


AttentionInterface.register(ROLLOUT, rollout_attention)
AttentionMaskInterface.register(ROLLOUT, sdpa_mask)
