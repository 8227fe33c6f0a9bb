"""What a stage's fields are made of: the types that several have, the marks that say what a field is for, and the class that checks
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from align.errors import AlignError
from align.metrics import check
from align.rewards.spec import RewardSpec


@dataclass(frozen=True)
class Reference:
    """Marks a field that names something outside the config: a ``model``, ``data``, a ``reward`` or a chat ``template``."""

    to: Literal["model", "data", "reward", "template"]


MADE = ("model", "data")
"""What a stage may make; the rest keeps its name, and what it is now is added to a stage's identity."""


@dataclass(frozen=True)
class Bookkeeping:
    """Marks a field that says how the work is done, kept and watched, not what comes out. It is no part of a stage's identity."""


@dataclass(frozen=True)
class Address:
    """Marks a field that says where somebody is who takes part. That there is one is part of a stage's identity; where, is not."""


def marked_fields(cls: type[BaseModel], mark: type) -> set[str]:
    """Names of the fields of `cls` that are marked with a `mark`."""
    return {name for name, info in cls.model_fields.items() if any(isinstance(each, mark) for each in info.metadata)}


def _reward_name(value: Any) -> Any:
    """A function given in a Python recipe becomes ``file.py:name``, so that it can be fingerprinted and found again."""
    if callable(value):
        if not isinstance(value, FunctionType) or "<" in value.__qualname__:
            raise ValueError(f"{value!r} has no name in its file: give a function defined with `def` at the top level")
        return f"{Path(value.__code__.co_filename).resolve()}:{value.__qualname__}"
    return value


def _reward_entry(value: Any) -> Any:
    """A name, or a mapping with the keys of `RewardSpec`, checked and in its shortest form."""
    value = _reward_name(value)
    if isinstance(value, Mapping) and "reward" in value:
        value = {**value, "reward": _reward_name(value["reward"])}
    return RewardSpec.of(value).plain()


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping | RewardSpec) or callable(value) else value


def _known_metric(spec: str) -> str:
    try:
        check(spec)
    except AlignError as error:
        raise ValueError(str(error)) from None
    return spec


Name = Annotated[str, Field(min_length=1)]
ModelRef = Annotated[Name, Reference("model")]
TemplateRef = Annotated[str, Reference("template")]
DataRefs = Annotated[list[Name], BeforeValidator(_as_list), Reference("data")]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MaxTokens = Annotated[int, Field(gt=0)] | Literal["auto"]
MetricSpecs = Annotated[list[Annotated[str, AfterValidator(_known_metric)]], BeforeValidator(_as_list)]
RewardRefs = Annotated[
    list[Annotated[str | dict[str, Any], BeforeValidator(_reward_entry)]], BeforeValidator(_as_list), Reference("reward")
]


class Config(BaseModel):
    """Typed fields: no others than these, numbers finite, whole ones of at most 64 bits, and a number is never a yes."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        frozen=True,
        populate_by_name=True,
        allow_inf_nan=False,
        defer_build=True,  # every command imports all stages, and uses few
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yes_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A flag without its value is True, which pydantic would take for 1: a learning rate, say."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("this is no switch: give it a value")
        if isinstance(value, int) and abs(value) >= 2**63:  # no library counts further, and each says so in the midst of work
            raise ValueError("a whole number must be below 2**63")
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation is bool or any(map(_takes_bool, get_args(annotation)))


class Fields(Config):
    """A group of fields that several stages share."""
