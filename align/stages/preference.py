"""Preference optimization: one stage, and every loss of the catalog (`align.losses`)."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from align.stages.base import ComparingStage, Context, stage
from align.stages.forgetting import ProbeFields, probe

TRL_LOSSES = {
    "dpo": "sigmoid",
    "ld_dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "ipo": "ipo",
    "robust": "robust",
    "hinge": "hinge",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
}
"""Losses that TRL's `DPOTrainer` defines as we do, and what it calls them."""


@stage("preference")
class Preference(ComparingStage, ProbeFields):
    """Train a policy directly on preference pairs. Parameters of the losses are named as in their papers and have no default."""

    reads = "preference"

    loss: str = "dpo"
    """Name in the catalog of preference losses: dpo, ipo, orpo, simpo, robust, hinge, apo_zero, apo_down, rpo, dpo_norm, ld_dpo."""
    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate: 3e-7 to 1e-6 for all weights of a pretrained model (ORPO 5e-6 to 8e-6), ten times that for LoRA."""
    beta: float | None = Field(None, gt=0)
    """dpo, ipo, robust, hinge, apo_zero, apo_down, rpo, ld_dpo: strength of the pull to the reference, 0.01 to 0.5. dpo_norm: the
    same for means over tokens, about 5. simpo: scale of the reward, 2 to 10.
    """
    gamma: float | None = None
    """simpo: target margin; the paper recommends gamma / beta of 0.3 to 0.5."""
    lam: float | None = Field(None, gt=0)
    """orpo: weight of the odds-ratio term (lambda in the paper), 0.1 for pretrained models."""
    rpo_alpha: float | None = Field(None, ge=0)
    """rpo: weight of the chosen answer's negative log-likelihood."""
    alpha: float | None = Field(None, ge=0, le=1)
    """ld_dpo: weight of the tokens that the longer answer has beyond the other's length, 0 to 1; 1 is dpo."""
    label_smoothing: float | None = Field(None, ge=0, lt=0.5)
    """dpo, robust: probability that a pair's label is flipped."""
    average: bool | None = None
    """ipo: average log-probs over tokens (as TRL) instead of summing them (as the paper)."""

    @property
    def loss_parameters(self) -> dict[str, Any]:
        """The parameters that were set."""
        names = ("beta", "gamma", "lam", "rpo_alpha", "alpha", "label_smoothing", "average")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def trl_arguments(self) -> dict[str, Any]:
        """The loss as TRL's `DPOConfig` has it."""
        theirs = {"alpha": "ld_alpha"}
        parameters = {theirs.get(name, name): value for name, value in self.loss_parameters.items() if name != "average"}
        return {**parameters, "loss_type": [TRL_LOSSES[self.loss]], "max_length": self.max_length}

    @model_validator(mode="after")
    def _kto_is_a_stage(self) -> Preference:
        if self.loss == "kto":
            raise ValueError("kto is a stage of its own, for answers labelled one by one: use `align kto`")
        return self

    @model_validator(mode="after")
    def _trl_has_the_loss(self) -> Preference:
        if self.engine == "trl":
            if self.loss not in TRL_LOSSES:
                raise ValueError(f"engine 'trl' runs the losses {', '.join(TRL_LOSSES)}, not {self.loss!r}; use engine 'forest'")
            if self.loss == "dpo" and self.label_smoothing:
                raise ValueError("TRL's DPO loss ignores label_smoothing; use engine 'forest'")
            if self.loss == "ipo" and not self.average:
                raise ValueError("TRL's IPO loss averages log-probs over tokens; set average, or use engine 'forest'")
        return self

    def check(self) -> None:
        from align.losses import preference_losses

        super().check()
        preference_losses.check_arguments(self.loss, self.loss_parameters)

    def run(self, context: Context) -> dict[str, Any]:
        from align.losses import preference_losses
        from align.models import disable_dropout
        from align.stages import training as t
        from align.trainers.objectives import Preference as Objective

        loss = preference_losses[self.loss]
        t.seed_everything(self)
        rows, held = t.rows_of(self, "preference", context)
        tokenizer, encoder = t.tokenizer_of(self)
        trees = t.encoded(encoder.preference, rows, context.name)
        held_trees = t.encoded(encoder.preference, held, f"{context.name} (held out)")
        model = t.causal_lm(self)
        t.teach_end_token(model, encoder.end_of_answer(rows[0]))
        disable_dropout(model)
        model = t.make_ready(self, context.name, model, tokenizer, t.longest(trees, held_trees), context.folder)
        if self.engine == "trl":
            from align.trainers.trl import dpo_trainer

            trainer = dpo_trainer(
                model,
                tokenizer,
                encoder.preference(rows).rows,
                encoder.preference(held).rows,
                t.training_arguments(self, context, has_eval=bool(held_trees)) | self.trl_arguments,
                callbacks=t.callbacks_of(self, context),
            )
            return t.run_trainer(trainer, self, context, has_eval=bool(held_trees))
        if loss.needs_reference:
            trees, held_trees = t.with_reference(self, context.name, model, trees, held_trees, common=loss.needs_common)
        after = probe(self, context, encoder, model)
        objective = Objective(loss, self.loss_parameters)
        metrics = t.train_on_forest(
            self, context, model, tokenizer, objective, trees, held_trees, group_by_prompt=self.group_by_prompt
        )
        return {**metrics, **after()}
