"""Log-probabilities of target tokens from hidden states, without ever holding (tokens, vocabulary) logits.

Logits are made in chunks, reduced, and made again in the backward pass, and in a second one: memory is flat in the vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.errors import AlignError
from align.onednn import linear
from align.ops import at_least_fp32

CHUNK_ELEMENTS = 2**22
"""Logits held at a time (16 MB in fp32)."""

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

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, hidden) to (n, vocabulary), in fp32 or wider."""
        logits = linear(hidden, self.weight, self.bias)
        logits = logits.to(at_least_fp32(logits.dtype))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


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
            for part in _chunks(n, weight.shape[0]):
                logits = _tempered(head.logits(hidden[part].to(dtype)), settings.temperature)
                chosen = logits.gather(1, targets[part, None])
                highest = logits.amax(1, keepdim=True)
                correct[part] = (chosen == highest)[:, 0]
                logits -= highest
                if entropy is None:
                    total = logits.exp_().sum(1)
                else:
                    weights = logits.exp()
                    total = weights.sum(1)
                    entropy[part] = total.log() - weights.mul_(logits).sum(1) / total  # H = log Z - E[logit]
                log_totals[part] = highest[:, 0] + total.log()
                logps[part] = chosen[:, 0] - log_totals[part]
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
        slope = settings.scale / settings.temperature
        use_entropy = entropy is not None and grad_entropy is not None and bool(grad_entropy.any())
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight.shape[0]):
                h = hidden[part].to(dtype)
                logits = head.logits(h)
                cap_slope = None if settings.softcap is None else 1 - (logits / settings.softcap) ** 2
                log_p = _tempered(logits, settings.temperature).sub_(log_totals[part, None])
                # d logp(target) = onehot - p;  dH = -p (log p + H)
                d_logp = slope * grad_logps[part, None].to(log_p.dtype)
                if use_entropy:
                    assert grad_entropy is not None
                    assert entropy is not None
                    d_entropy = slope * grad_entropy[part, None]
                    grad = log_p.exp().mul_(-d_logp - d_entropy * (log_p + entropy[part, None]))
                else:
                    grad = log_p.exp_().mul_(-d_logp)
                grad.scatter_add_(1, targets[part, None], d_logp)
                if cap_slope is not None:
                    grad *= cap_slope
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = linear(grad, head.weight.T).to(hidden.dtype)
                if grad_weight is not None:
                    if dtype == weight.dtype:
                        grad_weight.addmm_(grad.T, h)
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
        for part in _chunks(len(targets), COPIES * inputs[3].shape[0]):
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


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
