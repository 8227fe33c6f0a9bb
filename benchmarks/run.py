"""Ours against TRL on this machine's CPU: ``python -m benchmarks.run [--only NAME …]``.

For each benchmark: both sides once for their peak memory and their losses, which must agree; then both in turns, the rate of matrix
products measured before each turn. Every run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from align.errors import AlignError
from align.progress import say
from benchmarks import ours, ppo, rollouts
from benchmarks.compare import CHECKED_STEPS, OURS, TRL_BEST, Case, Row, Side, loss_difference, row, table
from benchmarks.gemm import Arithmetic, gemm_rate, typical_forest
from benchmarks.probe import probe
from benchmarks.work import DATA, LLAMA_14M, REAL, VOCABULARY, Job, batches, build, heaviest_last, lightest

REFERENCE = "The pass over the reference is counted on both sides, for the rows of the timed steps."
CASES = (
    Case("dpo_hh", "hh", "dpo", 6, note=REFERENCE),
    Case("dpo_hh_best", "hh", "dpo", 8, theirs=TRL_BEST, by_length=True, note=f"{REFERENCE} TRL makes it before training."),
    Case("dpo_long", "long", "dpo", 3, note=REFERENCE),
    Case(
        "orpo_hh",
        "hh",
        "orpo",
        6,
        checked="log_odds_ratio",
        checked_steps=1,
        note="TRL's likelihood term covers prompt and answer, ours the answer (as the paper's Eq. 6): the odds ratio term is "
        "compared, on the first step, as updates differ from there on.",
    ),
    Case("simpo_hh", "hh", "simpo", 6),
    Case("reward_hh", "hh", "reward", 6),
    Case("sft_alpaca", "alpaca", "sft", 6),
    Case("sft_alpaca_best", "alpaca", "sft", 8, by_length=True),
    Case(
        "bf16_dpo_hh",
        "hh",
        "dpo",
        6,
        ours=Side("ours", bf16=True),
        theirs=OURS,
        tolerance=5e-2,
        note="Both sides are ours: theirs is fp32. GEMM rate and fraction are those of bf16.",
    ),
)
"""Both sides get the same batches in the same order; with `by_length` they are made of rows sorted by length."""

LARGE_VOCABULARY = 152_000
VOCABULARY_NAME = "vocabulary"
NAMES = (*(case.name for case in CASES), *ppo.NAMES, VOCABULARY_NAME, *(case.name for case in rollouts.CASES))


def measure(case: Case, steps: int, repeats: int, folder: Path) -> Row:
    """Check, then time."""
    plan = batches(DATA[case.data].trees(), steps, by_length=case.by_length)
    sides = (case.ours, case.theirs)
    job = Job(case.method, LLAMA_14M, heaviest_last(plan, CHECKED_STEPS))
    say(f"{case.name}: {CHECKED_STEPS} steps of each side alone")
    probes = [probe(side.job(job), side.engine, folder) for side in sides]
    difference = loss_difference(case, probes[0].outcome, probes[1].outcome)
    shown = ", ".join(f"{value:.5f}" for value in probes[0].outcome.metric(case.checked)[: case.checked_steps])
    say(f"{case.name}: {case.checked} {shown}: differs by {difference:.0e}; timing {repeats} x {steps} steps of each side")

    job = job.over(plan)
    arithmetic, forest = Arithmetic.of(job), typical_forest(plan, ours.MAX_TOKENS)
    seconds: tuple[list[float], list[float]] = ([], [])
    rates = []
    for repeat in range(repeats):
        rates.append(gemm_rate(arithmetic, forest, dtype=torch.bfloat16 if case.ours.bf16 else torch.float32))
        for number in (0, 1) if repeat % 2 == 0 else (1, 0):
            # Weights of their own for each repeat: TRL would find an earlier pass over the same reference in its cache.
            found = probe(sides[number].job(replace(job, seed=repeat)), sides[number].engine, folder)
            seconds[number].append(found.outcome.seconds)
        say(f"{case.name}: {repeat + 1}: ours {seconds[0][-1]:.1f} s, theirs {seconds[1][-1]:.1f} s")
    trees = [tree for batch in plan for tree in batch]
    return row(
        case,
        trees,
        seconds,
        (probes[0].peak_mb, probes[1].peak_mb),
        arithmetic=arithmetic.training(trees, reference=ours.needs_reference(case.method)),
        rates=rates,
        difference=difference,
    )


def vocabulary(folder: Path) -> Row:
    """How much more working memory DPO takes with a large vocabulary than with a small one, each side alone."""
    light = [lightest(batches(DATA["hh"].trees(), 20, by_length=False))] * 2  # TRL's head takes minutes for a long row
    extra = []
    for side in (OURS, TRL_BEST):
        beyond = []
        for size in (VOCABULARY, LARGE_VOCABULARY):
            say(f"{VOCABULARY_NAME}: {side.engine}, {size:,} tokens")
            job = Job("dpo", {**LLAMA_14M, "vocab_size": size}, light)
            weights = sum(p.numel() for p in build(replace(job, device="meta")).parameters())
            # Weights, gradients and AdamW's two moments, four bytes each.
            beyond.append(probe(side.job(job), side.engine, folder).peak_mb - 16 * weights / 2**20)
        extra.append(beyond[1] - beyond[0])
    ratio = extra[0] / extra[1]
    note = (
        f"Peak memory beyond weights, gradients and optimizer state with {LARGE_VOCABULARY:,} tokens minus the same with "
        f"{VOCABULARY:,}, DPO on the same rows; TRL with its reference precomputed, so that it holds no second model."
    )
    return Row(VOCABULARY_NAME, "MB", extra[0], extra[1], ratio, extra[0], extra[1], ratio, note=note)


def machine() -> dict[str, str | int]:
    """What the numbers depend on."""
    from importlib.metadata import version

    packages = {name: version(name) for name in ("torch", "transformers", "trl")}
    return {**packages, "threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Ours against TRL on this machine's CPU.")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=f"of: {', '.join(NAMES)}")
    parser.add_argument("--steps", type=int, help="timed steps of a run (default: 3 to 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; speeds are their medians (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where results.json is written")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    data = str(REAL) if REAL.is_dir() else "generated"
    results: dict = {"machine": machine(), "data": data, "repeats": options.repeats, "steps": options.steps, "rows": []}
    say(f"{results['machine']}; data: {data}")
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory(prefix="align-bench-") as folder:
            for case in CASES:
                if case.name in options.only:
                    rows.append(measure(case, options.steps or case.steps, options.repeats, Path(folder)))
            if names := [name for name in ppo.NAMES if name in options.only]:
                rows += ppo.measure(names, options.repeats, options.steps)
            if VOCABULARY_NAME in options.only:
                rows.append(vocabulary(Path(folder)))
            for rollout in rollouts.CASES:
                if rollout.name in options.only:
                    rows.append(rollouts.measure(rollout, options.repeats, Path(folder)))
    except AlignError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        results |= {"rows": [asdict(row) for row in rows], "seconds": round(time.monotonic() - start)}
        (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2) if options.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
