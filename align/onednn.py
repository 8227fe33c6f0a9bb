"""Matrix products in fp32 by oneDNN instead of MKL, on processors where that is faster."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CPU_INFO = Path("/proc/cpuinfo")

KEPT = 32
"""Shapes of products that oneDNN keeps its kernels for: those of one pass. Each holds memory, up to a weight's, and forests of ever
new sizes would fill the usual 1,024 with gigabytes.
"""
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""What torch's and oneDNN's cache take their size from, when they are first used."""


@cache
def faster() -> bool:
    """Whether this is a processor of AMD's with AVX-512: oneDNN uses it, and MKL, which torch asks, does not."""
    return _on_amd("AVX512")


@cache
def faster_packed() -> bool:
    """Whether weights that are `packed` are multiplied faster, by few rows: on AMD's processors, where MKL is slow at it."""
    return _on_amd("AVX512", "AVX2")


def _on_amd(*capabilities: str) -> bool:
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in capabilities:
        return False
    maker = CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.exists() else platform.processor()
    return "AuthenticAMD" in maker


def by_onednn(module: nn.Module) -> None:
    """Let the linear layers in `module` multiply by `linear`, where that is `faster`."""
    if faster():
        _keep_few_kernels()
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = Linear


def _keep_few_kernels() -> None:
    for name in CACHES:
        os.environ.setdefault(name, str(KEPT))


class Linear(nn.Linear):
    """A linear layer that multiplies by `linear`."""

    def forward(self, input: Tensor) -> Tensor:  # as torch calls it
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch's: x (..., inputs) and weight (outputs, inputs) to (..., outputs), differentiable any number of times."""
    if torch.compiler.is_compiling() or not _suits(x, weight) or not faster():
        return functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """What else there is torch multiplies, or says that it does not fit."""
    fits = x.shape[-1:] == weight.shape[1:]
    return fits and x.dtype == weight.dtype == torch.float32 and x.is_cpu and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        to_x, to_weight, _ = ctx.needs_input_grad
        # Below an adapter, activations need not be kept.
        ctx.save_for_backward(x if to_weight else None, weight if to_x else None)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            linear(gradient, weight.T) if to_x else None,
            _of_weight(rows, x.reshape(-1, x.shape[-1])) if to_weight else None,
            rows.sum(0) if to_bias else None,
        )


def _of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """A weight's gradient (outputs, inputs) from rows (n, outputs) and (n, inputs). MKL is as fast as oneDNN here, and faster where
    its product has the fewer columns.
    """
    return gradient.T @ x if gradient.shape[1] >= x.shape[1] else (x.T @ gradient).T


# What torch's compiler calls for linear layers.


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` without a gradient, of a weight that may be `packed`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor) -> Tensor:
    """A copy of `weight` in the order in which oneDNN reads it."""
    _keep_few_kernels()
    return torch.ops.mkldnn._reorder_linear_weight(weight)
