"""A comparison: which two runs, whether they compute the same thing, what came out, and the table."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from align.errors import AlignError
from align.forest import Tree
from benchmarks.training import Outcome
from benchmarks.work import Job, tokens_of

CHECKED_STEPS = 3
"""Steps whose losses are held against each other before anything is timed."""


@dataclass(frozen=True)
class Side:
    """One of the two runs that are compared."""

    engine: str
    """``ours`` or ``theirs``: a module of this package."""
    precompute: bool = False
    bf16: bool = False
    compiled: bool = False

    def job(self, job: Job) -> Job:
        """`job` as this side does it."""
        return replace(job, precompute=self.precompute, bf16=self.bf16, compiled=self.compiled)


OURS, TRL, TRL_BEST = Side("ours"), Side("theirs"), Side("theirs", precompute=True)


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    name: str
    data: str
    method: str
    steps: int
    """Steps that are timed."""
    ours: Side = OURS
    theirs: Side = TRL
    by_length: bool = False
    """Whether the batches are made of rows sorted by length."""
    checked: str = "loss"
    """The metric that must be the same on both sides."""
    checked_steps: int = CHECKED_STEPS
    tolerance: float = 1e-3
    """Largest relative difference between them."""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """What was measured. Speeds are medians; memory is in 2^20 bytes; ratios are ours over theirs."""

    name: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    memory_ours_mb: float
    memory_theirs_mb: float
    memory_ratio: float
    gemm_fraction: float | None = None
    """Useful arithmetic of our steps / their time / the rate of this machine's matrix products."""
    gemm_gflops: float | None = None
    loss_difference: float | None = None
    """Largest relative difference of the checked metric."""
    runs_ours: tuple[float, ...] = ()
    runs_theirs: tuple[float, ...] = ()
    note: str = ""


def loss_difference(case: Case, ours: Outcome, theirs: Outcome) -> float:
    """Largest relative difference of the checked metric over the first steps.

    Raises:
        AlignError: it is larger than the case allows, or a side did not log the metric.
    """
    pairs = list(zip(ours.metric(case.checked), theirs.metric(case.checked), strict=False))[: case.checked_steps]
    if len(pairs) < case.checked_steps:
        raise AlignError(f"{case.name}: {case.checked!r} was logged in {len(pairs)} steps, not in {case.checked_steps}")
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    if not worst <= case.tolerance:
        shown = ", ".join(f"{a:.6f} and {b:.6f}" for a, b in pairs)
        raise AlignError(
            f"{case.name}: the two sides do not compute the same thing: {case.checked} differs by {worst:.1e} "
            f"(at most {case.tolerance:.0e}); ours and theirs by step: {shown}. Nothing was timed"
        )
    return worst


def unit_of(method: str) -> str:
    """What speeds count."""
    return "tokens/s" if method == "sft" else "pairs/s"


def units(method: str, trees: Sequence[Tree]) -> int:
    """How many of them `trees` hold; tokens are unique ones, without padding."""
    return tokens_of(trees) if method == "sft" else len(trees)


def row(
    case: Case,
    trees: Sequence[Tree],
    seconds: tuple[Sequence[float], Sequence[float]],
    memory: tuple[float, float],
    *,
    arithmetic: float,
    rates: Sequence[float],
    difference: float,
) -> Row:
    """The row of `case` out of the times of each run over `trees` (ours, theirs), peak memories, operations, and GEMM rates."""
    runs = [tuple(units(case.method, trees) / s for s in side) for side in seconds]
    ours, theirs = map(statistics.median, runs)
    rate = statistics.median(rates)
    return Row(
        case.name,
        unit_of(case.method),
        ours,
        theirs,
        ours / theirs,
        *memory,
        memory[0] / memory[1],
        gemm_fraction=arithmetic / statistics.median(seconds[0]) / rate,
        gemm_gflops=rate / 1e9,
        loss_difference=difference,
        runs_ours=runs[0],
        runs_theirs=runs[1],
        note=case.note,
    )


def table(rows: Sequence[Row]) -> str:
    """`rows` for people, with the notes below."""
    head = ["benchmark", "unit", "ours", "theirs", "ratio", "MB ours", "MB theirs", "ratio", "of GEMM", "loss differs"]
    lines = [head]
    for r in rows:
        speeds = [f"{x:.0f}" if x >= 100 else f"{x:.2f}" for x in (r.ours, r.theirs)]
        memory = [f"{x:.0f}" for x in (r.memory_ours_mb, r.memory_theirs_mb)]
        fraction = "" if r.gemm_fraction is None else f"{r.gemm_fraction:.0%}"
        difference = "" if r.loss_difference is None else f"{r.loss_difference:.0e}"
        lines.append([r.name, r.unit, *speeds, f"{r.ratio:.2f}x", *memory, f"{r.memory_ratio:.2f}x", fraction, difference])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    text.insert(1, "-" * len(text[0]))
    notes = [f"{r.name}: {r.note}" for r in rows if r.note]
    return "\n".join([*text, "", *notes]) if notes else "\n".join(text)


def collect() -> None:
    """Free the models of the last run: an enabled model refers to itself."""
    gc.collect()
