"""The preflight's estimate of peak memory beside what was measured: SFT, DPO, a reward model and PPO, all weights and LoRA, at
three sizes. ``python -m benchmarks.memory [--only NAME]`` prints a table.

A measurement is a fresh process: the most resident memory while the stage runs, less what it had before (libraries loaded).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from align.allocator import large_pages
from align.data import write_rows
from align.errors import AlignError
from benchmarks.probe import ROOT

LLAMA = {
    **{"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8192},
    "max_position_embeddings": 2048,
}
SIZES: dict[str, dict[str, Any]] = {
    "4M": {**LLAMA, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6},
    "14M": {**LLAMA, "hidden_size": 256, "intermediate_size": 1280, "num_hidden_layers": 8},
    "35M": {**LLAMA, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 2048, "vocab_size": 16384},
    "qwen2": {
        **{"model_type": "qwen2", "hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 10, "vocab_size": 32768},
        **{"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True, "max_position_embeddings": 2048},
    },
}
"""Of other shapes and vocabularies, measured where ``--only`` names them."""
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"data": "pairs.jsonl", "max_steps": 2}),
    "dpo": ("preference", {"data": "pairs.jsonl", "max_steps": 2, "beta": 0.1}),
    "reward": ("reward", {"data": "pairs.jsonl", "max_steps": 2}),
    "ppo": (
        "ppo",
        {
            "data": "pairs.jsonl",
            "reward_funcs": ["length_band(low=10, high=90)"],
            "total_episodes": 32,
            "episodes_per_step": 16,
            "num_mini_batches": 1,
            "max_completion_length": 48,
            "eval_prompts": 8,
            "max_length": 256,
        },
    ),
}
BUDGET = 2048


def prepare(folder: Path, size: str) -> None:
    """A model with random weights in ``folder/model``, and pairs of 60 to 100 words."""
    from align.encode import set_chat_template
    from align.models import build_model
    from align.tokenizers import train_bpe

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(2000)]
    tokenizer = train_bpe([" ".join(words)], 4096)
    set_chat_template(tokenizer, "plain")
    model = build_model({**SIZES, **OTHERS}[size], tokenizer)
    model.save_pretrained(folder / "model")  # type: ignore[operator]
    tokenizer.save_pretrained(folder / "model")

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(low, high)))

    columns = ("prompt", "chosen", "rejected")
    write_rows(folder / "pairs.jsonl", [{column: text(30, 50) for column in columns} for _ in range(64)])


def stage_of(folder: Path, method: str, lora: bool) -> Any:
    from align.stages import stages
    from align.stages.written import make_stage

    name, fields = STAGES[method]
    shared = {"model": str(folder / "model"), "max_tokens_per_micro_batch": BUDGET, "use_peft": lora, "held_out": 0.1}
    batch = {} if method == "ppo" else {"per_device_train_batch_size": 16}
    return make_stage(stages[name], {**shared, **batch, **fields, "data": str(folder / fields["data"])}, method)


def resident(key: str) -> float:
    """A field of this process's status, in bytes: VmRSS is what it has, VmHWM the most it had."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024.0


def measure(folder: str, method: str, lora: str) -> None:
    """Run the stage in this process and print its peak, in bytes, less what was there before."""
    import torch

    from align.allocator import keep_memory
    from align.artifact import Artifact  # noqa: F401
    from align.progress import History
    from align.stages import training  # noqa: F401
    from align.stages.base import Context
    from align.trainers import kto, ppo  # noqa: F401

    keep_memory()  # as in a stage's process
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    stage = stage_of(Path(folder), method, lora == "lora")
    out = Path(folder) / f"{method}-{lora}"
    out.mkdir()
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the most starts again here
    before = resident("VmRSS")
    stage.run(Context(method, out, History(out / "metrics.jsonl")))
    print(json.dumps(resident("VmHWM") - before))


def estimated(folder: Path, method: str, lora: bool) -> Any:
    """The preflight's estimate of the same stage."""
    from align.pipeline import Run
    from align.preflight.cards import GB, Machine
    from align.preflight.inspect import inspect
    from align.recipe import Recipe

    plan = Run(Recipe(method, {method: stage_of(folder, method, lora)}), folder / "runs").plan()
    (looked,) = inspect(plan, machine=Machine("this machine", 1000 * GB, 1e12, 1e12, gpu=False))
    if looked.estimate is None:
        raise AlignError(f"{method}: no estimate: {looked.about}, {[finding.message for finding in looked.findings]}")
    return looked.estimate


def compare(size: str, method: str, lora: bool) -> tuple[float, float, Any]:
    """Measured and estimated peak in bytes, and the estimate."""
    with tempfile.TemporaryDirectory(prefix="align-memory-") as name:
        folder = Path(name)
        prepare(folder, size)
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", name, method, "lora" if lora else "full"]
        environment = {**os.environ, **large_pages()}  # as the runner starts stages
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AlignError(f"{method}: the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        found = estimated(folder, method, lora)
        return json.loads(done.stdout.splitlines()[-1]), found.peak, found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", nargs=3)
    parser.add_argument("--only", nargs="+", default=[*SIZES, *STAGES])
    options = parser.parse_args(arguments)
    if options.measure:
        measure(*options.measure)
        return
    sizes = [size for size in (*SIZES, *OTHERS) if size in options.only] or list(SIZES)
    methods = [method for method in STAGES if method in options.only] or list(STAGES)
    print("| size | stage | trained | measured, MB | estimated, MB | off by | phase |\n|---|---|---|---|---|---|---|")
    for size in sizes:
        for method in methods:
            for lora in (False, True):
                measured, guess, found = compare(size, method, lora)
                phase = max(found.parts, key=lambda name: found.parts[name])
                numbers = f"{measured / 2**20:,.0f} | {guess / 2**20:,.0f} | {guess / measured - 1:+.0%}"
                print(f"| {size} | {method} | {'LoRA' if lora else 'all'} | {numbers} | {phase} |", flush=True)


if __name__ == "__main__":
    main()
