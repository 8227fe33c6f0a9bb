"""The final number of an answer against the number it should be."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from align.rewards.protocol import rewards, text_of

NUMBER = re.compile(
    r"""(?<![\w.])                                  # not within a word, as the 3 of x3
    (?P<sign>[-+−]\s?)?
    [$€£]?
    (?:\\d?t?frac\{\s*(?P<tex_top>-?(?:\d+(?:\.\d*)?|\.\d+))\s*\}\{\s*(?P<tex_bottom>\d+(?:\.\d*)?|\.\d+)\s*\}
      |(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
       (?:[eE](?P<power>[-+]?\d+))?
       (?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?
    )""",
    re.VERBOSE,
)
MARKED = (re.compile(r"####[ \t]*(.+)"), re.compile(r"\b(?:final answer|answer)\b(?:\s+is\b|\s*[:=])\s*(.+)", re.IGNORECASE))
"""What announces the final number: GSM8K's mark, then words."""
LONGEST = 600
"""Characters of a number. A longer one is compared as text: Python refuses to read a few thousand digits."""


@rewards.add
def math_answer(completions: list, answer: list, *, tolerance: float = 1e-6, **columns: Any) -> list[float | None]:
    """1 when the completion's final number is the row's `answer`, else 0. Abstains where `answer` is None.

    The final number is what ``#### N`` marks, else what stands in the last ``\\boxed{}``, else what follows the last "answer is" or
    "answer:", else the last number. Thousands commas, signs of currency and units around it do not count; fractions (3/4,
    ``\\frac{3}{4}``) are numbers. A boxed answer that holds no number (x + 1) must be the same text as `answer`, white space apart;
    so must a number of more than 600 characters.

    Args:
        tolerance: largest relative difference, for 0.333333 and 1/3.
    """
    return [
        None if wanted is None else float(_same(final_answer(text_of(completion)), _wanted(wanted), tolerance))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def final_answer(text: str) -> Fraction | str | None:
    """The final number of `text` (as text where it is very long), what is boxed where that is no number, or None."""
    hashes = MARKED[0].findall(text)
    if hashes and (numbers := _numbers(hashes[-1])):
        return numbers[0]
    boxed = _last_boxed(text)
    if boxed is not None:
        numbers = _numbers(boxed)
        # One number and perhaps a unit; (1, 2) and x = 1 are compared as text.
        return numbers[0] if len(numbers) == 1 and not re.search(r"[=(),;^]", NUMBER.sub("", boxed)) else _squeezed(boxed)
    for line in reversed(MARKED[1].findall(text)):
        if numbers := _numbers(line):
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _wanted(answer: Any) -> Fraction | str:
    found = final_answer(str(answer))
    return _squeezed(str(answer)) if found is None else found


def _same(found: Fraction | str | None, wanted: Fraction | str, tolerance: float) -> bool:
    if isinstance(found, Fraction) and isinstance(wanted, Fraction):
        return abs(found - wanted) <= Fraction(tolerance) * abs(wanted)
    return found == wanted


def _numbers(text: str) -> list[Fraction | str]:
    found: list[Fraction | str] = []
    for match in NUMBER.finditer(text):
        if len(match[0]) > LONGEST:
            found.append(_squeezed(match[0]))
            continue
        top = Fraction((match["tex_top"] or match["number"]).replace(",", ""))
        power, bottom = int(match["power"] or 0), Fraction(match["tex_bottom"] or match["bottom"] or 1)
        if bottom and abs(power) <= 300:
            value = top * Fraction(10) ** power / bottom
            # "5-3" is a difference, not a negative number
            after = text[: match.start()].rstrip()
            negative = (match["sign"] or "").strip() in ("-", "−") and not (after and (after[-1].isdigit() or after[-1] == ")"))
            found.append(-value if negative else value)
    return found


def _last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{...}`` holds, braces inside balanced."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin, len(text)):
        if text[place] == "{":
            depth += 1
        elif text[place] == "}":
            if depth == 0:
                return text[begin:place]
            depth -= 1
    return None


def _squeezed(text: str) -> str:
    """Without white space and the commands that only set it."""
    return re.sub(r"\s+|\\(?:left|right|,|;|!)|\$", "", text)
