"""Sampling: greedy as transformers' `generate`, frequencies as the softmax says, whatever the batch."""

import math
import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import VOCABULARY, assert_close, build, llama, tokens
from test_families import FOREST, PADDED
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from align import onednn
from align.engine import base_model, enable_forest
from align.errors import AlignError
from align.models import load_causal_lm, load_tokenizer
from align.rollout import CacheEngine, Completion, GenerateEngine, Sampling, complete, engine, engine_for, graphs
from align.rollout.engine import Batch, closed_up, serving, spans_of
from align.rollout.graphs import Graphs, sizes
from align.rollout.packed import WORTH_PASSES, Packed, packed_linears
from align.rollout.sampling import StopTable, chances, draw
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

NAMED = ["llama", "qwen2", "gpt2", "gemma"]
GREEDY = Sampling(24, temperature=0)
MAMBA = ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4})


def prompts_of(seed=0):
    rng = random.Random(seed)
    return [tokens(rng, n) for n in (3, 11, 1, 7, 7, 2, 16, 5)]


def by_generate(model, prompt, stop, **config):
    """transformers' own greedy continuation of one prompt, alone."""
    ids = torch.tensor([prompt])
    config = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0, **config}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **config)[0, len(prompt) :].tolist()


def frequent(said):
    """The 4 tokens that come up most, so that some rows end early and some never."""
    said = [token for one in said for token in set(one[3:])]
    return sorted(set(said), key=said.count)[-4:]


# -- greedy --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FOREST, "bloom", "falcon, alibi", "gptj"])
def test_greedy_equals_generate(family):
    """Prompts of 1 to 16 tokens in a batch of three, so that rows end at different times and others take their place."""
    kind, fields = (FOREST | PADDED)[family][:2]
    model, prompts = build(kind, **fields), prompts_of()
    stop = frequent([by_generate(model, prompt, None) for prompt in prompts])
    wanted = [by_generate(model, prompt, stop) for prompt in prompts]
    assert len({len(one) for one in wanted}) > 1
    assert isinstance(engine_for(model, 64), CacheEngine if family in FOREST else GenerateEngine)
    found = complete(model, prompts, replace(GREEDY, batch_size=3), stop)
    assert [completion.tokens for completion in found] == wanted
    assert [completion.finished for completion in found] == [one[-1] in stop for one in wanted]
    assert model.config._attn_implementation != "align_rollout"


@pytest.mark.parametrize("family", NAMED)
def test_models_in_16_bits_are_served(family):
    """The probe allows for their rounding; log-probs are those of a forward pass up to it."""
    model, prompts = build(FOREST[family][0], **FOREST[family][1]).to(torch.bfloat16), prompts_of()
    assert isinstance(engine_for(model, 64), CacheEngine)
    for prompt, found in zip(prompts, complete(model, prompts, GREEDY, [2]), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found.tokens])).logits[0, len(prompt) - 1 : -1].float()
        logps = logits.log_softmax(1).gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
        assert found.logps == pytest.approx(logps.tolist(), abs=0.3)


@pytest.mark.parametrize("family", NAMED)
def test_greedy_equals_generate_with_the_forest_attention_in_place(family):
    model, prompts = build(FOREST[family][0], **FOREST[family][1]), prompts_of()
    wanted = [by_generate(model, prompt, [2]) for prompt in prompts]
    assert enable_forest(model) is None
    assert [completion.tokens for completion in complete(model, prompts, GREEDY, [2])] == wanted
    assert model.config._attn_implementation == "align_forest"


@pytest.mark.parametrize("batch_size", [1, 3, 5])
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_batch_changes_nothing(batch_size, temperature):
    """Neither what is said, nor what is drawn: chance belongs to the prompt, not to the batch."""
    model, prompts = llama(initializer_range=0.05), prompts_of(1)
    ended = []

    def sample(size, **more):
        generator = torch.Generator().manual_seed(0)
        return complete(model, prompts, replace(GREEDY, batch_size=size, temperature=temperature), [2, 3, 4], generator, **more)

    found = sample(batch_size, progress=ended.append)
    assert found == sample(128)
    assert sum(ended) == 8


@pytest.mark.parametrize("temperature", [0, 1])
def test_prompts_that_repeat_are_filled_once(temperature, monkeypatch):
    """Three completions of each prompt in a batch of four: as from a batch that holds them all, and from `generate`'s cache."""
    model, prompts = llama(initializer_range=0.05), [prompt for prompt in prompts_of(3) for _ in range(3)]
    sampling, filled = replace(GREEDY, temperature=temperature, batch_size=4), []
    enter = Batch._prompts
    monkeypatch.setattr(Batch, "_prompts", lambda self, rows_of: (filled.extend(rows_of), enter(self, rows_of))[1])

    def sample(engine):
        return engine.complete(prompts, sampling, [2, 3, 4], torch.Generator().manual_seed(0))

    with torch.no_grad():
        found = sample(CacheEngine(model))
        assert found == sample(GenerateEngine(model))
    assert len(filled) < 18  # of 24, of which 3 have a single token, which needs no filling
    if temperature:
        assert found[0] != found[1]


def test_a_long_completion_outgrows_the_first_buffer():
    model, prompt = llama(), [5, 6, 7]
    (found,) = complete(model, [prompt], Sampling(150, temperature=0), [])
    assert found.tokens == by_generate(model, prompt, None, max_new_tokens=150)


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}, "max_position_embeddings": 16}


@pytest.mark.parametrize("family", [*FOREST, "llama, dynamic rotation"])
def test_a_model_that_has_sampled_trains_on(family):
    """What sampling leaves in the model, such as the frequencies of a rotation that has grown with the row, is what `generate`
    leaves, and hinders no gradient.
    """
    (prompt,) = [prompt for prompt in prompts_of() if len(prompt) == 16]

    def gradients(model):
        ids = torch.tensor([tokens(random.Random(5), 30)])
        model(ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    def made():
        return build(FOREST[family][0], **FOREST[family][1]) if family in FOREST else llama(**DYNAMIC)

    ours, theirs = made(), made()
    (found,) = complete(ours, [prompt], GREEDY, [])
    assert found.tokens == by_generate(theirs, prompt, None)
    assert all(torch.equal(a, b) for a, b in zip(gradients(ours), gradients(theirs), strict=True))


def test_adapters_are_sampled_with_the_adapter_on():
    model, prompts = tune(llama(), Tuning("lora", {"r": 4, "alpha": 16})), prompts_of(2)
    plain = complete(model, prompts, GREEDY, [2])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    with_adapter = complete(model, prompts, GREEDY, [2])
    assert with_adapter != plain
    with model.disable_adapter():
        assert complete(model, prompts, GREEDY, [2]) == plain
    model.merge_adapter()
    assert complete(model, prompts, GREEDY, [2]) == with_adapter
    with model.disable_adapter():  # its weights change in the first pass, unless they have before
        assert complete(model, prompts, GREEDY, [2]) == plain
    assert complete(model.merge_and_unload(), prompts, GREEDY, [2]) == with_adapter


# -- models that our cache cannot serve ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        (*PADDED["bloom"][:2], "BloomForCausalLM does not use transformers' attention interface"),
        (*MAMBA, "it keeps a state instead of keys and values"),
        (*PADDED["phimoe, window"][:2], "its log-probs on the probe differ by"),
        (*PADDED["llama4"][:2], "its attention scales queries by their place in the row"),
    ],
)
def test_the_others_are_served_by_generate_and_it_says_why(kind, fields, reason, capsys):
    model, prompts = build(kind, **fields), prompts_of()
    wanted = [by_generate(model, prompt, [2]) for prompt in prompts[:2]]
    capsys.readouterr()
    found = complete(model, prompts[:2], replace(GREEDY, batch_size=1), [2])
    assert [completion.tokens for completion in found] == wanted
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("answers of")]
    assert f"are sampled by transformers' generate, as {reason}" in line
    complete(model, prompts[:1], GREEDY, [2])
    assert capsys.readouterr().err == ""  # said once: PPO samples hundreds of times


def test_what_is_no_token_ends_nothing():
    """-1 was taken for the last token of the vocabulary."""
    stops = StopTable([-1, 2, 99], torch.device("cpu")).of(torch.tensor([0, 2, 4]), vocabulary=5)
    assert stops.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
        ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64, "init_std": 0.3}),
    ],
)
def test_an_encoder_and_decoder_answers_from_its_start_token(kind, fields):
    """Prompts of two lengths in one batch: padding moves no position of the encoder's."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, forced_eos_token_id=None, **fields)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    model.generation_config.forced_eos_token_id = None
    prompts = [[5, 6, 7, 8], [9, 10]]
    wanted = [
        model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)[0, 1:].tolist() for ids in prompts
    ]
    assert [found.tokens for found in complete(model, prompts, Sampling(6, temperature=0), [])] == wanted


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("rwkv", {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}),
        ("bart", {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "init_std": 0.3}),
    ],
)
def test_rows_that_padding_would_change_are_answered_one_at_a_time(kind, fields, capsys):
    """RWKV reads the padding as tokens, and BART's decoder counts it as places."""
    model = build(kind, **fields)
    draw = random.Random(0)
    prompts = [tokens(draw, n) for n in (1, 9, 4, 15)]
    sampling = Sampling(6, temperature=0.7, batch_size=4)
    found = complete(model, prompts, sampling, [], torch.Generator().manual_seed(0))
    assert "one at a time" in capsys.readouterr().err
    with torch.no_grad():
        for prompt, completion in zip(prompts, found, strict=True):
            logits = model(input_ids=torch.tensor([prompt + completion.tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps = (logits / 0.7).log_softmax(1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert_close(torch.tensor(completion.logps), logps)


def test_a_row_that_turns_the_rows_beside_it_otherwise_is_answered_alone(capsys):
    """What is said to a short prompt does not depend on a long one: frequencies change past 16 tokens."""
    short, longer = prompts_of()[1][:4], tokens(random.Random(0), 20)
    (alone,) = complete(llama(**DYNAMIC), [short], Sampling(8, temperature=0), [])
    assert "generate" not in capsys.readouterr().err
    found = complete(llama(**DYNAMIC), [short, longer], Sampling(8, temperature=0), [])
    assert "more than 16 tokens changes the rotary frequencies" in capsys.readouterr().err
    assert found[0] == alone
    assert_close(torch.tensor(found[0].logps), torch.tensor(alone.logps))


def test_generate_draws_as_our_engine_does_and_from_a_plain_config():
    """The same chances, the same log-probs, and no repetition penalty out of the model's own generation config."""
    model, prompts = llama(initializer_range=0.05), prompts_of()
    model.generation_config.repetition_penalty = 5.0
    sampling = Sampling(12, temperature=0.7, top_k=50, top_p=0.9)

    def sample(engine):
        with torch.no_grad():
            return engine.complete(prompts, sampling, [2, 3, 4, 5], torch.Generator().manual_seed(0))

    ours, theirs = sample(CacheEngine(model)), sample(GenerateEngine(model))
    assert ours == theirs
    for one, other in zip(ours, theirs, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-5)
    assert model.generation_config.repetition_penalty == 5.0


class Server:
    """A serving engine: anything with this one method."""

    def complete(self, prompts, sampling, stop_ids, generator=None, progress=None):
        return [Completion([len(prompt)], True, [0.0]) for prompt in prompts]


def test_a_serving_engine_stands_in_for_the_model():
    assert [found.tokens for found in complete(Server(), prompts_of(), GREEDY, [2])] == [[len(prompt)] for prompt in prompts_of()]


# -- sampling ------------------------------------------------------------------------------------------------------------------


def one_step(logits):
    """A Llama of one layer that forgets what was said: attention and MLP give nothing, every embedding is the same, and the first
    column of the head holds `logits`.
    """
    sizes_ = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=len(logits), bos_token_id=None, eos_token_id=None, rms_norm_eps=0.0, **sizes_)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[:, 0] = logits
    return model


LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5])
DRAWS = 20_000


def frequencies(sampling, seed=0):
    sampling = replace(sampling, batch_size=DRAWS)
    found = complete(one_step(LOGITS), [[1]] * DRAWS, sampling, [], torch.Generator().manual_seed(seed))
    return torch.bincount(torch.tensor([completion.tokens[0] for completion in found]), minlength=6)


def chi_square(counts, probabilities):
    """Pearson's statistic over the tokens that can come up; 20.5 is its 99.9 % quantile for 5 degrees of freedom, the most here."""
    assert (counts[probabilities == 0] == 0).all()
    kept = probabilities > 0
    expected = DRAWS * probabilities[kept]
    return ((counts[kept] - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5]),
        ({"temperature": 3.0}, [0, 1, 2, 3, 4, 5]),
        ({"top_k": 3}, [1, 2, 5]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.6}, [2, 5]),
        ({"top_p": 0.01}, [2]),
        ({"top_k": 4, "top_p": 0.6, "temperature": 0.5}, [2]),
    ],
)
def test_frequencies_are_those_of_the_softmax(sampling, allowed):
    """exp of (0, 1, 2, -1, .5, 1.5) is 1, 2.72, 7.39, .37, 1.65, 4.48, in all 17.6: the probabilities are .057, .154, .420, .021,
    .094 and .255. top_p .6 keeps tokens with less than .6 before them in order of likelihood: 2 (nothing before) and 5 (.420), not
    1 (.674). At temperature .5 the top four are 54.6, 20.1, 7.4 and 2.7 of 84.8: token 2 alone has .644.
    """
    sampling = Sampling(1, **sampling)
    probabilities = (LOGITS / sampling.temperature).softmax(0)
    probabilities = torch.where(torch.isin(torch.arange(6), torch.tensor(allowed)), probabilities, torch.zeros(()))
    assert chi_square(frequencies(sampling), probabilities / probabilities.sum()) < 20.5


def test_the_chi_square_test_can_fail():
    """Draws at another temperature are told apart by it."""
    assert chi_square(frequencies(Sampling(1, temperature=1.1)), LOGITS.softmax(0)) > 20.5


def test_two_tokens_are_drawn_from_the_joint_distribution():
    """Pearson's statistic over all 36 pairs of tokens, of a model whose second token depends on its first, at temperature 1.3 and
    in a batch that is refilled; 66.6 is its 99.9 % quantile for 35 degrees of freedom.
    """
    torch.manual_seed(0)
    sizes_ = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=6, bos_token_id=None, eos_token_id=None, initializer_range=0.6, **sizes_)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        first = (model(torch.tensor([[1, 3]])).logits[0, -1] / 1.3).softmax(0)
        second = torch.stack([(model(torch.tensor([[1, 3, t]])).logits[0, -1] / 1.3).softmax(0) for t in range(6)])
    assert (second[0] - second[1]).abs().max() > 0.02
    sampling = Sampling(2, temperature=1.3, batch_size=4000)
    found = complete(model, [[1, 3]] * 10_000, sampling, [], torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.tensor([6 * a + b for a, b in (one.tokens for one in found)]), minlength=36)
    expected = 10_000 * (first[:, None] * second).flatten()
    assert ((counts - expected) ** 2 / expected).sum() < 66.6


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.5, 40, 1.0), (0, 0, 1.0)])
def test_log_probs_are_those_of_the_sampled_tokens(temperature, top_k, top_p):
    """By a forward pass over prompt and completion: at the sampling temperature, over the whole vocabulary."""
    model, prompts = llama(initializer_range=0.05), prompts_of()
    sampling = Sampling(12, temperature, top_p, top_k, batch_size=3)
    for prompt, found in zip(prompts, complete(model, prompts, sampling, [2, 3], torch.Generator().manual_seed(0)), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + found.tokens])).logits[0, len(prompt) - 1 : -1]
        logps = (logits / (temperature or 1)).log_softmax(1).gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
        assert found.logps == pytest.approx(logps.tolist(), abs=1e-5)


def test_impossible_tokens_never_come_up():
    """Half of a vocabulary of 50,000 has probability 0, the first and the last token included."""
    logits = torch.randn(400, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf
    logits[:, -1] = -torch.inf
    drawn, logps = draw(logits, Sampling(1), torch.rand(400, generator=torch.Generator().manual_seed(1)))
    assert (drawn % 2 == 1).all()
    assert (drawn < 49_999).all()
    assert len(set(drawn.tolist())) > 300
    assert torch.allclose(logps, logits.log_softmax(1).gather(1, drawn[:, None])[:, 0], atol=1e-5)


@pytest.mark.parametrize(("chance", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_chance_are_possible_tokens(chance, token):
    """The least and the largest number that `torch.rand` can give: the first and the last token with a probability."""
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, 0.7, -torch.inf]])
    assert draw(logits, Sampling(1), torch.tensor([chance]))[0].item() == token


def test_top_p_keeps_the_likeliest_token_always():
    for chance in (0.0, 1 - 2**-24):
        assert draw(LOGITS[None], Sampling(1, top_p=1e-9), torch.tensor([chance]))[0].item() == 2


@pytest.mark.parametrize("spread", [0.01, 5.0])
def test_top_p_of_a_large_vocabulary(spread):
    """Flat logits, whose nucleus is most of the vocabulary, and peaked ones, whose nucleus is a few tokens; the set is the same as
    by sorting everything.
    """
    logits = spread * torch.randn(1, 2000, generator=torch.Generator().manual_seed(0))
    ordered, ids = logits.softmax(1).sort(descending=True)
    nucleus = set(ids[0, (ordered.cumsum(1) - ordered)[0] < 0.9].tolist())
    chance = torch.linspace(0, 1 - 1e-6, 4000)
    found = set(draw(logits.expand(4000, -1), Sampling(1, top_p=0.9), chance)[0].tolist())
    assert found <= nucleus
    assert len(found) > 0.95 * len(nucleus)


def test_a_seed_gives_the_same_tokens_again():
    model, prompts = llama(initializer_range=0.02), prompts_of()

    def sample(seed):
        return complete(model, prompts, Sampling(12), [2], torch.Generator().manual_seed(seed))

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert all(0 <= token < VOCABULARY for completion in sample(0) for token in completion.tokens)


# -- ends ----------------------------------------------------------------------------------------------------------------------


def test_two_halves_of_chance_are_the_whole():
    """So that several processes, each of which passes over the others' numbers, draw as one does."""
    whole, halves = (torch.Generator().manual_seed(0) for _ in range(2))
    sampling = Sampling(7)
    parts = [chances(count, sampling, halves) for count in (3, 5)]
    assert torch.equal(torch.cat(parts), chances(8, sampling, whole))
    assert torch.equal(whole.get_state(), halves.get_state())


def test_stop_tokens_are_included_and_the_limit_holds():
    """Token 2 always comes first: one token and finished. Without it as a stop: five tokens and not finished."""
    model = one_step(torch.tensor([0.0, 0.0, 9.0]))
    assert complete(model, [[1], [1, 1]], Sampling(5, temperature=0), [0, 2]) == [Completion([2], True)] * 2
    assert complete(model, [[1]], Sampling(5, temperature=0), [0]) == [Completion([2] * 5, False)]
    assert complete(model, [[1]], Sampling(1, temperature=0), [2]) == [Completion([2], True)]
    assert complete(model, [], Sampling(5), [2]) == []


@pytest.mark.parametrize("engine", [CacheEngine, GenerateEngine])
def test_stop_strings_end_a_completion_with_the_token_that_completes_them(engine, tokenizer):
    """A string is found across tokens and within one; what comes before it is as without stop strings."""
    model, prompts = llama(), prompts_of()
    free = [found.tokens for found in complete(model, prompts, GREEDY, [])]
    texts = [tokenizer.decode(one) for one in free]
    # Three characters of the first completion, which come up in it only now, and its very last character.
    string = next(texts[0][i : i + 3] for i in range(8, len(texts[0]) - 3) if texts[0].find(texts[0][i : i + 3]) == i)
    sampling = replace(GREEDY, stop_strings=(string, "no such text"), tokenizer=tokenizer)
    with torch.no_grad():
        found = engine(model).complete(prompts, sampling, [])
    for one, before, text in zip(found, free, texts, strict=True):
        assert one.tokens == before[: len(one.tokens)]
        assert one.finished == (string in text)
        assert (string in tokenizer.decode(one.tokens)) == one.finished
        assert string not in tokenizer.decode(one.tokens[:-1])
    assert found[0].finished
    assert len(found[0].tokens) < 24


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(AlignError, match="needs the tokenizer"):
        Sampling(5, stop_strings=("\n",))
    with pytest.raises(AlignError, match="an empty string"):
        Sampling(5, stop_strings=("",), tokenizer="any")


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.1), ("top_k", -1)],
)
def test_sampling_that_cannot_work_is_refused(field, value):
    with pytest.raises(AlignError, match=f"{field}: got {value}, expected"):
        replace(GREEDY, **{field: value})


@pytest.mark.parametrize("engine", [CacheEngine, GenerateEngine])
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(4), Sampling(4, top_k=5), Sampling(4, top_p=0.9)], ids=["greedy", "all", "top_k", "top_p"]
)
def test_a_model_whose_logits_are_not_finite_is_named_as_such(engine, sampling):
    model = build(FOREST["gpt2"][0], **FOREST["gpt2"][1])
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = math.nan
    with pytest.raises(AlignError, match="the model's logits are not finite"):
        complete(engine(model), prompts_of(), sampling, [2])


def test_sampling_leaves_the_mode_as_it_was_and_runs_without_dropout():
    model = build(FOREST["gpt2"][0], **FOREST["gpt2"][1])
    quiet = complete(model, prompts_of(), GREEDY, [2])
    assert not model.training
    assert complete(model.train(), prompts_of(), GREEDY, [2]) == quiet
    assert model.training


def test_stories260k_tells_its_story(real):
    folder = str(real / "models" / "stories260k")
    model, tokenizer = load_causal_lm(folder), load_tokenizer(folder)
    enable_forest(model)
    prompt = tokenizer("Once upon a time")["input_ids"]
    (found,) = complete(model, [prompt], Sampling(40, temperature=0), [tokenizer.eos_token_id])
    text = tokenizer.decode(prompt + found.tokens, skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a little girl named Lily. She loved to play outside in the park.")


# -- the machinery -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", NAMED)
def test_packed_layers_are_the_plain_ones_up_to_rounding(family, monkeypatch):
    """With and without bias, GPT-2's, which hold their weights the other way round, and heads that are the embedding."""
    monkeypatch.setattr(onednn, "faster_packed", lambda: True)
    model = build(FOREST[family][0], **FOREST[family][1])
    ids = torch.tensor([prompts_of()[1]])
    with torch.inference_mode():
        plain = model(ids).logits
        with packed_linears(model, WORTH_PASSES):
            layers = [layer for layer in model.modules() if "forward" in vars(layer)]
            assert {name for name, _ in model.named_modules() if name.endswith(("lm_head", "proj", "c_attn", "c_fc"))} == {
                name for name, layer in model.named_modules() if layer in layers
            }
            packed = model(ids).logits
        assert torch.equal(model(ids).logits, plain)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)


def test_what_is_not_packed(monkeypatch):
    """Models in 16 bits or under autocast, few passes, layers with a forward of their own, what memory has no room for, and
    anything where MKL is as fast.
    """
    monkeypatch.setattr(onednn, "faster_packed", lambda: True)

    def packed(model, passes=WORTH_PASSES):
        with packed_linears(model, passes):
            return [name for name, layer in model.named_modules() if isinstance(vars(layer).get("forward"), partial)]

    model = llama()
    everything = packed(model)
    assert len(everything) == 1 + 7 * model.config.num_hidden_layers
    assert packed(model, WORTH_PASSES - 1) == packed(llama().to(torch.bfloat16)) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert packed(model) == []
    first = model.get_submodule(everything[0])
    own = first.forward = first.forward
    assert packed(model) == everything[1:]
    assert first.forward is own
    del first.forward
    four = [model.get_submodule(name).weight.nbytes for name in everything[:4]]  # three neighbours and what follows
    monkeypatch.setattr("align.rollout.packed.MOST_BYTES", sum(four))
    assert packed(model) == everything[:4]
    monkeypatch.setattr("align.rollout.packed.MOST_BYTES", sum(four) - 1)
    assert packed(model) == everything[:3]
    monkeypatch.setattr(onednn, "faster_packed", lambda: False)
    assert packed(model) == []


@pytest.mark.parametrize("adapter", [False, True])
def test_neighbours_multiply_at_once(adapter, monkeypatch):
    """Queries, keys and values in one product, and both gates: below adapters, too, which leave their layers' inputs alone."""
    monkeypatch.setattr(onednn, "faster_packed", lambda: True)
    model = llama(attention_bias=True)
    if adapter:
        model = tune(model, Tuning("lora", {"r": 2, "target_modules": ["q_proj", "v_proj", "up_proj"]}))
        model.eval()
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.1)
    ids = torch.tensor([prompts_of()[1]])
    with torch.inference_mode():
        plain = model(ids).logits
        with packed_linears(model, WORTH_PASSES):
            found = model(ids).logits
            together = {}
            for name, layer in base_model(model).model.layers[1].named_modules():
                if "forward" in vars(layer) and "lora_" not in name:
                    together.setdefault(vars(layer)["forward"].func.__self__, []).append(name.split(".")[1])
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)
    assert list(together.values()) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_neighbours_of_other_inputs_are_multiplied_anew():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(6, size) for size in (4, 2, 5)]
    inputs = [torch.randn(1, 3, 6) for _ in layers]
    packed = Packed(layers)
    with torch.inference_mode():
        for place in (0, 1, 2, 1, 0, 2):
            torch.testing.assert_close(packed.multiply(place, inputs[place]), layers[place](inputs[place]))


def test_layers_that_share_a_weight_keep_their_own_bias(monkeypatch):
    monkeypatch.setattr(onednn, "faster_packed", lambda: True)
    torch.manual_seed(0)
    first, second, third = model = torch.nn.ModuleList(torch.nn.Linear(6, 4) for _ in range(3))
    second.weight = third.weight = first.weight
    third.bias = first.bias
    x = torch.randn(3, 6)
    with torch.inference_mode(), packed_linears(model, WORTH_PASSES):
        assert vars(first)["forward"].func.__self__ is vars(third)["forward"].func.__self__
        found = [layer(x) for layer in model]
    for layer, output in zip(model, found, strict=True):
        torch.testing.assert_close(output, layer(x).detach())


def test_layers_are_plain_again_after_an_error(monkeypatch):
    monkeypatch.setattr(onednn, "faster_packed", lambda: True)
    model = llama()
    with pytest.raises(ValueError, match="1 layers"), packed_linears(model, WORTH_PASSES):
        raise ValueError(f"{sum(layer is model.lm_head for layer in model.modules() if 'forward' in vars(layer))} layers")
    assert not any("forward" in vars(layer) for layer in model.modules())


def test_spans():
    """Four rows each, rounded up to 16 columns; neighbours of one width are one span."""
    assert spans_of([100, 90, 3]) == [(0, 3, 112)]
    assert spans_of([100] * 4 + [50] * 3) == [(0, 4, 112), (4, 7, 64)]
    assert spans_of([100] * 8 + [97] * 8 + [16] * 3) == [(0, 16, 112), (16, 19, 16)]


def test_rows_close_up():
    """In a row's place comes the longest of the next span, and in that one's the last, of the last span."""
    assert closed_up([9, 8, 7, 6, 4, 5, 3, 2, 1], [1], span=4) == [0, 5, 2, 3, 4, 8, 6, 7]
    assert closed_up([9, 8, 7, 6, 4, 5, 3, 2, 1], [8], span=4) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert closed_up([9, 8, 7, 6, 4, 5, 3, 2], [5, 6], span=8) == [0, 1, 2, 3, 4, 7]
    assert closed_up([9, 8], [0, 1], span=4) == []


def test_rows_close_up_by_length():
    """No row is then shorter than one of a later span, and rows move towards the front only: none overwrites what moves later."""
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randint(1, 30)
        lengths = sorted((draw.randint(1, 40) for _ in range(count)), reverse=True)
        done = sorted(draw.sample(range(count), draw.randint(1, count)))
        order = closed_up(lengths, done, span=4)
        assert sorted(order) == [row for row in range(count) if row not in done]
        assert all(row >= place for place, row in enumerate(order))
        kept = [lengths[row] for row in order]
        assert all(min(kept[start - 4 : start]) >= max(kept[start:]) for start in range(4, len(kept), 4))


@pytest.mark.parametrize(("graphs", "order"), [(None, [0, 4, 2, 3, 8, 5, 6, 7]), ("any", [0, 8, 2, 3, 4, 5, 6, 7])])
def test_rows_keep_their_order_where_attention_reads_by_spans(graphs, order):
    """Nine rows, longest first, of which the second leaves. A CUDA graph reads all rows alike, and one move is enough."""
    model = llama()
    with torch.no_grad(), serving(model) as base:
        batch = Batch(base, [[5] * length for length in range(9, 0, -1)], Sampling(4, batch_size=9), [], None)
        batch.admit()
        batch.step()
        batch.graphs = graphs
        batch._leave([1])
    assert batch.live == order


def test_a_pass_brings_in_so_many_tokens_and_repeated_prompts_cost_none(monkeypatch):
    monkeypatch.setattr(engine, "FILL_TOKENS", 9)
    prompts = [[5] * 4, [6] * 4, [7] * 4] * 2
    with torch.no_grad(), serving(llama()) as base:
        batch = Batch(base, prompts, Sampling(4, batch_size=6), [], None)
        batch.admit()
        assert batch.live == [0, 3, 1, 4]


def test_sizes_of_graphs():
    """A power of two of at least 64 rows, at most all slots; a power of two times 512 columns."""
    assert sizes(3, 100, 256) == (64, 512)
    assert sizes(65, 513, 256) == (128, 1024)
    assert sizes(33, 512, 40) == (40, 512)


class Recorded:
    """Stands in for a CUDA graph: what was captured is run again by `replay`."""

    def __init__(self, step, rows, width):
        self.step, self.spans = step, [(0, rows, width)]

    def replay(self):
        self.step(self.spans)


def test_a_pass_over_more_rows_and_columns_than_asked_for_changes_nothing(monkeypatch):
    """What a CUDA graph does to the batch, on any device: rows of nobody run along, and graphs die when the cache moves."""
    made = []
    monkeypatch.setattr(graphs, "SMALLEST", 8)
    monkeypatch.setattr(graphs, "WIDTHS", 256)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(Graphs, "_capture", lambda self, *size: made.append(size[1:]) or Recorded(*size))
    model, prompts = llama(initializer_range=0.05), prompts_of() * 2
    sampling = Sampling(24, batch_size=11)
    wanted = complete(model, prompts, sampling, [2, 3, 4], torch.Generator().manual_seed(0))
    with torch.no_grad(), serving(model) as base:
        batch = Batch(base, prompts, sampling, [2, 3, 4], torch.Generator().manual_seed(0))
        batch.graphs = Graphs(batch.cache, (batch.token, batch.position, batch.count))
        while batch.waiting or batch.live:
            batch.admit()
            batch.step()
            batch.retire()
    assert [batch.completions[i] for i in range(16)] == wanted
    assert set(made) == {(11, 256), (8, 256)}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_graphs_draw_the_same_tokens():
    model, prompts = llama(initializer_range=0.05).cuda(), prompts_of() * 8
    sampling = Sampling(24, batch_size=16)

    def sample(graphs):
        with torch.no_grad(), serving(model) as base:
            batch = Batch(base, prompts, sampling, [2, 3, 4], torch.Generator().manual_seed(0))
            batch.graphs = batch.graphs if graphs else None
            while batch.waiting or batch.live:
                batch.admit()
                batch.step()
                batch.retire()
            assert not graphs or (batch.graphs.made and not batch.graphs.refused)
        return [batch.completions[i] for i in range(len(prompts))]

    assert sample(True) == sample(False)
