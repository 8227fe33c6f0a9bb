"""Our side: the forest, driven as the stages drive it."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainingArguments

from align.engine import compile_forest, enable_forest
from align.errors import AlignError
from align.losses import preference_losses
from align.scoring import branch_logps
from align.stages.base import TrainingStage
from align.trainers.forest import ForestTrainer
from align.trainers.objectives import LanguageModel, Objective, Preference, RewardModel
from benchmarks.training import BETA, GAMMA, LAMBDA, Clock, Outcome, arguments, finish, output_folder, synchronize
from benchmarks.work import Job, build

MAX_TOKENS: int = TrainingStage.model_fields["max_tokens_per_micro_batch"].default
"""Tokens in a forest: what the stages take unless told otherwise."""

PARAMETERS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": BETA["dpo"]},
    "orpo": {"lam": LAMBDA},
    "simpo": {"beta": BETA["simpo"], "gamma": GAMMA},
}


def needs_reference(method: str) -> bool:
    """Whether `method` compares the policy with a reference."""
    return method in PARAMETERS and preference_losses[method].needs_reference


def _objective(method: str) -> Objective:
    if method == "reward":
        return RewardModel()
    return LanguageModel() if method == "sft" else Preference(preference_losses[method], PARAMETERS[method])


def train(job: Job) -> Outcome:
    """One run on the forest.

    Raises:
        AlignError: the model does not run on the forest.
    """
    model = build(job)
    if reason := enable_forest(model, job.longest):
        raise AlignError(f"{type(model).__name__} would train on padded rows, as {reason}; nothing was measured")
    precision = torch.autocast(job.device, torch.bfloat16, enabled=job.bf16)  # as the stages do
    if job.compiled and (reason := compile_forest(model, precision)):
        raise AlignError(f"{type(model).__name__} would train uncompiled, as {reason}; nothing was measured")
    trees, reference_seconds = job.trees, 0.0
    if needs_reference(job.method):
        # Not `add_reference_logps`: from the second run on it would find them on disk.
        with precision:
            logps = branch_logps(model, trees[: job.warm_up_rows], MAX_TOKENS)
            synchronize(job.device)
            start = time.perf_counter()
            logps += branch_logps(model, trees[job.warm_up_rows :], MAX_TOKENS)
        synchronize(job.device)
        reference_seconds = time.perf_counter() - start
        trees = [replace(tree, values={"reference_logps": values}) for tree, values in zip(trees, logps, strict=True)]
    clock = Clock()
    with output_folder() as folder:
        args = TrainingArguments(**arguments(job, folder))
        trainer = ForestTrainer(model, _objective(job.method), args, trees, max_tokens=MAX_TOKENS, callbacks=[clock])
        return finish(job, trainer, clock, reference_seconds)
