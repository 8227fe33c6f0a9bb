"""PPO against TRL 1.12's, which maintains none since: a separate critic, a shared trunk, and LoRA with one base for four roles.

Both sides get the same prompts, hyperparameters and reward model. Each run is a process of its own, in turns. TRL 1.12 lies beside
the installed one, in the folder that ALIGN_TRL_112 names.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from align.allocator import keep_memory, large_pages
from align.budget import Budget
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.progress import History, say
from align.rollout import Completion, Sampling
from align.scoring import branch_scores
from align.trainers.ppo.adapters import REWARD, AdapterReward, critic_on_base
from align.trainers.ppo.critics import POLICY, SeparateCritic, SharedCritic, ValueHead
from align.trainers.ppo.models import Models
from align.trainers.ppo.trainer import PPOTrainer
from align.trainers.settings import PPOSettings
from align.tuning.strategies import Tuning
from align.tuning.tune import tune
from benchmarks.compare import Row
from benchmarks.gemm import Arithmetic, gemm_rate
from benchmarks.probe import ROOT, peak_mb
from benchmarks.work import DATA, EOS, LLAMA_14M, VOCABULARY, Job, build

NAMES = ("ppo_separate", "ppo_shared", "ppo_lora")
BATCH, NEW_TOKENS, LONGEST_PROMPT, EPOCHS = 16, 64, 256, 4
ROUNDS = 4
"""Rounds that are timed."""
SETTINGS = {"num_ppo_epochs": EPOCHS, "kl_coef": 0.05, "gamma": 1.0, "lam": 0.95, "missing_eos_penalty": 1.0}
LEARNING_RATE = 1e-5
TEMPERATURE = 1.0
MAX_TOKENS = {"ppo_separate": 8192, "ppo_shared": 8192, "ppo_lora": 1024}
"""Tokens in a forest: what the stages take unless told otherwise, and fewer for LoRA, which is chosen for its memory and, without
gradients of the base to add up, is no slower for it.
"""
TOLERANCE = 1e-3
INSTALL = "pip install --no-deps --target FOLDER 'trl==1.12.*', then ALIGN_TRL_112=FOLDER"


@dataclass(frozen=True)
class Outcome:
    """A finished run."""

    seconds: float
    """Of all rounds but the first, which warms up."""
    peak_mb: float
    log: list[dict[str, float]]
    prompts: list[list[int]] = field(default_factory=list)
    """Lengths of each round's, as our side drew them."""


def trl_112() -> str | None:
    """Where TRL 1.12 lies, if anywhere."""
    folder = os.environ.get("ALIGN_TRL_112")
    return folder if folder and (Path(folder) / "trl" / "experimental" / "ppo").is_dir() else None


def prompts(count: int) -> list[list[int]]:
    """The first `count` prompts of hh-rlhf with at most `LONGEST_PROMPT` tokens, each once."""
    found = {tuple(tree.prompt): None for tree in DATA["hh"].trees() if len(tree.prompt) <= LONGEST_PROMPT}
    chosen = [list(prompt) for prompt in found][:count]
    if len(chosen) < count:
        raise AlignError(f"{len(chosen)} prompts of at most {LONGEST_PROMPT} tokens; {count} are needed")
    return chosen


def save_models(folder: Path) -> None:
    """Four models with random weights. Scores and values are small, as they are when training begins."""
    for seed, (name, method) in enumerate({"policy": "dpo", "critic": "reward", "reward": "reward"}.items()):
        build(Job(method, LLAMA_14M, [], seed=seed)).save_pretrained(folder / name)  # type: ignore[operator]
    (folder / "reference").symlink_to(folder / "policy")


def write_job(folder: Path, rounds: int, completions: list[list[int]] | None) -> None:
    job = {
        "vocabulary": VOCABULARY,
        "temperature": TEMPERATURE,
        "prompts": prompts(BATCH * rounds),
        "completions": completions,
        "new_tokens": NEW_TOKENS,
        "batch": BATCH,
        "rounds": rounds,
        "settings": {**SETTINGS, "learning_rate": LEARNING_RATE},
    }
    (folder / "job.json").write_text(json.dumps(job))


def run(folder: Path, side: str, name: str) -> Outcome:
    """The job in `folder` on `side` (``ours`` or ``theirs``), in a fresh process.

    Raises:
        AlignError: the process failed.
    """
    command, path = [sys.executable, "-m", "benchmarks.ppo", str(folder), name], str(ROOT)
    if side == "theirs":
        command, path = [sys.executable, "-m", "benchmarks.trl_ppo", str(folder)], f"{trl_112()}:{ROOT}"
    environment = {**os.environ, "PYTHONPATH": path, **(large_pages() if side == "ours" else {})}  # as the runner starts stages
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AlignError(f"{name}, {side}: the process ended with code {done.returncode}:\n{done.stderr[-2000:]}")
    return Outcome(**json.loads((folder / "result.json").read_text()))


def check(folder: Path) -> float:
    """One round on given completions, with a separate critic: how far apart the losses of the two sides are.

    Raises:
        AlignError: further than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(3, VOCABULARY, (BATCH, NEW_TOKENS), generator=generator).tolist()
    write_job(folder, 1, given)
    ours, theirs = (run(folder, side, NAMES[0]).log[0] for side in ("ours", "theirs"))
    names = ("loss/value_avg", "objective/scores", "objective/rlhf_reward")
    worst = max(abs(ours[name] - theirs[name]) / abs(theirs[name]) for name in names)
    if not worst <= TOLERANCE:
        shown = ", ".join(f"{name} {ours[name]:.6f} and {theirs[name]:.6f}" for name in names)
        raise AlignError(f"PPO: the two sides do not compute the same thing: {shown} (ours and theirs). Nothing was timed")
    return worst


def measure(names: Sequence[str], repeats: int, rounds: int | None = None) -> list[Row]:
    """Check, then time each of `names` and TRL in turns; one line and no row where TRL 1.12 is not here."""
    if trl_112() is None:
        say(f"{', '.join(names)}: skipped, as TRL 1.12 is not here ({INSTALL})")
        return []
    rounds = (rounds or ROUNDS) + 1
    with tempfile.TemporaryDirectory(prefix="align-bench-") as temporary:
        folder = Path(temporary)
        save_models(folder)
        difference = check(folder)
        say(f"ppo: losses differ by {difference:.0e}; timing {repeats} x {rounds - 1} rounds of each side")
        write_job(folder, rounds, None)
        outcomes: dict[str, list[Outcome]] = {side: [] for side in ("theirs", *names)}
        rates = []
        arithmetic, trees = Arithmetic.of(Job("dpo", LLAMA_14M, [])), _trees(rounds)
        for repeat in range(repeats):
            rates.append(gemm_rate(arithmetic, trees))
            turns = list(outcomes) if repeat % 2 == 0 else list(reversed(outcomes))
            for side in turns:
                outcomes[side].append(run(folder, "theirs" if side == "theirs" else "ours", side))
                say(f"{side}: {repeat + 1}: {outcomes[side][-1].seconds:.1f} s")
    return [_row(name, outcomes[name], outcomes["theirs"], rounds - 1, statistics.median(rates), difference) for name in names]


def _trees(rounds: int) -> list[Tree]:
    return [Tree(prompt, ([EOS] * NEW_TOKENS,)) for prompt in prompts(BATCH * rounds)[:BATCH]]


def _row(name: str, ours: list[Outcome], theirs: list[Outcome], rounds: int, rate: float, difference: float) -> Row:
    fast, slow = ([BATCH * rounds / outcome.seconds for outcome in side] for side in (ours, theirs))
    lean, large = (statistics.median(outcome.peak_mb for outcome in side) for side in (ours, theirs))
    update = statistics.median(record["time/update"] for outcome in ours for record in outcome.log[1:])
    sample = statistics.median(record["time/sample"] for outcome in ours for record in outcome.log[1:])
    return Row(
        name,
        "episodes/s",
        statistics.median(fast),
        statistics.median(slow),
        statistics.median(fast) / statistics.median(slow),
        lean,
        large,
        lean / large,
        gemm_fraction=statistics.median(map(partial(_update_rate, name), ours)) / rate if name != "ppo_lora" else None,
        gemm_gflops=rate / 1e9,
        loss_difference=difference if name == NAMES[0] else None,
        runs_ours=tuple(fast),
        runs_theirs=tuple(slow),
        note=f"Of a round, sampling takes {sample:.2f} s and the update {update:.2f} s; the GEMM fraction is the update's. "
        f"TRL 1.12 holds four full models. Our forests have at most {MAX_TOKENS[name]:,} tokens.",
    )


# -- our side, in its process ----------------------------------------------------------------------------------------------------


def _models(folder: Path, name: str) -> tuple[Models, Any]:
    """The roles of benchmark `name`, and the reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def load(auto: Any, role: str) -> Any:
        model = auto.from_pretrained(folder / role)
        if reason := enable_forest(model):
            raise AlignError(f"{role} would run on padded rows, as {reason}; nothing was measured")
        return model

    policy = load(AutoModelForCausalLM, "policy")
    if name == "ppo_lora":
        tuned: Any = tune(policy, Tuning("lora", {"r": 16}))
        enable_forest(tuned)
        tuned.add_adapter(REWARD, tuned.peft_config[POLICY])
        judge = AdapterReward(tuned, ValueHead(tuned))
        return Models(tuned, critic_on_base(tuned, None), temperature=TEMPERATURE), judge
    reward = load(AutoModelForSequenceClassification, "reward").requires_grad_(False)
    if name == "ppo_shared":
        return Models(policy, SharedCritic(ValueHead(policy)), temperature=TEMPERATURE), reward
    critic = SeparateCritic(load(AutoModelForSequenceClassification, "critic"))
    return Models(policy, critic, temperature=TEMPERATURE), reward


def _update_rate(name: str, outcome: Outcome) -> float:
    """Useful operations per second of the updates alone: forward and backward of the policy, and of a critic that has a pass of its
    own, in each epoch; but for their first forward passes, which the estimate before has made.
    """
    policy = Arithmetic.of(Job("dpo", LLAMA_14M, []))
    critic = replace(Arithmetic.of(Job("reward", LLAMA_14M, [])), head_at_ends=False)  # it values every token
    learners = [policy, critic] if name == "ppo_separate" else [policy]
    needed = seconds = 0.0
    for lengths, record in zip(outcome.prompts[1:], outcome.log[1:], strict=True):
        trees = [Tree([EOS] * length, ([EOS] * NEW_TOKENS,)) for length in lengths]
        needed += sum(EPOCHS * each.training(trees, reference=False) - sum(map(each.forward, trees)) for each in learners)
        seconds += record["time/update"]
    return needed / seconds


def main(folder: Path, name: str) -> None:
    """Run the job in `folder`, and write what came out."""
    keep_memory()  # as in a stage's process
    job = json.loads((folder / "job.json").read_text())
    models, reward = _models(folder, name)
    settings = {key: value for key, value in job["settings"].items() if key != "learning_rate"}
    parameters = [p for named in models.parameters().values() for p in named.values()]
    optimizer = torch.optim.AdamW(parameters, lr=job["settings"]["learning_rate"], weight_decay=0.0, fused=True)
    max_tokens = MAX_TOKENS[name]
    budget, ends, taken = Budget(max_tokens), list[float](), list[list[int]]()

    def score(indices: list[int], completions: list[Completion]) -> tuple[list[float], dict[str, float]]:
        taken.append([len(job["prompts"][i]) for i in indices])
        trees = [Tree(job["prompts"][i], (c.tokens,)) for i, c in zip(indices, completions, strict=True)]
        return [value for (value,) in branch_scores(reward, trees, budget)], {}

    trainer = PPOTrainer(
        models,
        job["prompts"],
        score,
        PPOSettings(total_episodes=job["batch"] * job["rounds"], episodes_per_step=job["batch"], num_mini_batches=1, **settings),
        sampling=Sampling(job["new_tokens"], temperature=job["temperature"], batch_size=job["batch"]),
        stop_ids=[],  # both sides sample as many as they may
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0),
        history=History(folder / "metrics.jsonl"),
        max_tokens=max_tokens,
        max_grad_norm=1e9,
        seed=0,
    )
    if job["completions"]:
        given = {tuple(p): Completion(c, False) for p, c in zip(job["prompts"], job["completions"], strict=True)}
        trainer.sample = lambda prompts: [given[tuple(prompt)] for prompt in prompts]  # type: ignore[method-assign]

    def ended(step: int) -> bool:
        ends.append(time.perf_counter())
        return False

    trainer.train(after_step=ended)
    log = [record for record in trainer.history.records if "episode" in record][-job["rounds"] :]
    result = {"seconds": ends[-1] - ends[0], "peak_mb": peak_mb(), "log": log, "prompts": taken}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
