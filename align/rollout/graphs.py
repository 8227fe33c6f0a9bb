"""Decoding passes as CUDA graphs: a small model's pass is launched in one call instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from align.errors import first_line
from align.progress import say
from align.rollout.cache import SlotCache, Spans

WIDTHS = 512
"""Graphs are made for widths that are a power of two times this."""

SMALLEST = 64
"""Fewest rows that a graph is made for, where there are so many slots: to make one takes longer than it would save on fewer."""


class Graphs:
    """Captures a pass once for each size, and replays it.

    Args:
        cache: a graph reads its buffers where they were.
        state: what a pass changes for the next one. (Anything else that it writes, it writes anew.)
    """

    def __init__(self, cache: SlotCache, state: Sequence[Tensor]) -> None:
        self.cache, self.state = cache, state
        self.pool = torch.cuda.graph_pool_handle()
        self.made: dict[tuple[int, int, int], torch.cuda.CUDAGraph] = {}
        self.refused = False

    def run(self, step: Callable[[Spans], None], rows: int, width: int) -> None:
        """`step` over the first `rows` rows, `width` columns of each, and a few more of both."""
        if self.refused:
            return step([(0, rows, width)])
        rows, width = sizes(rows, width, self.cache.slots)
        self.cache.reach(width)
        key = (rows, width, self.cache.generation)
        if key not in self.made:
            try:
                self.made[key] = self._capture(step, rows, width)
            except RuntimeError as error:
                self.refused = True
                say(f"rollouts run without CUDA graphs: {first_line(error)}")
                return step([(0, rows, width)])
        return self.made[key].replay()

    def _capture(self, step: Callable[[Spans], None], rows: int, width: int) -> torch.cuda.CUDAGraph:
        before = [tensor.clone() for tensor in self.state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # libraries set themselves up in a first pass, which cannot be captured
                step([(0, rows, width)])
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                step([(0, rows, width)])
        finally:
            for tensor, value in zip(self.state, before, strict=True):
                tensor.copy_(value)
        return graph


def sizes(rows: int, width: int, slots: int) -> tuple[int, int]:
    """The sizes of the graph that serves `rows` and `width`: all slots or a power of two of rows, a power of two times `WIDTHS`."""
    larger = SMALLEST
    while larger < rows:
        larger *= 2
    columns = WIDTHS
    while columns < width:
        columns *= 2
    return min(larger, slots), columns
