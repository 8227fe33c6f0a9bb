"""Token classification: a tag for each word, such as named entities in BIO."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForTokenClassification, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from align.errors import AlignError
from align.metrics.base import measure_all
from align.metrics.classes import of_entities
from align.schema import TaggedTokens
from align.tasks.base import IGNORED, Feature, Features, Task, task


@task("ner")
class Tagging(Task):
    """Each word is tagged at its first token; the others carry no loss. Words beyond the maximum length are tagged O. Tags that
    make no entities (not BIO) are measured by word.
    """

    kind = "tagging"
    metrics = ("seqeval", "accuracy")
    auto = AutoModelForTokenClassification
    per_token = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]) -> None:
        super().__init__(tokenizer, max_length, labels)
        if not all(map(of_entities, labels)):
            self.metrics = ("f1", "accuracy")

    @classmethod
    def count_labels(cls, rows: Sequence[TaggedTokens]) -> Counter[str]:
        return Counter(tag for row in rows for tag in row.tags)

    @classmethod
    def labels_of(cls, rows: Sequence[TaggedTokens]) -> list[str]:
        """Every tag of the rows, sorted, and O.

        Raises:
            AlignError: there is only O.
        """
        labels = ["O", *sorted(cls.count_labels(rows).keys() - {"O"})]
        if len(labels) == 1:
            raise AlignError(f"all words of the {len(rows)} rows have the tag 'O'; there is nothing to tell apart")
        return labels

    def features(self, rows: Sequence[TaggedTokens], *, training: bool) -> Features:
        """As in every task: rows without a token are set aside, so that each training row tells something.

        Raises:
            AlignError: rows to be measured by have none of the labels.
        """
        made = Features()
        numbers = {tag: i for i, tag in enumerate(self.labels)}
        for row in rows:
            unknown = next((tag for tag in row.tags if tag not in numbers), None)
            if unknown is not None and training:
                made.set_aside[f"with the tag {unknown!r}, which no training row has"] += 1
                continue
            item, firsts = self._encode(row.tokens)
            if not any(position is not None for position in firsts):
                made.set_aside["without a word that gives a token"] += 1
                continue
            if unknown is not None:
                made.notes[f"with the tag {unknown!r}, which no training row has"] += 1
            labels = [IGNORED] * len(item["input_ids"])
            for tag, position in zip(row.tags, firsts, strict=True):
                if position is not None:
                    labels[position] = numbers.get(tag, IGNORED)
            made.items.append({**item, "labels": labels})
            made.rows.append(row)
            if not training and not all(map(of_entities, row.tags)):
                made.notes["with tags that are not BIO: words are measured, not entities"] += 1
            if firsts[-1] is None and len(labels) == self.max_length:
                made.cut += 1
            elif None in firsts:
                made.notes["with a word that gives no token, and is tagged O"] += 1
        if made.items and all(label == IGNORED for item in made.items for label in item["labels"]):
            rest = f"the first has {made.rows[0].tags[0]!r}; tag them as training rows are"
            raise AlignError(f"none of the {len(made.rows)} rows has a tag of the model's ({', '.join(self.labels)}): {rest}")
        return made

    def _encode(self, words: Sequence[str]) -> tuple[Feature, list[int | None]]:
        """Tokens of a sentence, and where each word begins in them (None where it was cut off, or gives no token).

        Words are found by their characters, so that a tokenizer that joins the space to the word does as well as one that drops it.
        """
        ends, length = [], 0
        for word in words:
            length += len(word)
            ends.append(length)
            length += 1
        item = dict(self.tokenizer(" ".join(words), truncation=True, max_length=self.max_length, return_offsets_mapping=True))
        firsts: list[int | None] = [None] * len(words)
        number = 0
        for position, (start, end) in enumerate(item.pop("offset_mapping")):
            if start == end:  # a special token
                continue
            while number < len(words) and ends[number] < end:
                number += 1
            if number < len(words) and firsts[number] is None:
                firsts[number] = position
        return item, firsts

    def collate(self, batch: Sequence[Feature]) -> dict[str, torch.Tensor]:
        return dict(DataCollatorForTokenClassification(self.tokenizer)(list(batch)))

    def asking(self, text: str, context: str) -> TaggedTokens:
        """Words are parted at white space."""
        words = text.split() or [""]
        return TaggedTokens(tokens=words, tags=["O"] * len(words))

    def prompt(self, row: TaggedTokens) -> str:
        return " ".join(row.tokens)

    def written(self, row: TaggedTokens, answer: Sequence[str]) -> str:
        """The sentence, with a tag behind each word that has another than O: ``Ada/B-PER sings``."""
        return " ".join(word if tag == "O" else f"{word}/{tag}" for word, tag in zip(row.tokens, answer, strict=True))

    def check_expected(self, specs: Sequence[str], features: Features) -> None:
        tags = [row.tags for row in features.rows]
        measure_all(specs, predictions=tags, references=tags)

    def columns(self, output: Any, features: Features) -> dict[str, list[Any]]:
        found = (output[0] if isinstance(output, tuple) else output).argmax(-1)
        predictions = []
        for row, best in zip(features.rows, found, strict=True):
            firsts = self._encode(row.tokens)[1]
            predictions.append(["O" if position is None else self.labels[best[position]] for position in firsts])
        return {"predictions": predictions, "references": [row.tags for row in features.rows]}
