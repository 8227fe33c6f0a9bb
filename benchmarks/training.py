"""What both trainers share: the arguments of transformers' Trainer, and the clock."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from benchmarks.work import BATCH, Job

BETA, GAMMA, LAMBDA = {"dpo": 0.1, "simpo": 2.0}, 1.0, 0.1
"""The losses' parameters, named as in their papers."""


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    seconds: float
    """All steps but those that warm up, and the pass over the reference for their rows."""
    log: list[dict[str, float]]
    """The metrics of each step."""

    def metric(self, name: str) -> list[float]:
        """`name` after each step."""
        return [record[name] for record in self.log if name in record]


def arguments(job: Job, folder: str) -> dict[str, Any]:
    """The same arguments for both sides: AdamW at a constant rate, batches in the job's order."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": len(job.batches),
        "train_sampling_strategy": "sequential",
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "bf16": job.bf16,
        "logging_steps": job.logging_steps,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": job.device == "cpu",
        "seed": job.seed,
    }


class Clock(TrainerCallback):
    """When each step ended. A GPU notes that itself, so that it need not be waited for."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())

    def seconds(self, warm_up: int) -> float:
        """All steps but the first `warm_up` ones."""
        first, last = self.ends[warm_up - 1], self.ends[-1]
        if isinstance(first, torch.cuda.Event):
            last.synchronize()
            return first.elapsed_time(last) / 1000
        return last - first


def synchronize(device: str) -> None:
    """Wait until `device` has done what was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def finish(job: Job, trainer: Any, clock: Clock, reference_seconds: float = 0.0) -> Outcome:
    """Run `trainer`; `reference_seconds` were spent on the rows of the timed steps."""
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.train()
    return Outcome(clock.seconds(job.warm_up) + reference_seconds, trainer.state.log_history)


def output_folder() -> tempfile.TemporaryDirectory:
    """Where a trainer may write; gone when the run is."""
    return tempfile.TemporaryDirectory(prefix="align-bench-")
