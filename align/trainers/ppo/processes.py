"""One batch on several processes: each samples its share, and sums are over all of them. Alone, all of this does nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor


def count() -> int:
    """How many processes there are."""
    return PartialState().num_processes


def alone() -> bool:
    """Whether this is the only one."""
    return count() == 1


def number() -> int:
    """Which of them this is."""
    return PartialState().process_index


def wait() -> None:
    """Until every process is here."""
    PartialState().wait_for_everyone()


def total(part: Tensor) -> Tensor:
    """The sum of `part` over processes."""
    return part if alone() else reduce(part, "sum")


def all_of(here: bool) -> bool:
    """Whether it is so on every process."""
    return here if alone() else all(gather_object([here]))


def share(items: Sequence[Any]) -> Sequence[Any]:
    """This process' run of `items`, as long as everybody's."""
    size = len(items) // count()
    return items[number() * size : (number() + 1) * size]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Each process holds the gradient of its part of a sum; afterwards each holds that of the whole sum."""
    if not alone():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = total(parameter.grad)


def means(metrics: dict[str, float]) -> dict[str, float]:
    """The mean of each metric over the processes that have it."""
    if alone():
        return metrics
    everywhere = gather_object([metrics])
    names = {name: None for part in everywhere for name in part}
    columns = {name: [part[name] for part in everywhere if name in part] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}
