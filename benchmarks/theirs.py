"""Their side: TRL's trainers, as they come.

Some of them take text only. So that both sides see the very same tokens, a row's ids are written as words and read back by a
tokenizer that knows one word for each id.
"""

from __future__ import annotations

import os

os.environ.update(TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")  # read when they are imported

import time
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import datasets
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from align.forest import Tree
from benchmarks.training import BETA, GAMMA, LAMBDA, Clock, Outcome, arguments, finish, output_folder, synchronize
from benchmarks.work import EOS, PAD, Job, build

datasets.disable_progress_bars()
warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)  # the only name TRL knows


def words(ids: Sequence[int]) -> str:
    """`ids` as text for `word_tokenizer`."""
    return "".join(f" <{i}>" for i in ids)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Reads what `words` writes."""
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token=f"<{PAD}>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=f"<{PAD}>", eos_token=f"<{EOS}>")


def pairs_as_text(trees: Sequence[Tree]) -> Dataset:
    """Columns `prompt`, `chosen` and `rejected`."""
    return Dataset.from_list(
        [{"prompt": words(t.prompt), "chosen": words(t.branches[0]), "rejected": words(t.branches[1])} for t in trees]
    )


def pairs_as_ids(trees: Sequence[Tree]) -> Dataset:
    """Columns `chosen_ids` and `rejected_ids`, each answer with its prompt."""
    return Dataset.from_list([{"chosen_ids": t.prompt + t.branches[0], "rejected_ids": t.prompt + t.branches[1]} for t in trees])


def rows_as_ids(trees: Sequence[Tree]) -> Dataset:
    """Columns `input_ids` and `labels`, -100 where no loss is taken."""
    rows = []
    for tree in trees:
        assert tree.prompt_mask is not None
        labels = [i if counts else -100 for i, counts in zip(tree.prompt, tree.prompt_mask, strict=True)]
        rows.append({"input_ids": tree.prompt, "labels": labels})
    return Dataset.from_list(rows)


class TimedDPOTrainer(DPOTrainer):
    """`DPOTrainer` that knows how long its pass over the reference took, which is a part of its construction. The first
    `warm_up_rows` are done before, and not counted.
    """

    reference_seconds = 0.0

    def __init__(self, *args: Any, warm_up_rows: int, **kwargs: Any) -> None:
        self.warm_up_rows = warm_up_rows
        super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        first, others = (dataset.select(part) for part in (range(self.warm_up_rows), range(self.warm_up_rows, len(dataset))))
        warm_up = super()._precompute_ref_logps(first, *args, **kwargs)
        synchronize(str(self.args.device))
        start = time.perf_counter()
        timed = super()._precompute_ref_logps(others, *args, **kwargs)
        synchronize(str(self.args.device))
        self.reference_seconds = time.perf_counter() - start
        return datasets.concatenate_datasets([warm_up, timed])


def _dpo(job: Job, model: nn.Module, shared: dict[str, Any], rest: dict[str, Any]) -> DPOTrainer:
    args = DPOConfig(**shared, beta=BETA["dpo"], max_length=None, precompute_ref_log_probs=job.precompute)
    reference = None if job.precompute else deepcopy(model)  # by itself it would load one from disk
    rows = pairs_as_text(job.trees)
    return TimedDPOTrainer(model, reference, args, train_dataset=rows, warm_up_rows=job.warm_up_rows, **rest)


def _orpo(job: Job, model: nn.Module, shared: dict[str, Any], rest: dict[str, Any]) -> ORPOTrainer:
    args = ORPOConfig(**shared, beta=LAMBDA, max_length=job.longest)
    return ORPOTrainer(model, args, train_dataset=pairs_as_text(job.trees), **rest)


def _simpo(job: Job, model: nn.Module, shared: dict[str, Any], rest: dict[str, Any]) -> CPOTrainer:
    simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA["simpo"], "simpo_gamma": GAMMA}
    args = CPOConfig(**shared, **simpo, max_length=job.longest)
    return CPOTrainer(model, args, train_dataset=pairs_as_text(job.trees), **rest)


def _reward(job: Job, model: nn.Module, shared: dict[str, Any], rest: dict[str, Any]) -> RewardTrainer:
    args = RewardConfig(**shared, max_length=None)
    return RewardTrainer(model, args, train_dataset=pairs_as_ids(job.trees), **rest)


def _sft(job: Job, model: nn.Module, shared: dict[str, Any], rest: dict[str, Any]) -> SFTTrainer:
    args = SFTConfig(**shared, max_length=None)
    return SFTTrainer(model, args, train_dataset=rows_as_ids(job.trees), **rest)


TRAINERS: dict[str, Callable[..., Any]] = {"dpo": _dpo, "orpo": _orpo, "simpo": _simpo, "reward": _reward, "sft": _sft}


def train(job: Job) -> Outcome:
    """One run of TRL's trainer for the job's method."""
    clock = Clock()
    rest = {"processing_class": word_tokenizer(job.architecture["vocab_size"]), "callbacks": [clock]}
    with output_folder() as folder:
        shared = {**arguments(job, folder), "gradient_checkpointing": False}  # on by default in TRL alone
        trainer = TRAINERS[job.method](job, build(job), shared, rest)
        return finish(job, trainer, clock, getattr(trainer, "reference_seconds", 0.0))
