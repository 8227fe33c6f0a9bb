"""Eigenvalues of a symmetric matrix that is known only by its products with vectors.

Nothing here knows of models: a matrix is a function from a vector (n,) to a vector (n,), and at most three vectors are held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]

GHOST = 1e-12
"""Part in the start vector below which a Ritz value may be a ghost."""


@dataclass(frozen=True)
class Tridiagonal:
    """What k steps of Lanczos make of a matrix and a start vector: T = QᵀHQ, with the start as first column of Q."""

    diagonal: Tensor  # (k,), fp64
    beside: Tensor  # (k - 1,), fp64
    residual: float
    """Length of what is left of the last new direction; 0 where the vectors span an invariant space."""

    def matrix(self) -> Tensor:
        return torch.diag(self.diagonal) + torch.diag(self.beside, 1) + torch.diag(self.beside, -1)

    def eigenvalues(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values (k,), rising; the weight of each in the start vector; and a bound on each one's error."""
        values, vectors = torch.linalg.eigh(self.matrix())
        return values, vectors[0] ** 2, self.residual * vectors[-1].abs()

    def genuine(self, tolerance: float = 1e-6) -> Tensor:
        """The Ritz values without ghosts, rising, each once.

        Without reorthogonalization, rounding lets converged eigenvalues come again. A simple Ritz value that is also one of T
        without its first row and column has no part in the start vector: it is such a ghost (Cullum and Willoughby 1985, 4.5).
        """
        values, weights, _ = self.eigenvalues()
        scale = values.abs().max().item() or 1.0
        inner = torch.linalg.eigvalsh(self.matrix()[1:, 1:])
        kept: list[tuple[float, float]] = []
        for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
            if kept and value - kept[-1][0] < tolerance * scale:
                kept[-1] = max(kept[-1], (value, weight), key=lambda one: one[1])
            elif weight > GHOST or not len(inner) or (inner - value).abs().min().item() > GHOST * scale:
                kept.append((value, weight))
        return torch.tensor([value for value, _ in kept], dtype=torch.double)


def lanczos(product: Product, start: Tensor, steps: int, on_step: Callable[[], object] = lambda: None) -> Tridiagonal:
    """`steps` steps of the three-term recurrence (Golub and Van Loan, Algorithm 10.1.1), one product each. No basis is kept.

    Args:
        start: (n,), of any length but 0; scaled to length 1 where it is.
        on_step: called after each product.
    """
    steps = min(steps, start.numel())
    before, current = torch.zeros_like(start), start.div_(start.norm())
    diagonal: list[float] = []
    beside: list[float] = []
    beta = 0.0
    for _ in range(steps):
        following = product(current)
        on_step()
        alpha = torch.dot(following, current)
        following.sub_(current, alpha=alpha.item()).sub_(before, alpha=beta)
        diagonal.append(alpha.item())
        beta = following.norm().item()
        if beta <= 1e-12 * max(map(abs, diagonal)) or len(diagonal) == steps:
            break
        beside.append(beta)
        before, current = current, following.div_(beta)
    return Tridiagonal(
        torch.tensor(diagonal, dtype=torch.double), torch.tensor(beside[: len(diagonal) - 1], dtype=torch.double), beta
    )


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs in the shape of `like`."""
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=like.dtype).mul_(2).sub_(1)


@dataclass(frozen=True)
class Estimate:
    """A mean over random probes, and its standard error."""

    mean: float
    error: float
    probes: int


def estimate(samples: list[float]) -> Estimate:
    """Mean and standard error of `samples`."""
    n, mean = len(samples), sum(samples) / len(samples)
    variance = sum((x - mean) ** 2 for x in samples) / (n - 1) if n > 1 else math.inf
    return Estimate(mean, math.sqrt(variance / n), n)


def hutchinson(
    product: Product, like: Tensor, generator: torch.Generator, *, probes: int, tolerance: float = 0.01, least: int = 8
) -> Estimate:
    """The trace as the mean of zᵀHz over random signs z (Hutchinson 1990), until its standard error is at most `tolerance` of it,
    or `probes` were made; one product each. With as many probes as rows they are the unit vectors, and the trace is exact.
    """
    if like.numel() <= probes:
        units = torch.eye(like.numel(), dtype=like.dtype, device=like.device)
        return Estimate(sum(product(unit)[i].item() for i, unit in enumerate(units)), 0.0, like.numel())
    samples: list[float] = []
    while len(samples) < probes:
        z = rademacher(like, generator)
        samples.append(torch.dot(z, product(z)).item())
        if len(samples) >= least and (now := estimate(samples)).error <= tolerance * abs(now.mean):
            break
    return estimate(samples)


@dataclass(frozen=True)
class Density:
    """The spectral density as points with weights, which sum to 1."""

    values: Tensor
    weights: Tensor

    def smoothed(self, grid: Tensor, width: float) -> Tensor:
        """Density on `grid`, each point a Gaussian of `width`."""
        bells = torch.exp(-(((grid[:, None] - self.values) / width) ** 2) / 2) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights


def density(runs: list[Tridiagonal]) -> Density:
    """Stochastic Lanczos quadrature (Golub and Meurant 1994; Ghorbani et al. 2019, arXiv:1901.10159, Alg. 1): the Ritz values of
    several random starts, weighted by their part in the start.
    """
    parts = [run.eigenvalues()[:2] for run in runs]
    values, weights = torch.cat([v for v, _ in parts]), torch.cat([w for _, w in parts]) / len(runs)
    order = values.argsort()
    return Density(values[order], weights[order])


def starts(like: Tensor, generator: torch.Generator, count: int) -> Iterator[Tensor]:
    """`count` random start vectors."""
    for _ in range(count):
        yield rademacher(like, generator)
