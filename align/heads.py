"""Log-probabilities of target tokens from hidden states, without ever holding (tokens, vocabulary) logits.

Logits are made in chunks, reduced, and made again in the backward pass, and in a second one: memory is flat in the vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.compiling import fused
from align.errors import AlignError
from align.onednn import linear
from align.ops import at_least_fp32

CHUNK_ELEMENTS = 2**22
"""Logits held at a time (16 MB in fp32)."""

ON_GPU = 64
"""So many times more of them on a GPU, whose products need more rows to be fast, and which does not make them fp32."""

COPIES = 8
"""How many tensors of a chunk's logits its second derivative holds: those chunks are so many times smaller."""


@dataclass(frozen=True)
class TokenScores:
    """What the head says of each target: all (targets,)."""

    logps: Tensor  # nats
    correct: Tensor  # bool: no token is likelier than the target
    entropy: Tensor | None = None  # nats, of the whole distribution at that position; where asked for
    values: Tensor | None = None  # of a score head on the same trunk; where asked for


@dataclass(frozen=True)
class Head:
    """An output projection and what the model does to its logits: ``softcap * tanh(scale * (W h + b) / softcap)``."""

    weight: Tensor  # (vocabulary, hidden)
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def products(self, hidden: Tensor) -> Tensor:
        """(n, hidden) to (n, vocabulary), neither scaled nor capped."""
        return linear(hidden, self.weight, self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) to (n, vocabulary), in fp32 or wider."""
        return _shaped(self.products(hidden), self.scale, self.softcap)


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model of transformers.

    Raises:
        AlignError: the output layer is not a plain linear layer (an adapter on ``lm_head``, say).
    """
    layer, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    kind = type(layer)
    if kind.__name__ == "FSDPLinear":  # a shard's class; its weight is whole since the norm before it ran, one group with it
        kind = kind.__bases__[-1]
    if kind is not nn.Linear:
        raise AlignError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__}, not a plain linear layer; "
            "if an adapter sits on it, take 'lm_head' out of its target modules"
        )
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, scale / divisor, getattr(config, "final_logit_softcapping", None))


def token_scores(
    hidden: Tensor, targets: Tensor, head: Head, temperature: float = 1.0, *, with_entropy: bool = False
) -> TokenScores:
    """Score `targets` (n,) from `hidden` (n, hidden) under `head`, logits divided by `temperature`. All sums are in fp32 or wider.

    Log-probs and entropy are differentiable, twice (for Hessians); `correct` is not.

    Args:
        with_entropy: entropy costs two more passes over the vocabulary, so it is left out unless asked for.
    """
    settings = _Settings(head.scale, head.softcap, temperature, with_entropy)
    logps, entropy, correct = _TokenScores.apply(hidden, head.weight, head.bias, targets, settings)
    return TokenScores(logps, correct, entropy)


@dataclass(frozen=True)
class _Settings:
    scale: float
    softcap: float | None
    temperature: float
    with_entropy: bool


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), settings.scale, settings.softcap)
        n = len(targets)
        logps, log_totals = (hidden.new_empty(n, dtype=at_least_fp32(dtype)) for _ in range(2))
        entropy = torch.empty_like(logps) if settings.with_entropy else None
        correct = torch.empty(n, dtype=torch.bool, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for part in _chunks(n, weight):
                products = head.products(hidden[part].to(dtype))
                logps[part], log_totals[part], correct[part], found = _read(products, targets[part], settings)
                if entropy is not None and found is not None:
                    entropy[part] = found
        ctx.save_for_backward(hidden, weight, bias, targets, log_totals, entropy)
        ctx.dtype, ctx.settings = dtype, settings
        ctx.mark_non_differentiable(correct)
        return logps, entropy, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, entropy = ctx.saved_tensors
        constant = None if entropy is None else entropy.detach()  # its part in the second derivative is in that of the inputs
        found = _Gradient.apply(*gradients[:2], *saved, constant, ctx.dtype, ctx.settings, ctx.needs_input_grad[:3])
        return *found, None, None


class _Gradient(torch.autograd.Function):
    """The gradient of `_TokenScores`, itself a function that can be differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_logps: Tensor,
        grad_entropy: Tensor | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        log_totals: Tensor,
        entropy: Tensor | None,
        dtype: torch.dtype,
        settings: _Settings,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x) if x is not None and need else None for x, need in zip((hidden, weight, bias), needed, strict=True)
        )
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), settings.scale, settings.softcap)
        of_entropy = grad_entropy if grad_entropy is not None and grad_entropy.any() else None
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight):
                h = hidden[part].to(dtype)
                products = head.products(h)
                to_entropy, said = (None if x is None else x[part] for x in (of_entropy, entropy))
                grad = _slopes(products, targets[part], log_totals[part], grad_logps[part], to_entropy, said, settings)
                if grad_hidden is not None:
                    grad_hidden[part] = linear(grad, head.weight.T).to(hidden.dtype)
                if grad_weight is not None:
                    if dtype == weight.dtype:
                        grad_weight.addmm_(grad.T, h)
                    elif grad.is_cuda and weight.dtype == torch.float32:  # summed in fp32
                        torch.addmm(grad_weight, grad.T, h, out_dtype=weight.dtype, out=grad_weight)
                    else:
                        grad_weight += grad.T @ h
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_logps, grad_entropy, hidden, weight, bias, targets)
        ctx.dtype, ctx.settings = dtype, settings
        return grad_hidden, grad_weight, grad_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        """By PyTorch's own operations, chunk by chunk."""
        inputs: tuple[Any, ...] = ctx.saved_tensors[:-1]
        targets = ctx.saved_tensors[-1]
        found = [torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        for part in _chunks(len(targets), inputs[3], COPIES):
            places = [part, part, part, slice(None), slice(None)]
            leaves: list[Any] = [
                None if x is None else x[at].detach().requires_grad_(need)
                for x, at, need in zip(inputs, places, ctx.needs_input_grad, strict=False)
            ]
            with torch.enable_grad(), torch.autocast(targets.device.type, enabled=False):
                said = _weighted(leaves, targets[part], ctx.dtype, ctx.settings)
                ways = [
                    (x, v[at])
                    for x, v, at in zip(leaves[2:], directions, places[2:], strict=True)
                    if v is not None and x.requires_grad
                ]
                gradient = torch.autograd.grad(said, [x for x, _ in ways], create_graph=True)
                along = torch.stack([(g * v).sum() for g, (_, v) in zip(gradient, ways, strict=True)]).sum()
                wanted = [x for x in leaves if x is not None and x.requires_grad]
                second = list(torch.autograd.grad(along, wanted, allow_unused=True))
            for whole, at in zip(found, places, strict=True):
                if whole is not None and (piece := second.pop(0)) is not None:
                    whole[at] += piece
        return *found, None, None, None, None, None, None


def _weighted(inputs: list[Any], targets: Tensor, dtype: torch.dtype, settings: _Settings) -> Tensor:
    """The sum of log-probs and entropies, each times its gradient, plainly."""
    grad_logps, grad_entropy, hidden, weight, bias = inputs
    head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), settings.scale, settings.softcap)
    log_p = (head.logits(hidden.to(dtype)) / settings.temperature).log_softmax(1)
    said = (log_p.gather(1, targets[:, None])[:, 0] * grad_logps).sum()
    if settings.with_entropy and grad_entropy is not None:
        said = said - ((log_p.exp() * log_p).sum(1) * grad_entropy).sum()
    return said


@fused
def _read(products: Tensor, targets: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the forward pass says of `targets` (n,) by the head's `products` (n, vocabulary): log-probs, the logarithm of what
    probabilities are divided by, whether no token is likelier, and the entropy where it is asked for. Each is (n,).
    """
    logits = _tempered(_shaped(products, settings.scale, settings.softcap), settings.temperature)
    chosen = logits.gather(1, targets[:, None])
    highest = logits.amax(1, keepdim=True)
    correct = (chosen == highest)[:, 0]
    logits -= highest
    entropy = None
    if settings.with_entropy:
        weights = logits.exp()
        total = weights.sum(1)
        entropy = total.log() - weights.mul_(logits).sum(1) / total  # H = log Z - E[logit]
    else:
        total = logits.exp_().sum(1)
    # Not chosen - log_totals: that is rounded to the size of the logits.
    return (chosen - highest)[:, 0] - total.log(), highest[:, 0] + total.log(), correct, entropy


@fused
def _slopes(
    products: Tensor,
    targets: Tensor,
    log_totals: Tensor,
    grad_logps: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    settings: _Settings,
) -> Tensor:
    """The gradient of the head's `products` (n, vocabulary), in their type."""
    dtype, at = products.dtype, targets[:, None]
    logits = _shaped(products, settings.scale, settings.softcap)
    cap_slope = None if settings.softcap is None else 1 - (logits / settings.softcap) ** 2
    log_p = _tempered(logits, settings.temperature).sub_(log_totals[:, None])
    slope = settings.scale / settings.temperature
    # d logp(target) = onehot - p;  dH = -p (log p + H)
    d_logp = slope * grad_logps[:, None].to(log_p.dtype)
    if grad_entropy is None or entropy is None:
        grad = log_p.exp_().mul_(-d_logp)
    else:
        grad = log_p.exp().mul_(-d_logp - slope * grad_entropy[:, None] * (log_p + entropy[:, None]))
    of_target = grad.gather(1, at) + d_logp
    if cap_slope is not None:
        grad, of_target = grad * cap_slope, of_target * cap_slope.gather(1, at)
    return grad.to(dtype).scatter_(1, at, of_target.to(dtype))


def _shaped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = products.to(at_least_fp32(products.dtype))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def rows_at_once(vocabulary: int, *, gpu: bool) -> int:
    """How many rows of logits are held at a time."""
    return max(1, CHUNK_ELEMENTS * (ON_GPU if gpu else 1) // vocabulary)


def _chunks(n: int, weight: Tensor, copies: int = 1) -> list[slice]:
    size = rows_at_once(copies * weight.shape[0], gpu=weight.is_cuda)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
