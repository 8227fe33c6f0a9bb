"""``align data augment``: new rows out of rows; each says what it was made of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from align.commands.data.arguments import add_reading, check_outputs


def add(actions: Any) -> None:
    parser = actions.add_parser("augment", help="synonyms, paraphrases, back-translation, swapped pairs")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--how", nargs="+", required=True, metavar="HOW", help="augmentations, as NAME or 'NAME(key=value)'")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="the rows and what was made of them")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn by chance")
    add_reading(parser)
    parser.set_defaults(handler=run)


def run(options: argparse.Namespace) -> int:
    from collections import Counter
    from itertools import compress

    from align.data import plain_fields, write_rows
    from align.quality.augment import augment
    from align.quality.reading import read

    check_outputs([options.file], options.out)
    loaded = read(options.file, options.kind, format=options.format, split=options.split)
    rows = augment(loaded.rows, options.how, options.seed)
    own = [plain_fields(row).get("origin") for row in loaded.rows]  # a column of that name, as a prompt may have it
    new = [i >= len(own) or row.get("origin") != own[i] for i, row in enumerate(rows)]
    numbers = [row["origin"]["row"] - 1 if is_new else i for i, (row, is_new) in enumerate(zip(rows, new, strict=True))]
    write_rows(options.out, ({**loaded.others[n], **row} for n, row in zip(numbers, rows, strict=True)))
    made = Counter(row["origin"]["how"] for row in compress(rows, new))
    counts = {how: made[how] for how in options.how}
    account = {"file": options.file, "loaded": loaded.summary(), "rows": len(loaded.rows), "written": len(rows), "made": counts}
    if options.json:
        print(json.dumps(account))
    else:
        print(f"{options.file}: {loaded.summary()}")
        print("\n".join(f"  {how}: {count:,} rows" for how, count in counts.items()))
        print(f"{len(rows):,} rows written to {options.out}")
    return 0
