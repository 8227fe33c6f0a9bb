"""Evaluation on held-out prompts: rewards with confidence intervals, perplexity, length, divergence, and answers to read."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field, model_validator

from align.stages.base import Context, DataRefs, MaxTokens, ModelRef, Stage, stage
from align.stages.sampling import RewardFields, SamplingFields


@stage("evaluate")
class Evaluate(Stage, SamplingFields, RewardFields):
    """Compare models on the same prompts. The first reward gives the headline, ``NAME_reward``; the others are its company."""

    measures: ClassVar[dict[str, str]] = {"data": "prompts", "perplexity_data": "sft", "preference_data": "preference"}
    """The fields that hold evaluation rows, and their kinds. The preflight looks for leaks in them."""

    models: dict[str, ModelRef] = Field(min_length=1)
    """What to call each model, and which it is."""
    reward_models: dict[str, ModelRef] = Field(default_factory=dict)
    """Reward models to judge by `preference_data`."""
    reference: str | None = None
    """The name among `models` from which divergence is measured (nats an answer)."""
    data: DataRefs | None = None
    """Prompts to answer, with the columns that the rewards need."""
    data_format: str | None = None
    """Name of the data's format; recognized by its columns by default."""
    data_split: str = "train"
    """Split of a hub data set."""
    max_rows: int | None = Field(None, gt=0)
    """Read only the first rows of each source."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Measure only on the prompts that training stages with this `held_out` kept apart; 0 for all rows."""
    perplexity_data: DataRefs | None = None
    """Demonstrations whose answers' perplexity is measured."""
    preference_data: DataRefs | None = None
    """Pairs that reward models rank, and whose implicit rewards the policies rank against the reference."""
    max_prompts: int = Field(500, gt=0)
    """Prompts answered: the first ones."""
    greedy: bool = True
    """Also answer greedily, and report that reward beside the sampled one."""
    samples_kept: int = Field(50, ge=0)
    """Prompts whose answers are written to samples.jsonl, for people to read."""
    max_length: int = Field(1024, gt=1)
    """Longest row in tokens."""
    dtype: str = "float32"
    """Precision of the weights."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""
    chat_template: str | None = None
    """For a base model without one: `auto`, a shipped template's name or a .jinja file."""
    max_tokens_per_micro_batch: MaxTokens = 8192
    """Tokens in one forward pass, or `auto`: 8192, and on CUDA what memory holds."""
    seed: int = 0
    """Seed of sampling."""
    on_bad_row: str = "raise"
    """`raise` or `quarantine`."""

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> Evaluate:
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"reference {self.reference!r} is none of the models: {', '.join(self.models)}")
        return self

    def run(self, context: Context) -> dict[str, Any]:
        from align.evaluation import Evaluation

        evaluation = Evaluation(self, context)
        results: dict[str, Any] = {}
        # The reference first: the others are measured from it.
        for name in sorted(self.models, key=lambda name: name != self.reference):
            results[name] = evaluation.policy(name, self.models[name])
        results = {name: results[name] for name in self.models}
        for name, path in self.reward_models.items():
            results[name] = evaluation.reward_model(name, path)
        lines = [json.dumps(sample, ensure_ascii=False) for sample in evaluation.samples()]
        (context.folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"models": results}
