"""Extractive question answering: the span of a context that answers a question, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, PreTrainedTokenizerBase

from align.errors import AlignError
from align.schema import QARow
from align.tasks.base import Feature, Features, Task, TaskTrainer, task


class SpanTrainer(TaskTrainer):
    """Firsts and lasts compete among the tokens of their own window. In transformers' heads so do places of padding: what a window
    loses depends on those beside it there.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy, the mean of first and last."""
        outputs = model(**inputs)
        padding = inputs["attention_mask"] == 0
        first, last = (outputs[name].float().masked_fill(padding, -torch.inf) for name in ("start_logits", "end_logits"))
        entropy = nn.functional.cross_entropy
        loss = (entropy(first, inputs["start_positions"]) + entropy(last, inputs["end_positions"])) / 2
        return (loss, outputs) if return_outputs else loss


@task("qa")
class QuestionAnswering(Task):
    """The model scores each token as the answer's first and last. A context that does not fit is read in overlapping windows.

    Args:
        stride: tokens that neighbouring windows share.
        longest_answer: tokens.
        may_be_unanswerable: let the model say that the context holds no answer, by the span of the first token (SQuAD 2.0). Then
            the prediction is empty.
    """

    kind = "qa"
    metrics = ("exact_match", "token_f1")
    auto = AutoModelForQuestionAnswering
    trainer = SpanTrainer
    per_token = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str],
        *,
        stride: int = 64,
        longest_answer: Annotated[int, Field(gt=0)] = 30,
        may_be_unanswerable: bool = False,
    ) -> None:
        super().__init__(tokenizer, max_length, labels)
        if not 0 <= stride < max_length // 2:
            what = f"stride {stride} must be below half of max_length ({max_length})"
            raise AlignError(f"{what}: windows have to move on; set task_args.stride, or raise max_length")
        self.stride, self.longest_answer, self.may_be_unanswerable = stride, longest_answer, may_be_unanswerable

    def features(self, rows: Sequence[QARow], *, training: bool) -> Features:
        made = Features()
        for row in rows:
            if not row.context.strip():
                made.set_aside["without a context"] += 1
                continue
            span = _span(row)
            lacking = span is None and not (self.may_be_unanswerable and not row.answers)
            lack = "without an answer in the context" if row.answers else "unanswerable (see may_be_unanswerable)"
            if training and lacking:
                made.set_aside[lack] += 1
                continue
            windows = self._windows(row)
            if windows is None:
                made.set_aside["whose question leaves no room for the context"] += 1
                continue
            if lacking:  # measured all the same, and missed
                made.notes[lack] += 1
            if span and row.starts and row.starts[0] != span[0]:
                made.notes["whose answer does not begin where its start says, and is read at its first place"] += 1
            for window in windows:
                start, end = _tokens_of(span, window["offsets"]) if span else (0, 0)
                item = {"start_positions": start, "end_positions": end, "row": len(made.rows)}
                made.items.append({**window, **item})
            made.rows.append(row)
        return made

    def _windows(self, row: QARow) -> list[Feature] | None:
        """The tokens of question and context, in as many windows as it takes; ``offsets`` are None outside the context."""
        question = row.question.strip()
        room = self.max_length - len(self.tokenizer(question, " ")["input_ids"])
        if room <= self.stride:
            return None
        encoding = self.tokenizer(
            question,
            row.context,
            truncation="only_second",
            max_length=self.max_length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = []
        for i, offsets in enumerate(encoding["offset_mapping"]):
            inside = [pair if part == 1 else None for part, pair in zip(encoding.sequence_ids(i), offsets, strict=True)]
            names = [name for name in self.tokenizer.model_input_names if name in encoding]
            windows.append({**{name: encoding[name][i] for name in names}, "offsets": inside})
        return windows

    def collate(self, batch: Sequence[Feature]) -> dict[str, torch.Tensor]:
        plain = [{key: value for key, value in item.items() if key not in ("offsets", "row")} for item in batch]
        return dict(DataCollatorWithPadding(self.tokenizer)(plain))

    def asking(self, text: str, context: str) -> QARow:
        return QARow(question=text, context=context)

    def prompt(self, row: QARow) -> str:
        return f"{row.question}\n\n{row.context}"

    def columns(self, output: Any, features: Features) -> dict[str, list[Any]]:
        starts, ends = output[:2]
        best: list[tuple[float, str]] = [(float("-inf"), "")] * len(features.rows)
        empty = [float("inf")] * len(features.rows)
        for item, start, end in zip(features.items, starts, ends, strict=True):
            number = item["row"]
            empty[number] = min(empty[number], float(start[0] + end[0]))
            score, span = self._best_span(item["offsets"], start, end)
            if span is not None and score > best[number][0]:
                best[number] = (score, features.rows[number].context[slice(*span)].strip())
        predictions = [
            "" if self.may_be_unanswerable and none > score else text for (score, text), none in zip(best, empty, strict=True)
        ]
        return {"predictions": predictions, "references": [list(row.answers) or [""] for row in features.rows]}

    def _best_span(self, offsets: list[Any], start: Any, end: Any, candidates: int = 20) -> tuple[float, tuple[int, int] | None]:
        """The best score of a span inside the context, and its characters; among the likeliest firsts and lasts."""
        best: tuple[float, tuple[int, int] | None] = (float("-inf"), None)
        length = len(offsets)
        for first in start[:length].argsort()[::-1][:candidates]:
            for last in end[:length].argsort()[::-1][:candidates]:
                if not first <= last < first + self.longest_answer or offsets[first] is None or offsets[last] is None:
                    continue
                score = float(start[first] + end[last])
                if score > best[0]:
                    best = (score, (offsets[first][0], offsets[last][1]))
        return best


def _span(row: QARow) -> tuple[int, int] | None:
    """The characters of the row's first answer in its context, None where there is none."""
    if not row.answers:
        return None
    answer = row.answers[0]
    start = row.starts[0] if row.starts else row.context.find(answer)
    if start < 0 or row.context[start : start + len(answer)] != answer:
        start = row.context.find(answer)
    return None if start < 0 or not answer else (start, start + len(answer))


def _tokens_of(span: tuple[int, int], offsets: Sequence[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token that touch the characters `span`; the first token of all where the window does not hold all of it."""
    touching = [i for i, pair in enumerate(offsets) if pair is not None and pair[0] < span[1] and pair[1] > span[0]]
    if not touching:
        return 0, 0
    first, last = offsets[touching[0]], offsets[touching[-1]]
    assert first is not None
    assert last is not None
    return (touching[0], touching[-1]) if first[0] <= span[0] and last[1] >= span[1] else (0, 0)
