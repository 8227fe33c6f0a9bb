"""Attention over a forest: a branch sees its prompt and itself, never a sibling or another tree.

Transformers lets us register an attention function by name and hands it the extra keyword arguments of the model call, so no model
is forked: ``model(input_ids, position_ids=…, forest=plan)``.

The runs of a forest (`Segment`) are grouped into *buckets* of similar length, and each bucket is one call of
``scaled_dot_product_attention``. Only attention sees the little padding inside a bucket; every matrix product of the model
runs on the forest's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.forest import Forest, Segment

FOREST = "align_forest"
"""The name of the attention function in transformers' registry."""


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length: `count` x `queries` against `count` x `keys`; plain causal where `mask` is None."""

    count: int
    queries: int
    keys: int
    mask: Tensor | None  # (count, 1, queries, keys) bool


@dataclass(frozen=True)
class AttentionPlan:
    """How to gather a forest's queries and keys into buckets and the results back. Made once a forest, used by every layer."""

    buckets: tuple[Bucket, ...]
    query_index: Tensor  # (padded queries,)
    key_index: Tensor  # (padded keys,)
    restore: Tensor  # (tokens,) where each token's result lies among the padded queries
    longest: int


def make_plan(forest: Forest) -> AttentionPlan:
    """Group the segments of `forest` into buckets."""
    device = forest.input_ids.device
    buckets: list[Bucket] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    restore = torch.empty(forest.tokens, dtype=torch.long)
    offset = 0
    for group in _group(forest.segments):
        starts = torch.tensor([s.start for s in group])
        lengths = torch.tensor([s.length for s in group])
        span = torch.arange(int(lengths.max()))
        # Padded cells repeat the segment's last token: any token would do, as nothing reads them.
        query_index = starts[:, None] + torch.minimum(span, lengths[:, None] - 1)
        real = span < lengths[:, None]
        restore[query_index[real]] = offset + real.flatten().nonzero().squeeze(1)
        offset += query_index.numel()

        key_index, mask = query_index, None
        if group[0].prefix_length:
            prefix_lengths = torch.tensor([s.prefix_length for s in group])
            prefix_starts = torch.tensor([s.prefix_start for s in group])
            prefix = torch.arange(int(prefix_lengths.max()))
            prefix_index = prefix_starts[:, None] + torch.minimum(prefix, prefix_lengths[:, None] - 1)
            key_index = torch.cat([prefix_index, query_index], dim=1)
            sees_prefix = (prefix < prefix_lengths[:, None])[:, None, :].expand(-1, len(span), -1)
            sees_itself = (span[:, None] >= span).expand(len(group), -1, -1)
            mask = torch.cat([sees_prefix, sees_itself], dim=2)[:, None].to(device)
        queries.append(query_index.flatten())
        keys.append(key_index.flatten())
        buckets.append(Bucket(len(group), query_index.shape[1], key_index.shape[1], mask))
    return AttentionPlan(
        tuple(buckets), torch.cat(queries).to(device), torch.cat(keys).to(device), restore.to(device), forest.longest
    )


def _group(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Split `segments` into groups whose lengths differ by at most a quarter (or 8 tokens, where a call costs more than
    padding).
    """
    groups: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (s.prefix_length > 0, s.length + s.prefix_length, s.length), reverse=True):
        if groups and _fits(groups[-1][0], segment):
            groups[-1].append(segment)
        else:
            groups.append([segment])
    return groups


def _fits(first: Segment, segment: Segment) -> bool:
    if bool(first.prefix_length) != bool(segment.prefix_length):
        return False
    pairs = ((first.length, segment.length), (first.prefix_length, segment.prefix_length))
    return all(abs(a - b) <= max(8, a // 4) for a, b in pairs)


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    forest: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' protocol: query (1, heads, tokens, head_dim) to output (1, tokens, heads, head_dim).

    Without a `forest` (generation, padded batches) it is transformers' own SDPA.

    Raises:
        NotImplementedError: the layer wants what this function cannot express (the check before training keeps such models away).
    """
    if forest is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    refuse_unsupported(forest.longest, kwargs)
    heads, head_dim = query.shape[1], query.shape[3]
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    q = _rows(query).index_select(0, forest.query_index)
    k = _rows(key).index_select(0, forest.key_index)
    v = _rows(value).index_select(0, forest.key_index)

    results = []
    q_at = k_at = 0
    for bucket in forest.buckets:
        q_end, k_end = q_at + bucket.count * bucket.queries, k_at + bucket.count * bucket.keys
        out = scaled_dot_product_attention(
            q[q_at:q_end].view(bucket.count, bucket.queries, heads, head_dim).transpose(1, 2),
            k[k_at:k_end].view(bucket.count, bucket.keys, heads, head_dim).transpose(1, 2),
            v[k_at:k_end].view(bucket.count, bucket.keys, heads, value.shape[3]).transpose(1, 2),
            attn_mask=bucket.mask,
            is_causal=bucket.mask is None,
            dropout_p=dropout if module.training else 0.0,
            scale=scaling,
        )
        results.append(out.transpose(1, 2).reshape(bucket.count * bucket.queries, -1))
        q_at, k_at = q_end, k_end
    out = torch.cat(results) if len(results) > 1 else results[0]
    return out.index_select(0, forest.restore).view(1, -1, heads, value.shape[3]), None


def _rows(x: Tensor) -> Tensor:
    """(1, heads, tokens, dim) as rows of tokens (tokens, heads * dim)."""
    return x.squeeze(0).transpose(0, 1).reshape(x.shape[2], -1)


def refuse_unsupported(longest: int, kwargs: dict[str, Any]) -> None:
    """Raise unless plain causal attention is what the layer asked for: silent wrongness would be unforgivable."""
    window = kwargs.get("sliding_window")
    if window is not None and longest > window:
        raise NotImplementedError(f"a tree of {longest} tokens is longer than the model's sliding window of {window}")
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"the model's attention uses {name!r}")


AttentionInterface.register(FOREST, forest_attention)
# Padded batches and generation through the same model need the ordinary mask.
AttentionMaskInterface.register(FOREST, sdpa_mask)
