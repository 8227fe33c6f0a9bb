"""Reinforcement learning from a reward model, from reward functions, or from both (PPO)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from align.stages.base import AdapterFields, Context, DataFields, MaxTokens, ModelFields, OptimizerFields, Stage, stage
from align.stages.sampling import RewardFields, SamplingFields
from align.trainers.settings import PPOSettings


@stage("ppo")
class PPO(Stage, DataFields, ModelFields, AdapterFields, OptimizerFields, SamplingFields, RewardFields, PPOSettings):
    """Sample the policy on prompts, score what it says, and make what scored well more likely, close to where it started."""

    reads = "prompts"

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate of the policy: about 1e-6 for all weights of a pretrained model, ten times that for LoRA."""
    max_tokens_per_micro_batch: MaxTokens = 8192
    """Tokens in one forward and backward pass; `auto` is 8192. It changes speed and memory, never the result."""
    logging_steps: int = Field(1, gt=0)
    """Batches of episodes between two lines of metrics."""
    eval_prompts: int = Field(256, ge=0)
    """Held-out prompts answered and scored before and after training."""

    def run(self, context: Context) -> dict[str, Any]:
        import torch
        from transformers import get_scheduler

        from align.budget import Budget
        from align.encode import Encoder
        from align.models import disable_dropout, save_model, stop_token_ids
        from align.rollout import complete
        from align.scoring import component_means
        from align.stages import training as t
        from align.trainers.ppo import PPOTrainer
        from align.tuning.tune import trainable

        t.seed_everything(self)
        rows, held = t.rows_of(self, "prompts", context)
        tokenizer, _ = t.tokenizer_of(self)
        encoder = Encoder(tokenizer, None if self.max_length is None else self.max_length - self.max_completion_length)
        judge = self.judge(tokenizer, dtype=self.dtype, max_tokens=self.max_tokens_per_micro_batch)
        train, test = encoder.prompts(rows), encoder.prompts(held[: self.eval_prompts])
        prompts = [tree.prompt for tree in t.usable(train, context.name)]

        policy = t.causal_lm(self)
        critic = t.reward_model(self, self.reward_model or self.model)
        end = t.end_token(encoder, rows)
        t.teach_end_token(policy, end)
        stop_ids = sorted({end, *stop_token_ids(policy, tokenizer)})
        longest = t.longest(train.trees) + self.max_completion_length
        if self.gradient_checkpointing:
            for model in (policy, critic):
                model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        policy = t.make_ready(self, context.name, policy, tokenizer, longest, context.folder)
        critic = t.make_ready(self, f"{context.name} (critic)", critic, tokenizer, longest, None)
        for model in (policy, critic):
            disable_dropout(model)  # after LoRA, whose own dropout would part old and new log-probs

        groups = [
            {"params": [p for p in policy.parameters() if p.requires_grad], "lr": self.learning_rate},
            {"params": [p for p in critic.parameters() if p.requires_grad], "lr": self.critic_learning_rate or self.learning_rate},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(self.adam_beta1, self.adam_beta2), weight_decay=self.weight_decay)
        updates = self.total_episodes // self.episodes_per_step * self.num_ppo_epochs * self.num_mini_batches
        scheduler = get_scheduler(
            self.lr_scheduler_type,
            optimizer,
            num_warmup_steps=round(self.warmup_ratio * updates),
            num_training_steps=updates,
            scheduler_specific_kwargs=self.lr_scheduler_kwargs,
        )

        def score(indices: list[int], completions: list[Any]) -> tuple[list[float], dict[str, float]]:
            totals, components = judge([train.rows[i] for i in indices], [prompts[i] for i in indices], completions)
            return totals, {f"rewards/{name}": mean for name, mean in component_means(components).items()}

        def held_out_score(when: str) -> dict[str, float]:
            """Mean score of sampled answers to held-out prompts, the same draws of chance every time."""
            if not test.trees:
                return {}
            answers = complete(
                policy,
                [tree.prompt for tree in test.trees],
                self.sampling(tokenizer),
                stop_ids,
                torch.Generator(trainer.device).manual_seed(self.seed),
            )
            totals, components = judge(test.rows, [tree.prompt for tree in test.trees], answers)
            means = {"eval_score": sum(totals) / len(totals), **{f"eval_{k}": v for k, v in component_means(components).items()}}
            context.history.add(0 if when == "before" else trainer.steps, means)
            return {f"{name}_before" if when == "before" else name: value for name, value in means.items()}

        trainer = PPOTrainer(
            policy,
            critic,
            prompts,
            score,
            self,
            sampling=self.sampling(tokenizer),
            stop_ids=stop_ids,
            optimizer=optimizer,
            scheduler=scheduler,
            history=context.history,
            max_tokens=Budget(self.max_tokens_per_micro_batch).tokens,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            bf16=self.bf16,
        )
        before = held_out_score("before")
        trainer.train(context.name, self.logging_steps)
        after = held_out_score("after")
        save_model(policy, tokenizer, context.folder)
        last = context.history.last
        ends = {"objective/kl": last("objective/kl"), "objective/scores": last("objective/scores")}
        return {**before, **after, **ends, **trainable(policy)}
