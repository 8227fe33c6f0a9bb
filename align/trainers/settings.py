"""PPO's knobs, apart from the trainer so that a recipe can be read without importing torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PPOSettings(BaseModel):
    """The algorithm of Ziegler et al. (arXiv:1909.08593) and Ouyang et al. (arXiv:2203.02155), names as in TRL."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    total_episodes: int = Field(10_000, gt=0)
    """Completions to sample over the whole run."""
    episodes_per_step: int = Field(128, gt=0)
    """Completions sampled, scored and trained on before the policy is sampled again."""
    num_ppo_epochs: int = Field(1, gt=0)
    """Passes over each batch of episodes."""
    num_mini_batches: int = Field(4, gt=0)
    """Optimizer steps in each pass."""
    cliprange: float = Field(0.2, gt=0)
    """Clip of the policy's probability ratio."""
    cliprange_value: float = Field(0.2, gt=0)
    """Clip of the value's change."""
    vf_coef: float = Field(1.0, ge=0)
    """Weight of the value loss. With a separate critic it scales the critic's gradient before clipping."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    kl_coef: float = Field(0.05, ge=0)
    """Price of a nat of divergence from the reference, per token."""
    kl_estimator: Literal["k1", "k3"] = "k1"
    """Per-token estimator of the divergence."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance (their mean stays)."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0, variance 1 over the batch."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a completion that never ended."""
    critic_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the critic; the policy's by default."""

    @model_validator(mode="after")
    def _divisible(self) -> PPOSettings:
        if self.episodes_per_step % self.num_mini_batches:
            raise ValueError(
                f"episodes_per_step ({self.episodes_per_step}) must be a multiple of num_mini_batches ({self.num_mini_batches})"
            )
        if self.total_episodes < self.episodes_per_step:
            raise ValueError(
                f"total_episodes ({self.total_episodes}) is less than one step's episodes_per_step ({self.episodes_per_step})"
            )
        return self
