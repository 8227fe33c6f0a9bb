"""A model that was trained for a task answers rows of that task, and is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.errors import AlignError, told_of
from align.metrics.base import measure_all
from align.models import ensure_pad_token, load_tokenizer
from align.progress import say
from align.tasks.base import TASK_FILE, Features, read_task, used


class TaskModel:
    """The model in the folder `path`, with its task. Its weights are read when it first answers.

    Raises:
        AlignError: what says which task it is for is damaged.
    """

    def __init__(self, path: str, *, dtype: str = "float32", batch_size: int = 32, trust_remote_code: bool = False) -> None:
        self.path, self._batch_size = path, batch_size
        self._loading = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        self._tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self.task = read_task(path, self._tokenizer)
        self._trainer: Any = None

    def _load(self) -> Any:
        arguments = self.task.training_arguments(
            output_dir=self.path,  # the Trainer wants one, and writes nothing there
            per_device_eval_batch_size=self._batch_size,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to=[],
            **self.task.arguments(),
        )
        model = self.task.model(self.path, **self._loading)
        ensure_pad_token(self._tokenizer, model)  # the base of an adapter may have none
        parts = {"data_collator": self.task.collate, "processing_class": self._tokenizer, "task": self.task}
        return self.task.trainer(model=model, args=arguments, **parts)

    def columns(self, features: Features) -> dict[str, list[Any]]:
        """``predictions`` and ``references``, one for each row of `features`.

        Raises:
            AlignError: one is longer than the model reads, though not than the maximum length that it was trained with.
        """
        self._trainer = self._trainer or self._load()
        with told_of(str(Path(self.path) / TASK_FILE)):
            self.task.check_reach(self._trainer.model, features.items)
        return self.task.columns(self._trainer.predict(features.items).predictions, features)

    def measure(self, rows: Sequence[Any], specs: Sequence[str]) -> tuple[dict[str, Any], list[tuple[Any, Any, Any]]]:
        """Metrics on `rows`, and how many of them could be used; and each of these with its answer and the expected one.

        Args:
            specs: metrics by name; the task's own where there are none.

        Raises:
            AlignError: none of the rows can be used.
        """
        features = used(self.task.features(rows, training=False), self.path)
        specs = specs or self.task.metrics
        self.task.check_expected(specs, features)
        columns = self.columns(features)
        found = {**measure_all(specs, **columns), "n": len(features.rows)}
        written = [map(self.task.written, features.rows, columns[name]) for name in ("predictions", "references")]
        return found, list(zip(features.rows, *written, strict=True))

    def answer(self, text: str, context: str) -> str:
        """What the model says of one text, or to a question about `context`.

        Raises:
            AlignError: it cannot be read, or is a question without a context.
        """
        if self.task.kind == "qa" and not context.strip():
            raise AlignError(f"{self.path} answers questions about a text: give that as the system prompt (--system, or /system)")
        row = self.task.asking(text, context)
        features = self.task.features([row], training=False)
        if not features.items:
            raise AlignError(f"{self.path} cannot read this: {features.summary()}")
        if features.cut:
            say(f"{self.path} reads the first {self.task.max_length} tokens")
        (said,) = self.columns(features)["predictions"]
        return str(self.task.written(row, said))
