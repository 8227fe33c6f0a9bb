"""Reward against divergence for PPO, RLOO, GRPO and best-of-n on stories260k:
``python -m benchmarks.reward_kl [--seeds 0 1 2] [--plot docs/images/reward_kl.png]``.

The reward counts how often a story says "happy". Every round of a training is a point: the mean reward of its 64 answers at their
mean log π/π_ref. Where ALIGN_TRL_112 names the folder of a TRL 1.12, its PPO does the same work. Best-of-n needs no training: the
expected reward of the best of n answers of the start, and the divergence log n − (n − 1)/n, which ties make smaller
(arXiv:2401.01879).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from operator import mul
from pathlib import Path
from typing import Any

import torch

from align.data import load_rows, write_rows
from align.encode import Encoder
from align.engine import enable_forest
from align.models import load_causal_lm, load_tokenizer, stop_token_ids
from align.pipeline import Run
from align.recipe import Recipe
from align.rollout import Sampling, complete
from align.stages import PPO
from benchmarks.ppo import ROOT, trl_112
from benchmarks.tasks import REAL

TOKENS, OPENINGS, EPISODES = 48, 64, 64
SETTINGS: dict[str, Any] = {"learning_rate": 3e-4, "lr_scheduler_type": "constant_with_warmup", "kl_coef": 0.02}
GROUPS = {"num_generations": 4, "whiten_advantages": False}
METHODS: dict[str, dict[str, Any]] = {
    "PPO": {"critic_learning_rate": 1e-3},
    "RLOO": {"advantage_estimator": "rloo", **GROUPS},
    "GRPO": {"advantage_estimator": "grpo", "kl_in": "loss", "kl_estimator": "k3", "loss_average": "completions", **GROUPS},
}
LEVELS = (1.0, 2.0, 3.0, 8.0, 16.0)
"""Divergences (nats an answer) at which the methods are compared."""
NUMBERS = (1, 2, 4, 8, 16, 32, 64)

Curve = list[tuple[float, float]]
"""Divergence and reward."""


def happy(prompts, completions, **columns):
    """How often a story says "happy", at most three times, from 0 to 1."""
    return [min(3, text.lower().count("happy")) / 3 for text in completions]


def openings(real: Path, file: Path) -> Path:
    """The first sentences of stories, as prompts."""
    stories = load_rows(real / "text/tinystories_train_head.txt", "text").rows
    first = {f"{row.text.strip().split('.')[0]}.": None for row in stories}
    write_rows(file, [{"prompt": text} for text in first if len(text.split()) <= 16][:OPENINGS])
    return file


def trained(model: str, prompts: Path, folder: Path, seeds: Sequence[int], rounds: int) -> dict[str, list[Curve]]:
    """A curve of each method and seed."""
    stages = {
        f"{name.lower()}{seed}": PPO(
            model=model,
            data=str(prompts),
            reward_funcs=[happy],
            held_out=0.0,
            total_episodes=rounds * EPISODES,
            episodes_per_step=EPISODES,
            max_completion_length=TOKENS,
            seed=seed,
            **SETTINGS,
            **settings,
        )
        for seed in seeds
        for name, settings in METHODS.items()
    }
    paths = {name: Path(artifact.path) for name, artifact in Run(Recipe("reward-kl", stages), folder).execute().items()}
    return {name: [curve(paths[f"{name.lower()}{seed}"]) for seed in seeds] for name in METHODS}


def curve(folder: Path) -> Curve:
    """The rounds of a training."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["objective/kl"], r["objective/scores"]) for r in records if "objective/kl" in r]


def of_trl(model: str, prompts: Path, folder: Path, seed: int, rounds: int) -> Curve:
    """The rounds of TRL 1.12's PPO: its defaults, and the learning rate, price of divergence, mini-batches and passes of ours."""
    job = {
        "model": model,
        "prompts": encoded(model, prompts),
        "seed": seed,
        "episodes": EPISODES,
        "rounds": rounds,
        "new_tokens": TOKENS,
        "settings": {**SETTINGS, "num_mini_batches": 4, "num_ppo_epochs": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": f"{trl_112()}:{ROOT}"}
    subprocess.run([sys.executable, "-m", "benchmarks.reward_kl_trl", str(folder / "job.json")], env=environment, check=True)
    return [(kl, reward) for kl, reward in json.loads((folder / "curve.json").read_text())]


def encoded(model: str, prompts: Path) -> list[list[int]]:
    """The prompts as token ids."""
    return [tree.prompt for tree in Encoder(load_tokenizer(model), 512).prompts(load_rows(prompts, "prompts").rows).trees]


def best_of(model_path: str, prompts: Path, seed: int) -> Curve:
    """The expected reward of the best of n out of 64 answers to each prompt."""
    tokenizer, model = load_tokenizer(model_path), load_causal_lm(model_path)
    enable_forest(model)
    ids = encoded(model_path, prompts)
    most, generator = NUMBERS[-1], torch.Generator().manual_seed(seed)
    asked = [prompt for prompt in ids for _ in range(most)]
    answers = complete(model, asked, Sampling(TOKENS), stop_token_ids(model, tokenizer), generator)
    rewards = happy(asked, [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers])
    groups = [sorted(rewards[i : i + most]) for i in range(0, len(rewards), most)]
    expected = {n: statistics.fmean(sum(map(mul, best_weights(most, n), group)) for group in groups) for n in NUMBERS}
    return [(math.log(n) - (n - 1) / n, reward) for n, reward in expected.items()]


def best_weights(count: int, n: int) -> list[float]:
    """The probability of each of `count` sorted values to be the largest of `n` that are drawn without putting back."""
    return [math.comb(i, n - 1) / math.comb(count, n) for i in range(count)]


def at(points: Curve, level: float) -> float | None:
    """The mean reward of the rounds within a quarter of `level`; None where there are none."""
    near = [reward for kl, reward in points if abs(kl - level) <= level / 4]
    return statistics.fmean(near) if near else None


def table(curves: dict[str, list[Curve]]) -> str:
    """Mean and range over the seeds of the reward at each of `LEVELS`."""
    lines = [f"| | {' | '.join(f'{level:g} nats' for level in LEVELS)} |", "|---" * (len(LEVELS) + 1) + "|"]
    for name, runs in curves.items():
        cells = []
        for level in LEVELS:
            values = [value for run in runs if (value := at(run, level)) is not None]
            cells.append(f"{statistics.fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})" if values else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """All curves on one plot."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 8}):
        figure = Figure(figsize=(5.0, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for number, (name, runs) in enumerate(curves.items()):
            for label, points in zip([name, *[None] * (len(runs) - 1)], runs, strict=True):
                axes.plot(*zip(*points, strict=True), color=f"C{number}", linewidth=1.0, marker="o", markersize=2.2, label=label)
        axes.set_xlabel("divergence from the start, nats an answer")
        axes.set_ylabel("reward")
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=24, help="of 64 episodes")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_kl"), help="finished trainings there are not run again")
    parser.add_argument("--plot", type=Path, default=Path("docs/images/reward_kl.png"))
    options = parser.parse_args()
    model = str(REAL / "models/stories260k")
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = openings(REAL, options.out / "openings.jsonl")
    curves = trained(model, prompts, options.out, options.seeds, options.rounds)
    if trl_112():
        folders = {seed: options.out / f"trl{seed}" for seed in options.seeds}
        curves["PPO of TRL 1.12"] = [of_trl(model, prompts, folder, seed, options.rounds) for seed, folder in folders.items()]
    curves["best of n"] = [best_of(model, prompts, seed) for seed in options.seeds]
    draw(curves, options.plot)
    print(table(curves))
    for (kl, _), n in zip(curves["best of n"][0], NUMBERS, strict=True):
        rewards = [points[NUMBERS.index(n)][1] for points in curves["best of n"]]
        print(f"best of {n}: at most {kl:.2f} nats, reward {statistics.fmean(rewards):.3f}")


if __name__ == "__main__":
    main()
