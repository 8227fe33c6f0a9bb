"""Rules about preference losses and reward models: what they learn of pairs that nobody asked them to."""

from __future__ import annotations

import math
from typing import Any

from align.diagnostics.case import PAIRS, Case, Diagnosis, rounded, rule

CHANCE, COIN = 0.6, math.log(2)
"""Share of held-out pairs ranked right, and the loss of a coin, that a model which learned nothing does not beat."""
SATURATED_LOSS = 0.02
"""Mean training loss under which a pair has no gradient left to speak of."""
SATURATED_HALF = 0.6
"""Share of training after which that is no surprise."""
FALL_SHARE, FALL_NATS = 0.35, 4.0
"""Fall of the chosen answers' log-probability, of what it was and in nats, that a healthy run does not have."""
LENGTH_RIGHT, LENGTH_WRONG = 0.8, 0.4
"""How well pairs with the longer answer chosen are ranked, and how badly the others, by a model that looks at length."""


@rule("reward", verdict="failed", explains=("saturated", "overfit", "learning_rate_too_low", "loss_flat", "too_few_epochs"))
def chance(case: Case) -> Diagnosis | None:
    """The reward model ranks held-out pairs no better than a coin."""
    held, train = case.series("eval_accuracy"), case.series("accuracy")
    if min(len(held), len(case.loss)) < 2 or len(train) < 4 or held.last > CHANCE or case.end < 0.99 * COIN:
        return None
    if case.falls and train.tail() < 0.8:
        return None  # it is learning, too slowly: that is another rule's
    learned = train.tail() > 0.8
    cause = (
        f"it ranks {train.tail():.0%} of the training pairs right and {held.last:.0%} of the held-out ones: it knows the rows, and "
        "nothing that holds for others"
        if learned
        else f"it ranks {train.tail():.0%} of its own training pairs right: the labels contradict each other, or it cannot see "
        "what they are about"
    )
    changes = case.longer(0.3) if learned else {"learning_rate": rounded(case.learning_rate * 5)}
    return Diagnosis(
        {"held_out_accuracy": held.last, "train_accuracy": train.tail()},
        cause,
        "look at the pairs (`align check`): flipped labels, equal answers; then more rows and fewer passes"
        if learned
        else "look at the pairs (`align check`): flipped labels, equal answers; start from a model that can answer",
        changes,
    )


@rule(*PAIRS, verdict="degenerate", live=True)
def length_biased(case: Case) -> Diagnosis | None:
    """Pairs whose longer answer is the better one are ranked right, and the others wrong."""
    held = [case.series(f"eval_accuracies/chosen_{side}") for side in ("longer", "shorter")]
    train = [case.series(f"accuracies/chosen_{side}") for side in ("longer", "shorter")]
    if min(map(len, held)) < 2 or min(map(len, train)) < 3:
        return None
    longer, shorter = (series.last for series in held)
    side, other = ("longer", "shorter") if longer > shorter else ("shorter", "longer")
    # Held-out pairs may be few: those of training must say the same.
    seen = [(longer, shorter), (train[0].tail(), train[1].tail())]
    liked, disliked = (0, 1) if side == "longer" else (1, 0)
    if min(pair[liked] for pair in seen) < LENGTH_RIGHT or max(pair[disliked] for pair in seen) > LENGTH_WRONG:
        return None
    if held[liked].first >= LENGTH_RIGHT and held[disliked].first <= LENGTH_WRONG:
        return None  # it was so before training: without a reference, the shorter answer is often the likelier one
    reward = case.kind == "reward"
    changes: dict[str, Any] = {}
    if not reward and case.config.get("loss", "dpo") in ("dpo", "rpo", "robust", "hinge"):
        changes = case.by_loss("ld_dpo", alpha=0.0, beta=float(case.config.get("beta") or 0.1))
    return Diagnosis(
        {"right_if_chosen_is_longer": longer, "right_if_chosen_is_shorter": shorter},
        f"it ranks {max(longer, shorter):.0%} of the pairs right whose {side} answer was chosen, and "
        f"{min(longer, shorter):.0%} of the others: it has learned that {side} is better",
        f"give it more pairs whose {other} answer was chosen, or as many of both kinds"
        + ("" if reward else "; a loss that forgets length: ld_dpo with alpha 0, dpo_norm or simpo"),
        changes,
    )


@rule("preference", verdict="degenerate", live=True)
def both_logps_fall(case: Case) -> Diagnosis | None:
    """The chosen answers become much less likely, too: the margin grows by pushing everything down."""
    source = "eval_logps/chosen" if len(case.series("eval_logps/chosen")) > 1 else "logps/chosen"
    chosen, rejected = case.series(source), case.series(source.replace("chosen", "rejected"))
    if len(chosen) < 2 or len(rejected) < 2:
        return None
    fall, other = chosen.first - chosen.last, rejected.first - rejected.last
    if fall < FALL_NATS or fall < FALL_SHARE * abs(chosen.first) or other < fall:
        return None
    changes = case.slower(3)
    plain = case.config.get("loss", "dpo") == "dpo" and not case.config.get("label_smoothing")
    if plain and case.config.get("engine") != "trl":  # which has no such loss
        changes |= case.by_loss("rpo", rpo_alpha=1.0)
    return Diagnosis(
        {
            "chosen_before": chosen.first,
            "chosen_after": chosen.last,
            "rejected_before": rejected.first,
            "rejected_after": rejected.last,
        },
        f"the chosen answers lost {fall:.1f} nats and the rejected ones {other:.1f}: the margin grows while both leave the model, "
        "and what it says instead is in no row",
        "add the chosen answer's likelihood to the loss (loss rpo with rpo_alpha 1), lower learning_rate, or raise beta",
        changes,
    )


@rule("preference", verdict="degenerate", live=True)
def margins_saturated(case: Case) -> Diagnosis | None:
    """Every pair is ranked right by far, so that none has a gradient left, long before the end."""
    return _saturation(case, "rewards/accuracies", "rewards/margins")


@rule("reward", verdict="degenerate", live=True)
def saturated(case: Case) -> Diagnosis | None:
    """The reward model tells every pair apart with certainty: its scores grow, and say nothing more."""
    return _saturation(case, "accuracy", "margin")


def _saturation(case: Case, accuracy: str, margin: str) -> Diagnosis | None:
    """What both of them say. Only a loss that is the logarithm of a sigmoid tells by its size that no gradient is left."""
    loss, right, margins = case.loss, case.series(accuracy), case.series(margin)
    logistic = case.kind == "reward" or case.config.get("loss", "dpo") in ("dpo", "robust", "dpo_norm", "ld_dpo", "simpo")
    if not logistic or len(loss) < 8 or not len(right) or not len(margins):
        return None
    smooth = loss.smoothed(3)
    first = next((i for i, value in enumerate(smooth.values) if value < SATURATED_LOSS), None)
    if first is None or first > SATURATED_HALF * len(smooth) or right.tail() < 0.99 or loss.tail() > SATURATED_LOSS:
        return None
    step = smooth.steps[first]
    share = max(0.1, step / smooth.steps[-1])
    changes = case.longer(rounded(share)) | case.slower(2)
    smoothed = case.config.get("loss", "dpo") == "dpo" and case.config.get("engine") != "trl"  # others take no label_smoothing
    or_set = "center_rewards_coefficient to 0.01" if case.kind == "reward" else "label_smoothing to 0.1" if smoothed else None
    return Diagnosis(
        {"margin": margins.tail(), "loss": loss.tail(), "accuracy": right.tail(), "saturated_at_step": step},
        f"from step {step:.0f} on the loss is under {SATURATED_LOSS} and every pair right, with a margin of {margins.tail():.1f}: "
        "the rest of training only made it surer",
        "train less (fewer passes, half the learning_rate)" + (f", or set {or_set}" if or_set else ""),
        changes,
    )
