"""The attention function against softmax(q k / sqrt(d)) v under an explicit mask of who sees whom."""

import random
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from align import attention, segments
from align.attention import AttentionPlan, forest_attention
from align.forest import Tree, plant

EVAL = SimpleNamespace(training=False)


def mask_of(forest, window=None):
    """(tokens, tokens): each token sees the part of its path up to itself, or the last `window` tokens of that."""
    sees = torch.zeros(forest.tokens, forest.tokens, dtype=torch.bool)
    for start, length, branch, more in forest.paths:
        whole = [*range(start, start + length), *range(branch, branch + more)]
        for position, token in enumerate(whole):
            sees[token, whole[0 if window is None else max(position + 1 - window, 0) : position + 1]] = True
    return sees


def slowly(q, k, v, sees, scale, softcap=None, sinks=None):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    odds = scores.exp() * sees
    total = odds.sum(3, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
    return (odds / total @ v).transpose(1, 2)


def assert_same_as_slowly(inputs, ours, theirs):
    """Output, and the gradient of each input under random weights; the scale is that of the largest gradient, as some are 0."""
    assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    mine, others = (torch.autograd.grad((out * weights).sum(), inputs) for out in (ours, theirs))
    scale = max(gradient.abs().max() for gradient in others)
    assert all((a - b).abs().max() <= 1e-5 * scale for a, b in zip(mine, others, strict=True))


def qkv(n, heads=4, kv_heads=2, dim=8, value_dim=8):
    torch.manual_seed(0)
    return tuple(torch.randn(1, h, n, d, requires_grad=True) for h, d in ((heads, dim), (kv_heads, dim), (kv_heads, value_dim)))


def trees(seed):
    """From one token to eighty, so that there are several buckets with and without a mask."""
    draw = random.Random(seed)
    return [
        Tree(
            tokens(draw, draw.choice([1, 4, 20, 80])),
            tuple(tokens(draw, draw.choice([1, 3, 30])) for _ in range(draw.choice([0, 1, 2, 16]))),
        )
        for _ in range(10)
    ] + [Tree([], ([5, 6, 7], [8]))]


@pytest.fixture(params=["segments", "in blocks", "made again", "buckets"])
def way(request, monkeypatch):
    """Each way that attention takes on a CPU: segments whole, in blocks of few rows, weights kept or made again, and in buckets."""
    if request.param in ("in blocks", "made again"):
        monkeypatch.setattr(segments, "ROWS", 8)
        monkeypatch.setattr(segments, "KEPT", 512 if request.param == "in blocks" else 12)
    monkeypatch.setattr(segments, "WORTH", 1e9 if request.param == "buckets" else 0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kv_heads", "value_dim", "scale"), [(4, 8, None), (2, 8, 0.3), (1, 5, None)])
def test_equals_softmax_under_the_mask(way, seed, kv_heads, value_dim, scale):
    forest = plant(trees(seed))
    plan = AttentionPlan(forest)
    assert len(plan.buckets.buckets) > 2
    assert {bucket.mask is None for bucket in plan.buckets.buckets} == {True, False}
    inputs = qkv(forest.tokens, kv_heads=kv_heads, value_dim=value_dim)
    ours, _ = forest_attention(EVAL, *inputs, None, scaling=scale, forest=plan)
    assert ours.shape == (1, forest.tokens, 4, value_dim)
    assert_same_as_slowly(inputs, ours, slowly(*inputs, mask_of(forest), scale or 8**-0.5))


@pytest.fixture
def ways(monkeypatch):
    """The ways that attention has taken, by name."""
    taken = []
    for name in ("_in_segments", "_in_buckets"):
        own = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *args, name=name, own=own: taken.append(name) or own(*args))
    return taken


@pytest.mark.parametrize("length", [segments.ROWS + 1, segments.KEPT + 40, segments.LONGEST, segments.LONGEST + 1])
def test_long_rows(ways, length):
    """Blocks of all their rows, weights of many keys, and rows that are too long for this way."""
    forest = plant([Tree([3] * (length - 130), ([4] * 130, [5] * 70))])
    inputs = qkv(forest.tokens, heads=2, kv_heads=1, dim=4, value_dim=4)
    ours, _ = forest_attention(EVAL, *inputs, None, forest=AttentionPlan(forest))
    assert ways == ["_in_segments" if length <= segments.LONGEST else "_in_buckets"]
    assert_same_as_slowly(inputs, ours, slowly(*inputs, mask_of(forest), 0.5))


def test_many_short_rows_share_calls(ways):
    """What a call costs is not worth it there."""
    for rows, length in ((20, 30), (1, 130)):
        forest = plant([Tree([row + 3] * length) for row in range(rows)])
        forest_attention(EVAL, *qkv(forest.tokens), None, forest=AttentionPlan(forest))
    assert ways == ["_in_buckets", "_in_segments"]


def test_it_has_second_derivatives(monkeypatch):
    monkeypatch.setattr(segments, "ROWS", 3)
    monkeypatch.setattr(segments, "WORTH", 0)
    forest = plant([Tree([1, 2, 3, 4], ([5, 6, 7, 8, 9], [3])), Tree([4, 5])])
    plan = AttentionPlan(forest)
    inputs = [x.detach().double().requires_grad_() for x in qkv(forest.tokens, heads=2, kv_heads=1, dim=3, value_dim=2)]

    def answers(*inputs):
        return forest_attention(EVAL, *inputs, None, forest=plan)[0]

    assert torch.autograd.gradcheck(answers, inputs)
    assert torch.autograd.gradgradcheck(answers, inputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [1, 2, 7, 25, 109])
def test_a_sliding_window_counts_along_the_path(seed, window):
    """Layers of one model may differ in their windows: the plan keeps each."""
    forest = plant([*trees(seed), Tree([3] * 50, ([4] * 60, [5] * 60))])
    assert forest.longest == 110
    plan, inputs = AttentionPlan(forest), qkv(forest.tokens)
    ours, _ = forest_attention(EVAL, *inputs, None, forest=plan, sliding_window=window)
    assert_same_as_slowly(inputs, ours, slowly(*inputs, mask_of(forest, window), 8**-0.5))
    assert plan.windowed(window) is plan.windowed(window)
    for wide in (None, 110, 4096):
        whole, _ = forest_attention(EVAL, *inputs, None, forest=plan, sliding_window=wide)
        assert_close(whole, slowly(*inputs, mask_of(forest), 8**-0.5))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("softcap", "sinks"), [(2.0, False), (None, True), (2.0, True)])
def test_soft_caps_and_sinks(monkeypatch, seed, window, softcap, sinks):
    """FlashAttention has neither, whatever the type and the machine."""
    monkeypatch.setattr(attention, "flash_fits", lambda *_: True)
    forest = plant(trees(seed))
    s_aux = torch.randn(4, generator=torch.Generator().manual_seed(seed), requires_grad=True) if sinks else None
    inputs = qkv(forest.tokens)
    ours, _ = forest_attention(
        EVAL, *inputs, None, scaling=0.9, forest=AttentionPlan(forest), softcap=softcap, s_aux=s_aux, sliding_window=window
    )
    theirs = slowly(*inputs, mask_of(forest, window), 0.9, softcap, s_aux)
    assert_same_as_slowly([*inputs, s_aux] if sinks else inputs, ours, theirs)


def test_a_sibling_and_another_tree_are_never_seen(way):
    """A huge value in every token that must not be seen changes nothing, not by one bit."""
    forest = plant([Tree([5, 6], ([7, 8], [9], [10])), Tree([11, 12, 13])])
    q, k, v = (x.detach() for x in qkv(forest.tokens))
    clean, _ = forest_attention(EVAL, q, k, v, None, forest=AttentionPlan(forest))
    others = [2, 3, 5, 6, 7, 8]  # all but the prompt at 0, 1 and the branch at 4
    v[:, :, others] = 1e30
    shouted, _ = forest_attention(EVAL, q, k, v, None, forest=AttentionPlan(forest))
    assert torch.equal(shouted[:, [0, 1, 4]], clean[:, [0, 1, 4]])
    assert (shouted[:, others] > 1e24).all()


@pytest.mark.parametrize("seed", range(4))
def test_padding_inside_buckets_is_bounded(seed):
    """Lengths in a bucket differ by a quarter or by 8 tokens at most, and every token's result comes from a cell of its own."""
    forest = plant(trees(seed))
    plan = AttentionPlan(forest).buckets
    assert len(set(plan.restore.tolist())) == forest.tokens
    assert plan.query_index[plan.restore].tolist() == list(range(forest.tokens))
    assert sum(bucket.count for bucket in plan.buckets) == len(forest.segments)
    assert plan.query_index.numel() == sum(bucket.count * bucket.queries for bucket in plan.buckets)
    assert plan.key_index.numel() == sum(bucket.count * bucket.keys for bucket in plan.buckets)
    at = 0
    for bucket in plan.buckets:
        rows = plan.query_index[at : at + bucket.count * bucket.queries].view(bucket.count, bucket.queries)
        lengths = [len(set(row.tolist())) for row in rows]
        assert max(lengths) == bucket.queries
        assert max(lengths) - min(lengths) <= max(8, max(lengths) // 3)
        at += rows.numel()


def test_without_a_forest_it_is_transformers_own():
    q, k, v = qkv(6)
    ours, _ = forest_attention(SimpleNamespace(training=False, is_causal=True, num_key_value_groups=2), q, k, v, None, scaling=0.3)
    theirs = scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_close(ours, theirs.transpose(1, 2))


def test_dropout_is_for_training_only():
    forest = plant([Tree([5] * 6, ([6] * 5, [7] * 5))])
    inputs, plan = qkv(forest.tokens), AttentionPlan(forest)
    plain, _ = forest_attention(EVAL, *inputs, None, forest=plan)
    quiet, _ = forest_attention(EVAL, *inputs, None, dropout=0.5, forest=plan)
    noisy, _ = forest_attention(SimpleNamespace(training=True), *inputs, None, dropout=0.5, forest=plan)
    assert torch.equal(plain, quiet)
    assert not torch.allclose(plain, noisy)


@pytest.mark.parametrize("mask", [None, torch.ones(5, 5, dtype=torch.bool).tril()])
def test_without_a_forest_soft_caps_and_sinks_are_kept(mask):
    """Where transformers' SDPA would refuse the one and forget the other. One new token against a cache sees all of it."""
    q, k, v = qkv(5)
    sinks = torch.tensor([1.0, -1.0, 0.0, 2.0])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    ours, _ = forest_attention(EVAL, q, k, v, mask, softcap=3.0, s_aux=sinks)
    assert_close(ours, slowly(q, k, v, causal, 8**-0.5, 3.0, sinks))
    last, _ = forest_attention(EVAL, q[:, :, -1:], k, v, None, softcap=3.0, s_aux=sinks)
    assert_close(last, ours[:, -1:])


def test_a_bias_on_positions_raises():
    forest = plant([Tree([5] * 6, ([6] * 5, [7] * 5))])
    with pytest.raises(NotImplementedError, match="adds a bias"):
        forest_attention(EVAL, *qkv(forest.tokens), None, forest=AttentionPlan(forest), position_bias=torch.zeros(1))


# -- FlashAttention ----------------------------------------------------------------------------------------------------------


def plain_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=True):
    """What ``varlen_attn`` documents, one sequence at a time: (-1, 0) is causal and (w, 0) sees w keys to the left, both aligned so
    that the last query sees the last key.
    """
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa
    assert window_size[1] == 0
    results = []
    for (q_from, q_to), (k_from, k_to) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist()), strict=True):
        queries, keys = q_to - q_from, k_to - k_from
        assert queries <= max_q
        assert keys <= max_k
        ahead = torch.arange(keys) - (torch.arange(queries)[:, None] + keys - queries)
        sees = (ahead <= 0) & ((ahead >= -window_size[0]) if window_size[0] >= 0 else torch.tensor(True))
        sequence = [x[a:b].transpose(0, 1)[None] for x, a, b in ((q, q_from, q_to), (k, k_from, k_to), (v, k_from, k_to))]
        results.append(slowly(*sequence, sees, scale or q.shape[2] ** -0.5)[0])
    assert [q_to, k_to] == [len(q), len(k)]
    return torch.cat(results)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("window", "kv_heads", "scale"), [(None, 4, None), (None, 2, 0.3), (5, 1, None), (1, 2, None), (500, 2, None)]
)
def test_segments_end_to_end_equal_the_buckets(monkeypatch, seed, window, kv_heads, scale):
    """The call of FlashAttention, with a plain function in its place: which keys each segment gets, where it begins and ends."""
    forest = plant(trees(seed))
    inputs = qkv(forest.tokens, kv_heads=kv_heads)
    wanted, _ = forest_attention(EVAL, *inputs, None, scaling=scale, forest=AttentionPlan(forest), sliding_window=window)
    monkeypatch.setattr(attention, "flash_fits", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen_attn)
    monkeypatch.delattr(attention, "_on_forest")  # nothing else answers
    ours, _ = forest_attention(EVAL, *inputs, None, scaling=scale, forest=AttentionPlan(forest), sliding_window=window)
    assert_same_as_slowly(inputs, ours, wanted)


def test_the_call_of_flash_attention_is_one_that_torch_takes():
    """Its arguments bind to the operator of this torch, forward and backward, as far as shapes and types go."""
    assert "window_size" in attention.VARLEN_TAKES
    forest = plant(trees(0))
    runs = AttentionPlan(forest).runs
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(1, n, forest.tokens, 16, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
        out = attention._in_runs(q, k, v, runs, 7, 0.5)
        assert out.shape == (1, forest.tokens, 4, 16)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]


def test_flash_attention_is_for_16_bits_on_cuda():
    plan = AttentionPlan(plant(trees(0)))
    query, value = torch.empty(2, 1, 4, 5, 16, dtype=torch.bfloat16)
    assert not attention.flash_fits(plan, query, value, 0.0)
    plan.flash = True
    assert attention.flash_fits(plan, query, value, 0.0)
    assert not attention.flash_fits(plan, query, value, 0.1)
    assert not attention.flash_fits(plan, query.float(), value.float(), 0.0)
    assert not attention.flash_fits(plan, query[..., :12], value[..., :12], 0.0)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0), reason="needs an Ampere GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_flash_attention_on_cuda(dtype, window):
    """Output and gradients as close to the fp32 buckets as the buckets of the same type are."""
    forest = plant(trees(0)).to("cuda")
    inputs = [x.detach().to("cuda").requires_grad_() for x in qkv(forest.tokens, dim=16, value_dim=16)]
    weights = torch.randn(1, forest.tokens, 4, 16, device="cuda")

    def answers(kind, flash):
        typed = [x.detach().to(kind).requires_grad_() for x in inputs]
        plan = AttentionPlan(forest)
        assert not flash or attention.flash_fits(plan, typed[0], typed[2], 0.0)
        if flash:
            out, _ = forest_attention(EVAL, *typed, None, forest=plan, sliding_window=window)
        else:
            heads = attention._for_all_heads(typed[0], *typed[1:])
            fused = partial(attention._fused, scaling=None, dropout=0.0)
            out = attention._in_buckets(typed[0], *heads, plan.windowed(window), fused)
        return [x.float() for x in (out, *torch.autograd.grad((out.float() * weights).sum(), typed))]

    for ours, same_type, exact in zip(answers(dtype, True), answers(dtype, False), answers(torch.float32, False), strict=True):
        assert (ours - exact).norm() <= 2 * (same_type - exact).norm() + 1e-3 * exact.norm()
