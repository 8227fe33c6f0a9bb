"""The loss of a model on fixed rows as a function of its trainable parameters: value, gradient, Hessian-vector product.

It goes through the forest engine, in packs, as training does. The products are exact: two backward passes (Pearlmutter 1994). For
that attention is PyTorch's own step-by-step SDPA and the head is `log_softmax`, as neither fused attention nor the chunked head
can be differentiated twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from align.forest import Tree, pack, plant
from align.heads import twice_differentiable
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
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        device = self.parameters[0].device
        self.forests = [plant([trees[i] for i in indices]).to(device) for indices in pack(trees, max_tokens)]
        self.units = sum(objective.units(forest) for forest in self.forests)
        self.products = self.gradients = self.losses = 0

    @property
    def size(self) -> int:
        """How many parameters."""
        return sum(p.numel() for p in self.parameters)

    def flat(self) -> Tensor:
        """The parameters now, (size,)."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

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
        total = torch.zeros(self.size, device=self.parameters[0].device, dtype=self.parameters[0].dtype)
        for forest in self.forests:
            loss = self.objective(self.model, forest).loss.sum() / self.units
            self._add(total, torch.autograd.grad(loss, self.parameters, allow_unused=True))
        return total

    def squared_gradients(self) -> Tensor:
        """Mean over the forests of the squared gradient (size,), each of its own mean loss: what Adam's second moment would be."""
        total = torch.zeros(self.size, device=self.parameters[0].device, dtype=self.parameters[0].dtype)
        for forest in self.forests:
            self.gradients += 1
            loss = self.objective(self.model, forest).loss.mean()
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            self._add(total, [None if g is None else g.square() / len(self.forests) for g in found])
        return total

    def product(self, vector: Tensor) -> Tensor:
        """Hessian times `vector` (size,)."""
        self.products += 1
        total = torch.zeros_like(vector)
        parts = self.split(vector)
        for forest in self.forests:
            with _differentiable():
                loss = self.objective(self.model, forest).loss.sum() / self.units
                gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
                along = [(g * v).sum() for g, v in zip(gradient, parts, strict=True) if g is not None and g.requires_grad]
                if along:
                    second = torch.autograd.grad(torch.stack(along).sum(), self.parameters, allow_unused=True)
                    self._add(total, second)
        return total

    def _add(self, total: Tensor, parts: Sequence[Tensor | None]) -> None:
        for place, part in zip(self.split(total), parts, strict=True):
            if part is not None:
                place.add_(part.detach())

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


@contextmanager
def _differentiable() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), twice_differentiable():
        yield
