"""Training for a task: classification, named entities, question answering, sequence to sequence, cloze."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from align.stages.base import Context, TrainingStage, stage
from align.stages.config import MetricSpecs


@stage("task")
class TaskTraining(TrainingStage):
    """Train a model for a task: a new head (or a cloze) on an encoder, a decoder or an encoder-decoder."""

    task: str
    """classification, ner, qa, seq2seq or cloze (docs/tasks.md)."""
    task_args: dict[str, Any] = Field(default_factory=dict)
    """The task's arguments, such as `pattern` and `verbalizer` of cloze or `stride` of qa."""
    metrics: MetricSpecs = Field(default_factory=list)
    """Metrics by name, on held-out rows, instead of the task's own (docs/metrics.md)."""
    shots: int | None = Field(None, gt=0)
    """Train on so many rows a label, drawn at random (few-shot); for classification and cloze."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate: 2e-5 to 1e-4 for all weights of an encoder, 1e-3 for a head or an adapter (3e-4 for entities)."""
    max_length: int = Field(256, gt=8)
    """Longest row in tokens."""

    @property
    def reads(self) -> str:  # type: ignore[override]
        from align.tasks import tasks

        kind: str = tasks[self.task].kind
        return kind

    @model_validator(mode="after")
    def _labels_are_drawn_from(self) -> TaskTraining:
        if self.shots is not None and self.task not in ("classification", "cloze"):
            raise ValueError(f"shots draws rows by their label, which rows of task {self.task!r} do not have")
        return self

    @model_validator(mode="after")
    def _runs_on_transformers(self) -> TaskTraining:
        given = self.model_fields_set & {"engine", "chat_template", "max_tokens_per_micro_batch", "torch_compile"}
        if given:
            raise ValueError(f"{min(given)} has no part in a task: it is trained on padded rows by transformers' Trainer")
        if self.on_non_finite != "stop":
            raise ValueError("a task stops at a loss that is not finite: leave on_non_finite at 'stop'")
        return self

    def check(self) -> None:
        from align.tasks import tasks

        super().check()
        tasks.check_arguments(self.task, self.task_args)
        tasks.check_values(self.task, self.task_args)
        tasks[self.task].check_metrics(self.metrics or tasks[self.task].metrics)

    def run(self, context: Context) -> dict[str, Any]:
        from align.errors import AlignError
        from align.models import load_tokenizer
        from align.progress import say
        from align.stages import training as t
        from align.tasks import tasks
        from align.tasks.base import few, labels_of_head, save_task, used
        from align.tuning.soft import is_decoder

        cls = tasks[self.task]
        t.seed_everything(self)
        rows, held = t.rows_of(self, cls.kind, context)
        if self.metrics and not held:
            raise AlignError("metrics needs held-out rows: set eval_data, or raise held_out (of few rows it may keep none apart)")
        if self.shots is not None:
            rows = few(rows, self.shots, self.seed)
        tokenizer = load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)
        labels = labels_of_head(self.model, self.task, cls.labels_of(rows))
        if labels:
            say(f"{context.name}: {told_labels(labels, cls.count_labels(rows))}")
        task = cls(tokenizer, self.max_length, labels, **self.task_args)
        specs = self.metrics or list(task.metrics)
        model = task.model(self.model, **t.loading(self))
        if task.per_token and self.strategy.name in ("prompt", "ptuning") and not is_decoder(model):
            raise AlignError(
                f"tuning {self.strategy.name!r} puts virtual tokens in front; task {self.task!r} reads answers at the places of "
                "tokens, which moves them: use prefix"
            )
        model = t.make_ready(self, context.name, model, tokenizer, None, context.folder)
        train = used(task.features(rows, training=True), context.name)
        test = used(task.features(held, training=False), f"{context.name} (held out)") if held else None
        if test is not None:
            task.check_expected(specs, test)
        task.check_reach(model, [*train.items, *(test.items if test else [])])
        arguments = {**t.training_arguments(self, context, has_eval=test is not None), **task.arguments()}
        trainer = task.trainer(
            model=model,
            args=task.training_arguments(**arguments),
            train_dataset=train.items,
            eval_dataset=test.items if test else None,
            data_collator=task.collate,
            compute_metrics=(lambda found: task.measure(specs, found.predictions, test)) if test else None,
            processing_class=tokenizer,
            callbacks=t.callbacks_of(self, context),
            task=task,
        )
        metrics = t.run_trainer(trainer, self, context, has_eval=test is not None)
        save_task(context.folder, self.task, task, self.task_args)
        return {**metrics, "rows": len(train.rows), "held_out_rows": len(test.rows) if test else 0}


def told_labels(labels: Sequence[str], counts: Mapping[str, int], most: int = 20) -> str:
    """``3 labels: Cat 1, cat 9, mat 9``: one that is misspelt stands out. Of many the rarest are told."""
    told = labels if len(labels) <= most else sorted(labels, key=lambda label: counts[label])[:most]
    rest = f", and {len(labels) - most} that are more frequent" if len(labels) > most else ""
    return f"{len(labels)} labels: {', '.join(f'{label} {counts[label]:,}' for label in told)}{rest}"
