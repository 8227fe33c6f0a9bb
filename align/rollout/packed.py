"""Linear layers of few rows on a CPU: weights laid out once as the processor reads them, instead of anew for every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

NEIGHBOURS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Layers beside each other that are given the same input, by the names that most models have for them."""


@contextmanager
def packed_linears(model: nn.Module, passes: int) -> Iterator[None]:
    """Within, the fp32 layers of a model on a CPU multiply by packed copies of their weights, where that is faster. Results
    are those of the plain layers up to rounding. The weights must not change within.

    Args:
        passes: how many are to come, about; for few, nothing is packed.
    """
    groups = _groups(model) if passes >= WORTH_PASSES else []
    copies: dict[tuple[int, ...], Packed] = {}
    room = MOST_BYTES
    try:
        for layers in groups:
            key = tuple(id(part) for layer in layers for part in (layer.weight, layer.bias))  # layers may share theirs
            if key not in copies:
                room -= sum(layer.weight.nbytes for layer in layers)
                if room < 0:
                    break
                copies[key] = Packed(layers)
            for place, layer in enumerate(layers):
                vars(layer)["forward"] = partial(copies[key].multiply, place)
        yield
    finally:
        for layer in (layer for layers in groups for layer in layers):
            vars(layer).pop("forward", None)


class Packed:
    """Layers packed as one: neighbours after the first find their output ready if they are given what the first was."""

    def __init__(self, layers: Sequence[Any]) -> None:
        weights = [layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach() for layer in layers]
        self.sizes = [len(weight) for weight in weights]
        self.weight = onednn.packed(torch.cat(weights) if len(weights) > 1 else weights[0].contiguous())
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        self.input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()

    def multiply(self, place: int, x: Tensor) -> Tensor:
        """The output of the layer at `place` for `x` (..., inputs)."""
        if x is not self.input:
            output = onednn.multiply(x, self.weight, self.bias)
            self.input, self.outputs = x, torch.split_with_sizes(output, self.sizes, dim=-1)  # `split` takes three times as long
        output = self.outputs[place]
        if place == len(self.sizes) - 1:
            self.input, self.outputs = None, ()
        return output


def _groups(model: nn.Module) -> list[list[Any]]:
    """The layers that can be packed, `NEIGHBOURS` together."""
    if not onednn.faster_packed() or torch.is_autocast_enabled("cpu"):
        return []
    groups: dict[Any, list[Any]] = {}
    for path, layer in model.named_modules():
        if getattr(layer, "merged", False) and getattr(layer, "disable_adapters", False):
            layer.unmerge()  # peft does so in its forward, when the weight is packed
        if _packable(layer):
            parent, _, name = path.removesuffix(".base_layer").rpartition(".")  # below an adapter
            names = next((names for names in NEIGHBOURS if name in names), (name,))
            groups.setdefault((parent, names, layer.bias is None, layer.weight.shape[1]), []).append(layer)
    return list(groups.values())


def _packable(layer: Any) -> bool:
    if type(layer).forward not in FORWARDS or "forward" in vars(layer):
        return False
    weight = layer.weight  # that of a shard, for one, is no plain parameter
    return type(weight) is nn.Parameter and weight.is_cpu and weight.dtype == torch.float32
