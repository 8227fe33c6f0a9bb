"""Rules about every stage that trains on a data set: the learning rate, how long, on how much, and with what capacity."""

from __future__ import annotations

import json
import math
import statistics
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from align.diagnostics.case import LANGUAGE, SUPERVISED, Case, Diagnosis, rounded, rule
from align.diagnostics.series import late_share, learned_by
from align.runner.checkpoints import header_fault

SET_BACK, SET_BACK_TRAIN, SMALL_RISE = 0.25, 0.1, 0.03
"""Relative rise from its lowest that a good run's loss does not have, that its training loss must show, too, where the held-out one
does, and, as a share of the loss before training, one that is too small to count."""
DEAD, HIGH = 0.001, 0.35
"""Gradient norm against its highest, and loss against its start, of a run that was thrown onto a plateau."""
WORSE = 1.1
"""An end this much above the start is no accident."""
SPIKE = 6.0
"""Deviations above the trend that make a spike; it must also lose half of what was gained."""
STILL_FALLING = 0.22
"""Share of the progress in the last third of the learning from which on more would follow. A straight line has 0.33."""
ALL_RIGHT = 0.98
"""Share of held-out pairs ranked right beyond which a longer training has nothing to win."""
LITTLE = 0.06
"""Relative fall of the loss below which a run has hardly moved."""
OVERFIT_RISE = 0.03
"""Relative rise of the held-out loss above its lowest."""
SMALL_BATCH, NOISY = 4, 0.25
"""Rows in a step, and relative deviation of a step's loss, that together make a gradient mostly noise."""
SMALL_RANK = 4
"""Above this rank it is seldom the rank that limits."""
BITS_PER_PARAMETER = 2.0
"""What a parameter can hold (arXiv:2404.05405, Sect. 3)."""
ADAM_EDGE = 38.0
"""Adam with beta1 = 0.9 is unstable where learning rate x sharpness of the preconditioned loss is above (2 + 2 b) / (1 - b) = 38
(arXiv:2207.14484, Eq. 3)."""


@rule(
    *SUPERVISED,
    verdict="unstable",
    live=True,
    explains=(
        "overfit",
        "learning_rate_too_low",
        "too_few_epochs",
        "batch_too_small",
        "rank_too_low",
        "loss_flat",
        "both_logps_fall",
        "chance",
        "saturated",
        "margins_saturated",
        "forgetting",
        "length_biased",
        "length_exploited",
    ),
)
def learning_rate_too_high(case: Case) -> Diagnosis | None:
    """The loss ends above its start, loses again what it had gained, spikes, or is stuck where no gradient leads out."""
    few = len(case.loss) < 8
    if not len(case.loss) or (few and case.running) or ((few or case.batch <= SMALL_BATCH) and not _diverged(case)):
        return None
    seen, evidence = _instability(case)
    if seen is None:
        return None
    edge, norms, rate = _edge(case), case.series("grad_norm"), _calm_rate(case)
    evidence |= {"grad_norm": norms.tail()} if len(norms) else {}
    evidence |= {"edge": edge} if edge is not None else {}
    why = f"; its curvature allows about {edge:.1e}" if edge is not None else ""
    return Diagnosis(
        {"loss_before": case.start, "loss_after": case.end, "learning_rate": case.learning_rate, **evidence},
        f"{seen}: steps of this size jump out of the valley that they are to follow{why}",
        f"lower learning_rate from {case.learning_rate:.1e} to {rate:.1e}; a longer warmup_ratio, where only the start is wild",
        {"learning_rate": rate},
    )


def _instability(case: Case) -> tuple[str | None, dict[str, float]]:
    """What shows that steps are too large, in words and numbers; None where nothing does."""
    loss, held = case.loss, case.held_out
    if _diverged(case):
        return f"the loss ended above its start ({case.start:.3g} to {case.end:.3g})", {}
    top = max(loss.smoothed().values)
    if case.start > 0 and top > 1.25 * max(case.start, loss.first):  # some losses can be negative
        return f"the loss rose to {top:.3g}, above where it began", {"highest": top}
    floor = SMALL_RISE * abs(case.start)
    lost = set_back(loss.smoothed(len(loss) // 5).values, floor)
    if len(held) >= 5:  # overfitting sets back the held-out loss alone, hard rows the training loss alone
        lost = set_back(held.values, floor) if lost > SET_BACK_TRAIN else 0.0
    if lost > SET_BACK:
        return f"the loss rose again by {lost:.0%} from its lowest", {"set_back": lost}
    spikes = _spikes(loss.values, case.start, loss.noise)
    if spikes >= max(2, len(loss) // 25):
        return f"the loss spiked {spikes} times", {"spikes": float(spikes)}
    norms = case.series("grad_norm")
    if (
        case.kind in LANGUAGE
        and len(norms)
        and statistics.median(norms.part(0.8)) < DEAD * max(norms.values)  # a single wobble does not revive it
        and case.start > 0
        and case.end > HIGH * case.start
    ):
        return f"the gradient vanished while the loss was still {case.end:.3g}", {"highest_grad_norm": max(norms.values)}
    return None, {}


def _diverged(case: Case) -> bool:
    """Neither the held-out nor the training loss is better than before training."""
    if case.running and len(case.loss) < 20:
        return case.loss.tail(0.3) > 1.25 * case.start
    worse = case.end - case.start > (WORSE - 1) * abs(case.start)
    return worse and case.loss.tail() > case.loss.first - 0.02 * abs(case.loss.first)


def set_back(values: tuple[float, ...], floor: float) -> float:
    """The largest relative rise above the lowest value so far; one of at most `floor` does not count."""
    lowest, worst = values[0], 0.0
    for value in values:
        lowest = min(lowest, value)
        if value - lowest > floor:
            worst = max(worst, (value - lowest) / max(abs(lowest), 1e-9))
    return worst


def _spikes(values: tuple[float, ...], start: float, noise: float) -> int:
    """Values that lose half of what had been gained, far above the middle of the five before them."""
    count = 0
    for i in range(5, len(values)):
        middle = sorted(values[i - 5 : i])[2]
        count += values[i] > middle + max(SPIKE * noise, (start - middle) / 2, 0.3 * middle)
    return count


def _calm_rate(case: Case) -> float:
    """A learning rate that should do: half of the one at which the loss was still falling, if the warm-up shows it, and no more
    than a tenth of the peak; what the curvature allows, where it is known.
    """
    rates, smooth = case.series("learning_rate"), case.loss.smoothed()
    rate = case.learning_rate / 10
    edge = _edge(case)
    if edge is not None:
        rate = min(rate, edge / 2)
    if len(rates) and smooth.lowest:
        at_best = rates.at(smooth.steps[smooth.lowest])
        if 0 < at_best < rate and rates.steps and smooth.steps[smooth.lowest] < rates.steps[-1] / 3:
            rate = max(at_best / 2, case.learning_rate / 50)
    return rounded(rate)


def _edge(case: Case) -> float | None:
    """The largest stable learning rate that the measured curvature allows: 38 / λ of the loss as Adam scales it, else 2 / λ."""
    adam, plain = case.curvature.get("adam_top_eigenvalue"), case.curvature.get("top_eigenvalue")
    if isinstance(adam, int | float) and adam > 0:
        return ADAM_EDGE / adam
    return 2.0 / plain if isinstance(plain, int | float) and plain > 0 else None


@rule(*SUPERVISED, verdict="unstable", explains=("too_few_epochs", "overfit", "learning_rate_too_low", "rank_too_low", "loss_flat"))
def batch_too_small(case: Case) -> Diagnosis | None:
    """A handful of rows a step, and the held-out loss swings or stands still while the training loss is noise."""
    loss, held = case.loss, case.held_out
    if case.batch > SMALL_BATCH or len(loss) < 12 or len(held) < 4:
        return None
    late = loss.after(loss.steps[len(loss) // 2])
    noise = late.noise * math.sqrt(max(1.0, (loss.steps[-1] - loss.steps[0]) / len(loss))) / max(late.tail(1.0), 1e-9)
    swings = held.after(held.steps[len(held) // 2]).spread / max(held.last, 1e-9)
    best = min(held.values)
    lost = (held.last - best) / max(case.start - best, 1e-9)
    if noise < NOISY or (swings < 0.03 and lost < 0.1):
        return None
    factor, passes = max(2, round(16 / case.batch)), "steps" if int(case.config.get("max_steps") or -1) > 0 else "passes"
    return Diagnosis(
        {"rows_a_step": case.batch, "relative_noise": noise, "held_out_swing": swings, "lost_share": lost},
        f"a step sees {case.batch} row(s): its loss is off by {noise:.0%} from one step to the next, so the steps follow the rows' "
        "differences more than what they share",
        f"take {factor} times as many rows a step (per_device_train_batch_size or gradient_accumulation_steps), and as many "
        f"{passes}; a lower learning_rate does the same more slowly",
        {"per_device_train_batch_size": int(case.config.get("per_device_train_batch_size", 1)) * factor},
    )


@rule(*SUPERVISED, verdict="overfit", live=True, explains=("saturated", "margins_saturated", "rank_too_low"))
def overfit(case: Case) -> Diagnosis | None:
    """The training loss falls and the held-out loss rises from its lowest, which may be the one before training."""
    loss, held = case.loss, case.held_out
    if case.keeps_best or len(held) < (3 if case.running else 2) or len(loss) < 6 or held.lowest == len(held) - 1:
        return None
    best, step = held.values[held.lowest], held.steps[held.lowest]
    rise = held.last / best - 1 if best > 0 else 0.0
    later = loss.after(step)
    if rise < OVERFIT_RISE or held.last - best < 0.01 * abs(case.start) or len(later) < 2 or later.tail() > loss.at(step):
        return None
    # A run that ends there has its learning rate fall earlier: it is given as much learning, not as many steps.
    change = case.longer(max(learned_by(step, loss, case.series("learning_rate")), 0.05))
    (field, value), *_ = change.items()
    return Diagnosis(
        {"best_held_out": best, "best_step": step, "last_held_out": held.last, "rise": rise, "train_loss": later.tail()},
        f"from step {step:.0f} on the training loss fell to {later.tail():.3g} while the held-out loss rose by {rise:.0%}: the "
        "model learns its rows by heart",
        f"stop {'there' if held.lowest else 'soon after the start'} ({field} {value}), or set early_stopping_patience; more rows, "
        "LoRA or weight_decay help, too",
        change,
    )


@rule(*SUPERVISED, verdict="failed", explains=("too_few_epochs", "rank_too_low", "chance", "loss_flat"))
def learning_rate_too_low(case: Case) -> Diagnosis | None:
    """After many steps the loss has hardly moved, and it is still on its way down."""
    loss = case.loss
    if len(loss) < 6:
        return None
    steps = loss.steps[-1]
    before, after = case.start, case.end
    fall = (before - after) / abs(before) if before else 0.0
    if steps < 30 or fall > LITTLE or fall < -0.01:
        return None
    if not case.falls:
        return None  # noise: larger steps would not point anywhere, either
    if -loss.slope()[0] > 2 * LITTLE * abs(before):
        return None  # it learned its own rows, and that is not what larger steps mend
    late = late_share(loss, case.series("learning_rate"))
    if fall > 0.01 and late is not None and late < STILL_FALLING:
        return None  # it has arrived where it can get: there was little to learn
    factor = min(max(1.0 / max(fall, 1e-3), 5.0), 200.0)
    rate = rounded(case.learning_rate * factor)
    return Diagnosis(
        {"loss_before": before, "loss_after": after, "relative_fall": fall, "steps": steps, "learning_rate": case.learning_rate},
        f"{steps:.0f} steps moved the loss by {fall:.1%}: each of them is too small to matter",
        f"raise learning_rate from {case.learning_rate:.1e} to {rate:.1e}",
        {"learning_rate": rate},
    )


@rule(*LANGUAGE, "preference", "kto", verdict="failed")
def loss_flat(case: Case) -> Diagnosis | None:
    """The loss did not fall, and neither a wild nor a timid learning rate explains it."""
    if len(case.loss) < 6 or case.start <= 0:
        return None
    fall = (case.start - case.end) / case.start
    trained = (case.loss.head() - case.loss.tail()) / max(case.loss.head(), 1e-9)
    if not 1 - WORSE < fall <= 0.01 or trained > 0.05 or case.loss.steps[-1] < 10:
        return None
    return Diagnosis(
        {"loss_before": case.start, "loss_after": case.end, "relative_fall": fall},
        f"the loss is where it was: steps of {case.learning_rate:.1e} are far too small or far too large for this model, nothing "
        "in the rows can be learned by it, or it knew it already",
        "look at rows and labels (`align check`); try a ten times higher and a ten times lower learning_rate",
    )


@rule(*SUPERVISED, verdict="underfit")
def too_few_epochs(case: Case) -> Diagnosis | None:
    """The loss was still falling fast when training ended."""
    loss = case.loss
    late = late_share(loss, case.series("learning_rate"))
    fall = (case.start - case.end) / case.start if late is not None and case.start > 0 else 0.0
    if late is None or late < STILL_FALLING or fall <= LITTLE:
        return None
    right = case.series("eval_accuracy" if case.kind == "reward" else "eval_rewards/accuracies")
    if (len(case.held_out) > 2 and case.held_out.last > case.held_out.values[-2]) or (len(right) and right.last > ALL_RIGHT):
        return None
    change = case.longer(3)
    (field, value), *_ = change.items()
    return Diagnosis(
        {"late_share": late, "loss_before": case.start, "loss_after": case.end, "steps": loss.steps[-1]},
        f"the last third of the learning made {late:.0%} of all progress: training ended on the slope",
        f"train longer: {field} {value}; a higher learning_rate gets as far in fewer steps if the curve is smooth",
        change,
    )


@rule(*SUPERVISED, verdict="underfit")
def rank_too_low(case: Case) -> Diagnosis | None:
    """A LoRA adapter has stopped learning with less room than the rows have to say."""
    loss, held = case.loss, case.held_out
    rank, set_rank = _rank(case)
    parameters = adapter_parameters(case.folder) if 0 < rank <= SMALL_RANK else 0
    tokens, epochs = case.series("num_tokens"), case.series("epoch")
    if not parameters or len(loss) < 12 or not len(tokens) or not len(epochs):
        return None
    late = late_share(loss, case.series("learning_rate"))
    unique = tokens.last / max(epochs.last, 1.0)
    rows_bits = unique / 2 * loss.tail() / math.log(2)  # about half of a conversation's tokens carry a loss
    room = BITS_PER_PARAMETER * parameters
    gap = (held.last - loss.tail()) / max(loss.tail(), 1e-9) if len(held) else 0.0
    if rows_bits < room or gap > 0.5 or (late is not None and late > 0.5):
        return None
    wanted = min(128, max(2 * rank, 2 ** math.ceil(math.log2(max(1.0, rank * rows_bits / room)))))
    return Diagnosis(
        {"lora_r": rank, "adapter_bits": room, "bits_left_in_rows": rows_bits, "train_loss": loss.tail(), "gap": gap},
        f"an adapter of rank {rank} holds about {room:.2g} bits, and the rows still hold {rows_bits:.2g} that it has not learned",
        f"raise the rank to {wanted} (alpha follows it), or train all weights",
        set_rank(wanted),
    )


def _rank(case: Case) -> tuple[int, Callable[[int], dict[str, Any]]]:
    """The rank of the stage's LoRA adapter, 0 where it has none, and the change that sets another; in either spelling."""
    config, arguments = case.config, dict(case.config.get("tuning_args") or {})
    by_flags = bool(config.get("use_peft"))
    if not by_flags and config.get("tuning") != "lora":
        return 0, lambda rank: {}
    given = int(config.get("lora_r", 16) if by_flags else arguments.get("r", 16))
    alpha = config.get("lora_alpha") if by_flags else arguments.get("alpha")  # by default twice the rank, whatever that is

    def change(rank: int) -> dict[str, Any]:
        scale = None if alpha is None else round(alpha * rank / given)
        if by_flags:
            return {"lora_r": rank} | ({"lora_alpha": scale} if scale else {})
        return {"tuning_args": {**arguments, "r": rank} | ({"alpha": scale} if scale else {})}

    return given, change


def adapter_parameters(folder: Path | None) -> int:
    """Numbers in a folder's adapter, from the header of its safetensors file; 0 where there is none that is whole."""
    path = folder / "adapter_model.safetensors" if folder is not None else None
    if path is None or not path.is_file() or header_fault(path):
        return 0
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
