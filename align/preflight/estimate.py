"""Peak memory and time of a stage, before it runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from types import SimpleNamespace
from typing import Any, NamedTuple

from align.budget import START
from align.engine import PROBE_ERRORS
from align.errors import AlignError, first_line
from align.forest import Forest, Tree, plant
from align.models import architecture_config, family_of, load_config
from align.preflight.cards import GB, Machine
from align.preflight.checks import Finding
from align.preflight.memory import LIBRARIES, Skeleton, peak
from align.preflight.subject import Subject
from align.tuning.strategies import SOFT


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds."""

    parts: dict[str, float]
    """Peak of each phase: loading, evaluating, training ..."""
    made_of: dict[str, float]
    """What the phase with the highest peak consists of."""
    states: float
    """Weights, gradients and optimizer, or the whole weights that each process loads: what no smaller pass can save."""
    whole: float
    """The whole weights of what trains, which every process loads, also where it keeps a share of them."""
    tokens: int
    """Tokens in the largest pass."""
    seconds: float | None
    """Of training; None where its rows were not all looked at."""
    machine: Machine
    """What one process has of it."""

    @property
    def peak(self) -> float:
        """Bytes at the worst moment, the libraries' own among them."""
        return max(self.parts.values()) + LIBRARIES

    def line(self) -> str:
        """``peak memory 3.1 GB (training: weights 0.5, ...), about 12 min``."""
        phase = max(self.parts, key=lambda name: self.parts[name])
        held = {**self.made_of, "libraries": LIBRARIES}
        inside = ", ".join(f"{name} {size / GB:.2f}" for name, size in held.items() if size)
        duration = "" if self.seconds is None else f"; about {_duration(self.seconds)}"
        return f"on {self.machine.name}: peak memory {self.peak / GB:.2f} GB while {phase} ({inside}){duration}"

    def plain(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "machine": self.machine.name,
            "peak_bytes": round(self.peak),
            "phases": self.parts,
            "made_of": self.made_of,
            "states_bytes": round(self.states),
            "tokens_per_pass": self.tokens,
            "seconds": self.seconds,
        }

    def findings(self) -> list[Finding]:
        """A warning where memory will be short, an error where no smaller pass helps."""
        memory = f"{self.machine.memory / GB:.1f} GB"
        if self.whole > self.machine.memory:
            need = f"every process loads the whole weights, which alone take {self.whole / GB:.1f} GB of {memory}"
            return [Finding("error", "memory", need, "Set dtype bfloat16, or take a smaller model, or a larger GPU")]
        if self.states > self.machine.memory:
            need = f"weights, gradients and optimizer alone take {self.states / GB:.1f} GB of {memory}"
            less = "Set use_peft, or dtype bfloat16, or take a smaller model"
            return [Finding("error", "memory", need, f"{less}, or more GPUs (launch.strategy fsdp2)")]
        if self.peak > self.machine.memory:
            need = f"the estimated peak is {self.peak / GB:.1f} GB of {memory}"
            less = "Lower max_tokens_per_micro_batch or max_length, set gradient_checkpointing, bf16 or use_peft"
            return [Finding("warning", "memory", need, less)]
        return []


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def estimate(subject: Subject, machine: Machine) -> Estimate:
    """What the stage will take on `machine`, of several processes each.

    Raises:
        AlignError: there is no telling, and why.
    """
    config = _config(subject)
    if config is None:
        raise AlignError("the model, or its tokenizer, is not there yet")
    if hasattr(subject.stage, "task") or family_of(config) != "causal":
        raise AlignError("encoders, encoder-decoders and tasks have none")
    if getattr(subject.stage, "engine", "forest") != "forest":
        raise AlignError("TRL's engine has none")
    if subject.stage.strategy.name in SOFT:
        raise AlignError("virtual tokens in front of the rows have none")
    if not subject.encoded.trees:
        raise AlignError("there are no tokens to train on")
    machine = _part(machine, _launch(subject.stage))
    try:
        return _sampled(subject, config, machine) if subject.kind == "prompts" else _supervised(subject, config, machine)
    except (*PROBE_ERRORS, KeyError) as error:
        raise AlignError(f"{config.model_type} models have none: a pass without weights fails ({first_line(error)})") from error


ALONE = SimpleNamespace(num_processes=1, num_machines=1, strategy="ddp", shards_weights=False)


def _launch(stage: Any) -> Any:
    """The stage's launch, or that of a single process."""
    return getattr(stage, "launch", None) or ALONE


def _part(machine: Machine, launch: Any) -> Machine:
    """What one process has of `machine`: a card of its own, or a share of memory and cores."""
    here = math.ceil(launch.num_processes / launch.num_machines)
    if here == 1:
        return machine
    name = f"{machine.name}, each of {launch.num_processes} processes"
    if machine.gpu:
        return replace(machine, name=name)
    return Machine(name, machine.memory / here, machine.flops / here, machine.flops_bf16 / here, gpu=False)


class Held(NamedTuple):
    """Bytes in one process of a launch."""

    weights: float
    gradients: float
    """Of what is trained. AdamW's two moments are twice that."""
    passing: float
    """What it also holds while it computes: layers that FSDP2 has gathered, or the gradients that DDP sends."""

    @classmethod
    def of(cls, model: Skeleton, launch: Any) -> Held:
        weights, gradients, count = model.weights, float(model.gradients), launch.num_processes
        if launch.shards_weights:
            return cls(weights / count, gradients / count, model.gathered * (1 - 1 / count))
        if launch.strategy == "deepspeed-zero2":
            return cls(weights, gradients / count, 0.0)
        return cls(weights, gradients, gradients if count > 1 else 0.0)


def _config(subject: Subject) -> Any:
    if subject.model is not None:
        return load_config(subject.model, trust_remote_code=subject.stage.trust_remote_code)
    if subject.architecture is not None and subject.encoder is not None:
        return architecture_config({"vocab_size": len(subject.encoder.tokenizer), **subject.architecture})
    return None


def _skeleton(subject: Subject, config: Any, machine: Machine, **changes: Any) -> Skeleton:
    stage = subject.stage
    settings = {
        "dtype": stage.dtype,
        "tuning": stage.strategy,
        "bf16": stage.in_bf16,
        "checkpointing": stage.gradient_checkpointing,
    }
    return Skeleton(config, **{**settings, "gpu": machine.gpu, **changes})


def _rate(stage: Any, machine: Machine) -> float:
    """Floating-point operations a second of the stage's passes."""
    return machine.flops_bf16 if stage.in_bf16 or stage.dtype != "float32" else machine.flops


def _budget(stage: Any) -> int:
    return START if stage.max_tokens_per_micro_batch == "auto" else stage.max_tokens_per_micro_batch


def _largest(trees: Sequence[Tree], rows: int, budget: int) -> tuple[Forest, bool]:
    """A forest as large as the largest pass over so many rows of a step is likely to be, and whether the step takes several."""
    tokens = [tree.tokens for tree in trees]
    together = statistics.fmean(tokens) * rows + 2 * statistics.pstdev(tokens) * math.sqrt(rows)
    return _filled(trees, round(min(budget, together))), together > budget


def _filled(trees: Sequence[Tree], tokens: int) -> Forest:
    """The longest of `trees` and as many others, again and again, as `tokens` have room for."""
    chosen = [max(trees, key=lambda tree: tree.tokens)]
    left = tokens - chosen[0].tokens
    for tree in cycle(trees):
        left -= tree.tokens
        if left < 0:
            break
        chosen.append(tree)
    return plant(chosen)


def _supervised(subject: Subject, config: Any, machine: Machine) -> Estimate:
    stage, launch, trees = subject.stage, _launch(subject.stage), subject.encoded.trees
    model = _skeleton(subject, config, machine, score_head=stage.stage == "reward")
    held = Held.of(model, launch)
    budget, each = _budget(stage), statistics.fmean(tree.tokens for tree in trees)
    rows = stage.per_device_train_batch_size * stage.gradient_accumulation_steps
    forest, several = _largest(trees, rows, budget)
    made = peak([model], forest, times=1 + several) - (model.gradients - held.gradients) + held.passing
    training = {"weights": held.weights, "optimizer": 2 * held.gradients, "gradients and activations": made}
    # Before training, the held-out rows are evaluated, and the reference says what it thinks of all rows.
    before = len(subject.held_out) + (len(subject.rows) if subject.kind in ("preference", "unpaired") else 0)
    read = peak([model], _filled(trees, round(min(budget, each * before))), backward=False)
    parts = {
        "loading": 2.0 * model.weights,
        "evaluating": model.weights + read,
        "training": sum(training.values()),
    }
    looked = subject.encoded.used + subject.encoded.set_aside.total()
    count = len(subject.rows) * len(trees) / looked / launch.num_processes  # a long document gives several
    passed = count * stage.num_train_epochs if stage.max_steps < 0 else stage.max_steps * min(rows, count)
    flops = passed * each * model.parameters * (4 if model.adapted else 6)
    seconds = None if subject.capped and stage.max_steps < 0 else flops / _rate(stage, machine)
    states = max(model.weights, held.weights + 3 * held.gradients)
    return Estimate(parts, training, states, model.weights, forest.tokens, seconds, machine)


def _sampled(subject: Subject, config: Any, machine: Machine) -> Estimate:
    """PPO, GRPO and RLOO: a policy, its reference, a critic where there is one of its own, a reward model where there is one, which
    alone is whole under FSDP2; a policy is while it samples.

    Policy and critic go through their passes one after the other, or through their first ones together where the budget of tokens
    holds both; the policy's gradients are held while the critic's are made.
    """
    stage, trees = subject.stage, subject.encoded.trees
    settings = stage.settings(len(subject.rows)) if hasattr(stage, "settings") else stage  # PPO has its trainer's fields itself
    policy = _skeleton(subject, config, machine)
    frozen = _skeleton(subject, config, machine, tuning=None)
    has_critic = settings.advantage_estimator == "gae" and stage.critic == "separate"
    critic = _skeleton(subject, config, machine, score_head=True) if has_critic else None
    learners = [policy, critic] if critic else [policy]
    launch = _launch(stage)
    held = [Held.of(model, launch) for model in learners]
    episodes = math.ceil(settings.episodes_per_step / launch.num_processes)
    answered = [replace(tree, branches=(tree.prompt[:1] * stage.max_completion_length,)) for tree in trees]
    sizes = [tree.tokens for tree in answered]
    forest, several = _largest(answered, max(1, episodes // settings.num_mini_batches), _budget(stage))

    weights = {
        "weights": float(held[0].weights),
        "critic": float(held[1].weights if critic else 0),
        "reference": float(0 if policy.adapted else held[0].gradients),  # what trains, as it was
        "reward model": float(frozen.weights if stage.reward_model else 0),
    }
    standing, gradients = sum(weights.values()), float(sum(each.gradients for each in held))
    together = settings.num_mini_batches == 1 and not launch.shards_weights and len(learners) * forest.tokens <= _budget(stage)
    made = peak(learners, forest, times=1 + several, together=together) - (sum(model.gradients for model in learners) - gradients)
    made += max(each.passing for each in held) if launch.shards_weights else 0.0
    training = {**weights, "optimizer": 2 * gradients, "gradients and activations": made}
    batch = min(stage.rollout_batch_size, episodes)
    read = peak([policy], plant([max(trees, key=lambda tree: tree.tokens)] * batch), backward=False)
    sampling = policy.cache(batch * max(sizes)) + policy.packed + read + policy.weights - held[0].weights
    parts = {
        "loading": standing + policy.weights,
        "sampling": standing + 2 * gradients + sampling,
        "training": sum(training.values()),
    }
    flops = settings.total_episodes / launch.num_processes * statistics.fmean(sizes) * sum(model.parameters for model in learners)
    known = settings is stage or not subject.capped or stage.max_steps > 0
    seconds = flops * (6 * settings.num_ppo_epochs + 4) / _rate(stage, machine) if known else None
    states = max(policy.weights, standing + 3 * gradients)
    return Estimate(parts, training, states, policy.weights, forest.tokens, seconds, machine)
