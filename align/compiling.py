"""What torch's compiler makes of parts of the work: many small operations become a few kernels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from align.progress import say

P = ParamSpec("P")
R = TypeVar("R")

_refused: list[str] = []
"""Why nothing compiles here."""


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """`function` of tensors as few kernels where the first of them is on a CUDA device: what it does there is to read and write
    memory. As it is elsewhere, and where nothing compiles, which is said once: it takes Triton and a C compiler.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        if not first.is_cuda or _refused or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        return _compiled(function, *args, **kwargs)

    return call


def _compiled(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    for x in args:
        if isinstance(x, Tensor):
            torch._dynamo.maybe_mark_dynamic(x, 0)  # rows differ from call to call
    try:
        return _compile(function)(*args, **kwargs)
    except TorchDynamoException as error:
        _refused.append(complaint(error))
        say(f"small operations run one by one on this GPU, which is slower: torch.compile gave {_refused[0]}")
        return function(*args, **kwargs)


def complaint(error: BaseException) -> str:
    """What torch.compile has met: its own first line may name no more than the backend that raised it."""
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return more[0] if more and first.endswith("raised:") else first


@cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Within, what is compiled runs as it is: what calls it in another way than it was compiled for would compile it anew."""
    with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
        yield
