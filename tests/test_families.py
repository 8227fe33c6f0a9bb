"""Every family of decoders trains exactly: on the forest where that can express its attention, on padded rows where it cannot."""

import random

import pytest
import torch
from helpers import assert_close, build, run, run_alone, tokens
from transformers import AutoConfig, BartForConditionalGeneration

from align import attention
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.trainers.objectives import LanguageModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = {**SIZES, "head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GEMMA = {**HEADS, "query_pre_attn_scalar": 8}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {**SIZES, "num_local_experts": 4}

FOREST = {
    "llama": ("llama", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen2, window": ("qwen2", {**SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", HEADS),
    "mistral": ("mistral", SIZES),
    "mistral, window": ("mistral", {**SIZES, "sliding_window": 5}),
    "gemma": ("gemma", HEADS),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    "gemma2, window": ("gemma2", {**GEMMA, **ALTERNATING, "attn_logit_softcapping": 2.0, "sliding_window": 5}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma3, window": ("gemma3_text", {**GEMMA, **ALTERNATING, "sliding_window": 5}),
    "phi3": ("phi3", SIZES),
    "phi3, window": ("phi3", {**SIZES, "sliding_window": 5}),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", {**SIZES, "num_key_value_heads": None}),
    "opt": ("opt", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "olmo2": ("olmo2", SIZES),
    "mixtral": ("mixtral", EXPERTS),
    "gpt_oss": ("gpt_oss", {**EXPERTS, **ALTERNATING, "head_dim": 8, "sliding_window": 5}),
}
"""Families that train on the forest; the rows below have up to 26 tokens, so that a window of 5 is shorter."""

PADDED = {
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "does not use transformers' attention interface"),
    "falcon": (
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "does not use transformers' attention interface",
    ),
    "falcon, alibi": (
        "falcon",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        "does not use transformers' attention interface",
    ),
    "gptj": ("gptj", {**GPT2, "rotary_dim": 4}, "does not use transformers' attention interface"),
    "phimoe, window": ("phimoe", {**EXPERTS, "sliding_window": 5}, "its log-probs on the probe differ by"),
    "llama4": ("llama4_text", {**HEADS, "intermediate_size_mlp": 64}, "by their place in the row"),
    "deepseek_v4": (
        "deepseek_v4",
        {**EXPERTS, "head_dim": 16, "moe_intermediate_size": 16, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2},
        "stretches of a row as one key",
    ),
}
"""Families that do not, and what is said of them. PhiMoE does not tell its attention function of its window."""


def random_trees(seed, trees=4):
    """Empty and long prompts, prompts with a loss, no branch and up to sixteen of one token or more."""
    draw = random.Random(seed)
    forest = []
    for _ in range(trees):
        prompt = tokens(draw, draw.choice([0, 1, 5, 17]))
        count = draw.choice([0, 1, 2, 16]) if len(prompt) > 1 else 2
        branches = tuple(tokens(draw, draw.choice([1, 2, 9]) + (not prompt)) for _ in range(count))
        mask = [draw.random() < 0.5 for _ in prompt] if prompt and (not branches or draw.random() < 0.3) else None
        forest.append(Tree(prompt, branches, prompt_mask=mask))
    return [*forest, Tree(tokens(draw, 17), (tokens(draw, 9), tokens(draw, 1)))]


def family(kind, fields, seed=0):
    """A random model whose dropout, if it has any, is off (`helpers.build` leaves it in evaluation mode)."""
    return build(kind, seed=seed, **fields)


def assert_equal_to_rounding(ours, theirs):
    """Losses, and each parameter's gradient on its own scale. Some are 0 but for rounding: a bias on all keys changes nothing."""
    assert_close(ours[0], theirs[0], what="loss")
    assert ours[1].keys() == theirs[1].keys()
    nothing = 1e-6 * max(gradient.abs().max() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        if max(gradient.abs().max(), ours[1][name].abs().max()) > nothing:
            assert_close(ours[1][name], gradient, what=name)


@pytest.mark.parametrize("name", FOREST)
def test_on_the_forest(name):
    model = family(*FOREST[name])
    trees, before = random_trees(0), model.config._attn_implementation
    alone = run_alone(LanguageModel(), model, trees)
    assert enable_forest(model, longest=26) is None
    assert_equal_to_rounding(run(LanguageModel(), model, trees), alone)
    model.set_attn_implementation(before)
    model.forest_padded = True
    assert_equal_to_rounding(run(LanguageModel(), model, trees), alone)


@pytest.mark.parametrize("name", PADDED)
def test_on_padded_rows(name):
    kind, fields, reason = PADDED[name]
    model, trees = family(kind, fields), random_trees(0)
    alone = run_alone(LanguageModel(), model, trees)
    said = enable_forest(model, longest=26)
    assert reason in said
    assert "\n" not in said
    assert_equal_to_rounding(run(LanguageModel(), model, trees), alone)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, window", "gemma2, window", "gemma3, window", "gpt_oss"])
def test_random_shapes(name, seed):
    """Against padded rows, at a random budget."""
    model, trees = family(*FOREST[name], seed=seed), random_trees(seed, trees=6)
    before = model.config._attn_implementation
    assert enable_forest(model) is None
    ours = run(LanguageModel(), model, trees, random.Random(seed).choice([40, 100, None]))
    model.set_attn_implementation(before)
    model.forest_padded = True
    assert_equal_to_rounding(ours, run(LanguageModel(), model, trees))


@pytest.mark.parametrize("name", ["gemma2, window", "gpt_oss"])
def test_what_sdpa_lacks_is_there_outside_of_the_forest_too(name):
    """Padded batches and generation through an enabled model; a padded row's empty cells are compared in neither."""
    model = family(*FOREST[name])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 9, 10, 4, 5, 6]])
    mask = (ids > 0).long()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        said = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert enable_forest(model) is None
        assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
        assert model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist() == said.tolist()


def test_an_encoder_is_refused():
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(AlignError, match=r"BertLMHeadModel is not causal: .*Take a decoder, as Llama"):
        enable_forest(build("bert", **fields))


def test_an_encoder_with_a_decoder_is_refused():
    config = AutoConfig.for_model("bart", vocab_size=99, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    with pytest.raises(AlignError, match="an encoder and a decoder"):
        enable_forest(BartForConditionalGeneration(config))


def test_a_window_longer_than_the_rows_is_not_probed():
    """PhiMoE's window is unknown to its attention function: that matters only to rows that are longer."""
    model = family("phimoe", {**EXPERTS, "sliding_window": 20})
    assert enable_forest(model, longest=20) is None
    assert "differ by" in enable_forest(model, longest=21)
    assert "differ by" in enable_forest(model)


def test_a_window_that_is_off_by_one_is_seen(monkeypatch):
    """At the window's real size of 4096 tokens no probe would see it: it is shrunk for the while."""
    model = family("mistral", {**SIZES, "sliding_window": 4096})
    windowed = attention.AttentionPlan.windowed
    monkeypatch.setattr(attention.AttentionPlan, "windowed", lambda plan, window: windowed(plan, window and window + 1))
    assert enable_forest(model, longest=4096) is None
    assert "differ by" in enable_forest(model, longest=4097)


def test_the_probe_leaves_the_windows_as_they_were():
    model = family(*FOREST["gemma3, window"])
    assert enable_forest(model) is None
    assert model.config.sliding_window == 5
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [5, None]


def test_attention_in_chunks():
    fields = {**HEADS, "intermediate_size_mlp": 64, "attn_temperature_tuning": False, "attention_chunk_size": 16}
    for longest, reason in (
        (16, None),
        (17, "chunks of 16 tokens, shorter than the longest row (17"),
        (None, "than rows of any length"),
    ):
        said = enable_forest(family("llama4_text", fields), longest)
        assert said is None if reason is None else reason in said


# -- 16-bit models -----------------------------------------------------------------------------------------------------------

DEEP = {**SIZES, "num_hidden_layers": 32, "hidden_size": 64}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spread", [0.02, 0.15, 0.4])
def test_deep_16_bit_models_take_the_forest_and_mistakes_are_still_seen(monkeypatch, dtype, spread):
    """32 layers, with weights from small to so large that in bf16 rounding moves a log-prob by up to 0.7 nats.

    The forest's attention rounds elsewhere than the model's own, as another kernel would; then branches see the ones before them.
    """
    model = build("llama", **{**DEEP, "initializer_range": spread}).to(dtype)
    exact = attention._fused

    def rounded(q, k, v, mask, **settings):
        return exact(q.float(), k.float(), v.float(), mask, **settings).to(q.dtype)

    monkeypatch.setattr(attention, "_fused", rounded)
    assert enable_forest(model) is None

    class Leaking(attention.AttentionPlan):
        def __init__(self, forest):
            super().__init__(forest)
            self.segments = tuple(
                attention.Segment(s.start, s.length, s.prefix_start, s.start - s.prefix_start) if s.prefix_length else s
                for s in self.segments
            )

    monkeypatch.setattr("align.engine.AttentionPlan", Leaking)
    assert "differ by" in enable_forest(model)
