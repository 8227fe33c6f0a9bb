"""A catalog maps names to functions (or classes): losses, rewards, formats, stages."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, get_type_hints

from align.errors import AlignError, near_miss, within

Entry = TypeVar("Entry", bound=Callable[..., Any])


class Catalog(Generic[Entry]):
    """Named entries of one kind. Refuses collisions, lists its names, suggests the near miss.

    >>> losses = Catalog("loss")
    >>> @losses.add
    ... def dpo(x, *, beta): ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry, name: str | None = None) -> Entry:
        """Register `entry` under `name` (its own name by default) and return it, so this works as a decorator.

        The same definition may come again: a recipe's file is run once as a recipe and once for the reward function it defines.

        Raises:
            ValueError: the name is taken.
        """
        name = name or entry.__name__
        if name in self._entries and not _same_place(entry, self._entries[name]):
            raise ValueError(f"{self.kind} {name!r} is already registered, by {self._entries[name].__module__}")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        """The entry called `name`.

        Raises:
            AlignError: there is none; the message lists the names.
        """
        if name not in self._entries:
            raise AlignError(f"unknown {self.kind} {name!r}{near_miss(name, self._entries)}; known: {', '.join(self._entries)}")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def parse(self, spec: str) -> tuple[str, dict[str, Any]]:
        """``"name(key=literal, ...)"`` as the name of an entry and the arguments for it, checked.

        Raises:
            AlignError: no such entry, or it takes other arguments.
        """
        name, values = parse_call(spec, self.kind)
        self.check_arguments(name, values)
        return name, values

    def check_arguments(self, name: str, arguments: dict[str, Any]) -> None:
        """Raise `AlignError` unless `arguments` are exactly keyword-only parameters of the entry `name` and none required is
        missing.
        """
        parameters = {p.name: p for p in inspect.signature(self[name]).parameters.values() if p.kind is p.KEYWORD_ONLY}
        for key in arguments:
            if key not in parameters:
                known = ", ".join(parameters) or "none"
                raise AlignError(f"{self.kind} {name!r} takes no {key!r}{near_miss(key, parameters)}; it takes: {known}")
        for key, parameter in parameters.items():
            if parameter.default is parameter.empty and key not in arguments:
                raise AlignError(f"{self.kind} {name!r} needs {key!r}, and it has no default: set it")

    def check_values(self, name: str, arguments: dict[str, Any]) -> None:
        """Raise `AlignError` unless each of `arguments` is of the type that the entry `name` is annotated with, if any."""
        from pydantic import TypeAdapter, ValidationError  # here, as losses need torch and nothing heavier

        entry: Any = self[name]
        hints = get_type_hints(entry.__init__ if inspect.isclass(entry) else entry, include_extras=True)
        for key, value in arguments.items():
            try:
                TypeAdapter(hints.get(key, Any)).validate_python(value, strict=True)
            except ValidationError as error:
                raise AlignError(f"{self.kind} {name!r}: {key}={value!r}: {within(error.errors()[0]['msg'])}") from error


def _same_place(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether both are the definition of one name in one file."""
    files = {inspect.getsourcefile(entry) for entry in (one, other)}
    return len(files) == 1 and one.__qualname__ == other.__qualname__


def parse_call(spec: str, kind: str) -> tuple[str, dict[str, Any]]:
    """``"name(key=literal)"`` as its name and its arguments; `kind` says in an error what was to be named.

    Raises:
        AlignError: what stands in brackets is not key=value with plain values.
    """
    match = re.fullmatch(r"([^()]+)(\(.*\))", spec.strip(), re.DOTALL)
    if not match:
        return spec.strip(), {}
    try:
        call = ast.parse(f"f{match[2]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("only key=value arguments")
        return match[1].strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise AlignError(f"{kind} {spec!r}: its arguments must read (key=value, ...) with plain values: {error}") from error
