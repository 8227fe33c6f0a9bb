"""The rules of cleaning. A rule looks at all rows and names those that should go, each with what is wrong with it."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import Field

from align.catalog import Catalog
from align.errors import AlignError
from align.quality.duplicates import THRESHOLD, leaders, pieces, similarity
from align.quality.overlap import N, Overlap
from align.quality.reading import read
from align.quality.texts import key, mojibake, replies, speaks, texts, whole, words
from align.schema import LabelledRow, LabelledText, PreferenceRow, QARow, Row, short

Found = Iterator[tuple[int, str]]
"""Indices of rows and what is wrong with each."""
Rule = Callable[..., Found]
Names = str | list[str] | tuple[str, ...]

rules: Catalog[Rule] = Catalog("cleaning rule")
"""Functions of the rows; keyword-only parameters are set by the spec, as in ``near_duplicates(threshold=0.8)``."""

DEFAULT = (
    "empty",
    "mojibake_rows",
    "boilerplate",
    "identical_pairs",
    "contradictory_pairs",
    "exact_duplicates",
    "near_duplicates",
    "length_outliers",
)
"""Applied unless rules are named, in this order; the others need to be told something."""


@rules.add
def empty(rows: Sequence[Row]) -> Found:
    """A text without a letter, a digit, a sign or an emoji: there is nothing to ask, or nothing to learn. An empty prompt is
    allowed, and so is a question without a context or an answer.
    """
    for number, row in enumerate(rows):
        for name, text in ({"question": row.question} if isinstance(row, QARow) else replies(row)).items():
            if not speaks(text):
                yield number, f"{name} {'has no letter, digit, sign or emoji' if text.strip() else 'is empty'}"
                break


@rules.add
def mojibake_rows(rows: Sequence[Row]) -> Found:
    """Text that was decoded wrongly, such as ``â€œ`` for a quotation mark, or lost (the replacement character)."""
    for number, row in enumerate(rows):
        for name, text in texts(row).items():
            if found := mojibake(text):
                yield number, f"{name} has {found!r}"
                break


BOILERPLATE = re.compile(
    r"as an ai (?:language )?model|i'?m (?:just )?an ai\b|my knowledge cutoff|lorem ipsum|\{\{\s*\w+\s*\}\}|<noinput>|<nooutput>"
    r"|\[(?:insert|your|add) [\w ]{2,30}\]|(?:subscribe to|sign up for) (?:our|my) newsletter|all rights reserved"
    r"|accept (?:all )?cookies|enable javascript|click here to (?:read|subscribe|download)",
    re.IGNORECASE,
)


@rules.add
def boilerplate(rows: Sequence[Row], *, repeats: Annotated[int, Field(ge=1)] = 5) -> Found:
    """Replies with stock phrases or unfilled placeholders, and replies of eight words or more that answer `repeats` prompts."""
    asked: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        prompt = key(texts(row).get("prompt", ""))
        for text in replies(row).values():
            asked[key(text)].add(prompt)
    for number, row in enumerate(rows):
        for name, text in replies(row).items():
            stock = BOILERPLATE.search(text)
            if stock or (len(asked[key(text)]) >= repeats and len(words(text)) >= 8):
                yield number, f"{name} has {stock[0]!r}" if stock else f"{name} answers {len(asked[key(text)])} prompts"
                break


@rules.add
def identical_pairs(rows: Sequence[Row]) -> Found:
    """Pairs whose replies differ in case, punctuation or white space only."""
    for number, row in enumerate(rows):
        if isinstance(row, PreferenceRow) and key(texts(row)["chosen"]) == key(texts(row)["rejected"]):
            yield number, "chosen and rejected say the same"


@rules.add
def contradictory_pairs(rows: Sequence[Row]) -> Found:
    """Pairs that another row has the other way round; replies that are wanted in one row and unwanted in another; texts of two
    classes.
    """
    judged: dict[tuple[str, ...], set[bool | str]] = defaultdict(set)
    verdicts: list[tuple[tuple[str, ...], bool | str] | None] = []
    for row in rows:
        verdict: tuple[tuple[str, ...], bool | str] | None = None
        if isinstance(row, PreferenceRow | LabelledRow | LabelledText):
            said = {name: key(text) for name, text in texts(row).items()}
            if isinstance(row, LabelledText):
                verdict = ((said["text"],), row.label)
            elif isinstance(row, LabelledRow):
                verdict = ((said["prompt"], said["completion"]), row.label)
            else:
                one, other = sorted((said["chosen"], said["rejected"]))
                verdict = ((said["prompt"], one, other), said["chosen"] == one)
            judged[verdict[0]].add(verdict[1])
        verdicts.append(verdict)
    for number, verdict in enumerate(verdicts):
        if verdict and len(judged[verdict[0]]) > 1 and len(set(verdict[0])) == len(verdict[0]):
            yield number, "another row says the opposite"


def _verdict(row: Row) -> str:
    """The label or the tags of `row`: what two rows of one text must also have in common to be copies."""
    return f"{getattr(row, 'label', '')}{getattr(row, 'tags', '')}"


@rules.add
def exact_duplicates(rows: Sequence[Row]) -> Found:
    """Rows that are equal to an earlier one, and labelled as it is, but for case, punctuation and white space."""
    first: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows):
        same = (*(f"{name}: {key(text)}" for name, text in texts(row).items()), _verdict(row))
        if first.setdefault(same, number) != number:
            yield number, f"the same as {short(whole(rows[first[same]]))}"


@rules.add
def near_duplicates(rows: Sequence[Row], *, threshold: float = THRESHOLD) -> Found:
    """Rows that share at least `threshold` of their five-character pieces with an earlier one that is labelled as they are;
    questions about one context, which is most of their text, only if the questions do.
    """
    questions = [pieces(key(row.question)) if isinstance(row, QARow) else None for row in rows]

    def ask_alike(number: int, other: int) -> bool:
        if _verdict(rows[number]) != _verdict(rows[other]):
            return False
        one, two = questions[number], questions[other]
        return one is None or two is None or similarity(one, two) >= threshold

    for number, leader in enumerate(leaders(map(whole, rows), threshold, ask_alike)):
        if leader != number:
            yield number, f"nearly the same as {short(whole(rows[leader]))}"


@rules.add
def length_outliers(rows: Sequence[Row], *, deviations: Annotated[float, Field(gt=0)] = 6.0) -> Found:
    """Rows far longer or shorter than the rest: the logarithm of their length is more than so many standard deviations from the
    median, the deviation estimated by the median's (1.4826 MAD; Hampel 1974). Of fewer than 20 rows none is.
    """
    lengths = [math.log1p(len(whole(row))) for row in rows]
    if len(rows) < 20:
        return
    middle = statistics.median(lengths)
    spread = 1.4826 * statistics.median(abs(length - middle) for length in lengths)
    for number, length in enumerate(lengths):
        if spread and abs(length - middle) > deviations * spread:
            yield number, f"{len(whole(rows[number])):,} characters, where the median is {math.expm1(middle):,.0f}"


@rules.add
def wrong_language(rows: Sequence[Row], *, expected: Names, confidence: float = 0.9) -> Found:
    """Rows whose replies are, with that confidence, in none of the `expected` languages (ISO 639-1: en, de, zh ...), as py3langid
    tells them apart. Texts of fewer than 20 letters are not judged.
    """
    wanted = {expected} if isinstance(expected, str) else set(expected)
    for number, row in enumerate(rows):
        for name, text in replies(row).items():
            if sum(letter.isalpha() for letter in text) < 20:
                continue
            language, probability = language_of(text)
            if language not in wanted and probability >= confidence:
                yield number, f"{name} is {language}, not {' or '.join(sorted(wanted))}"
                break


def language_of(text: str) -> tuple[str, float]:
    """The likeliest language of `text` (ISO 639-1) and its probability.

    Raises:
        AlignError: py3langid is not installed.
    """
    language, probability = _identifier().classify(text)
    return language, float(probability)


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise AlignError("telling languages apart needs the package py3langid: pip install 'align[quality]'") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@rules.add
def contaminated(rows: Sequence[Row], *, against: Names, n: Annotated[int, Field(ge=1)] = N) -> Found:
    """Rows that repeat a run of `n` words of the prompts in `against`, files of evaluation rows; of shorter prompts, all words."""
    prompts = []
    for source in [against] if isinstance(against, str) else against:
        for row in read(source).rows:
            said = texts(row)
            prompts.append(said.get("prompt") or said.get("question") or whole(row))
    seen = Overlap(prompts, n)
    for number, row in enumerate(rows):
        if run := next((run for text in texts(row).values() if (run := seen.with_text(text))), None):
            yield number, f"repeats {run!r}"
