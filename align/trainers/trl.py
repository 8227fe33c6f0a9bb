"""The second engine: TRL's stable trainers on the same tokens, with the same history and output folder.

It lets anyone check our numbers by changing one word, and serves models that the forest does not cover. Nothing here overrides a
trainer's internals but for the stop at a loss that is not finite: data go in, a trainer comes out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from align import processes
from align.encode import Encoded
from align.errors import AlignError
from align.forest import Tree
from align.guarded import FiniteTrainer
from align.rollout import Completion
from align.schema import LabelledRow, PreferenceRow
from align.scoring import Judge, component_means, plain

GROUP_TRAINERS = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}

AnyTrainer = TypeVar("AnyTrainer")


def _stopping(trainer: type[AnyTrainer]) -> type[AnyTrainer]:
    """`trainer`, stopped before an update that is not finite, as `FiniteTrainer` is."""
    return type(trainer.__name__, (FiniteTrainer, trainer), {})


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` without TRL's own default where it differs from ours: TRL trades time for memory unasked."""
    return {"gradient_checkpointing": False, **arguments}


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

    args = SFTConfig(**_plain(arguments), max_length=None)
    return _stopping(SFTTrainer)(
        model, args, train_dataset=dataset(trees), eval_dataset=dataset(held), processing_class=tokenizer, **rest
    )


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

    center = center_rewards_coefficient or None
    args = RewardConfig(**_plain(arguments), max_length=None, center_rewards_coefficient=center)
    return _stopping(RewardTrainer)(
        model, args, train_dataset=dataset(trees), eval_dataset=dataset(held), processing_class=tokenizer, **rest
    )


def dpo_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[PreferenceRow],
    held: Sequence[PreferenceRow],
    arguments: dict[str, Any],
    **rest: Any,
) -> DPOTrainer:
    """`DPOTrainer` on our rows; it renders and tokenizes them itself. `arguments` are those of a `DPOConfig`."""
    return _stopping(DPOTrainer)(
        model,
        _reference(model),
        DPOConfig(**_plain(arguments)),
        train_dataset=_rendered(rows, "chosen", "rejected"),
        eval_dataset=_rendered(held, "chosen", "rejected"),
        processing_class=tokenizer,
        **rest,
    )


def kto_trainer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[LabelledRow],
    held: Sequence[LabelledRow],
    arguments: dict[str, Any],
    **rest: Any,
) -> KTOTrainer:
    """`KTOTrainer` on our rows, in their order; it renders and tokenizes them itself. `arguments` are those of a `KTOConfig`."""
    return _stopping(KTOTrainer)(
        model,
        _reference(model),
        KTOConfig(**_plain(arguments)),
        train_dataset=_rendered(rows, "completion", "label"),
        eval_dataset=_rendered(held, "completion", "label"),
        processing_class=tokenizer,
        **rest,
    )


def _rendered(rows: Sequence[Any], *columns: str) -> Dataset | None:
    """The prompts and `columns` of `rows`, for a trainer that renders them."""
    dumped = [row.model_dump(include={"prompt", *columns}, exclude_none=True) for row in rows]
    tools = [json.dumps(row.tools) if row.tools else None for row in rows]
    return Dataset.from_list(dumped).add_column("tools", tools) if dumped else None


def _reference(model: nn.Module) -> nn.Module | None:
    """What TRL is to take as reference. Without an explicit copy it would load one anew by name, which a model changed in memory
    does not have.
    """
    return None if isinstance(model, PeftModel) else deepcopy(model)


def group_trainer(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Encoded,
    held: Encoded,
    judge: Judge,
    arguments: dict[str, Any],
    **rest: Any,
) -> GRPOTrainer | RLOOTrainer:
    """The trainer `name` of `GROUP_TRAINERS` on our prompts, rewarded by our judge. `arguments` are those of its config.

    Raises:
        AlignError: a prompt shows tools, which TRL takes for functions that it may call.
    """
    rows, trees = [*train.rows, *held.rows], [*train.trees, *held.trees]
    if any(row.tools for row in rows):
        raise AlignError("engine 'trl' cannot show the tools of a row in its prompt; leave the column 'tools' out")
    numbered = [{"prompt": plain(row.prompt), "row": number} for number, row in enumerate(rows)]
    parts = numbered[: len(train.rows)], numbered[len(train.rows) :]
    config, trainer = GROUP_TRAINERS[name]
    on_disk = bool(arguments["beta"]) and not isinstance(model, PeftModel)
    with _named(model, Path(arguments["output_dir"]).with_name(".reference")) if on_disk else nullcontext():
        return _stopping(trainer)(
            model,
            _rewards(judge, rows, trees),
            config(**_plain(arguments)),
            train_dataset=Dataset.from_list(parts[0]),
            eval_dataset=Dataset.from_list(parts[1]) if parts[1] else None,
            processing_class=tokenizer,
            **rest,
        )


@contextmanager
def _named(model: Any, folder: Path) -> Iterator[None]:
    """Within, `model` is on disk, and called by its folder: TRL loads its reference by name, which a model changed in memory does
    not have. The first process writes it for all.
    """
    own_name = model.config._name_or_path
    try:
        if processes.number() == 0:
            model.save_pretrained(folder)
        processes.wait()
        model.config._name_or_path = str(folder)
        yield
        processes.wait()
    finally:
        model.config._name_or_path = own_name
        if processes.number() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _rewards(judge: Judge, rows: Sequence[Any], trees: Sequence[Tree]) -> Callable[..., list[float]]:
    """`judge` as a reward function of TRL's protocol; the column ``row`` says which of `rows` a completion answers."""

    def total(completion_ids: list[list[int]], row: list[int], log_metric: Callable[[str, float], None], **_: Any) -> list[float]:
        answers = [Completion(ids, finished=True) for ids in completion_ids]
        totals, components = judge([rows[i] for i in row], [trees[i].prompt for i in row], answers)
        for component, mean in component_means(components).items():
            log_metric(f"rewards/{component}", mean)
        return totals

    return total
