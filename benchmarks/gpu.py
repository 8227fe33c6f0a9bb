"""Ours against TRL's `DPOTrainer`, and our rollouts against `generate`, on one CUDA device in bfloat16:
``python -m benchmarks.gpu``, at most eight minutes.

Random weights, random token ids, lengths like UltraFeedback's: no file is read and nothing is downloaded. Both sides run in this
process in turns, each with fp32 weights under autocast unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.errors import AlignError
from align.progress import say
from benchmarks import ours, rollouts
from benchmarks.compare import CHECKED_STEPS, OURS, TRL, TRL_BEST, Case, Row, collect, loss_difference, row, table
from benchmarks.gemm import Arithmetic, gemm_rate, seconds_of, typical_forest
from benchmarks.probe import MB, train
from benchmarks.training import Outcome
from benchmarks.work import BATCH, Data, Job, Length, batches

DEVICE = "cuda"
LEARNING_RATE = 1e-6  # TRL's default: losses near log 2 compare better by ratio than losses near 0
MAX_LENGTH = 1024
ULTRAFEEDBACK = Data("", "preference", 160, Length(180, 240), (Length(300, 350), Length(300, 350)))

MODELS: dict[str, dict[str, Any]] = {
    "qwen_0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "llama_1b": {
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
}
"""The shapes of Qwen2.5-0.5B and TinyLlama-1.1B."""

COMPILED = replace(OURS, compiled=True)
LEFT_OUT = ("llama_1b_dpo_best", "llama_1b_dpo_plain")
"""For want of time."""

SECONDS = 8 * 60
SETUP = 120
"""No benchmark is begun with fewer seconds left."""


def cases() -> list[Case]:
    """DPO with each model, ours with `torch_compile`, against TRL as it comes; with the smaller one also against TRL at its best,
    and ours without.
    """
    ways = {"": (COMPILED, TRL), "_best": (COMPILED, TRL_BEST), "_plain": (OURS, TRL)}
    found = {
        f"{name}_dpo{suffix}": Case("", name, "dpo", 10, mine, theirs, by_length=theirs.precompute)
        for name in MODELS
        for suffix, (mine, theirs) in ways.items()
    }
    return [
        replace(case, name=name, ours=replace(case.ours, bf16=True), theirs=replace(case.theirs, bf16=True))
        for name, case in found.items()
        if name not in LEFT_OUT
    ]


def ceiling(size: int = 8192) -> float:
    """Operations per second of a large square product in bfloat16."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / seconds_of(lambda: torch.mm(a, b, out=out), DEVICE, at_least=0.5)


def run(job: Job, side: str) -> tuple[Outcome, float]:
    """One run, and the largest memory that tensors took, in 2^20 bytes. What the last run has given back stays with the process: to
    ask the device for it anew takes longer than some runs.
    """
    collect()
    torch.cuda.reset_peak_memory_stats()
    return train(job, side), torch.cuda.max_memory_allocated() / MB


def measure(case: Case, repeats: int, weights: str, limit: float) -> Row:
    """As `benchmarks.run.measure`, with both sides in this process; memory is the peak of the timed runs.

    Args:
        limit: what the device's matrix products reach, in operations a second.
    """
    architecture = MODELS[case.data]
    trees = ULTRAFEEDBACK.generated(architecture["vocab_size"], MAX_LENGTH)
    plan = batches(trees, case.steps, by_length=case.by_length)
    sides = (case.ours, case.theirs)
    # In fp32 and on short rows: bfloat16 would hide small mistakes, and long rows might not fit. (To compile for that, too, would
    # take another half minute.)
    short = batches(trees, len(trees) // BATCH, by_length=True)[:CHECKED_STEPS]
    job = Job(case.method, architecture, short, device=DEVICE, learning_rate=LEARNING_RATE)
    first = [run(replace(side.job(job), bf16=False, compiled=False), side.engine)[0] for side in sides]
    difference = loss_difference(case, first[0], first[1])
    say(f"{case.name}: losses differ by {difference:.0e}; timing {repeats} x {case.steps} steps of each side")

    job = replace(job.over(plan), weights=weights, logging_steps=len(plan))
    arithmetic, forest = Arithmetic.of(job), typical_forest(plan, ours.MAX_TOKENS)
    seconds: tuple[list[float], list[float]] = ([], [])
    memory = [0.0, 0.0]
    rates = []
    for repeat in range(repeats):
        rates.append(gemm_rate(arithmetic, forest, dtype=torch.bfloat16, device=DEVICE))
        for number in (0, 1) if repeat % 2 == 0 else (1, 0):
            outcome, peak = run(sides[number].job(replace(job, seed=repeat)), sides[number].engine)
            seconds[number].append(outcome.seconds)
            memory[number] = max(memory[number], peak)
        say(f"{case.name}: {repeat + 1}: ours {seconds[0][-1]:.2f} s, theirs {seconds[1][-1]:.2f} s")
    timed = [tree for batch in plan for tree in batch]
    operations = arithmetic.training(timed, reference=True)
    result = row(case, timed, seconds, (memory[0], memory[1]), arithmetic=operations, rates=rates, difference=difference)
    share = operations / statistics.median(seconds[0]) / limit
    return replace(
        result, note=f"The pass over the reference is counted on both sides. Ours does {share:.0%} of the large product."
    )


def measurements(repeats: int, weights: str, limit: float) -> dict[str, Callable[[], Row]]:
    """What is measured, by name and in order; `limit` is that of `measure`."""
    rollout = rollouts.Case("qwen_0.5b_rollout_64", 64)
    sampling = partial(rollouts.on_device, rollout, MODELS["qwen_0.5b"], DEVICE, repeats)
    training = {case.name: partial(measure, case, repeats, weights, limit) for case in cases()}
    return {rollout.name: sampling, **training}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Ours against TRL's DPO on one CUDA device.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side; speeds are their medians (default: 3)")
    parser.add_argument("--weights", choices=("float32", "bfloat16"), default="float32", help="of the model (default: float32)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where gpu.json is written")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch finds none here; `make bench` runs on the CPU", file=sys.stderr)
        return 2
    start = time.monotonic()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "weights": options.weights}
    limit = ceiling()
    results["ceiling_tflops"] = limit / 1e12
    say(f"{results['device']}: {results['ceiling_tflops']:.0f} TFLOP/s in a bfloat16 product of 8192 x 8192 matrices")
    rows: list[Row] = []
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        for name, measurement in measurements(options.repeats, options.weights, limit).items():
            if time.monotonic() - start > SECONDS - SETUP:
                say(f"{name}: left out, {SECONDS} seconds are nearly over")
                continue
            try:
                rows.append(measurement())
            except torch.OutOfMemoryError as error:
                say(f"{name}: left out, it does not fit into this device's memory: {str(error).splitlines()[0]}")
    except AlignError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        results |= {"rows": [asdict(row) for row in rows], "seconds": round(time.monotonic() - start)}
        (options.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
