"""Reinforcement learning from a reward model, from reward functions, or from both (PPO)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from align.stages.base import Context, Stage, stage
from align.stages.config import DataRefs
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
from align.stages.forgetting import ProbeFields
from align.stages.sampling import RewardFields, SamplingFields, check_launch
from align.trainers.settings import PPOSettings


@stage("ppo")
class PPO(
    Stage,
    DataFields,
    ModelFields,
    AdapterFields,
    OptimizerFields,
    SelectionFields,
    RunFields,
    LaunchFields,
    ProbeFields,
    SamplingFields,
    RewardFields,
    PPOSettings,
):
    """Sample the policy on prompts, score what it says, and make what scored well more likely, close to where it started."""

    reads = "prompts"

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of the policy: about 1e-6 for all weights of a pretrained model, ten times that for LoRA."""
    critic: Literal["separate", "adapter", "shared"] = "separate"
    """Who estimates values: a model of its own, started from the reward model if there is one; with use_peft an `adapter` on the
    policy's base, started from a reward model that is one too; or a head on the policy's trunk (`shared`).
    """
    ptx_data: DataRefs | None = None
    """Rows whose language-model loss is mixed in with weight `ptx_coef`."""
    ptx_rows: Literal["sft", "text"] = "sft"
    """What they are: demonstrations or plain text."""
    logging_steps: int = Field(1, gt=0)
    """Batches of episodes between two lines of metrics."""
    eval_prompts: int = Field(256, ge=0)
    """Held-out prompts answered and scored before and after training."""
    eval_steps: int | None = Field(None, gt=0)
    """Batches of episodes between two evaluations on the way; none by default."""
    metric_for_best_model: str = "score"
    """What is best: `score`, or the name of a reward that is part of it."""

    @model_validator(mode="after")
    def _an_adapter_needs_lora(self) -> PPO:
        tuning = self.strategy
        lora = tuning.name in ("lora", "rslora", "dora", "qlora") and not tuning.arguments.get("pissa")
        if self.critic == "adapter" and not lora and self.on_adapter == "merge":
            raise ValueError("critic 'adapter' sits on the policy's frozen base: set use_peft, or take 'separate' or 'shared'")
        return self

    @model_validator(mode="after")
    def _rows_are_mixed_in_by_a_weight(self) -> PPO:
        if self.ptx_data and "ptx_coef" not in self.model_fields_set:
            raise ValueError("ptx_data is mixed in with weight ptx_coef, which is 0 by default: set it, or leave ptx_data out")
        if self.ptx_coef and not self.ptx_data:
            raise ValueError("ptx_coef mixes in a language-model loss, and there are no rows for it: set ptx_data")
        return self

    @model_validator(mode="after")
    def _processes_sample(self) -> PPO:
        check_launch(self)
        if self.in_shards and self.critic == "adapter":
            raise ValueError("critic 'adapter' changes which weights train, and shards do not follow: take 'separate' or 'shared'")
        return self

    def check(self) -> None:
        from align.trainers.libraries import check_libraries

        check_libraries(self)
        self.check_rewards()

    def essence(self) -> dict[str, Any]:
        """Episodes, mini-batches and draws of chance are the same for any number of processes."""
        return {**super().essence(), "launch": {"mixed_precision": (self.launch or Launch()).mixed_precision}}

    def run(self, context: Context) -> dict[str, Any]:
        from align.stages.reinforcement import train_on_samples

        return train_on_samples(self, context, lambda prompts: self, critic=self.critic)
