"""A reward model: one score an answer, from which of two answers people preferred (Bradley-Terry)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from align.stages.base import ComparingStage, Context, stage


@stage("reward")
class RewardModel(ComparingStage):
    """Train a score head on a language model, from preference pairs."""

    reads = "preference"

    learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate: about 1e-5 for all weights of a pretrained model, ten times that for LoRA."""
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Weight of the term that keeps the mean of chosen and rejected scores at zero (arXiv:2312.09244)."""
    use_margin: bool = False
    """Ask for a score difference of at least the row's `margin` (Llama 2, arXiv:2307.09288)."""
    sft_coef: float = Field(0.0, ge=0)
    """Weight of the chosen answer's negative log-likelihood (nats, mean over tokens) under the head of the language model that the
    stage starts from. It keeps what the model knows, on which its judgement rests (GRM, arXiv:2406.10216).
    """

    @model_validator(mode="after")
    def _trl_knows_neither_margin_nor_language_model(self) -> RewardModel:
        for name in ("use_margin", "sft_coef"):
            if self.engine == "trl" and getattr(self, name):
                raise ValueError(f"{name} runs on engine 'forest' only")
        return self

    def run(self, context: Context) -> dict[str, Any]:
        from align.models import disable_dropout
        from align.stages import training as t
        from align.trainers.objectives import RewardModel as Objective

        t.seed_everything(self)
        rows, held = t.rows_of(self, "preference", context)
        tokenizer, encoder = t.tokenizer_of(self)
        trees = t.encoded(encoder.preference, rows, context.name)
        held_trees = t.encoded(encoder.preference, held, f"{context.name} (held out)")
        head = t.language_head(self, tokenizer) if self.sft_coef else None
        model = t.reward_model(self)
        disable_dropout(model)
        model = t.make_ready(self, context.name, model, tokenizer, t.longest(trees, held_trees), context.folder)
        if self.engine == "trl":
            from align.trainers.trl import reward_trainer

            arguments = t.training_arguments(self, context, has_eval=bool(held_trees))
            callbacks = t.callbacks_of(self, context)
            trainer = reward_trainer(
                model, tokenizer, trees, held_trees, arguments, self.center_rewards_coefficient, callbacks=callbacks
            )
            metrics = t.run_trainer(trainer, self, context, has_eval=bool(held_trees))
            t.enable_forest(model)
        else:
            objective = Objective(self.center_rewards_coefficient, self.use_margin, self.sft_coef, head)
            metrics = t.train_on_forest(
                self, context, model, tokenizer, objective, trees, held_trees, group_by_prompt=self.group_by_prompt
            )
        return {**metrics, **t.store_score_scale(self, context, model, held_trees or trees)}
