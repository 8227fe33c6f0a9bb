"""``align models``: the registry."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from align.artifact import Artifact
from align.commands.output import print_rows
from align.errors import AlignError
from align.progress import say
from align.registry import Registry, home
from align.runner.share import delete, pull, push, remove_unreferenced, size, unreferenced


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "models",
        help="the registry: list | show NAME | lineage NAME | alias NAME TARGET | delete NAME@VERSION|ALIAS | gc [FOLDER] | "
        "push NAME FOLDER|hub:OWNER/NAME | pull NAME FOLDER|hub:OWNER/NAME",
    )
    parser.add_argument("action", choices=tuple(ACTIONS), help="see `align --help`")
    parser.add_argument("name", nargs="?", help="a registered NAME[@VERSION] or an alias; of gc a folder")
    parser.add_argument("target", nargs="?", help="alias: what it stands for; push and pull: a folder or hub:OWNER/NAME")
    parser.add_argument("--yes", action="store_true", help="gc: remove what is listed")
    parser.add_argument("--public", action="store_true", help="push: also to a repository of the hub that everybody can read")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=models)


def models(options: argparse.Namespace) -> int:
    registry = Registry()
    if options.action not in ("list", "gc") and not options.name:
        raise AlignError(f"`align models {options.action}` needs a NAME")
    if options.action in ("alias", "push", "pull") and not options.target:
        needed = {"alias": "a TARGET: a registered name, a path or a hub id"}
        raise AlignError(
            f"`align models {options.action} NAME TARGET` needs {needed.get(options.action, 'a FOLDER or hub:OWNER/NAME')}"
        )
    given = [word for word in (options.name, options.target) if word is not None]
    if unread := given[{"list": 0, "alias": 2, "push": 2, "pull": 2}.get(options.action, 1) :]:
        raise AlignError(f"`align models {options.action}` takes no {unread[0]!r}; see `align models --help`")
    return ACTIONS[options.action](registry, options)


def _list(registry: Registry, options: argparse.Namespace) -> int:
    rows = []
    for entry in (entry for name in registry.names() for entry in registry.entries(name)):
        try:
            rows.append(asdict(Artifact.load(entry)))
        except AlignError as error:
            say(str(error))
    rows += [_as_row(alias, target) for alias, target in registry.own_aliases().items()]
    print_rows(rows, options.json, _line)
    if not rows and not registry.names() and not options.json:
        say(f"the registry {registry.root} is empty: every stage that finishes adds to it")
    return 0


def _as_row(alias: str, target: str) -> dict[str, Any]:
    """An alias as it stands among artifacts."""
    return {"name": alias, "version": None, "stage": "alias", "created": "", "path": target}


def _line(row: dict[str, Any]) -> str:
    name = row["name"] if row["version"] is None else f"{row['name']}@{row['version']}"
    gone = "" if row["version"] is None or Path(row["path"]).is_dir() else "  (gone)"
    return f"{name:<28} {row['stage']:<11} {row['created']:<25}  {row['path']}{gone}"


def _show(registry: Registry, options: argparse.Namespace) -> int:
    aliases = registry.aliases()
    if options.name in aliases and options.name not in registry.names():
        artifact = _as_row(options.name, aliases[options.name])
    else:
        known = registry.get(options.name)
        artifact = asdict(known)
        try:
            registry.folder(known)
        except AlignError as gone:  # what is known of it is worth showing all the same
            say(str(gone))
    _tell(artifact, yaml.safe_dump(artifact, sort_keys=False, allow_unicode=True).rstrip(), options)
    return 0


def _tell(row: dict[str, Any], line: str, options: argparse.Namespace) -> None:
    """`row` for a program, or the `line` that says it to a person."""
    print(json.dumps(row, indent=1) if options.json else line)


def _lineage(registry: Registry, options: argparse.Namespace) -> int:
    rows = [
        {"depth": d, "reference": r, "stage": a.stage if a else None, "path": a.path if a else None}
        for d, r, a in registry.lineage(options.name)
    ]
    print_rows(rows, options.json, lambda row: f"{'  ' * row['depth']}{row['reference']}  ({row['stage'] or _unknown(row)})")
    return 0


def _unknown(row: dict[str, Any]) -> str:
    """What an ancestor is that is not in the registry: only paths and hub ids have slashes."""
    return "base" if "/" in row["reference"] else "not in this registry"


def _alias(registry: Registry, options: argparse.Namespace) -> int:
    registry.add_alias(options.name, options.target)
    if options.json:
        print(json.dumps(_as_row(options.name, registry.aliases()[options.name]), indent=1))
    return 0


def _delete(registry: Registry, options: argparse.Namespace) -> int:
    if options.name in registry.own_aliases() and options.name not in registry.names():
        row = _as_row(options.name, registry.remove_alias(options.name))
        _tell(row, f"deleted the alias {options.name} of {row['path']}", options)
        return 0
    artifact = delete(registry, options.name)
    _tell(asdict(artifact), f"deleted {artifact.reference}  {artifact.path}", options)
    return 0


def _gc(registry: Registry, options: argparse.Namespace) -> int:
    root = Path(options.name) if options.name else home()
    if not root.is_dir():
        raise AlignError(f"no folder {root}")
    rows = [{"path": str(path), "bytes": size(path), "removed": options.yes} for path in unreferenced(root)]
    if options.yes:
        rows = [row for row in rows if remove_unreferenced(Path(row["path"]))]
    print_rows(
        rows,
        options.json,
        lambda row: f"{'removed' if row['removed'] else 'unused'}  {row['bytes'] / 2**20:8.1f} MB  {row['path']}",
    )
    if not options.json:
        total = sum(row["bytes"] for row in rows) / 2**20
        say(f"{total:.1f} MB" + ("" if options.yes or not rows else "; --yes removes what is listed"))
    return 0


def _push(registry: Registry, options: argparse.Namespace) -> int:
    where = push(registry, options.name, options.target, public=options.public)
    _tell({"reference": registry.get(options.name).reference, "where": where}, where, options)
    return 0


def _pull(registry: Registry, options: argparse.Namespace) -> int:
    artifact = pull(registry, options.target, options.name, home() / "pulled")
    _tell(asdict(artifact), f"{artifact.reference}  {artifact.path}", options)
    return 0


ACTIONS = {
    "list": _list,
    "show": _show,
    "lineage": _lineage,
    "alias": _alias,
    "delete": _delete,
    "gc": _gc,
    "push": _push,
    "pull": _pull,
}
