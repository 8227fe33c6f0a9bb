"""LoRA's updates added by one product: peft's own layers say what is right."""

from copy import deepcopy

import pytest
import torch
from helpers import assert_close, llama
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from align.engine import enable_forest
from align.low_rank import LowRank, by_one_product
from align.tuning.strategies import Tuning
from align.tuning.tune import tune


class Net(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        self.up, self.down = (Conv1D(24, 12), Conv1D(12, 24)) if transposed else (nn.Linear(12, 24), nn.Linear(24, 12, bias=False))

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(transposed=False, **config):
    torch.manual_seed(0)
    model = get_peft_model(Net(transposed), LoraConfig(lora_alpha=5, target_modules=["up", "down"], r=3, **config))
    model.add_adapter("other", LoraConfig(lora_alpha=1, target_modules=["down"], r=2, **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model


def outcome(model, x, precision):
    """The answer, and the gradients of the input and of what trains."""
    torch.manual_seed(1)  # of the dropout
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        answer = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(answer.float().square().sum(), [x, *trained], allow_unused=True)
    return [answer, *(gradient for gradient in found if gradient is not None)]


STATES = ("training", "evaluating", "other", "none", "merged", "both")
EXACT = [
    ({}, False),
    ({"lora_dropout": 0.4}, False),
    ({"use_rslora": True}, False),
    ({"use_dora": True}, False),
    ({"lora_bias": True}, False),
    ({"fan_in_fan_out": True}, True),
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("config", "transposed", "precision"),
    [*((*each, "float64") for each in EXACT), ({}, False, "float32"), ({}, False, "autocast"), ({}, False, "base in bfloat16")],
)
def test_the_layer_is_pefts(config, transposed, precision, state):
    if state == "merged" and "lora_bias" in config:
        pytest.skip("peft does not merge it into a layer without a bias")
    theirs = adapted(transposed, **config).train(state == "training")
    x = torch.randn(2, 5, 12)
    if precision == "float64":
        theirs, x = theirs.double(), x.double()
    if precision == "base in bfloat16":
        x = x.bfloat16()
        for name, parameter in theirs.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    if state == "other":
        theirs.set_adapter("other")
    elif state == "both":
        theirs.base_model.set_adapter(["default", "other"])
    elif state == "merged":
        theirs.merge_adapter()
    elif state == "none":
        theirs.base_model.disable_adapter_layers()
    ours = deepcopy(theirs)
    by_one_product(ours)
    assert [type(layer) for layer in (theirs.up, ours.up, ours.down)] == [Linear, LowRank, LowRank]
    for got, wanted in zip(outcome(ours, x, precision), outcome(theirs, x, precision), strict=True):
        assert got.dtype == wanted.dtype
        assert_close(got, wanted, {"float64": 1e-12, "float32": 1e-5}.get(precision, 0.02))


def test_gradients_are_those_of_a_finite_difference():
    """The second ones, too, by which curvature is measured."""
    ours = adapted().double()
    by_one_product(ours)
    layer = ours.up
    x, a, b = torch.randn(4, 12).double(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    arguments = (x.requires_grad_(), a, b)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), arguments)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), arguments)


def test_every_adapter_of_a_model_on_the_forest_is_added_so():
    model = tune(llama(), Tuning("lora", {"r": 4}))
    enable_forest(model)
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert all(type(layer) is LowRank for layer in layers)
