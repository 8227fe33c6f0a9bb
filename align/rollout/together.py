"""Prompts that the processes of a stage complete together, each its share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from align import processes, rollout
from align.rollout import Completion, Sampling
from align.rollout.sampling import chances


def complete_together(
    model: nn.Module | rollout.Engine,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    generator: torch.Generator,
) -> list[Completion]:
    """This process' `share` of `prompts`, completed.

    The draws of chance of the other processes are passed over, so that they are the same for any number of them.

    Args:
        generator: in the same state on every process, before and after.
    """
    mine = processes.share(prompts)
    before = processes.border(len(prompts), processes.number())
    chances(before, sampling, generator)
    completions = rollout.complete(model, mine, sampling, stop_ids, generator)
    chances(len(prompts) - before - len(mine), sampling, generator)
    return completions
