"""The built-in rewards that read the completion's text. What a spec may set are keyword-only parameters; the others are columns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from align.errors import AlignError
from align.rewards.protocol import rewards, text_of
from align.rewards.spec import REWARD_MODEL


@rewards.add
def exact_match(completions: list, answer: list, *, ignore_case: bool = False, **columns: Any) -> list[float | None]:
    """1 when the completion is the row's `answer`, white space apart, else 0. Abstains where `answer` is None."""

    def normalized(text: Any) -> str:
        text = " ".join(str(text).split())
        return text.casefold() if ignore_case else text

    return [
        None if wanted is None else float(normalized(text_of(completion)) == normalized(wanted))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


@rewards.add
def length_band(completions: list, *, low: int, high: int, **columns: Any) -> list[float]:
    """1 for a completion of `low` to `high` words; falls linearly to 0 at no words, and at twice `high`."""
    if not 0 <= low <= high or high == 0:
        raise AlignError(f"length_band needs 0 <= low <= high and high > 0, not low={low}, high={high}")
    counts = [len(text_of(completion).split()) for completion in completions]
    return [count / low if count < low else max(0.0, min(1.0, 2 - count / high)) for count in counts]


@rewards.add
def keyword(completions: list, *, words: str | Sequence[str], ignore_case: bool = True, **columns: Any) -> list[float]:
    """The share of `words` that occur in the completion, as whole words."""
    wanted = [words] if isinstance(words, str) else list(words)
    if not wanted:
        raise AlignError("keyword needs at least one word in words")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE if ignore_case else 0) for word in wanted]
    return [sum(bool(p.search(text_of(completion))) for p in patterns) / len(patterns) for completion in completions]


@rewards.add
def regex_format(completions: list, *, pattern: str, **columns: Any) -> list[float]:
    """1 when the whole completion, stripped, matches the regular expression `pattern` ('.' matches newlines too), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise AlignError(f"regex_format: {pattern!r} is no regular expression: {error}") from error
    return [float(bool(compiled.fullmatch(text_of(completion).strip()))) for completion in completions]


@rewards.add
def repetition(completions: list, *, ngram: int = 3, penalty: float = 1.0, **columns: Any) -> list[float]:
    """``-penalty`` times the share of the completion's `ngram`-word sequences that occurred before in it."""
    if ngram < 1:
        raise AlignError(f"repetition needs ngram >= 1, not {ngram}")

    def repeated(words: list[str]) -> float:
        ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

    return [-penalty * repeated(text_of(completion).lower().split()) for completion in completions]


FENCED = re.compile(r"```(?i:json)?[^\S\n]*\n(.*?)```", re.DOTALL)  # one way to match: answers may be endless newlines


def _no_json(word: str) -> None:
    """Python reads NaN and Infinity where JSON knows neither (RFC 8259, section 6)."""
    raise ValueError(word)


@rewards.add
def json_valid(completions: list, *, keys: str | Sequence[str] = (), **columns: Any) -> list[float]:
    """1 when the completion is JSON (alone, or in one fenced block), an object with all of `keys` where any are named, else 0."""

    wanted = {keys} if isinstance(keys, str) else set(keys)

    def valid(text: str) -> bool:
        blocks = FENCED.findall(text)
        try:
            value = json.loads(blocks[0].strip() if len(blocks) == 1 else text, parse_constant=_no_json)
        except (ValueError, RecursionError):  # also of endless brackets
            return False
        return not wanted or (isinstance(value, dict) and wanted <= value.keys())

    return [float(valid(text_of(completion))) for completion in completions]


def reward_model(**columns: Any) -> list[float]:
    """The stage's reward model, as one of `reward_funcs`: there it gets a weight, a clip or a gate like any other."""
    raise AlignError(f"the reward {REWARD_MODEL!r} stands for a stage's reward model: set the stage's field reward_model, too")


rewards.add(reward_model, REWARD_MODEL)
