"""Sequence classification: one label for a text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from align.errors import AlignError
from align.schema import LabelledText
from align.tasks.base import Feature, Features, Task, task


@task("classification")
class Classification(Task):
    """A head over the labels on the first token (encoders), the last one (decoders) or the end token (encoder-decoders)."""

    kind = "classification"
    metrics = ("accuracy", "f1", "matthews")
    auto = AutoModelForSequenceClassification
    _read_at: int | None = None
    """The token at which the head reads, where it is found by its number."""

    @classmethod
    def count_labels(cls, rows: Sequence[LabelledText]) -> Counter[str]:
        return Counter(row.label for row in rows)

    @classmethod
    def labels_of(cls, rows: Sequence[LabelledText]) -> list[str]:
        """Every label of the rows, sorted.

        Raises:
            AlignError: there is only one.
        """
        labels = sorted(cls.count_labels(rows))
        if len(labels) < 2:
            raise AlignError(f"all {len(rows)} rows have the label {labels[0]!r}; there is nothing to tell apart")
        return labels

    def model(self, path: str, **options: Any) -> nn.Module:
        model: Any = super().model(path, **options)
        self._read_at = model.config.eos_token_id if model.config.is_encoder_decoder else None
        return model

    def features(self, rows: Sequence[LabelledText], *, training: bool) -> Features:
        made = Features()
        numbers = {label: i for i, label in enumerate(self.labels)}
        for row in rows:
            if not row.text.strip():
                made.set_aside["with an empty text"] += 1
                continue
            if row.label not in numbers:
                made.set_aside[f"with the label {row.label!r}, which no training row has"] += 1
                continue
            item, cut = self.encode(row.text)
            made.items.append({**item, "labels": numbers[row.label]})
            made.rows.append(row)
            made.cut += cut
        return made

    def encode(self, text: str) -> tuple[Feature, bool]:
        """The features of `text`, and whether it was cut."""
        item = dict(self.tokenizer(text, truncation=True, max_length=self.max_length + 1))
        cut = len(item["input_ids"]) > self.max_length
        return (dict(self.tokenizer(text, truncation=True, max_length=self.max_length)) if cut else item), cut

    def collate(self, batch: Sequence[Feature]) -> dict[str, torch.Tensor]:
        return dict(DataCollatorWithPadding(self.tokenizer)(list(map(self._ended, batch))))

    def _ended(self, item: Feature) -> Feature:
        """`item` with one token to read at, at its end: some tokenizers add none, and a text may hold one."""
        ids, end = item["input_ids"], self._read_at
        if end is None or ids.count(end) == 1:
            return item
        ids = [*[token for token in ids if token != end][: self.max_length - 1], end]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": item["labels"]}

    def asking(self, text: str, context: str) -> LabelledText:
        return LabelledText(text=text, label=self.labels[0])

    def prompt(self, row: LabelledText) -> str:
        return row.text

    def columns(self, output: Any, features: Features) -> dict[str, list[Any]]:
        found = output[0] if isinstance(output, tuple) else output
        predictions = [self.labels[i] for i in found.argmax(-1)]
        return {"predictions": predictions, "references": [row.label for row in features.rows]}
