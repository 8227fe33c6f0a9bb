"""Preparing data, ours against TRL: ``python -m benchmarks.data [ROWS …]`` (100,000 by default).

Short preference rows in a JSON Lines file are loaded, checked, split by prompt, tokenized and packed; TRL's DPOTrainer loads and
tokenizes them. Each side runs in a process of its own, for its peak memory. Seconds are those of the clock and of the CPU: the
second are the ones to compare where other programs run, and both sides may use every core.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = 3000
MAX_LENGTH = 512
PACK = 8192


def write_rows(path: Path, count: int) -> None:
    """`count` pairs of 5 to 15 made-up words a text, from a fixed seed."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 8))) for _ in range(WORDS)]

    def text(end: str) -> str:
        return " ".join(chance.choices(words, k=chance.randint(5, 15))) + end

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text("?"), "chosen": text("."), "rejected": text(".")}) + "\n")


def tokenizer_of(path: Path) -> Any:
    """A byte-level BPE of 4,000 tokens, trained on the first rows."""
    from align.tokenizers import train_bpe

    with path.open(encoding="utf-8") as file:
        texts = [line for line, _ in zip(file, range(2000), strict=False)]
    return train_bpe(texts, vocab_size=4000)


def ours(path: Path) -> dict[str, Any]:
    from align.encode import Encoder
    from align.forest import WINDOW, pack
    from align.progress import History
    from align.stages import RewardModel
    from align.stages.base import Context
    from align.stages.rows import encoded, rows_of

    tokenizer = tokenizer_of(path)
    folder = path.parent / "ours"
    folder.mkdir()
    context = Context("data", folder, History(folder / "metrics.jsonl"))
    stage = RewardModel(model="none", data=[str(path)], held_out=0.05, max_length=MAX_LENGTH, streaming=True)
    laps = {}
    start = time.perf_counter()
    rows, held = rows_of(stage, "preference", context)
    laps["load, check, split"] = time.perf_counter()
    encoder = Encoder(tokenizer, MAX_LENGTH)
    trees = [encoded(encoder.preference, part, "data") for part in (rows, held)]
    laps["tokenize"] = time.perf_counter()
    packs = tokens = 0
    for part in trees:
        for first in range(0, len(part), WINDOW):
            window = part[first : first + WINDOW]
            packs += len(pack(window, PACK))
            tokens += sum(tree.tokens for tree in window)
    laps["pack"] = time.perf_counter()
    before = start
    for name, now in laps.items():
        laps[name], before = round(now - before, 1), now
    return {"rows": len(rows) + len(held), "tokens": tokens, "packs": packs, "laps": laps}


def theirs(path: Path) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = tokenizer_of(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
    parts = data.train_test_split(test_size=0.05, seed=0)
    arguments = DPOConfig(output_dir=str(path.parent / "trl"), max_length=MAX_LENGTH, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = DPOTrainer(
        LlamaForCausalLM(config),
        ref_model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=tokenizer,
    )
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    first = trainer.train_dataset[0]
    return {"rows": len(trainer.train_dataset) + len(trainer.eval_dataset), "columns": [name for name in columns if name in first]}


def measure(side: str, path: Path) -> dict[str, Any]:
    """Run one side in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.data", "--side", side, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def one_side(side: str, path: Path) -> None:
    import align.stages.training  # noqa: F401  what both sides need is loaded before the clock starts

    start, cpu = time.perf_counter(), _cpu()
    result = {"ours": ours, "trl": theirs}[side](path)
    result["seconds"], result["cpu_seconds"] = round(time.perf_counter() - start, 1), round(_cpu() - cpu, 1)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(result))


def _cpu() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", type=int, default=[100_000])
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["ours", "trl"], help="run one side alone")
    options = parser.parse_args()
    if options.side:
        one_side(options.side[0], Path(options.side[1]))
        return
    print(f"{'rows':>10} {'side':>5} {'rows/s':>8} {'rows/CPU-s':>10} {'seconds':>8} {'peak MB':>8}")
    for count in options.rows:
        for side in ("ours", "trl") if options.only is None else (options.only,):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "rows.jsonl"
                write_rows(path, count)
                found = measure(side, path)
            rates = count / found["seconds"], count / found["cpu_seconds"]
            print(
                f"{count:>10,} {side:>5} {rates[0]:>8,.0f} {rates[1]:>10,.0f} {found['seconds']:>8} {found['peak_mb']:>8}",
                flush=True,
            )
            print(f"{'':>10} {json.dumps({key: found[key] for key in found if key in ('laps', 'tokens', 'packs', 'columns')})}")


if __name__ == "__main__":
    main()
