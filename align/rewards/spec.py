"""One reward of several, as a recipe writes it: which function, and what becomes of its numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from align.errors import near_miss

OnError = Literal["raise", "abstain"] | float
Protocol = Literal["trl", "verl", "openrlhf"]
PROTOCOLS = get_args(Protocol)
REWARD_MODEL = "reward_model"
"""The reward that stands for the stage's reward model."""


def name_within(reward: str) -> str:
    """The name that ``package.module:name(key=value)`` has for its function, which may know another of itself (a lambda, what a
    decorator made) or none (an object).
    """
    return re.split("[:./]", reward.partition("(")[0].strip())[-1]


def name_beside(name: str, taken: Collection[str]) -> str:
    """What a reward called `name` logs under beside others: the second of a name is ``name_2``."""
    free = (name if count == 1 else f"{name}_{count}" for count in itertools.count(1))
    return next(each for each in free if each not in taken)


@dataclass(frozen=True)
class Gate:
    """The component counts only on completions on which another one is at least this much."""

    reward: str
    """Name of the other component."""
    at_least: float


@dataclass(frozen=True)
class RewardSpec:
    """A reward function and its part in the total. The steps are taken in the order of the fields."""

    reward: str
    """A built-in, ``package.module:function`` or ``file.py:function``, with arguments if any."""
    name: str | None = None
    """What the component is called in logs and gates; the name that stands in `reward` by default."""
    protocol: Protocol | None = None
    """For whom the function was written; recognized by its parameters by default."""
    timeout: float | None = None
    """Seconds that a call may take."""
    on_error: OnError = "raise"
    """A function that raises, takes too long or returns no number: stop, abstain, or take this number as its reward."""
    gate: Gate | None = None
    """When the component counts."""
    normalize: Literal["batch"] | tuple[float, float] | None = None
    """``batch``: subtract the mean of the completions scored together and divide by their deviation. Or mean and deviation."""
    clip: tuple[float, float] | None = None
    """Lowest and highest value."""
    weight: float | None = None
    """Factor in the total; 1 by default. 0 logs the component without training on it."""

    def __post_init__(self) -> None:
        if not self.reward or not isinstance(self.reward, str):
            raise ValueError("a reward must be named: a built-in, package.module:function or file.py:function")
        if self.protocol not in (None, *PROTOCOLS):
            raise ValueError(
                f"protocol must be trl, verl or openrlhf, not {self.protocol!r}{near_miss(str(self.protocol), PROTOCOLS)}"
            )
        if self.on_error not in ("raise", "abstain") and not _finite(self.on_error):
            raise ValueError(f"on_error must be raise, abstain or a number, not {self.on_error!r}")
        if self.timeout is not None and not (_finite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout must be a number of seconds above 0, not {self.timeout!r}")
        if self.weight is not None and not _finite(self.weight):
            raise ValueError(f"weight must be a finite number, not {self.weight!r}")
        if self.clip is not None and not (_pair(self.clip) and self.clip[0] < self.clip[1]):
            raise ValueError(f"clip must be [lowest, highest], not {self.clip!r}")
        if self.normalize not in (None, "batch") and not (_pair(self.normalize) and float(self.normalize[1]) > 0):
            raise ValueError(f"normalize must be batch or [mean, deviation], not {self.normalize!r}")
        gate = self.gate
        if gate is not None and not (isinstance(gate, Gate) and isinstance(gate.reward, str) and _finite(gate.at_least)):
            raise ValueError(f"gate must name a reward and a number, {{reward: NAME, at_least: NUMBER}}, not {gate!r}")

    @classmethod
    def of(cls, value: Any) -> RewardSpec:
        """A spec from a name or from a mapping, as a recipe holds them.

        Raises:
            ValueError: an unknown key (with the near miss) or a value that does not fit.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise ValueError(f"a reward is a name, or a mapping with the key `reward`, not a {type(value).__name__}")
        given = _known(cls, value, "a reward")
        for key in ("clip", "normalize"):
            if isinstance(given.get(key), list):
                given[key] = tuple(given[key])
        if isinstance(given.get("gate"), Mapping):
            given["gate"] = Gate(**_known(Gate, given["gate"], "a gate"))
        return cls(**given)

    def plain(self) -> str | dict[str, Any]:
        """The shortest way to write it: what `of` reads."""
        found: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                found[field.name] = vars(value) if isinstance(value, Gate) else list(value) if isinstance(value, tuple) else value
        return self.reward if found.keys() == {"reward"} else found


def _known(cls: type[RewardSpec] | type[Gate], value: Mapping[str, Any], what: str) -> dict[str, Any]:
    names = [field.name for field in fields(cls)]
    for key in value:
        if key not in names:
            raise ValueError(f"unknown key {key!r}{near_miss(str(key), names)}; {what} has: {', '.join(names)}")
    for name in ("reward",) if cls is RewardSpec else names:
        if name not in value:
            raise ValueError(f"{what} needs the key {name!r}")
    return dict(value)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_finite, value))
