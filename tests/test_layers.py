"""Norms, gated blocks and rotary positions in fewer passes: transformers' own code says what is right, in every derivative."""

import importlib
from copy import deepcopy

import pytest
import torch
from helpers import llama
from test_onednn import derivatives
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from align import layers
from align.engine import enable_forest
from align.layers import GatedBlock, Norm, Rotary, in_fewer_passes, rotates_as_llama


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """Llama's rotation, which is called by its name again when the test ends."""
    function = modeling_llama.apply_rotary_pos_emb
    function = function.own if isinstance(function, Rotary) else function
    monkeypatch.setattr(modeling_llama, layers.ROTATION, function)
    return function


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).norm() <= 1e-5 * other.norm()


# -- a whole model -----------------------------------------------------------------------------------------------------------------


def outcome(model, trained=None):
    """Logits, and the first and second derivatives of what trains."""
    model.set_attn_implementation("eager")  # the others have no second derivative
    parameters = [p for name, p in model.named_parameters() if trained is None or trained in name]
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_()
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]), use_cache=False).logits
    first = torch.autograd.grad(logits.sin().sum(), parameters, create_graph=True)
    along = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in first)
    return [logits, *first, *torch.autograd.grad(along, parameters)]


@pytest.mark.parametrize("trained", [None, "norm", "up_proj", "gate_proj", "embed"])
def test_a_model_answers_and_learns_as_before(trained):
    model = llama()
    theirs = outcome(model, trained)
    in_fewer_passes(model)
    assert isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
    assert_same(outcome(model, trained), theirs)


def test_enabled_models_do_so_and_keep_their_names_and_weights():
    model, before = llama(), llama()
    enable_forest(model)
    kinds = {type(part) for part in model.modules()}
    assert {kind.__name__ for kind in kinds if issubclass(kind, Norm | GatedBlock)} == {"LlamaRMSNorm", "LlamaMLP"}
    assert not {LlamaRMSNorm, LlamaMLP} & kinds
    assert model.state_dict().keys() == before.state_dict().keys()
    assert type(deepcopy(model.model.norm)) is type(model.model.norm)


def test_doing_it_twice_changes_nothing(own):
    model = llama()
    in_fewer_passes(model)
    kinds, first = [type(part) for part in model.modules()], modeling_llama.apply_rotary_pos_emb
    in_fewer_passes(model)
    assert [type(part) for part in model.modules()] == kinds
    assert modeling_llama.apply_rotary_pos_emb is first
    assert first.own is own


def test_in_16_bits_it_is_transformers_own_to_the_bit():
    model, ids = llama().to(torch.bfloat16), torch.tensor([[5, 6, 7, 8, 9]])
    theirs = model(input_ids=ids).logits
    in_fewer_passes(model)
    assert torch.equal(model(input_ids=ids).logits, theirs)


FAMILIES = {
    "llama": {Norm, GatedBlock, Rotary},
    "mistral": {Norm, GatedBlock, Rotary},
    "qwen2": {Norm, GatedBlock, Rotary},
    "qwen3": {Norm, GatedBlock, Rotary},
    "gemma2": {Rotary},  # its norm adds 1 to its weight, and its gate is no SiLU
    "cohere": {GatedBlock},  # it turns neighbours, and not halves
    "phi3": {Norm},  # one layer for both halves of the block
    "gpt2": set(),
}


@pytest.mark.parametrize(("family", "expected"), FAMILIES.items())
def test_what_families_have_of_llama(family, expected):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    config = AutoConfig.for_model(family, **small, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    in_fewer_passes(model)
    code = importlib.import_module(type(model).__module__)
    found = {way for way in (Norm, GatedBlock) if any(isinstance(part, way) for part in model.modules())}
    assert found | ({Rotary} if isinstance(getattr(code, layers.ROTATION, None), Rotary) else set()) == expected


def test_a_gate_of_another_kind_stays():
    model = llama()
    model.model.layers[0].mlp.act_fn = nn.GELU()
    in_fewer_passes(model)
    assert [isinstance(layer.mlp, GatedBlock) for layer in model.model.layers] == [False, *[True] * (len(model.model.layers) - 1)]


# -- less is kept ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "before", "after"), [(lambda: LlamaRMSNorm(8), 2, 1), (lambda: block(), 4, 3)])
def test_less_is_kept_for_the_backward_pass(make, before, after):
    """Tensors as large as the widest one of the layer, of so many rows that weights are small beside them."""
    layer = make()

    def kept():
        sizes = []
        x = torch.randn(1, 1000, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda y: sizes.append((y.data_ptr(), y.numel())) or y, lambda y: y):
            layer(x)
        return len({size for size in sizes if size[1] >= 1000 * (24 if after > 1 else 8)})

    assert kept() == before
    in_fewer_passes(layer)
    assert kept() == after


def block():
    return LlamaMLP(type("Config", (), {"hidden_size": 8, "intermediate_size": 24, "mlp_bias": False, "hidden_act": "silu"}))


# -- rotary positions --------------------------------------------------------------------------------------------------------------


def inputs(dtype=torch.float32, heads=3, kv_heads=2, tokens=5, dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (1, tokens, heads, dim), (1, tokens, kv_heads, dim)
    q, k = (torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes)
    # Not as models have them, where both halves are the same: the gradient is right for any.
    cos, sin = (torch.randn(1, tokens, dim, generator=generator, dtype=dtype) for _ in range(2))
    return q, k, cos, sin


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_every_derivative_of_the_rotation_is_that_of_transformers(own, tokens):
    q, k, cos, sin = inputs(tokens=tokens)

    def both(rotate):
        return lambda q, k: torch.cat(rotate(q, k, cos, sin), dim=1)

    assert_same(derivatives(both(Rotary(own)), q, k), derivatives(both(own), q, k))


def test_heads_behind_the_tokens(own):
    q, k, cos, sin = inputs()
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    assert_same(Rotary(own)(q, k, cos, sin, unsqueeze_dim=2), own(q, k, cos, sin, unsqueeze_dim=2))


@pytest.mark.parametrize("what", ["16 bits", "frequencies that train", "halves of other sizes"])
def test_all_else_is_left_to_transformers_rotation(what):
    """It is called with what came."""
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


def test_a_function_that_does_something_else_by_the_name_stays(monkeypatch):
    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return q * cos.unsqueeze(unsqueeze_dim), k

    monkeypatch.setattr(modeling_llama, layers.ROTATION, apply_rotary_pos_emb)
    in_fewer_passes(llama())
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb


def test_another_rotation_of_halves_stays(monkeypatch, own):
    monkeypatch.setattr(modeling_llama, layers.HALVES, lambda x: -x)
    in_fewer_passes(llama())
    assert not rotates_as_llama(modeling_llama)
    assert modeling_llama.apply_rotary_pos_emb is own
