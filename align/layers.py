"""Parts of layers that read memory more than they compute, in fewer passes over it and with less kept for the backward pass: norms,
gated feed-forward blocks and rotary positions, in fp32 on a CPU. Most families have them from Llama, word for word.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from inspect import unwrap
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

ROTATION, HALVES = "apply_rotary_pos_emb", "rotate_half"
"""What families call the function that turns queries and keys by their positions, and its part."""

Rotation = Callable[..., tuple[Tensor, Tensor]]


def in_fewer_passes(module: nn.Module) -> None:
    """Let the layers in `module` do what is Llama's in fewer passes. Norms and blocks are given another class. The rotation is
    called by its name, so the name is given another function: for all models of the family in this process.
    """
    for part in module.modules():
        kind: Any = type(part)
        done = _done(kind.forward)
        if done == NORM:
            part.__class__ = _with(Norm, kind)
        elif done == BLOCK and isinstance(part.act_fn, nn.SiLU | SiLUActivation):
            part.__class__ = _with(GatedBlock, kind)
    for code in {sys.modules.get(type(part).__module__) for part in module.modules()}:
        rotate = getattr(code, ROTATION, None)
        if rotates_as_llama(code):
            setattr(code, ROTATION, Rotary(rotate))  # type: ignore[arg-type]


def rotates_as_llama(code: Any) -> bool:
    """Whether the function of the module `code` is Llama's."""
    return all(_done(getattr(code, name, None)) == done for name, done in ROTATIONS.items())


def _done(function: Any) -> Any:
    """What a function does, without what is written about it; what is no function of Python's is itself."""
    own = unwrap(function) if callable(function) else function
    code = getattr(own, "__code__", None)
    if not isinstance(code, CodeType):
        return function
    return code.co_code, code.co_names, code.co_varnames, [x for x in code.co_consts if x != own.__doc__], own.__defaults__


NORM, BLOCK = _done(LlamaRMSNorm.forward), _done(LlamaMLP.forward)
ROTATIONS = {name: _done(getattr(modeling_llama, name)) for name in (ROTATION, HALVES)}


@cache
def _with(way: Any, kind: Any) -> Any:
    """The class `kind`, whose forward is that of `way`."""
    return type(kind.__name__, (way, kind), {"__module__": kind.__module__})


def _plain(*tensors: Tensor) -> bool:
    """Whether this is what is faster here. On the meta device it is measured what a CPU would hold."""
    kinds = {(x.device.type, x.dtype) for x in tensors}
    here = kinds <= {("cpu", torch.float32)} or kinds <= {("meta", torch.float32)}
    return here and not torch.compiler.is_compiling()


class _Shorter(torch.autograd.Function):
    """A function with a backward pass by hand, which is differentiated again as the plain one is."""

    plain: Callable[..., Tensor]

    @classmethod
    def again(cls, ctx: Any, inputs: tuple[Any, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `inputs`, to be differentiated."""
        wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
        found = iter(torch.autograd.grad(cls.plain(*inputs), wanted, gradient, create_graph=True))
        return tuple(next(found) if need else None for need in ctx.needs_input_grad)


# -- norms -----------------------------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    """Root mean square norm (arXiv 1910.07467, equation 4)."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., hidden) to (..., hidden)."""
        if not _plain(hidden_states, self.weight):
            return super().forward(hidden_states)
        return _Normed.apply(hidden_states, self.weight, self.variance_epsilon)


class _Normed(_Shorter):
    @staticmethod
    def plain(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        ctx.epsilon = epsilon
        return (x * factor).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, factor = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Normed.again(ctx, (x, weight, ctx.epsilon), gradient)
        to_x, to_weight, _ = ctx.needs_input_grad
        normed = x * factor
        found = None
        if to_x:
            found = gradient * weight
            along = torch.linalg.vecdot(found, normed).div_(x.shape[-1])
            found.addcmul_(normed, along[..., None], value=-1).mul_(factor)
        return found, normed.mul_(gradient).flatten(0, -2).sum(0) if to_weight else None, None


# -- gated blocks ----------------------------------------------------------------------------------------------------------------


class GatedBlock(nn.Module):
    """A feed-forward block with a gate of SiLU (SwiGLU, arXiv 2002.05202, equation 6)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """x (..., hidden) to (..., hidden)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(_Gated.apply(gate, up) if _plain(gate, up) else self.act_fn(gate) * up)


class _Gated(_Shorter):
    @staticmethod
    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return silu(gate) * up

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Gated.again(ctx, (gate, up), gradient)
        to_gate, to_up = ctx.needs_input_grad
        return (
            torch.ops.aten.silu_backward(gradient * up, gate) if to_gate else None,
            silu(gate).mul_(gradient) if to_up else None,
        )


# -- rotary positions ------------------------------------------------------------------------------------------------------------


class Rotary:
    """Turns queries and keys by their positions (RoFormer, arXiv 2104.09864, equation 34), as the family's `own` function does."""

    def __init__(self, own: Rotation) -> None:
        self.own = own

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        """q and k (batch, heads, tokens, dim), cos and sin (batch, tokens, dim)."""
        if not _plain(q, k, cos, sin) or q.shape[-1] != cos.shape[-1] or cos.requires_grad or sin.requires_grad:
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
    """Each pair of an entry of the first half and one of the second, turned."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
