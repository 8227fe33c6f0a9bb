"""Linear layers of few rows on a CPU: weights laid out once as the processor reads them, instead of anew for every token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from align import onednn

WORTH_PASSES = 16
"""Packing costs about what so many passes gain by it."""

MOST_BYTES = 4 << 30
"""Packed copies take at most so much memory; the layers that come after are multiplied as they are."""

FORWARDS = (nn.Linear.forward, onednn.Linear.forward, Conv1D.forward)
"""Layers of another forward (a quantized one, say) have their own way to multiply."""


@contextmanager
def packed_linears(model: nn.Module, passes: int) -> Iterator[None]:
    """Within, the fp32 layers of a model on a CPU multiply by packed copies of their weights, where that is faster. Results
    are those of the plain layers up to rounding. The weights must not change within.

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
                weight = layer.weight.detach()
                copies[key] = onednn.packed(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
            vars(layer)["forward"] = partial(onednn.multiply, weight=copies[key], bias=layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _layers(model: nn.Module) -> Iterator[Any]:
    """Those that can be packed: the weight of a shard, for one, is no plain parameter."""
    if not onednn.faster_packed() or torch.is_autocast_enabled("cpu"):
        return
    for layer in model.modules():
        if getattr(layer, "merged", False) and getattr(layer, "disable_adapters", False):
            layer.unmerge()  # type: ignore[operator]  # peft does so in its forward, when the weight is packed
        if type(layer).forward in FORWARDS and "forward" not in vars(layer):
            weight: Any = layer.weight
            if type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == torch.float32:
                yield layer
