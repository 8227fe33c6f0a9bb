"""What a task is, and how a trained one is kept beside its model."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object, recursively_apply
from pydantic import BaseModel, ValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from align.catalog import Catalog
from align.checkpointing import SafeTrainer
from align.engine import check_reach
from align.errors import AlignError, told_of, within
from align.guarded import FiniteTrainer
from align.metrics import columns_of
from align.metrics.base import check, measure_all, refuse_missing
from align.models import load_model
from align.progress import say
from align.runner.files import json_record, write_atomically

TASK_FILE = "task.json"
"""In a trained model's folder: which task it does, with which labels and arguments."""

IGNORED = -100
"""The label of a token that nothing is told of."""

Feature = dict[str, Any]


@dataclass
class Features:
    """What rows became. A row may give several features (windows of a long context); `rows` are those that gave any."""

    items: list[Feature] = field(default_factory=list)
    rows: list[Any] = field(default_factory=list)
    cut: int = 0
    """Rows that were cut to the maximum length."""
    set_aside: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    """What else is to be known, and of how many of the rows."""

    def summary(self) -> str:
        """One line that adds up."""
        aside = sum(self.set_aside.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.set_aside.items())
        line = f"{len(self.rows) + aside} rows = {len(self.rows)} used + {aside} set aside{f' ({reasons})' if reasons else ''}"
        notes = {**({"cut to max_length": self.cut} if self.cut else {}), **self.notes}
        return line + "".join(f"; {count} {note}" for note, count in notes.items())


class TaskTrainer(FiniteTrainer, SafeTrainer):
    """transformers' Trainer. The loss of an optimizer step is the mean over all that its rows tell (`told`), and that of an
    evaluation the mean over its set, however rows are cut into batches and dealt to processes. Rows that the last batches of
    several processes are filled up with count nowhere.
    """

    def __init__(self, *args: Any, task: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.task = task
        # Models take the number of items of the whole step as a keyword, and most heads then do not look at it.
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, *args: Any) -> Any:
        batches, _ = super().get_batch_samples(*args)
        counts = list(map(told, batches))
        if batches:
            batches[-1], counts[-1] = _own(batches[-1], self.own_rows(len(batches[-1]["input_ids"]), self.train_remainder))
        # The model's loss of a micro-batch is its mean. The Trainer averages over processes, and divides that by this.
        mean = sum(gather_object([sum(counts)])) / self.accelerator.num_processes
        self._divisors = iter([mean / count if count else math.inf for count in counts])
        return batches, None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.current_gradient_accumulation_steps = next(self._divisors)
        return super().training_step(model, inputs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer's keeps rows that fill up
        self._losses = self._told = 0.0
        output = super().evaluation_loop(*args, **kwargs)
        losses, count = map(sum, zip(*gather_object([(self._losses, self._told)]), strict=True))
        output.metrics[f"{kwargs.get('metric_key_prefix', 'eval')}_loss"] = losses / count if count else math.nan
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows = len(inputs["input_ids"])
        inputs, count = _own(inputs, self.own_rows(rows, self.accelerator.gradient_state.remainder))
        loss, *output = super().prediction_step(model, inputs, *args, **kwargs)
        if count:
            self._losses, self._told = self._losses + count * loss.item(), self._told + count
        again = torch.arange(rows, device=self.args.device) % len(inputs["input_ids"])
        # Every process hands in as many; what is too many is left out of what they gather.
        return loss, *recursively_apply(lambda tensor: tensor[again], output)


def told(batch: dict[str, torch.Tensor]) -> int:
    """How many losses the model takes the mean of: those of the tokens that have a label, or of the rows."""
    return int((batch["labels"] != IGNORED).sum()) if "labels" in batch else len(batch["input_ids"])


def _own(batch: dict[str, torch.Tensor], rows: int) -> tuple[dict[str, torch.Tensor], int]:
    """The first `rows` of a batch, and what they tell; of none the first, which tells nothing: its process works along."""
    own = {name: tensor[: max(1, rows)] for name, tensor in batch.items()}
    return own, told(own) if rows else 0


class Task:
    """A task with one tokenizer, maximum length and set of labels. Its keyword-only arguments are `task_args`."""

    kind: ClassVar[str]
    """Kind of its rows (`align.schema.KINDS`)."""
    metrics: tuple[str, ...]
    """What it is measured by unless the user says otherwise."""
    auto: ClassVar[Any]
    """The transformers class that loads a model with the task's head."""
    per_token: ClassVar[bool] = False
    """Whether answers are read at the places of tokens, which virtual tokens in front of an encoder's would move."""
    trainer: ClassVar[type[Trainer]] = TaskTrainer
    training_arguments: ClassVar[type[TrainingArguments]] = TrainingArguments

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: Sequence[str]) -> None:
        self.tokenizer, self.max_length, self.labels = tokenizer, max_length, list(labels)

    @classmethod
    def count_labels(cls, rows: Sequence[Any]) -> Counter[str]:
        """How often training rows have each label."""
        return Counter()

    @classmethod
    def labels_of(cls, rows: Sequence[Any]) -> list[str]:
        """The labels that training rows have, in the order of the model's outputs."""
        return []

    def model(self, path: str, **options: Any) -> nn.Module:
        """The model at `path` with the task's head, which is new unless it was trained before.

        Args:
            options: as for `align.models.load_causal_lm`.

        Raises:
            AlignError: there is no such model, none of its family for this task, or its head is for another number of labels.
        """
        fields: dict[str, Any] = {}
        if self.labels:
            fields["id2label"] = dict(enumerate(self.labels))
            fields["label2id"] = {label: i for i, label in enumerate(self.labels)}
        try:
            return load_model(self.auto, path, **options, **fields)
        except AlignError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            mend = "start from the model that it was made from"
            if is_task_model(path):
                mend = f"put its {TASK_FILE} back as `align task` wrote it, or train the model again"
            raise AlignError(f"{path} has a head for another number of labels than {len(self.labels)}: {mend}") from error

    def check_reach(self, model: nn.Module, items: Sequence[Feature]) -> None:
        """Raise `AlignError` where `model` has places for fewer tokens than the longest of `items` has."""
        check_reach(model, max(map(tokens, items)))

    def features(self, rows: Sequence[Any], *, training: bool) -> Features:
        """Rows as the model takes them; with `training` those without a usable target are set aside."""
        raise NotImplementedError

    def collate(self, batch: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Features as one padded batch."""
        raise NotImplementedError

    def arguments(self) -> dict[str, Any]:
        """What this task adds to `transformers.TrainingArguments`."""
        return {}

    def columns(self, output: Any, features: Features) -> dict[str, list[Any]]:
        """``predictions`` and ``references``, one for each row, from the model's `output` (numpy arrays) over the features."""
        raise NotImplementedError

    def asking(self, text: str, context: str) -> Any:
        """A row whose answer nobody knows, about `text`. A `context` is read by question answering alone."""
        raise NotImplementedError

    def prompt(self, row: Any) -> str:
        """What `row` asks, as people read it."""
        raise NotImplementedError

    def written(self, row: Any, answer: Any) -> Any:
        """An answer to `row`, a prediction or a reference of `columns`, as people read it."""
        return answer

    def measure(self, specs: Sequence[str], output: Any, features: Features) -> dict[str, float]:
        """The metrics `specs` of the model's `output`."""
        return measure_all(specs, **self.columns(output, features))

    def check_expected(self, specs: Sequence[str], features: Features) -> None:
        """Raise `AlignError`, before any work, where one of `specs` cannot measure what the rows of `features` expect."""

    @classmethod
    def check_metrics(cls, specs: Sequence[str]) -> None:
        """Raise `AlignError` where one of `specs` needs what this task does not give, or what is not installed."""
        for spec in specs:
            name, _ = check(spec)
            if lacking := [column for column in columns_of(name) if column not in ("predictions", "references")]:
                raise AlignError(f"metric {name!r} needs {lacking[0]!r}, and a task gives predictions and references")
        refuse_missing(specs)


tasks: Catalog[Any] = Catalog("task")


def task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Register a task class under `name`."""
    return lambda cls: tasks.add(cls, name)


def save_task(folder: Path, name: str, built: Task, arguments: dict[str, Any]) -> None:
    """Write down beside a model which task it was trained for."""
    content = {"task": name, "labels": built.labels, "max_length": built.max_length, "task_args": arguments}
    write_atomically(folder / TASK_FILE, json.dumps(content, indent=1, ensure_ascii=False))


class Trained(BaseModel, strict=True):
    """What `TASK_FILE` holds."""

    task: str
    labels: list[str]
    max_length: int
    task_args: dict[str, Any]


def _trained(path: str) -> Trained | None:
    """What the model in the folder `path` was trained for; None where it was for no task.

    Raises:
        AlignError: the file is damaged, or is about a task that there is not.
    """
    file = Path(path) / TASK_FILE
    if not file.is_file():
        return None
    try:
        found = Trained(**json_record(file))
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {within(first['msg'])}"
        raise AlignError(f"{file} is damaged ({what}): put it back as `align task` wrote it, or train the model again") from error
    with told_of(str(file)):
        tasks.check_arguments(found.task, found.task_args)
        tasks.check_values(found.task, found.task_args)
    return found


def read_task(path: str, tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task that the model in the folder `path` was trained for; of one that `is_task_model`.

    Raises:
        AlignError: what says so is damaged.
    """
    stored = _trained(path)
    assert stored is not None
    with told_of(str(Path(path) / TASK_FILE)):
        built: Task = tasks[stored.task](tokenizer, stored.max_length, stored.labels, **stored.task_args)
    return built


def labels_of_head(path: str, name: str, labels: Sequence[str]) -> list[str]:
    """The labels of the model at `path` for rows that have `labels`: its own, in its order, where it was trained for task `name`.

    Raises:
        AlignError: the rows have one that its head does not know, its head is that of another task, or what says so is damaged.
    """
    stored = _trained(path)
    if stored is None or not stored.labels or not labels or "cloze" in (name, stored.task):  # a cloze has no head
        return list(labels)
    own = stored.labels
    if stored.task != name:
        raise AlignError(f"{path} has a head for {stored.task}, not for {name}: start from the model that it was made from")
    if unknown := [label for label in labels if label not in own]:
        raise AlignError(
            f"{path} knows the labels {', '.join(own)}, and rows have {unknown[0]!r}: for a new head start from the model that it "
            "was made from"
        )
    return own


def is_task_model(path: str) -> bool:
    """Whether the folder `path` holds a model of the stage `task`."""
    return (Path(path) / TASK_FILE).is_file()


def tokens(item: Feature) -> int:
    """How many tokens the model reads of `item`, or is to write of it."""
    labels = item.get("labels")
    return max(len(item["input_ids"]), len(labels) if isinstance(labels, list) else 0)


def used(features: Features, label: str) -> Features:
    """`features`, with a line where rows were cut or set aside, or there is something else to be known.

    Raises:
        AlignError: none is left.
    """
    if features.cut or features.set_aside or features.notes:
        say(f"{label}: {features.summary()}")
    if not features.items:
        raise AlignError(f"{label}: none of the rows can be used: {features.summary()}")
    return features


def few(rows: list[Any], shots: int, seed: int) -> list[Any]:
    """`shots` rows of each label, drawn at random."""
    by_label: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    for label, own in by_label.items():
        if len(own) < shots:
            raise AlignError(f"shots {shots}: the label {label!r} has {len(own)} rows")
    draw = random.Random(seed)
    return [row for label in sorted(by_label) for row in draw.sample(by_label[label], shots)]
