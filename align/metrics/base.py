"""The catalog of metrics and the one call that measures: columns in, named numbers out. Imports nothing heavy."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

from align.catalog import Catalog, parse_call
from align.errors import AlignError, first_line, near_miss

Metric = Callable[..., dict[str, float]]
metrics: Catalog[Metric] = Catalog("metric")
"""A metric is one function: its positional parameters are columns of equal length (``predictions``, ``references`` …), its
keyword-only ones are settings. It returns its numbers by name.
"""


class Missing(AlignError):
    """A metric stands on something that is not installed."""


NO_VALUES = (AlignError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What a metric raises of values that are not of its kind."""

HUB = "hub:"
"""In front of the name of a metric that `evaluate` fetches from the hub."""


def measure(spec: str, **columns: Any) -> dict[str, float]:
    """The numbers of one metric. `columns` may hold more than it needs.

    Args:
        spec: ``name``, ``name(setting=value)`` or ``hub:NAME``.

    Raises:
        AlignError: there is no such metric or setting; a column is missing or empty; columns differ in length; or the package that
            the metric stands on is not installed.
    """
    name, settings = check(spec)
    given = {key: column for key, column in columns.items() if column is not None}
    if name.startswith(HUB):
        return _from_the_hub(name, settings, given)
    check_columns(name, given)
    used = {column: given[column] for column in columns_of(name)}
    _check_lengths(name, used)
    return {key: float(value) for key, value in metrics[name](**used, **settings).items()}


def measure_all(specs: Iterable[str], **columns: Any) -> dict[str, float]:
    """The numbers of several metrics. Where two give one of the same name, as ``rouge`` and ``rouge(stemmer=True)`` do, each has
    the way it was asked for in front, unless that is its metric's name alone: ``rouge1`` and ``rouge(stemmer=True)/rouge1``.

    Raises:
        AlignError: as `measure`.
    """
    found = {spec: measure(spec, **columns) for spec in specs}
    given = Counter(key for numbers in found.values() for key in numbers)
    return {
        key if given[key] == 1 or spec in metrics else f"{spec}/{key}": value
        for spec, numbers in found.items()
        for key, value in numbers.items()
    }


def check(spec: str) -> tuple[str, dict[str, Any]]:
    """The name and the settings in `spec`.

    Raises:
        AlignError: there is no such metric; or it has no such setting, or none of this value.
    """
    name, settings = parse_call(spec, "metric")
    if not name.startswith(HUB):
        if name not in metrics:
            raise AlignError(
                f"unknown metric {name!r}{near_miss(name, metrics)}; known: {', '.join(metrics)}; a metric of the hub is {HUB}NAME"
            )
        metrics.check_arguments(name, settings)
        metrics.check_values(name, settings)
    return name, settings


def refuse_missing(specs: Iterable[str]) -> None:
    """Find out before any work, from a trial on two letters, whether what metrics stand on is there.

    Raises:
        Missing: it is not.
    """
    for spec in specs:
        name, _ = check(spec)
        if name.startswith(HUB):
            package("evaluate")
            continue
        try:
            with warnings.catch_warnings(action="ignore"):
                measure(spec, **{column: ["a", "b"] for column in columns_of(name)})
        except Missing:
            raise
        except NO_VALUES:
            continue


def check_columns(name: str, given: Iterable[str]) -> None:
    """Raise `AlignError` where the metric `name` reads a column that is none of those `given`."""
    given = list(given)
    if absent := [column for column in columns_of(name) if column not in given]:
        raise AlignError(f"metric {name!r} needs {absent[0]!r}; given: {', '.join(given) or 'nothing'}")


def columns_of(name: str) -> list[str]:
    """The columns that the metric `name` reads; those of one of the hub are predictions and references."""
    if name.startswith(HUB):
        return ["predictions", "references"]
    parameters = inspect.signature(metrics[name]).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _check_lengths(name: str, columns: Mapping[str, Sized]) -> None:
    lengths = {column: len(values) for column, values in columns.items()}
    for column, length in lengths.items():
        if length == 0:
            raise AlignError(f"metric {name!r}: {column} is empty, so there is nothing to measure")
    if len(set(lengths.values())) > 1:
        raise AlignError(f"metric {name!r}: {', '.join(f'{n} {column}' for column, n in lengths.items())}; expected one for each")


def package(module: str, extra: str = "metrics") -> Any:
    """The module, which belongs to an optional extra.

    Raises:
        Missing: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Missing(f"this needs the package {error.name!r}: pip install 'align[{extra}]'") from error


def texts(values: Sequence[Any], metric: str, column: str) -> list[str]:
    """`values`, all of which must be strings.

    Raises:
        AlignError: one is not; the message says which.
    """
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise AlignError(f"metric {metric!r}: {column}[{i}] is {type(value).__name__} {value!r:.40}, expected a string")
    return list(values)


def several(references: Sequence[Any], metric: str) -> list[list[str]]:
    """One or more reference texts for each prediction, as lists.

    Raises:
        AlignError: one is neither a string nor a list of strings, or is an empty list.
    """
    lists = [[value] if isinstance(value, str) else value for value in references]
    for i, value in enumerate(lists):
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(text, str) for text in value):
            raise AlignError(f"metric {metric!r}: references[{i}] is {value!r:.40}, expected a string or a list of strings")
    return [list(value) for value in lists]


def _from_the_hub(name: str, settings: dict[str, Any], columns: Mapping[str, Any]) -> dict[str, float]:
    evaluate = package("evaluate")
    needed = {key: columns[key] for key in ("predictions", "references") if key in columns}
    _check_lengths(name, needed)
    try:
        found = evaluate.load(name.removeprefix(HUB)).compute(**needed, **settings)
    except (OSError, ValueError, ImportError) as error:
        raise AlignError(
            f"metric {name!r}: the hub gave: {first_line(error)}; the local metrics are {', '.join(metrics)}"
        ) from error
    numbers = {key: value for key, value in found.items() if isinstance(value, (int, float)) and math.isfinite(value)}
    if not numbers:
        raise AlignError(f"metric {name!r} returned no number: {found!r:.80}")
    return numbers
