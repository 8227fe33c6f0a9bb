"""Layouts of files: where one row ends and the next begins, in text files, CoNLL files, nested JSON and tables without a header."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from align.schema import problem

MARKER = "<|endoftext|>"
"""Parts documents in text files."""


def parting(lines: Iterable[str]) -> str:
    """What parts the documents of a text file: `MARKER` if it occurs, else blank lines (``""``) if any stand between others, else
    the ends of lines (``"\\n"``).
    """
    found, begun, blank = "\n", False, False
    for line in lines:
        if MARKER in line:
            return MARKER
        if not line.strip():
            blank = True
        else:
            found = "" if begun and blank else found
            begun, blank = True, False
    return found


def documents(lines: Iterable[str], parted: str) -> Iterator[tuple[int, str, int]]:
    """Each document with the number of its first line, and how many lines it takes up: its own and the blank ones behind it."""
    begin, text, taken, ended = 0, "", 0, False
    for number, line in enumerate(lines, start=1):
        for i, piece in enumerate(line.split(MARKER) if parted == MARKER else [line]):
            ended = ended or i > 0 or (parted == "" and not piece.strip())
            if text and ended and piece.strip():
                yield begin, text.strip(), taken
                text, taken = "", 0
            if piece.strip():
                begin, ended = begin if text else number, parted == "\n"
            if text or piece.strip():
                text += piece
        taken += 1
    if text:
        yield begin, text.strip(), taken


def sentences(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The sentences of a CoNLL file, parted by blank lines: each as it stands there, and its tokens (first column) with their tags
    (last column), or what is wrong with it.
    """
    content: list[str] = []
    for line in chain(lines, [""]):
        line = line.rstrip("\r\n")
        if line.strip() and not line.startswith("-DOCSTART-"):
            content.append(line)
        elif content:
            yield "\n".join(content), _sentence(content)
            content = []


def _sentence(lines: list[str]) -> dict[str, Any] | str:
    cells = [line.split("\t") if "\t" in line else line.split() for line in lines]
    for number, (line, found) in enumerate(zip(lines, cells, strict=True), start=1):
        if len(found) < 2 or not found[0].strip() or not found[-1].strip():
            return f"line {number} of the sentence, {problem('tags', line, 'a token and its tag')}"
    return {"tokens": [found[0] for found in cells], "tags": [found[-1] for found in cells]}


def header(cells: list[str]) -> list[str] | None:
    """`cells` without the white space around them, if they can be the names of columns: all different, none a number, none empty
    but the first of several, above which pandas writes no name for its numbers of rows.
    """
    cells = [cell.strip() for cell in cells]
    numbers = any(re.fullmatch(r"\s*[-+]?\d+([.,]\d+)?\s*", cell) for cell in cells)
    empty = not all(cell.strip() for cell in (cells[1:] or cells))
    return None if numbers or empty or len(set(cells)) < len(cells) else cells


def columns_of(cells: list[str]) -> list[str]:
    """Names for the columns of a table without a header: a text and its label are known by their shape."""
    return ["text", "label"] if len(cells) == 2 else [f"column {i + 1}" for i in range(len(cells))]


TABLES = ("data", "rows", "examples")
"""Keys under which a JSON document keeps its rows."""


def rows_of(document: Any) -> Iterator[Any]:
    """The rows of a JSON document that is not an array: the questions of a SQuAD file, those under a key of `TABLES`, or itself."""
    key = next((key for key in TABLES if isinstance(document, dict) and isinstance(document.get(key), list)), None)
    for entry in [document] if key is None else document[key]:
        if isinstance(entry, dict) and isinstance(entry.get("paragraphs"), list):
            yield from _questions(entry)
        else:
            yield entry


def _questions(article: dict[str, Any]) -> Iterator[Any]:
    """The questions of one article of a SQuAD file, each with its context."""
    for paragraph in article["paragraphs"]:
        if not isinstance(paragraph, dict) or not isinstance(paragraph.get("qas"), list):
            yield paragraph
            continue
        for question in paragraph["qas"]:
            shared = {"title": article.get("title"), "context": paragraph.get("context")}
            yield {**shared, **question} if isinstance(question, dict) else question
