"""A model's loss surface from its name and some rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align.data import load_rows
from align.diagnostics.curvature.surface import Surface
from align.encode import Encoder, set_chat_template
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.models import (
    OnAdapter,
    best_device,
    disable_dropout,
    ensure_pad_token,
    is_adapter,
    is_classifier,
    load_causal_lm,
    load_reward_model,
    load_tokenizer,
)
from align.progress import say
from align.trainers.objectives import LanguageModel, RewardModel


@dataclass(frozen=True)
class Rows:
    """Which rows, and how they are read."""

    source: str
    kind: str
    limit: int
    max_length: int
    max_tokens: int


def surface_of(path: str, rows: Rows) -> Surface:
    """The loss surface of the model in `path` on `rows`: of its adapter's parameters where it is one, else of all.

    Policies are measured by the negative log-likelihood of the rows, reward models by the Bradley-Terry loss.

    Raises:
        AlignError: the rows do not fit the model.
    """
    judge = is_classifier(path)
    if judge != (rows.kind == "preference"):
        wanted = "preference pairs (--kind preference)" if judge else "demonstrations or texts (--kind sft or text)"
        raise AlignError(f"{path} is a {'reward' if judge else 'language'} model: its loss is measured on {wanted}")
    tokenizer = load_tokenizer(path)
    set_chat_template(tokenizer, "auto")
    trees = _trees(rows, Encoder(tokenizer, rows.max_length))
    model = _trainable(path, judge)
    ensure_pad_token(tokenizer, model)
    disable_dropout(model)
    model.to(best_device())
    if reason := enable_forest(model, max(tree.longest for tree in trees)):
        say(f"{path}: measured on padded rows, as {reason}")
    return Surface(model, RewardModel() if judge else LanguageModel(), trees, rows.max_tokens)


def _trainable(path: str, judge: bool) -> Any:
    """The model with those parameters requiring a gradient that were trained."""
    kept: OnAdapter = "continue" if is_adapter(path) else "merge"
    return load_reward_model(path, on_adapter=kept) if judge else load_causal_lm(path, on_adapter=kept)


def _trees(rows: Rows, encoder: Encoder) -> list[Tree]:
    loaded = load_rows(rows.source, rows.kind, limit=rows.limit)
    encode: Any = {"sft": encoder.sft, "text": encoder.text, "preference": encoder.preference}[rows.kind]
    encoded = encode(loaded.rows)
    if not encoded.trees:
        raise AlignError(f"{rows.source}: none of the rows can be used: {encoded.summary()}")
    return encoded.trees
