"""The processes that a stage runs in: shares of its work, sums over all of them. Alone, all of this does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor
from torch.distributed.tensor import DTensor

Item = TypeVar("Item")


def _state() -> PartialState:
    # Without a GPU accelerate takes a process for alone unless it is told that there is only a CPU. The time is the Trainer's: the
    # first to ask has the processes meet, and what one of them does alone (saving a model) may take longer than NCCL would wait.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(minutes=30))


def meet() -> None:
    """Wait for the other processes of the stage. From here on this one has a GPU of its own, where there are any: device ``cuda``
    would be the first GPU to every one of them.
    """
    wait()


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
    return items[border(len(items), number()) : border(len(items), number() + 1)]


def border(length: int, process: int) -> int:
    """Where the share of `process` in so many items begins."""
    return length * process // count()


def gathered(items: Sequence[Any]) -> list[Any]:
    """The items of all processes, in the order of the processes: the inverse of `share`."""
    return list(items) if alone() else gather_object(list(items))


def joined(columns: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    """`gathered` for each column; every process has the same ones."""
    return {name: gathered(column) for name, column in columns.items()}


def evened(items: Sequence[Item], spare: Callable[[], Item], *, waiting: bool) -> list[tuple[Item, bool]]:
    """`items`, each to be counted, and behind them spare ones, not to be counted, until every process has as many.

    Args:
        waiting: the processes wait for each other in each; else there are no spare ones.
    """
    counted = [(item, True) for item in items]
    lacking = max(gathered([len(items)])) - len(items) if waiting and not alone() else 0
    return [*counted, *((spare(), False) for _ in range(lacking))]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Each process holds the gradient of its part of a sum; afterwards each holds that of the whole sum."""
    if alone():
        return
    parameters = [p for p in parameters if not isinstance(p, DTensor)]  # the gradient of a shard is that of the whole sum already
    # An expert that no token of this process came to has no gradient here, and may have one elsewhere.
    held = total(torch.tensor([float(p.grad is not None) for p in parameters], device=_state().device))
    for parameter, count in zip(parameters, held.tolist(), strict=True):
        if count:
            parameter.grad = total(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)


def means(metrics: Mapping[str, float]) -> dict[str, float]:
    """The mean of each metric over processes; every process has the same ones."""
    return {name: value / count() for name, value in zip(metrics, totals(list(metrics.values())), strict=True)}
