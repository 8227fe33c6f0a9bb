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
    (?:\\[cdt]?frac\{\s*(?P<tex_top>-?(?:\d+(?:\.\d*)?|\.\d+))\s*\}\{\s*(?P<tex_bottom>\d+(?:\.\d*)?|\.\d+)\s*\}
      |(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
       (?:[eE](?P<power>[-+]?\d+))?
       (?:\s?/\s?(?P<bottom>\d+(?:\.\d+)?))?
    )""",
    re.VERBOSE,
)
MARKED = (re.compile(r"####[ \t]*(.+)"), re.compile(r"\b(?:final answer|answer)\b(?:\s+is\b|\s*[:=])\s*(.+)", re.IGNORECASE))
"""What announces the final number: GSM8K's mark, then words."""
UNIT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?|\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\?%|\\\$|\\[ ~]")
"""What may stand around a number, in LaTeX."""
MATHS = re.compile(r"[=(),;^+*_|<>!\[\]{}\\]|(?<![a-zA-Z])[-−/]|[-−/](?![a-zA-Z])|\b[xyz]\b")
"""What makes an expression of a number. A slash or hyphen between letters is one of a unit (km/h)."""
PROSE = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}")
"""Two words."""
LONGEST = 600
"""Characters of a number. A longer one is compared as text: Python refuses to read a few thousand digits."""


@rewards.add
def math_answer(completions: list, answer: list, *, tolerance: float = 1e-6, **columns: Any) -> list[float | None]:
    """1 when the completion's final number is the row's `answer`, else 0. Abstains where `answer` is None.

    The final number is what ``#### N`` marks, else what stands in the last ``\\boxed{}``, else what follows the last "answer is" or
    "answer:", else the last number. Thousands commas, signs of currency and units around it do not count; fractions (3/4,
    ``\\frac{3}{4}``, ``\\frac34``) are numbers. A boxed answer that is not one number (x + 1, an interval) must be the same text as
    `answer`, white space apart; so must a number of more than 600 characters.

    Args:
        tolerance: largest relative difference, for 0.333333 and 1/3.
    """
    return [
        None if wanted is None else float(_right(text_of(completion), str(wanted), tolerance))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def final_answer(text: str) -> Fraction | str | None:
    """The final number of `text` (as text where it is very long), what is boxed where that is no number, or None."""
    hashes = MARKED[0].findall(text)
    if hashes and (numbers := _numbers(hashes[-1])):
        return numbers[0]
    boxed = _last_boxed(text)
    if boxed is not None:
        return _held(boxed)
    for line in reversed(MARKED[1].findall(text)):
        if numbers := _numbers(line):
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _held(text: str) -> Fraction | str:
    """The number that `text` is, perhaps with a unit; (1, 2), x = 1 and x + 1 are no numbers but the text."""
    tidied = UNIT.sub(" ", _tidied(text))
    numbers, match = _numbers(tidied), NUMBER.search(tidied)
    if match is None or len(numbers) != 1:
        return _squeezed(text)
    before, after = tidied[: match.start()], tidied[match.end() :]
    alone = not (match["sign"] and before.strip(" $")) and not MATHS.search(f"{before} 0 {after}")
    return numbers[0] if alone else _squeezed(text)


def _wanted(answer: str) -> Fraction | str:
    """A column holds the answer itself, or a worked one, in which it is found as in a completion."""
    marked = "####" in answer or "\\boxed{" in answer or MARKED[1].search(answer)
    if marked or "\n" in answer.strip() or PROSE.search(re.sub(r"\\\w+", "", answer)):
        found = final_answer(answer)
        return _squeezed(answer) if found is None else found
    return _held(answer.rpartition("=")[2])


def _right(completion: str, answer: str, tolerance: float) -> bool:
    found, wanted = final_answer(completion), _wanted(answer)
    if isinstance(found, Fraction) and isinstance(wanted, Fraction):
        return abs(found - wanted) <= Fraction(str(tolerance)) * abs(wanted)  # 1e-6 itself, not the float a little below it
    return found is not None and found in (wanted, _squeezed(answer))


def _tidied(text: str) -> str:
    """`text` without the spaces that LaTeX sets between thousands, and with braces around both digits of a short fraction."""
    text = re.sub(r"\{,\}|,\\!", ",", text)
    text = re.sub(r"(?<=\d)\\,(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(\\[cdt]?frac)\s*(\d)", r"\1{\2}", text)
    return re.sub(r"(\\[cdt]?frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)


def _numbers(text: str) -> list[Fraction | str]:
    text = _tidied(text)
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
    """Without white space and the commands that only set it, or type."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", _tidied(text))
    return re.sub(r"\s+|\\(?:left|right|,|;|!)|\$", "", text).replace("dfrac", "frac").replace("tfrac", "frac")
