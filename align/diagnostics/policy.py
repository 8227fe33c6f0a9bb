"""Rules about PPO, GRPO and RLOO: what a policy does when it is paid for a score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from align.diagnostics.case import POLICIES, Case, Diagnosis, rounded, rule
from align.diagnostics.series import Series
from align.rewards.spec import RewardSpec, name_beside, name_within

KL_A_TOKEN = 0.4
"""Nats a token from where it started beyond which a policy speaks another language."""
NEGATIVE_KL = -0.5
"""A divergence (nats an answer) cannot be below zero by more than chance."""
CLIPPED = 0.25
"""Share of tokens whose ratio is clipped."""
EXPLAINED = 0.05
"""Share of the returns' variance that a critic should explain after half of the run."""
COLLAPSED = 0.2
"""Entropy a token that is left, of what there was."""
FAR_OFF = 0.5
"""Relative distance of a critic's mean value from what is paid that shows that it has not learned."""
LONGER, SHORTER, CUT = 1.6, 0.5, 0.4
"""Length of answers against the start, and share of them that never end."""
STILL = 0.02
"""Divergence (nats an answer) of a policy that has not moved."""


@rule(*POLICIES, verdict="failed", live=True, explains=("policy_stands_still", "score_falls", "value_blind", "entropy_collapse"))
def score_flat(case: Case) -> Diagnosis | None:
    """Every answer gets the same score."""
    score = case.series("objective/scores")
    if len(score) < 4 or max(score.values) > min(score.values):
        return None
    return Diagnosis(
        {"score": score.tail()},
        f"the score was {score.tail():.3g} in each of {len(score)} rounds: no answer was better than another, so there was "
        "nothing to learn from",
        "try the reward on the model's own answers (`align reward test`): it must tell some of them apart; if it does for a better "
        "model alone, start from one, or pay for parts of what is wanted",
    )


@rule(*POLICIES, verdict="failed", live=True)
def kl_negative(case: Case) -> Diagnosis | None:
    """The divergence from the reference is below zero."""
    kl = case.series("objective/kl")
    if len(kl) < 5 or kl.tail(0.5) > NEGATIVE_KL:
        return None
    return Diagnosis(
        {"kl": kl.tail(0.5), "lowest_kl": min(kl.values)},
        f"a divergence of {kl.tail(0.5):.1f} nats an answer: answers are not drawn from the distribution that is scored (another "
        "temperature, top_p, suppressed end tokens, dropout)",
        "sample at the temperature that is trained, with top_p 1 and top_k 0; no field of this stage mends it",
    )


@rule(*POLICIES, verdict="degenerate", explains=("entropy_collapse", "kl_blow_up", "length_drift", "forgetting"))
def reward_hacking(case: Case) -> Diagnosis | None:
    """The score that is paid rises, and one that is only watched falls from where it was best (over-optimization,
    arXiv:2210.10760).
    """
    paid = case.series("objective/scores")
    if len(paid) < 4:
        return None
    for watched in _watched(case):
        before = paid.head() if watched.best_at is None else paid.smoothed().at(watched.best_at)
        # Where both fall after the watched one's best, the policy has lost its way; it has not found a hole in the reward.
        if paid.tail() - paid.head() <= 2 * paid.noise or paid.tail() < before - paid.noise:
            continue
        if watched.after < watched.before - watched.sure:
            since = "" if watched.best_at is None else f" (at its best in round {watched.best_at:.0f})"
            levels = {"paid_before": before, "paid_after": paid.tail()}
            return Diagnosis(
                {**levels, "watched_before": watched.before, "watched_after": watched.after},
                f"the paid score went from {before:.3g} to {paid.tail():.3g} while {watched.name}, which nobody pays for, fell "
                f"from {watched.before:.3g}{since} to {watched.after:.3g}: the policy found what the score does not see",
                f"pull harder to the reference ({case.price}), train for fewer episodes, and mend the reward: pay for what fell",
                case.closer(10.0) | _pay(case, watched.name),
            )
    return None


@dataclass(frozen=True)
class Watched:
    """What is measured and not paid for."""

    name: str
    before: float
    after: float
    sure: float
    """The difference that is no accident."""
    best_at: float | None = None
    """The round at which it was `before`; None for the start."""


def _watched(case: Case) -> Iterator[Watched]:
    for name in unpaid(case.config):
        series = case.series(f"rewards/{name}")
        if len(series) >= 4:
            smooth = series.smoothed()
            best = max(smooth.values)
            at = smooth.steps[smooth.values.index(best)]
            yield Watched(name, best, series.tail(), max(2 * series.noise, 0.1 * abs(best)), at)
    for name, now in case.measured.items():  # not a set of names, whose order differs from process to process
        then = case.reference.get(name)
        if name.endswith("_reward") and name != "greedy_reward" and isinstance(now, Mapping) and isinstance(then, Mapping):
            wide = (now["ci95"][1] - now["mean"]) + (then["mean"] - then["ci95"][0])
            yield Watched(name.removesuffix("_reward"), then["mean"], now["mean"], wide)


def unpaid(config: Mapping[str, Any]) -> list[str]:
    """Names of the reward functions whose weight is 0."""
    return [name for name, weight in _weights(config).items() if weight == 0]


def _weights(config: Mapping[str, Any]) -> dict[str, float]:
    """The weight of each of `reward_funcs`, by the name that it logs under."""
    functions = [RewardSpec.of(entry) for entry in config.get("reward_funcs") or []]
    weights = config.get("reward_weights") or [1.0 if spec.weight is None else spec.weight for spec in functions]
    return {name: float(weight) for name, weight in zip(reward_names(functions), weights, strict=False)}


def reward_names(functions: Iterable[RewardSpec]) -> list[str]:
    """The names that reward functions log under, read from their specs alone."""
    names: list[str] = []
    for spec in functions:
        name = spec.name or name_within(spec.reward)
        names.append(name_beside(name, names))
    return names


def _pay(case: Case, name: str) -> dict[str, Any]:
    """The change that pays for the reward function `name`."""
    weights = _weights(case.config)
    if name not in weights:
        return {}
    most, at = max(weights.values()) or 1.0, list(weights).index(name)
    if case.config.get("reward_weights"):  # functions first, then the reward model
        paid = list(case.config["reward_weights"])
        paid[at] = most
        return {"reward_weights": paid}
    specs = [RewardSpec.of(entry) for entry in case.config["reward_funcs"]]
    specs[at] = replace(specs[at], weight=most)
    return {"reward_funcs": [spec.plain() for spec in specs]}


@rule(
    *POLICIES,
    verdict="unstable",
    live=True,
    explains=("value_blind", "score_falls", "entropy_collapse", "kl_blow_up", "length_drift", "forgetting"),
)
def clip_share(case: Case) -> Diagnosis | None:
    """Most of the tokens have left the range in which PPO's estimate holds."""
    clipped = case.series("policy/clipfrac_avg")
    if len(clipped) < 4 or max(clipped.smoothed(3).values) < CLIPPED:
        return None
    changes = case.slower(5.0)
    passes = "num_ppo_epochs" if case.kind == "ppo" else "num_iterations"
    if int(case.config.get(passes, 1)) > 2:
        changes[passes] = 2
    return Diagnosis(
        {"clipped": max(clipped.smoothed(3).values), "learning_rate": case.learning_rate},
        f"up to {max(clipped.smoothed(3).values):.0%} of the tokens were clipped in an update: one batch of answers moves the "
        "policy further than it can tell",
        f"lower learning_rate, or {passes}",
        changes,
    )


@rule(*POLICIES, verdict="degenerate", live=True, explains=("value_blind", "kl_blow_up", "entropy_collapse", "forgetting"))
def length_drift(case: Case) -> Diagnosis | None:
    """Answers become much longer or much shorter, or no longer end."""
    length, cut = case.series("completions/mean_length"), case.series("completions/cut_share")
    if len(length) < 5 or length.head() <= 0:
        return None
    ratio = length.tail() / length.head()
    endless = len(cut) > 0 and cut.tail() > CUT > 2 * cut.head()
    if SHORTER <= ratio <= LONGER and not endless:
        return None
    changes = case.closer(5.0) | case.slower(2.0)
    penalized = (ratio > 1 or endless) and case.config.get("engine") != "trl"  # which has no such penalty
    if penalized:
        changes["missing_eos_penalty"] = max(1.0, float(case.config.get("missing_eos_penalty") or 0.0) * 2)
    return Diagnosis(
        {"length_before": length.head(), "length_after": length.tail(), "cut_share": cut.tail() if len(cut) else 0.0},
        f"answers went from {length.head():.0f} to {length.tail():.0f} tokens"
        + (f", and {cut.tail():.0%} of them are cut" if endless else "")
        + ": the score pays for length, not for what is said",
        f"raise {case.price}, set missing_eos_penalty, and take length out of the reward"
        if penalized
        else f"raise {case.price}, and take length out of the reward",
        changes,
    )


@rule(*POLICIES, verdict="degenerate", live=True, explains=("score_falls", "kl_blow_up", "value_blind", "forgetting"))
def entropy_collapse(case: Case) -> Diagnosis | None:
    """The policy says one thing only."""
    entropy = case.series("policy/entropy_avg")
    if len(entropy) < 5 or entropy.head() <= 0 or entropy.tail() > COLLAPSED * entropy.head():
        return None
    changes = case.closer(5.0) | case.slower(3.0)
    return Diagnosis(
        {"entropy_before": entropy.head(), "entropy_after": entropy.tail()},
        f"entropy fell from {entropy.head():.3g} to {entropy.tail():.3g} nats a token: every prompt gets the answer that scored "
        "once, and nothing new is tried",
        f"raise {case.price} to {changes[case.price]}, lower learning_rate, sample more prompts in a step",
        changes,
    )


@rule(*POLICIES, verdict="unstable", live=True, explains=("value_blind", "score_falls", "forgetting"))
def kl_blow_up(case: Case) -> Diagnosis | None:
    """The policy runs away from the reference."""
    kl, length = case.series("objective/kl"), case.series("completions/mean_length")
    if len(kl) < 5 or not len(length):
        return None
    a_token = kl.tail() / max(length.tail(), 1.0)
    if a_token < KL_A_TOKEN:
        return None
    changes = case.closer(5.0) | case.slower(5.0)
    return Diagnosis(
        {"kl": kl.tail(), "kl_a_token": a_token, case.price: float(case.config.get(case.price, 0.05))},
        f"{kl.tail():.1f} nats an answer, {a_token:.2f} a token, from the reference: the price of diverging is too low for the "
        "size of the steps",
        f"raise {case.price} to {changes[case.price]} and lower learning_rate to {changes['learning_rate']:.1e}",
        changes,
    )


@rule("ppo", verdict="underfit", explains=("policy_stands_still",))
def value_blind(case: Case) -> Diagnosis | None:
    """The critic explains nothing of the returns."""
    explained = case.series("val/explained_variance")
    late = Series(explained.steps[len(explained) // 2 :], explained.values[len(explained) // 2 :])
    value, paid = case.series("val/mean_value"), case.series("objective/rlhf_reward")
    if len(late) < 4 or late.tail(0.5) > EXPLAINED or not len(value) or not len(paid):
        return None
    off = abs(value.tail() - paid.tail()) / max(abs(paid.tail()), 1e-9)
    if off < FAR_OFF:
        return None  # it knows the level of the returns; what it cannot explain may be chance
    if case.config.get("critic_learning_rate") is None and policy_stands_still(case) is not None:
        return None  # both learn at the same rate, and neither does
    rate = float(case.config.get("critic_learning_rate") or case.learning_rate)
    from_judge = case.config.get("reward_model") is not None and case.config.get("critic", "separate") != "shared"
    changes = {"critic_learning_rate": rounded(max(rate, case.learning_rate) * 10)}
    return Diagnosis(
        {
            "explained_variance": late.tail(0.5),
            "mean_value": value.tail(),
            "mean_reward": paid.tail(),
            "critic_learning_rate": rate,
        },
        f"the critic explains {late.tail(0.5):.0%} of the returns' variance and says {value.tail():.2g} where {paid.tail():.2g} "
        "is paid: the advantages are the bare scores, with all their noise",
        f"raise critic_learning_rate to {changes['critic_learning_rate']:.1e}"
        + ("" if from_judge else "; start the critic from a reward model"),
        changes,
    )


@rule(*POLICIES, verdict="failed")
def policy_stands_still(case: Case) -> Diagnosis | None:
    """The policy is where it started."""
    kl, score = case.series("objective/kl"), case.series("objective/scores")
    if len(kl) < 5 or not len(score) or abs(kl.tail()) > STILL or score.tail() > score.head() + 2 * score.noise:
        return None
    rate = rounded(case.learning_rate * 100)
    return Diagnosis(
        {"kl": kl.tail(), "score_before": score.head(), "score_after": score.tail(), "learning_rate": case.learning_rate},
        f"{len(kl)} rounds moved the policy by {kl.tail():.2g} nats an answer",
        f"raise learning_rate from {case.learning_rate:.1e} to {rate:.1e}",
        {"learning_rate": rate},
    )


@rule(*POLICIES, verdict="failed")
def score_falls(case: Case) -> Diagnosis | None:
    """The score ends below its start."""
    score = case.series("objective/scores")
    if len(score) < 6:
        return None
    change, error = score.slope()
    if change >= -3 * error or score.tail() > score.head():
        return None
    return Diagnosis(
        {"score_before": score.head(), "score_after": score.tail()},
        f"the score fell from {score.head():.3g} to {score.tail():.3g}: the updates do not point where the score does",
        "lower learning_rate; look at the reward's sign and scale, and at missing_eos_penalty",
        case.slower(5.0),
    )
