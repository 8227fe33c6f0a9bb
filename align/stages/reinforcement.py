"""What the stages that train on their own samples have in common: roles, judge and trainer made ready, the result saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from torch import nn
from transformers import PreTrainedTokenizerBase, get_scheduler

from align import processes
from align.allocator import moments_first
from align.encode import Encoded, Encoder
from align.errors import AlignError
from align.forest import Tree
from align.models import disable_dropout, stop_token_ids
from align.rollout import Engine, Sampling
from align.rollout.together import complete_together
from align.runner.stop import saving_first
from align.scoring import Judge, component_means, score_scale
from align.shards import shard, whole, whole_weights
from align.stages import training as t
from align.stages.base import Context
from align.stages.forgetting import probe
from align.stages.selection import Best
from align.trainers.ppo.adapters import critic_on_base, reward_on_base
from align.trainers.ppo.advantages import estimators
from align.trainers.ppo.checkpoint import Checkpoints
from align.trainers.ppo.critics import POLICY, Critic, SeparateCritic, SharedCritic, ValueHead
from align.trainers.ppo.models import Models
from align.trainers.ppo.trainer import PPOTrainer, check
from align.trainers.settings import PPOSettings
from align.trainers.trackers import tracked
from align.tuning.tune import trainable


def _deviation(stage: Any) -> float:
    """What scores of the stage's reward model are divided by, so that a critic that starts from it begins on their scale."""
    return score_scale(stage.reward_model)[1] if stage.reward_model and stage.normalize_scores else 1.0


def _separate(stage: Any, context: Context, policy: Any, tokenizer: PreTrainedTokenizerBase, longest: int) -> Critic:
    critic: Any = t.reward_model(stage, stage.reward_model or stage.model)
    with torch.no_grad():
        for weight in critic.score.parameters():
            weight /= _deviation(stage)
    if stage.gradient_checkpointing:
        critic.gradient_checkpointing_enable({"use_reentrant": False})
    critic = t.make_ready(stage, f"{context.name} (critic)", critic, tokenizer, longest, None)
    disable_dropout(critic)
    if stage.in_shards:
        shard(critic)
    return SeparateCritic(critic)


def _adapter(stage: Any, context: Context, policy: Any, tokenizer: PreTrainedTokenizerBase, longest: int) -> Critic:
    kind = PeftType(policy.peft_config[POLICY].peft_type).value
    if kind != "LORA":  # of an adapter that is trained further only its file tells
        raise AlignError(
            f"critic 'adapter' is for LoRA, and the model's adapter is of the kind {kind}: take 'separate' or 'shared'"
        )
    critic = critic_on_base(policy, stage.reward_model, _deviation(stage))
    disable_dropout(policy)
    return critic


def _shared(stage: Any, context: Context, policy: Any, tokenizer: PreTrainedTokenizerBase, longest: int) -> Critic:
    return SharedCritic(ValueHead(policy))


CRITICS: dict[str, Callable[..., Critic]] = {"separate": _separate, "adapter": _adapter, "shared": _shared}


def train_on_samples(
    stage: Any, context: Context, settings_of: Callable[[int], PPOSettings], *, critic: str = "separate"
) -> dict[str, Any]:
    """Sample the stage's model on its prompts, judge the answers and learn from them.

    Args:
        settings_of: the trainer's settings for so many prompts.
        critic: which of `CRITICS`, for an estimator that needs one.

    Raises:
        AlignError: from loading; or the settings do not fit together.
    """
    t.seed_everything(stage)
    rows, held = t.rows_of(stage, "prompts", context)
    tokenizer, encoder = t.tokenizer_of(stage, room=stage.max_completion_length)
    train, test = encoder.prompts(rows), encoder.prompts(held[: stage.eval_prompts])
    prompts = [tree.prompt for tree in t.usable(train, context.name)]
    settings, sampling = settings_of(len(prompts)), stage.sampling(tokenizer)
    needs_critic = estimators[settings.advantage_estimator].needs_critic
    check(settings, sampling, has_critic=needs_critic)
    ptx = _ptx(stage, settings, tokenizer, context)
    longest = max(t.longest(train.trees) + stage.max_completion_length, *(tree.longest for tree in ptx), 1)
    policy, stop_ids = _policy(stage, context, tokenizer, encoder.end_of_answer(rows[0]), longest)
    after = probe(stage, context, Encoder(tokenizer, stage.max_length), policy)
    judge = stage.judge(
        tokenizer,
        [*rows, *held],
        dtype=stage.dtype,
        max_tokens=stage.max_tokens_per_micro_batch,
        model=None if stage.in_shards else reward_on_base(policy, stage.reward_model),
        totals=processes.totals,
    )
    value = CRITICS[critic](stage, context, policy, tokenizer, longest) if needs_critic else None
    sampler = stage.sampler(policy, context.folder)
    models = Models(policy, value, temperature=stage.temperature, bf16=stage.in_bf16)
    optimizer, scheduler = _optimizer(stage, settings, models)

    def score(indices: list[int], completions: list[Any]) -> tuple[list[float], dict[str, float]]:
        totals, components = judge([train.rows[i] for i in indices], [prompts[i] for i in indices], completions)
        return totals, {f"rewards/{name}": mean for name, mean in component_means(processes.joined(components)).items()}

    best = Best(stage, context, policy) if stage.keeps_best else None
    trainer = PPOTrainer(
        models,
        prompts,
        score,
        settings,
        sampler=sampler,
        sampling=sampling,
        stop_ids=stop_ids,
        optimizer=optimizer,
        scheduler=scheduler,
        history=context.history,
        max_tokens=stage.max_tokens_per_micro_batch,
        max_grad_norm=stage.max_grad_norm,
        seed=stage.seed,
        checkpoints=Checkpoints(
            context.folder / "checkpoints",
            stage.save_steps,
            stage.save_minutes,
            stage.save_total_limit,
            None if best is None else best.fault_until,
        ),
        ptx=ptx,
        text=tokenizer.decode,
    )
    _train(stage, context, trainer, HeldOut(test, policy, sampler, judge.by_itself(), sampling, stop_ids, stage.seed), best)
    kept = None if best is None else best.restore()
    weights = whole_weights(policy) if stage.in_shards else None
    if processes.number() == 0:
        t.save_model(policy, tokenizer, context.folder, weights)
    return {**_metrics(context, kept), **trainable(policy), **after()}


def _policy(
    stage: Any, context: Context, tokenizer: PreTrainedTokenizerBase, end: int, longest: int
) -> tuple[nn.Module, list[int]]:
    """The model that learns, made ready for paths of `longest` tokens, and the tokens that end its answers, `end` among them."""
    policy: Any = t.causal_lm(stage)
    t.teach_end_token(policy, end)
    stop_ids = sorted({end, *stop_token_ids(policy, tokenizer)})
    if stage.gradient_checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy = t.make_ready(stage, context.name, policy, tokenizer, longest, context.folder)
    disable_dropout(policy)  # after LoRA, whose own dropout would part old and new log-probs
    if stage.in_shards:
        shard(policy)
    return policy, stop_ids


@dataclass(frozen=True)
class HeldOut:
    """Held-out prompts, who answers them, and who judges."""

    prompts: Encoded
    policy: nn.Module
    sampler: nn.Module | Engine
    judge: Judge
    sampling: Sampling
    stop_ids: list[int]
    seed: int

    def scores(self) -> dict[str, float]:
        """Mean score of sampled answers, and of each of its components. The draws of chance are the same every time, and every
        process answers a share.
        """
        prompts = [tree.prompt for tree in self.prompts.trees]
        generator = torch.Generator().manual_seed(self.seed)
        with whole(self.policy):
            completions = complete_together(self.sampler, prompts, self.sampling, self.stop_ids, generator)
        totals, components = self.judge(processes.share(self.prompts.rows), processes.share(prompts), completions)
        totals, components = processes.gathered(totals), processes.joined(components)
        return {"eval_score": sum(totals) / len(totals), **{f"eval_{k}": v for k, v in component_means(components).items()}}


def _train(stage: Any, context: Context, trainer: PPOTrainer, held_out: HeldOut, best: Best | None) -> None:
    """Train from the last checkpoint on, to the end or until `best` has seen enough; measured before, after and in between."""
    assert trainer.checkpoints is not None
    resumed = stage.resume_from_checkpoint and trainer.resume()
    if not stage.resume_from_checkpoint:
        trainer.checkpoints.clear()  # otherwise what was sampled before the first checkpoint is there to be used
    context.history.rewind(trainer.done if resumed else -1)

    def evaluate(step: int) -> bool:
        """Where it is time to. Returns whether it is also time to stop."""
        due = step in (0, trainer.settings.steps) or (stage.eval_steps and step % stage.eval_steps == 0)
        if not held_out.prompts.trees or not due:
            return False
        context.history.add(step, held_out.scores())
        return best is not None and step > 0 and best.see(step)

    with tracked(context.history, stage.report_to, context.folder):
        if not resumed:
            evaluate(0)
        if best is not None:
            best.check()
        with saving_first():
            if not (resumed and best is not None and best.enough()):  # it may have been cut between its early stop and its end
                trainer.train(context.name, stage.logging_steps, after_step=evaluate)


def _ptx(stage: Any, settings: PPOSettings, tokenizer: PreTrainedTokenizerBase, context: Context) -> list[Tree]:
    """Trees of the rows that are mixed in."""
    if not settings.ptx_coef:
        return []
    encoder = Encoder(tokenizer, stage.max_length)
    label = f"{context.name} (ptx)"
    rows = t.read_rows(stage, stage.ptx_data, stage.ptx_rows, label, t.quarantine_in(context, "quarantine.ptx.jsonl"))
    return t.encoded(getattr(encoder, stage.ptx_rows), rows, label)


def _optimizer(stage: Any, settings: PPOSettings, models: Models) -> tuple[Any, Any]:
    """AdamW with groups for each role, and its schedule over the run. As in transformers' Trainer norms and biases, which have one
    dimension, do not decay.
    """
    rates = {"policy": stage.learning_rate, "critic": settings.critic_learning_rate or stage.learning_rate}
    groups = []
    for role, named in models.parameters().items():
        for decay, wanted in ((stage.weight_decay, True), (0.0, False)):
            if some := [weight for weight in named.values() if (weight.dim() > 1) == wanted]:
                groups.append({"params": some, "lr": rates[role], "weight_decay": decay})
    # Some schedules read the peak (of `min_lr`) in the optimizer's own rate.
    optimizer = torch.optim.AdamW(groups, stage.learning_rate, (stage.adam_beta1, stage.adam_beta2), fused=True)
    if processes.alone():
        moments_first(optimizer)
    updates = settings.steps * settings.num_ppo_epochs * settings.num_mini_batches
    scheduler = get_scheduler(
        stage.lr_scheduler_type,
        optimizer,
        num_warmup_steps=round(stage.warmup_ratio * updates),
        num_training_steps=updates,
        scheduler_specific_kwargs=stage.lr_scheduler_kwargs,
    )
    return optimizer, scheduler


def _metrics(context: Context, kept: int | None) -> dict[str, Any]:
    """The held-out scores before and after, up to the step whose weights are kept, and how it ended."""
    records = [record for record in context.history.records if kept is None or record["step"] <= kept]
    best = {} if kept is None else {"best_step": kept}
    last = {name: context.history.last(name) for name in ("objective/kl", "objective/scores")}
    return {**best, **t.held_out_metrics(records), **last}
