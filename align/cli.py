"""The command line: ``align <verb> [--config file.yaml] [--same_named_flag value]``. Mistakes in the input end with one line and
exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import yaml

from align import __version__
from align.artifact import Artifact
from align.errors import AlignError, near_miss
from align.pipeline import Run, default_out
from align.progress import say
from align.recipe import Recipe, field_name, load_recipe, make_stage, other_names, parse_value, read_yaml
from align.registry import Registry, check_name, home
from align.stages import Preference, Stage, stages

PREFERENCE_VERBS = ("dpo", "orpo", "simpo", "ipo")
"""Preference losses that are verbs of their own; the others run as ``align preference --loss NAME``."""

OWN_FLAGS = ("config", "output_dir", "name", "plan", "json")
"""What a stage verb takes besides the stage's fields."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise AlignError(f"{message}; see `{self.prog} --help`")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    # OpenMP's threads wait for each other by spinning. On a busy machine that can cost a factor of ten; a short spin costs nothing.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except AlignError as error:
        print(f"align: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("align: interrupted; the same command continues with the stage that was cut", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    parser = _Parser(prog="align", description="From a base language model to an aligned chat model, on one machine.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)

    run = verbs.add_parser("run", help="run a pipeline: a recipe file or the name of a shipped one")
    run.add_argument("recipe", metavar="RECIPE")
    run.add_argument("--out", type=Path, metavar="DIR", help="output folder (default: runs/NAME)")
    run.add_argument("--plan", action="store_true", help="show what would run and why, and stop")
    run.add_argument("--only", metavar="STAGE", help="run just this stage")
    run.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE", help="a setting, or stage.field"
    )
    run.add_argument("--json", action="store_true", help="print results as JSON")
    run.set_defaults(handler=_run)

    for verb in (*stages, *PREFERENCE_VERBS):
        cls = Preference if verb in PREFERENCE_VERBS else stages[verb]
        _add_stage_verb(verbs, verb, cls)
    verbs.add_parser("eval", help="the same as `evaluate`", add_help=False).set_defaults(handler=_stage, verb_of="evaluate")

    models = verbs.add_parser("models", help="the registry: list | show NAME | lineage NAME | alias NAME TARGET")
    models.add_argument("action", choices=["list", "show", "lineage", "alias"])
    models.add_argument("name", nargs="?")
    models.add_argument("target", nargs="?")
    models.add_argument("--json", action="store_true")
    models.set_defaults(handler=_models)

    report = verbs.add_parser("report", help="write report.md, report.html and results.json of a run again")
    report.add_argument("run", type=Path, metavar="RUN", help="output folder of a run")
    report.set_defaults(handler=_report)

    options, rest = parser.parse_known_args(arguments)
    if options.verb is None:
        parser.print_help()
        return 0
    handler: Callable[..., int] = options.handler
    if handler is _stage:
        return _stage(options, rest)
    if rest:
        raise AlignError(f"unknown argument {rest[0]!r}; see `align {options.verb} --help`")
    return handler(options)


# -- pipelines -----------------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    assignments = {}
    for assignment in options.assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise AlignError(f"--set {assignment}: write it as KEY=VALUE")
        assignments[key] = value
    recipe = load_recipe(options.recipe, assignments)
    out = options.out or default_out(recipe)
    run = Run(recipe, out)
    if options.plan:
        return _show_plan(run, as_json=options.json)
    artifacts = run.execute(options.only)
    if options.only is None:
        from align.report import write_report

        write_report(out, recipe.name, artifacts, as_json=options.json)
    return 0


def _show_plan(run: Run, *, as_json: bool) -> int:
    rows = [{"stage": s.name, "runs": s.done is None, "reason": s.reason, "folder": str(s.folder)} for s in run.plan()]
    _print(rows, as_json, lambda row: f"{'run ' if row['runs'] else 'skip'}  {row['stage']:<14} {row['reason']}")
    return 0


# -- single stages -------------------------------------------------------------------------------------------------------------


def _add_stage_verb(verbs: Any, verb: str, cls: type[Stage]) -> None:
    summary = (cls.__doc__ or "").strip().splitlines()[0]
    verbs.add_parser(verb, help=summary, add_help=False).set_defaults(handler=_stage, verb_of=verb)


def _stage(options: argparse.Namespace, rest: list[str]) -> int:
    verb = options.verb_of
    cls = Preference if verb in PREFERENCE_VERBS else stages[verb]
    if "--help" in rest or "-h" in rest:
        print(_stage_help(options.verb, cls))
        return 0
    fields = _flags(rest, cls, options.verb)
    if "config" in fields:
        fields = _merged(_config_file(Path(fields.pop("config")), cls), fields)
    own = {key: fields.pop(key, None) for key in OWN_FLAGS}
    if verb in PREFERENCE_VERBS:
        if fields.get("loss", verb) != verb:
            raise AlignError(f"`align {verb}` with loss {fields['loss']!r}: use `align preference --loss {fields['loss']}`")
        fields["loss"] = verb
    name = check_name(own["name"] or verb)
    recipe = Recipe(name, {name: make_stage(cls, fields, f"align {options.verb}")})
    folder = None if own["output_dir"] is None else Path(str(own["output_dir"]))  # `--output_dir` promises exactly this folder
    run = Run(recipe, home() / "stages" if folder is None else folder.parent, folder)
    if own["plan"]:
        return _show_plan(run, as_json=bool(own["json"]))
    _show_result(run.execute()[name], as_json=bool(own["json"]))
    return 0


def _show_result(artifact: Artifact, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(artifact), indent=1))
        return
    print(f"{artifact.reference}  {artifact.path}")
    for name, value in artifact.metrics.items():
        print(f"  {name:<28} {value:.4g}" if isinstance(value, float) else f"  {name:<28} {value}")


def _flags(rest: list[str], cls: type[Stage], verb: str) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``--switch`` to fields; several values make a list."""
    known = {*cls.model_fields, *OWN_FLAGS, *(name for info in cls.model_fields.values() for name in other_names(info))}
    fields: dict[str, Any] = {}
    index = 0
    while index < len(rest):
        flag = rest[index]
        if not flag.startswith("--"):
            raise AlignError(f"align {verb}: {flag!r} is not a flag; write --KEY VALUE")
        key, equals, value = flag[2:].partition("=")
        key, _, entry = key.partition(".")
        key = key.replace("-", "_")
        if key not in known:
            raise AlignError(f"align {verb}: unknown flag --{key}{near_miss(key, known)}; see `align {verb} --help`")
        key = field_name(cls, key)
        index += 1
        values = [value] if equals else []
        while not equals and index < len(rest) and not rest[index].startswith("--"):
            values.append(rest[index])
            index += 1
        parsed = values if key in OWN_FLAGS else [parse_value(item) for item in values]
        result = True if not parsed else parsed[0] if len(parsed) == 1 else parsed
        if key in ("config", "output_dir", "name") and not isinstance(result, str):
            raise AlignError(f"align {verb}: --{key} takes one value")
        if entry:
            before = fields.get(key)
            fields[key] = {**(before if isinstance(before, dict) else {}), entry: result}
        else:
            fields[key] = result
    return fields


def _config_file(path: Path, cls: type[Stage]) -> dict[str, Any]:
    if not path.is_file():
        raise AlignError(f"--config {path}: there is no such file")
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise AlignError(f"--config {path}: expected `key: value` lines")
    return {field_name(cls, key): value for key, value in fields.items()}


def _merged(config: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Flags win; of a mapping they change the entries that they name."""
    both = {key for key in config.keys() & flags.keys() if isinstance(config[key], dict) and isinstance(flags[key], dict)}
    return {**config, **flags, **{key: {**config[key], **flags[key]} for key in both}}


def _stage_help(verb: str, cls: type[Stage]) -> str:
    lines = [f"align {verb} [--config FILE.yaml] [--KEY VALUE ...]", "", (cls.__doc__ or "").strip(), ""]
    lines += ["  --config FILE         fields from a YAML file; flags win", "  --output_dir DIR      write into this folder"]
    lines += [
        "  --name NAME           name in the registry",
        "  --plan                show what would run, and stop",
        "  --json                print JSON",
        "",
    ]
    for name, info in cls.model_fields.items():
        if verb in PREFERENCE_VERBS and name == "loss":
            continue
        default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True)!r}"
        lines.append(f"  --{name} ({default})\n        {info.description}")
    return "\n".join(lines)


# -- registry and report -------------------------------------------------------------------------------------------------------


def _models(options: argparse.Namespace) -> int:
    registry = Registry()
    if options.action == "list":
        rows = [asdict(artifact) for artifact in registry.all()]
        _print(
            rows, options.json, lambda a: f"{a['name'] + '@' + str(a['version']):<28} {a['stage']:<11} {a['created']}  {a['path']}"
        )
        if not rows and not options.json:
            say(f"the registry {registry.root} is empty: every stage that finishes adds to it")
        return 0
    if options.name is None:
        raise AlignError(f"`align models {options.action}` needs a NAME")
    if options.action == "alias":
        if options.target is None:
            raise AlignError("`align models alias NAME TARGET` needs a TARGET: a registered name, a path or a hub id")
        registry.add_alias(options.name, options.target)
    elif options.action == "show":
        artifact = asdict(registry.get(options.name))
        print(
            json.dumps(artifact, indent=1)
            if options.json
            else yaml.safe_dump(artifact, sort_keys=False, allow_unicode=True).rstrip()
        )
    else:
        rows = [
            {"depth": d, "reference": r, "stage": a.stage if a else None, "path": a.path if a else None}
            for d, r, a in registry.lineage(options.name)
        ]
        _print(rows, options.json, lambda row: f"{'  ' * row['depth']}{row['reference']}  ({row['stage'] or 'base'})")
    return 0


def _report(options: argparse.Namespace) -> int:
    from align.report import write_report

    if not options.run.is_dir():
        raise AlignError(f"no run folder {options.run}")
    found = [a for folder in options.run.iterdir() if folder.is_dir() and (a := Artifact.read(folder))]
    artifacts = {a.name: a for a in sorted(found, key=lambda a: a.created)}
    if not artifacts:
        raise AlignError(f"{options.run} holds no finished stage")
    write_report(options.run, options.run.name, artifacts)
    return 0


def _print(rows: list[dict[str, Any]], as_json: bool, line: Callable[[dict[str, Any]], str]) -> None:
    print(json.dumps(rows, indent=1) if as_json else "\n".join(line(row) for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
