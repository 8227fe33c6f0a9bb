"""Runs a transformers model on a forest: ``model(forest=forest)``.

`enable_forest` gives a loaded model that call, after checking on random tokens that it answers as the model itself does. A model
that cannot run on a forest unfolds it into padded rows instead, and the caller is told why. Everything else about the model stays
as it is: ``save_pretrained``, ``generate``, wrapping by accelerate, gradient checkpointing.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align.attention import FOREST, make_plan
from align.errors import AlignError
from align.forest import Forest, Tree, pad, plant
from align.heads import TokenScores, at_least_fp32, head_of, token_scores

PROBE_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference in log-probs (nats) that rounding explains."""


def enable_forest(model: nn.Module, longest: int | None = None) -> str | None:
    """Let `model` be called with ``forest=`` and find its path. Returns None for the forest path, or why it takes the padded one.

    A causal language model then answers with `TokenScores` of the forest's targets. A model with a score head (sequence
    classification) answers with scores, at the ends of the sequences (``read="ends"``) or at the sources of the targets
    (``read="sources"``).

    Args:
        longest: tokens in the longest path to come, held against the model's sliding window.

    Raises:
        AlignError: neither path gives the model's own log-probs.
    """
    model.forward = MethodType(_forward, model)
    base = base_model(model)
    before = base.config._attn_implementation
    reason = _refused_by_config(base.config, longest)
    if reason is None:
        try:
            if not type(base)._can_set_attn_implementation():
                raise NotImplementedError(f"{type(base).__name__} does not use transformers' attention interface")
            base.set_attn_implementation(FOREST)
            model.forest_padded = False  # type: ignore[assignment]
            reason = _probe(model)
        except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
    if reason is None:
        return None
    base.set_attn_implementation(before)
    model.forest_padded = True  # type: ignore[assignment]
    if problem := _probe(model):
        raise AlignError(f"{type(base).__name__} can be trained neither on the forest ({reason}) nor on padded rows ({problem})")
    return reason


def base_model(model: nn.Module) -> Any:
    """The transformers model inside `model`, without the PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _forward(
    self: nn.Module,
    *args: Any,
    forest: Forest | None = None,
    read: Literal["sources", "ends"] = "ends",
    temperature: float = 1.0,
    with_entropy: bool = False,
    **kwargs: Any,
) -> Any:
    """The forward of an enabled model. Bound to the outermost module so that DDP's and FSDP's hooks see every call."""
    if forest is None:
        return type(self).forward(self, *args, **kwargs)
    base = base_model(self)
    hidden, sources, ends = _hidden_states(base, forest, padded=bool(self.forest_padded))
    if hasattr(base, "score"):
        return base.score(hidden[sources if read == "sources" else ends]).squeeze(-1).float()
    return token_scores(hidden[sources], forest.targets, head_of(base), temperature, with_entropy=with_entropy)


def _hidden_states(base: Any, forest: Forest, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states (rows, hidden), and where in them the forest's sources and ends lie."""
    if padded:
        batch = pad(forest)
        output = base.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.last_hidden_state.flatten(0, 1), batch.sources, batch.ends
    # A four-dimensional mask is taken as ready-made by transformers, which would otherwise build one of (tokens, tokens).
    no_mask = torch.empty(1, 1, 0, 0, device=forest.input_ids.device)
    output = base.base_model(
        input_ids=forest.input_ids[None],
        position_ids=forest.position_ids[None],
        attention_mask=no_mask,
        use_cache=False,
        forest=make_plan(forest),
    )
    return output.last_hidden_state[0], forest.sources, forest.ends


def _refused_by_config(config: Any, longest: int | None) -> str | None:
    """What the config tells that a short probe cannot show."""
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and longest and longest > window:
        return f"its sliding window of {window} tokens is shorter than the longest row ({longest} tokens)"
    return None


@torch.no_grad()
def _probe(model: nn.Module) -> str | None:
    """Compare `model` on a small forest of random tokens with its own padded forward. None where they agree."""
    base = base_model(model)
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(base.config.vocab_size, (n,), generator=generator).tolist()

    forest = plant([Tree(tokens(7), (tokens(5), tokens(3), tokens(6))), Tree(tokens(4), (tokens(2), tokens(2)))])
    weight = next(model.parameters())
    forest = forest.to(weight.device)
    batch = pad(forest)
    was_training = model.training
    model.eval()
    try:
        ours = model(forest=forest, read="ends")
        theirs = type(model).forward(model, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        if isinstance(ours, TokenScores):
            logits = theirs.flatten(0, 1)[batch.sources]
            wanted = logits.to(at_least_fp32(logits.dtype)).log_softmax(1).gather(1, forest.targets[:, None])[:, 0]
            difference = (ours.logps - wanted).abs().max().item()
        else:
            # A score head answers once a row, at the last token that is not padding; read the trunk instead.
            hidden = base.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            wanted = base.score(hidden.last_hidden_state.flatten(0, 1)[batch.ends]).squeeze(-1).float()
            difference = (ours - wanted).abs().max().item()
    finally:
        model.train(was_training)
    tolerance = PROBE_TOLERANCE.get(weight.dtype, 1e-4)
    if difference <= tolerance:
        return None
    return f"its log-probs on the probe differ by {difference:.1e} nats (at most {tolerance:.0e} is rounding)"
