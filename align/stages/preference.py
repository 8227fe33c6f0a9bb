"""Preference optimization: one stage, and every loss of the catalog (`align.losses`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from align.stages.base import Context, TrainingStage, stage


@stage("preference")
class Preference(TrainingStage):
    """Train a policy directly on preference pairs. Parameters of the losses are named as in their papers and have no default."""

    loss: str = "dpo"
    """Name in the catalog of preference losses: dpo, ipo, orpo, simpo, robust, hinge, apo_zero, rpo."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate: 3e-7 to 1e-6 for all weights of a pretrained model (ORPO 5e-6 to 8e-6), ten times that for LoRA."""
    beta: float | None = None
    """dpo, ipo, robust, hinge, apo_zero, rpo: strength of the pull to the reference, 0.01 to 0.5. simpo: scale of the reward, 2
    to 10.
    """
    gamma: float | None = None
    """simpo: target margin; the paper recommends gamma / beta of 0.3 to 0.5."""
    lam: float | None = None
    """orpo: weight of the odds-ratio term (lambda in the paper), 0.1 for pretrained models."""
    rpo_alpha: float | None = None
    """rpo: weight of the chosen answer's negative log-likelihood."""
    label_smoothing: float | None = None
    """dpo, robust: probability that a pair's label is flipped."""
    average: bool | None = None
    """ipo: average log-probs over tokens (as TRL) instead of summing them (as the paper)."""

    @property
    def loss_parameters(self) -> dict[str, Any]:
        """The parameters that were set."""
        names = ("beta", "gamma", "lam", "rpo_alpha", "label_smoothing", "average")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @model_validator(mode="after")
    def _known_loss(self) -> Preference:
        if self.engine == "trl" and self.loss != "dpo":
            raise ValueError(f"engine 'trl' runs the loss 'dpo' only, not {self.loss!r}; use engine 'forest'")
        if self.engine == "trl" and self.label_smoothing:
            raise ValueError("TRL's DPO loss ignores label_smoothing; use engine 'forest'")
        return self

    def run(self, context: Context) -> dict[str, Any]:
        from align.losses import preference_losses
        from align.models import disable_dropout, load_causal_lm
        from align.stages import training as t
        from align.trainers.objectives import Preference as Objective
        from align.trainers.objectives import add_reference_logps

        preference_losses.check_arguments(self.loss, self.loss_parameters)
        loss = preference_losses[self.loss]
        t.seed_everything(self)
        rows, held = t.rows_of(self, "preference", context.name)
        tokenizer, encoder = t.tokenizer_of(self)
        trees = t.encoded(encoder.preference, rows, context.name)
        held_trees = t.encoded(encoder.preference, held, f"{context.name} (held out)")
        model = load_causal_lm(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        t.teach_end_token(model, t.end_token(encoder, rows))
        disable_dropout(model)
        model = t.make_ready(self, context.name, model, tokenizer, t.longest(trees, held_trees), context.folder)
        if self.engine == "trl":
            from align.trainers.trl import dpo_trainer

            trainer = dpo_trainer(
                model,
                tokenizer,
                encoder.preference(rows).rows,
                encoder.preference(held).rows,
                t.training_arguments(self, context, has_eval=bool(held_trees)),
                beta=self.loss_parameters["beta"],
                label_smoothing=self.label_smoothing or 0.0,
                max_length=self.max_length,
                callbacks=t.callbacks_of(self, context),
            )
            return t.run_trainer(trainer, self, context, has_eval=bool(held_trees))
        if loss.needs_reference:
            both = add_reference_logps(model, [*trees, *held_trees], self.max_tokens_per_micro_batch, context.name)
            trees, held_trees = both[: len(trees)], both[len(trees) :]
        return t.train_on_forest(self, context, model, tokenizer, Objective(loss, self.loss_parameters), trees, held_trees)
