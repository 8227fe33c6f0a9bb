"""Two processes against one, each with a core of its own: ``python -m benchmarks.processes [--rounds 3]``.

SFT of a model of 14 million parameters on the same batches of 64 rows: one process, two under DDP, two under FSDP2, and two that do
not know of each other, which shows what the machine itself takes from two at a time; in turns.
Throughput is of tokens by the clock, the best round counting, and by the time that the processes had a core, which others on the
machine disturb less. Memory is what each process holds of parameters and of the optimizer's state.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from align.allocator import keep_memory
from align.engine import enable_forest
from align.runner.launch import command
from align.runner.rank import leave
from align.stages.base import Launch
from align.trainers.forest import ForestTrainer
from align.trainers.objectives import LanguageModel
from benchmarks.ours import MAX_TOKENS
from benchmarks.training import arguments
from benchmarks.work import BATCH, DATA, LLAMA_14M, Job, batches, build, tokens_of

ROWS = 64
"""Of an optimizer step: enough for the exchange of gradients to be a small part of it."""

WARM_UP = 2
"""Steps that are not timed: the second one's forest may be the larger, and memory grows by it, page by page."""

ONE = "one process"
WAYS = {
    ONE: Launch(cpu=True),
    "two, ddp": Launch(cpu=True, num_processes=2),
    "two, fsdp2": Launch(cpu=True, num_processes=2, strategy="fsdp2"),
}


class Clock(TrainerCallback):
    """Seconds, and seconds on a core, of all steps behind the first `WARM_UP`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        if state.global_step <= WARM_UP:
            self.start = now
        self.spent = [end - start for start, end in zip(self.start, now, strict=True)]


def held(tensors: Any) -> int:
    """Bytes of `tensors` in this process: of a sharded one, its shard."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def work(folder: Path, steps: int, architecture: dict[str, Any]) -> None:
    """One of the processes: train, and write down what it took."""
    keep_memory()  # as in a stage's process
    vocabulary = architecture["vocab_size"]
    rows = batches(DATA["alpaca"].generated(vocabulary), steps * ROWS // BATCH, by_length=False)
    job = Job("sft", architecture, rows)
    model, clock = build(job), Clock()
    enable_forest(model, job.longest)
    share = {"per_device_train_batch_size": ROWS // int(os.environ.get("WORLD_SIZE", 1)), "max_steps": steps}
    args = TrainingArguments(**{**arguments(job, str(folder)), **share})
    trainer = ForestTrainer(model, LanguageModel(), args, job.trees, max_tokens=MAX_TOKENS, callbacks=[clock])
    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
    trainer.train()
    states = [value for state in trainer._optimizer().state.values() for value in state.values()]
    result = {
        "seconds": clock.spent[0],
        "core": clock.spent[1],
        "parameters": held(trainer.model_wrapped.parameters()),
        "optimizer": held(states),
        "tokens": tokens_of(job.trees[WARM_UP * ROWS :]) / args.world_size,
        "loss": trainer.state.log_history[-2]["loss"],
    }
    (folder / f"{args.process_index}.json").write_text(json.dumps(result))


def measure(way: Launch, steps: int, architecture: dict[str, Any]) -> list[dict[str, float]]:
    """What each process of one run tells."""
    with tempfile.TemporaryDirectory(prefix="align-bench-") as folder:
        words = ["-m", "benchmarks.processes", "--work", folder, "--steps", str(steps), "--architecture", json.dumps(architecture)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        run = subprocess.run(command(way, words), env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("?.json"))]


def apart(steps: int, architecture: dict[str, Any]) -> list[dict[str, float]]:
    """What two runs of one process tell that run at the same time."""
    with ThreadPoolExecutor(2) as pool:
        runs = pool.map(lambda way: measure(way, steps, architecture), [WAYS[ONE]] * 2)
        return [process for run in runs for process in run]


def rate(processes: list[dict[str, float]], clock: str) -> float:
    """Tokens a second of a process; `clock` is ``seconds`` or ``core``."""
    return sum(process["tokens"] for process in processes) / sum(process[clock] for process in processes)


def table(found: dict[str, list[list[dict[str, float]]]]) -> list[str]:
    """A row for each way; `found` has its rounds, and their processes."""
    columns = ("", "tokens/s a core", "of one process", "by core time", "parameters, MB", "optimizer, MB", "last loss")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    base: dict[str, float] = {}
    for way, rounds in found.items():
        rates = {clock: max(rate(processes, clock) for processes in rounds) for clock in ("seconds", "core")}
        base = base or rates
        first = rounds[0]
        parameters, optimizer = (max(process[name] for process in first) / 2**20 for name in ("parameters", "optimizer"))
        shares = " | ".join(f"{rates[clock] / base[clock]:.0%}" for clock in rates)
        lines.append(f"| {way} | {rates['seconds']:.0f} | {shares} | {parameters:.1f} | {optimizer:.1f} | {first[0]['loss']:.4f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--architecture", type=json.loads, default=LLAMA_14M, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.steps, options.architecture)
        leave(0)
    found: dict[str, list[list[dict[str, float]]]] = defaultdict(list)
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            found[name].append(measure(way, options.steps, options.architecture))
        found["two, apart"].append(apart(options.steps, options.architecture))
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
