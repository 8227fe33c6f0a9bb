"""The groups of fields that stages share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, field_validator, model_validator

from align.errors import AlignError
from align.stages.config import Bookkeeping, DataRefs, Fields, MaxTokens, ModelRef, Seed, TemplateRef
from align.tuning.strategies import UNSHARDED, Tuning


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
    chat_template: TemplateRef | None = None
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
    torch_compile: bool = False
    """Compile the model's layers: some twenty seconds at the start, then faster steps that take less memory. For a GPU."""
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
    """Trackers besides metrics.jsonl: tensorboard (its files lie in the stage's folder, in ``tracking``), wandb, trackio …"""


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

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds a part of the weights only."""
        return self.strategy in ("fsdp2", "deepspeed-zero3")

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

    @property
    def in_shards(self) -> bool:
        """Whether the weights lie in shards that FSDP2 makes."""
        return self.launch is not None and self.launch.num_processes > 1 and self.launch.strategy == "fsdp2"

    def check_shards(self, tuning: str) -> None:
        """Raise `ValueError` where the launch deals weights that `tuning` needs whole."""
        if self.launch is not None and self.launch.shards_weights and tuning in UNSHARDED:
            raise ValueError(f"tuning {tuning!r} trains whole in every process: strategy must be ddp, not {self.launch.strategy}")
