"""Products by oneDNN are torch's up to rounding, in every derivative, and are used where MKL is slow."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import llama
from torch.nn import functional

from align import onednn
from align.engine import enable_forest
from align.forest import Tree, plant

FOREST = plant([Tree([5 + i] * 10, ([6] * 20, [7] * 15)) for i in range(8)])


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(onednn, "faster", lambda: True)


def derivatives(product, *inputs):
    """The result, its gradients, and theirs along one direction."""
    generator = torch.Generator().manual_seed(1)
    inputs = [x.clone().requires_grad_() for x in inputs]
    said = product(*inputs)
    first = torch.autograd.grad(said.sin().sum(), inputs, create_graph=True)
    along = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in first)
    return [said, *first, *torch.autograd.grad(along, inputs)]


@pytest.mark.parametrize("shape", [(12,), (0, 12), (7, 12), (2, 5, 12), (1, 1, 12)])
@pytest.mark.parametrize("outputs", [20, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_every_derivative_is_that_of_torch(faster, shape, outputs, bias):
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, generator=generator) for size in (shape, (outputs, 12), (outputs,))][: 2 + bias]
    for ours, theirs in zip(derivatives(onednn.linear, *inputs), derivatives(functional.linear, *inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_a_frozen_layer_reads_is_not_kept(faster):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        said = onednn.linear(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4))
    assert kept == [(5, 4)]
    said.sum().backward()


def test_a_weight_that_nothing_reads_back_may_change(faster):
    """The gradient of a layer's weight does not ask for the weight where nothing before the layer trains."""
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    said = onednn.linear(x, weight)
    with torch.no_grad():
        weight.mul_(2)
    said.sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


def test_only_gradients_that_are_needed_are_made(faster):
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    onednn.linear(x, weight).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))


@pytest.mark.parametrize("precise", [torch.float64, torch.bfloat16])
def test_other_types_are_multiplied_by_torch(faster, precise):
    x, weight = torch.randn(3, 4, dtype=precise), torch.randn(5, 4, dtype=precise)
    assert torch.equal(onednn.linear(x, weight), functional.linear(x, weight))
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.linear(x.float(), weight.float()).dtype == torch.bfloat16


def test_what_does_not_fit_is_told_of_as_torch_does(faster):
    with pytest.raises(RuntimeError, match=r"cannot be multiplied \(3x4 and 6x5\)"):
        onednn.linear(torch.randn(3, 4), torch.randn(5, 6))


def test_a_model_on_the_forest_multiplies_by_it(monkeypatch):
    """Its log-probs, gradients and names of weights are those without it, and a copy of it does the same."""

    def run(model):
        model.zero_grad()
        scores = model(forest=FOREST)
        scores.logps.mean().backward()
        return [scores.logps.detach(), *(x.grad for x in model.parameters())]

    monkeypatch.setattr(onednn, "faster", lambda: False)
    plain = llama()
    enable_forest(plain)
    assert not any(isinstance(layer, onednn.Linear) for layer in plain.modules())
    monkeypatch.setattr(onednn, "faster", lambda: True)
    model = llama()
    enable_forest(model)
    layers = [layer for layer in model.modules() if isinstance(layer, onednn.Linear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(layer) for layer in copy.deepcopy(model).modules()] == [type(layer) for layer in model.modules()]
    calls = []
    monkeypatch.setattr(onednn, "multiply", lambda *inputs, multiply=onednn.multiply: (calls.append(1), multiply(*inputs))[1])
    for ours, theirs in zip(run(model), run(plain), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert len(calls) > 2 * len(layers)


@pytest.mark.parametrize(
    ("capability", "maker", "expected"),
    [
        ("AVX512", "AuthenticAMD", (True, True)),
        ("AVX512", "GenuineIntel", (False, False)),
        ("AVX2", "AuthenticAMD", (False, True)),
        ("DEFAULT", "AuthenticAMD", (False, False)),
    ],
)
def test_it_is_used_on_the_processors_where_mkl_is_slow(capability, maker, expected, monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {maker}\n")
    monkeypatch.setattr(onednn, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert (onednn.faster.__wrapped__(), onednn.faster_packed.__wrapped__()) == expected
    (tmp_path / "cpuinfo").unlink()
    monkeypatch.setattr("platform.processor", lambda: f"Family 25, {maker}")
    assert (onednn.faster.__wrapped__(), onednn.faster_packed.__wrapped__()) == expected


GROWTH = """
import torch
from align import onednn
onednn.faster = lambda: True
layers = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.Linear(1024, 256))
onednn.by_onednn(layers)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def passes(sizes):
    for rows in sizes:
        layers(torch.ones(rows, 256, requires_grad=True)).sum().backward()

passes(range(300, 340))
before = resident()
passes(range(340, 540))
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="Linux alone tells what is resident")
def test_forests_of_ever_new_sizes_take_no_more_memory():
    """oneDNN keeps a kernel, and its memory, for each shape of a product; of 200 shapes they were hundreds of megabytes."""
    environment = {name: value for name, value in os.environ.items() if name not in onednn.CACHES}
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, env=environment)
    assert float(done.stdout) < 64
