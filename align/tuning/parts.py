"""What a transformers model is made of: the place of each parameter, and the layers themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from align.engine import base_model, trunk_of
from align.errors import AlignError

ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|^wte$|^wpe$", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """A parameter and where it belongs. `place`: ``embedding``; ``attention``, ``ffn`` or ``norm`` of the layer number `layer`;
    ``after`` the layers but inside the trunk; ``head``. A head that is tied to the embeddings is an embedding.
    """

    name: str
    parameter: nn.Parameter
    place: Literal["embedding", "attention", "ffn", "norm", "after", "head"]
    layer: int | None = None
    depth: int = 0
    """Layers in the stack that `layer` counts in."""
    norm: bool = False
    new: bool = False
    """Whether it is a task's head (scores, classes), which starts from nothing."""


def stacks(model: nn.Module) -> list[nn.ModuleList]:
    """The stacks of layers of `model`: one, or two in an encoder-decoder.

    Raises:
        AlignError: there is none.
    """
    found: list[nn.ModuleList] = []

    def visit(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(ATTENTION.search(name) for name, _ in child.named_parameters()):
                found.append(child)
            else:
                visit(child)

    visit(trunk_of(base_model(model)))
    if not found:
        raise AlignError(f"{type(base_model(model)).__name__} has no list of layers with attention in it")
    return found


def depth(model: nn.Module) -> int:
    """How many layers a stack has; the deeper one, where there are two.

    Raises:
        AlignError: its layers share their weights.
    """
    found = stacks(model)
    if len(found[0]) < base_model(model).config.num_hidden_layers:
        raise AlignError(f"the layers of {type(base_model(model)).__name__} share their weights, so none can be frozen apart")
    return max(map(len, found))


def parts(model: nn.Module) -> Iterator[Part]:
    """Every parameter of `model` once."""
    base = base_model(model)
    inside = {id(p) for p in trunk_of(base).parameters()}
    layer_of = {
        id(p): (number, len(stack)) for stack in stacks(base) for number, layer in enumerate(stack) for p in layer.parameters()
    }
    output = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    for name, parameter in base.named_parameters():
        path, _, _ = name.rpartition(".")
        owner = base.get_submodule(path)
        norm = "norm" in type(owner).__name__.lower()
        if (at := layer_of.get(id(parameter))) is not None:
            place = "norm" if norm else "attention" if ATTENTION.search(_within_layer(path)) else "ffn"
            yield Part(name, parameter, place, *at, norm)  # type: ignore[arg-type]
        elif id(parameter) not in inside:
            yield Part(name, parameter, "head", norm=norm, new=output is None)
        elif isinstance(owner, nn.Embedding) or any(EMBEDDING.search(word) for word in path.split(".")):
            yield Part(name, parameter, "embedding", norm=norm)
        else:
            yield Part(name, parameter, "after", norm=norm)


def _within_layer(path: str) -> str:
    """What of a module's path lies behind the number of its layer."""
    return re.split(r"\.\d+\.", path + ".", maxsplit=1)[-1]


def train_only(model: Any, chosen: Callable[[Part], bool]) -> Any:
    """Freeze `model` but for the `chosen` parts and a new head.

    Raises:
        AlignError: nothing is left to train.
    """
    for part in parts(model):
        part.parameter.requires_grad_(part.new or chosen(part))
    if not any(p.requires_grad for p in model.parameters()):
        raise AlignError(f"{type(base_model(model)).__name__} has no weights of that kind: nothing would train")
    return model


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside `module` by their paths."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)}


def features(layer: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    return tuple(layer.weight.shape) if isinstance(layer, Conv1D) else (layer.in_features, layer.out_features)
