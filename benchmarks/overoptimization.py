"""A reward model's score against the gold reward it stands for, as a policy is pushed away from its start:
``python -m benchmarks.overoptimization [--pairs 60] [--seed 0] [--out runs/overoptimization]``.

In the demo's world a reward model learns from few pairs, and PPO is paid by it at a low price of divergence. Gold, the world's
programmatic reward, has weight 0: it is measured on the same answers, and nobody is paid for it (Gao et al., arXiv:2210.10760).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.diagnostics import ask
from align.diagnostics.doctor import cases, patients
from align.pipeline import Run
from align.recipe import Recipe, load_recipe

PARENTS = ("world", "base", "sft")
"""Stages of the demo that are taken as they are."""


def recipe(pairs: int, seed: int, rounds: int, kl_coef: float) -> Recipe:
    """The demo up to SFT, a reward model on the pairs of so many prompts, and PPO against it."""
    demo = load_recipe("demo", {"seed": str(seed)}).stages
    sampled = demo["pairs"].model_copy(update={"max_rows": pairs})
    files = {"data": ["pairs/preferences.jsonl"], "eval_data": ["pairs/held_out.jsonl"]}
    judge = demo["reward"].model_copy(update={**files, "num_train_epochs": 4.0})
    paid = {
        "reward_funcs": [{"reward": sampled.reward_funcs[0], "weight": 0.0}],  # type: ignore[attr-defined]
        "total_episodes": rounds * 128,
        "kl_coef": kl_coef,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "lr_scheduler_kwargs": {},
    }
    ppo = type(demo["ppo"]).model_validate({**demo["ppo"].model_dump(exclude_unset=True), **paid})
    return Recipe("overoptimization", {**{name: demo[name] for name in PARENTS}, "pairs": sampled, "reward": judge, "ppo": ppo})


def parts(records: Sequence[Mapping[str, Any]], count: int = 10) -> Iterator[tuple[int, float, float, float]]:
    """Last round, and means of divergence, proxy and gold, of `count` equal parts of the run."""
    rounds = [record for record in records if "objective/kl" in record]
    for i in range(count):
        part = rounds[i * len(rounds) // count : (i + 1) * len(rounds) // count]
        means = (sum(r[n] for r in part) / len(part) for n in ("objective/kl", "rewards/reward_model", "rewards/gold"))
        yield (part[-1]["step"], *means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60, help="prompts whose best and worst answer make a pair")
    parser.add_argument("--rounds", type=int, default=60, help="of 128 episodes")
    parser.add_argument("--kl_coef", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimization"), help="a demo's folder lends its first stages")
    options = parser.parse_args()
    artifacts = Run(recipe(options.pairs, options.seed, options.rounds, options.kl_coef), options.out).execute()
    (case,) = cases(patients(artifacts["ppo"].path))
    print(f"reward model: {artifacts['pairs'].metrics['preferences_pairs']} pairs, ", end="")
    print(f"right on {artifacts['reward'].metrics['eval_accuracy']:.1%} of held-out pairs\n")
    print("| rounds | KL to SFT, nats | proxy | gold |\n|---|---|---|---|")
    for last, kl, proxy, gold in parts(case.records):
        print(f"| {last} | {kl:.2f} | {proxy:.3f} | {gold:.3f} |")
    for finding in ask(case):
        print(f"\n{finding.rule} ({finding.verdict}): {finding.diagnosis.cause}")


if __name__ == "__main__":
    main()
