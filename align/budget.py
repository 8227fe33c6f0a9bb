"""How many tokens one pass over a forest takes: a number, or as many as memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from align.errors import AlignError, first_line
from align.forest import Forest, Tree, pack, plant
from align.progress import say

MaxTokens = int | Literal["auto"]

START = 8192
"""Tokens that `auto` begins with; on a CPU, whose memory a program cannot ask for, it stays there."""
SHARE = 0.85
"""Share of the accelerator's memory that `auto` fills. The rest is for fragments, and for what does not grow linearly."""

WITHOUT_GRADIENTS = 4
"""On a GPU, so many times more tokens go through a pass without gradients: it keeps no activations."""

Packed = list[tuple[list[int], Forest]]
"""Forests, each with the indices of its trees."""
Result = TypeVar("Result")


class Budget:
    """The most tokens of a forest.

    With `auto` it grows on CUDA, at most twofold from one piece of work to the next, to what the work's peak of memory, taken as
    linear in tokens, leaves room for. Any budget is halved, for good, when memory runs out.
    """

    def __init__(self, max_tokens: MaxTokens) -> None:
        self.tokens = START if max_tokens == "auto" else max_tokens
        self.grows = max_tokens == "auto" and torch.cuda.is_available()

    def fit(self, trees: Sequence[Tree], work: Callable[[Packed], Result], *, alone: bool = True, telling: bool = True) -> Result:
        """What `work` makes of `trees`, packed into forests.

        `work` must start from nothing, as it is done again with smaller forests when memory runs out.

        Args:
            alone: no other process waits for this one in `work`.
            telling: the memory that it takes from here on is what such forests take.

        Raises:
            AlignError: a tree does not fit by itself; or memory ran out and the process is not alone.
        """
        while True:
            packed = [(indices, plant([trees[i] for i in indices])) for indices in pack(trees, self.tokens)]
            before = self._memory_before()
            try:
                result = work(packed)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            else:
                if self.grows and telling:
                    free, _ = torch.cuda.mem_get_info()
                    limit = SHARE * (free + torch.cuda.memory_reserved())
                    self.grow(_largest(packed), before, torch.cuda.max_memory_allocated(), limit)
                return result
            # Out of `except` the traceback is gone, and with it the tensors that its frames held.
            clear_device_cache()
            self._shrink(packed, reason, alone)

    def _memory_before(self) -> int:
        if not self.grows:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def grow(self, tokens: int, before: float, peak: float, limit: float) -> None:
        """Learn from work on forests of at most `tokens` tokens, that had `before` bytes in use, needed `peak` and may use `limit`.

        What does not depend on tokens (gradients) makes the estimate too low, less so the larger the forests, so it is approached
        from below. Forests that leave most of the budget empty tell nothing.
        """
        if 2 * tokens >= self.tokens:
            fits = int(tokens * (limit - before) / max(peak - before, 1))
            self.tokens = max(min(2 * self.tokens, fits), 1)

    def _shrink(self, packed: Packed, reason: str, alone: bool) -> None:
        largest = _largest(packed)
        if not alone:
            raise AlignError(
                f"out of memory with forests of up to {largest:,} tokens ({reason}). Other processes wait for this one, so the "
                f"step cannot be done again: set max_tokens_per_micro_batch to {max(largest // 2, 1):,} or less"
            )
        if all(len(indices) == 1 for indices, _ in packed):
            raise AlignError(
                f"out of memory on a row of {largest:,} tokens by itself ({reason}). Lower max_length, set gradient_checkpointing, "
                "bf16 or use_peft, or take a smaller model"
            )
        self.tokens = max(forest.tokens for indices, forest in packed if len(indices) > 1) // 2
        self.grows = False
        say(f"out of memory with forests of up to {largest:,} tokens; doing it again, and going on, with {self.tokens:,}")


def measuring(max_tokens: MaxTokens) -> Budget:
    """The budget of passes without gradients, where those with gradients take `max_tokens`."""
    more = WITHOUT_GRADIENTS if torch.cuda.is_available() else 1
    return Budget(max_tokens if max_tokens == "auto" else more * max_tokens)


def _largest(packed: Packed) -> int:
    return max((forest.tokens for _, forest in packed), default=0)


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether `error` says that the accelerator or the CPU has no memory left."""
    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)
