"""Our engine: continuous batching around a model's own forward, with a key-value cache of slots.

Each row of the batch is a completion in progress, and a pass brings a new token for every row. A prompt comes in with the pass of
its row's first token: all but its last token lie in front of the rows' tokens, as a forest, so without padding, and once for all
rows that share it. A row that has ended gives its slot to the next prompt, so the batch stays full while prompts wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from align.compiling import uncompiled
from align.engine import base_model
from align.forest import Tree, plant
from align.rollout.cache import ROLLOUT, Pass, Prompts, SlotCache, Spans
from align.rollout.graphs import Graphs
from align.rollout.sampling import Completion, Sampling, StopTable, StopText, chances, draw

FILL_TOKENS, FILL_TOKENS_ON_GPU = 4096, 16384
"""Tokens of prompts in one pass, at most."""

FREE, FREE_ON_GPU = 8, 4
"""Prompts enter once one in so many slots is free: a pass that brings them in is longer, and on a GPU no graph."""

ROUND = 16
"""Attention looks at a multiple of so many columns."""

EXPECTED = 64
"""Tokens of a completion that the cache has room for at once."""

SPAN = 4
"""Rows that attention takes together at least, on a CPU: a call costs about as much as reading their padding."""


class CacheEngine:
    """Completes prompts with `model`, whose attention goes through transformers' interface (see `align.rollout.check`)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def complete(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Completion]:
        """See `align.rollout.complete`."""
        with serving(self.model) as base:
            batch = Batch(base, prompts, sampling, stop_ids, generator)
            while batch.waiting or batch.live:
                batch.admit()
                batch.step()
                ended = batch.retire()
                if ended and progress is not None:
                    progress(ended)
            return [batch.completions[i] for i in range(len(prompts))]


@contextmanager
def serving(model: nn.Module) -> Iterator[Any]:
    """The transformers model inside `model`, in evaluation mode and with the engine's attention."""
    base, was_training = base_model(model), model.training
    before = base.config._attn_implementation
    model.eval()
    base.set_attn_implementation(ROLLOUT)
    try:
        with uncompiled():
            yield base
    finally:
        base.set_attn_implementation(before)
        model.train(was_training)


class Batch:
    """The rows in progress, and the prompts that wait. Live rows are the first ones: the last takes the place of one that ended.

    What a decoding pass reads and writes are tensors of one entry a slot that stay where they are, for CUDA graphs.
    """

    def __init__(
        self,
        base: Any,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        generator: torch.Generator | None,
    ) -> None:
        self.base, self.prompts, self.sampling = base, prompts, sampling
        self.device = next(base.parameters()).device
        first: dict[tuple[int, ...], int] = {}
        self.same = [first.setdefault(tuple(prompt), i) for i, prompt in enumerate(prompts)]
        # The longest are taken first, from the end; those that are the same follow each other.
        self.waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), -self.same[i], -i))
        self.chances = chances(len(prompts), sampling, generator).to(self.device)
        self.stops, self.stop_text = StopTable(stop_ids, self.device), StopText(sampling)
        self.completions: dict[int, Completion] = {}

        self.slots = min(sampling.batch_size, len(prompts))
        self.live: list[int] = []
        """Which prompt each row answers."""
        self.entered: list[int] = []
        """The number of decoding passes before each row's first."""
        self.steps = 0
        longest = max(map(len, prompts), default=1)
        most = _rounded(longest + sampling.max_new_tokens)
        self.cache = SlotCache(self.slots, min(most, _rounded(longest + EXPECTED)), most)
        integers = {"dtype": torch.long, "device": self.device}
        self.arriving: Prompts | None = None
        """Prompts that the next pass brings in."""
        self.token = torch.zeros(self.slots, **integers)
        self.position = torch.zeros(self.slots, **integers)
        self.count = torch.zeros(self.slots, **integers)
        self.alive = torch.zeros(self.slots, **integers)
        self.ended = torch.zeros(self.slots, dtype=torch.bool, device=self.device)
        self.chance = torch.zeros(self.slots, sampling.max_new_tokens, device=self.device)
        self.said = torch.zeros(self.slots, sampling.max_new_tokens, **integers)
        self.logps = torch.zeros(self.slots, sampling.max_new_tokens, device=self.device)
        self.rows = torch.arange(self.slots, device=self.device)
        self.graphs = Graphs(self.cache, (self.token, self.position, self.count)) if self.device.type == "cuda" else None

    # -- prompts in --------------------------------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Fill free slots, once enough of them are free."""
        free = self.slots - len(self.live)
        if not self.waiting or (self.live and free < max(1, self.slots // (FREE if self.graphs is None else FREE_ON_GPU))):
            return
        start, entering = len(self.live), self._take(free)
        self._fill(entering, start)
        prompts = [self.prompts[i] for i in entering]
        rows = slice(start, start + len(entering))
        self.token[rows] = torch.tensor([prompt[-1] for prompt in prompts], device=self.device)
        self.position[rows] = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        self.chance[rows] = self.chances[torch.tensor(entering, device=self.device)]
        self.count[rows] = 0
        self.alive[rows] = 1
        self.live += entering
        self.entered += [self.steps] * len(entering)

    def _take(self, count: int) -> list[int]:
        """The next prompts, `count` at most and as many as one pass can bring in."""
        taken: list[int] = []
        known, tokens = {self.same[i] for i in self.live}, 0
        most = FILL_TOKENS if self.graphs is None else FILL_TOKENS_ON_GPU
        while self.waiting and len(taken) < count:
            i = self.waiting[-1]
            if self.same[i] not in known:
                known.add(self.same[i])
                tokens += len(self.prompts[i])
                if taken and tokens > most:
                    break
            taken.append(self.waiting.pop())
        return taken

    def _fill(self, entering: Sequence[int], start: int) -> None:
        """Have the prompts, all but the last token, brought into the rows from `start`."""
        self.cache.reach(max(len(self.prompts[i]) for i in entering))
        known = {self.same[i]: row for row, i in enumerate(self.live)}
        rows_of: dict[int, list[int]] = {}
        for row, i in enumerate(entering, start):
            if len(self.prompts[i]) > 1:
                rows_of.setdefault(self.same[i], []).append(row)
        for same in rows_of.keys() & known.keys():
            self.cache.copy([(known[same], row) for row in rows_of.pop(same)], len(self.prompts[same]) - 1)
        if rows_of:
            self.arriving = self._prompts(rows_of)

    def _prompts(self, rows_of: dict[int, list[int]]) -> Prompts:
        """The prompts by number, and the rows that each goes to."""
        forest = plant([Tree(self.prompts[same][:-1]) for same in rows_of]).to(self.device)
        # One entry for each token and each row that it goes to.
        paths = zip(rows_of.values(), forest.paths, strict=True)
        places = [(row, start, length) for rows, (start, length, _, _) in paths for row in rows]
        lengths = torch.tensor([length for _, _, length in places])
        rows = torch.tensor([row for row, _, _ in places]).repeat_interleave(lengths)
        starts = torch.tensor([start for _, start, _ in places]).repeat_interleave(lengths)
        columns = torch.cat([torch.arange(length) for _, _, length in places])
        return Prompts(forest, *(x.to(self.device) for x in (rows, columns, starts + columns)))

    # -- one token for every row -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Draw a token for every live row."""
        lengths = self._lengths()
        self.cache.reach(_rounded(max(lengths)))
        if self.graphs is None:
            self._pass(spans_of(lengths))
        elif self.arriving is None:
            self.graphs.run(self._pass, len(lengths), max(lengths))
        else:
            self._pass([(0, len(lengths), _rounded(max(lengths)))])
        self.steps += 1

    def _pass(self, spans: Spans) -> None:
        rows, logits = spans[-1][1], self.logits(spans)
        count = self.count[:rows, None]
        tokens, logps = draw(logits, self.sampling, self.chance[:rows].gather(1, count).squeeze(1))
        self.said[:rows].scatter_(1, count, tokens[:, None])
        self.logps[:rows].scatter_(1, count, logps[:, None])
        self.ended[:rows] = self.stops.of(tokens, logits.shape[1])
        self.token[:rows] = tokens
        self.position[:rows] += self.alive[:rows]
        self.count[:rows] += self.alive[:rows]

    def logits(self, spans: Spans) -> Tensor:
        """What the model says of the next token of the rows in `spans` (rows, vocabulary), in fp32."""
        rows = spans[-1][1]
        self.cache.now = now = Pass(self.token[:rows], self.rows[:rows], self.position[:rows], spans, self.arriving)
        self.arriving = None
        output = self.base(
            input_ids=now.input_ids[None],
            position_ids=now.position_ids[None],
            # A four-dimensional mask is taken as ready-made by transformers, which would otherwise build one.
            attention_mask=torch.empty(1, 1, 0, 0, device=self.device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=rows,
            rollout=now,
        )
        return output.logits[0, -rows:].float()

    # -- completions out ---------------------------------------------------------------------------------------------------------

    def retire(self) -> int:
        """Take out the rows that have ended; returns how many."""
        stopped = self.ended[: len(self.live)].tolist()
        if self.stop_text.strings:
            said = self.said[: len(self.live)].tolist()
            for row, before in enumerate(self.entered):
                stopped[row] = stopped[row] or self.stop_text.ends(said[row][: self.steps - before])
        limit = self.steps - self.sampling.max_new_tokens
        done = [row for row, before in enumerate(self.entered) if stopped[row] or before <= limit]
        if not done:
            return 0
        said, logps = self.said[done].tolist(), self.logps[done].tolist()
        for row, tokens, values in zip(done, said, logps, strict=True):
            count = self.steps - self.entered[row]
            self.completions[self.live[row]] = Completion(tokens[:count], stopped[row], values[:count])
        self._leave(done)
        return len(done)

    def _leave(self, done: Sequence[int]) -> None:
        """Give up rows; of those that stay, some take their places."""
        lengths, left = self._lengths(), len(self.live) - len(done)
        order = closed_up(lengths, done, SPAN if self.graphs is None else self.slots)
        moves = [(row, place) for place, row in enumerate(order) if row != place]
        if moves:
            self.cache.copy(moves, max(lengths[row] for row, _ in moves) - 1)  # the newest token is not stored yet
            rows = torch.tensor(order, device=self.device)
            for state in (self.token, self.position, self.count, self.chance, self.said, self.logps):
                state[:left] = state[rows]
        # Nobody's rows: a CUDA graph that runs over them stays where it is.
        for state in (self.alive, self.position, self.count):
            state[left : len(self.live)] = 0
        self.live = [self.live[row] for row in order]
        self.entered = [self.entered[row] for row in order]

    def _lengths(self) -> list[int]:
        """Of each row in tokens, the one that the next pass is given included."""
        return [len(self.prompts[i]) + self.steps - before for i, before in zip(self.live, self.entered, strict=True)]


def closed_up(lengths: Sequence[int], done: Sequence[int], span: int) -> list[int]:
    """Which row of these lengths stands at each place, once those `done` (ascending) have left: in a row's place the longest of
    the next `span` rows, in its place the longest of those after, and at last the last one. So rows that came in longest first
    stay so but for the order within a span, and few of them move.
    """
    order = list(range(len(lengths)))
    for place in reversed(done):
        last = len(order) - 1
        while place < last:
            start = (place // span + 1) * span
            following = order[start : start + span]
            source = start + max(range(len(following)), key=lambda i: lengths[following[i]]) if following else last
            order[place], place = order[source], source
        order.pop()
    return order


def spans_of(lengths: Sequence[int]) -> Spans:
    """Rows of these lengths in spans: `SPAN` rows each, and neighbours that need the same columns together."""
    spans: list[tuple[int, int, int]] = []
    for start in range(0, len(lengths), SPAN):
        end = min(start + SPAN, len(lengths))
        width = _rounded(max(lengths[start:end]))
        if spans and spans[-1][2] == width:
            start = spans.pop()[0]
        spans.append((start, end, width))
    return spans


def _rounded(columns: int) -> int:
    return -(-columns // ROUND) * ROUND
