"""Prompts to completions.

`complete` is what everything calls. Behind it stands an `Engine`: ours (`align.rollout.engine`), transformers' `generate` for
models that ours cannot serve, a vLLM server (`align.rollout.server`), or another that has this one method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from align.progress import say_once
from align.rollout.check import refused
from align.rollout.engine import CacheEngine
from align.rollout.generate import GenerateEngine
from align.rollout.packed import packed_linears
from align.rollout.sampling import Completion, Sampling

__all__ = ["CacheEngine", "Completion", "Engine", "GenerateEngine", "Sampling", "complete", "engine_for"]


@runtime_checkable
class Engine(Protocol):
    """What answers prompts. One that does is passed in place of the model. It runs in torch's inference mode, and so does
    `progress`: nothing can be trained on a tensor that is made there.
    """

    def complete(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Completion]:
        """As the function `complete`. A process whose share of the prompts is empty asks, too: others may wait for it."""


@torch.inference_mode()
def complete(
    model: nn.Module | Engine,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    generator: torch.Generator | None = None,
    progress: Callable[[int], Any] | None = None,
) -> list[Completion]:
    """One completion for each of `prompts` (non-empty token lists), in their order.

    A completion's draws of chance depend on `generator` and its place among `prompts`, not on `Sampling.batch_size`.

    Args:
        stop_ids: a completion ends with, and includes, the first of these.
        generator: source of randomness; one of the CPU.
        progress: called with the number of completions that have just ended.
    """
    if not isinstance(model, nn.Module):
        return model.complete(prompts, sampling, stop_ids, generator, progress)
    if not prompts:
        return []
    engine = engine_for(model, max(map(len, prompts)) + sampling.max_new_tokens)
    passes = sampling.max_new_tokens * -(-len(prompts) // sampling.batch_size)
    with packed_linears(model, passes):
        return engine.complete(prompts, sampling, stop_ids, generator, progress)


def engine_for(model: nn.Module, longest: int) -> Engine:
    """Our engine, or `generate` and a line that says why.

    Args:
        longest: tokens of the longest prompt and completion to come.
    """
    reason = refused(model, longest)
    if reason is None:
        return CacheEngine(model)
    say_once(model, f"answers of {type(model).__name__} are sampled by transformers' generate, as {reason}")
    return GenerateEngine(model)
