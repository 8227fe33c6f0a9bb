"""Rows as the model will see them, the tokens that carry a loss marked: in colour for a terminal, or as HTML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from align.encode import Encoder
from align.forest import Tree

Piece = tuple[str, bool]
"""Text, and whether its tokens carry a loss."""

GREEN, DIM, RESET = "\033[32m", "\033[2m", "\033[0m"


def paths(encoder: Encoder, tree: Tree) -> Iterator[list[Piece]]:
    """Every path of `tree` in pieces: a conversation is one, a pair has two (chosen, then rejected)."""
    for branch in tree.branches or ([],):
        mask = [*(tree.prompt_mask or [False] * len(tree.prompt)), *[True] * len(branch)]
        if mask:
            mask[0] = False  # nothing predicts the first token
        yield list(_pieces(encoder, [*tree.prompt, *branch], mask))


def _pieces(encoder: Encoder, tokens: list[int], mask: list[bool]) -> Iterator[Piece]:
    start = 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or mask[i] != mask[start]:
            yield encoder.tokenizer.decode(tokens[start:i]), mask[start]
            start = i


def terminal(pieces: list[Piece], *, colour: bool) -> str:
    """What carries a loss in green; without colour between ⟦ and ⟧."""
    if colour:
        return "".join(f"{GREEN if counts else DIM}{text}{RESET}" for text, counts in pieces)
    return "".join(f"⟦{text}⟧" if counts else text for text, counts in pieces)


def html(pieces: list[Piece]) -> str:
    """What carries a loss inside ``<mark>``."""
    return "".join(f"<mark>{escape(text)}</mark>" if counts else escape(text) for text, counts in pieces)


STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
pre { background: #f6f6f6; padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere } mark { background: #bfe8bf }
.error { color: #a00000 } .warning { color: #8a5a00 }"""


def page(name: str, looked: Sequence[Any]) -> str:
    """A page of HTML with the findings, estimates and rows of every stage (`align.preflight.inspect.Looked`)."""
    parts = [f"<!doctype html><meta charset='utf-8'><title>{escape(name)}: preflight</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{escape(name)}</h1><p>Marked text carries a loss.</p>")
    for each in looked:
        parts.append(f"<h2>{escape(each.name)}</h2><p>{escape(each.about)}</p>")
        parts += [f"<p class='{finding.level}'>{escape(finding.line())}</p>" for finding in each.findings]
        if each.outlook:
            parts.append(f"<p>{escape(each.outlook)}</p>")
        parts += [f"<pre>{html(pieces)}</pre>" for pieces in each.samples]
    return "\n".join(parts) + "\n"
