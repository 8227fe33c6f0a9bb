"""Formats of data that come with an answer to compare with: questions, classes, tags, scored answers.

They look closer than the general formats of `align.formats`, so they are tried first.
"""

from __future__ import annotations

import math
from typing import Any

from align.errors import AlignError
from align.intake.catalog import SetAside, data_format
from align.schema import label_name, missing, problem, short
from align.turns import Fields, Raw, assistant, number, string, strings, user


def _named(value: Any, column: str) -> str:
    """The name of a class or an answer, which may be written as a number."""
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
        raise AlignError(problem(column, value, "a name or a number"))
    return label_name(value)


@data_format("Body", "Question", prompt=("Body", "Question"))
def svamp(raw: Raw) -> Fields:
    """SVAMP: a story and a question about it; the number that answers it becomes the column `answer`."""
    story = string(raw, "Body").strip()
    asked = f"{story}{' ' if story.endswith(('.', '?', '!')) else '. '}{string(raw, 'Question').strip()}"
    return {"prompt": [user(asked)], "columns": {"answer": _named(raw["Answer"], "Answer")} if "Answer" in raw else {}}


@data_format(
    "question",
    when=lambda raw: "choices" in raw or (isinstance(raw["question"], dict) and "choices" in raw["question"]),
    prompt=("question", "choices"),
)
def choices(raw: Raw) -> Fields:
    """CommonsenseQA, ARC and the like: a question and its lettered choices; `answerKey` becomes the column `answer`."""
    nested = isinstance(raw["question"], dict)
    inner, path = (raw["question"], "question.") if nested else (raw, "")
    stem, given = inner.get("stem" if nested else "question"), inner.get("choices")
    if not isinstance(stem, str):
        raise AlignError(problem("question.stem" if nested else "question", stem, "a string"))
    if isinstance(given, dict):  # as `datasets` keeps it: a list of labels and a list of texts
        labels, texts = strings(given.get("label"), f"{path}choices.label"), strings(given.get("text"), f"{path}choices.text")
        if len(labels) != len(texts):
            raise AlignError(problem(f"{path}choices.text", f"{len(texts)} texts", f"one for each of the {len(labels)} labels"))
    elif isinstance(given, list) and given:
        for i, one in enumerate(given):
            if not isinstance(one, dict):
                raise AlignError(problem(f"{path}choices[{i}]", one, "a choice: a dictionary with label and text"))
        labels = strings([one.get("label") for one in given], f"{path}choices.label")
        texts = strings([one.get("text") for one in given], f"{path}choices.text")
    else:
        raise AlignError(problem(f"{path}choices", given, "a list of choices with label and text"))
    asked = "\n".join([stem, *(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))])
    key = raw.get("answerKey")
    if key is not None and key not in labels:
        raise AlignError(problem("answerKey", key, f"one of {short(labels)}"))
    return {"prompt": [user(asked)], "columns": {} if key is None else {"answer": key}}


@data_format("question", "answers", when=lambda raw: isinstance(raw["question"], str), prompt=("context", "question", "answers"))
def squad(raw: Raw) -> Fields:
    """SQuAD, XQuAD: a question about a context, every accepted answer, none where it cannot be answered."""
    given = raw["answers"]
    if isinstance(given, dict):  # as `datasets` keeps it
        texts, starts = given.get("text"), given.get("answer_start")
    elif isinstance(given, list) and all(isinstance(one, dict) for one in given):
        texts, starts = [one.get("text") for one in given], [one.get("answer_start") for one in given]
    else:
        texts, starts = given, raw.get("starts")
    answers = strings(texts, "answers.text" if texts is not given else "answers")
    found: Fields = {"question": string(raw, "question"), "context": string(raw, "context") if "context" in raw else ""}
    found["answers"] = answers
    if isinstance(starts, list) and all(start is not None for start in starts):
        found["starts"] = starts
    return found


@data_format(
    when=lambda raw: isinstance(raw.get("choices"), list) and "question_id" in raw and "question" not in raw and "turns" not in raw
)
def answers(raw: Raw) -> SetAside:
    """MT-Bench's reference answers: they name their question by its id alone."""
    return SetAside("an answer without its question: join it to its question by question_id")


@data_format("label", when=lambda raw: "text" in raw or "sentence" in raw)
def labelled(raw: Raw) -> Fields:
    """A text (or `sentence`, as in SST-2) and its class."""
    return {"text": string(raw, "text" if "text" in raw else "sentence"), "label": _named(raw["label"], "label")}


@data_format("tokens", when=lambda raw: "tags" in raw or "ner_tags" in raw)
def tagged(raw: Raw) -> Fields:
    """Words and a tag for each; also the sentences of a .conll file."""
    column = "tags" if "tags" in raw else "ner_tags"
    if column not in raw:
        raise AlignError(f"field tags: {missing('tags', raw)}")
    tags = raw[column]
    if isinstance(tags, list):
        tags = [_named(tag, f"{column}[{i}]") for i, tag in enumerate(tags)]
    return {"tokens": strings(raw["tokens"], "tokens"), "tags": strings(tags, column)}


ANSWERS = ("completions", "responses", "answers")
SCORES = ("scores", "score", "overall_score", "rating")


def _scored(raw: Raw) -> tuple[str, str] | None:
    """The columns of the answers and of their scores; the latter may be keys of each answer."""
    column = next((name for name in ANSWERS if isinstance(raw.get(name), list)), None)
    if column is None:
        return None
    if isinstance(raw.get("scores"), list):
        return column, "scores"
    inner = raw[column][0] if raw[column] else None
    key = next((name for name in SCORES if isinstance(inner, dict) and name in inner), None)
    return None if key is None else (column, key)


@data_format(
    when=lambda raw: any(name in raw for name in ("prompt", "instruction", "question")) and _scored(raw) is not None,
    prompt=("prompt", "instruction", "question", *ANSWERS),
)
def scored(raw: Raw) -> Fields | SetAside:
    """Several answers to one prompt, each with a score (UltraFeedback): the best against the worst; the margin is how far apart."""
    asked = next((name for name in ("prompt", "instruction", "question") if name in raw), None)
    if asked is None:
        raise AlignError(f"field prompt: {missing('prompt', raw)}")
    found = _scored(raw)
    if found is None:
        names = f"a list of {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}, with scores"
        raise AlignError(f"fields completions, scores: found {short(list(raw))}, expected {names}")
    column, key = found
    given = raw[column]
    if key == "scores":
        texts, scores = strings(given, column), raw["scores"]
        if len(scores) != len(texts):
            raise AlignError(problem("scores", f"{len(scores)} scores", f"one for each of the {len(texts)} {column}"))
        values = [number(score, f"scores[{i}]") for i, score in enumerate(scores)]
    else:
        for i, one in enumerate(given):
            if not isinstance(one, dict):
                raise AlignError(problem(f"{column}[{i}]", one, "an answer: a dictionary with its text and score"))
        texts = [_text_of(one, f"{column}[{i}]") for i, one in enumerate(given)]
        values = [number(one.get(key), f"{column}[{i}].{key}") for i, one in enumerate(given)]
    if len(texts) < 2:
        return SetAside("fewer than two scored answers")
    order = range(len(texts))
    best, worst = max(order, key=values.__getitem__), min(order, key=values.__getitem__)
    if values[best] == values[worst]:
        return SetAside("all answers have the same score")
    pair: Fields = {"chosen": [assistant(texts[best])], "rejected": [assistant(texts[worst])]}
    return {"prompt": [user(string(raw, asked))], **pair, "margin": values[best] - values[worst]}


def _text_of(one: Raw, path: str) -> str:
    column = next((name for name in ("response", "completion", "text", "content") if name in one), None)
    if column is None or not isinstance(one[column], str):
        found = None if column is None else one[column]
        raise AlignError(problem(f"{path}.{column or 'response'}", found, "a string"))
    return one[column]
