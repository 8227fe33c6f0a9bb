"""Memory that is kept: a large tensor takes the place of the one before it, without asking the system."""

import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from align.allocator import LARGE_PAGES, large_pages, moments_first
from align.runner.zygote import Zygote

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")

LINUX = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGES = 2**26 // resource.getpagesize()

MAKES = f"""
import resource, torch
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MB, gone at once
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / {PAGES}
faults(30)  # until small tensors have found their places between the large ones
"""


STAGE = f"""
from align.runner.worker import attempt
from align.stages.base import Stage, stage
from pathlib import Path

@stage("makes_tensors")
class MakesTensors(Stage):
    def run(self, context):
        names = {{}}
        exec(MAKES, names)
        return names["faults"](10)

MAKES = {MAKES!r}
print(attempt(MakesTensors(), "makes", Path.cwd()))
"""


def said(code, folder, environment=()):
    """The number that a fresh process prints; this one's memory has had a life."""
    words, env = [sys.executable, "-c", code], {**os.environ, **dict(environment)}
    return float(subprocess.run(words, capture_output=True, text=True, check=True, cwd=folder, env=env).stdout)


def test_a_stage_keeps_the_memory_of_large_tensors(tmp_path):
    """Of ten tensors made one after the other, how many had to be faulted in."""
    assert said(MAKES + "print(faults(10))", tmp_path) > 9  # else there is nothing to keep
    assert said(STAGE, tmp_path) < 1


def test_stages_are_started_with_large_pages(monkeypatch):
    """A new tensor is faulted in by pages of 2 MB, not of 4 kB; what the user asks of glibc stays."""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=0")
    assert large_pages() == {"GLIBC_TUNABLES": f"glibc.malloc.perturb=0:{LARGE_PAGES}"}
    started = []

    def start(*args, env, **more):
        started.append(env)
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(FileNotFoundError):
        Zygote()
    assert started[0].items() >= large_pages().items()


@pytest.mark.skipif(not LINUX.exists() or "[never]" in LINUX.read_text(), reason="the system has no large pages for the asking")
def test_large_pages_are_fewer_faults(tmp_path):
    code = MAKES.replace("faults(30)", "") + "torch.ones(1); print(faults(1))"
    assert said(code, tmp_path) > 0.9
    assert said(code, tmp_path, large_pages()) < 0.1


def test_moments_made_first_are_those_that_the_first_step_would_make():
    """The same weights after three steps, of which the second leaves one weight without a gradient, and the same state."""
    weights, states = [], []
    for first in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters(), 1e-2, fused=True)
        if first:
            moments_first(optimizer)
            assert all(optimizer.state[weight]["exp_avg"].shape == weight.shape for weight in layer.parameters())
        for step in range(3):
            layer(torch.ones(1, 3) * step).square().sum().backward()
            if step == 1:
                layer.bias.grad = None
            optimizer.step()
            optimizer.zero_grad()
        weights.append([weight.detach() for weight in layer.parameters()])
        states.append([optimizer.state[weight] for weight in layer.parameters()])
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_other_optimizers_keep_their_own_ways():
    optimizer = torch.optim.SGD(torch.nn.Linear(3, 2).parameters(), 1e-2, momentum=0.9)
    moments_first(optimizer)
    assert not optimizer.state
