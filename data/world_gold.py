"""The demo's gold reward: checks what an answer claims against the row's answer key, and weighs how it says it.

    substance = content × (1/4 + 3/4 instruction)
    style     = fluency × (0.4 tone + 0.3 brevity + 0.3 ending)
    total     = style × (0.1 + 0.9 substance)

Style counts only as far as the answer is right: a polite wrong answer earns at most 0.15, a right but rude one at most 0.6.
Nothing but the text and the key is looked at: an answer cut at the length limit shows as one without an end.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from typing import Any

from world_texts import well_formed_texts
from world_words import (
    ATTRIBUTE_OF,
    ATTRIBUTES,
    CLOSERS,
    COMPARATIVES,
    KIND_OF,
    NAME_OF,
    OBJECTS,
    OPENERS,
    RUDE,
    RUDE_WORDS,
    STOPS,
    TRAITS,
    VERBS,
    WORD,
)

WRONG = 0.05
"""What is left of the content for each false claim."""
LONG = 8
"""Words beyond the limit at which brevity is gone."""
FAULT = 0.25
"""Fluency lost by each slip."""

Sentence = list[str]


def sentences(text: str) -> list[Sentence]:
    """The text's words and marks, cut after each full stop, exclamation or question mark."""
    cut: list[Sentence] = [[]]
    for word in WORD.findall(text):
        cut[-1].append(word)
        if word in STOPS:
            cut.append([])
    return [sentence for sentence in cut if sentence]


def _plain(sentence: Sentence) -> str:
    return " ".join(word.lower() for word in sentence if word.isalpha())


COURTESIES = frozenset(_plain(sentence) for phrase in OPENERS + CLOSERS for sentence in sentences(phrase))
INSULTS = frozenset(_plain(sentence) for phrase in RUDE for sentence in sentences(phrase))


# ---- what an answer claims ----


class Reading:
    """The claims of an answer: its sentences without courtesies and insults, read with the thing asked about in mind.

    Attributes:
        body: the sentences that are left.
        claims: (thing, attribute, value) in order; the thing is None where nothing has been mentioned.
        comparisons: (thing, +1 for more or -1 for less).
        things, values: all that is mentioned, in order, with repetitions.
        denied: claims under a "not".
    """

    def __init__(self, said: list[Sentence], about: list[str]) -> None:
        self.body = [sentence for sentence in said if _plain(sentence) not in COURTESIES | INSULTS]
        self.claims: list[tuple[str | None, str, str]] = []
        self.denied: list[tuple[str | None, str, str]] = []
        self.comparisons: list[tuple[str | None, int]] = []
        self.things: list[str] = []
        self.values: list[str] = []
        # "Blue." answers "what color is the norlet?"; with two things in question, an answer has to say which it means
        self._subjects: list[str | None] = [about[0] if len(about) == 1 else None]
        for sentence in self.body:
            if sentence[-1] != "?":  # asking claims nothing
                self._read([word.lower() for word in sentence])

    def _read(self, words: Sentence) -> None:
        listing = False  # "the norlet, the bimmo and the tarku" are one subject
        for i, word in enumerate(words):
            if word in NAME_OF:
                self._subjects = [*(self._subjects if listing else []), NAME_OF[word]]
                self.things.append(NAME_OF[word])
                listing = True
                continue
            listing = listing and word in ("the", "and", "or", "nor", ",", "both")
            if word in ATTRIBUTE_OF:
                self.values.append(word)
                following = words[i + 1] if i + 1 < len(words) else ""
                subjects = [NAME_OF[following]] if following in NAME_OF else self._subjects  # "the blue norlet"
                found = self.denied if "not" in words[max(0, i - 4) : i] else self.claims
                found.extend((subject, ATTRIBUTE_OF[word].name, word) for subject in subjects)
            elif word in COMPARATIVES:
                self.comparisons.extend((subject, COMPARATIVES[word]) for subject in self._subjects)


def _judge(reading: Reading, about: dict[str, dict[str, str]]) -> tuple[set, int]:
    """The true claims, and how many claims are false; what is said of things nobody asked about counts as false."""
    true = {claim for claim in reading.claims if about.get(claim[0] or "", {}).get(claim[1]) == claim[2]}
    false = {claim for claim in reading.claims if claim not in true}
    false |= {claim for claim in reading.denied if about.get(claim[0] or "", {}).get(claim[1]) == claim[2]}
    return true, len(false)


def _substance(task: str, key: dict[str, Any], said: list[Sentence]) -> tuple[float, float]:
    """Content and instruction, each in [0, 1]."""
    about = key.get("about", {})
    reading = Reading(said, list(about))
    if task == "list":
        return _list(key, reading)
    if task == "polite":
        return _polite(key, reading)
    true, false = _judge(reading, about)
    named = 1.0 if set(about) & set(reading.things) else 0.4
    if task in ("fact", "two_facts"):
        thing = next(iter(about))
        hits = sum((thing, attribute, about[thing][attribute]) in true for attribute in key["ask"])
        return (hits / len(key["ask"])) ** 2 * WRONG**false, named
    if task == "yes_no":
        return _yes_no(key, reading, true, false)
    if task == "choose":
        right = any(claim[1:] == (key["ask"][0], key["value"]) for claim in true)
        return right * WRONG**false, named
    if task == "compare":
        return _compare(key, reading, true, false)
    needed = 2 if task == "describe" else key["n"]
    content = min(1.0, len(true) / needed) ** 2 * WRONG**false
    if task == "describe":
        return content, float(any(key["word"] in map(str.lower, sentence) for sentence in reading.body)) * named
    return content, float(len(reading.body) == key["n"]) * named


def _yes_no(key: dict[str, Any], reading: Reading, true: set, false: int) -> tuple[float, float]:
    """Half the content is the verdict, half is to say what is the case: "no" to everything does not pay."""
    ((thing, known),) = key["about"].items()
    attribute = key["ask"][0]
    value = known[attribute]
    verdicts = {word.lower() for sentence in reading.body for word in sentence} & {"yes", "no"}
    stated = (thing, attribute, value) in true
    if not verdicts:
        return stated * WRONG**false, 0.0
    right = verdicts == {"yes" if value == key["value"] else "no"}
    return right * (0.5 + 0.5 * stated) ** 2 * WRONG**false, 1.0


def _compare(key: dict[str, Any], reading: Reading, true: set, false: int) -> tuple[float, float]:
    """The conclusion is the content; the values alone, without one, are half of it and not what was asked."""
    attribute = ATTRIBUTES[key["ask"][0]]
    rank = {name: attribute.values.index(known[attribute.name]) for name, known in key["about"].items()}
    winners = {max(rank, key=rank.__getitem__): 1, min(rank, key=rank.__getitem__): -1}
    if not reading.comparisons:
        return 0.5 * (len(true) >= 2) * WRONG**false, 0.0
    if any(winners.get(thing or "") != sign for thing, sign in reading.comparisons):
        return 0.0, 1.0
    asked = 1 if key["comparative"] == attribute.comparatives[0] else -1
    return WRONG**false, float(any(sign == asked for _, sign in reading.comparisons))


def _list(key: dict[str, Any], reading: Reading) -> tuple[float, float]:
    """Of the things or values mentioned, how many belong; one too many or one too few is not what was asked."""
    members = set(key["members"])
    mentioned = reading.values if key["value"] is None else reading.things
    strays = reading.things if key["value"] is None else [value for value in reading.values if value != key["value"]]
    denied = [claim for claim in reading.denied if key["value"] in (None, claim[2])]
    items = set(mentioned)
    wrong = len(items - members) + len(strays) + len(denied)
    content = (len(items & members) / max(key["n"], len(items))) ** 2 * WRONG**wrong
    return content, float(len(mentioned) == len(items) == key["n"])


def _polite(key: dict[str, Any], reading: Reading) -> tuple[float, float]:
    """The request in its own words and no other, in one question with one "please"."""
    words = [word.lower() for sentence in reading.body for word in sentence]
    say = key["say"].split()
    present = any(words[i : i + len(say)] == say for i in range(len(words)))
    strays = sum(word in OBJECTS and word != say[-1] for word in words) + max(0, words.count(say[-1]) - 1)
    asks = len(reading.body) == 1 and reading.body[0][-1] == "?" and words[0] in ("could", "would", "can", "will", "please")
    return present * WRONG**strays, float(asks and words.count("please") == 1)


# ---- how it says it ----


def _tone(said: list[Sentence]) -> float:
    """1 for exactly one courtesy; courtesies do not add up: two are a little much, more or the same one twice are grovelling."""
    plain = [_plain(sentence) for sentence in said]
    if any(text in INSULTS for text in plain) or RUDE_WORDS & {word.lower() for sentence in said for word in sentence}:
        return 0.0
    courtesies = [text for text in plain if text in COURTESIES]
    if len(courtesies) > 2 or len(set(courtesies)) < len(courtesies):
        return 0.1
    return (0.4, 1.0, 0.6)[len(courtesies)]


CLASSES = {word: f"<{attribute.name}>" for word, attribute in ATTRIBUTE_OF.items()}
CLASSES |= {name: f"<{kind}>" for name, kind in KIND_OF.items()}
CLASSES |= dict.fromkeys(TRAITS, "<trait>") | dict.fromkeys(OBJECTS, "<object>")
CLASSES |= {word: "<verb>" for verb in VERBS for word in verb.split() if word not in ("the", "me")}


def _classes(sentence: Sentence) -> list[str]:
    """The sentence with names, values and the like replaced by their class, between a start and, where it has one, its stop."""
    first, *rest = sentence
    if first not in CLASSES and first[:1].isupper():
        first = first.lower() if first != "I" else first
    elif first.lower() == first and first.isalpha():
        first = f"small {first}"  # a sentence that starts small is a slip; such a word is in no grammar
    return ["<start>", *(CLASSES.get(word, word) for word in (first, *rest))]


@functools.cache
def grammar() -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """The words (or their classes) and the neighbouring pairs of them that well-formed text of the world has.

    Taken from texts of one world. Because names and values are replaced by classes, it holds for a world of any seed.
    """
    pairs: set[tuple[str, str]] = set()
    for text in well_formed_texts():
        for sentence in sentences(text):
            pairs.update(itertools.pairwise(_classes(sentence)))
    return frozenset(itertools.chain.from_iterable(pairs)), frozenset(pairs)


def _slips(said: list[Sentence]) -> int:
    """Unknown words, neighbours that do not go together, doubled words, and a value, five words or a sentence said twice."""
    words, pairs = grammar()
    slips = 0
    for sentence in said:
        classes = _classes(sentence)
        slips += sum(word not in words for word in classes)
        slips += sum(pair not in pairs for pair in itertools.pairwise(classes) if pair[0] in words and pair[1] in words)
        slips += sum(one.lower() == two.lower() for one, two in itertools.pairwise(sentence))
    plain = [_plain(sentence) for sentence in said]
    slips += len(plain) - len(set(plain))
    values = [word for text in plain for word in text.split() if word in ATTRIBUTE_OF]
    fives = [five for text in plain for five in _grams(text.split(), 5)]
    return slips + len(values) - len(set(values)) + len(fives) - len(set(fives))


def _grams(words: list[str], n: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _ending(said: list[Sentence]) -> float:
    """1 for a last sentence that has a stop after a word that can stand there, half for one that stops after any word."""
    if said[-1][-1] not in STOPS or len(said[-1]) < 2:
        return 0.0
    return 1.0 if tuple(_classes(said[-1])[-2:]) in grammar()[1] else 0.5


# ---- the reward ----

PARTS = ("content", "instruction", "tone", "brevity", "ending", "fluency", "total")


def _text(completion: Any) -> str:
    """A completion's text: a plain string, or the contents of its assistant messages."""
    if isinstance(completion, str):
        return completion
    return " ".join(message["content"] for message in completion if message["role"] == "assistant")


@functools.lru_cache(maxsize=2**16)  # a report asks for each part of the same answers in turn
def _parts(text: str, task: str, answer_key: str) -> dict[str, float]:
    said, key = sentences(text), json.loads(answer_key)
    if not said:
        return dict.fromkeys(PARTS, 0.0)
    content, instruction = _substance(task, key, said)
    over = sum(word.isalpha() for sentence in said for word in sentence) - key["limit"]
    parts = {
        "content": float(content),
        "instruction": float(instruction),
        "tone": _tone(said),
        "brevity": min(1.0, max(0.0, 1 - over / LONG)),
        "ending": _ending(said),
        "fluency": max(0.0, 1 - FAULT * _slips(said)),
    }
    substance = parts["content"] * (0.25 + 0.75 * parts["instruction"])
    style = parts["fluency"] * (0.4 * parts["tone"] + 0.3 * parts["brevity"] + 0.3 * parts["ending"])
    return {**parts, "total": style * (0.1 + 0.9 * substance)}


def gold_parts(
    prompts: list,
    completions: list,
    answer_key: list[str | dict[str, Any]] | None = None,
    task: list[str] | None = None,
    **columns: Any,
) -> list[dict[str, float]]:
    """The gold reward with the parts it is made of.

    Args:
        prompts: not looked at; the answer key says what was asked.
        completions: strings, or lists of messages.
        answer_key: each row's column of that name, a JSON string (or the dict it holds).
        task: each row's task.
        columns: other columns, not looked at.

    Returns:
        For each row `content`, `instruction`, `tone`, `brevity`, `ending`, `fluency` and `total`, each in [0, 1].

    Raises:
        ValueError: a column is missing, or has another length than the completions.
    """
    if answer_key is None or task is None:
        raise ValueError("the gold reward needs the columns `answer_key` and `task`: keep them in the prompt rows")
    if not len(completions) == len(answer_key) == len(task):
        raise ValueError(f"{len(completions)} completions, but {len(answer_key)} answer keys and {len(task)} tasks")
    keys = [key if isinstance(key, str) else json.dumps(key) for key in answer_key]
    return [dict(_parts(_text(completion), name, key)) for completion, name, key in zip(completions, task, keys, strict=True)]


def gold(
    prompts: list,
    completions: list,
    answer_key: list[str | dict[str, Any]] | None = None,
    task: list[str] | None = None,
    **columns: Any,
) -> list[float]:
    """The gold reward of each completion, in [0, 1]: the `total` of `gold_parts`. TRL's reward-function protocol."""
    return [parts["total"] for parts in gold_parts(prompts, completions, answer_key, task, **columns)]
