"""What a stage would train on, as far as that is there before it runs: rows, tokenizer, token trees, the model's config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from align.data import all_held_out, load_rows, split_by_prompt
from align.encode import Encoded, Encoder, set_chat_template
from align.errors import AlignError
from align.models import load_tokenizer
from align.schema import Row
from align.tasks import tasks
from align.tasks.base import Features, few, labels_of_head

ROWS = 5000
"""Rows of a source that are looked at."""
ENCODED = 256
"""Rows among them that are made into tokens, evenly spread."""


class Planned(Protocol):
    """A stage of a plan, its references resolved (`align.pipeline.Step`)."""

    @property
    def name(self) -> str: ...
    @property
    def stage(self) -> Any: ...
    @property
    def folder(self) -> Path: ...
    @property
    def done(self) -> Any: ...


class NotYet(Exception):
    """A stage needs what another one has not made yet; the message says which."""


@dataclass
class Subject:
    """A training stage, seen before it runs."""

    name: str
    stage: Any
    kind: str
    """Kind of its rows."""
    rows: list[Row]
    held_out: list[Row]
    apart: bool
    """Whether the held-out rows come from files of their own."""
    capped: bool
    """Whether a source has more rows than were looked at."""
    encoder: Encoder | None
    """None where the tokenizer is yet to be trained."""
    model: str | None
    """Folder or hub id of the weights that its model comes from, if any."""
    architecture: dict[str, Any] | None = None
    features: Features | None = None
    """What a task makes of some of its rows, which have no token trees."""
    problems: list[AlignError] = field(default_factory=list)
    """What stopped rows from being encoded."""

    @cached_property
    def encoded(self) -> Encoded:
        """Token trees of some of the rows; none where they cannot be encoded (`problems` says why)."""
        encode = getattr(self.encoder, self.kind, None)
        if encode is None:
            return Encoded([], [])
        step = max(1, len(self.rows) // ENCODED)
        try:
            return encode(self.rows[::step][:ENCODED])
        except AlignError as error:
            self.problems.append(error)
            return Encoded([], [])


def subject(step: Planned, plan: Sequence[Planned]) -> Subject | None:
    """What `step` would train on; None for a stage that trains nothing.

    Args:
        plan: all steps of the recipe, in order.

    Raises:
        NotYet: its rows are another stage's result, which is not there.
        AlignError: its rows or its tokenizer cannot be read.
    """
    stage, waiting = step.stage, {str(other.folder): other for other in plan if other.done is None}
    if stage.reads is None:
        return None
    rows, capped = _rows(stage, stage.data, waiting, stage.max_rows_per_source)
    if stage.eval_data is not None:
        held_out, more = _rows(stage, stage.eval_data, waiting)
        capped |= more
    else:
        rows, held_out = split_by_prompt(rows, stage.held_out)
        if not rows and not capped:
            raise all_held_out(stage.data, stage.held_out)
    model, templates, architecture = _origin(stage, waiting)
    found = Subject(step.name, stage, stage.reads, rows, held_out, stage.eval_data is not None, capped, None, model, architecture)
    source = model or getattr(stage, "tokenizer", None)
    if source is not None:
        tokenizer = load_tokenizer(source, trust_remote_code=stage.trust_remote_code)
        if hasattr(stage, "task"):
            found.features = _features(found, tokenizer)
            return found
        for template in templates:
            set_chat_template(tokenizer, template)
        room = getattr(stage, "max_completion_length", 0) if stage.reads == "prompts" else 0
        found.encoder = Encoder(tokenizer, None if stage.max_length is None else stage.max_length - room)
    return found


def _features(subject: Subject, tokenizer: Any) -> Features | None:
    """What the task of `subject` makes of its rows; None where it does not fit the rows, and there are more than were looked at:
    a label may come behind them.

    Raises:
        AlignError: the stage would stop at its rows.
    """
    stage, cls = subject.stage, tasks[subject.stage.task]
    try:
        rows = subject.rows if stage.shots is None else few(subject.rows, stage.shots, stage.seed)
        labels = cls.labels_of(rows)
        task = cls(tokenizer, stage.max_length, labels_of_head(stage.model, stage.task, labels), **stage.task_args)
        made: Features = task.features(rows[:: max(1, len(rows) // ENCODED)][:ENCODED], training=True)
        if not made.items:
            raise AlignError(f"none of the rows can be used: {made.summary()}")
        if subject.held_out and len(subject.held_out) <= ENCODED:
            task.check_expected(stage.metrics or task.metrics, task.features(subject.held_out, training=False))
    except AlignError:
        if subject.capped:
            return None
        raise
    return made


def _rows(
    stage: Any, sources: Sequence[str], waiting: Mapping[str, Planned], caps: Sequence[int | None] | None = None
) -> tuple[list[Row], bool]:
    """Rows of `sources` as the stage would read them, at most `caps` of each, and whether there are more than were looked at."""
    rows: list[Row] = []
    capped = False
    for source, cap in zip(sources, caps or [None] * len(sources), strict=True):
        limit = min(number for number in (ROWS, cap, stage.max_rows) if number is not None)
        if maker := next((other for folder, other in waiting.items() if Path(source).is_relative_to(folder)), None):
            raise NotYet(f"its rows are made by the stage {maker.name!r}")
        loaded = load_rows(
            source, stage.reads, format=stage.data_format, split=stage.data_split, limit=limit, on_bad_row=stage.on_bad_row
        )
        rows += loaded.rows
        capped |= len(loaded.rows) == limit and limit not in (cap, stage.max_rows)
    return rows, capped


def _origin(stage: Any, waiting: Mapping[str, Planned]) -> tuple[str | None, list[str | None], dict[str, Any] | None]:
    """Where the stage's model comes from, through stages that have not run: its folder or id, the chat templates set on the way,
    and the architecture where it starts from random weights.
    """
    templates = [stage.chat_template]
    while (model := stage.model) in waiting:
        stage = waiting[model].stage
        templates.insert(0, getattr(stage, "chat_template", None))
        if not hasattr(stage, "model"):
            return None, templates, None
    return model, templates, getattr(stage, "architecture", None)
