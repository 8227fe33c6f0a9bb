"""Supervised fine-tuning: the loss is the negative log-likelihood of the assistant's words."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from align.stages.base import Context, TrainingStage, stage
from align.stages.forgetting import ProbeFields, ReplayFields, probe, with_replay


@stage("sft")
class SFT(TrainingStage, ReplayFields, ProbeFields):
    """Teach a model to answer, from demonstrations."""

    reads = "sft"

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate: 1e-5 to 5e-5 for all weights of a pretrained model, ten times that for LoRA."""

    def run(self, context: Context) -> dict[str, Any]:
        from align.stages import training as t
        from align.trainers.objectives import LanguageModel

        t.seed_everything(self)
        rows, held = t.rows_of(self, "sft", context)
        tokenizer, encoder = t.tokenizer_of(self)
        trees, held_trees = t.encoded(encoder.sft, rows, context.name), t.encoded(encoder.sft, held, f"{context.name} (held out)")
        t.check_end_token(encoder, rows, trees)
        trees = with_replay(self, context, "sft", encoder.sft, trees)
        model = t.causal_lm(self)
        t.teach_end_token(model, encoder.end_of_answer(rows[0]))
        model = t.make_ready(self, context.name, model, tokenizer, t.longest(trees, held_trees), context.folder)
        if self.engine == "trl":
            from align.trainers.trl import sft_trainer

            arguments = t.training_arguments(self, context, has_eval=bool(held_trees))
            trainer = sft_trainer(model, tokenizer, trees, held_trees, arguments, callbacks=t.callbacks_of(self, context))
            return t.run_trainer(trainer, self, context, has_eval=bool(held_trees))
        after = probe(self, context, encoder, model)
        metrics = t.train_on_forest(self, context, model, tokenizer, LanguageModel(), trees, held_trees)
        return {**metrics, **after()}
