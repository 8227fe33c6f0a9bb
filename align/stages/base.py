"""What every stage is: a typed config with a `run` method. No heavy import happens before `run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from align.catalog import Catalog
from align.progress import History
from align.stages.config import Address, Bookkeeping, Config, marked_fields
from align.stages.config import DataRefs as DataRefs  # these three are what a stage of somebody's own is written with
from align.stages.config import ModelRef as ModelRef
from align.stages.config import RewardRefs as RewardRefs
from align.stages.fields import (
    AdapterFields,
    DataFields,
    Launch,
    LaunchFields,
    ModelFields,
    OptimizerFields,
    RunFields,
    SelectionFields,
)


@dataclass(frozen=True)
class Context:
    """What a stage gets to work with: a folder to fill and a place for its metrics."""

    name: str
    folder: Path
    history: History


class Stage(Config):
    """A stage's config is this class; references in it are paths by the time `run` is called."""

    stage: ClassVar[str]
    """Its name in the catalog."""
    reads: ClassVar[str | None] = None
    """For a stage that trains: the kind of rows that it reads from `data`. The preflight looks at them."""

    def essence(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain values: the config's part of the stage's identity."""
        left_out = marked_fields(type(self), Bookkeeping) | marked_fields(type(self), Address)
        there = {name: True for name in marked_fields(type(self), Address) if getattr(self, name) is not None}
        return {name: value for name, value in self.model_dump(mode="json").items() if name not in left_out} | there

    def check(self) -> None:
        """What takes libraries to judge and no data: the preflight asks before the first stage of a recipe runs.

        Raises:
            AlignError: the settings do not go together.
        """

    def run(self, context: Context) -> dict[str, Any]:
        """Do the work, fill ``context.folder``, return the metrics to register.

        Raises:
            AlignError: something in the input is wrong.
        """
        raise NotImplementedError


stages: Catalog[type[Stage]] = Catalog("stage")


def stage(name: str) -> Callable[[type[Stage]], type[Stage]]:
    """Register a stage class under `name`."""

    def register(cls: type[Stage]) -> type[Stage]:
        cls.stage = name
        return stages.add(cls, name)

    return register


MOST_EPOCHS = 1e6
"""More is a slip of the pen, and would have no end."""


class TrainingStage(Stage, DataFields, ModelFields, AdapterFields, OptimizerFields, SelectionFields, RunFields, LaunchFields):
    """The fields of every stage that trains on a data set."""

    engine: Literal["forest", "trl"] = "forest"
    """`trl` runs the same rows through TRL's trainer, to check our numbers or for models that the forest does not cover."""
    num_train_epochs: float = Field(1.0, gt=0, le=MOST_EPOCHS)
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps, instead of `num_train_epochs`; -1 for those."""
    per_device_train_batch_size: int = Field(8, gt=0)
    """Rows for each device in a micro-step. How many share a pass is up to `max_tokens_per_micro_batch` alone: it packs the rows of
    all micro-steps of an optimizer step together.
    """
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-steps in an optimizer step."""
    on_non_finite: Literal["stop", "skip", "lower_learning_rate"] = "stop"
    """When a loss is not finite, no update is made with it, and the run stops; or goes on without that batch (at most ten in a
    row); or goes on from the last checkpoint with half the learning rate (at most six times).
    """

    def check(self) -> None:
        from align.trainers.libraries import check_libraries

        check_libraries(self)

    def essence(self) -> dict[str, Any]:
        """On the forest, and in a task, the gradient is the same for any number of processes and accumulation steps: their product
        counts. In TRL's trainers each process has a batch of its own, so there the number of processes counts as well.
        """
        config = super().essence()
        launch = self.launch or Launch()
        config["launch"] = {"mixed_precision": launch.mixed_precision}
        if self.engine == "forest":
            del config["per_device_train_batch_size"], config["gradient_accumulation_steps"]
            config["rows_per_step"] = self.rows_per_step
        else:
            config["launch"]["num_processes"] = launch.num_processes
        return config

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step, over all processes."""
        processes = (self.launch or Launch()).num_processes
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * processes

    @field_validator("max_steps")
    @classmethod
    def _steps_or_epochs(cls, value: int) -> int:
        if value < 1 and value != -1:
            raise ValueError("give at least 1, or -1 for num_train_epochs instead")
        return value

    @model_validator(mode="after")
    def _trl_stops_at_non_finite(self) -> TrainingStage:
        if self.engine == "trl" and self.on_non_finite != "stop":
            raise ValueError("on_non_finite is carried out by engine 'forest'; with 'trl' leave it at 'stop'")
        return self

    @model_validator(mode="after")
    def _trl_knows_the_strategy(self) -> Self:
        if self.engine == "trl" and self.strategy.name not in TRL_STRATEGIES:
            raise ValueError(
                f"engine 'trl' trains with {', '.join(TRL_STRATEGIES)}; tuning {self.strategy.name!r} needs engine 'forest'"
            )
        if self.engine == "trl" and self.on_adapter == "continue":
            raise ValueError("TRL's trainers would take the adapter's base for the reference; use engine 'forest' to continue it")
        return self

    @model_validator(mode="after")
    def _shards_train_the_strategy(self) -> Self:
        if self.launch is not None and self.launch.shards_weights and self.torch_compile:
            raise ValueError(f"torch_compile is for weights that are whole in every process, not for {self.launch.strategy}")
        self.check_shards(self.strategy.name)
        return self

    @model_validator(mode="after")
    def _layers_share_a_graph(self) -> Self:
        if self.torch_compile and self.strategy.name == "prefix":
            raise ValueError(
                "torch_compile would need a graph for each layer, as tuning 'prefix' learns keys of each: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _best_is_saved(self) -> Self:
        if self.keeps_best and self.save_steps not in (None, self.eval_steps):
            raise ValueError("keeping the best weights saves every evaluation: leave save_steps out, or equal to eval_steps")
        return self


class ComparingStage(TrainingStage):
    """The fields of every stage that trains on pairs of answers."""

    group_by_prompt: bool = False
    """Draw prompts instead of rows, so that all comparisons of a prompt's answers come together: each answer is then computed once
    however many comparisons it stands in, and a model over-fits less to the answers that stand in many.
    """

    @model_validator(mode="after")
    def _trl_draws_rows(self) -> Self:
        if self.engine == "trl" and self.group_by_prompt:
            raise ValueError("group_by_prompt runs on engine 'forest' only")
        return self


TRL_STRATEGIES = ("full", "freeze", "ffn", "attention", "bias_norm", "lora", "rslora", "dora", "ia3")
"""Strategies whose start TRL's trainers take for the reference."""
