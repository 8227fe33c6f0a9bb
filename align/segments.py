"""Attention of a forest's segments by matrix products, on a CPU. Each segment is a few large products over the keys that it sees,
where they lie: nothing is padded or gathered, and little computed behind the diagonal. ``scaled_dot_product_attention`` takes rows
of up to about a thousand tokens in many small products there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from align.forest import Segment

WORTH = 2**14
"""Weights of a segment, mean of a forest's, from which on it is faster by itself: with fewer, a call costs more than padding."""

LONGEST = 2048
"""Keys of a path, beyond which ``scaled_dot_product_attention`` is faster."""

ROWS = 128
"""Queries of one product, at most: keys behind the last of them are left out."""

KEPT = 512
"""Weights on so many keys at most are kept for the backward pass, where they are small beside the layer's other activations; of
more keys they are made again.
"""


def pays(segments: Sequence[Segment], heads: int, longest: int) -> bool:
    """Whether `attend` is the faster way for `segments`, in paths of up to `longest` tokens."""
    weights = heads * sum(s.length * (s.prefix_length + s.length) for s in segments)
    return longest <= LONGEST and weights >= WORTH * len(segments)


def kept_weights(segments: Sequence[Segment]) -> int:
    """How many weights of a head wait for the backward pass."""
    blocks = ((rows.stop - rows.start, count) for segment in segments for rows, count in _blocks(segment))
    return sum(rows * count for rows, count in blocks if count <= KEPT)


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float) -> Tensor:
    """Attention where `segments` see, differentiable any number of times.

    Args:
        query: (heads, tokens, dim); `key` alike, and `value` (heads, tokens, value dim).
        segments: tile the tokens in order, each behind its prefix.

    Returns: (heads, tokens, value dim), next to each other for each token.
    """
    return _Attend.apply(query, key, value, segments, scaling, torch.is_grad_enabled())


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float, learning: bool
    ) -> Tensor:
        kept: list[Tensor | None] | None = [] if learning else None
        out = _answers(query, key, value, segments, scaling, kept)
        ctx.save_for_backward(query, key, value, *(kept or ()))
        ctx.segments, ctx.scaling = segments, scaling
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        query, key, value, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            out = _answers(query, key, value, ctx.segments, ctx.scaling)
            found = torch.autograd.grad(out, (query, key, value), gradient, create_graph=True)
        else:
            found = _slopes(query, key, value, ctx.segments, ctx.scaling, weights, gradient)
        return *found, None, None, None


def _answers(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    kept: list[Tensor | None] | None = None,
) -> Tensor:
    out = _like(query, value.shape[2])
    for segment in segments:
        keys, values = _seen(key, segment), _seen(value, segment)
        for rows, count in _blocks(segment):
            weights = _weights(query[:, rows], keys[:, :count], scaling)
            out[:, rows] = torch.bmm(weights, values[:, :count])
            if kept is not None:
                kept.append(weights if count <= KEPT else None)
    return out


def _slopes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    scaling: float,
    kept: Sequence[Tensor | None],
    gradient: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    to_query, to_key, to_value = (_like(x, x.shape[2]) for x in (query, key, value))
    waiting = iter(kept)
    for segment in segments:
        keys, values = _seen(key, segment), _seen(value, segment)
        blocks = [(*block, next(waiting)) for block in _blocks(segment)]
        sums: list[Tensor] = []
        for rows, count, weights in reversed(blocks):  # the last one sees all keys
            q, g = query[:, rows], gradient[:, rows]
            if weights is None:
                weights = _weights(q, keys[:, :count], scaling)
            # Of the softmax: p (g - sum p g)
            slopes = torch.ops.aten._softmax_backward_data(
                torch.bmm(g, values[:, :count].transpose(1, 2)), weights, 2, weights.dtype
            )
            to_query[:, rows] = _scaled(slopes, keys[:, :count], scaling)
            parts = _scaled(slopes.transpose(1, 2), q, scaling), torch.bmm(weights.transpose(1, 2), g)
            if sums:
                for whole, part in zip(sums, parts, strict=True):
                    whole[:, :count] += part
            else:
                sums = list(parts)
        own, prefix = _places(segment)
        for whole, part in zip((to_key, to_value), sums, strict=True):
            whole[:, own] = part[:, segment.prefix_length :]
            if segment.prefix_length:
                whole[:, prefix] += part[:, : segment.prefix_length]  # which came before, and has its own already
    return to_query, to_key, to_value


def _weights(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Softmax of products (heads, queries, keys). The queries are those of the last keys, and see none behind their own."""
    count, before = query.shape[1], keys.shape[1] - query.shape[1]
    bias = _bias(query.dtype, ROWS)[:count, LONGEST - before : LONGEST + count]
    return torch.baddbmm(bias, query, keys.transpose(1, 2), alpha=scaling).softmax(2)


def _scaled(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Their products, times `scaling`."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scaling)


def _blocks(segment: Segment) -> Iterator[tuple[slice, int]]:
    """Of a segment's tokens, in equal parts of at most `ROWS`: which they are, and how many of the keys that it sees they need."""
    size = math.ceil(segment.length / math.ceil(segment.length / ROWS))
    for start in range(0, segment.length, size):
        end = min(start + size, segment.length)
        yield slice(segment.start + start, segment.start + end), segment.prefix_length + end


def _seen(x: Tensor, segment: Segment) -> Tensor:
    """Of `x` (heads, tokens, dim) what a segment sees: its prefix and itself."""
    own, prefix = _places(segment)
    return torch.cat([x[:, prefix], x[:, own]], dim=1) if segment.prefix_length else x[:, own]


def _places(segment: Segment) -> tuple[slice, slice]:
    """Where a segment lies, and where its prefix."""
    return (
        slice(segment.start, segment.start + segment.length),
        slice(segment.prefix_start, segment.prefix_start + segment.prefix_length),
    )


def _like(x: Tensor, dim: int) -> Tensor:
    """Room for (heads, tokens, dim), next to each other for each token, as layers want them."""
    return x.new_empty(x.shape[1], x.shape[0], dim).transpose(0, 1)


@cache
def _bias(dtype: torch.dtype, rows: int) -> Tensor:
    """-inf where a key is behind a query, 0 elsewhere: of so many queries, for their own keys and `LONGEST` in front of them."""
    return torch.full((rows, LONGEST + rows), -torch.inf, dtype=dtype).triu_(LONGEST + 1)
