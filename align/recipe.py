"""Recipes: named stages and what they need of each other, from a Python function or a YAML file.

Stages name their inputs: ``model="sft"`` means the output of the stage ``sft`` of the same recipe, ``data="world/pairs.jsonl"`` a
file in the output of the stage ``world``. Everything else is a registered model, an alias, a path or a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

from align.errors import AlignError, near_miss, told_of, within
from align.registry import check_name
from align.stages import Stage, stages
from align.stages.config import MADE, Reference
from align.stages.written import by_field, explained, field_name, field_value, make_stage, parse_value, read_yaml, value_of

Build = Callable[..., "Recipe"]
SUFFIXES = (".py", ".yaml", ".yml")
"""Of the files that recipes are written in."""


@dataclass(frozen=True)
class Recipe:
    """Named stages. Their order is free: it follows from what they need of each other."""

    name: str
    stages: Mapping[str, Stage]

    def __post_init__(self) -> None:
        check_name(self.name)
        if not isinstance(self.stages, Mapping) or not self.stages:
            raise AlignError(f"recipe {self.name!r}: its stages are {self.stages!r}, not a mapping of names to stages")
        for name, stage in self.stages.items():
            check_name(name)
            if not isinstance(stage, Stage):
                kind = f"the class {stage.__name__}" if isinstance(stage, type) else f"a {type(stage).__name__}"
                raise AlignError(
                    f"recipe {self.name!r}: {name!r} is {kind}, not a stage with its fields, as SFT(model=…, data=…) is"
                )

    def ordered(self) -> list[str]:
        """Stage names, each after what it needs.

        Raises:
            AlignError: stages need each other in a circle.
        """
        return in_order({name: self.needs(name) for name in self.stages}, self.name)

    def needs(self, name: str) -> set[str]:
        """Stages whose output the stage `name` uses."""
        found = {self.stage_of(kind, reference) for kind, reference in references(self.stages[name])}
        if name in found:
            raise AlignError(f"recipe {self.name!r}: stage {name!r} needs its own output")
        return {stage for stage in found if stage}

    def stage_of(self, kind: str, reference: str) -> str | None:
        """The stage that `reference` speaks of: all of it for a model, its first part for data. Alone it speaks of none."""
        owner = reference.split("/", 1)[0] if kind == "data" else reference
        return owner if kind in MADE and owner in self.stages and len(self.stages) > 1 else None


def in_order(needs: Mapping[str, set[str]], recipe: str) -> list[str]:
    """The stages of `needs`, each after those that it needs.

    Raises:
        AlignError: stages need each other in a circle.
    """
    order: list[str] = []
    waiting = dict.fromkeys(needs)
    while waiting:
        ready = [name for name in waiting if not needs[name] & waiting.keys()]
        if not ready:
            while behind := [name for name in waiting if not any(name in needs[other] for other in waiting)]:
                waiting = {name: None for name in waiting if name not in behind}
            raise AlignError(f"recipe {recipe!r}: these stages need each other in a circle: {', '.join(waiting)}")
        order.append(ready[0])
        del waiting[ready[0]]
    return order


def references(stage: Stage) -> Iterator[tuple[str, str]]:
    """Everything outside itself that a stage names: (kind, reference)."""
    for _, kind, value in reference_fields(stage):
        for reference in [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else value:
            yield kind, reference["reward"] if isinstance(reference, dict) else reference


def reference_fields(stage: Stage) -> Iterator[tuple[str, str, Any]]:
    """The fields that hold references: (field, kind, value)."""
    for name, kind in reference_kinds(type(stage)).items():
        if (value := getattr(stage, name)) is not None:
            yield name, kind, value


def reference_kinds(cls: type[Stage]) -> dict[str, str]:
    """The fields that may hold references, and of what kind."""
    kinds = {name: _kind(info.annotation, info.metadata) for name, info in cls.model_fields.items()}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _kind(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str | None:
    """The kind of reference somewhere inside a field's annotation."""
    for mark in (*metadata, *getattr(annotation, "__metadata__", ())):
        if isinstance(mark, Reference):
            return mark.to
    arguments = getattr(annotation, "__args__", ()) or ()
    return next((kind for argument in arguments if (kind := _kind(argument)) is not None), None)


def load_recipe(source: str, assignments: Mapping[str, str] | None = None) -> Recipe:
    """A recipe from a Python file (its function ``recipe``), a YAML file, or the name of a shipped one.

    Args:
        assignments: ``setting`` or ``stage.field`` to a value written as YAML.

    Raises:
        AlignError: no such file, setting, stage or field, or a value that does not fit.
    """
    path = find_recipe(source)
    if path.suffix == ".py":
        return apply(_module(path).recipe, assignments or {}, str(path))
    return apply(lambda: from_yaml(path), assignments or {}, str(path))


def find_recipe(source: str) -> Path:
    """The file of a recipe: a path, or a name in ``pipelines/``."""
    shipped = _root() / "pipelines"
    for path in (Path(source), shipped / f"{source}.py"):
        if path.is_file() and path.suffix in SUFFIXES:
            return path
    names = sorted(path.stem for path in shipped.glob("*.py"))
    beside = [str(path) for path in Path(source).parent.glob("*.*") if path.suffix in SUFFIXES]
    guess = near_miss(str(Path(source)), [*names, *beside])  # without a "./", as `beside` is
    raise AlignError(f"no recipe {source!r}{guess}: neither a .py or .yaml file nor one of {', '.join(names)}")


def _root() -> Path:
    """Where ``pipelines/`` and ``data/`` are: beside the package in a checkout, else where an installed wheel left them."""
    checkout = Path(__file__).resolve().parent.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path(sysconfig.get_path("data"), "share", "align")


def _module(path: Path) -> Any:
    """The module in the file `path`, run once per content: a recipe may register stages, and a name cannot be taken twice."""
    name = _module_name(path)
    if name not in sys.modules:
        beside = str(path.resolve().parent)
        if beside not in sys.path:  # as with `python FILE`, it may import what lies there; last, so that it hides nothing
            sys.path.append(beside)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            # Not by its loader, whose bytecode cache can miss a quick edit.
            exec(compile(path.read_bytes(), path.resolve(), "exec", dont_inherit=True), vars(module))
        except (Exception, SystemExit) as error:  # to leave would end the command without a word
            del sys.modules[name]
            raise AlignError(f"running the recipe {path} failed{_told(error, path)}") from error
    if not callable(getattr(sys.modules[name], "recipe", None)):
        raise AlignError(f"{path} defines no function `recipe` that returns a Recipe")
    return sys.modules[name]


def _told(error: BaseException, path: Path) -> str:
    """An error of somebody's own code, with the last line of `path` that had part in it."""
    line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if Path(f.filename) == path.resolve()), None)
    return f"{'' if line is None else f' in line {line}'}: {type(error).__name__}: {error}"


def _module_name(path: Path) -> str:
    return f"align_recipe_{hashlib.sha256(bytes(path.resolve()) + path.read_bytes()).hexdigest()[:12]}"


def from_yaml(path: Path) -> Recipe:
    """A recipe written as YAML: ``name`` and ``stages``, each with its ``stage`` and fields. A ``launch`` beside them is that of
    every stage that takes one and has none.

    Raises:
        AlignError: a key is missing or unknown.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise AlignError(f"{path}: expected a mapping with `name` and `stages`")
    if isinstance(raw.get("stage"), str):
        raise AlignError(f"{path} has the fields of one stage; `align {raw['stage']} --config {path}` runs it")
    known = ("name", "stages", "launch")
    for key in raw:
        if key not in known:
            raise AlignError(
                f"{path}: unknown key {key!r}{near_miss(str(key), known)}; a recipe has `name`, `stages` and perhaps `launch`"
            )
    if not isinstance(raw.get("stages"), dict):
        found = f"is {raw['stages']!r}" if "stages" in raw else "is missing"
        raise AlignError(f"{path}: `stages` {found}; expected names of stages, each with its `stage` and its fields")
    built = {}
    for name, fields in raw["stages"].items():
        where = f"{path}, stage {name!r}"
        if not isinstance(fields, dict) or "stage" not in fields:
            raise AlignError(f"{where}: it needs a key `stage`, one of: {', '.join(stages)}")
        with told_of(where):
            cls = stages[str(fields["stage"])]
        common = {"launch": raw["launch"]} if "launch" in raw and "launch" in cls.model_fields else {}
        rest = {key: value for key, value in fields.items() if key != "stage"}
        built[name] = make_stage(cls, {**common, **rest}, where)
    with told_of(str(path)):
        return Recipe(raw.get("name", path.stem), built)


def apply(build: Build, assignments: Mapping[str, str], where: str) -> Recipe:
    """Build a recipe with its settings changed, then change fields of its stages."""
    settings = {key: value for key, value in assignments.items() if "." not in key}
    given = _settings(build, settings, where)
    try:
        recipe = build(**given)
    except AlignError:
        raise
    except ValidationError as error:
        raise AlignError(f"{where}, {error.title}: {explained(error)}") from error
    except (Exception, SystemExit) as error:
        raise AlignError(f"the function `recipe` of {where} failed{_told(error, Path(where))}") from error
    if not isinstance(recipe, Recipe):
        raise AlignError(f"{where}: its function `recipe` returned a {type(recipe).__name__}, not a Recipe")
    changed: dict[str, dict[str, Any]] = {}
    for key, value in sorted(assignments.items(), key=lambda item: item[0].count(".")):  # a whole mapping before its entries
        if "." not in key:
            continue
        name = key.partition(".")[0]
        if name not in recipe.stages:
            raise AlignError(f"--set {key}: recipe {recipe.name!r} has no stage {name!r}{near_miss(name, recipe.stages)}")
        fields = changed.setdefault(name, {})
        together = [other.partition(".")[2] for other in assignments if other.startswith(f"{name}.")]
        by_field(type(recipe.stages[name]), dict.fromkeys(together), f"--set {key}")
        fields |= _nested(recipe.stages[name], fields, key, value)
    # Fields of one stage are judged together: what each asks of the others may be set by a later one.
    made = {
        name: make_stage(
            type(stage := recipe.stages[name]),
            {**stage.model_dump(exclude_unset=True), **fields},
            " ".join(f"--set {key}" for key in assignments if key.startswith(f"{name}.")),
        )
        for name, fields in changed.items()
    }
    return replace(recipe, stages={**recipe.stages, **made})


def _nested(stage: Stage, changed: Mapping[str, Any], key: str, text: str) -> dict[str, Any]:
    """``base.architecture.hidden_size`` changes one entry of a mapping: that of `stage`, or what it was `changed` to."""
    name, _, entry = key.partition(".")[2].partition(".")
    name = field_name(type(stage), name)
    if not entry:
        return {name: field_value(type(stage), name, text)}
    inner = changed[name] if name in changed else getattr(stage, name, None)
    if inner is None:  # `launch`, say, where the recipe sets none
        inner = {}
    elif isinstance(inner, BaseModel):
        inner = inner.model_dump(exclude_unset=True)
    if not isinstance(inner, dict):
        raise AlignError(f"--set {key}: {name!r} is not a mapping")
    return {name: {**inner, entry: parse_value(text)}}


def _settings(build: Build, given: Mapping[str, str], where: str) -> dict[str, Any]:
    parameters = inspect.signature(build).parameters
    try:
        hints = get_type_hints(build)
    except Exception as error:
        raise AlignError(f"{where}: a parameter of its function `recipe` has a type that cannot be looked up: {error}") from error
    values = {}
    for key, value in given.items():
        if key not in parameters:
            known = ", ".join(parameters) or "none; fields are set as stage.field"
            raise AlignError(f"--set {key}: {where} has no setting {key!r}{near_miss(key, parameters)}; it has: {known}")
        try:
            values[key] = TypeAdapter(hints.get(key, Any)).validate_python(value_of(hints.get(key, Any), value))
        except ValidationError as error:
            raise AlignError(f"--set {key}: {value!r}: {within(error.errors()[0]['msg'])}") from error
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for name, parameter in parameters.items():
        if name not in given and parameter.default is parameter.empty and parameter.kind not in variable:
            raise AlignError(f"{where} needs the setting {name!r}, which has no default: --set {name}=…")
    return values


def main(build: Build, arguments: list[str] | None = None) -> None:
    """Run a recipe file as a script: ``python pipelines/NAME.py [--out DIR] [--set …]`` is ``align run pipelines/NAME.py …``."""
    from align.cli import main as cli

    path = inspect.getfile(build)
    if build.__module__ == _module_name(Path(path)):
        raise AlignError('`main` runs the command again; write it behind `if __name__ == "__main__":`')
    sys.modules[_module_name(Path(path))] = sys.modules[build.__module__]  # the file is running: once is enough
    raise SystemExit(cli(["run", path, *(sys.argv[1:] if arguments is None else arguments)]))
