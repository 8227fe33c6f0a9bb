"""Compiled parts answer as they do uncompiled, as whole graphs that forests of any shape use. AOT needs no C++ compiler."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial, partialmethod

import pytest
import torch
from helpers import assert_same, documents, llama, pairs, run
from test_attention import plain_varlen_attn
from torch._dynamo.utils import counters

from align import attention, compiling, heads
from align.cli import main
from align.data import write_rows
from align.engine import compile_forest, enable_forest
from align.rollout import Sampling, complete
from align.trainers.objectives import LanguageModel
from align.tuning.strategies import Tuning
from align.tuning.tune import tune


@pytest.fixture(autouse=True)
def from_nothing():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def batches():
    return [[replace(tree, values={}) for tree in (*documents(seed, 3), *pairs(seed, 3))] for seed in range(5)]


@pytest.fixture(autouse=True)
def by_aot(monkeypatch):
    """Compile with a backend that traces forward and backward, and runs what torch itself would."""
    with_backend(monkeypatch, "aot_eager")


COMPILE = torch.nn.Module.compile


def with_backend(monkeypatch, backend):
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(COMPILE, backend=backend))


# What a graph holds must be one operator, as FlashAttention is; the plain function asks tensors for their numbers.
@torch.library.custom_op("align_tests::varlen", mutates_args=())
def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, key_ends: torch.Tensor, most: int, most_keys: int
) -> torch.Tensor:
    return plain_varlen_attn(q, k, v, ends, key_ends, most, most_keys, scale=None, window_size=(-1, 0))


@torch.library.custom_op("align_tests::varlen_backward", mutates_args=())
def varlen_backward(
    gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, key_ends: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def backward():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = plain_varlen_attn(*leaves, ends, key_ends, 10**6, 10**6, scale=None, window_size=(-1, 0))
        return torch.autograd.grad(out, leaves, gradient)

    with ThreadPoolExecutor(1) as apart:  # within an operator autograd is off, in its thread
        return apart.submit(backward).result()


varlen.register_fake(lambda q, *_: torch.empty_like(q))
varlen_backward.register_fake(lambda _, q, k, v, *__: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)))
varlen.register_autograd(
    lambda ctx, gradient: (*varlen_backward(gradient, *ctx.saved_tensors), None, None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:5]),
)


def flash(q, k, v, ends, key_ends, most, most_keys, **kwargs):
    return varlen(q, k, v, ends, key_ends, most, most_keys)


def by_flash(monkeypatch):
    monkeypatch.setattr(attention, "has_flash", lambda device: True)
    monkeypatch.setattr(attention, "flash_fits", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", flash)


@pytest.mark.parametrize("flash", [False, True])
def test_a_model_compiles_once_for_all_forests(monkeypatch, flash):
    """Losses and gradients are the same; with FlashAttention it is one graph, without a break at its attention."""
    model = llama(num_hidden_layers=3).train()
    assert enable_forest(model) is None
    plain = [run(LanguageModel(), model, trees) for trees in batches()]
    if flash:
        by_flash(monkeypatch)
    assert compile_forest(model, nullcontext()) is None
    graphs = []
    for trees, wanted in zip(batches(), plain, strict=True):
        assert_same(run(LanguageModel(), model, trees), wanted)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == graphs[:1] * 5
    if flash:
        assert graphs[0] == 2, "one that learns, one that measures"
        assert not counters["graph_break"]


def lora(model):
    model = tune(model, Tuning("lora", {}))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # from nothing, A would have no gradient
            torch.nn.init.normal_(weight, std=0.1)
    return model


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("change", [lora, checkpointed])
def test_adapters_and_checkpointed_layers_compile(monkeypatch, change):
    model = change(llama(num_hidden_layers=2)).train()
    assert enable_forest(model) is None
    plain = run(LanguageModel(), model, batches()[0])
    by_flash(monkeypatch)
    assert compile_forest(model, nullcontext()) is None
    before = counters["stats"]["unique_graphs"]
    assert_same(run(LanguageModel(), model, batches()[0]), plain)
    assert counters["stats"]["unique_graphs"] == before > 0


def test_what_does_not_compile_runs_as_it_is(monkeypatch):
    def refuse(graph, inputs):
        raise RuntimeError("no compiler here")

    model = llama(num_hidden_layers=2).train()
    assert enable_forest(model) is None
    plain = run(LanguageModel(), model, batches()[0])
    with_backend(monkeypatch, refuse)
    assert "no compiler here" in compile_forest(model, nullcontext())
    assert_same(run(LanguageModel(), model, batches()[0]), plain, rel=0)


def test_padded_rows_are_not_compiled():
    model = llama(num_hidden_layers=1)
    enable_forest(model)
    model.forest_padded = True
    assert compile_forest(model, nullcontext()) == "it trains on padded rows"


STAGES = {
    "sft": "--max_steps 3",
    "reward": "--max_steps 3",
    "dpo": "--max_steps 3 --beta 0.1",
    "grpo": "--max_steps 2 --max_completion_length 6 --num_generations 4 --reward_funcs mine.py:low",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_compiles_ends_where_one_does_that_does_not(stage, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama(num_hidden_layers=2).save_pretrained("model")
    tokenizer.save_pretrained("model")
    words = ["one", "two", "three", "four", "five", "six"]
    sides = {"chosen": "the cat", "rejected": "the mat"}
    answers = {"sft": {"completion": "the cat"}, "grpo": {}}.get(stage, sides)
    write_rows("rows.jsonl", [{"prompt": f"say {word}", **answers} for word in words])
    (tmp_path / "mine.py").write_text("def low(completion_ids, **_): return [sum(i < 100 for i in ids) for ids in completion_ids]")
    if stage != "sft":  # which is enough of the many graphs between the breaks of plain attention
        by_flash(monkeypatch)
    found = []
    for more in ([], ["--torch_compile"]):
        # Else one would find the log-probs under the reference that the other has computed, and be told from it by their rounding.
        monkeypatch.setenv("ALIGN_HOME", str(tmp_path / f"home{len(found)}"))
        command = f"{stage} --model model --data rows.jsonl --held_out 0.3 --learning_rate 1e-3 --json {STAGES[stage]}".split()
        assert main([*command, "--output_dir", f"out{len(found)}", *more]) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        assert ("compiling the model" in said.err) == bool(more)
        assert (counters["stats"]["unique_graphs"] > 0) == bool(more)
        found.append({k: v for k, v in json.loads(said.out)["metrics"].items() if isinstance(v, float)})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)


def test_keys_that_are_learned_for_each_layer_are_refused(capsys):
    """They compiled layer after layer anew, until torch gave up without a word."""
    assert main(["sft", "--model", "model", "--data", "rows.jsonl", "--tuning", "prefix", "--torch_compile"]) == 2
    assert "torch_compile would need a graph for each layer, as tuning 'prefix'" in capsys.readouterr().err


def test_a_prefix_that_is_trained_further_runs_uncompiled_and_a_line_says_so(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    llama(num_hidden_layers=2).save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_rows("rows.jsonl", [{"prompt": "say one", "completion": "the cat"}])
    common = ["--data", "rows.jsonl", "--held_out", "0", "--max_steps", "1"]
    assert main(["sft", "--model", "model", "--tuning", "prefix", "--output_dir", "first", *common]) == 0
    assert main(["sft", "--model", "first", "--on_adapter", "continue", "--torch_compile", "--output_dir", "second", *common]) == 0
    assert "runs uncompiled, as it would need a graph for each layer" in capsys.readouterr().err
    assert counters["stats"]["unique_graphs"] == 0


def test_answers_are_sampled_uncompiled(monkeypatch):
    """The cache's calls are others than those of training, and would compile anew."""
    model = llama(num_hidden_layers=2, initializer_range=0.05)
    assert enable_forest(model) is None
    sample = partial(complete, model, [[5, 6, 7], [8]], Sampling(8, temperature=0.0), [2])
    wanted = sample()
    by_flash(monkeypatch)
    assert compile_forest(model, nullcontext()) is None
    before = counters["stats"]["unique_graphs"]
    assert sample() == wanted
    assert counters["stats"]["unique_graphs"] == before


# -- parts of the head -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings():
    return heads._Settings(scale=0.5, softcap=30.0, temperature=0.7, with_entropy=True, keeps=0)


def read_and_sloped(read, slopes, rows, settings):
    generator = torch.Generator().manual_seed(rows)
    products = torch.randn(rows, 50, generator=generator).bfloat16()
    targets = torch.randint(50, (rows,), generator=generator)
    chosen, highest, totals, sums, kept = read(products.clone(), targets, False, settings)
    assert kept is None
    of_logps, of_entropy = torch.randn(2, rows, generator=generator)
    slope = slopes(products, highest, targets, -totals.log(), of_logps, of_entropy, totals.log() - sums / totals, settings)
    return [chosen, highest, totals, sums, slope]


def test_the_head_compiles_once_for_any_number_of_rows(monkeypatch, settings):
    monkeypatch.setattr(compiling, "_compile", cache(partial(torch.compile, backend="aot_eager", fullgraph=True)))
    plain = heads._read.__wrapped__, heads._slopes.__wrapped__
    compiled = [partial(compiling._compiled, part) for part in plain]
    for rows in (9, 4, 17):
        for ours, theirs in zip(read_and_sloped(*compiled, rows, settings), read_and_sloped(*plain, rows, settings), strict=True):
            assert torch.equal(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 2
    assert not compiling._refused


def test_where_nothing_compiles_the_head_runs_as_it_is(monkeypatch, settings, capsys):
    def refuse(graph, inputs):
        raise RuntimeError("no Triton here")

    monkeypatch.setattr(compiling, "_refused", [])
    monkeypatch.setattr(compiling, "_compile", cache(partial(torch.compile, backend=refuse)))
    plain = heads._read.__wrapped__, heads._slopes.__wrapped__
    compiled = [partial(compiling._compiled, part) for part in plain]
    for ours, theirs in zip(read_and_sloped(*compiled, 5, settings), read_and_sloped(*plain, 5, settings), strict=True):
        assert torch.equal(ours, theirs)
    assert "no Triton here" in capsys.readouterr().err
