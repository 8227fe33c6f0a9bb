"""What curvature costs: ``python benchmarks/curvature.py [--json FILE]``.

Time of a Hessian-vector product in gradients, and the peak of memory of a whole measurement against that of a training step with
AdamW on the same rows, each in a process of its own and with packs of its own default size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIZES = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 8192}
"""A Llama of 3 million parameters."""
ROWS, LENGTH = 16, 128
TOKENS = {"training": 8192, "curvature": 256}
"""In a pass: each as it is by default."""
ROUNDS = 3
"""Processes of each, whose median peak counts: the C library's heap differs by a fifth from run to run."""


def surface(work: str = "curvature") -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from align.diagnostics.curvature.surface import Surface
    from align.engine import enable_forest
    from align.forest import Tree
    from align.trainers.objectives import LanguageModel

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_key_value_heads=4))
    enable_forest(model)
    draw = random.Random(0)
    rows = [[draw.randrange(3, SIZES["vocab_size"]) for _ in range(LENGTH)] for _ in range(ROWS)]
    trees = [Tree(row, prompt_mask=[False] + [True] * (LENGTH - 1)) for row in rows]
    return Surface(model, LanguageModel(), trees, TOKENS[work])


def training(surface: Any) -> None:
    """Two steps with AdamW, as the trainer makes them."""
    import torch

    optimizer = torch.optim.AdamW(surface.parameters, lr=1e-4)
    for _ in range(2):
        for forest in surface.forests:
            (surface.objective(surface.model, forest).loss.sum() / surface.units).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(surface: Any) -> None:
    """A measurement with its default settings."""
    from align.diagnostics.curvature.measure import Settings, measure

    measure(surface, Settings())


def resident() -> float:
    """Memory (MB) that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak(name: str, answer: Any) -> None:
    """The most memory (MB) that the work `name` needs: what it adds to a process with the model, and the model."""
    made = surface(name)
    made.gradient()  # what the first pass of a process sets up for good
    before, most, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    {"training": training, "curvature": whole}[name](made)
    done.set()
    watcher.join()
    answer.put(most - before + 4 * made.size / 2**20)


def memory(name: str) -> list[float]:
    """The peaks (MB) of `ROUNDS` processes, rising."""
    return sorted(_in_a_process(name) for _ in range(ROUNDS))


def _in_a_process(name: str) -> float:
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=peak, args=(name, answer))
    process.start()
    found = answer.get()
    process.join()
    return found


def seconds(work: Any, times: int = 2) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    made = surface()
    vector = made.gradient()
    gradient, product = seconds(made.gradient), seconds(lambda: made.product(vector))
    peaks = {name: memory(name) for name in TOKENS}
    typical = {name: statistics.median(found) for name, found in peaks.items()}
    result = {
        "parameters": made.size,
        "tokens": ROWS * LENGTH,
        "gradient_seconds": round(gradient, 3),
        "product_seconds": round(product, 3),
        "product_in_gradients": round(product / gradient, 2),
        "peaks_mb": {name: [round(peak) for peak in found] for name, found in peaks.items()},
        "memory_ratio": round(typical["curvature"] / typical["training"], 2),
    }
    print(json.dumps(result, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
