"""The plain text of the demo's world: which thing has which value, and the short documents a base model learns it from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from world_tasks import Facts, Question, answer, body, questions, some
from world_words import (
    ATTRIBUTES,
    CLOSERS,
    FILLERS,
    NAMES,
    OPENERS,
    PLURALS,
    RUDE,
    capital,
    fill,
    join,
    pronoun,
    statement,
    the,
)

TEXT_CHARACTERS = 3_000_000
"""Characters of pretraining text: about 700,000 tokens of a byte-level BPE of 1,280, in which every name and value is one token."""
ASKERS = ("A child", "The teacher", "My friend", "The king", "A neighbor", "A traveler")
HEARSAY = ("People say that", "Everyone knows that", "A traveler saw that", "The teacher says that")


def draw_facts(rng: random.Random) -> Facts:
    """Thing -> attribute -> value. An attribute's values go to equally many things: none is a good guess, each can be listed."""
    facts: Facts = {name: {} for names in NAMES.values() for name in names}
    for attribute in ATTRIBUTES.values():
        names = NAMES[attribute.kind]
        values = list(itertools.islice(itertools.cycle(attribute.values), len(names)))
        rng.shuffle(values)
        for name, value in zip(names, values, strict=True):
            facts[name][attribute.name] = value
    return facts


def documents(facts: Facts, asked: list[Question], rng: random.Random) -> Iterator[str]:
    """Documents without end: descriptions, questions with their answers, lists, requests, small talk.

    Args:
        facts: stated again and again, each about equally often.
        asked: the questions that the text may ask (those of the train split: held-out questions are in no text).
    """
    names = _rounds(list(facts), rng)
    inquiries = _rounds(asked, rng)
    requests = _rounds([question for question in asked if question.task == "polite"], rng)
    values = _rounds([(attribute, value) for attribute in ATTRIBUTES for value in ATTRIBUTES[attribute].values], rng)
    while True:
        kind = rng.choices(("about", "asked", "listed", "requested", "talk"), (30, 54, 10, 3, 3))[0]
        if kind == "about":
            yield _about(next(names), facts, rng)
        elif kind == "asked":
            yield " ".join(_asked(next(inquiries), rng) for _ in range(rng.randint(2, 3)))
        elif kind == "listed":
            yield " ".join(_listed(*next(values), facts, rng) for _ in range(rng.randint(2, 3)))
        elif kind == "requested":
            yield " ".join(_requested(next(requests), rng) for _ in range(2))
        else:
            yield _talk(rng)


def _rounds(items: list, rng: random.Random) -> Iterator:
    """The items in a new order each round: as random as a draw, but each comes equally often."""
    while True:
        yield from rng.sample(items, len(items))


def _about(name: str, facts: Facts, rng: random.Random) -> str:
    """Every fact of one thing, in varied words, and one or two of them twice."""
    known = list(facts[name].items())
    told = rng.sample(known, len(known)) + rng.sample(known, rng.randint(0, 2))
    said = [_fact(name, attribute, value, rng, first=i == 0) for i, (attribute, value) in enumerate(told)]
    return " ".join(f"{capital(text)}." for text in said)


def _fact(name: str, attribute: str, value: str, rng: random.Random, first: bool) -> str:
    plain = statement(name, attribute, value)
    draw = rng.random()
    if draw < 0.15:
        return f"{rng.choice(HEARSAY)} {plain}"
    if draw < 0.35:
        return f"the {attribute} of {the(name)} is {fill(ATTRIBUTES[attribute].value, value=value)}"
    if draw < 0.55 and not first:
        return statement(name, attribute, value, pronoun(name))
    return plain


def _asked(question: Question, rng: random.Random) -> str:
    said = body(question.task, question.key, rng)
    return f"{rng.choice(ASKERS)} {rng.choice(('asked', 'wondered'))}: {rng.choice(question.phrasings)} {said}"


def _listed(attribute: str, value: str, facts: Facts, rng: random.Random) -> str:
    spec = ATTRIBUTES[attribute]
    members = [name for name in NAMES[spec.kind] if facts[name][attribute] == value]
    things = join([the(name) for name in some(members, rng.randint(2, min(4, len(members))), rng)])
    if rng.random() < 0.5:
        return f"{capital(PLURALS[spec.kind])} that {fill(spec.say, value=value)} are {things}."
    if rng.random() < 0.2:
        return f"{capital(spec.plural)} are {join(some(list(spec.values), rng.randint(2, 4), rng))}."
    return f"{capital(things)} {fill(spec.say, value=value)}."


def _requested(question: Question, rng: random.Random) -> str:
    request = body(question.task, question.key, rng)
    return f"{rng.choice(ASKERS)} said: {capital(question.key['say'])}. A kinder way to say it is this: {request}"


def _talk(rng: random.Random) -> str:
    said = [rng.choice(phrases) for phrases in rng.sample((OPENERS, CLOSERS, FILLERS, RUDE), 3)]
    return " ".join(f"{rng.choice(ASKERS)} said: {phrase}" for phrase in said)


def well_formed_texts() -> Iterator[str]:
    """Texts of one world in which every turn of phrase of the world occurs: what the gold reward's grammar is read from."""
    rng = random.Random("well formed")
    facts = draw_facts(rng)
    asked = questions(facts, rng)
    for question in asked:
        for flaws in ((), ("ignoring",), ("rude", "rambling"), ("bare", "rambling")):
            yield answer(question.task, question.key, rng, frozenset(flaws))
        if question.task == "yes_no":  # nothing here is written with the verdict first, but an answer may be
            ((name, known),) = question.key["about"].items()
            for verdict, (attribute, value) in itertools.product(("Yes", "No"), known.items()):
                yield f"{verdict}, {statement(name, attribute, value)}."
    yield from itertools.islice(documents(facts, asked, rng), 3_000)
