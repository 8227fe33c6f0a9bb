"""``align export NAME``: a model as one folder that needs nothing of ours."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add(verbs: Any) -> None:
    parser = verbs.add_parser("export", help="write a model as one folder of safetensors, with a card: NAME --merge --to DIR")
    parser.add_argument("name", metavar="NAME", help="a registered name[@version], an alias, a folder or a hub id")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to make; nothing is overwritten")
    parser.add_argument("--merge", action="store_true", help="make an adapter a part of its base")
    parser.add_argument("--dtype", metavar="TYPE", help="float32, bfloat16 or float16; by default that of the base")
    parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest file (default: 5GB)")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    parser.set_defaults(handler=export)


def export(options: argparse.Namespace) -> int:
    from align.runner.worker import quiet
    from align.tuning.export import export

    quiet()
    exported = export(options.name, options.to, merge=options.merge, dtype=options.dtype, max_shard_size=options.max_shard_size)
    print(json.dumps(asdict(exported), indent=1) if options.json else exported.path)
    return 0
