"""``align data ACTION``: look at data, check them, give them another form. One file an action, each with a function `add(actions)`
that adds its parser and sets `handler`, as verbs do.
"""

from __future__ import annotations

from typing import Any

from align.commands.data import augment, check, clean, convert, show, split, stats

ACTIONS = (check, stats, show, convert, clean, augment, split)


def add(verbs: Any) -> None:
    parser = verbs.add_parser("data", help="look at data, check them, give them another form")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action in ACTIONS:
        action.add(actions)
