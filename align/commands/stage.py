"""``align STAGE``: every stage of the catalog, and some preference losses, as verbs of their own."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import textwrap
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from align.artifact import Artifact
from align.commands import reward_test
from align.commands.parser import place
from align.commands.run import show_plan
from align.errors import AlignError
from align.pipeline import Run
from align.recipe import Recipe
from align.registry import check_name, home
from align.stages import Evaluate, Preference, Stage, stages
from align.stages.elsewhere import advice
from align.stages.written import (
    by_field,
    field_name,
    field_value,
    given_fields,
    make_stage,
    other_names,
    parse_value,
    read_yaml,
    takes_list,
)

PREFERENCE_VERBS = {
    "dpo": "Direct preference optimization (arXiv:2305.18290): no reward model, a frozen reference.",
    "orpo": "Odds-ratio preference optimization (arXiv:2403.07691): learns to answer and to prefer at once, without a reference.",
    "simpo": "Simple preference optimization (arXiv:2405.14734): length-normalized, with a margin, without a reference.",
    "ipo": "Identity preference optimization (arXiv:2310.12036): a squared loss that stops where the margin is wide enough.",
}
"""Preference losses that are verbs of their own, and what they are; the others run as ``align preference --loss NAME``."""

ROAD = ("pretrain", "sft", "pairs", "reward", "ppo", "grpo", "rloo", *PREFERENCE_VERBS, "preference", "kto", "task", "evaluate")
"""The order in which help lists the stages; those of others follow."""

SWITCHES = ("plan", "estimate", "json")
OWN_FLAGS = ("config", "output_dir", "name", *SWITCHES)
"""What a stage verb takes besides the stage's fields."""


def add(verbs: Any) -> None:
    for verb in (*ROAD, *(name for name in stages if name not in ROAD)):
        summary = PREFERENCE_VERBS.get(verb) or _first_sentence(_class_of(verb).__doc__ or verb)
        # The flags are the stage's fields: they are read by `run_stage` itself.
        verbs.add_parser(verb, help=summary, add_help=False).set_defaults(handler=run_stage, stage=verb, reads_flags=True)
    evaluate = verbs.add_parser("eval", help="the same as `evaluate`: align eval MODEL ... [--KEY VALUE ...]", add_help=False)
    evaluate.set_defaults(handler=run_stage, stage="evaluate", reads_flags=True)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s", " ".join(text.split()), maxsplit=1)[0]


def _class_of(verb: str) -> type[Stage]:
    return Preference if verb in PREFERENCE_VERBS else stages[verb]


def run_stage(options: argparse.Namespace, rest: list[str]) -> int:
    verb = options.stage
    if (verb, rest[:1]) == ("reward", ["test"]):
        return reward_test.run(rest[1:])
    cls = _class_of(verb)
    if "--help" in rest or "-h" in rest:
        print(_stage_help(options.verb, cls))
        return 0
    fields = _flags(_models_as_flags(rest) if cls is Evaluate else rest, cls, options.verb)
    where = f"align {options.verb}"
    if "config" in fields:
        config = fields.pop("config")
        where += f" --config {config}"
        fields = _merged(_config_file(place(config), cls), fields)
    own = {key: fields.pop(key, None) for key in OWN_FLAGS}
    if verb in PREFERENCE_VERBS:
        if fields.get("loss", verb) != verb:
            raise AlignError(f"`align {verb}` with loss {fields['loss']!r}: use `align preference --loss {fields['loss']}`")
        fields["loss"] = verb
    name = check_name(own["name"] or verb)
    recipe = Recipe(name, {name: make_stage(cls, fields, where)})
    folder = None if own["output_dir"] is None else place(str(own["output_dir"]))  # `--output_dir` promises exactly this folder
    run = Run(recipe, home() / "stages" if folder is None else folder.parent, folder, shared=True)
    if own["plan"] or own["estimate"]:
        return show_plan(run, estimated=bool(own["estimate"]), as_json=bool(own["json"]))
    _show_result(run.execute()[name], as_json=bool(own["json"]))
    return 0


def _show_result(artifact: Artifact, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(artifact), indent=1))
        return
    from align.report.results import evaluations
    from align.report.tables import as_text

    print(f"{artifact.reference}  {artifact.path}")
    if evaluations({artifact.name: artifact}):
        print(as_text(artifact.metrics["models"]))
        return
    for name, value in artifact.metrics.items():
        print(f"  {name:<28} {value:.4g}" if isinstance(value, float) else f"  {name:<28} {value}")


def _models_as_flags(rest: list[str]) -> list[str]:
    """``eval NAME …`` is ``eval --models.NAME NAME …``; a folder has its own name however it is written, as ``.`` too."""
    count = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    flags = [word for model in rest[:count] for word in (f"--models.{Path(os.path.abspath(model)).name}", model)]
    if len(set(flags[::2])) < count:
        raise AlignError(f"two of the models {', '.join(rest[:count])} have the same name; call them apart: --models.NAME MODEL")
    return flags + rest[count:]


def _flags(rest: list[str], cls: type[Stage], verb: str) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``--switch`` to fields; several values make a list."""
    known = {*cls.model_fields, *OWN_FLAGS, *(name for info in cls.model_fields.values() for name in other_names(info))}
    fields: dict[str, Any] = {}
    spelled: dict[str, None] = {}
    words = deque(rest)
    while words:
        flag = words.popleft()
        if not flag.startswith("--"):
            raise AlignError(f"align {verb}: {flag!r} is not a flag; write --KEY VALUE")
        key, equals, value = flag[2:].partition("=")
        key, _, entry = key.partition(".")
        key = key.replace("-", "_")
        if key not in known:
            raise AlignError(f"align {verb}: unknown flag --{key}{advice(key, known)}; see `align {verb} --help`")
        spelled[key] = None
        key = field_name(cls, key)
        values = [value] if equals else []
        while not equals and words and not words[0].startswith("--"):
            values.append(words.popleft())
            if re.match("-[A-Za-z]", values[-1]):
                raise AlignError(f"align {verb}: {values[-1]!r} is not a flag; write --KEY VALUE, or --{key}={values[-1]}")
        if key in OWN_FLAGS and entry:
            raise AlignError(f"align {verb}: --{key} is no mapping with an entry {entry!r}")
        if key in OWN_FLAGS:
            fields[key] = _own_value(key, values, verb)
        elif entry:
            before = fields.get(key)
            fields[key] = {**(before if isinstance(before, dict) else {}), entry: _value(values, parse_value)}
        elif key in fields and takes_list(cls, key):
            raise AlignError(f"align {verb}: --{key} is given twice: write all of its values behind one")
        elif isinstance(fields.get(key), dict):
            raise AlignError(f"align {verb}: --{key} undoes what was said of it before: give it once, in front of --{key}.ENTRY")
        else:
            by_field(cls, spelled, f"align {verb}")
            fields[key] = _value(values, partial(field_value, cls, key))
    return fields


def _value(texts: list[str], read: Callable[[str], Any]) -> Any:
    """What stands behind a flag: nothing is yes, several values are a list."""
    values = [read(text) for text in texts]
    return True if not values else values[0] if len(values) == 1 else values


def _own_value(key: str, texts: list[str], verb: str) -> str | bool:
    """The value of one of `OWN_FLAGS`.

    Raises:
        AlignError: it has none where it takes one, or one where it is a switch.
    """
    if key in SWITCHES:
        if texts:
            raise AlignError(f"align {verb}: --{key} is a switch and takes no {texts[0]!r}")
        return True
    if len(texts) != 1 or not texts[0]:
        raise AlignError(f"align {verb}: --{key} takes one value")
    return texts[0]


def _config_file(path: Path, cls: type[Stage]) -> dict[str, Any]:
    if not path.is_file():
        raise AlignError(f"--config {path}: there is no such file")
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise AlignError(f"--config {path}: expected `key: value` lines")
    if (kind := fields.pop("stage", None)) is not None:  # the config.yaml that a stage left: it has every field
        if not any(name == kind and stages[name] is cls for name in stages):
            raise AlignError(f"--config {path}: it is of the stage {kind!r}, and this verb runs {cls.__name__}")
        fields = given_fields(cls, fields)
    return by_field(cls, fields, f"--config {path}")


def _merged(config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags win; of a mapping they change the entries that they name."""
    both = {key for key in config.keys() & flags.keys() if isinstance(config[key], dict) and isinstance(flags[key], dict)}
    return {**config, **flags, **{key: {**config[key], **flags[key]} for key in both}}


def _stage_help(verb: str, cls: type[Stage]) -> str:
    models = " [MODEL ...]" if cls is Evaluate else ""
    lines = [f"align {verb}{models} [--config FILE.yaml] [--KEY VALUE ...]", "", (cls.__doc__ or "").strip(), ""]
    if verb == "reward":
        lines += ["align reward test FUNCTION --data FILE tries a reward function before any training: see its --help", ""]
    lines += ["  --config FILE         fields from a YAML file; flags win", "  --output_dir DIR      write into this folder"]
    lines += [
        "  --name NAME           name in the registry",
        "  --plan                show what would run, and stop",
        "  --estimate            the plan, and what memory and time it would take here",
        "  --json                print JSON",
        "",
    ]
    for name in _reading_order(cls):
        info = cls.model_fields[name]
        if verb in PREFERENCE_VERBS and name == "loss":
            continue
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        known = f"; one of {', '.join(map(str, choices))}" if (choices := _choices(info.annotation)) else ""
        lines.append(f"  --{name} ({default}{known})")
        lines += textwrap.wrap(str(info.description), 124, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _reading_order(cls: type[Stage]) -> list[str]:
    """The fields that must be set, then the stage's own, then those that it shares with others."""
    named = dict.fromkeys(name for kind in cls.__mro__ for name in inspect.get_annotations(kind) if name in cls.model_fields)
    return sorted(named, key=lambda name: not cls.model_fields[name].is_required())


def _choices(annotation: Any) -> tuple[Any, ...]:
    """All values that a field of this type takes beside None, where they are a few words."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType] if get_origin(annotation) in (Union, UnionType) else []
    return _choices(kinds[0]) if len(kinds) == 1 else ()
