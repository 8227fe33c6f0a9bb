"""What every stage is: a typed config with a `run` method. No heavy import happens before `run`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from align.catalog import Catalog
from align.progress import History


@dataclass(frozen=True)
class Reference:
    """Marks a field that names something outside the config: a ``model``, ``data`` or a ``reward``."""

    to: Literal["model", "data", "reward"]


def _reward_spec(value: Any) -> Any:
    """A function given in a Python recipe becomes ``file.py:name``, so that it can be fingerprinted and found again."""
    if callable(value):
        if not isinstance(value, FunctionType) or "<" in value.__qualname__:
            raise ValueError(f"{value!r} has no name in its file: give a function defined with `def` at the top level")
        return f"{Path(value.__code__.co_filename).resolve()}:{value.__qualname__}"
    return value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) or callable(value) else value


ModelRef = Annotated[str, Reference("model")]
DataRefs = Annotated[list[str], BeforeValidator(_as_list), Reference("data")]
MaxTokens = Annotated[int, Field(gt=0)] | Literal["auto"]
RewardRefs = Annotated[list[Annotated[str, BeforeValidator(_reward_spec)]], BeforeValidator(_as_list), Reference("reward")]


@dataclass(frozen=True)
class Context:
    """What a stage gets to work with: a folder to fill and a place for its metrics."""

    name: str
    folder: Path
    history: History


class Stage(BaseModel):
    """A stage's config is this class; references in it are paths by the time `run` is called."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, populate_by_name=True)

    stage: ClassVar[str]
    """Its name in the catalog."""
    reads: ClassVar[str | None] = None
    """For a stage that trains: the kind of rows that it reads from `data`. The preflight looks at them."""

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


class Fields(BaseModel):
    """A group of fields that several stages share."""

    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", frozen=True, populate_by_name=True)


class DataFields(Fields):
    """Where rows come from, and how they are read."""

    data: DataRefs = Field(validation_alias=AliasChoices("data", "dataset_name"))
    """A file (JSONL, JSON, CSV, Parquet, text; .gz too), a folder, or a data set of the hub; several are read one after the
    other.
    """
    data_format: str | None = None
    """Name of the data's format; recognized by its columns by default."""
    data_split: str = "train"
    """Split of a hub data set."""
    eval_data: DataRefs | None = None
    """Held-out rows. Without it `held_out` of the rows of `data` are kept apart, by a hash of their prompts."""
    held_out: float = Field(0.05, ge=0, lt=1)
    """Share of prompts kept apart for evaluation where there is no `eval_data`."""
    max_rows: int | None = Field(None, gt=0)
    """Use only the first rows."""
    on_bad_row: Literal["raise", "quarantine"] = "raise"
    """Stop at a malformed row, or set it aside and say so."""
    max_length: int | None = Field(1024, gt=1)
    """Longest row in tokens: answers are cut, rows without room for an answer are set aside; both are counted."""
    chat_template: str | None = None
    """None: the tokenizer's own. `auto`: its own, else `plain`. Or the name of a shipped template, or a .jinja file."""


class ModelFields(Fields):
    """Which model."""

    model: ModelRef = Field(validation_alias=AliasChoices("model", "model_name_or_path"))
    """A registered name[@version], an alias, a folder or a hub id."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights. For mixed precision keep float32 and set `bf16`."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class AdapterFields(Fields):
    """What of the model is trained."""

    use_peft: bool = False
    """Train a LoRA adapter instead of all weights."""
    lora_r: int = Field(16, gt=0)
    """Rank."""
    lora_alpha: int | None = Field(None, gt=0)
    """Scale; 2 x rank by default."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapter."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get an adapter; all linear layers but the head by default."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv:2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (arXiv:2402.09353)."""


class OptimizerFields(Fields):
    """The optimizer and its schedule; names are Hugging Face's."""

    learning_rate: float = Field(gt=0)
    """Peak learning rate."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second moment."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps during which the learning rate rises."""
    lr_scheduler_type: Literal[
        "cosine",
        "cosine_with_min_lr",
        "cosine_with_restarts",
        "linear",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "warmup_stable_decay",
    ] = "cosine"
    """How it falls; transformers' names."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the schedule, such as `min_lr_rate` of `cosine_with_min_lr`."""
    gradient_checkpointing: bool = False
    """Trade time for memory."""
    bf16: bool = False
    """Mixed precision in bfloat16; weights and sums stay in float32."""
    max_tokens_per_micro_batch: MaxTokens = 8192
    """Tokens in one forward and backward pass, or `auto`: 8192, and on CUDA what memory holds. It changes speed and memory, never
    the result, and is halved when memory runs out.
    """
    logging_steps: int = Field(10, gt=0)
    """Optimizer steps between two lines of metrics."""
    seed: int = 0
    """Seed of shuffling, sampling and new weights."""


class TrainingStage(Stage, DataFields, ModelFields, AdapterFields, OptimizerFields):
    """The fields of every stage that trains on a data set."""

    engine: Literal["forest", "trl"] = "forest"
    """`trl` runs the same rows through TRL's trainer, to check our numbers or for models that the forest does not cover."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over the data."""
    max_steps: int = -1
    """Optimizer steps, instead of epochs."""
    per_device_train_batch_size: int = Field(8, gt=0)
    """Rows for each device in a micro-step. How many share a pass is up to `max_tokens_per_micro_batch` alone: it packs the rows of
    all micro-steps of an optimizer step together.
    """
    gradient_accumulation_steps: int = Field(1, gt=0)
    """Micro-steps in an optimizer step."""
    eval_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two evaluations; once an epoch by default."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """Stop after so many evaluations without a better held-out loss, and keep the best weights."""
    save_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two checkpoints; none by default."""
    save_total_limit: int = Field(2, gt=0)
    """Checkpoints kept."""
    resume_from_checkpoint: bool = True
    """Go on from the last checkpoint in the output folder."""
    report_to: list[str] = Field(default_factory=list)
    """Trackers besides metrics.jsonl: tensorboard, wandb …"""
