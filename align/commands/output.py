"""What every verb prints with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def print_rows(rows: list[dict[str, Any]], as_json: bool, line: Callable[[dict[str, Any]], str]) -> None:
    """`rows` as a JSON list, or one `line` for each."""
    print(json.dumps(rows, indent=1) if as_json else "\n".join(line(row) for row in rows))
