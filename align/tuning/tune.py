"""Applies a tuning strategy to a model, counts what trains, and keeps the model as it was for reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from align.errors import AlignError
from align.shards import is_sharded
from align.tuning.strategies import ADAPTERS, Tuning, strategies


def tune(model: nn.Module, tuning: Tuning, folder: Path | None = None) -> nn.Module:
    """`model` so that what trains is what `tuning` says: itself, or peft's wrapper around it.

    Args:
        folder: where the result will be saved. An adapter's folder must name a base that loads; a model that is not on disk as it
            is (merged from an adapter, or with a token more) is written to ``folder/base`` first. Without a folder such an adapter
            cannot be loaded later.

    Raises:
        AlignError: the strategy, its arguments and this model do not go together.
    """
    tuning.check()
    if isinstance(model, PeftModel):
        kind = model.active_peft_config.peft_type.value
        raise AlignError(
            f"the model stands behind virtual tokens ({kind}), which cannot be merged into its weights; set on_adapter to "
            "continue, or start from another model"
        )
    if tuning.name in ADAPTERS and folder is not None and not _is_on_disk(model):
        base: Any = model
        base.save_pretrained(folder / "base")
        base.name_or_path = str((folder / "base").resolve())
    return strategies[tuning.name](model, **tuning.arguments)


def _is_on_disk(model: Any) -> bool:
    """Whether the folder that `model` was loaded from has it as it is now."""
    rows = model.get_input_embeddings().weight.shape[0]
    return getattr(model, "rows_on_disk", None) == rows and not getattr(model, "merged_from", None)


def trainable(model: nn.Module) -> dict[str, Any]:
    """How many parameters train, and which share of all that is."""
    count = sum(_size(p) for p in model.parameters() if p.requires_grad)
    return {"trainable_parameters": count, "trainable_share": count / sum(map(_size, model.parameters()))}


def _size(parameter: nn.Parameter) -> int:
    """Its numbers; 4-bit weights hold several in one cell."""
    quantized = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantized is None else math.prod(quantized.shape)


def untouched(model: nn.Module) -> AbstractContextManager[Any]:
    """Within, a model that has not been trained yet answers as its base does, without a new adapter's detour. One that goes on from
    an earlier stage answers with that stage's adapter.
    """
    return model.disable_adapter() if getattr(model, "off_is_base", False) else nullcontext()  # type: ignore[operator]


class Reference:
    """`model` as it is now, before training, without a second copy of what will not change.

    A new adapter is switched off. Otherwise the weights that train are kept as they were, and change places with the trained ones
    for as long as the reference is asked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.off = getattr(model, "off_is_base", False)
        trained = [] if self.off else [p for p in model.parameters() if p.requires_grad]
        self.start = [(p, p.detach().clone()) for p in trained]

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """Within, the model is the reference."""
        if self.off:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model
            return
        trained = [p.data.clone() if is_sharded(self.model) else p.data for p, _ in self.start]
        self._put([start for _, start in self.start])
        try:
            yield self.model
        finally:
            self._put(trained)

    def _put(self, weights: Sequence[Tensor]) -> None:
        for (parameter, _), data in zip(self.start, weights, strict=True):
            if is_sharded(self.model):  # what is gathered is the memory that the shard was made in
                parameter.data.copy_(data)
            else:
                parameter.data = data
        torch.clear_autocast_cache()  # autocast keeps 16-bit copies of parameters, and does not see that their data are others
