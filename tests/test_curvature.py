"""Curvature against exact Hessians: of matrices that are known, and of small models through another path."""

import json
import random

import pytest
import torch
from helpers import documents, llama, pairs, sequences
from torch.func import functional_call

from align.diagnostics.curvature import landscape
from align.diagnostics.curvature.draw import draw
from align.diagnostics.curvature.measure import Settings, measure, preconditioned
from align.diagnostics.curvature.spectrum import density, hutchinson, lanczos, rademacher
from align.diagnostics.curvature.surface import Surface
from align.engine import enable_forest
from align.trainers.objectives import LanguageModel, RewardModel
from align.tuning.strategies import Tuning
from align.tuning.tune import tune


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(eigenvalues, seed=0):
    """A matrix with these eigenvalues."""
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator(seed), dtype=torch.double))
    return basis @ torch.diag(eigenvalues) @ basis.T


# -- matrices --------------------------------------------------------------------------------------------------------------------


def test_a_quadratic_is_measured_to_a_millionth():
    """Half of x'Hx has the Hessian H, whose eigenvalues are chosen: five large ones, one negative, the rest small."""
    eigenvalues = torch.cat([torch.tensor([100.0, 40.0, 20.0, 15.0, 11.0, -3.0]), torch.linspace(0, 1, 54)]).double()
    matrix = symmetric(eigenvalues)
    run = lanczos(matrix.mv, rademacher(eigenvalues, generator()), 30)
    found = run.genuine()
    assert found[-5:].tolist() == pytest.approx([11.0, 15.0, 20.0, 40.0, 100.0], rel=1e-6)
    assert found[0].item() == pytest.approx(-3.0, rel=1e-6)
    assert hutchinson(matrix.mv, eigenvalues, generator(), probes=60).mean == pytest.approx(eigenvalues.sum().item(), rel=1e-6)


def test_ghosts_are_not_counted():
    """Far more steps than distinct eigenvalues: without reorthogonalization rounding finds the large ones again and again."""
    eigenvalues = torch.cat([torch.tensor([1000.0, 500.0]), torch.linspace(0, 1, 300)]).double()
    run = lanczos(symmetric(eigenvalues).mv, rademacher(eigenvalues, generator()), 60)
    values = run.eigenvalues()[0]
    assert (values > 499).sum() > 2, "there are ghosts to remove"
    large = [value for value in run.genuine().tolist() if value > 2]
    assert large == pytest.approx([500.0, 1000.0], rel=1e-9)


def test_the_trace_comes_with_its_error():
    """Random signs give the trace of a diagonal matrix at once, and of another within a few of its own standard errors."""
    diagonal = torch.linspace(0, 3, 200, dtype=torch.double)
    exact = hutchinson(lambda z: diagonal * z, diagonal, generator(), probes=20)
    assert (exact.mean, exact.probes) == (pytest.approx(300.0), 8)
    matrix = symmetric(torch.linspace(-1, 3, 200).double())
    found = hutchinson(matrix.mv, diagonal, generator(), probes=100, tolerance=0.0)
    assert found.probes == 100
    assert 0 < found.error < 3
    assert abs(found.mean - 200) < 3 * found.error


def test_the_density_has_the_moments_of_the_spectrum():
    """Quadrature of k steps is exact for polynomials up to degree 2k - 1 in the start: mean and mean square are the matrix's."""
    matrix = symmetric(torch.linspace(-2, 5, 80).double())
    starts = [rademacher(matrix[0], generator(seed)) for seed in range(6)]
    found = density([lanczos(matrix.mv, start, 12) for start in starts])
    assert found.weights.sum().item() == pytest.approx(1.0)
    first = sum((z @ matrix @ z / (z @ z)).item() for z in starts) / 6
    second = sum((z @ matrix @ matrix @ z / (z @ z)).item() for z in starts) / 6
    assert (found.weights @ found.values).item() == pytest.approx(first)
    assert (found.weights @ found.values**2).item() == pytest.approx(second)
    grid = torch.linspace(-6, 9, 3001, dtype=torch.double)
    assert (found.smoothed(grid, 0.2).sum() * 0.005).item() == pytest.approx(1.0, abs=1e-3)


# -- models ----------------------------------------------------------------------------------------------------------------------


def small(score_head=False, lora=False):
    """A Llama whose trainable parameters are few enough for an exact Hessian: one layer's, or its adapters'."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = llama(score_head=score_head, **sizes)
    if lora:
        model = tune(model, Tuning("lora", {"r": 1, "alpha": 2}))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator(3)) / 4)
    else:
        for name, weight in model.named_parameters():
            weight.requires_grad_("self_attn" in name or name.startswith("score"))
    assert enable_forest(model) is None
    return model


def exact_hessian(model, loss_of):
    """The Hessian by `torch.autograd.functional`, through the model's own forward with eager attention, a sequence at a time."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    weights = [dict(model.named_parameters())[name].detach() for name in names]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation("eager")

    def loss(flat):
        parts = flat.split([w.numel() for w in weights])
        changed = {name: part.view_as(w) for name, part, w in zip(names, parts, weights, strict=True)}

        def call(ids):
            return functional_call(model, changed, (), {"input_ids": torch.tensor([ids]), "use_cache": False}).logits[0]

        return loss_of(call)

    try:
        return torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in weights]))
    finally:
        base.set_attn_implementation(before)


def language_loss(trees):
    def loss_of(call):
        total, count = 0.0, 0
        for tree in trees:
            for whole, wanted in sequences(tree):
                logps = call(whole).log_softmax(-1)
                total = total - sum(logps[i - 1, whole[i]] for i in wanted)
                count += len(wanted)
        return total / count

    return loss_of


def pair_loss(trees):
    def loss_of(call):
        margins = [call(tree.prompt + tree.branches[0])[0] - call(tree.prompt + tree.branches[1])[0] for tree in trees]
        return -torch.stack(margins).sigmoid().log().mean()

    return loss_of


CASES = {
    "all weights": (lambda: small(), LanguageModel(), documents(1, 3), language_loss),
    "an adapter": (lambda: small(lora=True), LanguageModel(), documents(1, 3), language_loss),
    "a reward model": (lambda: small(score_head=True), RewardModel(), pairs(1, 3), pair_loss),
}


@pytest.mark.parametrize("case", CASES)
def test_top_eigenvalue_and_trace_are_the_exact_ones(case):
    build, objective, trees, loss_of = CASES[case]
    model = build()
    surface = Surface(model, objective, trees, max_tokens=24)
    assert len(surface.forests) > 1, "products are summed over packs"
    exact = exact_hessian(model, loss_of(trees)).double()
    vector = torch.randn(surface.size, generator=generator())
    product = surface.product(vector)
    assert (product - exact.float() @ vector).norm() / product.norm() < 1e-4
    values = torch.linalg.eigvalsh(exact)
    found = lanczos(surface.product, rademacher(vector, generator()), 24).genuine()
    assert found[-1].item() == pytest.approx(values[-1].item(), rel=0.01)
    trace = hutchinson(surface.product, vector, generator(), probes=surface.size)
    assert trace.mean == pytest.approx(exact.trace().item(), rel=0.01)


def test_lines_and_sharpness_leave_the_weights_alone():
    model = small()
    surface = Surface(model, LanguageModel(), documents(2, 3), 64)
    before, gradient = [p.detach().clone() for p in surface.parameters], surface.gradient()
    direction = landscape.filter_normalized(surface, generator())
    for part, weight in zip(surface.split(direction), surface.parameters, strict=True):
        assert torch.allclose(part.norm(dim=1), weight.norm(dim=1), rtol=1e-5)
    low, here, high = landscape.along(surface, direction, [-0.1, 0.0, 0.1])
    assert here == surface.loss() != low != high
    # For a small step the rise is rho |g|, for a larger one the curvature adds to it.
    assert landscape.sharpness(surface, gradient, 1e-3) == pytest.approx(1e-3 * gradient.norm().item(), rel=0.02)
    assert all(map(torch.equal, surface.parameters, before))


def test_adams_hessian():
    """P^-1/2 H P^-1/2 with P from the squared gradients of the forests."""
    surface = Surface(small(), LanguageModel(), documents(1, 3), 24)
    scale = surface.squared_gradients().sqrt()
    scale = (scale + 1e-8 + 1e-3 * scale.mean()).rsqrt()
    vector = torch.randn(surface.size, generator=generator())
    expected = scale * surface.product(scale * vector)
    assert (preconditioned(surface)(vector) - expected).norm() < 1e-4 * expected.norm()


def test_what_is_measured_counts_its_cost():
    surface = Surface(small(), LanguageModel(), documents(1, 3), 24)
    found = measure(surface, Settings(steps=6, starts=2, probes=8, points=3))
    cost = found["cost"]
    assert cost["products"] == 3 * 6 + found["trace"]["probes"]
    assert cost["training_steps"] == pytest.approx(cost["seconds"] / cost["seconds_a_training_step"], rel=0.05)
    assert found["largest_learning_rate"]["gradient_descent"] == pytest.approx(2 / found["top_eigenvalue"])
    assert found["largest_learning_rate"]["adam"] == pytest.approx(38 / found["adam_top_eigenvalue"])
    json.dumps(found, allow_nan=False)


# -- the command -----------------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path, tokenizer, capsys):
    from align.cli import main
    from align.data import write_rows

    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    draw = random.Random(0)
    write_rows(data, [{"prompt": "Say it.", "completion": " ".join(draw.choices(["one", "two", "cat"], k=3))} for _ in range(6)])
    fast = ["--steps", "4", "--probes", "4"]
    assert main(["curvature", str(model), "--data", str(data), *fast, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == llama().num_parameters()
    assert found == json.loads((model / "curvature" / "curvature.json").read_text())
    assert (model / "curvature" / "curvature.svg").read_text().count("<svg") == 1
    assert main(["curvature", str(model), "--data", str(data), *fast, "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "as long as" in said
    assert "  loss  " in said, "of the rows that were measured: none were held out"
    assert "held-out" not in said
    assert main(["curvature", str(model), "--data", str(data), "--kind", "preference"]) == 2
    assert "is a language model" in capsys.readouterr().err
    assert main(["curvature", str(model), "--data", str(data), "--checkpoints"]) == 2
    assert "has no checkpoints" in capsys.readouterr().err
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-9 (copy)"):  # of the last the command knows nothing
        (model / "checkpoints" / name).mkdir(parents=True)
    assert main(["curvature", str(model), "--data", str(data), "--checkpoints", "--plan", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["measure"]) == ["step 9", "step 10", "final"]


def test_mistakes_are_told_before_anything_is_measured(tmp_path, tokenizer, capsys, monkeypatch):
    from align.cli import main
    from align.data import write_rows
    from align.diagnostics.curvature import measure

    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    llama().save_pretrained(model)
    tokenizer.save_pretrained(model)
    write_rows(data, [{"prompt": "Say it.", "completion": "one two"}])
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))
    for more, message in (
        (["--eval_data", str(tmp_path / "none.jsonl")], "none.jsonl: no such file"),
        (["--out", str(data)], "is a file, not a folder"),
        (["--max_length", "0"], "must be at least 1"),
        (["--max_tokens_per_micro_batch", "0"], "must be at least 1"),
        (["--probes", "1"], "--probes must be at least 2"),
    ):
        assert main(["curvature", str(model), "--data", str(data), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (model / "curvature").exists()


def test_several_checkpoints_are_drawn_with_their_names(tmp_path):
    lines = {"lengths": [-1.0, 0.0, 1.0], "random": [2.0, 1.0, 2.0], "gradient": [3.0, 1.0, 2.0]}
    one = {"density": {"values": [0.0, 1.0], "weights": [0.5, 0.5]}, "parameters": 9, "lines": lines}
    measured = [{**one, "name": f"step {i}", "top_eigenvalue": 1.0 * i, "held_out_perplexity": 9.0 - i} for i in (1, 2)]
    draw(tmp_path / "curvature.svg", measured)
    drawn = (tmp_path / "curvature.svg").read_text()
    assert all(name in drawn for name in ("step 1", "step 2", "top eigenvalue", "held-out perplexity"))
    draw(tmp_path / "curvature.svg", measured[1:])
    assert "step 2" not in (tmp_path / "curvature.svg").read_text(), "one is not compared with itself"
