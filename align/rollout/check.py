"""Which models our engine serves: each is asked before it does."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from align.engine import (
    PROBE_BOUNDS,
    PROBE_ERRORS,
    PROBE_TOLERANCE,
    base_model,
    frequency_border,
    refused_by_config,
    rounding_twice,
    short_windows,
    trunk_of,
)
from align.errors import first_line
from align.rollout.engine import Batch, serving
from align.rollout.sampling import Sampling

PROMPTS, FORCED = (6, 3, 1), 4
"""Tokens in the prompts of the probe, and how many follow each."""

_answers: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def refused(model: nn.Module, longest: int) -> str | None:
    """Why our engine cannot serve `model`; None where it can. A model is probed once: on random tokens, the engine's log-probs must
    be those of the model's own forward.

    Args:
        longest: tokens of the longest prompt and completion to come.
    """
    base = base_model(model)
    if getattr(base.config, "is_encoder_decoder", False):
        return "it is an encoder and a decoder"
    if getattr(base, "_is_stateful", False):
        return "it keeps a state instead of keys and values"
    virtual = vars(trunk_of(base)).get("virtual")  # see `align.tuning.soft`; asked every time, as they can be switched on and off
    if virtual is not None and not virtual.is_off:
        return "virtual tokens stand in front of its rows"
    if (border := frequency_border(base)) is not None and longest > border:
        return f"a row of more than {border} tokens changes the rotary frequencies of those beside it"
    if (reason := refused_by_config(base, longest)) is not None:
        return reason
    if base not in _answers:
        _answers[base] = _probe(model)
    return _answers[base]


@torch.no_grad()
def _probe(model: nn.Module) -> str | None:
    base, was_training = base_model(model), model.training
    device = next(base.parameters()).device
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(base.config.vocab_size, (len(PROMPTS), max(PROMPTS) + FORCED), generator=generator)
    model.eval()
    try:
        with torch.random.fork_rng(), short_windows(base, None):  # a run that goes on must draw as one that was never cut
            own = _own_logps(base, rows.to(device))
            with rounding_twice(base):
                noise = (_own_logps(base, rows.to(device)) - own).abs().mean().item()
            difference = (_engine_logps(model, rows) - own).abs().mean().item()
    except (*PROBE_ERRORS, KeyError) as error:
        return f"a probe of it ended with {type(error).__name__}: {first_line(error)}"
    finally:
        model.train(was_training)
    lower, upper = PROBE_BOUNDS
    tolerance = min(max(lower, PROBE_TOLERANCE * noise), upper)
    if difference <= tolerance:
        return None
    return f"its log-probs on the probe differ by {difference:.1e} nats (at most {tolerance:.0e} is rounding)"


def _own_logps(base: Any, rows: torch.Tensor) -> torch.Tensor:
    """Log-probs of the tokens after each prompt (prompts, FORCED, vocabulary), each row alone and without a cache."""
    found = []
    for row, length in zip(rows, PROMPTS, strict=True):
        logits = type(base).forward(base, input_ids=row[None, : length + FORCED], use_cache=False).logits[0]
        found.append(logits[length - 1 : length - 1 + FORCED].float().log_softmax(1))
    return torch.stack(found)


def _engine_logps(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The same by the engine, with the tokens of `rows` in place of drawn ones."""
    prompts = [row[:length].tolist() for row, length in zip(rows, PROMPTS, strict=True)]
    with serving(model) as base:
        batch = Batch(base, prompts, Sampling(FORCED), [], None)
        batch.admit()
        order, found = torch.tensor(batch.live), []
        for step in range(FORCED):
            found.append(batch.logits([(0, len(prompts), max(PROMPTS) + step)]).log_softmax(1))
            following = rows[order, torch.tensor(PROMPTS)[order] + step]
            batch.token[:] = following.to(batch.device)
            batch.position += 1
    return torch.stack(found, dim=1)[order.argsort()]
