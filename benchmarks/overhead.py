"""What the runner costs: ``python -m benchmarks.overhead [--rounds 3]``.

A recipe of eight stages that train tiny models for two steps: run by ``align run`` from nothing (the start of Python, hashing,
processes, registry and report included), run again when it is finished, and its stages called directly in a process that has
imported everything. In turns; the least of each counts, by the clock and, for busy machines, by the time that a core worked for it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from align.data import write_rows
from align.pipeline import Run
from align.recipe import Recipe, load_recipe
from align.registry import Registry
from align.runner.worker import attempt
from align.runner.zygote import PRELOAD
from align.stages import SFT, Preference, Pretrain, RewardModel

ROWS, STAGES = 32, 8
ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def recipe(folder: str) -> Recipe:
    """Eight stages on the rows of `write`."""
    learn = {"max_steps": 2, "num_train_epochs": 99, "max_length": 64}
    pairs = {"model": "sft", "data": f"{folder}/pairs.jsonl", **learn}
    return Recipe(
        "overhead",
        {
            "base": Pretrain(
                architecture=ARCHITECTURE, data=f"{folder}/text.jsonl", vocab_size=300, chat_template="plain", **learn
            ),
            "sft": SFT(model="base", data=f"{folder}/sft.jsonl", **learn),
            "more": SFT(model="sft", data=f"{folder}/sft.jsonl", seed=1, **learn),
            "reward": RewardModel(**pairs),
            "dpo": Preference(loss="dpo", beta=0.1, **pairs),
            "ipo": Preference(loss="ipo", beta=0.1, **pairs),
            "orpo": Preference(loss="orpo", lam=0.1, **pairs),
            "simpo": Preference(loss="simpo", beta=2.0, gamma=1.0, **pairs),
        },
    )


def write(folder: Path) -> None:
    """The rows."""
    numbers = [str(i * 7919 % 1000) for i in range(ROWS)]
    write_rows(folder / "text.jsonl", [{"text": f"the number {n} is here"} for n in numbers])
    write_rows(folder / "sft.jsonl", [{"prompt": f"say {n}", "completion": n} for n in numbers])
    write_rows(folder / "pairs.jsonl", [{"prompt": f"say {n}", "chosen": n, "rejected": f"no {n}"} for n in numbers])


class Spent(NamedTuple):
    """Seconds by the clock, and seconds that a core worked."""

    clock: float
    core: float


def now() -> Spent:
    """Of this process and of all that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Spent(time.monotonic(), sum(usage.ru_utime + usage.ru_stime for usage in used))


def since(start: Spent) -> Spent:
    return Spent(*(after - before for after, before in zip(now(), start, strict=True)))


def by_the_runner(folder: Path, out: Path) -> Spent:
    """``align run``."""
    words = ["run", __file__, "--set", f"folder={folder}", "--out", str(out)]
    environment = {**os.environ, "ALIGN_HOME": str(out.parent), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    start = now()
    subprocess.run([sys.executable, "-m", "align.cli", *words], env=environment, check=True, capture_output=True)
    return since(start)


def directly(folder: Path, out: Path, into: Path) -> Spent:
    """The same stages' `run`, in this process, on the inputs that the runner gave them."""
    work = Run(load_recipe(__file__, {"folder": str(folder)}), out, registry=Registry(out.parent))
    steps = work.plan()
    assert not any(step.runs for step in steps)
    start = now()
    for step in steps:
        (into / step.name).mkdir(parents=True)
        attempt(step.stage, step.name, into / step.name)
    return since(start)


def measure(rounds: int) -> dict[str, Spent]:
    """The least of each way."""
    for module in PRELOAD:
        importlib.import_module(module)
    found: dict[str, list[Spent]] = {"runner": [], "direct": [], "again": []}
    with tempfile.TemporaryDirectory(prefix="align-overhead-") as name:
        work = Path(name)
        write(work)
        for number in range(rounds):
            home = work / f"home{number}"
            found["runner"].append(by_the_runner(work, home / "run"))
            found["again"].append(by_the_runner(work, home / "run"))
            found["direct"].append(directly(work, home / "run", work / f"direct{number}"))
    return {way: Spent(*map(min, zip(*spent, strict=True))) for way, spent in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    result = measure(parser.parse_args().rounds)
    result["a stage"] = Spent(*((a - b) / STAGES for a, b in zip(result["runner"], result["direct"], strict=True)))
    names = {
        "runner": f"{STAGES} stages by the runner",
        "direct": "called directly",
        "a stage": "the runner adds to a stage",
        "again": "the finished run again",
    }
    for way, label in names.items():
        print(f"{label:<28} {result[way].clock:7.2f} s {result[way].core:7.2f} s of a core")


if __name__ == "__main__":
    main()
