"""What every stage is: a typed config with a `run` method. No heavy import happens before `run`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from align.catalog import Catalog
from align.errors import AlignError
from align.metrics import check
from align.progress import History
from align.rewards.spec import RewardSpec
from align.tuning.strategies import Tuning


@dataclass(frozen=True)
class Reference:
    """Marks a field that names something outside the config: a ``model``, ``data`` or a ``reward``."""

    to: Literal["model", "data", "reward"]


@dataclass(frozen=True)
class Bookkeeping:
    """Marks a field that says how the work is done, kept and watched, not what comes out. It is no part of a stage's identity."""


@dataclass(frozen=True)
class Address:
    """Marks a field that says where somebody is who takes part. That there is one is part of a stage's identity; where, is not."""


def marked_fields(cls: type[BaseModel], mark: type) -> set[str]:
    """Names of the fields of `cls` that are marked with a `mark`."""
    return {name for name, info in cls.model_fields.items() if any(isinstance(each, mark) for each in info.metadata)}


def _reward_name(value: Any) -> Any:
    """A function given in a Python recipe becomes ``file.py:name``, so that it can be fingerprinted and found again."""
    if callable(value):
        if not isinstance(value, FunctionType) or "<" in value.__qualname__:
            raise ValueError(f"{value!r} has no name in its file: give a function defined with `def` at the top level")
        return f"{Path(value.__code__.co_filename).resolve()}:{value.__qualname__}"
    return value


def _reward_entry(value: Any) -> Any:
    """A name, or a mapping with the keys of `RewardSpec`, checked and in its shortest form."""
    value = _reward_name(value)
    if isinstance(value, Mapping) and "reward" in value:
        value = {**value, "reward": _reward_name(value["reward"])}
    return RewardSpec.of(value).plain()


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping | RewardSpec) or callable(value) else value


def _known_metric(spec: str) -> str:
    try:
        check(spec)
    except AlignError as error:
        raise ValueError(str(error)) from None
    return spec


Name = Annotated[str, Field(min_length=1)]
ModelRef = Annotated[Name, Reference("model")]
DataRefs = Annotated[list[Name], BeforeValidator(_as_list), Reference("data")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MaxTokens = Annotated[int, Field(gt=0)] | Literal["auto"]
MetricSpecs = Annotated[list[Annotated[str, AfterValidator(_known_metric)]], BeforeValidator(_as_list)]
RewardRefs = Annotated[
    list[Annotated[str | dict[str, Any], BeforeValidator(_reward_entry)]], BeforeValidator(_as_list), Reference("reward")
]


@dataclass(frozen=True)
class Context:
    """What a stage gets to work with: a folder to fill and a place for its metrics."""

    name: str
    folder: Path
    history: History


class Config(BaseModel):
    """Typed fields: no others than these, numbers finite, whole ones of at most 64 bits, and a number is never a yes."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, frozen=True, populate_by_name=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A flag without its value is True, which pydantic would take for 1: a learning rate, say."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("this is no switch: give it a value")
        if isinstance(value, int) and abs(value) >= 2**63:  # no library counts further, and each says so in the midst of work
            raise ValueError("a whole number must be below 2**63")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(map(_takes_bool, get_args(annotation)))


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


class Fields(Config):
    """A group of fields that several stages share."""


class DataFields(Fields):
    """Where rows come from, and how they are read."""

    data: DataRefs = Field(min_length=1, validation_alias=AliasChoices("data", "dataset_name"))
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
    data_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """How the sources of `data` stand to each other in the mixture, a number for each. No row is taken twice: the source that runs
    out first decides how many there are.
    """
    max_rows: int | None = Field(None, gt=0)
    """Use only the first rows of each source."""
    max_rows_per_source: list[Annotated[int, Field(gt=0)] | None] | None = None
    """The same, a number for each source of `data`; null is all."""
    streaming: bool | Literal["auto"] = "auto"
    """Keep rows and their tokens on disk instead of in memory. `auto` does so for files of 256 MB and more, in stages that can."""
    on_bad_row: Literal["raise", "quarantine"] = "raise"
    """Stop at a malformed row, or set it aside and say so."""
    max_length: int | None = Field(1024, gt=1)
    """Longest row in tokens: answers are cut, rows without room for an answer are set aside; both are counted."""
    chat_template: str | None = None
    """None: the tokenizer's own. `auto`: its own, else `plain`. Or the name of a shipped template, or a .jinja file."""

    @model_validator(mode="after")
    def _a_number_for_each_source(self) -> DataFields:
        for name in ("data_weights", "max_rows_per_source"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.data):
                raise ValueError(f"{name} has {len(given)} numbers, and data {len(self.data)} sources; give one for each")
        return self


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

    tuning: str = "full"
    """A strategy: full, freeze, ffn, attention, bias_norm, head, adapter, lora, rslora, dora, pissa, qlora, ia3, prefix, prompt,
    ptuning (docs/tuning.md).
    """
    tuning_args: dict[str, Any] = Field(default_factory=dict)
    """Its arguments, such as `r` of lora or `train_last` of freeze."""
    on_adapter: Literal["merge", "continue"] = "merge"
    """Where the model is an adapter: merge it into its base and train by `tuning`, or train it further, as it is."""
    use_peft: bool = False
    """The same as `tuning: lora`, with the arguments below."""
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

    @property
    def strategy(self) -> Tuning:
        """What `tuning` and `tuning_args` say, or `use_peft` and its arguments in the other spelling."""
        if not self.use_peft:
            return Tuning(self.tuning, self.tuning_args)
        fields = {name: getattr(self, name) for name in LORA_FIELDS if name in self.model_fields_set}
        return Tuning("lora", {LORA_FIELDS[name]: value for name, value in fields.items()})

    @model_validator(mode="after")
    def _one_strategy(self) -> Self:
        given = self.model_fields_set
        lora = next((name for name in LORA_FIELDS if name in given), None)
        if self.use_peft and given & {"tuning", "tuning_args"}:
            raise ValueError("use_peft is another spelling of tuning: lora; set one of the two")
        if lora and not self.use_peft:
            raise ValueError(f"{lora} belongs to use_peft; with tuning, write tuning_args: {{{LORA_FIELDS[lora]}: …}}")
        if self.on_adapter == "continue" and (self.use_peft or given & {"tuning", "tuning_args"}):
            raise ValueError("on_adapter: continue goes on with the adapter as it is; leave use_peft, tuning and tuning_args out")
        try:
            self.strategy.check()
        except AlignError as error:
            raise ValueError(str(error)) from error
        return self


LORA_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "rslora",
    "use_dora": "dora",
}
"""Hugging Face's names of the arguments of `tuning: lora`."""


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
    seed: Seed = 0
    """Seed of shuffling, sampling and new weights."""


LOWER_IS_BETTER = re.compile(r"(^|[/_])(loss|nll|perplexity|kl|error|ece|brier|entropy)(_|$)")
"""Names of metrics that should fall."""


class SelectionFields(Fields):
    """When a model is measured while it trains, and which of its states is kept."""

    eval_steps: int | None = Field(None, gt=0)
    """Optimizer steps between two evaluations; once an epoch by default."""
    early_stopping_patience: int | None = Field(None, gt=0)
    """Stop after so many evaluations in a row without a better `metric_for_best_model`, and keep the best weights."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation instead of the last ones. Implied by early_stopping_patience."""
    metric_for_best_model: str = "loss"
    """What is best: any metric of the held-out rows, as it stands in metrics.jsonl without its eval_."""
    greater_is_better: bool | None = None
    """Whether it should rise; by default so for all but losses, perplexities, divergences and errors."""

    @property
    def keeps_best(self) -> bool:
        """Whether the best weights are kept."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def best_is_greatest(self) -> bool:
        """Whether `metric_for_best_model` should rise."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return LOWER_IS_BETTER.search(self.metric_for_best_model) is None


class RunFields(Fields):
    """What a run leaves on its way."""

    save_steps: Annotated[int | None, Bookkeeping()] = Field(None, gt=0)
    """Steps between two checkpoints."""
    save_minutes: Annotated[float | None, Bookkeeping()] = Field(15.0, gt=0)
    """Minutes between two checkpoints, besides those of `save_steps`."""
    save_total_limit: Annotated[int, Bookkeeping()] = Field(2, gt=0)
    """Checkpoints kept."""
    resume_from_checkpoint: Annotated[bool, Bookkeeping()] = True
    """Go on from the last checkpoint in the output folder."""
    report_to: Annotated[list[str], Bookkeeping()] = Field(default_factory=list)
    """Trackers besides metrics.jsonl: tensorboard, wandb, trackio …"""


class Launch(Fields):
    """Several processes for one stage, started by ``accelerate launch``."""

    num_processes: int = Field(1, gt=0)
    """Processes on all machines together, one a device."""
    strategy: Literal["ddp", "fsdp2", "deepspeed-zero2", "deepspeed-zero3"] = "ddp"
    """Whole replicas (ddp), or weights, gradients and optimizer states in shards (fsdp2, or DeepSpeed where that is installed)."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """What the forward pass runs in; `bf16` of the stage is the same."""
    num_machines: int = Field(1, gt=0)
    """Machines. Each of them runs the same command, with ALIGN_MACHINE_RANK set to 0, 1, 2 …"""
    main_process_ip: str | None = None
    """Address of machine 0, where there are several."""
    main_process_port: int | None = Field(None, gt=0)
    """A free port there."""
    cpu: bool = False
    """Run on the CPU though there are GPUs."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_name(cls, value: Any) -> Any:
        return "no" if value is False else value  # as YAML reads it


class LaunchFields(Fields):
    """For stages that several processes can share."""

    launch: Launch | None = None
    """Processes, machines and strategy: `launch: {num_processes: 8, strategy: fsdp2}`; see docs/scaling.md."""

    @property
    def in_bf16(self) -> bool:
        """Whether forward passes run in bfloat16: by the stage's `bf16`, or by its launch."""
        return bool(getattr(self, "bf16", False)) or (self.launch is not None and self.launch.mixed_precision == "bf16")

    def check_whole_replicas(self) -> None:
        """Raise `ValueError` for a launch in shards, or in fp16: a policy that samples itself is whole in each process."""
        if self.launch is not None and self.launch.strategy != "ddp":
            raise ValueError(f"a policy that samples is whole in every process: strategy must be ddp, not {self.launch.strategy}")
        if self.launch is not None and self.launch.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 needs a loss scale, which is not kept here: take bf16")


class TrainingStage(Stage, DataFields, ModelFields, AdapterFields, OptimizerFields, SelectionFields, RunFields, LaunchFields):
    """The fields of every stage that trains on a data set."""

    engine: Literal["forest", "trl"] = "forest"
    """`trl` runs the same rows through TRL's trainer, to check our numbers or for models that the forest does not cover."""
    num_train_epochs: float = Field(1.0, gt=0)
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
        """On the forest the gradient is the same for any number of processes and accumulation steps: their product counts. In
        TRL's trainers each process has a batch of its own, so there the number of processes counts as well.
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
