"""Log-probabilities of target tokens from hidden states, without ever holding (tokens, vocabulary) logits.

Logits are made in chunks, reduced, and made again in the backward pass: memory is flat in the vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from align.errors import AlignError

CHUNK_ELEMENTS = 2**22
"""Logits held at a time (16 MB in fp32)."""


@dataclass(frozen=True)
class TokenScores:
    """What the head says of each target: all (targets,)."""

    logps: Tensor  # nats
    entropy: Tensor  # nats, of the whole distribution at that position
    correct: Tensor  # bool: the target is the most likely token


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


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type that sums over the vocabulary are taken in."""
    return torch.promote_types(dtype, torch.float32)


def head_of(model: nn.Module) -> Head:
    """The head of a causal language model of transformers.

    Raises:
        AlignError: the output layer is not a plain linear layer (an adapter on ``lm_head``, say).
    """
    layer, config = model.get_output_embeddings(), model.config  # type: ignore[operator]
    if type(layer) is not nn.Linear:
        raise AlignError(
            f"the output layer of {type(model).__name__} is a {type(layer).__name__}, not a plain linear layer; "
            "if an adapter sits on it, take 'lm_head' out of lora_target_modules"
        )
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return Head(layer.weight, layer.bias, scale / divisor, getattr(config, "final_logit_softcapping", None))


def token_scores(hidden: Tensor, targets: Tensor, head: Head, temperature: float = 1.0) -> TokenScores:
    """Score `targets` (n,) from `hidden` (n, hidden) under `head`, logits divided by `temperature`. All sums are in fp32 or wider.

    Log-probs and entropy are differentiable; `correct` is not.
    """
    logps, entropy, correct = _TokenScores.apply(hidden, head.weight, head.bias, targets, head.scale, head.softcap, temperature)
    return TokenScores(logps, entropy, correct)


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), scale, softcap)
        n = len(targets)
        logps, entropy = (hidden.new_empty(n, dtype=at_least_fp32(dtype)) for _ in range(2))
        correct = torch.empty(n, dtype=torch.bool, device=hidden.device)
        with torch.autocast(device, enabled=False):
            for part in _chunks(n, weight.shape[0]):
                logits = head.logits(hidden[part].to(dtype)).div_(temperature)
                target = targets[part, None]
                correct[part] = logits.argmax(1) == target[:, 0]
                chosen = logits.gather(1, target)[:, 0]
                log_total = logits.logsumexp(1)
                logps[part] = chosen - log_total
                # H = log Z - E[logit]
                p = logits.sub(log_total[:, None]).exp_()
                entropy[part] = log_total - p.mul_(logits).sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.settings = dtype, scale, softcap, temperature
        ctx.mark_non_differentiable(correct)
        return logps, entropy, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad_logps, grad_entropy, _ = gradients
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        dtype, scale, softcap, temperature = ctx.settings
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), scale, softcap)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias else None
        use_entropy = bool(grad_entropy.any())
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _chunks(len(targets), weight.shape[0]):
                h = hidden[part].to(dtype)
                capped = head.logits(h)
                slope = None if softcap is None else 1 - (capped / softcap) ** 2
                log_p = torch.log_softmax(capped.div_(temperature), dim=1)
                p = log_p.exp()
                # d logp(target) = onehot - p;  dH = -p (log p + H)
                grad = p * -grad_logps[part, None]
                grad.scatter_add_(1, targets[part, None], grad_logps[part, None].to(grad.dtype))
                if use_entropy:
                    grad -= grad_entropy[part, None] * p * (log_p + entropy[part, None])
                grad *= scale / temperature
                if slope is not None:
                    grad *= slope
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
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _chunks(n: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
