"""The forest gives what the model itself gives: log-probs, losses, and the gradient of every parameter."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import Alone, assert_close, assert_same, build, documents, llama, objective, padded, pairs, run, run_alone, tokens
from launched import launch_two

from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree, plant
from align.losses import ppo_policy_loss, ppo_value_loss, preference_losses
from align.trainers.objectives import LanguageModel, Preference, RewardModel, add_reference_logps
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def policy_loss(model, forest):
    scores = model(forest=forest, temperature=0.7)
    return ppo_policy_loss(scores.logps, forest.values["old"], forest.values["advantages"], cliprange=0.2)


def value_loss(model, forest):
    values = model(forest=forest, read="sources")
    return ppo_value_loss(values, forest.values["old"], forest.values["returns"], cliprange_value=0.2)


def episodes(model, **read):
    """Trees of one branch, each target with an old value near today's and two random numbers."""
    draw = random.Random(3)
    trees = [Tree(tokens(draw, draw.randint(1, 9)), (tokens(draw, draw.randint(1, 9)),)) for _ in range(6)]
    with torch.no_grad():
        today = [Alone(model, [tree])(**read) for tree in trees]
    columns = [getattr(t, "logps", t).tolist() for t in today]
    return [
        replace(
            tree,
            values={
                "old": [value + draw.gauss(0, 0.2) for value in column],
                "advantages": [draw.gauss(0, 1) for _ in column],
                "returns": [draw.gauss(0, 1) for _ in column],
            },
        )
        for tree, column in zip(trees, columns, strict=True)
    ]


def with_reference(trees):
    reference = llama(seed=9)
    assert enable_forest(reference) is None
    return add_reference_logps(reference, trees, 64)


def case(name):
    """Model, objective and trees of one way to train."""
    parameters = {"dpo": {"beta": 0.1}, "ipo": {"beta": 0.1}, "orpo": {"lam": 0.1}, "simpo": {"beta": 2.0, "gamma": 1.0}}
    if name == "sft":
        return llama(), LanguageModel(), documents(1)
    if name == "reward":
        return build("llama", score_head=True, **SIZES), RewardModel(0.01, use_margin=True), pairs(1)
    if name == "ppo policy":
        return (model := llama()), objective("tokens", policy_loss), episodes(model, temperature=0.7)
    if name == "ppo value":
        return (model := build("llama", score_head=True, **SIZES)), objective("tokens", value_loss), episodes(model, read="sources")
    loss = preference_losses[name]
    return llama(), Preference(loss, parameters[name]), with_reference(pairs(1)) if loss.needs_reference else pairs(1)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ipo", "orpo", "simpo", "ppo policy", "ppo value"])
def test_losses_and_gradients_equal_the_padded_path_and_each_sequence_alone(name):
    """1 token a pack is every tree by itself; 40 is some together; None is one pack."""
    model, goal, trees = case(name)
    alone = run_alone(goal, model, trees)
    assert enable_forest(model) is None
    for budget in (1, 40, None):
        assert_same(run(goal, model, trees, budget), alone)
    with padded(model):
        assert_same(run(goal, model, trees), alone)


SHAPES = {
    "empty prompt": [Tree([], ([5, 6, 7], [8, 9])), Tree([5, 6, 7], ([8],))],
    "one-token branches": [Tree([5, 6], ([7], [8], [9])), Tree([5], ([6],)), Tree([], ([9, 5],))],
    "sixteen branches": [Tree([5, 6, 7], tuple([10 + i] * (1 + i % 5) for i in range(16))), Tree([6], ([8, 9], [7]))],
    "documents": [Tree(list(range(5, 25)), prompt_mask=[True] * 20), Tree([9, 8], prompt_mask=[True, True])],
    "an empty branch": [Tree([5, 6, 7], ([8, 9], [], [10])), Tree([5, 6], ([], [9]))],
    "a loss on prompt and branches": [Tree([5, 6, 7, 8], ([9], [10, 11]), prompt_mask=[False, True, False, True])],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    model, trees = llama(), SHAPES[shape]
    alone = run_alone(LanguageModel(), model, trees)
    assert enable_forest(model) is None
    assert_same(run(LanguageModel(), model, trees), alone)
    with padded(model):
        assert_same(run(LanguageModel(), model, trees), alone)


def test_one_long_row_does_not_pad_the_others(monkeypatch):
    """On padded rows a pass takes little more than the budget, its prompts repeated; and what it says is the same."""
    draw = random.Random(0)
    trees = [Tree(tokens(draw, n), (tokens(draw, 3), tokens(draw, 20))) for n in (4, 300, 7, 6, 40, 5, 44, 3)]
    trees = [replace(tree, prompt_mask=[True] * len(tree.prompt)) for tree in trees]
    model = llama(max_position_embeddings=512)
    alone = run_alone(LanguageModel(), model, trees)
    assert enable_forest(model) is None
    rows = []
    with padded(model):
        model.model.register_forward_pre_hook(lambda _, args, seen: rows.append(seen["input_ids"].shape), with_kwargs=True)
        assert_same(run(LanguageModel(), model, trees), alone)
    unfolded = sum(len(tree.prompt) + len(branch) for tree in trees for branch in tree.branches)
    assert sum(count for count, _ in rows) == 16
    assert unfolded <= sum(count * longest for count, longest in rows) < 1.3 * unfolded
    assert 2 < len(rows) < 8


@pytest.mark.parametrize("seed", range(8))
def test_random_forests(seed):
    """Any mixture of shapes, at a random budget."""
    draw = random.Random(seed)
    trees = []
    for _ in range(draw.randint(1, 9)):
        prompt = tokens(draw, draw.choice([0, 1, 3, 17, 40]))
        branches = tuple(
            tokens(draw, draw.choice([2, 3, 9, 33])) for _ in range(draw.choice([0, 1, 2, 5]) if len(prompt) > 1 else 2)
        )
        mask = [draw.random() < 0.5 for _ in prompt] if prompt and draw.random() < 0.5 else None
        trees.append(Tree(prompt, branches, prompt_mask=mask))
    trees.append(Tree([5, 6], ([7],)))
    model = llama(seed)
    alone = run_alone(LanguageModel(), model, trees)
    assert enable_forest(model) is None
    # A document alone in its pack may have no target; then there is no loss to take.
    assert_same(run(LanguageModel(), model, trees, draw.choice([30, 100, None])), alone)


def test_every_number_of_the_head_equals_log_softmax():
    model, trees = llama(), [*pairs(2), *documents(2)]
    trees = [replace(tree, values={}) for tree in trees]
    with torch.no_grad():
        alone = Alone(model, trees)(temperature=0.6)
        assert enable_forest(model) is None
        ours = model(forest=plant(trees), temperature=0.6, with_entropy=True)
    assert_close(ours.logps, alone.logps)
    assert_close(ours.entropy, alone.entropy)
    assert torch.equal(ours.correct, alone.correct)


def random_trees(draw):
    return [
        Tree(tokens(draw, 5), (tokens(draw, 9), tokens(draw, 2))),
        Tree(tokens(draw, 12), (tokens(draw, 8),)),
        Tree([], ([7, 8],)),
    ]


def test_scale_and_bias_of_the_head_come_from_the_model():
    """Cohere multiplies its logits, Granite divides them (GPT-J, above, has a bias): a head that forgot it would be refused."""
    for family, fields in (("cohere", {**SIZES, "logit_scale": 0.25}), ("granite", {**SIZES, "logits_scaling": 4.0})):
        model, trees = build(family, **fields), random_trees(random.Random(1))
        with torch.no_grad():
            theirs = Alone(model, trees)()
            assert enable_forest(model) is None
            assert_close(model(forest=plant(trees)).logps, theirs.logps)


# -- what else the engine promises -------------------------------------------------------------------------------------------


def test_a_model_that_agrees_on_neither_path_is_refused():
    """A head that the engine does not know of: logits doubled behind the output layer."""
    model = llama()
    forward = type(model).forward

    class Doubled(type(model)):
        def forward(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            output.logits = 2 * output.logits
            return output

    model.__class__ = Doubled
    with pytest.raises(AlignError, match=r"neither on the forest \(its log-probs on the probe differ .* nor on padded rows"):
        enable_forest(model)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_model_whose_answers_are_no_numbers_is_told_so(broken):
    """It was said not to be causal, as nothing is near to NaN."""
    model = llama()
    model.lm_head.weight.data[3] = broken
    with pytest.raises(AlignError, match=r"LlamaForCausalLM answers random tokens with NaN or infinity in torch.float32: "):
        enable_forest(model)


def test_a_row_longer_than_the_learned_positions_is_refused():
    model = build("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=20)
    assert enable_forest(model, 20) is None
    with pytest.raises(AlignError, match="the longest row has 21 tokens, and GPT2LMHeadModel has places for 20"):
        enable_forest(model, 21)
    assert enable_forest(llama(max_position_embeddings=20), 21) is None  # turned, not learned: it may go on


DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("pegasus", {**DECODER, "max_position_embeddings": 20}),
        ("marian", {**DECODER, "max_position_embeddings": 20}),
        ("blenderbot", {**DECODER, "max_position_embeddings": 20}),
        ("whisper", {**DECODER, "max_target_positions": 20}),
        ("mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4, "max_seq_len": 20}),
        ("ctrl", {"n_embd": 32, "n_layer": 1, "n_head": 4, "dff": 64, "n_positions": 20}),
    ],
)
def test_a_row_longer_than_a_table_of_positions_is_refused(kind, fields):
    """Whether it is learned, a wave, or ALiBi; one of as many tokens passes, and one more is no answer but an error."""
    model = build(kind, **fields)
    enable_forest(model, 20)
    row, longer = (plant([Tree(tokens(random.Random(0), 4), (tokens(random.Random(1), n),))]) for n in (16, 17))
    model(forest=row)
    with pytest.raises((IndexError, RuntimeError)):
        model(forest=longer)
    with pytest.raises(AlignError, match=rf"the longest row has 21 tokens, and {type(model).__name__} has places for 20"):
        enable_forest(model, 21)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0], "factor": 4.0}),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
def test_a_row_that_would_turn_the_rows_beside_it_otherwise_is_refused(kind, fields):
    """A row of 21 tokens changes what is said of a short one that it is packed with, on the forest and on padded rows."""
    places = (
        {"original_max_position_embeddings": 20, "max_position_embeddings": 80}
        if kind == "phi3"
        else {"max_position_embeddings": 20}
    )
    model = build(kind, **SIZES, **places, rope_parameters={"rope_theta": 1e4, **fields})
    assert enable_forest(model, 20) is None
    draw = random.Random(0)
    short, whole, longer = (Tree(tokens(draw, 4), (tokens(draw, n),)) for n in (4, 16, 17))
    with torch.no_grad():
        alone = model(forest=plant([short])).logps
        assert_close(model(forest=plant([short, whole])).logps[:4], alone)
        assert (model(forest=plant([short, longer])).logps[:4] - alone).abs().max() > 1e-3
    with pytest.raises(AlignError, match="the longest row has 21 tokens, and one of more than 20 changes the rotary frequencies"):
        enable_forest(model, 21)


def test_a_model_that_does_not_run_on_plain_tokens_is_one_line():
    """X-MOD wants to be told a language, and RemBERT's output layer does not take its trunk's hidden states."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "is_decoder": True}
    with pytest.raises(AlignError, match=r"^XmodForCausalLM cannot be trained: its own forward .*gave Input language unknown.*$"):
        enable_forest(build("xmod", **sizes))
    with pytest.raises(AlignError, match=r"neither on the forest .* nor on padded rows .mat1 and mat2 shapes"):
        enable_forest(build("rembert", **sizes, input_embedding_size=16, output_embedding_size=48))


def test_the_model_stays_itself():
    """Logits, generation and the training mode are as before."""
    model, ids = llama().train(), torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids > 0).long()
    with torch.no_grad():
        logits, said = model(input_ids=ids, attention_mask=mask).logits, model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        assert enable_forest(model) is None
        assert model.training
        assert_close(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], logits[mask.bool()])
        assert model.generate(ids[:1], max_new_tokens=5, do_sample=False).tolist() == said.tolist()


@pytest.mark.parametrize("score_head", [False, True])
def test_adapters(score_head):
    """LoRA's gradients too, and the wrapped model's numbers are its own."""
    goal, trees = (RewardModel(), pairs(4)) if score_head else (LanguageModel(), documents(4))
    model = tune(build("llama", score_head=score_head, **SIZES), Tuning("lora", {"r": 4}))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    assert enable_forest(model) is None
    forest = run(goal, model, trees)
    with padded(model):
        assert_same(forest, run(goal, model, trees))
    merged = model.merge_and_unload().requires_grad_()
    assert_close(forest[0], run_alone(goal, merged, trees)[0])
    assert all("lora" in name or "score" in name for name in forest[1])


def test_an_adapter_on_the_head_says_what_to_do():
    model = tune(llama(), Tuning("lora", {"r": 2, "alpha": 2, "target_modules": ["q_proj", "lm_head"]}))
    with pytest.raises(AlignError, match="take 'lm_head' out of its target modules"):
        enable_forest(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    model, trees = llama(), documents(5)
    assert enable_forest(model) is None
    model.train()
    plain = run(LanguageModel(), model, trees)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert_same(run(LanguageModel(), model, trees), plain, rel=1e-6)


def test_tied_embeddings_get_both_gradients():
    model, trees = llama(tie_word_embeddings=True), documents(6)
    alone = run_alone(LanguageModel(), model, trees)
    assert enable_forest(model) is None
    assert_same(run(LanguageModel(), model, trees), alone)


def test_compiled():
    """Losses and gradients are the same, and forests of new shapes compile nothing anew. AOT needs no C++ compiler."""
    model = llama(num_hidden_layers=1)
    assert enable_forest(model) is None
    batches = [[replace(tree, values={}) for tree in (*documents(seed, 3), *pairs(seed, 3))] for seed in range(5)]
    plain = [run(LanguageModel(), model, trees) for trees in batches]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    graphs = []
    for trees, wanted in zip(batches, plain, strict=True):
        assert_same(run(LanguageModel(), compiled, trees, parameters=model), wanted)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch.compiler.reset()
    assert graphs[0] > 0
    assert graphs[2:] == [graphs[2]] * 3


SHARDED = """
import sys
import torch
from helpers import documents, llama, run
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from align.engine import enable_forest
from align.forest import plant
from align.trainers.objectives import LanguageModel

distributed.init_process_group("gloo")
rank, processes = distributed.get_rank(), distributed.get_world_size()
mesh, trees = init_device_mesh("cpu", (processes,)), documents(1, 8)
units = sum(tree.targets for tree in trees)
for padded in (False, True):
    for tied in (False, True):
        model = llama(tie_word_embeddings=tied)
        assert enable_forest(model) is None
        whole = run(LanguageModel(), model, trees)[1]
        model.forest_padded = padded
        model.train()
        model.gradient_checkpointing_enable()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for step in range(2):
            model.zero_grad()
            loss = LanguageModel()(model, plant(trees[rank::processes])).loss
            (loss.sum() / units * processes).backward()  # gradients are averaged over processes
        for name, p in model.named_parameters():
            ours, theirs = p.grad.full_tensor(), whole[name]
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), (padded, tied, name)
"""


def test_sharded_by_fsdp(tmp_path):
    """FSDP2 on two processes: each parameter's gradient is that of one process on all rows. The head reads its weight while the
    outermost module has it gathered.
    """
    script = tmp_path / "script.py"
    script.write_text(SHARDED)
    launch_two([str(script)], tmp_path)
