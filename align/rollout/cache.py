"""A key-value cache of slots, and the attention of one new token a row over it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import sdpa_mask

from align.attention import forest_attention
from align.ops import at_least_fp32

ROLLOUT = "align_rollout"
"""The name of the attention function in transformers' registry."""


class Filling:
    """The forward pass of a forest of prompts: where in the cache each token goes. A token may go to several rows."""

    def __init__(self, rows: Tensor, columns: Tensor, tokens: Tensor) -> None:
        self.rows, self.columns, self.tokens = rows, columns, tokens


Spans = Sequence[tuple[int, int, int]]
"""Neighbouring rows of similar length: first row, the row after the last, and the columns that hold all of theirs."""


class Decoding:
    """The forward pass of one new token in each of the first rows.

    Args:
        rows: 0, 1, 2 …: (n,).
        positions: column of each row's new token (n,).
        spans: all the rows; each span is one call of attention, which need not read more columns than it has.
    """

    def __init__(self, rows: Tensor, positions: Tensor, spans: Spans) -> None:
        self.rows, self.positions, self.spans = rows, positions, spans
        self.width = max(width for _, _, width in spans)
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
    """Keys and values of rows, each in a slot of its own from column 0: (slots, columns, heads, head_dim) in every layer.

    What a pass does with them is set in `now` beforehand. Columns double when they no longer suffice; nothing is copied otherwise.
    On a CPU they are fp32 at least, as attention over them is.

    Args:
        columns: to begin with.
        most: that doubling need not exceed.
    """

    def __init__(self, slots: int, columns: int, most: int) -> None:
        super().__init__(layers=[])
        self.slots, self.columns, self.most = slots, columns, most
        self.now: Filling | Decoding
        self._layers: list[tuple[Tensor, Tensor]] = []
        self.generation = 0
        """How often the buffers have moved: a CUDA graph lives no longer."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what a layer computed; returns the keys and values that its queries attend to, heads before tokens."""
        if layer_idx >= len(self._layers):
            self._layers.append((self._buffer(key_states), self._buffer(value_states)))
        keys, values = self._layers[layer_idx]
        now = self.now
        if isinstance(now, Filling):
            for buffer, states in ((keys, key_states), (values, value_states)):
                buffer[now.rows, now.columns] = states[0].transpose(0, 1)[now.tokens].to(buffer.dtype)
            return key_states, value_states
        keys[now.rows, now.positions] = key_states[:, :, 0].to(keys.dtype)
        values[now.rows, now.positions] = value_states[:, :, 0].to(values.dtype)
        count = len(now.rows)
        return keys[:count, : now.width].transpose(1, 2), values[:count, : now.width].transpose(1, 2)

    def _buffer(self, states: Tensor) -> Tensor:
        dtype = at_least_fp32(states.dtype) if states.is_cpu else states.dtype
        return states.new_zeros((self.slots, self.columns, states.shape[1], states.shape[3]), dtype=dtype)

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
                larger = buffer.new_zeros((self.slots, self.columns, *buffer.shape[2:]))
                larger[:, :before] = buffer
                grown.append(larger)
            self._layers[number] = (grown[0], grown[1])

    def copy(self, source: int, targets: Sequence[int], columns: int) -> None:
        """Copy the first `columns` columns of a row to others."""
        for layer in self._layers:
            for buffer in layer:
                for target in targets:
                    buffer[target, :columns] = buffer[source, :columns]

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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    decoding: Decoding | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' protocol: with `decoding`, of one query a row (rows, heads, 1, head_dim) over the cache's
    keys (rows, key-value heads, width, head_dim); else `forest_attention`.
    """
    if decoding is None:
        return forest_attention(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, **kwargs)
    window = kwargs.pop("sliding_window", None)
    if softcap is not None or s_aux is not None or kwargs.get("position_bias") is not None:
        mask = decoding.mask(window)
        return forest_attention(module, query, key, value, mask, scaling, softcap=softcap, s_aux=s_aux, **kwargs)
    rows, heads, _, head_dim = query.shape
    # Heads that share keys are queries side by side: nothing is repeated.
    grouped = query.reshape(rows, key.shape[1], -1, head_dim).to(key.dtype)
    bias = decoding.bias(window, key.dtype)
    parts = [
        scaled_dot_product_attention(
            grouped[a:b], key[a:b, :, :width], value[a:b, :, :width], attn_mask=bias[a:b, ..., :width], scale=scaling
        )
        for a, b, width in decoding.spans
    ]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out.reshape(rows, 1, heads, value.shape[3]).to(query.dtype), None


AttentionInterface.register(ROLLOUT, rollout_attention)
AttentionMaskInterface.register(ROLLOUT, sdpa_mask)
