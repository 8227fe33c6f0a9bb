"""Continued pretraining on another domain with and without replay: ``python -m benchmarks.forgetting [--steps N]``.

stories260k learns Wikipedia (wikitext-2). What it knew, TinyStories, is a probe of stories that are neither trained on nor
replayed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align.data import load_rows, write_rows
from align.pipeline import Run
from align.recipe import Recipe
from align.stages import Pretrain
from benchmarks.tasks import REAL

SHARES = (0.0, 0.1, 0.3)


def measure(
    folder: Path, steps: int, *, real: Path = REAL, max_length: int = 256, rows: int | None = None, shares: Sequence[float] = SHARES
) -> dict[float, dict[str, Any]]:
    """The metrics of one run for each share of replay; with `rows`, on so many of the new rows and few of the old."""
    stories = load_rows(real / "text/tinystories_train_head.txt", "text").rows
    border = len(stories) * 4 // 5
    write_rows(folder / "replay.jsonl", stories[:border])
    write_rows(folder / "probe.jsonl", stories[border:])
    stages = {
        f"replay{share:g}": Pretrain(
            model=str(real / "models/stories260k"),
            data=[str(real / "text/wikitext2_valid.txt")],
            replay_data=[str(folder / "replay.jsonl")],
            replay=share,
            probes={"stories": str(folder / "probe.jsonl")},
            probe_rows=60 if rows else 200,
            max_rows=rows,
            max_length=max_length,
            max_steps=steps,
            per_device_train_batch_size=16,
            eval_steps=steps,
            learning_rate=1e-3,
        )
        for share in shares
    }
    artifacts = Run(Recipe("forgetting", stages), folder / "out").execute()
    return {share: artifacts[f"replay{share:g}"].metrics for share in shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of 16 blocks of 256 tokens")
    options = parser.parse_args()
    print("| replay | new domain: perplexity before | after | stories: perplexity before | after | accuracy before | after | KL |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for share, found in measure(Path(folder), options.steps).items():
            new = [math.exp(found["eval_loss_before"]), math.exp(found["eval_loss"])]
            old = [found[f"probe/stories/{key}"] for key in ("perplexity_before", "perplexity")]
            known = [found[f"probe/stories/{key}"] for key in ("accuracy_before", "accuracy", "kl")]
            print(f"| {share:.0%} | " + " | ".join(f"{value:.2f}" for value in [*new, *old]), end=" | ")
            print(" | ".join(f"{value:.3f}" for value in known), end=" |\n")


if __name__ == "__main__":
    main()
