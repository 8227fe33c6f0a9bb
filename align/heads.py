"""Log-probabilities of target tokens from hidden states, without ever holding (tokens, vocabulary) logits.

Logits are made block by block, reduced, and made again in the backward pass, and in a second one: memory is flat in the vocabulary
size. On a CPU the first few blocks are kept for the backward pass instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from align.compiling import fused
from align.errors import AlignError
from align.onednn import linear
from align.ops import at_least_fp32

BLOCK_ELEMENTS = 2**22
"""Logits held at a time (16 MB in fp32)."""

BLOCK_ROWS = 2048
"""A block on a CPU has at most so many rows, and as many columns as there is room for: a large vocabulary's weights, and their
gradient, are then read and written once for so many rows, not for the few whose whole logits fit.
"""

KEPT_BLOCKS = 3
"""So many are not made again in the backward pass on a CPU. The head is a fifth of what a small model computes on rows that are
mostly targets; making its logits again would be a quarter of that.
"""

ON_GPU = 64
"""So many times more logits at a time on a GPU, whose products need more rows to be fast, and which does not make them fp32."""

COPIES = 8
"""How many tensors of a block's logits its second derivative holds: those blocks are so many times smaller."""


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

    def products(self, hidden: Tensor, columns: slice = slice(None)) -> Tensor:
        """(n, hidden) to (n, vocabulary), or these `columns` of it, neither scaled nor capped."""
        return linear(hidden, self.weight[columns], None if self.bias is None else self.bias[columns])

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
    keeps = blocks_kept(head.softcap, gpu=hidden.is_cuda)
    settings = _Settings(head.scale, head.softcap, temperature, with_entropy, keeps)
    logps, entropy, correct = _TokenScores.apply(hidden, head.weight, head.bias, targets, settings)
    return TokenScores(logps, correct, entropy)


@dataclass(frozen=True)
class _Settings:
    scale: float
    softcap: float | None
    temperature: float
    with_entropy: bool
    keeps: int

    @property
    def slope(self) -> float:
        """Of logits by products, where there is no cap."""
        return self.scale / self.temperature


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), settings.scale, settings.softcap)
        grid = _grid(len(targets), weight)
        kept: list[Tensor] = []
        # Of each block's rows: the target's logit, the highest one, the sum of weights, and that of logits by weights.
        chosen, highest, totals, sums = hidden.new_empty(4, len(grid.columns), len(targets), dtype=at_least_fp32(dtype))
        with torch.autocast(device, enabled=False):
            for rows in grid.rows:
                h = hidden[rows].to(dtype)
                for at, columns in enumerate(grid.columns):
                    read = _read(head.products(h, columns), targets[rows] - columns.start, len(kept) < settings.keeps, settings)
                    chosen[at, rows], highest[at, rows], totals[at, rows], sums[at, rows], weights = read
                    if weights is not None:
                        kept.append(weights)
        top = highest.amax(0)
        shares = (highest - top).exp()
        total = (totals * shares).sum(0)
        target = chosen.amax(0)
        # Not the target's logit less a sum's logarithm: that is rounded to the size of the logits.
        logps, correct = target - top - total.log(), target == top
        entropy = None
        if settings.with_entropy:  # log Z - E[logit]
            entropy = total.log() - ((sums + totals * (highest - top)) * shares).sum(0) / total
        ctx.save_for_backward(hidden, weight, bias, targets, highest, highest - top - total.log(), entropy, *kept)
        ctx.dtype, ctx.settings = dtype, settings
        ctx.mark_non_differentiable(correct)
        return logps, entropy, correct

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, entropy = ctx.saved_tensors[:7]
        constant = None if entropy is None else entropy.detach()  # its part in the second derivative is in that of the inputs
        kept = ctx.saved_tensors[7:]
        found = _Gradient.apply(*gradients[:2], *saved, constant, kept, ctx.dtype, ctx.settings, ctx.needs_input_grad[:3])
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
        highest: Tensor,
        log_shares: Tensor,
        entropy: Tensor | None,
        kept: tuple[Tensor, ...],
        dtype: torch.dtype,
        settings: _Settings,
        needed: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x) if x is not None and need else None for x, need in zip((hidden, weight, bias), needed, strict=True)
        )
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(highest.dtype)  # summed over blocks of columns
        head = Head(weight.to(dtype), None if bias is None else bias.to(dtype), settings.scale, settings.softcap)
        of_entropy = grad_entropy if grad_entropy is not None and grad_entropy.any() else None
        d_logps = settings.slope * grad_logps.to(highest.dtype)
        grid, waiting = _grid(len(targets), weight), iter(kept)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in grid.rows:
                h = hidden[rows].to(dtype)
                to_entropy, said = (None if x is None else x[rows] for x in (of_entropy, entropy))
                for at, columns in enumerate(grid.columns):
                    weights = next(waiting, None)
                    where = targets[rows] - columns.start, log_shares[at, rows], d_logps[rows]
                    if weights is None or to_entropy is not None:
                        grad = _slopes(head.products(h, columns), highest[at, rows], *where, to_entropy, said, settings)
                    else:
                        grad = _slopes_of_kept(weights, *where).to(dtype)
                    if grad_hidden is not None:
                        grad_hidden[rows] += linear(grad, head.weight[columns].T)
                    if grad_weight is not None:
                        part = grad_weight[columns]
                        if dtype == weight.dtype:
                            part.addmm_(grad.T, h)
                        elif grad.is_cuda and weight.dtype == torch.float32:  # summed in fp32
                            torch.addmm(part, grad.T, h, out_dtype=weight.dtype, out=part)
                        else:
                            part += grad.T @ h
                    if grad_bias is not None:
                        grad_bias[columns] += grad.sum(0)
        ctx.save_for_backward(grad_logps, grad_entropy, hidden, weight, bias, targets)
        ctx.dtype, ctx.settings = dtype, settings
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        """By PyTorch's own operations, a few rows at a time."""
        inputs: tuple[Any, ...] = ctx.saved_tensors[:-1]
        targets = ctx.saved_tensors[-1]
        found = [torch.zeros_like(x) if need else None for x, need in zip(inputs, ctx.needs_input_grad, strict=False)]
        for part in _slices(len(targets), _elements(gpu=targets.is_cuda) // (COPIES * len(inputs[3]))):
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
        return *found, *[None] * 8


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
def _read(
    products: Tensor, targets: Tensor, keep: bool, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What the forward pass takes from a block of the head's `products` (n, columns) for `targets` (n,).

    Targets are counted from the block's first column. Returns, (n,) each: the target's logit, -inf where it is in another block;
    the highest logit; the sum of the weights, which are probabilities over the highest one; if entropy is asked for, the sum of
    logits, less the highest, by weights. And the weights (n, columns) themselves, if they are to be kept.
    """
    logits = _tempered(_shaped(products, settings.scale, settings.softcap), settings.temperature)
    inside, at = _places(targets, logits.shape[1])
    chosen = torch.where(inside, logits.gather(1, at[:, None])[:, 0], -torch.inf)
    highest = logits.amax(1)
    logits -= highest[:, None]
    if settings.with_entropy:
        weights = logits.exp()
        total = weights.sum(1)
        sums = logits.mul_(weights).sum(1)
    else:
        weights = logits.exp_()
        total = sums = weights.sum(1)
    return chosen, highest, total, sums, weights if keep else None


@fused
def _slopes(
    products: Tensor,
    highest: Tensor,
    targets: Tensor,
    log_shares: Tensor,
    d_logps: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    settings: _Settings,
) -> Tensor:
    """The gradient of a block of the head's `products` (n, columns), in their type.

    Args:
        highest: of the block's logits.
        targets: counted from the block's first column.
        log_shares: logarithm of the probability of the token that has it.
        d_logps: slope of what is differentiated by the target's logit.
    """
    dtype = products.dtype
    logits = _shaped(products, settings.scale, settings.softcap)
    cap_slope = None if settings.softcap is None else 1 - (logits / settings.softcap) ** 2
    logits = _tempered(logits, settings.temperature).sub_(highest[:, None])
    # d logp(target) = onehot - p;  dH = -p (log p + H)
    if grad_entropy is None or entropy is None:
        grad = logits.exp_().mul_((-d_logps * log_shares.exp())[:, None])
    else:
        log_p = logits.add_(log_shares[:, None])
        grad = log_p.exp().mul_(-d_logps[:, None] - settings.slope * grad_entropy[:, None] * (log_p + entropy[:, None]))
    return _with_targets(grad, targets, d_logps, cap_slope, dtype)


def _slopes_of_kept(weights: Tensor, targets: Tensor, log_shares: Tensor, d_logps: Tensor) -> Tensor:
    """What `_slopes` gives, to the bit, from the `weights` (n, columns) that `_read` has kept; they stay as they are."""
    return _with_targets(weights * (-d_logps * log_shares.exp())[:, None], targets, d_logps, None, weights.dtype)


def _with_targets(grad: Tensor, targets: Tensor, d_logps: Tensor, cap_slope: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Puts the targets' own part in. Only then, in `dtype`: a compiler need not hold `grad` in fp32 for it."""
    inside, places = _places(targets, grad.shape[1])
    at = places[:, None]
    of_target = grad.gather(1, at) + torch.where(inside, d_logps, 0)[:, None]
    if cap_slope is not None:
        grad, of_target = grad * cap_slope, of_target * cap_slope.gather(1, at)
    return grad.to(dtype).scatter_(1, at, of_target.to(dtype))


def _places(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each target is in a block of so many columns, and where; somewhere, if it is not."""
    return (targets >= 0) & (targets < columns), targets.clamp(0, columns - 1)


def _shaped(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = products.to(at_least_fp32(products.dtype))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits.div_(temperature)


@dataclass(frozen=True)
class _Grid:
    """How (n, vocabulary) logits are cut into blocks."""

    rows: list[slice]
    columns: list[slice]


def _grid(n: int, weight: Tensor) -> _Grid:
    rows, columns = block_size(n, len(weight), gpu=weight.is_cuda)
    return _Grid(_slices(n, rows), _slices(len(weight), columns))


def block_size(n: int, vocabulary: int, *, gpu: bool) -> tuple[int, int]:
    """How many rows and columns of (n, vocabulary) logits are held at a time. On a GPU all columns: kernels there are made for any
    number of rows.
    """
    if gpu:
        return max(1, _elements(gpu=gpu) // vocabulary), vocabulary
    rows = max(1, min(n, BLOCK_ROWS))
    blocks = math.ceil(rows * vocabulary / _elements(gpu=gpu))
    return rows, math.ceil(vocabulary / blocks)


def _elements(*, gpu: bool) -> int:
    return BLOCK_ELEMENTS * (ON_GPU if gpu else 1)


def blocks_kept(softcap: float | None, *, gpu: bool) -> int:
    """How many blocks of logits wait for the backward pass. A cap's slope takes the logits, not what is left of them."""
    return KEPT_BLOCKS if torch.is_grad_enabled() and softcap is None and not gpu else 0


def _slices(n: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
