"""The last layer's feed-forward block works where its answers are read, and nothing else changes."""

import copy

import pytest
import torch
from helpers import assert_close, assert_same, build, llama, pairs, run
from torch import nn

from align.engine import enable_forest
from align.forest import Tree, plant
from align.last_layer import answer_everywhere
from align.losses import preference_losses
from align.trainers.objectives import Preference, RewardModel

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
LONG_PROMPTS = [Tree(list(range(5, 25)), ([7, 8, 9], [10, 11])), Tree(list(range(30, 45)), ([5, 6],))]


def tokens_in(block, call):
    seen = []
    with torch.no_grad():
        handle = block.down_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[1]))
        call()
        handle.remove()
    return seen


def test_only_what_is_read_goes_through_the_last_block():
    model, forest = llama(), plant(LONG_PROMPTS)
    assert enable_forest(model) is None
    first, last = (model.model.layers[i].mlp for i in (0, -1))
    assert tokens_in(first, lambda: model(forest=forest)) == [forest.tokens]
    # Both branches of the first prompt are read from its last token.
    assert tokens_in(last, lambda: model(forest=forest)) == [len(forest.targets) - 1]
    judge = build("llama", score_head=True, **SIZES)
    assert enable_forest(judge) is None
    assert tokens_in(judge.model.layers[-1].mlp, lambda: judge(forest=forest)) == [3]


def test_documents_are_read_everywhere():
    model, forest = llama(), plant([Tree(list(range(5, 25)), prompt_mask=[True] * 20)])
    enable_forest(model)
    assert tokens_in(model.model.layers[-1].mlp, lambda: model(forest=forest)) == [20]


@pytest.mark.parametrize("score_head", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_whole_layer(score_head, checkpointing):
    model = build("llama", score_head=True, **SIZES) if score_head else llama()
    goal = RewardModel(0.01) if score_head else Preference(preference_losses["simpo"], {"beta": 2.0, "gamma": 1.0})
    assert enable_forest(model) is None
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    reading = run(goal, model, pairs(3))
    answer_everywhere(model.model)
    assert_same(reading, run(goal, model, pairs(3)))


def test_layers_may_be_put_behind_it():
    """As growing a model does, with copies of layers that are there."""
    model, forest = llama(), plant(LONG_PROMPTS)
    enable_forest(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[-1]))
    said = model(forest=forest).logps
    answer_everywhere(model.model)
    assert_close(said, model(forest=forest).logps)


def test_enabling_twice_picks_once():
    model, forest = llama(), plant(LONG_PROMPTS)
    for _ in range(2):
        assert enable_forest(model) is None
    assert tokens_in(model.model.layers[-1].mlp, lambda: model(forest=forest)) == [len(forest.targets) - 1]


class Together(nn.Module):
    """A block that wants all tokens that the layer has: it does not treat each by itself."""

    def __init__(self, layer):
        super().__init__()
        self.block, self.tokens = layer.mlp, 0
        layer.input_layernorm.register_forward_hook(self.count)

    def count(self, module, args, output):
        self.tokens = output.shape[1]

    def forward(self, hidden):
        if hidden.shape[1] != self.tokens:
            raise ValueError("some tokens are missing")
        return self.block(hidden)


def test_a_block_that_looks_at_more_than_one_token_answers_everywhere():
    model = llama()
    layer = model.model.layers[-1]
    layer.mlp = Together(layer)
    assert enable_forest(model) is None
    assert "reading" not in vars(layer)
    model(forest=plant(LONG_PROMPTS))
