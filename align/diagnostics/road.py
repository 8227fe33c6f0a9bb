"""Rules that need more than one stage: what a model has lost against the one it was trained from."""

from __future__ import annotations

from typing import Any, TypeGuard

from align.diagnostics.case import POLICIES, Case, Diagnosis, figure, rule

FORGOTTEN = 1.5
"""Perplexity on the same held-out text, against that of the model it was trained from."""
WORDIER = 1.6
"""Tokens in an answer, against those of the model it was trained from."""


@rule("pretrain", "sft", "preference", "kto", *POLICIES, verdict="forgetful")
def forgetting(case: Case) -> Diagnosis | None:
    """What the model knew before has become much less likely."""
    what, then, now = max(_before_and_after(case), key=lambda found: found[2] / found[1], default=("", 1.0, 0.0))
    if now < FORGOTTEN * then:
        return None
    changes = case.slower(5) | (case.closer(4) if case.kind in POLICIES else {})
    return Diagnosis(
        {"perplexity_before": then, "perplexity_after": now, "learning_rate": case.learning_rate},
        f"perplexity on {what} went from {figure(then)} to {figure(now)}: what the model learned overwrote what it knew",
        f"lower learning_rate to {changes['learning_rate']:.1e}, train a LoRA adapter (use_peft), or mix rows of the earlier kind "
        "into the data",
        changes,
    )


def _before_and_after(case: Case) -> list[tuple[str, float, float]]:
    """Each text whose perplexity was measured before and after: by the stage's own probes, or by the run's evaluations."""
    found = [("the evaluation's rows", case.reference.get("perplexity"), case.measured.get("perplexity"))]
    for name, before in case.metrics.items():
        if name.startswith("probe/") and name.endswith("/perplexity_before"):
            found.append((f"the probe {name.split('/')[1]}", before, case.metrics.get(name.removesuffix("_before"))))
    return [(what, then, now) for what, then, now in found if _positive(then) and _positive(now)]


def _positive(perplexity: Any) -> TypeGuard[float]:
    """Whether it was measured, and is a number."""
    return isinstance(perplexity, int | float) and perplexity > 0


@rule("preference", "kto", verdict="degenerate")
def length_exploited(case: Case) -> Diagnosis | None:
    """Sampled answers are much longer than those of the model it was trained from."""
    now, then = case.measured.get("mean_completion_tokens"), case.reference.get("mean_completion_tokens")
    if not isinstance(now, int | float) or not isinstance(then, int | float) or now < WORDIER * then:
        return None
    changes, advice = case.slower(2), "take pairs of like lengths"
    if case.kind == "preference":
        advice = "take a loss that forgets length (ld_dpo with alpha 0, dpo_norm, simpo), or pairs of like lengths"
        if case.config.get("loss", "dpo") == "dpo" and not case.config.get("label_smoothing"):
            changes |= case.by_loss("ld_dpo", alpha=0.0)
    return Diagnosis(
        {"tokens_before": then, "tokens_after": now},
        f"answers went from {then:.0f} to {now:.0f} tokens: longer was the easiest way to be like the chosen answers",
        advice,
        changes,
    )
