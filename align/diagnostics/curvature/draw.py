"""The plot of a measured surface."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.diagnostics.curvature.spectrum import Density
from align.runner.files import written_aside


def draw(path: Path, measured: Sequence[dict[str, Any]]) -> None:
    """Spectral density and loss along two lines of the last of `measured`; with several, also sharpness beside perplexity.

    Args:
        path: where to; its ending says in which format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    last, several = measured[-1], len(measured) > 1
    with rc_context({"font.size": 8, "svg.fonttype": "none", "svg.hashsalt": "align"}):
        figure = Figure(figsize=(10.5 if several else 7.2, 3.0), layout="constrained")
        axes = figure.subplots(1, 3 if several else 2)
        _density(axes[0], last)
        for name in ("random", "gradient"):
            axes[1].plot(last["lines"]["lengths"], last["lines"][name], marker="o", markersize=2.5, label=name)
        axes[1].set_title("loss along a random direction and the gradient", fontsize=8)
        axes[1].set_xlabel("distance, in lengths of the weights")
        axes[1].legend(frameon=False)
        if several:
            _checkpoints(axes[2], measured)
        with written_aside(path) as file:
            figure.savefig(file.buffer, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


def _density(axes: Any, measured: dict[str, Any]) -> None:
    density = Density(*(torch.tensor(measured["density"][name], dtype=torch.double) for name in ("values", "weights")))
    low, high = density.values.min().item(), density.values.max().item()
    width = max(high - low, 1e-12)
    grid = torch.linspace(low - 0.05 * width, high + 0.05 * width, 400, dtype=torch.double)
    axes.semilogy(grid.tolist(), (density.smoothed(grid, width / 100) + 1e-12).tolist())
    axes.set_ylim(bottom=1e-7 / width)
    axes.set_title(f"spectral density of {measured['parameters']:,} parameters", fontsize=8)
    axes.set_xlabel("eigenvalue of the Hessian")


def _checkpoints(axes: Any, measured: Sequence[dict[str, Any]]) -> None:
    labels, places = [one["name"] for one in measured], range(len(measured))
    axes.plot(places, [one["top_eigenvalue"] for one in measured], marker="o", color="C0")
    axes.set_ylabel("top eigenvalue", color="C0")
    axes.set_xticks(places, labels, rotation=30, ha="right")
    other = axes.twinx()
    other.plot(places, [one["held_out_perplexity"] for one in measured], marker="s", color="C1")
    other.set_ylabel("held-out perplexity", color="C1")
