"""Rotary positions in fewer passes: transformers' own function says what is right, in every derivative."""

import importlib

import pytest
import torch
from helpers import llama
from test_onednn import derivatives
from transformers.models.llama import modeling_llama

from align import rotary
from align.engine import enable_forest
from align.forest import Tree, plant
from align.rotary import Rotary, by_halves

FOREST = plant([Tree([5, 6, 7], ([8] * 4, [9, 10])), Tree([11] * 6, ([12] * 3,))])


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Llama's function, which is called by its name again when the test ends."""
    function = modeling_llama.apply_rotary_pos_emb
    function = function.own if isinstance(function, Rotary) else function
    monkeypatch.setattr(modeling_llama, rotary.NAME, function)
    return function


def inputs(dtype=torch.float32, heads=3, kv_heads=2, tokens=5, dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, tokens, heads, dim), (1, tokens, kv_heads, dim)
    q, k = (torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes)
    # Not as models have them, where both halves are the same: the gradient is right for any.
    cos, sin = (torch.randn(1, tokens, dim, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, cos, sin


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_every_derivative_is_that_of_transformers(own, tokens):
    q, k, cos, sin = inputs(tokens=tokens)

    def both(rotate):
        return lambda q, k: torch.cat(rotate(q, k, cos, sin), dim=1)

    for ours, theirs in zip(derivatives(both(Rotary(own)), q, k), derivatives(both(own), q, k), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_heads_behind_the_tokens(own):
    q, k, cos, sin = inputs()
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    for ours, theirs in zip(Rotary(own)(q, k, cos, sin, unsqueeze_dim=2), own(q, k, cos, sin, unsqueeze_dim=2), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("what", ["16 bits", "frequencies that train", "halves of other sizes"])
def test_all_else_is_left_to_transformers(what):
    """Its function is called with what came."""
    called = []
    q, k, cos, sin = inputs(torch.bfloat16 if what == "16 bits" else torch.float32)
    if what == "frequencies that train":
        cos.requires_grad_()
    if what == "halves of other sizes":
        cos = cos[..., :1]
    rotate = Rotary(lambda *args: called.append(args) or (q, k))
    assert rotate(q, k, cos, sin, 1) == (q, k)
    ((_, _, given, _, _),) = called
    assert given is cos


def test_an_enabled_model_rotates_so_and_answers_as_before(own):
    """Also where it is trained: the gradients are those with transformers' function."""
    model = llama()

    def outcome():
        answer = model(forest=FOREST, read="sources").logps
        return [answer, *torch.autograd.grad(answer.sum(), list(model.parameters()))]

    enable_forest(model)
    assert isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
    ours = outcome()
    modeling_llama.apply_rotary_pos_emb = own
    for found, expected in zip(ours, outcome(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_it_is_put_in_place_once(own):
    by_halves(llama())
    first = modeling_llama.apply_rotary_pos_emb
    by_halves(llama())
    assert modeling_llama.apply_rotary_pos_emb is first
    assert first.own is own


FAMILIES = {"llama": True, "mistral": True, "qwen2": True, "qwen3": True, "gemma2": True, "cohere": False, "phi3": False}


@pytest.mark.parametrize(("family", "same"), FAMILIES.items())
def test_which_families_have_llamas_function(family, same):
    code = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    placed = isinstance(code.apply_rotary_pos_emb, Rotary)  # by a test before
    assert (placed or rotary._same(code, rotary.NAME)) == same


def test_a_function_that_does_something_else_by_the_name_stays(monkeypatch):
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q * cos.unsqueeze(unsqueeze_dim), k

    monkeypatch.setattr(modeling_llama, rotary.NAME, apply_rotary_pos_emb)
    by_halves(llama())
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb


def test_another_rotation_of_halves_stays(monkeypatch, own):
    monkeypatch.setattr(modeling_llama, rotary.HALVES, lambda x: -x)
    by_halves(llama())
    assert modeling_llama.apply_rotary_pos_emb is own
