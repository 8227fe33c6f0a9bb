"""The attention function against softmax(q k / sqrt(d)) v under an explicit mask of who sees whom."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_close, build, tokens
from torch.nn.functional import scaled_dot_product_attention

from align.attention import forest_attention, make_plan, refuse_unsupported
from align.engine import enable_forest
from align.forest import Tree, plant

EVAL = SimpleNamespace(training=False)


def mask_of(forest):
    """(tokens, tokens): each token sees the part of its path up to itself."""
    sees = torch.zeros(forest.tokens, forest.tokens, dtype=torch.bool)
    for start, length, branch, more in forest.paths:
        whole = [*range(start, start + length), *range(branch, branch + more)]
        for position, token in enumerate(whole):
            sees[token, whole[: position + 1]] = True
    return sees


def slowly(q, k, v, sees, scale):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(2, 3)) * scale
    return (scores.masked_fill(~sees, -torch.inf).softmax(3) @ v).transpose(1, 2)


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("kv_heads", "value_dim", "scale"), [(4, 8, None), (2, 8, 0.3), (1, 5, None)])
def test_equals_softmax_under_the_mask(seed, kv_heads, value_dim, scale):
    forest = plant(trees(seed))
    plan = make_plan(forest)
    assert len(plan.buckets) > 2
    assert {bucket.mask is None for bucket in plan.buckets} == {True, False}
    inputs = qkv(forest.tokens, kv_heads=kv_heads, value_dim=value_dim)
    ours, _ = forest_attention(EVAL, *inputs, None, scaling=scale, forest=plan)
    theirs = slowly(*inputs, mask_of(forest), scale or 8**-0.5)
    assert ours.shape == (1, forest.tokens, 4, value_dim)
    assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((theirs * weights).sum(), inputs), strict=True
    ):
        assert_close(mine, other)


def test_a_sibling_and_another_tree_are_never_seen():
    """A huge value in every token that must not be seen changes nothing, not by one bit."""
    forest = plant([Tree([5, 6], ([7, 8], [9], [10])), Tree([11, 12, 13])])
    q, k, v = (x.detach() for x in qkv(forest.tokens))
    clean, _ = forest_attention(EVAL, q, k, v, None, forest=make_plan(forest))
    others = [2, 3, 5, 6, 7, 8]  # all but the prompt at 0, 1 and the branch at 4
    v[:, :, others] = 1e30
    shouted, _ = forest_attention(EVAL, q, k, v, None, forest=make_plan(forest))
    assert torch.equal(shouted[:, [0, 1, 4]], clean[:, [0, 1, 4]])
    assert (shouted[:, others] > 1e24).all()


@pytest.mark.parametrize("seed", range(4))
def test_padding_inside_buckets_is_bounded(seed):
    """Lengths in a bucket differ by a quarter or by 8 tokens at most, and every token's result comes from a cell of its own."""
    forest = plant(trees(seed))
    plan = make_plan(forest)
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
    inputs, plan = qkv(forest.tokens), make_plan(forest)
    plain, _ = forest_attention(EVAL, *inputs, None, forest=plan)
    quiet, _ = forest_attention(EVAL, *inputs, None, dropout=0.5, forest=plan)
    noisy, _ = forest_attention(SimpleNamespace(training=True), *inputs, None, dropout=0.5, forest=plan)
    assert torch.equal(plain, quiet)
    assert not torch.allclose(plain, noisy)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"softcap": 50.0}, "'softcap'"),
        ({"s_aux": torch.zeros(4)}, "'s_aux'"),
        ({"position_bias": torch.zeros(1)}, "'position_bias'"),
        ({"sliding_window": 10}, "a tree of 11 tokens is longer than the model's sliding window of 10"),
    ],
)
def test_what_it_cannot_express_raises(wanted, message):
    forest = plant([Tree([5] * 6, ([6] * 5, [7] * 5))])
    with pytest.raises(NotImplementedError, match=message):
        forest_attention(EVAL, *qkv(forest.tokens), None, forest=make_plan(forest), **wanted)


def test_what_is_absent_or_wide_enough_does_not():
    refuse_unsupported(11, {"softcap": None, "s_aux": None, "sliding_window": 11})
    refuse_unsupported(11, {"sliding_window": None})


def test_a_tree_longer_than_the_window_raises_inside_the_model():
    """The probe is short and `longest` was not given: the layer itself is the last guard."""
    model = build(
        "mistral",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
    )
    assert enable_forest(model) is None
    model(forest=plant([Tree([5] * 10, ([6] * 6,))]))
    with pytest.raises(NotImplementedError, match="sliding window of 16"):
        model(forest=plant([Tree([5] * 10, ([6] * 7,))]))
