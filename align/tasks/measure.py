"""Measures a model that was trained for a task on rows of that task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.models import ensure_pad_token, load_tokenizer
from align.tasks.base import read_task, used


def measure_task_model(
    path: str,
    rows_of: Any,
    specs: Sequence[str],
    folder: Path,
    *,
    dtype: str = "float32",
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Metrics of the model in the folder `path`, and how many rows they are about.

    Args:
        rows_of: from the kind of rows to rows.
        specs: metrics by name; the task's own where there are none.
        folder: a place that the Trainer may name; nothing is written there.

    Raises:
        AlignError: none of the rows can be used, or a metric needs what the task does not give.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    task = read_task(path, tokenizer)
    specs = list(specs) or list(task.metrics)
    task.check_metrics(specs)
    features = used(task.features(rows_of(task.kind), training=False), path)
    arguments = task.training_arguments(
        output_dir=str(folder),
        per_device_eval_batch_size=batch_size,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        **task.arguments(),
    )
    model = task.model(path, dtype=dtype, trust_remote_code=trust_remote_code)
    ensure_pad_token(tokenizer, model)  # the base of an adapter may have none
    trainer = task.trainer(model=model, args=arguments, data_collator=task.collate, processing_class=tokenizer, task=task)
    output = trainer.predict(features.items).predictions
    return {**task.measure(specs, output, features), "n": len(features.rows)}
