"""How much arithmetic a step needs, and how fast this machine multiplies matrices of the model's own shapes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from align.forest import Tree, cut
from benchmarks.training import synchronize
from benchmarks.work import Job, build, tokens_of

Shape = tuple[int, int]
"""Inputs and outputs of a linear layer."""


@dataclass(frozen=True)
class Arithmetic:
    """The matrices of a model."""

    linears: Counter[Shape]
    """Linear layers of the body and how many there are of each shape."""
    last_block: Counter[Shape]
    """Those of them in the last layer's feed-forward block."""
    head: Shape
    layers: int
    attention_width: int
    """Heads x head dimension."""
    head_at_ends: bool
    """Whether the head is read at the ends of sequences (a reward model) instead of at every target."""

    @classmethod
    def of(cls, job: Job) -> Arithmetic:
        model: Any = build(replace(job, device="meta"))
        head = model.score if job.method == "reward" else model.get_output_embeddings()
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
        heads = model.config.num_attention_heads
        return cls(
            _shapes(linears),
            _shapes(module for module in model.model.layers[-1].mlp.modules() if isinstance(module, nn.Linear)),
            (head.in_features, head.out_features),
            model.config.num_hidden_layers,
            heads * (getattr(model.config, "head_dim", None) or model.config.hidden_size // heads),
            job.method == "reward",
        )

    def head_rows(self, tree: Tree) -> int:
        """At how many positions the head is needed."""
        return len(tree.branches) if self.head_at_ends else tree.targets

    def read(self, tree: Tree) -> int:
        """How many tokens' answers are needed: the first of each branch comes from the prompt's last."""
        if self.head_at_ends:
            return len(tree.branches)
        return tree.targets - max(len(tree.branches) - 1, 0) * bool(tree.prompt)

    def forward(self, tree: Tree) -> float:
        """Operations of a forward pass: each unique token once, attention over the keys that are seen, the last layer's
        feed-forward block and the head where they are read.

        A multiplication with its addition counts as two.
        """
        last = _size(self.last_block)
        body = tree.tokens * (_size(self.linears) - last) + self.read(tree) * last
        # Scores and the weighted sum of values: two products per query, key and channel.
        attention = 2 * keys_seen(tree) * self.attention_width * self.layers
        return 2.0 * (body + attention + self.head_rows(tree) * self.head[0] * self.head[1])

    def training(self, trees: Iterable[Tree], *, reference: bool) -> float:
        """Forward and backward (twice the forward), and one forward more for a reference."""
        return (4 if reference else 3) * sum(map(self.forward, trees))


def _shapes(layers: Iterable[Any]) -> Counter[Shape]:
    return Counter((layer.in_features, layer.out_features) for layer in layers)


def _size(shapes: Counter[Shape]) -> int:
    return sum(n * inputs * outputs for (inputs, outputs), n in shapes.items())


def keys_seen(tree: Tree) -> int:
    """Pairs of a query and a key that it attends to, over the whole tree."""
    prompt = len(tree.prompt)
    return _triangle(prompt) + sum(prompt * len(branch) + _triangle(len(branch)) for branch in tree.branches)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def typical_forest(batches: Sequence[Sequence[Tree]], max_tokens: int) -> list[Tree]:
    """Of the packs that `batches` are cut into, the one of median size."""
    packs = [pack for batch in batches for pack in cut(batch, max_tokens)]
    return sorted(packs, key=tokens_of)[len(packs) // 2]


def gemm_rate(arithmetic: Arithmetic, forest: Sequence[Tree], *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> float:
    """Operations per second over the products that a training step on `forest` is made of: for every layer the output, the
    gradient of the input and the gradient of the weight, each weighted by its share of the arithmetic.
    """
    tokens, head_rows = tokens_of(forest), sum(map(arithmetic.head_rows, forest))
    operations = seconds = 0.0
    for rows, shape, count in [*((tokens, *item) for item in arithmetic.linears.items()), (head_rows, arithmetic.head, 1)]:
        operations += count * 6 * rows * shape[0] * shape[1]
        seconds += count * sum(seconds_of(product, device) for product in _products(rows, shape, dtype, device))
    return operations / seconds


def _products(rows: int, shape: Shape, dtype: torch.dtype, device: str) -> list[Callable[[], Tensor]]:
    """Output, gradient of the input, gradient of the weight. Into tensors that are there already: the ceiling allocates nothing."""
    inputs, outputs = shape
    x, weight, y = (torch.randn(size, dtype=dtype, device=device) for size in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    out = torch.empty_like(y)
    return [
        lambda: torch.mm(x, weight.T, out=out),
        lambda: torch.mm(y, weight, out=grad_x),
        lambda: torch.mm(y.T, x, out=grad_weight),
    ]


def seconds_of(product: Callable[[], Tensor], device: str, at_least: float = 0.05) -> float:
    """Mean time of a call, over as many as fill `at_least` seconds; the first one warms up."""
    product()
    synchronize(device)
    calls, start = 0, time.perf_counter()
    while True:
        for _ in range(4):
            product()
        synchronize(device)
        calls += 4
        if (elapsed := time.perf_counter() - start) >= at_least:
            return elapsed / calls
