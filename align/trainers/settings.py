"""PPO's knobs, apart from the trainer so that a recipe can be read without importing torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class PPOSettings(BaseModel):
    """The algorithm of Ziegler et al. (arXiv:1909.08593) and Ouyang et al. (arXiv:2203.02155), names as in TRL."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, defer_build=True)

    total_episodes: int = Field(10_000, gt=0)
    """Completions to sample over the whole run."""
    episodes_per_step: int = Field(128, gt=0)
    """Completions sampled, scored and trained on before the policy is sampled again; over all processes."""
    num_generations: int = Field(1, gt=0)
    """Completions sampled for each prompt. They are one tree: the prompt is computed once."""
    num_ppo_epochs: int = Field(1, gt=0)
    """Passes over each batch of episodes."""
    num_mini_batches: int = Field(4, gt=0)
    """Optimizer steps in each pass."""
    advantage_estimator: str = "gae"
    """gae (with a critic), or without one reinforce, rloo or grpo; the last two compare the completions of one prompt."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount, of gae and reinforce."""
    lam: float = Field(0.95, ge=0, le=1)
    """Lambda of generalized advantage estimation."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose deviation grpo divides by; `none` is Dr. GRPO (arXiv:2503.20783)."""
    cliprange: float = Field(0.2, gt=0)
    """Clip of the policy's probability ratio."""
    dual_clip: float | None = Field(None, gt=1)
    """Bound of the ratio where the advantage is negative (arXiv:1912.09729, which takes 3)."""
    loss_average: Literal["tokens", "completions", "constant"] = "tokens"
    """How the policy's loss is averaged: over the tokens of the mini-batch; within each completion, then over completions (GRPO's
    paper); or summed over tokens and divided by completions x max_completion_length (Dr. GRPO).
    """
    entropy_coef: float = Field(0.0, ge=0)
    """Weight of the entropy bonus."""
    target_kl: float | None = Field(None, gt=0)
    """The step ends early, before an update, once the policy is this many nats a token from the one that sampled."""
    cliprange_value: float = Field(0.2, gt=0)
    """Clip of the value's change."""
    vf_coef: float = Field(1.0, ge=0)
    """Weight of the value loss. With a separate critic it scales the critic's gradient before clipping."""
    critic_learning_rate: float | None = Field(None, gt=0)
    """Learning rate of the critic; the policy's by default."""
    critic_warmup_steps: int = Field(0, ge=0)
    """First batches of episodes on which the critic alone is trained."""
    kl_coef: float = Field(0.05, ge=0)
    """Price of a nat of divergence from the reference, per token; with `kl_target` its first value."""
    kl_target: float | None = Field(None, gt=0)
    """Divergence in nats a completion that the price is adapted to (Ziegler et al., section 2.2); None leaves it as it is."""
    kl_horizon: int = Field(10_000, gt=0)
    """Episodes over which the price is adapted."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of the divergence: k1 or k3 in the reward, k2 or k3 in the loss."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the price is paid: taken off each token's reward, or added to each token's loss (GRPO's paper)."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the score of a completion that never ended."""
    score_clip: float | None = Field(None, gt=0)
    """Scores are held within this distance of 0, before the penalty for a missing end."""
    whiten_rewards: bool = False
    """Scale per-token rewards to unit variance (their mean stays)."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0, variance 1 over the batch."""
    ptx_coef: float = Field(0.0, ge=0)
    """Weight of the language-model loss on rows of `ptx_data` (Ouyang et al., Eq. 2)."""
    ptx_batch_size: int | None = Field(None, gt=0)
    """Such rows in each optimizer step; as many as episodes by default."""
    sample_steps: int | None = Field(None, gt=0)
    """Batches of episodes between two that leave a few of their completions, with scores, in metrics.jsonl."""

    @model_validator(mode="after")
    def _divisible(self) -> PPOSettings:
        groups = self.num_mini_batches * self.num_generations
        if self.episodes_per_step % groups:
            several = " x num_generations" if self.num_generations > 1 else ""
            raise ValueError(
                f"episodes_per_step ({self.episodes_per_step}) must be a multiple of num_mini_batches{several} ({groups})"
            )
        if self.total_episodes < self.episodes_per_step:
            raise ValueError(
                f"total_episodes ({self.total_episodes}) is less than one step's episodes_per_step ({self.episodes_per_step})"
            )
        return self

    @model_validator(mode="after")
    def _estimator_fits_its_place(self) -> PPOSettings:
        wrong = {"reward": "k2", "loss": "k1"}[self.kl_in]
        if self.kl_estimator == wrong:
            why = {"k2": "is biased", "k1": "has a gradient of mean zero"}[wrong]
            raise ValueError(f"kl_estimator {wrong!r} {why}, so it cannot stand in the {self.kl_in}; take k3, or change kl_in")
        return self

    @model_validator(mode="after")
    def _price_stays_a_price(self) -> PPOSettings:
        if self.kl_target is None:
            return self
        if not self.kl_coef:
            raise ValueError("kl_target multiplies kl_coef, and 0 stays 0: give its first value, or leave kl_target out")
        if 5 * self.kl_horizon <= self.episodes_per_step:
            raise ValueError(
                f"kl_horizon ({self.kl_horizon}) must be above a fifth of episodes_per_step ({self.episodes_per_step}), or one "
                "step could turn the price of divergence into a reward for it"
            )
        return self

    @property
    def steps(self) -> int:
        """Batches of episodes in the whole run."""
        return self.total_episodes // self.episodes_per_step
