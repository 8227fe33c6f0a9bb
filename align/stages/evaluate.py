"""Evaluation on held-out rows: rewards with confidence intervals, metrics by name, perplexity, win rates, divergence, and answers
to read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.data import write_rows
from align.stages.base import Context, Stage, stage
from align.stages.config import DataRefs, MaxTokens, MetricSpecs, ModelRef, Seed, TemplateRef
from align.stages.sampling import RewardFields, SamplingFields, check_reward_model


@stage("evaluate")
class Evaluate(Stage, SamplingFields, RewardFields):
    """Compare models on the same prompts. The first reward gives the headline, ``NAME_reward``; the others are its company."""

    measures: ClassVar[dict[str, str]] = {"data": "prompts", "perplexity_data": "sft", "preference_data": "preference"}
    """The fields that hold evaluation rows, and their kinds. The preflight looks for leaks in them."""
    among_models: ClassVar[tuple[str, ...]] = ("reference", "baseline")
    """The fields that hold a name among `models`. A sweep changes them with it."""

    models: dict[str, ModelRef] = Field(min_length=1)
    """What to call each model, and which it is."""
    reward_models: dict[str, ModelRef] = Field(default_factory=dict)
    """Reward models to judge by `preference_data`."""
    reference: str | None = None
    """The name among `models` from which divergence is measured (nats an answer)."""
    data: DataRefs | None = None
    """Prompts to answer, with the columns that rewards and metrics need. For a model of the stage `task`, that task's rows; for
    the metric `perplexity`, demonstrations (alone, documents will do).
    """
    metrics: MetricSpecs = Field(default_factory=list)
    """Metrics by name, such as `bleu`, `rouge` or `bleu(lowercase=True)`, of the greedy answers (of the sampled ones with
    `greedy=false`): docs/metrics.md lists them. `hub:NAME` is a metric of the hub.
    """
    reference_column: str | None = None
    """Column with the reference answers; by default the usual names, or the demonstration's own answer."""
    baseline: str | None = None
    """The name among `models`, or `references`, whose answers the others are compared with, pair by pair."""
    judge_model: ModelRef | None = None
    """A local chat model that says which of two answers is better; without it the reward decides."""
    data_format: str | None = None
    """Name of the data's format; recognized by its columns by default."""
    data_split: str = "train"
    """Split of a hub data set."""
    max_rows: int | None = Field(None, gt=0)
    """Read only the first rows of each source."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Measure only on the prompts that training stages with this `held_out` kept apart; 0 for all rows."""
    perplexity_data: DataRefs | None = None
    """Demonstrations whose answers' perplexity is measured, or documents."""
    stride: int | None = Field(None, gt=0)
    """Documents longer than `max_length` are measured in windows that move by so many tokens; half of `max_length` by default."""
    preference_data: DataRefs | None = None
    """Pairs that reward models rank, and whose implicit rewards the policies rank against the reference."""
    max_prompts: int = Field(500, gt=0)
    """Prompts answered: the first ones. Models of tasks answer all rows (`max_rows`)."""
    greedy: bool = True
    """Also answer greedily, and report that reward beside the sampled one."""
    samples_kept: int = Field(50, ge=0)
    """Prompts, and rows of a task, whose answers are written to samples.jsonl, for people to read."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the weights."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    chat_template: TemplateRef | None = None
    """For a base model without one: `auto`, a shipped template's name or a .jinja file."""
    max_tokens_per_micro_batch: MaxTokens = 8192
    """Tokens in one forward pass, or `auto`: 8192, and on CUDA what memory holds."""
    seed: Seed = 0
    """Seed of sampling."""
    on_bad_row: Literal["raise", "quarantine"] = "raise"
    """Stop at a malformed row, or leave it out and say so."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Evaluate:
        if self.baseline is not None and self.baseline not in (*self.models, "references"):
            raise ValueError(f"baseline {self.baseline!r} is neither `references` nor one of the models: {', '.join(self.models)}")
        if self.baseline and not (self.judge_model or self.reward_funcs or self.reward_model):
            raise ValueError("baseline needs something that judges answers: set judge_model, reward_model or reward_funcs")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"reference {self.reference!r} is none of the models: {', '.join(self.models)}")
        if not (self.data or self.perplexity_data or self.preference_data):
            raise ValueError("nothing to measure: set data (prompts), perplexity_data (demonstrations) or preference_data (pairs)")
        measured = [spec for spec in self.metrics if spec != "perplexity" or not self.perplexity_data]
        rewards = {"reward_funcs": self.reward_funcs, "reward_model": self.reward_model}
        wanted = {"metrics": measured, **rewards, "baseline": self.baseline}
        if not self.data and (unused := [name for name, value in wanted.items() if value]):
            raise ValueError(f"{unused[0]} is about answers to prompts, and there are none: set data")
        return self

    def check(self) -> None:
        self.check_rewards()

    def check_rewards(self, *, hub: bool = True) -> None:
        if self.reward_funcs or self.reward_model:
            super().check_rewards(hub=hub)
        for path in self.reward_models.values():
            check_reward_model(path, hub)

    def run(self, context: Context) -> dict[str, Any]:
        from align.evaluation import Evaluation

        evaluation = Evaluation(self, context)
        results: dict[str, Any] = {}
        # The reference first: the others are measured from it.
        for name in sorted(self.models, key=lambda name: name != self.reference):
            results[name] = evaluation.policy(name, self.models[name])
        evaluation.compare(results)
        results = {name: results[name] for name in self.models}
        for name, path in self.reward_models.items():
            results[name] = evaluation.reward_model(name, path)
        write_rows(context.folder / "samples.jsonl", evaluation.samples())
        return {"models": results}
