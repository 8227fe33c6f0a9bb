"""Rotary positions in fewer passes over queries and keys than transformers' function takes, in fp32 on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import unwrap
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

NAME, HALVES = "apply_rotary_pos_emb", "rotate_half"
"""What families call the function, which most of them have a copy of, and its part."""

Rotation = Callable[..., tuple[Tensor, Tensor]]


def by_halves(module: nn.Module) -> None:
    """Let the layers in `module` rotate as `Rotary` does, where their own function is Llama's word for word. They call it by its
    name, so the name is given another: for all models of the family in this process.
    """
    for code in {sys.modules[type(part).__module__] for part in module.modules()}:
        rotate = getattr(code, NAME, None)
        if callable(rotate) and not isinstance(rotate, Rotary) and _same(code, NAME) and _same(code, HALVES):
            setattr(code, NAME, Rotary(rotate))


def _same(code: Any, name: str) -> bool:
    """Whether the function `name` of the module `code` is Llama's."""
    return LLAMAS[name] is not None and _read(getattr(code, name, None)) == LLAMAS[name]


def _read(function: Any) -> tuple[Any, ...] | None:
    """What a function does, without what is written about it."""
    code = getattr(unwrap(function), "__code__", None) if callable(function) else None
    if not isinstance(code, CodeType):
        return None
    told = getattr(unwrap(function), "__doc__", None)
    return code.co_code, code.co_names, code.co_varnames, [x for x in code.co_consts if x != told], unwrap(function).__defaults__


LLAMAS = {name: _read(getattr(modeling_llama, name)) for name in (NAME, HALVES)}


class Rotary:
    """Turns queries and keys by their positions, as `own` does."""

    def __init__(self, own: Rotation) -> None:
        self.own = own

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """q and k (batch, heads, tokens, dim), cos and sin (batch, tokens, dim)."""
        plain = all(x.is_cpu and x.dtype == torch.float32 for x in (q, k, cos, sin)) and q.shape[-1] == cos.shape[-1]
        if not plain or cos.requires_grad or sin.requires_grad or torch.compiler.is_compiling():
            return self.own(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)


class _Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of an entry of the first half and one of the second, turned (RoFormer, arXiv 2104.09864, equation 34)."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
