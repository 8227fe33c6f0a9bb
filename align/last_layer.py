"""The last layer answers only where it is read: its feed-forward block treats each token by itself, and nothing comes after it but
the norm. Of a prompt of which only the answer counts, that is nothing at all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

WORTH = 0.75
"""Up to this share of the tokens, picking them out costs less than it saves."""

ATTENTIONS, BLOCK = ("self_attn", "attn", "attention", "self_attention"), "mlp"
"""What families call the parts of a layer. One of other names answers everywhere."""


def answer_where_read(trunk: nn.Module) -> None:
    """Let the last layer of `trunk` heed `AttentionPlan.read`, if its parts are known."""
    answer_everywhere(trunk)
    layer = _last_layer(trunk)
    attention = next((part for name, part in layer.named_children() if name in ATTENTIONS), None) if layer is not None else None
    block = getattr(layer, BLOCK, None)
    if attention is not None and isinstance(block, nn.Module):
        layer.reading = Reading(attention, block)  # type: ignore[union-attr]


def answer_everywhere(trunk: nn.Module) -> None:
    """Undo `answer_where_read`."""
    for layer in trunk.modules():
        if "reading" in vars(layer):
            vars(layer).pop("reading").remove()


def read_at(trunk: nn.Module, read: Tensor, tokens: int) -> tuple[Reading, Tensor] | None:
    """What `AttentionPlan.read` is where the answers at `read` (n,) are asked for, of a row of so many `tokens`."""
    reading = vars(_last_layer(trunk) or trunk).get("reading")
    # How many are read depends on the data, and a compiled graph cannot.
    if reading is None or torch.compiler.is_compiling():
        return None
    rows = read.unique()
    return (reading, rows) if len(rows) <= WORTH * tokens else None


def _last_layer(trunk: nn.Module) -> nn.Module | None:
    """Of the one list of layers that `trunk` has."""
    stacks = [child for child in trunk.children() if isinstance(child, nn.ModuleList) and len(child)]
    return stacks[0][-1] if len(stacks) == 1 else None


class Reading:
    """Hooks on the parts of a layer, by which it heeds `AttentionPlan.read`: the tokens that are read are picked in front of the
    feed-forward block, and what comes out goes back to their places, among zeros.
    """

    def __init__(self, attention: nn.Module, block: nn.Module) -> None:
        # The plan comes to the attention. A checkpointed layer runs its parts again, and not its own hooks.
        self.hooks = (
            attention.register_forward_pre_hook(self._begin, with_kwargs=True),
            block.register_forward_pre_hook(self._pick),
            block.register_forward_hook(self._place),
        )
        self.rows: Tensor | None = None
        """Which of the tokens the call that is under way reads (rows,); None is all."""
        self.tokens = 0

    def remove(self) -> None:
        """Let the layer answer everywhere again."""
        for hook in self.hooks:
            hook.remove()

    def _begin(self, attention: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        read = getattr(kwargs.get("forest"), "read", None)
        # Layers may have been inserted behind this one since, or copied from it.
        self.rows = read[1] if read is not None and read[0] is self else None

    def _pick(self, block: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.rows is None:
            return None
        hidden, *rest = args
        self.tokens = hidden.shape[1]
        return (hidden.index_select(1, self.rows), *rest)

    def _place(self, block: nn.Module, args: Any, output: Any) -> Any:
        if self.rows is None:
            return None
        found, *rest = output if isinstance(output, tuple) else (output,)
        whole = found.new_zeros(1, self.tokens, found.shape[2]).index_copy(1, self.rows, found)
        self.rows = None
        return (whole, *rest) if isinstance(output, tuple) else whole
