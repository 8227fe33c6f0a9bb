"""Preference optimization without pairs: answers labelled good or bad, one by one (KTO)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align.stages.base import Context, TrainingStage, stage
from align.stages.forgetting import ProbeFields, probe

if TYPE_CHECKING:
    from align.encode import Encoded
    from align.forest import Tree


@stage("kto")
class KTO(TrainingStage, ProbeFields):
    """Train a policy directly on answers labelled good or bad; pairs are read as two such rows each.

    Every reward is compared to an estimate of the divergence from the reference, made from prompts with the answers of their
    neighbours in the batch. So rows are shuffled once, and come in that order in every epoch.
    """

    reads = "unpaired"

    learning_rate: float = Field(5e-7, gt=0)
    """Peak learning rate: 5e-7 to 5e-6 for all weights of a pretrained model, ten times that for LoRA."""
    per_device_train_batch_size: int = Field(8, gt=1)
    """Rows for each device in a micro-step; it is cut further by `max_tokens_per_micro_batch`. At least 2: an answer is also put
    behind its neighbour's prompt.
    """
    beta: float = Field(gt=0)
    """Strength of the pull to the reference, 0.01 to 0.5."""
    desirable_weight: float = Field(1.0, gt=0)
    """Weight of good answers (lambda_D). Where one label is rarer, raise its weight until weight x rows of both are about equal."""
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of bad answers (lambda_U)."""

    def run(self, context: Context) -> dict[str, Any]:
        from transformers import TrainingArguments

        from align.models import disable_dropout
        from align.stages import training as t
        from align.trainers.kto import KTOTrainer
        from align.trainers.objectives import Unpaired

        t.seed_everything(self)
        rows, held = t.rows_of(self, "unpaired", context)
        for part in (rows, held):
            random.Random(self.seed).shuffle(part)
        tokenizer, encoder = t.tokenizer_of(self)
        train, test = encoder.unpaired(rows), encoder.unpaired(held)
        t.usable(train, context.name)
        if held:
            t.usable(test, f"{context.name} (held out)")
        trees, held_trees = (self._mismatched(tokenizer, part) for part in (train, test))
        model = t.causal_lm(self)
        t.teach_end_token(model, encoder.end_of_answer(rows[0]))
        disable_dropout(model)
        model = t.make_ready(self, context.name, model, tokenizer, t.longest(trees, held_trees), context.folder)
        arguments = t.training_arguments(self, context, has_eval=bool(held)) | {"train_sampling_strategy": "sequential"}
        callbacks = t.callbacks_of(self, context)
        parameters = {name: getattr(self, name) for name in ("beta", "desirable_weight", "undesirable_weight")}
        trainer: Any
        if self.engine == "trl":
            from align.trainers.trl import kto_trainer

            trainer = kto_trainer(
                model,
                tokenizer,
                train.rows,
                test.rows,
                {**arguments, **parameters, "max_length": self.max_length},
                callbacks=callbacks,
            )
        else:
            trees, held_trees = t.with_reference(self, context.name, model, trees, held_trees, common=False)
            trainer = KTOTrainer(
                model,
                Unpaired(**parameters),
                TrainingArguments(**arguments),
                trees,
                held_trees or None,
                max_tokens=self.max_tokens_per_micro_batch,
                tokenizer=tokenizer,
                callbacks=callbacks,
                skip_non_finite=self.on_non_finite == "skip",
            )
        after = probe(self, context, encoder, model)
        metrics = t.run_trainer(trainer, self, context, has_eval=bool(held))
        return {**metrics, **after()}

    def _mismatched(self, tokenizer: Any, part: Encoded) -> Sequence[Tree]:
        """The trees of `part`, each with the answer of a neighbour as well, whole before it is cut behind its new prompt."""
        from align.encode import Encoder
        from align.trainers.kto import add_mismatched

        answers = [tree.branches[0] for tree in Encoder(tokenizer).unpaired(part.rows).trees]
        return add_mismatched(part.trees, answers, self.rows_per_step, self.max_length)
