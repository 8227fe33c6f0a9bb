"""The loss of a model on fixed rows as a function of its trainable parameters: value, gradient, Hessian-vector product.

It goes through the forest engine, in packs, as training does. The products are exact: two backward passes (Pearlmutter 1994). For
that attention is PyTorch's own step-by-step SDPA, as fused attention cannot be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from align.forest import Forest, Tree, pack, plant
from align.trainers.objectives import Objective


class Surface:
    """The mean loss of `objective` over `trees` around the parameters that `model` has now.

    Args:
        model: enabled (`align.engine.enable_forest`); its dropout should be off. What requires no gradient stays fixed: with LoRA
            the surface is that of the adapter.
        max_tokens: tokens in one pass. A product holds about twice what a training step holds of a pass.
    """

    def __init__(self, model: nn.Module, objective: Objective, trees: Sequence[Tree], max_tokens: int) -> None:
        self.model, self.objective = model.eval(), objective
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.forests = [plant([trees[i] for i in indices]).to(device) for indices in pack(trees, max_tokens)]
        self.units = sum(objective.units(forest) for forest in self.forests)
        self.products = self.gradients = self.losses = 0

    @property
    def size(self) -> int:
        """How many parameters."""
        return sum(p.numel() for p in self.parameters)

    @property
    def like(self) -> Tensor:
        """A tensor of the shape, type and place of a flat vector (size,) that takes no memory."""
        return self.parameters[0].detach().new_zeros(()).expand(self.size)

    def split(self, vector: Tensor) -> list[Tensor]:
        """`vector` (size,) in the shapes of the parameters; views."""
        parts = vector.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss at the parameters now."""
        self.losses += 1
        return sum(self.objective(self.model, forest).loss.sum().item() for forest in self.forests) / self.units

    def gradient(self) -> Tensor:
        """Its gradient (size,), as training takes it."""
        self.gradients += 1
        total = self._zeros()
        for forest in self.forests:
            with self._gathered(total):
                self._mean(forest).backward(inputs=self.parameters)
        return total

    def squared_gradients(self) -> Tensor:
        """Mean over the forests of the squared gradient (size,), each of its own mean loss: what Adam's second moment would be."""
        total = self._zeros()
        for forest in self.forests:
            self.gradients += 1
            found = self._zeros()
            with self._gathered(found):
                self.objective(self.model, forest).loss.mean().backward(inputs=self.parameters)
            total.add_(found.square_(), alpha=1 / len(self.forests))
        return total

    def product(self, vector: Tensor) -> Tensor:
        """Hessian times `vector` (size,)."""
        self.products += 1
        total, parts = self._zeros(), self.split(vector)
        for forest in self.forests:
            with sdpa_kernel(SDPBackend.MATH), self._gathered(total):
                gradient = torch.autograd.grad(self._mean(forest), self.parameters, create_graph=True, allow_unused=True)
                told = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
                if told:
                    ways = [gradient[i] for i in told], [parts[i] for i in told]
                    torch.autograd.backward(*ways, inputs=self.parameters)
        return total

    def _mean(self, forest: Forest) -> Tensor:
        """The part of `forest` in the mean loss."""
        return self.objective(self.model, forest).loss.sum() / self.units

    def _zeros(self) -> Tensor:
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format)

    @contextmanager
    def _gathered(self, total: Tensor) -> Iterator[None]:
        """Within, gradients are added to `total` (size,) as they come, so that they are never there twice."""
        kept = [p.grad for p in self.parameters]
        try:
            for p, part in zip(self.parameters, self.split(total), strict=True):
                p.grad = part
            yield
        finally:
            for p, before in zip(self.parameters, kept, strict=True):
                p.grad = before

    @contextmanager
    def moved(self, direction: Tensor, length: float) -> Iterator[None]:
        """Within, the parameters are `length` x `direction` (size,) further; afterwards they are what they were, bit for bit."""
        kept = [p.detach().clone() for p in self.parameters]
        try:
            with torch.no_grad():
                for p, part in zip(self.parameters, self.split(direction), strict=True):
                    p.add_(part, alpha=length)
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(self.parameters, kept, strict=True):
                    p.copy_(before)
