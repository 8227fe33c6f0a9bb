"""The loss along straight lines through the parameters, and how far it rises nearby."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from align.diagnostics.curvature.surface import Surface


def filter_normalized(surface: Surface, generator: torch.Generator) -> Tensor:
    """A random direction (size,) in which every row of every matrix is as long as the weights' own row (Li et al. 2018,
    arXiv:1712.09913, Sect. 4). Vectors (norms, biases) stay where they are, as there.
    """
    direction = torch.randn(
        surface.size, generator=generator, device=surface.parameters[0].device, dtype=surface.parameters[0].dtype
    )
    for part, weight in zip(surface.split(direction), surface.parameters, strict=True):
        if weight.dim() < 2:
            part.zero_()
        else:
            rows, own = part.flatten(1), weight.detach().flatten(1)
            rows.mul_(own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return direction


def along(surface: Surface, direction: Tensor, lengths: Sequence[float]) -> list[float]:
    """The loss at each of `lengths` x `direction` from the parameters."""
    found = []
    for length in lengths:
        with surface.moved(direction, length):
            found.append(surface.loss())
    return found


def sharpness(surface: Surface, gradient: Tensor, rho: float) -> float:
    """How much the loss rises a step of length `rho` up the gradient (Foret et al. 2021, arXiv:2010.01412, Eq. 2)."""
    (here, there) = along(surface, gradient / gradient.norm().clamp(min=1e-12), [0.0, rho])
    return there - here
