"""What a rule is: a function from what is known of one stage to what it says about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

from align.catalog import Catalog
from align.diagnostics.series import Series

Verdict = Literal["failed", "unstable", "overfit", "underfit", "degenerate", "forgetful"]

LANGUAGE = ("pretrain", "sft")
PAIRS = ("preference", "reward")
SUPERVISED = (*LANGUAGE, *PAIRS, "kto")
"""Stages that train on a data set with transformers' Trainer."""
POLICIES = ("ppo", "grpo", "rloo")
"""Stages that sample the policy they train. TRL's engine logs under other names, of which the rules know nothing."""


@dataclass(frozen=True)
class Case:
    """One stage as the doctor sees it."""

    name: str
    kind: str
    """Name of the stage in the catalog."""
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    """The lines of its ``metrics.jsonl``."""
    folder: Path | None = None
    running: bool = False
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """What it registered when it was finished."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """What the run's evaluations say of its model."""
    reference: Mapping[str, Any] = field(default_factory=dict)
    """What they say of the model that it is compared with: the evaluation's reference, or what this one was trained from."""
    curvature: Mapping[str, Any] = field(default_factory=dict)
    """``curvature.json`` of its model, where it was measured."""

    def series(self, name: str) -> Series:
        """What was logged under `name`."""
        return Series.of(self.records, name)

    @cached_property
    def loss(self) -> Series:
        """The training loss."""
        return self.series("loss")

    @cached_property
    def held_out(self) -> Series:
        """The held-out loss; its first value is from before training."""
        return self.series("eval_loss")

    @property
    def start(self) -> float:
        """The loss before training: held-out where it was measured, else the first of training."""
        return self.held_out.first if len(self.held_out) else self.loss.first

    @property
    def end(self) -> float:
        """The loss after training."""
        return self.held_out.last if len(self.held_out) else self.loss.tail()

    @property
    def falls(self) -> bool:
        """Whether the loss is on its way down beyond doubt: every held-out loss lower than the one before, or a slope of the
        training loss of more than three standard errors.
        """
        held = self.held_out.values
        if len(held) >= 4 and all(later < earlier for earlier, later in pairwise(held)):
            return True
        slope, error = self.loss.slope()
        return slope < -3 * error

    @property
    def learning_rate(self) -> float:
        """The peak learning rate; 0 where the stage has none."""
        return float(self.config.get("learning_rate") or 0.0)

    @property
    def keeps_best(self) -> bool:
        """Whether the weights are those of the best evaluation, not the last ones."""
        return bool(self.config.get("load_best_model_at_end")) or self.config.get("early_stopping_patience") is not None

    @property
    def batch(self) -> int:
        """Rows of an optimizer step, on all devices."""
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        rows = math.prod(int(self.config.get(name, 1)) for name in names)
        return rows * int((self.config.get("launch") or {}).get("num_processes", 1))

    def longer(self, factor: float) -> dict[str, Any]:
        """The change that trains `factor` times as long."""
        if int(self.config.get("max_steps") or -1) > 0:
            return {"max_steps": max(1, round(self.config["max_steps"] * factor))}
        return {"num_train_epochs": rounded(float(self.config.get("num_train_epochs", 1.0)) * factor)}

    def slower(self, factor: float) -> dict[str, Any]:
        """The change that trains at a learning rate `factor` times lower."""
        return {"learning_rate": rounded(self.learning_rate / factor)}

    def by_loss(self, loss: str, **parameters: Any) -> dict[str, Any]:
        """The change to another preference loss with its `parameters`; those that only the old one takes are left out."""
        old = {name: None for name in ("rpo_alpha", "label_smoothing") if self.config.get(name) is not None}
        return {"loss": loss, **old, **parameters}

    @property
    def price(self) -> str:
        """The field that says what a policy pays for leaving its reference."""
        return "kl_coef" if self.kind == "ppo" else "beta"

    def closer(self, factor: float) -> dict[str, Any]:
        """The change that makes a policy pay `factor` times as much for leaving its reference."""
        return {self.price: rounded(max(float(self.config.get(self.price, 0.05)), 0.02) * factor)}


@dataclass(frozen=True)
class Diagnosis:
    """What a rule says: numbers, why, and what to do."""

    evidence: Mapping[str, float]
    cause: str
    """Plain words."""
    advice: str
    """The knob to turn."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the stage and their suggested values; empty where no field mends it."""


def rounded(value: float) -> float:
    """`value` to two digits: no suggestion is more exact."""
    return float(f"{value:.2g}")


def figure(value: float) -> str:
    """A number of the evidence as people read it: a count (of steps, say) whole, anything else to four digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"


@dataclass(frozen=True)
class Finding:
    """A diagnosis with the rule that made it and the stage that it is about."""

    rule: str
    stage: str
    verdict: Verdict
    diagnosis: Diagnosis

    def as_dict(self) -> dict[str, Any]:
        d = self.diagnosis
        evidence = {name: float(figure(value)) for name, value in d.evidence.items()}
        return {"rule": self.rule, "stage": self.stage, "verdict": self.verdict, "evidence": evidence} | {
            "cause": d.cause,
            "advice": d.advice,
            "changes": dict(d.changes),
        }


class Rule(Protocol):
    """A rule of the catalog."""

    kinds: tuple[str, ...]
    verdict: Verdict
    live: bool
    explains: frozenset[str]

    def __call__(self, case: Case) -> Diagnosis | None: ...


rules: Catalog[Any] = Catalog("rule")
"""In the order in which the doctor asks them: what is worse, and what explains others, comes first."""


def rule(
    *kinds: str, verdict: Verdict, live: bool = False, explains: Iterable[str] = ()
) -> Callable[[Callable[[Case], Diagnosis | None]], Callable[[Case], Diagnosis | None]]:
    """Register a function as a rule about the stages `kinds`.

    Args:
        live: it may be asked while training goes on.
        explains: rules that are silent where this one speaks, as they would see its consequences.
    """

    def register(function: Callable[[Case], Diagnosis | None]) -> Callable[[Case], Diagnosis | None]:
        marked: Any = function
        marked.kinds, marked.verdict, marked.live, marked.explains = kinds, verdict, live, frozenset(explains)
        return rules.add(marked)

    return register


def examined(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether the rules know what a stage of that kind logs."""
    foreign = kind in POLICIES and config.get("engine") == "trl"
    return not foreign and any(kind in rules[name].kinds for name in rules)


def ask(case: Case) -> list[Finding]:
    """Every rule about `case` that speaks, in the order of the catalog; what asks for more training comes last, as more of a run
    that is wrong is worse.
    """
    found: list[Finding] = []
    explained: set[str] = set()
    for name in rules:
        asked: Rule = rules[name]
        if case.kind not in asked.kinds or name in explained or (case.running and not asked.live):
            continue
        diagnosis = asked(case)
        if diagnosis is not None:
            found.append(Finding(name, case.name, asked.verdict, diagnosis))
            explained |= asked.explains
    left = [finding for finding in found if finding.rule not in explained]  # by one that was asked after it, too
    return sorted(left, key=lambda finding: finding.verdict == "underfit")
