"""Sampling: greedy as transformers' `generate`, frequencies as the softmax says."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import VOCABULARY, build, llama, tokens

from align.engine import enable_forest
from align.models import load_causal_lm, load_tokenizer
from align.rollout import Completion, Sampling, complete, draw
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": SIZES,
    "qwen2": SIZES,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gemma": {**SIZES, "head_dim": 8},
}
GREEDY = Sampling(24, temperature=0)


def prompts_of(seed=0):
    rng = random.Random(seed)
    return [tokens(rng, n) for n in (3, 11, 1, 7, 7, 2, 16, 5)]


def by_generate(model, prompt, stop):
    """transformers' own greedy continuation of one prompt, alone."""
    ids = torch.tensor([prompt])
    config = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": stop, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("enabled", [False, True])
def test_greedy_equals_generate(family, enabled):
    """Prompts of 1 to 16 tokens in one batch, rows that end at different times, and the same with the forest attention in place.

    The stop tokens are the 4 that come up most, so that some rows end early and some never.
    """
    model, prompts = build(family, **FAMILIES[family]), prompts_of()
    free = [by_generate(model, prompt, None) for prompt in prompts]
    said = [token for one in free for token in set(one[3:])]
    stop = sorted(set(said), key=said.count)[-4:]
    wanted = [by_generate(model, prompt, stop) for prompt in prompts]
    assert len({len(one) for one in wanted}) > 1
    if enabled:
        assert enable_forest(model) is None
    found = complete(model, prompts, GREEDY, stop)
    assert [completion.tokens for completion in found] == wanted
    assert [completion.finished for completion in found] == [one[-1] in stop for one in wanted]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_changes_nothing(batch_size):
    model, prompts = llama(), prompts_of(1)
    batches = []
    found = complete(model, prompts, replace(GREEDY, batch_size=batch_size), [2], progress=batches.append)
    assert found == complete(model, prompts, GREEDY, [2])
    assert batches == ([1] * 8 if batch_size == 1 else [3, 3, 2])


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
    assert complete(model.merge_and_unload(), prompts, GREEDY, [2]) == with_adapter


class OneStep(torch.nn.Module):
    """Forgets what was said: the logits of every step are those given."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)
        self.config = llama().config

    def forward(self, input_ids, **kwargs):
        return type("Output", (), {"logits": self.logits.expand(len(input_ids), 1, -1)})


LOGITS = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5])
DRAWS = 20_000


def frequencies(sampling, seed=0):
    found = complete(OneStep(LOGITS), [[1]] * DRAWS, replace(sampling, batch_size=DRAWS), [], torch.Generator().manual_seed(seed))
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


def test_impossible_tokens_never_come_up():
    """Half of a vocabulary of 50,000 has probability 0, the first and the last token included."""
    logits = torch.randn(400, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, ::2] = -torch.inf
    logits[:, -1] = -torch.inf
    drawn = draw(logits, Sampling(1), torch.Generator().manual_seed(1))
    assert (drawn % 2 == 1).all()
    assert (drawn < 49_999).all()
    assert len(set(drawn.tolist())) > 300


@pytest.mark.parametrize(("chance", "token"), [(0.0, 1), (1 - 2**-24, 3)])
def test_the_ends_of_chance_are_possible_tokens(chance, token, monkeypatch):
    """The least and the largest number that `torch.rand` can give: the first and the last token with a probability."""
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, chance))
    logits = torch.tensor([[-torch.inf, 0.3, 0.1, 0.7, -torch.inf]])
    assert draw(logits, Sampling(1), None).item() == token


def test_top_p_keeps_the_likeliest_token_always():
    assert draw(LOGITS[None], Sampling(1, top_p=1e-9), torch.Generator().manual_seed(0)).item() == 2


def test_a_seed_gives_the_same_tokens_again():
    model, prompts = llama(initializer_range=0.02), prompts_of()

    def sample(seed):
        return complete(model, prompts, Sampling(12), [2], torch.Generator().manual_seed(seed))

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)
    assert all(0 <= token < VOCABULARY for completion in sample(0) for token in completion.tokens)


def test_stop_tokens_are_included_and_the_limit_holds():
    """Token 2 always comes first: one token and finished. Without it as a stop: five tokens and not finished."""
    model = OneStep(torch.tensor([0.0, 0.0, 9.0]))
    assert complete(model, [[1], [1, 1]], Sampling(5, temperature=0), [0, 2]) == [Completion([2], True)] * 2
    assert complete(model, [[1]], Sampling(5, temperature=0), [0]) == [Completion([2] * 5, False)]
    assert complete(model, [[1]], Sampling(1, temperature=0), [2]) == [Completion([2], True)]


def test_sampling_leaves_the_mode_as_it_was_and_runs_without_dropout():
    model = build("gpt2", **FAMILIES["gpt2"])
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
