"""Verifiable instructions in the style of IFEval (Zhou et al. 2023, arXiv:2311.07911): a checker for each of its 25 kinds.

Each checker is one function from the answer and the instruction's own arguments to whether it was followed. Sentences and words are
found by patterns, so nothing but the language checks (package `py3langid`) needs more than Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from align.catalog import Catalog
from align.errors import AlignError
from align.metrics.base import metrics, package, texts
from align.rewards import text_of

instructions: Catalog[Callable[..., bool]] = Catalog("instruction")


def _instruction(name: str) -> Callable[[Callable[..., bool]], Callable[..., bool]]:
    return lambda function: instructions.add(function, name)


def _related(count: int, relation: str, wanted: int) -> bool:
    if relation not in ("less than", "at least"):
        raise AlignError(f"relation {relation!r}: expected 'less than' or 'at least'")
    return count < wanted if relation == "less than" else count >= wanted


# -- keywords ------------------------------------------------------------------------------------------------------------------


@_instruction("keywords:existence")
def _existence(answer: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(re.escape(word), answer, re.IGNORECASE) for word in keywords)


@_instruction("keywords:forbidden_words")
def _forbidden(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


@_instruction("keywords:frequency")
def _frequency(answer: str, *, keyword: str, relation: str, frequency: int) -> bool:
    return _related(len(re.findall(re.escape(keyword), answer, re.IGNORECASE)), relation, int(frequency))


@_instruction("keywords:letter_frequency")
def _letter(answer: str, *, letter: str, let_relation: str, let_frequency: int) -> bool:
    return _related(answer.lower().count(letter.lower()), let_relation, int(let_frequency))


# -- language and case ---------------------------------------------------------------------------------------------------------


def _language(answer: str) -> str | None:
    """The code of the language that `answer` is written in, None where it holds no letter."""
    return package("py3langid").classify(answer)[0] if any(letter.isalpha() for letter in answer) else None


@_instruction("language:response_language")
def _response_language(answer: str, *, language: str) -> bool:
    return _language(answer) in (language, None)


@_instruction("change_case:english_capital")
def _capital(answer: str) -> bool:
    return answer.isupper() and _language(answer.lower()) in ("en", None)


@_instruction("change_case:english_lowercase")
def _lowercase(answer: str) -> bool:
    return answer.islower() and _language(answer) in ("en", None)


@_instruction("change_case:capital_word_frequency")
def _capital_words(answer: str, *, capital_relation: str, capital_frequency: int) -> bool:
    words = re.findall(r"\w+(?:[-'’]\w+)*", answer)
    return _related(sum(word.isupper() for word in words), capital_relation, int(capital_frequency))


# -- lengths -------------------------------------------------------------------------------------------------------------------

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|Inc|Ltd|Co|No|[A-Z])\.$")


def sentences(text: str) -> list[str]:
    """`text` cut behind full stops, question and exclamation marks that end a word, and at blank lines; not behind initials and the
    commonest abbreviations.
    """
    found, start = [], 0
    for mark in re.finditer(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|\n\s*\n", text):
        piece = text[start : mark.end()]
        if not _ABBREVIATION.search(piece.rstrip()[-6:]):  # "Prof." and what stands before it
            found.append(piece.strip())
            start = mark.end()
    return [piece for piece in (*found, text[start:].strip()) if re.search(r"\w", piece)]


@_instruction("length_constraints:number_sentences")
def _number_sentences(answer: str, *, relation: str, num_sentences: int) -> bool:
    return _related(len(sentences(answer)), relation, int(num_sentences))


@_instruction("length_constraints:number_words")
def _number_words(answer: str, *, relation: str, num_words: int) -> bool:
    return _related(len(re.findall(r"\w+", answer)), relation, int(num_words))


def _inner_parts(answer: str, divider: str) -> list[str] | None:
    """What stands between dividers; an empty part is fine at either end only, else None."""
    parts = [part.strip() for part in re.split(divider, answer)]
    return None if not all(parts[1:-1]) else [part for part in parts if part]


@_instruction("length_constraints:number_paragraphs")
def _number_paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    parts = _inner_parts(answer, r"\s?\*\*\*\s?")
    return parts is not None and len(parts) == int(num_paragraphs)


@_instruction("length_constraints:nth_paragraph_first_word")
def _first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [paragraph.strip() for paragraph in answer.split("\n\n") if paragraph.strip()]
    if len(paragraphs) != int(num_paragraphs) or int(nth_paragraph) > len(paragraphs):
        return False
    word = re.split(r"[\s.,?!'\"]", paragraphs[int(nth_paragraph) - 1].lstrip("'\""), maxsplit=1)[0]
    return word.lower() == first_word.lower()


# -- form ----------------------------------------------------------------------------------------------------------------------


@_instruction("detectable_content:number_placeholders")
def _placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", answer)) >= int(num_placeholders)


@_instruction("detectable_content:postscript")
def _postscript(answer: str, *, postscript_marker: str) -> bool:
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(spaced.get(postscript_marker, re.escape(postscript_marker.lower())), answer.lower()))


@_instruction("detectable_format:number_bullet_lists")
def _bullets(answer: str, *, num_bullets: int) -> bool:
    return len(re.findall(r"^[^\S\n]*(?:\*[^*\n]|-).*$", answer, re.MULTILINE)) == int(num_bullets)


@_instruction("detectable_format:constrained_response")
def _constrained(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


@_instruction("detectable_format:number_highlighted_sections")
def _highlights(answer: str, *, num_highlights: int) -> bool:
    found = [*re.findall(r"\*([^\n*]*)\*", answer), *re.findall(r"\*\*([^\n*]*)\*\*", answer)]
    return sum(bool(text.strip()) for text in found) >= int(num_highlights)


@_instruction("detectable_format:multiple_sections")
def _sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", answer)) >= int(num_sections)


@_instruction("detectable_format:json_format")
def _json(answer: str) -> bool:
    text = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # also of endless brackets
        return False
    return True


@_instruction("detectable_format:title")
def _title(answer: str) -> bool:
    return any(line.partition("<<")[2].rpartition(">>")[0].strip(" <>") for line in answer.split("\n"))


# -- combinations, beginnings and ends -----------------------------------------------------------------------------------------


@_instruction("combination:two_responses")
def _two_responses(answer: str) -> bool:
    parts = _inner_parts(answer, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


@_instruction("combination:repeat_prompt")
def _repeat(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_instruction("startend:end_checker")
def _end(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_instruction("startend:quotation")
def _quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


@_instruction("punctuation:no_comma")
def _no_comma(answer: str) -> bool:
    return "," not in answer


# -- the metric and the reward -------------------------------------------------------------------------------------------------


def followed(answer: str, instruction: str, arguments: dict[str, Any] | None) -> bool:
    """Whether `answer` follows one instruction; an empty answer follows none.

    Raises:
        AlignError: there is no such instruction, or it has other arguments.
    """
    if not isinstance(arguments or {}, dict):
        raise AlignError(f"field kwargs: got {arguments!r:.40}, expected an object: the arguments of {instruction!r}")
    given = {key: value for key, value in (arguments or {}).items() if value is not None}
    instructions.check_arguments(instruction, given)
    try:
        return bool(answer.strip()) and instructions[instruction](answer, **given)
    except (TypeError, ValueError) as error:  # no answer raises, so it is the arguments
        raise AlignError(f"instruction {instruction!r}: it cannot be checked with {given}: {error}") from error


def relaxed(answer: str) -> Iterator[str]:
    """The eight versions of which IFEval's loose mode accepts any: without stars, first line, last line."""
    lines = answer.split("\n")
    for kept in (lines, lines[1:], lines[:-1], lines[1:-1]):
        text = "\n".join(kept).strip()
        yield text
        yield text.replace("*", "")


def _each(answer: str, ids: Sequence[str], kwargs: Sequence[dict[str, Any]], loose: bool) -> list[bool]:
    """Of each instruction of a row, whether it was followed."""
    for column, value in (("instruction_id_list", ids), ("kwargs", kwargs)):
        if not isinstance(value, list | tuple):
            raise AlignError(f"field {column}: got {value!r:.40}, expected a list: an entry for each instruction")
    if not ids or len(ids) != len(kwargs):
        raise AlignError(f"a row has {len(ids)} instruction ids and {len(kwargs)} kwargs, expected one each: {ids}")
    versions = list(relaxed(answer)) if loose else [answer]
    return [any(followed(text, name, arguments) for text in versions) for name, arguments in zip(ids, kwargs, strict=True)]


@metrics.add
def ifeval(
    predictions: Sequence[str], instruction_id_list: Sequence[Sequence[str]], kwargs: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, float]:
    """IFEval's four accuracies: share of prompts with every instruction followed, and share of instructions, strict and loose."""
    result = {}
    rows = list(zip(texts(predictions, "ifeval", "predictions"), instruction_id_list, kwargs, strict=True))
    for mode in ("strict", "loose"):
        found = [_each(text, ids, arguments, mode == "loose") for text, ids, arguments in rows]
        result[f"ifeval_prompt_{mode}"] = sum(map(all, found)) / len(found)
        result[f"ifeval_instruction_{mode}"] = sum(map(sum, found)) / sum(map(len, found))
    return result


def follows(
    completions: list, instruction_id_list: list, kwargs: list, *, loose: bool = False, **columns: Any
) -> list[float | None]:
    """A reward: the share of its row's instructions that a completion follows. Abstains where the row has none.

    Named as ``align.metrics.instructions:follows``.
    """
    scores = [
        _each(text_of(completion), ids, arguments, loose) if ids else []
        for completion, ids, arguments in zip(completions, instruction_id_list, kwargs, strict=True)
    ]
    return [sum(score) / len(score) if score else None for score in scores]
