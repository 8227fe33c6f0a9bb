"""Sampling: our engine against transformers' `generate`, on prompts and completions of mixed lengths.

``python -m benchmarks.rollouts SIDE BATCH SORTED RESULT`` is one side alone in a process of its own, for its peak memory.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.errors import AlignError
from align.progress import say
from align.rollout import CacheEngine, Sampling, complete, engine_for
from benchmarks.compare import Row, collect
from benchmarks.probe import MB, ROOT, peak_mb
from benchmarks.work import DATA, LLAMA_14M, PAD, Job, build

PROMPTS, LONGEST_PROMPT, MAX_NEW_TOKENS = 128, 256, 128
STOP_SHARE = 64
"""One token in so many ends a completion: with random weights, lengths are close to geometric."""

CHECKED = 4
"""Prompts whose greedy completions must be the same on both sides before anything is timed."""


JOB = Job("sft", LLAMA_14M, [])


@dataclass(frozen=True)
class Case:
    """A row of the table: completions sampled side by side, and whether `generate` gets prompts sorted by length."""

    name: str
    batch: int
    by_length: bool = False


CASES = (
    Case("rollout_16", 16),
    Case("rollout_64", 64),
    Case("rollout_16_best", 16, by_length=True),
    Case("rollout_64_best", 64, by_length=True),
)


def prompts() -> list[list[int]]:
    """The last tokens of hh-rlhf's prompts."""
    return [tree.prompt[-LONGEST_PROMPT:] for tree in DATA["hh"].trees()][:PROMPTS]


def stop_ids(vocabulary: int) -> list[int]:
    """Tokens that end a completion."""
    return list(range(3, 3 + vocabulary // STOP_SHARE))


def ours(model: Any, asked: Sequence[list[int]], batch: int, temperature: float = 1.0, seed: int = 0) -> list[list[int]]:
    """Our engine's completions."""
    sampling = Sampling(MAX_NEW_TOKENS, temperature=temperature, batch_size=batch)
    generator = torch.Generator().manual_seed(seed)
    stops = stop_ids(model.config.vocab_size)
    return [found.tokens for found in complete(model, asked, sampling, stops, generator)]


@torch.no_grad()
def theirs(
    model: Any, asked: Sequence[list[int]], batch: int, temperature: float = 1.0, seed: int = 0, *, by_length: bool = False
) -> list[list[int]]:
    """`generate`'s completions, batch after batch, padded on the left."""
    torch.manual_seed(seed)
    stops = stop_ids(model.config.vocab_size)
    config = {"max_new_tokens": MAX_NEW_TOKENS, "eos_token_id": stops, "pad_token_id": PAD, "do_sample": temperature > 0}
    if temperature:
        config |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    order = sorted(range(len(asked)), key=lambda i: -len(asked[i])) if by_length else list(range(len(asked)))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch):
        rows = [asked[i] for i in order[start : start + batch]]
        width = max(map(len, rows))
        ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
        said = model.generate(ids, attention_mask=mask, **config)[:, width:].tolist()
        found.update(zip(order[start : start + batch], (_until(row, stops) for row in said), strict=True))
    return [found[i] for i in range(len(asked))]


def _until(row: list[int], stops: Sequence[int]) -> list[int]:
    """`row` up to the first stop token; padding follows it."""
    known = set(stops)
    end = next((i + 1 for i, token in enumerate(row) if token in known), len(row))
    return row[:end]


def measure(case: Case, repeats: int, folder: Path) -> Row:
    """Each side alone for its memory, a check that greedy completions are the same, and then both in turns.

    Raises:
        AlignError: our engine does not serve the model, or the completions differ.
    """
    memory = [_alone(name, case, folder) for name in ("ours", "theirs")]
    model, asked = _model(), prompts()
    check(case, model, asked)
    how = "sorted by length for generate, too" if case.by_length else "as they come for generate; ours sorts them itself"
    note = (
        f"{len(asked)} prompts of hh-rlhf, {how}; batches of {case.batch}, completions of 1 to {MAX_NEW_TOKENS} tokens at "
        f"temperature 1; sampled tokens a second, prompts included in the time. Greedy completions are the same."
    )
    return _row(case, timed(case, model, asked, repeats), memory, note)


def check(case: Case, model: Any, asked: Sequence[list[int]]) -> None:
    """That both sides say the same, greedily.

    Raises:
        AlignError: our engine does not serve the model, or the completions differ.
    """
    if not isinstance(engine_for(model, LONGEST_PROMPT + MAX_NEW_TOKENS), CacheEngine):
        raise AlignError(f"{case.name}: {type(model).__name__} is not served by our engine; nothing was measured")
    greedy = [side(model, asked[:CHECKED], case.batch, temperature=0.0) for side in _sides(case)]
    if greedy[0] != greedy[1]:
        raise AlignError(f"{case.name}: greedy completions of the two sides differ; nothing was timed")


def timed(case: Case, model: Any, asked: Sequence[list[int]], repeats: int) -> tuple[list[float], list[float]]:
    """Sampled tokens a second of each side, in turns."""
    sides = _sides(case)
    runs: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for number in (0, 1) if repeat % 2 == 0 else (1, 0):
            start = time.perf_counter()
            found = sides[number](model, asked, case.batch, seed=repeat)  # lists: a device has ended its work
            runs[number].append(sum(map(len, found)) / (time.perf_counter() - start))
            collect()
        say(f"{case.name}: {repeat + 1}: ours {runs[0][-1]:.0f}, theirs {runs[1][-1]:.0f} tokens/s")
    return runs


def _sides(case: Case) -> tuple[Callable[..., list[list[int]]], ...]:
    return ours, partial(theirs, by_length=case.by_length)


def _row(case: Case, runs: tuple[list[float], list[float]], memory: Sequence[float], note: str) -> Row:
    speed = [statistics.median(side) for side in runs]
    return Row(
        case.name,
        "tokens/s",
        speed[0],
        speed[1],
        speed[0] / speed[1],
        memory[0],
        memory[1],
        memory[0] / memory[1],
        runs_ours=tuple(runs[0]),
        runs_theirs=tuple(runs[1]),
        note=note,
    )


def on_device(case: Case, architecture: dict[str, Any], device: str, repeats: int) -> Row:
    """`measure` on one CUDA device, with random prompts, checked in fp32 and timed in bfloat16. Memory is the most that tensors
    took, in 2^20 bytes.
    """
    job = Job("sft", architecture, [], device=device)
    draw = random.Random(0)
    asked = [
        [draw.randrange(100, architecture["vocab_size"]) for _ in range(draw.randint(8, LONGEST_PROMPT))] for _ in range(PROMPTS)
    ]
    model = _model(job)
    check(case, model, asked)
    model = model.to(torch.bfloat16)
    memory = []
    for side in _sides(case):
        collect()
        torch.cuda.reset_peak_memory_stats()
        side(model, asked, case.batch)  # and everything is set up once: kernels, graphs
        memory.append(torch.cuda.max_memory_allocated() / MB)
    note = f"{len(asked)} random prompts, batches of {case.batch}, bfloat16; greedy completions are the same in fp32."
    return _row(case, timed(case, model, asked, repeats), memory, note)


def _model(job: Job = JOB) -> Any:
    """Random weights; nothing but `stop_ids` ends a completion."""
    model: Any = build(job).eval()
    model.generation_config.eos_token_id = None
    return model


def _alone(side: str, case: Case, folder: Path) -> float:
    """Peak memory of one side in a fresh process, in 2^20 bytes."""
    result = folder / "rollout.json"
    command = [sys.executable, "-m", "benchmarks.rollouts", side, str(case.batch), str(int(case.by_length)), str(result)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AlignError(f"{case.name}, {side}: the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(result.read_text())


def main(side: str, batch: str, by_length: str, result: str) -> None:
    model, asked = _model(), sorted(prompts(), key=len)[-int(batch) :]
    run = ours if side == "ours" else partial(theirs, by_length=bool(int(by_length)))
    run(model, asked, int(batch))
    Path(result).write_text(json.dumps(peak_mb()))


if __name__ == "__main__":
    main(*sys.argv[1:])
