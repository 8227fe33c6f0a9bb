"""Log-probabilities of target tokens from hidden states, without ever holding (tokens, vocabulary) logits.

Logits are made in chunks, reduced, and made again in the backward pass: memory is flat in the vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from align.errors import AlignError
from align.ops import at_least_fp32

CHUNK_ELEMENTS = 2**22
"""Logits held at a time (16 MB in fp32)."""


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

    Log-probs and entropy are differentiable; `correct` is not.

    Args:
        with_entropy: entropy costs two more passes over the vocabulary, so it is left out unless asked for.
    """
    if _twice.get():
        return _plain_scores(hidden, targets, head, temperature, with_entropy)
    settings = _Settings(head.scale, head.softcap, temperature, with_entropy)
    logps, entropy, correct = _TokenScores.apply(hidden, head.weight, head.bias, targets, settings)
    return TokenScores(logps, correct, entropy)


_twice: ContextVar[bool] = ContextVar("twice", default=False)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within, `token_scores` can be differentiated twice: it is PyTorch's own operations, and each chunk is made again in every
    backward pass. For Hessians; training is faster without.
    """
    token = _twice.set(True)
    try:
        yield
    finally:
        _twice.reset(token)


def _plain_scores(hidden: Tensor, targets: Tensor, head: Head, temperature: float, with_entropy: bool) -> TokenScores:
    """`token_scores` without its own backward pass."""

    def scored(part: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = (head.logits(part) / temperature).log_softmax(1)
        chosen = log_p.gather(1, wanted[:, None])
        entropy = -(log_p.exp() * log_p).sum(1) if with_entropy else chosen.new_zeros(())
        return chosen[:, 0], (chosen == log_p.amax(1, keepdim=True))[:, 0].detach(), entropy

    parts = [
        checkpoint(scored, hidden[part], targets[part], use_reentrant=False) for part in _chunks(len(targets), head.weight.shape[0])
    ]
    logps, correct, entropy = zip(*parts, strict=True)
    return TokenScores(torch.cat(logps), torch.cat(correct), torch.cat(entropy) if with_entropy else None)


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
        grad_logps, grad_entropy, _ = gradients
        hidden, weight, bias, targets, log_totals, entropy = ctx.saved_tensors
        dtype, settings = ctx.dtype, ctx.settings
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), settings.scale, settings.softcap)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        slope = settings.scale / settings.temperature
        use_entropy = entropy is not None and grad_entropy is not None and bool(grad_entropy.any())
        assert grad_logps is not None
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
                    d_entropy = slope * grad_entropy[part, None]
                    grad = log_p.exp().mul_(-d_logp - d_entropy * (log_p + entropy[part, None]))
                else:
                    grad = log_p.exp_().mul_(-d_logp)
                grad.scatter_add_(1, targets[part, None], d_logp)
                if cap_slope is not None:
                    grad *= cap_slope
                grad = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = (grad @ head.weight).to(hidden.dtype)
                if grad_weight is not None:
                    if dtype == weight.dtype:
                        grad_weight.addmm_(grad.T, h)
                    else:
                        grad_weight += grad.T @ h
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
