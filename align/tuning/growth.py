"""New weights inside a transformers model that start by changing nothing: layers behind its last one, and hidden units in its
feed-forward layers. The model stays one of its own kind, larger by its config, so ``from_pretrained`` loads it and no adapter has
to be merged.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from align.engine import base_model, trunk_of
from align.errors import AlignError
from align.tuning.parts import ATTENTION, features, linears, parts, stacks, train_only

ATTENTION_OUTPUTS = {"o_proj", "c_proj", "out_proj", "dense", "o", "proj"}
"""What families call the projection behind attention."""

WIDTHS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "d_ff",
    "ffn_hidden_size",
    "hidden_dim",
    "d_inner",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
"""What configs call the number of hidden units."""

SAME = 1e-4
"""Answers that differ by at most this share of the largest are the same."""


def add_layers(model: Any, count: int) -> Any:
    """Put `count` new layers behind the last one: its copies, whose outputs are zero. Their feed-forward weights train,
    and a new head.

    Raises:
        AlignError: the model would not answer as before.
    """
    base = base_model(model)
    if len(found := stacks(base)) > 1:
        raise AlignError(_no_layers(base, "it has an encoder and a decoder"))
    (stack,) = found
    before, old = _answers(base), len(stack)
    if old < base.config.num_hidden_layers:
        raise AlignError(_no_layers(base, "its layers share their weights"))
    for number in range(old, old + count):
        # The config stays the one that all layers share.
        layer = deepcopy(stack[old - 1], {id(base.config): base.config})
        _silence(layer, base)
        module: Any
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):  # where its keys stand in the cache
                if hasattr(module, name):
                    setattr(module, name, number)
        stack.append(layer)
    _lengthen(base.config, old, count)
    if not _same(before, _answers(base)):
        raise AlignError(_no_layers(base, "its norms stand behind its layers, or its layers hold more than linear ones"))
    return train_only(model, lambda part: part.place == "ffn" and part.layer is not None and part.layer >= old)


def _no_layers(base: Any, reason: str) -> str:
    return f"tuning 'head' cannot put new layers into {type(base).__name__}, as {reason}; set layers to 0 to train its head alone"


@torch.no_grad()
def _silence(layer: nn.Module, base: Any) -> None:
    """Let both parts of `layer` add nothing to what passes through it."""
    for name, module in linears(layer).items():
        inputs, outputs = features(module)
        word = name.rpartition(".")[2]
        of_attention = bool(ATTENTION.search(name))
        if word in ATTENTION_OUTPUTS if of_attention else outputs == base.config.hidden_size != inputs:
            for parameter in module.parameters():
                parameter.zero_()


def _lengthen(config: Any, old: int, count: int) -> None:
    """`count` more layers in `config`; what it lists for each layer goes on as for the last one."""
    config.num_hidden_layers = old + count
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == old:
            setattr(config, name, [*value, *[value[-1]] * count])


def widen(model: Any, size: int) -> Any:
    """Give every feed-forward layer `size` new hidden units that add nothing yet. They train, and a new head.

    Raises:
        AlignError: the layers are not made of a linear layer (or two, gated) into the hidden units and one back, or the config
            does not say how many these are.
    """
    base = base_model(model)
    config = base.config
    hidden = config.hidden_size
    widths = {name: getattr(config, name) or 4 * hidden for name in WIDTHS if hasattr(config, name)}  # GPT-2's n_inner may be None
    grown: set[int] = set()
    base.requires_grad_(False)
    for part in parts(base):
        part.parameter.requires_grad_(part.new)
    for layer in {id(layer): layer for stack in stacks(base) for layer in stack}.values():
        inner = {name: m for name, m in linears(layer).items() if not ATTENTION.search(name)}
        ways = {name: features(module) for name, module in inner.items()}
        back = [name for name, (inputs, outputs) in ways.items() if outputs == hidden != inputs and inputs in widths.values()]
        width = ways[back[0]][0] if back else hidden
        into = [name for name, way in ways.items() if way == (hidden, width)]
        if not into or len(back) != 1 or len(into) > 2:
            raise AlignError(
                f"tuning 'adapter' cannot widen the feed-forward layers of {type(base).__name__}: they are fused, mixtures of "
                "experts, as wide as the model, or of a width that its config does not hold; use 'lora' or 'ffn'"
            )
        for name in (*into, *back):
            layer.set_submodule(name, Wider(inner[name], size, outputs=name in into))
        grown.add(width)
    for name, width in widths.items():  # an encoder-decoder has one for each stack
        if width in grown:
            setattr(config, name, width + size)
    return model


class Wider(nn.Module):
    """A frozen linear layer with `size` more outputs, or more inputs that count for nothing yet. Only these train.

    In a state dict it is one plain layer, so that it is saved, and loaded, as such.
    """

    def __init__(self, layer: Any, size: int, *, outputs: bool) -> None:
        super().__init__()
        self.layer = layer  # frozen; its weights are not the state's, see `_save_to_state_dict`
        self.outputs = outputs
        inputs, width = features(layer)
        make = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        self.new = (
            nn.Linear(inputs, size, bias=layer.bias is not None, **make) if outputs else nn.Linear(size, width, False, **make)
        )
        if not outputs:
            nn.init.zeros_(self.new.weight)
        elif self.new.bias is not None:
            nn.init.zeros_(self.new.bias)

    @property
    def weight(self) -> Tensor:
        """The weight of the whole layer, as the model's own class lays it out."""
        rows = self._rows(self.layer.weight)
        return self._rows(torch.cat([rows, self.new.weight], dim=0 if self.outputs else 1)).contiguous()

    @property
    def bias(self) -> Tensor | None:
        if self.layer.bias is None or not self.outputs:
            return self.layer.bias
        return torch.cat([self.layer.bias, self.new.bias])

    def forward(self, x: Tensor) -> Tensor:
        if self.outputs:
            return torch.cat([self.layer(x), self.new(x)], dim=-1)
        old = features(self.layer)[0]
        return self.layer(x[..., :old]) + linear(x[..., old:], self.new.weight)

    def _rows(self, weight: Tensor) -> Tensor:
        """(outputs, inputs), from how the layer holds it, or back."""
        return weight.T if isinstance(self.layer, Conv1D) else weight

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        destination = {} if destination is None else destination
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if value is not None:
                destination[prefix + name] = value if keep_vars else value.detach()
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        old_inputs, old_outputs = features(self.layer)
        with torch.no_grad():
            if (weight := state_dict.get(f"{prefix}weight")) is not None:
                rows = self._rows(weight)
                self.new.weight.copy_(rows[old_outputs:] if self.outputs else rows[:, old_inputs:])
                self._rows(self.layer.weight).copy_(rows[:old_outputs, :old_inputs])
            if (bias := state_dict.get(f"{prefix}bias")) is not None:
                self.layer.bias.copy_(bias[:old_outputs])
                if self.outputs:
                    self.new.bias.copy_(bias[old_outputs:])


# -- the check -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _answers(base: Any) -> Tensor:
    """The last hidden states of a few random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (2, 9), generator=generator).to(base.device)
    was_training = base.training
    base.eval()
    hidden = trunk_of(base)(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
    base.train(was_training)
    return hidden


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= SAME * theirs.abs().max())
