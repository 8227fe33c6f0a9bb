"""What a reward is, and the catalog of the built-in ones."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from align.catalog import Catalog

RewardFunction = Callable[..., Any]
"""``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``, sync or async (TRL's protocol)."""

rewards: Catalog[RewardFunction] = Catalog("reward")
"""Keyword-only parameters of a built-in are set by the spec, as in ``length_band(low=20, high=80)``; the others are columns."""


def text_of(value: Any) -> str:
    """The text of a prompt or completion, whether it is a string or a list of messages (their contents, one a line)."""
    if isinstance(value, str):
        return value
    contents = [message.get("content") or "" for message in value]
    parts = [[content] if isinstance(content, str) else [part.get("text", "") for part in content] for content in contents]
    return "\n".join(text for part in parts for text in part)


def short(value: Any, width: int = 60) -> str:
    """`value` for an error message: of messages the last one's text, cut to `width` characters."""
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = text_of(value[-1:])
    try:
        text = repr(value)
    except Exception:  # a message about it is no place to fail in
        text = object.__repr__(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def unbound(function: RewardFunction) -> RewardFunction:
    """The function inside of partials."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: RewardFunction) -> str:
    """What its component is called unless told otherwise."""
    function = unbound(function)
    return getattr(function, "__name__", type(function).__name__)


def parameters_of(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """The function's parameters; ``**kwargs`` alone for one that cannot be inspected."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return inspect.signature(lambda **kwargs: None).parameters


def takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether there is a ``**kwargs`` among them."""
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())
