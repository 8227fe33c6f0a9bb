"""Sweeps: branches of a recipe for every value of some fields and every seed, that share all which does not depend on them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from align.errors import AlignError, near_miss
from align.recipe import Recipe, make_stage, parse_value, reference_fields
from align.stages import Stage

Variant = dict[str, str]
"""Swept stage to the suffix that tells its branches apart."""


def expand(recipe: Recipe, sweeps: Mapping[str, Sequence[str]], seeds: int = 1) -> Recipe:
    """`recipe` with a branch for each combination of values of one stage's fields, and `seeds` seeds of each.

    What needs a swept stage is branched with it. Where a stage takes models by name, as `evaluate` does, all branches meet in it,
    under the names ``NAME-FIELD-VALUE``.

    Args:
        sweeps: ``stage.field`` to values, written as YAML.

    Raises:
        AlignError: no such stage or field, a value that does not fit, or seeds without a stage to vary.
    """
    if not sweeps:
        raise AlignError("--seeds needs to know of what: add --sweep STAGE.FIELD=VALUES, or write --sweep STAGE.seed=0,1,2 instead")
    choices: dict[str, dict[str, dict[str, Any]]] = {}
    for swept, options in _by_stage(recipe, sweeps).items():
        if seeds > 1 and "seed" not in options:
            first = getattr(recipe.stages[swept], "seed", None)
            if first is None:
                raise AlignError(f"--seeds: stage {swept!r} has no seed")
            options["seed"] = [str(first + i) for i in range(seeds)]
        choices[swept] = {}
        for values in itertools.product(*options.values()):
            suffix = "".join(f"-{field}-{_plain(value)}" for field, value in zip(options, values, strict=True))
            choices[swept][suffix] = {field: parse_value(value) for field, value in zip(options, values, strict=True)}

    built: dict[str, Stage] = {}
    variants: dict[str, list[tuple[str, Variant]]] = {}
    for name in recipe.ordered():
        stage, mapped = (
            recipe.stages[name],
            {field for field, _, value in reference_fields(recipe.stages[name]) if isinstance(value, dict)},
        )
        origins = {name} & choices.keys()
        for field, kind, value in reference_fields(stage):
            for reference in [value] if isinstance(value, str) else [] if field in mapped else value:
                if owner := recipe.stage_of(kind, reference):
                    origins |= {origin for _, variant in variants[owner] for origin in variant}
        variants[name] = []
        for suffixes in itertools.product(*(choices[origin] for origin in sorted(origins))):
            variant = dict(zip(sorted(origins), suffixes, strict=True))
            branch = name + "".join(variant.values())
            fields = {**stage.model_dump(exclude_unset=True), **choices.get(name, {}).get(variant.get(name, ""), {})}
            for field, kind, value in reference_fields(stage):
                fields[field] = _follow(recipe, kind, value, variant, variants)
            built[branch] = make_stage(type(stage), fields, f"--sweep, stage {branch!r}")
            variants[name].append((branch, variant))
    return Recipe(recipe.name, built)


def _by_stage(recipe: Recipe, sweeps: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Sequence[str]]]:
    found: dict[str, dict[str, Sequence[str]]] = {}
    for key, values in sweeps.items():
        stage, _, field = key.partition(".")
        if stage not in recipe.stages:
            raise AlignError(f"--sweep {key}: recipe {recipe.name!r} has no stage {stage!r}{near_miss(stage, recipe.stages)}")
        known = type(recipe.stages[stage]).model_fields
        if field not in known:
            raise AlignError(f"--sweep {key}: stage {stage!r} has no field {field!r}{near_miss(field, known)}")
        found.setdefault(stage, {})[field] = values
    return found


def _follow(recipe: Recipe, kind: str, value: Any, variant: Variant, variants: Mapping[str, list[tuple[str, Variant]]]) -> Any:
    """A field's references, to the branches that agree with `variant`."""

    def branches(reference: str) -> list[str]:
        owner = recipe.stage_of(kind, reference)
        if owner is None:
            return [reference]
        agreeing = [name for name, theirs in variants[owner] if all(variant.get(key, v) == v for key, v in theirs.items())]
        return [name + reference[len(owner) :] for name in agreeing]

    if isinstance(value, str):
        return branches(value)[0]
    if isinstance(value, dict):
        named = {}
        for key, reference in value.items():
            for branch in branches(reference):
                owner = recipe.stage_of(kind, reference) or reference
                named[key + branch[len(owner) :]] = branch
        return named
    return [branch for reference in value for branch in branches(reference)]


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", value)
