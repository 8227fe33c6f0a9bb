"""Sweeps: branches of a recipe for every value of some fields and every seed, that share all which does not depend on them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from align.errors import AlignError, near_miss
from align.recipe import Recipe, in_order, reference_fields
from align.stages import Stage
from align.stages.written import by_field, field_name, field_value, make_stage

Variant = dict[str, str]
"""Swept stage to the suffix that tells its branches apart."""
Option = tuple[str, Stage]
"""A swept stage with some values, and the suffix that they give its name."""


def values_of(text: str) -> list[str]:
    """The values of ``A,B``. Commas within brackets are a value's own: ``[q_proj,v_proj],all-linear``."""
    values, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    return values


def expand(recipe: Recipe, sweeps: Mapping[str, Sequence[str]], seeds: int = 1) -> Recipe:
    """`recipe` with a branch for each combination of values of one stage's fields, and `seeds` seeds of each.

    What needs a swept stage is branched with it. Where a stage takes models by name, as `evaluate` does, all branches meet in it,
    under the names ``NAME-FIELD-VALUE``.

    Args:
        sweeps: ``stage.field`` to values, written as YAML.

    Raises:
        AlignError: no such stage or field, a value that does not fit, two branches of one name or of the same values, or seeds
            without a stage to vary.
    """
    if not sweeps:
        raise AlignError("--seeds needs to know of what: add --sweep STAGE.FIELD=VALUES, or write --sweep STAGE.seed=0,1,2 instead")
    options: dict[str, list[Option]] = {name: [("", stage)] for name, stage in recipe.stages.items()}
    for swept, fields in _by_stage(recipe, sweeps).items():
        options[swept] = _options(swept, recipe.stages[swept], fields, seeds)

    def needs(name: str) -> set[str]:
        """With all values: a swept field may name other stages than the recipe does."""
        each = (replace(recipe, stages={**recipe.stages, name: stage}).needs(name) for _, stage in options[name])
        return set().union(*each)

    built: dict[str, Stage] = {}
    variants: dict[str, list[tuple[str, Variant]]] = {}
    for name in in_order({name: needs(name) for name in recipe.stages}, recipe.name):
        variants[name] = []
        for suffix, stage in options[name]:
            for variant in _joint(recipe, stage, {name: suffix} if suffix else {}, variants):
                branch = name + "".join(variant[origin] for origin in sorted(variant))
                if branch in built:
                    raise AlignError(
                        f"--sweep: two branches would be called {branch!r}, for a name keeps only a value's letters (A-Z, a-z), "
                        f"digits and '.'; leave one out, or write it in another way"
                    )
                followed = stage.model_dump(exclude_unset=True)
                for field, kind, value in reference_fields(stage):
                    followed[field] = _follow(recipe, kind, value, variant, variants)
                for field in getattr(stage, "among_models", ()):
                    followed[field] = _renamed(recipe, branch, field, variant, variants, stage)
                built[branch] = make_stage(type(stage), followed, f"--sweep, stage {branch!r}")
                variants[name].append((branch, variant))
    return Recipe(recipe.name, built)


def _options(name: str, stage: Stage, fields: dict[str, Sequence[str]], seeds: int) -> list[Option]:
    """`stage` with each combination of values of `fields`, and `seeds` seeds of each."""
    if seeds > 1 and "seed" not in fields:
        first = getattr(stage, "seed", None)
        if first is None:
            raise AlignError(f"--seeds: stage {name!r} has no seed")
        fields = {**fields, "seed": [str(first + i) for i in range(seeds)]}
    found: list[Option] = []
    for values in itertools.product(*fields.values()):
        chosen = dict(zip(fields, values, strict=True))
        suffix = "".join(f"-{field}-{_plain(value)}" for field, value in chosen.items())
        changed = {field: field_value(type(stage), field, value) for field, value in chosen.items()}
        whole = {**stage.model_dump(exclude_unset=True), **changed}
        built = make_stage(type(stage), whole, f"--sweep, stage {name + suffix!r}")
        if same := next((other for other, earlier in found if earlier == built), None):
            raise AlignError(f"--sweep: {name + same!r} and {name + suffix!r} have the same values; leave one out")
        found.append((suffix, built))
    return found


def _joint(recipe: Recipe, stage: Stage, own: Variant, variants: Mapping[str, list[tuple[str, Variant]]]) -> list[Variant]:
    """`own` joined with each variant of the stages that `stage` needs, as far as they agree. Branches of a stage that is named in a
    mapping, as models of `evaluate` are, do not multiply: all of them meet.
    """
    joint = [own]
    for _, kind, value in reference_fields(stage):
        for reference in [value] if isinstance(value, str) else [] if isinstance(value, dict) else value:
            if owner := recipe.stage_of(kind, reference):
                joint = [{**one, **theirs} for one in joint for _, theirs in variants[owner] if _agree(one, theirs)]
    return joint


def _by_stage(recipe: Recipe, sweeps: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Sequence[str]]]:
    found: dict[str, dict[str, Sequence[str]]] = {}
    for key, values in sweeps.items():
        stage, _, field = key.partition(".")
        if not field:
            raise AlignError(f"--sweep {key}: what is swept is a field of a stage: write STAGE.FIELD=A,B")
        if stage not in recipe.stages:
            raise AlignError(f"--sweep {key}: recipe {recipe.name!r} has no stage {stage!r}{near_miss(stage, recipe.stages)}")
        cls = type(recipe.stages[stage])
        if field_name(cls, field) not in cls.model_fields:
            raise AlignError(f"--sweep {key}: stage {stage!r} has no field {field!r}{near_miss(field, cls.model_fields)}")
        found.setdefault(stage, {})[field] = values
    return {stage: by_field(type(recipe.stages[stage]), fields, "--sweep") for stage, fields in found.items()}


def _follow(recipe: Recipe, kind: str, value: Any, variant: Variant, variants: Mapping[str, list[tuple[str, Variant]]]) -> Any:
    """A field's references, to the branches that agree with `variant`."""

    def branches(reference: str) -> list[str]:
        owner = recipe.stage_of(kind, reference)
        if owner is None:
            return [reference]
        agreeing = [name for name, theirs in variants[owner] if _agree(variant, theirs)]
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


def _renamed(
    recipe: Recipe, branch: str, field: str, variant: Variant, variants: Mapping[str, list[tuple[str, Variant]]], stage: Any
) -> str | None:
    """What the one of the models of `stage` that its `field` names is called in `branch`."""
    named = getattr(stage, field)
    if named not in stage.models:
        return named
    names = list(_follow(recipe, "model", {named: stage.models[named]}, variant, variants))
    if len(names) > 1:
        raise AlignError(
            f"--sweep: {field} of stage {branch!r} is {named!r}, of which there would be {len(names)}: name a model that is not "
            f"swept (--set {branch}.{field}=NAME), or none (--set {branch}.{field}=null)"
        )
    return names[0]


def _agree(one: Variant, other: Variant) -> bool:
    """Whether no swept stage has one value in `one` and another in `other`."""
    return all(one.get(origin, suffix) == suffix for origin, suffix in other.items())


def _plain(value: str) -> str:
    """`value` as part of a name; 1e+5 and 1e-5 stay apart."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", value.replace("+", ""))
