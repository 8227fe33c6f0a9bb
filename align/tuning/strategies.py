"""The tuning strategies. Each is a function that freezes a transformers model, adds to it what it adds, and returns what is to be
trained: the model itself, or peft's wrapper around it. Its keyword arguments are checked before anything runs.

Nothing heavy is imported before a strategy is applied, so that a plan can check names and arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from align.catalog import Catalog
from align.errors import AlignError

if TYPE_CHECKING:
    from align.tuning.parts import Part

strategies: Catalog = Catalog("tuning")

SOFT = ("prefix", "prompt", "ptuning")
"""Strategies that put virtual tokens in front of every row."""

ADAPTERS = ("lora", "rslora", "dora", "pissa", "qlora", "ia3", *SOFT)
"""Strategies whose result is an adapter of peft; that of the others is a whole model."""

UNSHARDED = (*SOFT, "adapter")
"""Strategies whose new weights are made into others before the model reads or saves them, which shards of them cannot be."""

Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Names = str | list[str] | None


@dataclass(frozen=True)
class Tuning:
    """A strategy of the catalog and its arguments."""

    name: str = "full"
    arguments: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `AlignError` unless the strategy exists and takes these arguments, and has what it needs."""
        strategies.check_arguments(self.name, self.arguments)
        strategies.check_values(self.name, self.arguments)
        if self.name == "freeze" and sum(value is not None for value in self.arguments.values()) != 1:
            raise AlignError("tuning 'freeze' needs one of train_last (layers that train) and freeze_first (layers that do not)")


# -- weights of the model itself ------------------------------------------------------------------------------------------------


@strategies.add
def full(model: Any) -> Any:
    """All weights."""
    return model.requires_grad_(True)


@strategies.add
def freeze(
    model: Any, *, train_last: Annotated[int, Field(ge=0)] | None = None, freeze_first: Annotated[int, Field(ge=0)] | None = None
) -> Any:
    """The last layers, what follows them (the last norm) and the head; a head that is tied to the embeddings stays as they are.

    Args:
        train_last: how many layers train; 0 leaves the head.
        freeze_first: or how many layers, from the first, do not. An encoder-decoder has so many in each of its stacks.

    Raises:
        AlignError: the model has fewer layers.
    """
    from align.tuning.parts import depth, train_only

    layers = depth(model)
    if max(train_last or 0, freeze_first or 0) > layers:
        raise AlignError(f"tuning 'freeze': the model has {layers} layers, not {train_last or freeze_first}")

    def chosen(part: Part) -> bool:
        if part.layer is None:
            return part.place in ("after", "head")
        # The stacks of an encoder-decoder may differ in depth; each is counted from its own end.
        return part.layer >= (part.depth - train_last if train_last is not None else freeze_first or 0)

    return train_only(model, chosen)


@strategies.add
def ffn(model: Any) -> Any:
    """The feed-forward weights of all layers, and a new head."""
    from align.tuning.parts import train_only

    return train_only(model, lambda part: part.place == "ffn")


@strategies.add
def attention(model: Any) -> Any:
    """The attention weights of all layers, and a new head."""
    from align.tuning.parts import train_only

    return train_only(model, lambda part: part.place == "attention")


@strategies.add
def bias_norm(model: Any) -> Any:
    """Biases and norms (BitFit, arXiv:2106.10199; LN tuning, arXiv:2312.11420), and a new head."""
    from align.tuning.parts import train_only

    return train_only(model, lambda part: part.norm or part.name.endswith("bias"))


# -- new weights inside the model: it is saved as a plain model ------------------------------------------------------------------


@strategies.add
def head(model: Any, *, layers: Annotated[int, Field(ge=0)] = 1) -> Any:
    """New feed-forward layers behind the last one, and a new head; all else is frozen. Each is a layer of the model's own kind
    whose attention adds nothing, and whose feed-forward part adds nothing yet (block expansion of LLaMA Pro, arXiv:2401.02415).

    Args:
        layers: how many; 0 trains the head alone.

    Raises:
        AlignError: the model's layers cannot be passed through unchanged (post-norm, mixtures of experts).
    """
    from align.tuning.growth import add_layers
    from align.tuning.parts import train_only

    if not layers:
        return train_only(model, lambda part: part.place == "head")
    return add_layers(model, layers)


@strategies.add
def adapter(model: Any, *, size: Count = 64) -> Any:
    """A bottleneck beside each feed-forward layer (the parallel adapter of He et al., arXiv:2110.04366), with the layer's own
    activation. That is the same as `size` new hidden units, so the model is saved as a plain one with a wider feed-forward layer.

    Raises:
        AlignError: the feed-forward layers are fused or mixtures of experts.
    """
    from align.tuning.growth import widen

    return widen(model, size)


# -- adapters of peft -----------------------------------------------------------------------------------------------------------


@strategies.add
def lora(
    model: Any,
    *,
    r: Count = 16,
    alpha: Count | None = None,
    dropout: Share = 0.0,
    target_modules: Names = None,
    rslora: bool = False,
    dora: bool = False,
    pissa: bool = False,
) -> Any:
    """Low-rank updates of the model's linear layers (arXiv:2106.09685).

    Args:
        r: rank.
        alpha: scale; 2 r by default.
        dropout: in front of the update.
        target_modules: names of the layers; all linear layers but the head by default.
        rslora: scale by alpha / sqrt(r) instead of alpha / r (arXiv:2312.03732).
        dora: train magnitude and direction apart (arXiv:2402.09353).
        pissa: start from the principal components of each weight (arXiv:2404.02948). It is saved as LoRA of rank 2 r.
    """
    from align.tuning.adapters import add_lora

    return add_lora(
        model,
        r=r,
        alpha=2 * r if alpha is None else alpha,
        dropout=dropout,
        target_modules=target_modules,
        rslora=rslora,
        dora=dora,
        pissa=pissa,
    )


@strategies.add
def rslora(model: Any, *, r: Count = 16, alpha: Count | None = None, dropout: Share = 0.0, target_modules: Names = None) -> Any:
    """LoRA scaled by alpha / sqrt(r) (arXiv:2312.03732); see `lora`."""
    return lora(model, r=r, alpha=alpha, dropout=dropout, target_modules=target_modules, rslora=True)


@strategies.add
def dora(model: Any, *, r: Count = 16, alpha: Count | None = None, dropout: Share = 0.0, target_modules: Names = None) -> Any:
    """LoRA on the direction of each weight, beside its magnitude (arXiv:2402.09353); see `lora`."""
    return lora(model, r=r, alpha=alpha, dropout=dropout, target_modules=target_modules, dora=True)


@strategies.add
def pissa(model: Any, *, r: Count = 16, alpha: Count | None = None, target_modules: Names = None) -> Any:
    """LoRA from the principal components of each weight (arXiv:2404.02948); see `lora`. `alpha` is r by default, as there."""
    return lora(model, r=r, alpha=alpha or r, target_modules=target_modules, pissa=True)


@strategies.add
def qlora(model: Any, *, r: Count = 16, alpha: Count | None = None, dropout: Share = 0.0, target_modules: Names = None) -> Any:
    """LoRA on a base in 4 bits (NF4, double quantization; arXiv:2305.14314); see `lora`. CUDA only."""
    if not getattr(model, "is_loaded_in_4bit", False):
        raise AlignError("tuning 'qlora' needs a base that was loaded in 4 bits (align.models.load_causal_lm, four_bits=True)")
    return lora(model, r=r, alpha=alpha, dropout=dropout, target_modules=target_modules)


@strategies.add
def ia3(model: Any, *, target_modules: Names = None, feedforward_modules: Names = None) -> Any:
    """Learned scales of keys, values and hidden units (arXiv:2205.05638).

    Args:
        target_modules: names of the layers that get one; known for the usual families.
        feedforward_modules: those among them whose inputs are scaled, not their outputs.
    """
    from align.tuning.adapters import add_ia3

    return add_ia3(model, target_modules, feedforward_modules)


@strategies.add
def prefix(model: Any, *, num_virtual_tokens: Count = 20) -> Any:
    """Learned keys and values in front of every row, in every layer (arXiv:2101.00190); they start as those of random tokens."""
    from align.tuning.soft import add_prefix

    return add_prefix(model, num_virtual_tokens)


@strategies.add
def prompt(model: Any, *, num_virtual_tokens: Count = 20) -> Any:
    """Learned embeddings in front of every row (arXiv:2104.08691); they start as those of random tokens."""
    from align.tuning.soft import add_prompt

    return add_prompt(model, num_virtual_tokens)


@strategies.add
def ptuning(
    model: Any, *, num_virtual_tokens: Count = 20, hidden_size: Count | None = None, encoder: Literal["mlp", "lstm"] = "mlp"
) -> Any:
    """Learned embeddings in front of every row, made by a small network (arXiv:2103.10385).

    Args:
        hidden_size: of that network; the model's by default.
    """
    from align.tuning.soft import add_ptuning

    return add_ptuning(model, num_virtual_tokens, hidden_size, encoder)
