"""Linear layers of few rows on a CPU: weights laid out once as the processor reads them, instead of anew for every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WORTH_PASSES = 16
"""Packing costs about what so many passes gain by it."""

MOST_BYTES = 4 << 30
"""Packed copies take at most so much memory; the layers that come after are multiplied as they are."""


@contextmanager
def packed_linears(model: nn.Module, passes: int) -> Iterator[None]:
    """Within, the fp32 layers of a model on the CPU multiply by copies of their weights in the order in which oneDNN reads them.
    Results are those of the plain layers up to rounding. The weights must not change within.

    Args:
        passes: how many are to come, about; for few, nothing is packed.
    """
    layers = list(_layers(model)) if passes >= WORTH_PASSES else []
    copies: dict[int, Tensor] = {}
    room = MOST_BYTES
    try:
        for layer in layers:
            key = id(layer.weight)  # layers may share one
            if key not in copies:
                room -= layer.weight.nbytes
                if room < 0:
                    break
                copies[key] = _packed(layer)
            vars(layer)["forward"] = partial(_multiply, copies[key], layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[nn.Linear | Conv1D]:
    """Those that can be packed. A weight of another type (a shard, a quantized one) has its own way to be multiplied."""
    if not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu"):
        return
    for layer in model.modules():
        if type(layer) in (nn.Linear, Conv1D) and "forward" not in vars(layer):
            weight = layer.weight
            if type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == torch.float32:
                yield layer


# torch's compiler calls these two for weights that do not change.


def _packed(layer: nn.Linear | Conv1D) -> Tensor:
    weight = layer.weight.detach()
    return torch.ops.mkldnn._reorder_linear_weight(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)


def _multiply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
