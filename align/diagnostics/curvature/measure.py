"""Everything that is measured of a loss surface, as plain numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from align.diagnostics.curvature import landscape, spectrum
from align.diagnostics.curvature.surface import Surface
from align.diagnostics.supervised import ADAM_EDGE
from align.progress import bar


@dataclass(frozen=True)
class Settings:
    """How much work to put in. One Hessian-vector product costs about three to five gradients."""

    steps: int = 20
    """Lanczos steps for each start."""
    starts: int = 2
    """Random starts for the density."""
    probes: int = 32
    """Most probes for the trace."""
    points: int = 11
    """Places along each line."""
    span: float = 0.5
    """How far the lines go: a random direction of length 1 is as long as the weights."""
    rho: float = 0.05
    """Radius of the sharpness (arXiv:2010.01412)."""
    seed: int = 0


def measure(surface: Surface, settings: Settings, label: str = "curvature") -> dict[str, Any]:
    """Eigenvalues, trace, density, lines and sharpness of `surface`, and what they cost."""
    begin = time.monotonic()
    like = surface.like
    generator = torch.Generator(like.device).manual_seed(settings.seed)
    loss = surface.loss()
    start = time.monotonic()
    gradient = surface.gradient()
    step = time.monotonic() - start
    downhill = {
        "gradient_norm": gradient.norm().item(),
        "lines": lines(surface, gradient, generator, settings),
        "sharpness": {"rho": settings.rho, "rise": landscape.sharpness(surface, gradient, settings.rho)},
    }
    del gradient  # as long as the weights
    total = (settings.starts + 1) * settings.steps + settings.probes
    with bar(label, total, "product") as progress:
        runs = [
            spectrum.lanczos(surface.product, first, settings.steps, progress.update)
            for first in spectrum.starts(like, generator, settings.starts)
        ]
        values = torch.cat([run.genuine() for run in runs]).sort().values
        trace = spectrum.hutchinson(_counted(surface.product, progress.update), like, generator, probes=settings.probes)
        adam = spectrum.lanczos(preconditioned(surface), spectrum.rademacher(like, generator), settings.steps, progress.update)
    weights = spectrum.density(runs)
    top, adam_top = values[-1].item(), adam.genuine()[-1].item()
    return {
        "parameters": surface.size,
        "tokens": sum(forest.tokens for forest in surface.forests),
        "loss": loss,
        **downhill,
        "top_eigenvalue": top,
        "top_eigenvalue_error": max(run.eigenvalues()[2][-1].item() for run in runs),
        "lowest_eigenvalue": values[0].item(),
        "top_eigenvalues": _distinct(values)[:5],
        "adam_top_eigenvalue": adam_top,
        "largest_learning_rate": {"gradient_descent": _edge(2.0, top), "adam": _edge(ADAM_EDGE, adam_top)},
        "trace": {"mean": trace.mean, "error": trace.error, "probes": trace.probes},
        "density": {"values": weights.values.tolist(), "weights": weights.weights.tolist()},
        "cost": _cost(surface, time.monotonic() - begin, step),
    }


def preconditioned(surface: Surface) -> Callable[[Tensor], Tensor]:
    """Products with P^-1/2 H P^-1/2, where P = sqrt(v) and v is the mean squared gradient of the forests here: the Hessian as
    Adam's steps see it (arXiv:2207.14484, Sect. 3).
    """
    scale = surface.squared_gradients().sqrt_()
    scale = scale.add_(1e-8 + 1e-3 * scale.mean().item()).rsqrt_()  # few forests make some second moments far too small
    return lambda vector: surface.product(vector * scale).mul_(scale)


def lines(surface: Surface, gradient: Tensor, generator: torch.Generator, settings: Settings) -> dict[str, list[float]]:
    """The loss along a filter-normalized random direction, and along the gradient scaled to the same length."""
    lengths = torch.linspace(-settings.span, settings.span, settings.points).tolist()
    random = landscape.filter_normalized(surface, generator)
    uphill = gradient * (random.norm() / gradient.norm().clamp(min=1e-12))
    found = {"random": landscape.along(surface, random, lengths), "gradient": landscape.along(surface, uphill, lengths)}
    return {"lengths": lengths, **found}


def _counted(product: Callable[[Tensor], Tensor], done: Callable[[], object]) -> Callable[[Tensor], Tensor]:
    def counted(vector: Tensor) -> Tensor:
        result = product(vector)
        done()
        return result

    return counted


def _distinct(values: Tensor) -> list[float]:
    """Largest first, each once, where several starts found the same."""
    kept: list[float] = []
    for value in reversed(values.tolist()):
        if not kept or kept[-1] - value > 1e-3 * abs(kept[0]):
            kept.append(value)
    return kept


def _edge(numerator: float, eigenvalue: float) -> float | None:
    return numerator / eigenvalue if eigenvalue > 0 and math.isfinite(eigenvalue) else None


def _cost(surface: Surface, seconds: float, step: float) -> dict[str, float]:
    return {
        "products": surface.products,
        "gradients": surface.gradients,
        "losses": surface.losses,
        "seconds": round(seconds, 3),
        "seconds_a_training_step": round(step, 4),
        "training_steps": round(seconds / step, 1),
    }
