"""A stage from what people write: keys with plain values, YAML, text on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from align.errors import AlignError, within
from align.stages import Stage, stages
from align.stages.elsewhere import advice


def make_stage(cls: type[Stage], fields: Mapping[str, Any], where: str) -> Stage:
    """A stage from plain values.

    Raises:
        AlignError: an unknown field (with the near miss) or a value that does not fit.
    """
    named = by_field(cls, fields, where)
    try:
        return cls.model_validate({name: _as_list(cls, name, value) for name, value in named.items()})
    except ValidationError as error:
        raise AlignError(f"{where}: {explained(error)}") from error


def given_fields(cls: type[Stage], config: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage's whole config (as JSON or YAML has it) says beyond the defaults: some fields may be set only with others."""

    def default(info: Any) -> Any:
        """As JSON has it; a required field has none."""
        return json.loads(json.dumps(None if info.is_required() else info.get_default(call_default_factory=True), default=str))

    known = cls.model_fields
    return {name: value for name, value in config.items() if name not in known or value != default(known[name])}


def refuse_misfits(cls: type[Stage], config: Mapping[str, Any], where: str) -> None:
    """Raise `AlignError` for a value that its field does not take. Of a stage's `config` this asks less than `make_stage`: nothing
    need be there, and what an older version wrote may be.
    """
    try:
        cls.model_validate({name: value for name, value in config.items() if name in cls.model_fields})
    except ValidationError as error:
        for problem in error.errors():
            if problem["loc"] and problem["type"] != "missing":
                raise AlignError(f"{where}: {_misfit(problem)}") from error


def field_name(cls: type[Stage], key: str) -> str:
    """The field that `key` means, where it is another name for one, as ``model_name_or_path`` is for ``model``."""
    return next((name for name, info in cls.model_fields.items() if key in other_names(info)), key)


def by_field(cls: type[Stage], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values` by the fields that their keys mean.

    Raises:
        AlignError: two keys are names of one field, and only one of their values would count.
    """
    spelled: dict[str, str] = {}
    for key in values:
        if (before := spelled.setdefault(field_name(cls, key), key)) != key:
            raise AlignError(f"{where}: {before!r} and {key!r} are two names of one field; give one of them")
    return {name: values[key] for name, key in spelled.items()}


def _as_list(cls: type[Stage], name: str, value: Any) -> Any:
    """A single value for a field that takes a list is a list of one: ``report_to: tensorboard``."""
    return [value] if takes_list(cls, name) and isinstance(value, str | int | float) else value


def takes_list(cls: type[Stage], name: str) -> bool:
    """Whether the field `name`, if there is one, takes a list."""

    def is_list(annotation: Any) -> bool:
        if get_origin(annotation) is Annotated:
            return is_list(annotation.__origin__)
        return get_origin(annotation) is list or (
            get_origin(annotation) in (Union, UnionType) and any(map(is_list, get_args(annotation)))
        )

    return name in cls.model_fields and is_list(cls.model_fields[name].annotation)


def other_names(info: Any) -> list[str]:
    """All names of a field that has several."""
    return [str(choice) for choice in getattr(info.validation_alias, "choices", ())]


def explained(error: ValidationError) -> str:
    """What is wrong with the fields of a stage, in one line."""
    # A misspelt key is also a missing one: the misspelling tells more.
    problem = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        *above, last = problem["loc"]
        known = [name for stage in stages if stages[stage].__name__ == error.title for name in _keys(stages[stage], above)]
        return f"unknown key {key!r}{advice(str(last), known)}"
    if problem["type"] == "missing":
        return f"{key!r} is missing: it must be set"
    return _misfit(problem) if key else problem["msg"].removeprefix("Value error, ")


def _misfit(problem: Mapping[str, Any]) -> str:
    """A value that does not fit, and why."""
    return f"{'.'.join(map(str, problem['loc']))!r} is {problem['input']!r}: {within(problem['msg'])}"


def _keys(cls: type[BaseModel], above: Sequence[int | str]) -> list[str]:
    """The keys of `cls`, or of what lies below the fields `above`."""
    for field in above:
        kinds = get_args(cls.model_fields[str(field)].annotation)
        cls = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(cls.model_fields)


class _Yaml(yaml.SafeLoader):
    """YAML in which ``1e-3`` is a number, as everywhere else; to PyYAML it is a string. A key that stands twice is a mistake, where
    PyYAML would take the last.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        AlignError: it is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Yaml)
    except yaml.MarkedYAMLError as error:
        raise AlignError(f"{path} is not YAML: {_marked(error)}") from error
    except UnicodeDecodeError as error:
        raise AlignError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: 2026-02-30
        raise AlignError(f"{path} is not YAML: {error}") from error


def _marked(error: yaml.MarkedYAMLError) -> str:
    """What PyYAML says, with lines and columns, and without the drawing of them, which takes lines of its own."""
    parts = ((error.context, error.context_mark), (error.problem, error.problem_mark))
    told = [f"{text} (line {mark.line + 1}, column {mark.column + 1})" if mark else text for text, mark in parts if text]
    return ", ".join(told)


def parse_value(text: str) -> Any:
    """A value as YAML reads it; what is no YAML is a string."""
    try:
        return yaml.load(text, _Yaml)
    except (yaml.YAMLError, ValueError):
        return text


def field_value(cls: type[Stage], name: str, text: str) -> Any:
    """The value `text` of a field on the command line. YAML, but where a field takes nothing but text, ``User:`` is no mapping,
    ``# x`` no comment and ``2024`` no number.
    """
    return value_of(cls.model_fields[name].annotation if name in cls.model_fields else Any, text)


def value_of(annotation: Any, text: str) -> Any:
    """The value `text` of something of the type `annotation`; see `field_value`."""
    value = parse_value(text)
    plain = text.strip()
    meant = isinstance(value, list) or plain.lower() in ("", "~", "null") or plain[0] in "'\""
    return value if meant or not _is_text(annotation) else text


def _is_text(annotation: Any) -> bool:
    """Whether values of this type are text, or lists of it."""
    if get_origin(annotation) is Annotated:
        return _is_text(annotation.__origin__)
    if get_origin(annotation) in (list, Union, UnionType):
        return all(map(_is_text, get_args(annotation)))
    return annotation in (str, NoneType)
