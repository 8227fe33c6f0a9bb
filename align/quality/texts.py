"""The texts in a row, and what of a text counts when texts are compared."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from align.schema import Message, Row

PROMPTS = ("prompt", "question")
REPLIES = ("completion", "chosen", "rejected")

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"


@cache
def marks() -> str:
    """The characters that are part of the letter before them, as the vowels of Hindi and Thai are; ``\\w`` has none of them."""
    letters = map(chr, (*range(0x300, 0xFE00), *range(0xFE10, 0x1F000)))  # between: variants of how a character looks
    return "".join(letter for letter in letters if unicodedata.category(letter).startswith("M"))


@cache
def _word() -> re.Pattern[str]:
    letters = rf"[^\W_{CJK}]"
    return re.compile(rf"[{CJK}]|{letters}+(?:[{marks()}]+{letters}*)*")


SIGNS = r"[+<>=≤≥≠±×÷%^$€£\u2600-\u27bf\U0001f000-\U0001faff]|(?<!\*)[-−*/](?=\s?\d)"
"""What is no word and yet makes another question or answer of one: -5 is not 5, 3 * 4 not 3 + 4, and 👍 not 👎. A hyphen is not
among them.
"""


@cache
def _word_or_sign() -> re.Pattern[str]:
    return re.compile(f"{_word().pattern}|{SIGNS}")


def texts(row: Row) -> dict[str, str]:
    """Every text of `row` by its field: messages joined by line ends, assistants' turns of a conversation apart as ``reply``."""
    found: dict[str, str] = {}
    for name in type(row).model_fields:
        value = getattr(row, name)
        if name == "messages" and value is not None:
            found["prompt"] = _joined(message for message in value if message.role != "assistant")
            found["reply"] = _joined(message for message in value if message.role == "assistant")
        elif isinstance(value, str) and name != "label":
            found[name] = value
        elif isinstance(value, list) and value and isinstance(value[0], Message):
            found[name] = _joined(value)
        elif name in ("tokens", "answers"):
            found[name] = " ".join(value)
    return found


def replies(row: Row) -> dict[str, str]:
    """The texts of `row` that a model learns to say, by their field; of a row without replies its whole text."""
    found = texts(row)
    said = {name: text for name, text in found.items() if name in (*REPLIES, "reply")}
    return said or {name: text for name, text in found.items() if name not in PROMPTS}


def whole(row: Row) -> str:
    """All texts of `row` in one."""
    return "\n".join(texts(row).values())


def _joined(messages: Any) -> str:
    return "\n".join(_said(message) for message in messages)


def _said(message: Message) -> str:
    """The words of a turn, its tool calls among them."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls or [] if "function" in call]
    return "\n".join([message.content, *calls] if message.content else calls)


def words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation; every character of Chinese, Japanese and Korean is a word."""
    return _word().findall(unicodedata.normalize("NFKC", text).lower())


def key(text: str) -> str:
    """Equal for texts that differ in case, punctuation and white space only; texts without words keep theirs. `SIGNS` are no
    punctuation.
    """
    return " ".join(_word_or_sign().findall(unicodedata.normalize("NFKC", text).lower())) or text.strip()


def speaks(text: str) -> bool:
    """Whether `text` has a word or one of `SIGNS`."""
    return _word_or_sign().search(text) is not None


def ngrams(items: Sequence[str], n: int) -> Iterator[str]:
    """Every run of `n` items, joined by spaces."""
    return (" ".join(items[i : i + n]) for i in range(len(items) - n + 1))


# Mojibake: UTF-8 that was read as Windows-1252 (or Latin-1)

# What the bytes of UTF-8 look like when each is read as a character: a lead byte, then one to three continuation bytes.
_CONTINUATION = "".join(
    sorted({chr(b) for b in range(0x80, 0xC0)} | {bytes([b]).decode("cp1252", "ignore") for b in range(0x80, 0xA0)} - {""})
)
_MISREAD = re.compile(
    f"[\u00c2-\u00df][{_CONTINUATION}]|[\u00e0-\u00ef][{_CONTINUATION}]{{2}}|[\u00f0-\u00f4][{_CONTINUATION}]{{3}}"
)
_BYTES = {bytes([b]).decode("cp1252"): b for b in range(0x80, 0xA0) if bytes([b]).decode("cp1252", "ignore")}


def mojibake(text: str) -> str | None:
    """The first piece of `text` that is garbled, such as ``â€œ`` for a quotation mark, or the replacement character, or None.

    A piece is garbled if its characters, taken as bytes of Windows-1252 or Latin-1, are the UTF-8 of one other character.
    """
    if text.isascii():
        return None
    for match in _MISREAD.finditer(text):
        try:
            bytes(_BYTES.get(letter, ord(letter)) for letter in match[0]).decode()
        except (UnicodeDecodeError, ValueError):
            continue
        return match[0]
    return "\ufffd" if "\ufffd" in text else None
