"""One batch on several processes: each samples its share, and sums are over all of them. Alone, all of this does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn

from align import rollout
from align.rollout import Completion, Sampling
from align.rollout.sampling import chances


def _state() -> PartialState:
    # Without a GPU accelerate takes a process for alone unless it is told that there is only a CPU.
    return PartialState(cpu=not torch.cuda.is_available())


def count() -> int:
    """How many processes there are."""
    return _state().num_processes


def alone() -> bool:
    """Whether this is the only one."""
    return count() == 1


def number() -> int:
    """Which of them this is."""
    return _state().process_index


def wait() -> None:
    """Until every process is here."""
    _state().wait_for_everyone()


def total(part: Tensor) -> Tensor:
    """The sum of `part` over processes."""
    return part if alone() else reduce(part, "sum")


def totals(parts: Sequence[float]) -> list[float]:
    """The sum of each number over processes, in double precision."""
    return list(parts) if alone() else [sum(column) for column in zip(*gather_object([list(parts)]), strict=True)]


def first(here: Any) -> Any:
    """What it is on the first process."""
    return here if alone() else gather_object([here])[0]


def all_of(here: bool) -> bool:
    """Whether it is so on every process."""
    return here if alone() else all(gather_object([here]))


def any_of(here: bool) -> bool:
    """Whether it is so on some process."""
    return not all_of(not here)


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This process' run of `items`; together those of all are the whole, and none is longer than another by more than one."""
    return items[_border(len(items), number()) : _border(len(items), number() + 1)]


def _border(length: int, process: int) -> int:
    return length * process // count()


def gathered(items: Sequence[Any]) -> list[Any]:
    """The items of all processes, in the order of the processes: the inverse of `share`."""
    return list(items) if alone() else gather_object(list(items))


def joined(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """`gathered` for each column; every process has the same ones."""
    return {name: gathered(column) for name, column in columns.items()}


def complete(
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
    mine = share(prompts)
    before = _border(len(prompts), number())
    chances(before, sampling, generator)
    completions = rollout.complete(model, mine, sampling, stop_ids, generator)
    chances(len(prompts) - before - len(mine), sampling, generator)
    return completions


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Each process holds the gradient of its part of a sum; afterwards each holds that of the whole sum."""
    if alone():
        return
    parameters = list(parameters)
    # An expert that no token of this process came to has no gradient here, and may have one elsewhere.
    held = total(torch.tensor([float(p.grad is not None) for p in parameters], device=_state().device))
    for parameter, count in zip(parameters, held.tolist(), strict=True):
        if count:
            parameter.grad = total(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def means(metrics: Mapping[str, float]) -> dict[str, float]:
    """The mean of each metric over processes; every process has the same ones."""
    return {name: value / count() for name, value in zip(metrics, totals(list(metrics.values())), strict=True)}
