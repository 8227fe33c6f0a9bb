"""Reinforcement learning without a critic: an answer's advantage is measured against other answers to the same prompt (GRPO,
RLOO). The forest engine runs them by PPO's trainer, the second engine by TRL's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from align.stages.base import Context, TrainingStage, stage
from align.stages.forgetting import ProbeFields
from align.stages.sampling import RewardFields, SamplingFields, check_launch
from align.trainers.settings import PPOSettings


class GroupStage(TrainingStage, ProbeFields, SamplingFields, RewardFields):
    """What GRPO and RLOO share. Batch sizes count answers, `num_generations` of them for each prompt."""

    reads = "prompts"

    trl_fields: ClassVar[tuple[str, ...]] = (
        "max_completion_length",
        "temperature",
        "top_p",
        "top_k",
        "num_generations",
        "num_iterations",
        "epsilon",
    )
    """Fields of TRL's config of the same names."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate: about 1e-6 for all weights of a pretrained model, ten times that for LoRA."""
    per_device_train_batch_size: int = Field(8, gt=0)
    """Answers for each device in a micro-step."""
    max_steps: int = -1
    """Batches of answers, each with `num_iterations` optimizer steps, instead of `num_train_epochs`; -1 for those (engine `trl`:
    optimizer steps).
    """
    logging_steps: int = Field(1, gt=0)
    """Batches of answers between two lines of metrics (engine `trl`: optimizer steps)."""
    temperature: float = Field(1.0, gt=0)
    """Of the distribution that answers are drawn from, and that is optimized."""
    num_generations: int = Field(8, gt=1)
    """Answers sampled for each prompt. It divides per_device_train_batch_size x gradient_accumulation_steps."""
    num_iterations: int = Field(1, gt=0)
    """Passes over each batch of answers."""
    epsilon: float = Field(0.2, gt=0)
    """Clip of the policy's probability ratio."""
    eval_prompts: int = Field(256, ge=0)
    """Held-out prompts answered and scored before and after training, and each `eval_steps`."""
    eval_steps: int | None = Field(None, gt=0)
    """Batches of answers between two evaluations; by default none on the way (engine `trl`: optimizer steps, once an epoch)."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Subtracted from the reward of an answer that never ended (engine `forest`)."""
    target_kl: float | None = Field(None, gt=0)
    """The passes over a batch end once the policy is this many nats a token from the one that sampled (engine `forest`)."""
    sample_steps: int | None = Field(None, gt=0)
    """Batches of answers between two that leave a few of them, with scores, in metrics.jsonl (engine `forest`)."""

    @model_validator(mode="after")
    def _groups_fit(self) -> GroupStage:
        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if answers % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size x gradient_accumulation_steps ({answers}) must be a multiple of num_generations "
                f"({self.num_generations})"
            )
        if self.keeps_best and self.metric_for_best_model == "loss":
            name = "score" if self.engine == "forest" else "reward"
            raise ValueError(f"the held-out loss says nothing here: set metric_for_best_model to {name} to keep the best weights")
        if self.engine == "forest" and (self.top_p != 1 or self.top_k):
            raise ValueError("the distribution that is sampled is the one that is optimized: top_p must be 1 and top_k 0")
        if self.engine == "forest":
            check_launch(self)
            if self.on_non_finite != "stop":
                raise ValueError("a run that samples its policy stops at a loss that is not finite: leave on_non_finite at 'stop'")
        if self.engine == "trl":
            for name in ("missing_eos_penalty", "target_kl", "sample_steps", "stop_strings", "rollout_server"):
                if getattr(self, name) not in (None, []):
                    raise ValueError(f"{name} runs on engine 'forest' only")
        return self

    def check(self) -> None:
        super().check()
        self.check_rewards()

    def settings(self, prompts: int) -> PPOSettings:
        """The stage as PPO's trainer has it, for so many prompts."""
        from align import processes

        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps * processes.count()
        steps = self.max_steps if self.max_steps > 0 else round(self.num_train_epochs * prompts * self.num_generations / answers)
        return PPOSettings(
            total_episodes=max(steps, 1) * answers,
            episodes_per_step=answers,
            num_generations=self.num_generations,
            num_ppo_epochs=self.num_iterations,
            num_mini_batches=1,
            cliprange=self.epsilon,
            missing_eos_penalty=self.missing_eos_penalty,
            target_kl=self.target_kl,
            sample_steps=self.sample_steps,
            **self.own_settings,
        )

    @property
    def own_settings(self) -> dict[str, Any]:
        """What sets the method apart."""
        raise NotImplementedError

    def run(self, context: Context) -> dict[str, Any]:
        return self._run_trl(context) if self.engine == "trl" else self._run_forest(context)

    def _run_forest(self, context: Context) -> dict[str, Any]:
        from align.stages.reinforcement import train_on_samples

        return train_on_samples(self, context, self.settings)

    def _run_trl(self, context: Context) -> dict[str, Any]:
        from align.errors import AlignError
        from align.models import disable_dropout
        from align.stages import training as t
        from align.trainers.trl import group_trainer

        t.seed_everything(self)
        rows, held = t.rows_of(self, "prompts", context)
        tokenizer, encoder = t.tokenizer_of(self, room=self.max_completion_length)
        judge = self.judge(tokenizer, [*rows, *held], dtype=self.dtype, max_tokens=self.max_tokens_per_micro_batch)
        train, test = encoder.prompts(rows), encoder.prompts(held[: self.eval_prompts])
        prompts = len(t.usable(train, context.name))
        needed = self.rows_per_step // self.num_generations
        if prompts < needed:
            raise AlignError(
                f"{prompts} prompts do not fill a batch, which takes {needed}; raise num_generations or lower the batch"
            )
        model = t.causal_lm(self)
        t.teach_end_token(model, encoder.end_of_answer(rows[0]))
        longest = t.longest(train.trees) + self.max_completion_length
        model = t.make_ready(self, context.name, model, tokenizer, longest, context.folder)
        disable_dropout(model)  # after LoRA, whose own dropout would part old and new log-probs
        has_eval = bool(test.trees)
        arguments = t.training_arguments(self, context, has_eval=has_eval)
        # An evaluation, too, answers every prompt num_generations times, and whole groups at once.
        arguments["per_device_eval_batch_size"] = (
            max(1, self.per_device_train_batch_size // self.num_generations) * self.num_generations
        )
        arguments |= {name: getattr(self, name) for name in self.trl_fields}
        trainer = group_trainer(
            self.stage, model, tokenizer, train, test, judge, arguments, callbacks=t.callbacks_of(self, context)
        )
        metrics = t.run_trainer(trainer, self, context, has_eval=has_eval)
        told = ("eval_reward", "eval_kl", "eval_completions/mean_length")
        return {
            **{name: value for name, value in metrics.items() if name.startswith(told) and "/total/" not in name},
            "reward": context.history.last("reward"),
        }


@stage("grpo")
class GRPO(GroupStage):
    """Group relative policy optimization (arXiv:2402.03300): an answer's advantage is its reward minus the mean of its
    group, over the group's deviation.
    """

    trl_fields = (*GroupStage.trl_fields, "beta", "loss_type", "scale_rewards")

    beta: float = Field(0.04, ge=0)
    """Price of a nat of divergence from the reference, in the loss of each token (k3)."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo"] = "grpo"
    """How tokens are averaged. grpo: within each answer, as in the paper. dapo (TRL's default) and bnpo: over all tokens of the
    batch. dr_grpo: divided by a constant.
    """
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose deviation advantages are divided by; `none` is Dr. GRPO (arXiv:2503.20783)."""

    @property
    def own_settings(self) -> dict[str, Any]:
        averages = {"grpo": "completions", "dapo": "tokens", "bnpo": "tokens", "dr_grpo": "constant"}
        return {
            "advantage_estimator": "grpo",
            "scale_rewards": self.scale_rewards,
            "whiten_advantages": False,
            "loss_average": averages[self.loss_type],
            "kl_coef": self.beta,
            "kl_in": "loss",
            "kl_estimator": "k3",
        }


@stage("rloo")
class RLOO(GroupStage):
    """REINFORCE with a leave-one-out baseline (arXiv:2402.14740): an answer's advantage is its reward minus the mean of
    the others in its group.
    """

    trl_fields = (*GroupStage.trl_fields, "beta", "normalize_advantages")

    beta: float = Field(0.05, ge=0)
    """Price of a nat of divergence from the reference, taken off the reward."""
    normalize_advantages: bool = False
    """Shift and scale advantages to mean 0, variance 1 over the batch."""

    @property
    def own_settings(self) -> dict[str, Any]:
        return {"advantage_estimator": "rloo", "kl_coef": self.beta, "whiten_advantages": self.normalize_advantages}
