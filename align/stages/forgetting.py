"""What a stage does against forgetting, and how much it forgets: replay of old rows, and probes measured before and after."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from align.stages.base import Context
from align.stages.config import DataRefs, Fields, Reference

if TYPE_CHECKING:
    from torch import nn

    from align.encode import Encoded, Encoder
    from align.forest import Tree

DataRef = Annotated[str, Reference("data")]


class ProbeFields(Fields):
    """What is measured before and after a stage."""

    probes: dict[str, DataRef] = Field(default_factory=dict)
    """Documents or demonstrations by name, such as general text or an earlier task: perplexity, accuracy and KL before and after
    (docs/forgetting.md).
    """
    probe_rows: int = Field(200, gt=0)
    """Rows read of each."""

    @model_validator(mode="after")
    def _probes_run_on_the_forest(self) -> Self:
        if self.probes and getattr(self, "engine", "forest") != "forest":
            raise ValueError("probes are measured by engine 'forest' only")
        return self


class ReplayFields(Fields):
    """Old rows mixed into new ones."""

    replay_data: DataRefs | None = None
    """Rows of an earlier stage, mixed into the new ones so that less is forgotten."""
    replay: float = Field(0.1, ge=0, lt=1)
    """Share of the training tokens that come from `replay_data`."""

    @model_validator(mode="after")
    def _replay_has_rows(self) -> Self:
        if self.replay_data is None and self.replay and "replay" in self.model_fields_set:
            raise ValueError(
                f"replay {self.replay} is the share of old rows, and none are named: set replay_data, or leave replay out"
            )
        return self


def probe(stage: Any, context: Context, encoder: Encoder, model: nn.Module) -> Callable[[], dict[str, float]]:
    """Measure the stage's probes before training; what is returned measures them after it, and gives both.

    Raises:
        AlignError: a probe has no usable row.
    """
    if not stage.probes:
        return dict
    from align.evaluation import reads_as
    from align.intake.account import Quarantine
    from align.metrics.probes import Probe
    from align.stages.training import precision, read_rows

    limited = stage.model_copy(update={"max_rows": stage.probe_rows, "data_format": None})
    probes = {}
    for name, source in stage.probes.items():
        kind = reads_as(source, limited)
        rows = read_rows(limited, [source], kind, f"{context.name}, probe {name}", Quarantine(None))
        probes[name] = Probe(name, rows, kind, encoder, stage.max_tokens_per_micro_batch)
    with precision(stage):
        for each in probes.values():
            each.begin(model)

    def after() -> dict[str, float]:
        with precision(stage):
            return {f"probe/{name}/{key}": value for name, each in probes.items() for key, value in each.end(model).items()}

    return after


def with_replay(stage: Any, context: Context, kind: str, encode: Callable[[Any], Encoded], trees: list[Tree]) -> list[Tree]:
    """`trees` and so many of the stage's `replay_data`, drawn at random, that these hold `replay` of all tokens."""
    if stage.replay_data is None or not stage.replay:
        return trees
    from align.progress import say
    from align.stages.training import encoded, quarantine_in, read_rows

    label = f"{context.name} (replay)"
    rows = read_rows(stage, stage.replay_data, kind, label, quarantine_in(context, "quarantine.replay.jsonl"))
    old = encoded(encode, rows, label)
    random.Random(stage.seed).shuffle(old)
    new = sum(tree.tokens for tree in trees)
    wanted, taken, count = new * stage.replay / (1 - stage.replay), 0, 0
    for tree in old:
        if taken + tree.tokens / 2 > wanted:
            break
        taken, count = taken + tree.tokens, count + 1
    short = f"; asked for {stage.replay:.0%}, and there are no more" if count == len(old) else ""
    say(f"{label}: {count:,} of {len(old):,} old rows, {taken / (new + taken):.1%} of the tokens{short}")
    return [*trees, *old[:count]]
