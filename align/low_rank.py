"""The updates of LoRA in fewer passes over the outputs than peft's layers take."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def by_one_product(module: nn.Module) -> None:
    """Let the LoRA layers in `module` add their updates as `LowRank` does."""
    for layer in module.modules():
        if type(layer) is Linear:
            layer.__class__ = LowRank


class LowRank(Linear):
    """A linear layer with LoRA, whose update is scaled and added by the product that makes it: Wx + s B(Ax) without own tensors for
    B(Ax), for s times that, and for their gradients. What else an adapter may be is left to peft.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., inputs) to (..., outputs)."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or not self._is_plain(names[0], x):
            return super().forward(x, *args, **kwargs)
        (name,) = names
        output = self.base_layer(x)
        inner = self.lora_A[name](self.lora_dropout[name](x))
        rows = torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), self.lora_B[name].weight.T, alpha=self.scaling[name])
        return rows.view(output.shape)

    def _is_plain(self, name: str, x: Tensor) -> bool:
        """Whether the update of the adapter `name` is a product in the type of `x`."""
        alike = x.dtype == self.lora_A[name].weight.dtype or torch.is_autocast_enabled(x.device.type)
        return alike and name not in self.lora_variant and self.lora_B[name].bias is None
