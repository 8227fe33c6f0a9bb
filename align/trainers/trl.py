"""The second engine: TRL's stable trainers on the same tokens, with the same history and output folder.

It lets anyone check our numbers by changing one word, and serves models that the forest does not cover. Nothing here overrides a
trainer's internals: data go in, a trainer comes out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from align.errors import AlignError
from align.forest import Tree
from align.schema import PreferenceRow


def sft_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[Tree],
    held: Sequence[Tree],
    arguments: dict[str, Any],
    **rest: Any,
) -> SFTTrainer:
    """`SFTTrainer` on our tokens, the loss on the same ones."""

    def dataset(part: Sequence[Tree]) -> Dataset | None:
        rows = []
        for tree in part:
            assert tree.prompt_mask is not None
            labels = [token if counts else -100 for token, counts in zip(tree.prompt, tree.prompt_mask, strict=True)]
            rows.append({"input_ids": tree.prompt, "labels": labels})
        return Dataset.from_list(rows) if rows else None

    args = SFTConfig(**arguments, max_length=None)
    return SFTTrainer(model, args, train_dataset=dataset(trees), eval_dataset=dataset(held), processing_class=tokenizer, **rest)


def reward_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    trees: Sequence[Tree],
    held: Sequence[Tree],
    arguments: dict[str, Any],
    center_rewards_coefficient: float,
    **rest: Any,
) -> RewardTrainer:
    """`RewardTrainer` on our tokens, each answer with its prompt."""

    def dataset(part: Sequence[Tree]) -> Dataset | None:
        rows = [{"chosen_ids": t.prompt + t.branches[0], "rejected_ids": t.prompt + t.branches[1]} for t in part]
        return Dataset.from_list(rows) if rows else None

    args = RewardConfig(**arguments, max_length=None, center_rewards_coefficient=center_rewards_coefficient or None)
    return RewardTrainer(model, args, train_dataset=dataset(trees), eval_dataset=dataset(held), processing_class=tokenizer, **rest)


def dpo_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    held: Sequence[PreferenceRow],
    arguments: dict[str, Any],
    *,
    beta: float,
    label_smoothing: float,
    max_length: int | None,
    **rest: Any,
) -> DPOTrainer:
    """`DPOTrainer` on our rows; it renders and tokenizes them itself.

    Raises:
        AlignError: label smoothing, which TRL's plain DPO loss takes and ignores.
    """
    if label_smoothing:
        raise AlignError("TRL's DPO loss ignores label_smoothing; leave it out or use engine 'forest'")

    def dataset(part: Sequence[PreferenceRow]) -> Dataset | None:
        plain = [row.model_dump(include={"prompt", "chosen", "rejected"}, exclude_none=True) for row in part]
        tools = [json.dumps(row.tools) if row.tools else None for row in part]
        return Dataset.from_list(plain).add_column("tools", tools) if plain else None

    # Without an explicit copy TRL would load the reference anew by name, which a model changed in memory does not have.
    reference = None if isinstance(model, PeftModel) else deepcopy(model)
    args = DPOConfig(**arguments, beta=beta, max_length=max_length)
    return DPOTrainer(
        model, reference, args, train_dataset=dataset(rows), eval_dataset=dataset(held), processing_class=tokenizer, **rest
    )
