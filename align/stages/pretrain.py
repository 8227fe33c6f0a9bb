"""Pretraining on plain text, from random weights or continued from a model: next-token prediction for decoders, masked words for
encoders, span corruption for encoder-decoders.
"""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field, model_validator

from align.stages.base import Context, TrainingStage, stage
from align.stages.config import ModelRef
from align.stages.forgetting import ProbeFields, ReplayFields, probe, with_replay


@stage("pretrain")
class Pretrain(TrainingStage, ReplayFields, ProbeFields):
    """Train on plain text, by the objective of the model's family. With `architecture` the model starts from random weights and its
    tokenizer is trained on the text.
    """

    reads = "text"

    model: ModelRef | None = Field(None, validation_alias=AliasChoices("model", "model_name_or_path"))  # type: ignore[assignment]
    """The model to continue: a registered name[@version], an alias, a folder or a hub id."""
    architecture: dict[str, Any] | None = None
    """`model_type` and fields of its transformers config, to start from random weights."""
    tokenizer: ModelRef | None = None
    """A tokenizer for random weights; without it a byte-level BPE is trained on the text."""
    vocab_size: int = Field(1024, gt=256)
    """Size of that BPE."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate: about 1e-3 from random weights, 1e-5 to 1e-4 when continuing."""

    @model_validator(mode="after")
    def _one_start(self) -> Pretrain:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("set either model (to continue it) or architecture (to start from random weights)")
        if self.model is not None and self.tokenizer is not None:
            raise ValueError("tokenizer belongs to architecture: a model that is continued has its own")
        if self.engine != "forest":
            raise ValueError("pretrain runs on engine 'forest' only")
        if self.model is None and (self.strategy.name != "full" or self.on_adapter == "continue"):
            raise ValueError("random weights are trained in full: use_peft, tuning and on_adapter need a model to continue")
        return self

    def check(self) -> None:
        from align.models import architecture_config

        super().check()
        if self.architecture is not None:
            architecture_config(self.architecture)

    def run(self, context: Context) -> dict[str, Any]:
        from align.encode import set_chat_template
        from align.models import architecture_config, family_of, load_config, load_tokenizer
        from align.stages import training as t
        from align.tokenizers import train_bpe

        t.seed_everything(self)
        rows, held = t.rows_of(self, "text", context)
        start = self.model or self.tokenizer
        if start is not None:
            tokenizer = load_tokenizer(start, trust_remote_code=self.trust_remote_code)
        else:
            tokenizer = train_bpe((row.text for row in rows), self.vocab_size)
        if self.chat_template is not None:
            set_chat_template(tokenizer, self.chat_template)
        if self.model is not None:
            config = load_config(self.model, trust_remote_code=self.trust_remote_code)
        else:
            config = architecture_config(self.architecture or {})
        if (family := family_of(config)) == "causal":
            return self._next_token(context, tokenizer, rows, held)
        return self._denoise(context, family, tokenizer, rows, held)

    def _model(self, tokenizer: Any) -> Any:
        from align.models import build_model
        from align.stages import training as t

        if self.model is not None:
            return t.language_model(self)
        return build_model(self.architecture or {}, tokenizer)

    def _next_token(self, context: Context, tokenizer: Any, rows: list[Any], held: list[Any]) -> dict[str, Any]:
        """A decoder, on the forest."""
        from align.encode import Encoder
        from align.stages import training as t
        from align.trainers.objectives import LanguageModel

        encoder = Encoder(tokenizer, self.max_length)
        trees, held_trees = t.encoded(encoder.text, rows, context.name), t.encoded(encoder.text, held, f"{context.name} (held out)")
        trees = with_replay(self, context, "text", encoder.text, trees)
        longest = t.longest(trees, held_trees)
        model = t.make_ready(self, context.name, self._model(tokenizer), tokenizer, longest, context.folder)
        after = probe(self, context, encoder, model)
        metrics = t.train_on_forest(self, context, model, tokenizer, LanguageModel(), trees, held_trees)
        return {**metrics, **after()}

    def _denoise(self, context: Context, family: str, tokenizer: Any, rows: list[Any], held: list[Any]) -> dict[str, Any]:
        """An encoder or an encoder-decoder, on padded rows."""
        from transformers import TrainingArguments

        from align.engine import check_reach
        from align.errors import AlignError
        from align.progress import say
        from align.stages import training as t
        from align.trainers.denoising import DenoisingTrainer, denoisers

        if self.probes or self.replay_data:
            raise AlignError(f"probes and replay_data are for causal models; this one is of the family {family!r}")
        if self.on_non_finite != "stop":
            raise AlignError(f"a model of the family {family!r} stops at a loss that is not finite: leave on_non_finite at 'stop'")
        if self.torch_compile:
            raise AlignError(f"torch_compile is for causal models; this one is of the family {family!r}: leave it out")
        denoiser = denoisers[family](tokenizer, self.max_length or 512)
        blocks, held_blocks = denoiser.blocks(rows), denoiser.fixed(denoiser.blocks(held), self.seed)
        if not blocks:
            raise AlignError(f"none of the {len(rows)} documents has two tokens to learn from")
        say(f"{context.name}: {family} model: {type(denoiser).__name__} on {len(blocks):,} blocks of padded rows")
        model = t.make_ready(self, context.name, self._model(tokenizer), tokenizer, None, context.folder)
        check_reach(model, max(len(block["input_ids"]) for block in [*blocks, *held_blocks]))
        trainer = DenoisingTrainer(
            model=model,
            args=TrainingArguments(**t.training_arguments(self, context, has_eval=bool(held_blocks))),
            denoiser=denoiser,
            train_dataset=blocks,
            eval_dataset=held_blocks or None,
            processing_class=tokenizer,
            callbacks=t.callbacks_of(self, context),
        )
        return t.run_trainer(trainer, self, context, has_eval=bool(held_blocks))
