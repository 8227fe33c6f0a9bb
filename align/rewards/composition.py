"""Several rewards together: one number per completion out of all of theirs."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

from align.errors import AlignError, near_miss
from align.progress import say
from align.rewards.calling import OWN, Failure, arguments_for, await_all, call, checked, close, refuse_missing_columns
from align.rewards.loading import FORMS, load_reward
from align.rewards.protocol import RewardFunction, name_of, short
from align.rewards.spec import REWARD_MODEL, RewardSpec, name_beside, name_within

Totals = Callable[[Sequence[float]], list[float]]
"""Sums each of some numbers over processes."""
SHADOWED = (*OWN, "prompt", "completion")
"""Names of columns that are not passed on, as arguments of the protocol are called so."""
EPSILON = 1e-6
"""Least deviation that a component is divided by."""


@dataclass(frozen=True)
class RewardScores:
    """`total` has one number per completion; `components` has, per function, its own values, None where it abstained."""

    total: list[float]
    components: dict[str, list[float | None]]
    failures: dict[str, list[str]] = field(default_factory=dict)
    """What went wrong with functions whose `on_error` forgives it, one line for each completion."""


@dataclass(frozen=True)
class Component:
    """A reward in a set; its function is None where its values are given (a reward model's)."""

    spec: RewardSpec
    function: RewardFunction | None


class RewardSet:
    """Reward functions with weights.

    Args:
        functions: names (see `load_reward`), mappings or `RewardSpec`, or functions.
        weights: one per function, 1 by default; a weight of 0 logs a function without training on it.
        totals: sums numbers over the processes that score shares of one batch, for what is normalized over the batch.

    A component has the name that its function was named by, or the function's own; a second one of that name gets ``_2``.

    Raises:
        AlignError: a spec, a weight or a gate does not fit.
    """

    def __init__(
        self,
        functions: Sequence[str | Mapping[str, Any] | RewardSpec | RewardFunction],
        weights: Sequence[float] | None = None,
        totals: Totals = list,
    ) -> None:
        self.over_processes = totals
        functions = [functions] if isinstance(functions, str | Mapping | RewardSpec) else list(functions)
        if not functions:
            raise AlignError(f"no reward function is named: name {FORMS}")
        self.components: dict[str, Component] = {}
        for function in functions:
            self._add(function)
        specs = [component.spec for component in self.components.values()]
        given = [1.0 if spec.weight is None else float(spec.weight) for spec in specs] if weights is None else list(weights)
        if len(given) != len(functions) or not all(math.isfinite(weight) for weight in given):
            raise AlignError(f"reward_weights must be {len(functions)} finite numbers, one per function, not {weights}")
        if weights is not None and (twice := [name for name, c in self.components.items() if c.spec.weight is not None]):
            raise AlignError(f"the weight of {twice[0]!r} is set twice: in reward_weights and in its own entry; leave one out")
        self.weights = [float(weight) for weight in given]
        for name, component in self.components.items():
            gate = component.spec.gate
            if gate is not None and (gate.reward not in self.components or gate.reward == name):
                others = [other for other in self.components if other != name]
                known = ", ".join(others) or "none"
                raise AlignError(
                    f"the gate of reward {name!r} names {gate.reward!r}{near_miss(gate.reward, others)}; the others are: {known}"
                )
        self._forgiven, self._told = Counter[str](), Counter[str]()

    def _add(self, entry: str | Mapping[str, Any] | RewardSpec | RewardFunction) -> None:
        function = None
        if callable(entry):
            spec, function = RewardSpec(name_of(entry)), entry
        else:
            try:
                spec = RewardSpec.of(entry)
            except ValueError as error:
                raise AlignError(f"reward {short(entry)}: {error}") from error
            if spec.reward != REWARD_MODEL:
                function = load_reward(spec.reward, spec.protocol)
        name = spec.name or name_within(spec.reward)
        self.components[name_beside(name, self.components)] = Component(spec, function)

    def by_itself(self) -> RewardSet:
        """A set in which no number depends on what is scored with it: what is normalized by the batch counts as it is, without
        its clip. What is scored at one time can then be compared with what is scored at another.
        """
        found = copy(self)
        found.components = {
            name: replace(component, spec=replace(component.spec, normalize=None, clip=None))
            if component.spec.normalize == "batch"
            else component
            for name, component in self.components.items()
        }
        return found

    def refuse_missing(self, columns: Collection[str]) -> None:
        """Raise `AlignError` where a function needs a column that is not among `columns`, before there are answers to score."""
        for name, component in self.components.items():
            if component.function is not None:
                refuse_missing_columns(name, component.function, [column for column in columns if column not in SHADOWED])

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        model_scores: Sequence[float] | None = None,
    ) -> RewardScores:
        """`measure`, and one number per completion.

        The total is the weighted sum over the functions that did not abstain, each normalized and clipped as its spec says; one
        whose gate is closed adds nothing.

        Raises:
            AlignError: as `measure`; or all functions abstained on a completion.
        """
        components, failures = self.measure(prompts, completions, columns, completion_ids, model_scores)
        self._report(failures, len(prompts))
        totals = []
        for row, (total, prompt) in enumerate(zip(self.totals(components), prompts, strict=True)):
            if total is None:
                instead = "; an on_error that is a number scores it where a function fails: "
                why = next((f"{instead}{failed[-1]}" for failed in failures.values()), "")
                raise AlignError(f"every reward function abstained on row {row} (prompt {short(prompt)}): one must score it{why}")
            totals.append(total)
        return RewardScores(totals, components, failures)

    def measure(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        model_scores: Sequence[float] | None = None,
    ) -> tuple[dict[str, list[float | None]], dict[str, list[str]]]:
        """Call every function, the async ones together: its values, None where it abstained, and the failures that were forgiven.

        Columns named like an argument of the protocol (`prompts`, `completion`, ...) are not passed on.

        Args:
            model_scores: what the reward model says, for the component of that name.

        Raises:
            AlignError: a function needs a column that is not there; or, unless its `on_error` forgives that, it raised (the cause
                is kept), took too long, or returned something other than one finite number or None per completion.
            ValueError: prompts, completions and columns differ in length.
        """
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        extra = {key: value for key, value in (columns or {}).items() if key not in SHADOWED}
        for key, value in {**own, **extra, REWARD_MODEL: model_scores}.items():
            if value is not None and len(value) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(value)} {key}")
        results = self._results(own, extra, model_scores)
        components: dict[str, list[float | None]] = {}
        failures: dict[str, list[str]] = {}
        for name, result in results.items():
            components[name], failed = self._forgive(name, result, prompts)
            if failed:
                failures[name] = failed
        return components, failures

    def _results(self, own: dict[str, Any], columns: dict[str, Any], model_scores: Sequence[float] | None) -> dict[str, Any]:
        """What each function returned, or the `Failure` in its place."""
        if not own["prompts"]:
            return {name: [] for name in self.components}
        results: dict[str, Any] = {}
        try:
            for name, component in self.components.items():
                if component.function is None:
                    if model_scores is None:
                        raise AlignError(f"the reward {name!r} stands for a reward model, and there is none: set reward_model")
                    results[name] = list(model_scores)
                    continue
                arguments = arguments_for(name, component.function, own, columns)
                try:
                    results[name] = call(name, component.function, arguments, component.spec.timeout)
                except Failure as failure:
                    if component.spec.on_error == "raise":
                        raise
                    results[name] = failure
        except AlignError:
            close(results)
            raise
        pending = {
            name: (value, self.components[name].spec.timeout) for name, value in results.items() if inspect.isawaitable(value)
        }
        return {**results, **await_all(pending)}

    def _forgive(self, name: str, result: Any, prompts: Sequence[Any]) -> tuple[list[float | None], list[str]]:
        """The values of a component, with what `on_error` puts in place of failures, and what these were."""
        on_error = self.components[name].spec.on_error
        try:
            if isinstance(result, AlignError):
                raise result
            values = checked(name, result, prompts)
        except Failure as failure:
            values = [failure] * len(prompts)
            if on_error == "raise":
                raise
        failed = [value for value in values if isinstance(value, Failure)]
        if failed and on_error == "raise":
            raise failed[0]
        instead = None if isinstance(on_error, str) else float(on_error)
        return [instead if isinstance(value, Failure) else value for value in values], [str(failure) for failure in failed]

    def _report(self, failures: dict[str, list[str]], rows: int) -> None:
        """Say what was forgiven: the first time, and each time that it has doubled."""
        for name, failed in failures.items():
            self._forgiven[name] += len(failed)
            if self._forgiven[name] >= 2 * self._told[name]:
                self._told[name] = self._forgiven[name]
                instead = self.components[name].spec.on_error
                counted = "abstentions" if instead == "abstain" else f"{instead:g}"
                say(f"reward {name!r} failed on {len(failed)} of {rows} completions, which count as {counted}: {failed[0]}")

    def totals(self, components: Mapping[str, Sequence[float | None]]) -> list[float | None]:
        """The weighted sum for each completion; None where all abstained."""
        scaled = {name: scale(components[name], c.spec, self.over_processes) for name, c in self.components.items()}
        rows = len(next(iter(scaled.values())))
        return [self._total(components, scaled, row) for row in range(rows)]

    def _total(
        self, components: Mapping[str, Sequence[float | None]], scaled: Mapping[str, Sequence[float | None]], row: int
    ) -> float | None:
        parts = [
            weight * value * self._open(name, components, row)
            for weight, (name, values) in zip(self.weights, scaled.items(), strict=True)
            if (value := values[row]) is not None
        ]
        return sum(parts) if parts else None

    def _open(self, name: str, components: Mapping[str, Sequence[float | None]], row: int) -> bool:
        """Whether the gate of `name` is, on that completion."""
        gate = self.components[name].spec.gate
        if gate is None:
            return True
        value = components[gate.reward][row]
        return value is not None and value >= gate.at_least


def scale(values: Sequence[float | None], spec: RewardSpec, totals: Totals = list) -> list[float | None]:
    """`values` normalized and clipped as `spec` says."""
    mean, deviation = 0.0, 1.0
    if spec.normalize == "batch":
        kept = [value for value in values if value is not None]
        total, count = totals([math.fsum(kept), len(kept)])
        mean = total / max(count, 1)
        (squares,) = totals([math.fsum((value - mean) ** 2 for value in kept)])
        deviation = max(math.sqrt(squares / max(count, 1)), EPSILON)
    elif isinstance(spec.normalize, tuple):
        mean, deviation = spec.normalize
    low, high = spec.clip or (-math.inf, math.inf)
    return [None if value is None else min(max((value - mean) / deviation, low), high) for value in values]
