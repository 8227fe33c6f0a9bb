"""Pretraining: next-token prediction on plain text, from random weights or continued from a model."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, Field, model_validator

from align.stages.base import Context, ModelRef, TrainingStage, stage


@stage("pretrain")
class Pretrain(TrainingStage):
    """Train on plain text. With `architecture` the model starts from random weights and its tokenizer is trained on the text."""

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
        if self.engine != "forest":
            raise ValueError("pretrain runs on engine 'forest' only")
        if self.model is None and (self.strategy.name != "full" or self.on_adapter == "continue"):
            raise ValueError("random weights are trained in full: use_peft, tuning and on_adapter need a model to continue")
        return self

    def run(self, context: Context) -> dict[str, Any]:
        from align.encode import Encoder, set_chat_template
        from align.models import build_causal_lm, load_tokenizer
        from align.stages import training as t
        from align.tokenizers import train_bpe
        from align.trainers.objectives import LanguageModel

        t.seed_everything(self)
        rows, held = t.rows_of(self, "text", context)
        start = self.model or self.tokenizer
        if start is not None:
            tokenizer = load_tokenizer(start, trust_remote_code=self.trust_remote_code)
        else:
            tokenizer = train_bpe((row.text for row in rows), self.vocab_size)
        if self.chat_template is not None:
            set_chat_template(tokenizer, self.chat_template)
        encoder = Encoder(tokenizer, self.max_length)
        trees, held_trees = t.encoded(encoder.text, rows, context.name), t.encoded(encoder.text, held, f"{context.name} (held out)")
        if self.model is not None:
            model = t.causal_lm(self)
        else:
            assert self.architecture is not None
            model = build_causal_lm(self.architecture, tokenizer)
        model = t.make_ready(self, context.name, model, tokenizer, t.longest(trees, held_trees), context.folder)
        return t.train_on_forest(self, context, model, tokenizer, LanguageModel(), trees, held_trees)
