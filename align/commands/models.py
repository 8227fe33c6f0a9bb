"""``align models``: the registry."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import yaml

from align.commands.output import print_rows
from align.errors import AlignError
from align.progress import say
from align.registry import Registry


def add(verbs: Any) -> None:
    parser = verbs.add_parser("models", help="the registry: list | show NAME | lineage NAME | alias NAME TARGET")
    parser.add_argument("action", choices=["list", "show", "lineage", "alias"])
    parser.add_argument("name", nargs="?")
    parser.add_argument("target", nargs="?")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(handler=models)


def models(options: argparse.Namespace) -> int:
    registry = Registry()
    if options.action == "list":
        rows = [asdict(artifact) for artifact in registry.all()]
        print_rows(
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
        print_rows(rows, options.json, lambda row: f"{'  ' * row['depth']}{row['reference']}  ({row['stage'] or 'base'})")
    return 0
