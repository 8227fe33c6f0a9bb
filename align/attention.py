"""Attention over a forest: a branch sees its prompt and itself, never a sibling or another tree.

Transformers lets us register an attention function by name and hands it the extra keyword arguments of the model call, so no model
is forked: ``model(input_ids, position_ids=…, forest=plan)``. What computes it is chosen by device and type:

- 16-bit on CUDA: one call of FlashAttention for sequences of any length (``varlen_attn``), no padding at all;
- a CPU, in fp32 or as such: each run of the forest (`Segment`) by itself in large matrix products (`align.segments`), where they
  are long enough for it;
- everything else: the runs of the forest in *buckets* of similar length, each one call of
  ``scaled_dot_product_attention``. Only attention sees the little padding inside a bucket;
- soft caps and sinks, which neither of them has: the same buckets, as a softmax between two matrix products.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from align.forest import Forest, Segment, similar
from align.ops import at_least_fp32
from align.segments import attend, pays

FOREST = "align_forest"
"""The name of the attention function in transformers' registry."""

VARLEN_TAKES = frozenset(inspect.signature(varlen_attn).parameters)
"""Torch 2.10's knows neither `scale` nor `window_size`."""

FEWER_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in VARLEN_TAKES else {}
"""That keys may have fewer heads than queries: torch 2.11's takes them without being told."""


@dataclass(frozen=True)
class Layout:
    """What a plan needs to know of a forest; a `Forest` has it."""

    segments: tuple[Segment, ...]
    position_ids: Tensor  # (tokens,)
    longest: int


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length: `count` x `queries` against `count` x `keys`; plain causal where `mask` is None."""

    count: int
    queries: int
    keys: int
    mask: Tensor | None  # (count, 1, queries, keys) bool


@dataclass(frozen=True)
class Buckets:
    """A forest's queries and keys gathered into buckets, and the way back."""

    buckets: tuple[Bucket, ...]
    query_index: Tensor  # (padded queries,)
    key_index: Tensor  # (padded keys,)
    restore: Tensor  # (tokens,) where each token's result lies among the padded queries

    @property
    def query_sizes(self) -> list[int]:
        return [bucket.count * bucket.queries for bucket in self.buckets]

    @property
    def key_sizes(self) -> list[int]:
        return [bucket.count * bucket.keys for bucket in self.buckets]


@dataclass(frozen=True)
class Runs:
    """The segments end to end, as FlashAttention takes them. Queries stay where they are, as the segments tile the row; the keys of
    a segment are its prompt's and its own: the path in order, so its last query sees its last key (lower-right causal).
    """

    key_index: Tensor  # (keys,)
    query_ends: Tensor  # (segments + 1,) int32, from 0
    key_ends: Tensor  # (segments + 1,) int32, from 0
    most_queries: int
    most_keys: int


class AttentionPlan:
    """Who sees whom in a forest. Made once a forest and used by every layer; each form is made when a layer first asks for it."""

    # Not a dataclass: FSDP copies those, with everything in them, at the door of every layer.
    def __init__(self, forest: Forest | Layout) -> None:
        self.segments = tuple(sorted(forest.segments, key=lambda s: s.start))
        self.positions = forest.position_ids
        self.longest = forest.longest
        self.flash = has_flash(self.positions.device)
        """Whether there is FlashAttention where the forest is."""
        self.learned: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None
        """Cells of the row (cells,) that hold learned keys and values instead of their tokens', and those, (1, heads, n, dim), for
        each layer; n divides the cells.
        """
        self.read: tuple[object, Tensor] | None = None
        """Who answers at some of the tokens alone, and at which (rows,); see `align.last_layer`."""
        self._windowed: dict[int, Buckets] = {}

    @cached_property
    def buckets(self) -> Buckets:
        """Segments grouped by length."""
        return _gather(self.segments, len(self.positions), self.positions.device)

    def windowed(self, window: int | None) -> Buckets:
        """`buckets` under a sliding window: a token sees the last `window` tokens of its path, itself among them."""
        if window is None:
            return self.buckets
        if window not in self._windowed:
            self._windowed[window] = _narrow(self.buckets, self.positions, window)
        return self._windowed[window]

    def behind(self, count: int) -> tuple[AttentionPlan, Tensor, Tensor]:
        """The plan of the same row with `count` cells more in front of every tree, which all of its tokens see; where those cells
        lie, (trees, count), and where the tokens of this row now lie, (tokens,).
        """
        roots = self.positions == 0  # a branch of an empty prompt is a root, too
        tokens = torch.arange(len(roots), device=roots.device)
        kept = tokens + count * roots.long().cumsum(0)
        slots = kept[roots][:, None] - count + torch.arange(count, device=roots.device)
        positions = self.positions.new_empty(len(roots) + slots.numel())
        positions[slots.flatten()] = torch.arange(count, device=roots.device).repeat(len(slots))
        positions[kept] = self.positions + count
        is_root, place = roots.tolist(), kept.tolist()
        segments = tuple(
            Segment(place[s.start] - count, s.length + count)
            if is_root[s.start]
            else Segment(place[s.start], s.length, place[s.prefix_start] - count, s.prefix_length + count)
            for s in self.segments
        )
        plan = AttentionPlan(Layout(segments, positions, self.longest + count))
        plan.read = None if self.read is None else (self.read[0], kept[self.read[1]])
        return plan, slots, kept

    @cached_property
    def runs(self) -> Runs:
        """Segments end to end."""
        ranges = [run for s in self.segments for run in ((s.prefix_start, s.prefix_length), (s.start, s.length))]
        key_index = torch.cat([torch.arange(start, start + length) for start, length in ranges])
        lengths = torch.tensor([(s.length, s.prefix_length + s.length) for s in self.segments])
        ends = torch.cat([torch.zeros(1, 2, dtype=torch.long), lengths.cumsum(0)]).to(self.positions.device, torch.int32)
        most_queries, most_keys = lengths.amax(0).tolist()
        query_ends, key_ends = ends.T.contiguous()
        return Runs(key_index.to(self.positions.device), query_ends, key_ends, most_queries, most_keys)


def _gather(segments: tuple[Segment, ...], tokens: int, device: torch.device) -> Buckets:
    buckets: list[Bucket] = []
    queries: list[Tensor] = []
    keys: list[Tensor] = []
    restore = torch.empty(tokens, dtype=torch.long)
    offset = 0
    for group in _group(segments):
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
    return Buckets(tuple(buckets), torch.cat(queries).to(device), torch.cat(keys).to(device), restore.to(device))


def _group(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Split `segments` into groups of `similar` lengths."""
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
    return similar(first.length, segment.length) and similar(first.prefix_length, segment.prefix_length)


def _narrow(plan: Buckets, positions: Tensor, window: int) -> Buckets:
    """Masks that also hide what lies `window` tokens or more behind. Positions count along the path, through the prompt."""
    queries, keys = positions[plan.query_index].split(plan.query_sizes), positions[plan.key_index].split(plan.key_sizes)
    narrowed = []
    for bucket, q, k in zip(plan.buckets, queries, keys, strict=True):
        if bucket.keys > window:  # no path in this bucket is longer than its keys
            distance = q.view(bucket.count, 1, bucket.queries, 1) - k.view(bucket.count, 1, 1, bucket.keys)
            mask = _causal(bucket.queries, bucket.keys, positions.device) if bucket.mask is None else bucket.mask
            bucket = replace(bucket, mask=mask & (distance < window))
        narrowed.append(bucket)
    return replace(plan, buckets=tuple(narrowed))


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    forest: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function in transformers' protocol: query (1, heads, tokens, head_dim) to output (1, tokens, heads, head_dim).

    Without a `forest` (generation, padded batches) it is transformers' own SDPA, which has neither soft caps nor sinks: those are
    done here.

    Args:
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        s_aux: a logit for each head (heads,) that takes its part of the softmax and gives nothing: a sink.

    Raises:
        NotImplementedError: the layer wants what this function cannot express.
    """
    if forest is None and softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("its attention adds a bias to each pair of positions")
    dropout = dropout if module.training else 0.0
    if forest is not None:
        if forest.learned is not None:
            key, value = _put(forest.learned, module.layer_idx, key, value)  # type: ignore[arg-type]
        window = kwargs.get("sliding_window")
        if window is not None and window >= forest.longest:
            window = None
        plain = softcap is None and s_aux is None
        if plain and flash_fits(forest, query, value, dropout):
            return _in_runs(query, key, value, forest.runs, window, scaling), None
        if plain and window is None and not dropout and query.is_cpu and pays(forest.segments, query.shape[1], forest.longest):
            return _in_segments(query, key, value, forest.segments, scaling), None
        each = _fused if plain else partial(_softmax, softcap=softcap, sinks=s_aux)
        return _on_forest(query, key, value, forest, window, partial(each, scaling=scaling, dropout=dropout)), None
    key, value = _for_all_heads(query, key, value)
    out = _softmax(query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux)
    return out.transpose(1, 2), None


def _put(learned: tuple[Tensor, list[tuple[Tensor, Tensor]]], layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (1, heads, tokens, dim) with the learned ones in their cells."""
    cells, of_layers = learned
    trees = len(cells) // of_layers[layer][0].shape[2]
    own_key, own_value = (x.to(key.dtype).repeat(1, 1, trees, 1) for x in of_layers[layer])
    return key.index_copy(2, cells, own_key), value.index_copy(2, cells, own_value)


# What depends on the shapes of a forest stays out of compiled graphs, which would be made anew for each.
@torch.compiler.disable
def _on_forest(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, window: int | None, attend: Callable[..., Tensor]
) -> Tensor:
    key, value = _for_all_heads(query, key, value)
    return _in_buckets(query, key, value, plan.windowed(window), attend)


def has_flash(device: torch.device) -> bool:
    """Whether ``varlen_attn`` runs there: on an Ampere GPU or later."""
    return device.type == "cuda" and "window_size" in VARLEN_TAKES and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_fits(plan: AttentionPlan, query: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether it can do it: 16-bit, heads of at most 256, no dropout."""
    return (
        plan.flash
        and _type_of(query) in (torch.bfloat16, torch.float16)
        and query.shape[3] == value.shape[3] <= 256
        and query.shape[3] % 8 == 0
        and not dropout
    )


def _type_of(x: Tensor) -> torch.dtype:
    """The type that a matrix product with `x` is taken in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _in_runs(query: Tensor, key: Tensor, value: Tensor, runs: Runs, window: int | None, scaling: float | None) -> Tensor:
    """All segments in one call of FlashAttention."""
    q, k, v = (x.squeeze(0).transpose(0, 1).to(_type_of(query)) for x in (query, key, value))
    out = varlen_attn(
        q,
        k.index_select(0, runs.key_index),
        v.index_select(0, runs.key_index),
        runs.query_ends,
        runs.key_ends,
        runs.most_queries,
        runs.most_keys,
        scale=scaling,
        # (keys to the left of a query's own, keys to the right of it); -1 is all
        window_size=(-1 if window is None else window - 1, 0),
        **FEWER_HEADS,
    )
    assert isinstance(out, Tensor)  # a pair only where asked for
    return out[None]


@torch.compiler.disable
def _in_segments(query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scaling: float | None) -> Tensor:
    """Each segment by itself. In fp32 at least, as by `_fused`."""
    key, value = _for_all_heads(query, key, value)
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.squeeze(0).to(at_least_fp32(x.dtype)) for x in (query, key, value))
        out = attend(q, k, v, segments, q.shape[2] ** -0.5 if scaling is None else scaling)
    return out.transpose(0, 1)[None].to(query.dtype)


def _in_buckets(query: Tensor, key: Tensor, value: Tensor, gathered: Buckets, attend: Callable[..., Tensor]) -> Tensor:
    """One call of `attend` a bucket; key and value have as many heads as query."""
    heads, head_dim, value_dim = query.shape[1], query.shape[3], value.shape[3]
    queries = _rows(query).index_select(0, gathered.query_index).split(gathered.query_sizes)
    keys = _rows(key).index_select(0, gathered.key_index).split(gathered.key_sizes)
    values = _rows(value).index_select(0, gathered.key_index).split(gathered.key_sizes)
    results = []
    for bucket, q, k, v in zip(gathered.buckets, queries, keys, values, strict=True):
        out = attend(
            q.view(bucket.count, bucket.queries, heads, head_dim).transpose(1, 2),
            k.view(bucket.count, bucket.keys, heads, head_dim).transpose(1, 2),
            v.view(bucket.count, bucket.keys, heads, value_dim).transpose(1, 2),
            bucket.mask,
        )
        results.append(out.transpose(1, 2).reshape(bucket.count * bucket.queries, -1))
    out = torch.cat(results) if len(results) > 1 else results[0]
    return out.index_select(0, gathered.restore).view(1, -1, heads, value_dim)


def _for_all_heads(query: Tensor, *shared: Tensor) -> list[Tensor]:
    """Repeat keys and values that several heads of `query` share."""
    return [repeat_kv(x, query.shape[1] // x.shape[1]) for x in shared]


def _rows(x: Tensor) -> Tensor:
    """(1, heads, tokens, dim) as rows of tokens (tokens, heads * dim)."""
    return x.squeeze(0).transpose(0, 1).reshape(x.shape[2], -1)


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float | None, dropout: float) -> Tensor:
    attend = partial(scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling)
    if not q.is_cpu:
        return attend(q, k, v)
    # A CPU's 16-bit kernel spends its time on short rows in rearranging them, many times what their products take.
    with torch.autocast("cpu", enabled=False):
        return attend(*(x.to(at_least_fp32(x.dtype)) for x in (q, k, v))).to(q.dtype)


def _softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention (rows, heads, queries, dim) step by step, where `mask` is true, or causal; the logits are held whole."""
    logits = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None and q.shape[2] > 1:
        mask = _causal(q.shape[2], k.shape[2], q.device)
    if mask is not None:
        # Not -inf: a row of padding sees nothing, and its softmax would be NaN.
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=3)
    weights = logits.softmax(3, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype)
    return drop(weights[..., : k.shape[2]], dropout) @ v


AttentionInterface.register(FOREST, forest_attention)
# Padded batches and generation through the same model need the ordinary mask.
AttentionMaskInterface.register(FOREST, sdpa_mask)
