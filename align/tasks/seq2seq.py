"""Sequence to sequence: an encoder-decoder (T5, BART) reads the prompt and writes the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from align.engine import check_reach
from align.errors import AlignError
from align.models import family_of, load_config
from align.rewards import text_of
from align.schema import SFTRow, Text
from align.tasks.base import Feature, Features, Task, TaskTrainer, task


class Seq2SeqTaskTrainer(TaskTrainer, Seq2SeqTrainer):
    """Measures what the model writes."""


@task("seq2seq")
class Seq2Seq(Task):
    """Rows are demonstrations; conversations are read as plain text. Measured on greedy answers.

    Args:
        prefix: put in front of every prompt, such as "summarize: ".
        longest_answer: tokens, in training and in measuring.
    """

    kind = "sft"
    metrics = ("rouge", "bleu")
    auto = AutoModelForSeq2SeqLM
    trainer = Seq2SeqTaskTrainer
    training_arguments = Seq2SeqTrainingArguments

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str],
        *,
        prefix: str = "",
        longest_answer: Annotated[int, Field(gt=0)] = 64,
    ) -> None:
        super().__init__(tokenizer, max_length, labels)
        self.prefix, self.longest_answer = prefix, longest_answer

    def model(self, path: str, **options: Any) -> nn.Module:
        family = family_of(load_config(path, trust_remote_code=options.get("trust_remote_code", False)))
        if family != "encoder-decoder":
            raise AlignError(
                f"{path} is of the family {family!r}, and task 'seq2seq' takes an encoder-decoder (T5, BART and the like)"
            )
        return super().model(path, **options)

    def check_reach(self, model: nn.Module, items: Sequence[Feature]) -> None:
        """As in every task; and the decoder must have places for as many tokens as an answer may come to have."""
        check_reach(model, self.longest_answer, what="longest answer may have", field="task_args.longest_answer")
        super().check_reach(model, items)

    def features(self, rows: Sequence[SFTRow], *, training: bool) -> Features:
        made, end = Features(), self.tokenizer.eos_token_id
        for row in rows:
            source, target = _sides(row)
            ids, labels = self.tokenizer(self.prefix + source)["input_ids"], self.tokenizer(text_target=target)["input_ids"]
            if not ids:
                made.set_aside["with an empty prompt"] += 1
                continue
            made.cut += len(ids) > self.max_length
            if len(labels) > self.longest_answer:
                made.notes["with an answer cut to longest_answer"] += 1
            item = dict(self.tokenizer(self.prefix + source, truncation=True, max_length=self.max_length))
            item["labels"] = [*(i for i in labels[: self.longest_answer - 1] if i != end), end]
            made.items.append(item)
            made.rows.append(row)
        return made

    def collate(self, batch: Sequence[Feature]) -> dict[str, torch.Tensor]:
        return dict(DataCollatorForSeq2Seq(self.tokenizer)(list(batch)))

    def arguments(self) -> dict[str, Any]:
        return {"predict_with_generate": True, "generation_max_length": self.longest_answer, "generation_num_beams": 1}

    def asking(self, text: str, context: str) -> SFTRow:
        return SFTRow(prompt=text, completion="")

    def prompt(self, row: SFTRow) -> str:
        return _sides(row)[0]

    def columns(self, output: Any, features: Features) -> dict[str, list[Any]]:
        ids = output[0] if isinstance(output, tuple) else output
        ids = ids.copy()
        ids[ids < 0] = self.tokenizer.pad_token_id  # the Trainer pads answers of a batch with -100
        said = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {"predictions": [text.strip() for text in said], "references": [_sides(row)[1] for row in features.rows]}


def _sides(row: SFTRow) -> tuple[str, str]:
    """What is read and what is to be written."""
    if row.messages is not None:
        last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")  # the user may have the last word
        return _plain(row.messages[:last]), row.messages[last].content
    assert row.prompt is not None
    assert row.completion is not None
    return _plain(row.prompt), _plain(row.completion)


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else text_of([message.model_dump() for message in text])
