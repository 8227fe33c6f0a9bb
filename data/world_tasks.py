"""The demo's nine tasks: what is asked, what the answer key holds, and how an answer is written, with or without flaws.

An answer key is self-contained: it names the facts an answer is checked against, so a row of a file is enough for the gold reward.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import Any

from world_words import (
    ATTRIBUTES,
    CLOSERS,
    FILLERS,
    KIND_OF,
    NAMES,
    NUMBERS,
    OBJECTS,
    OPENERS,
    PLURALS,
    RUDE,
    TRAITS,
    VERBS,
    WORD,
    capital,
    fill,
    join,
    pronoun,
    statement,
    the,
)

TASKS = ("fact", "two_facts", "yes_no", "choose", "compare", "list", "describe", "sentences", "polite")
FLAWS = ("rude", "bare", "rambling", "wrong", "ignoring", "cut")
HELD_OUT = 0.13
"""Share of the contents whose questions are kept for the test split."""
SPARE_WORDS = 5
"""Words an answer may take beyond its longest plain form: the longest courtesy has four."""

Facts = dict[str, dict[str, str]]
"""Thing -> attribute -> value."""
Key = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One content, asked in every one of its phrasings, with the key its answers are checked against."""

    task: str
    content: str
    """What is asked, whatever the phrasing: "norlet|color". The split hangs on task and content alone."""
    phrasings: tuple[str, ...]
    key: Key

    @property
    def split(self) -> str:
        """ "train" or "test": the same in every world, so that the sides never mix, not even between seeds."""
        digest = hashlib.sha256(f"{self.task}|{self.content}".encode()).digest()
        return "test" if int.from_bytes(digest[:4]) < HELD_OUT * 2**32 else "train"


# ---- questions ----


def questions(facts: Facts, rng: random.Random) -> list[Question]:
    """Every question of the world, task by task. Each task gets about 800 to 1,300, so that none is too rare to be learnt by RL."""
    made = itertools.chain(
        _fact(facts),
        _two_facts(facts),
        _yes_no(facts, rng),
        _choose(facts, rng),
        _compare(facts, rng),
        _list(facts),
        _describe(facts, rng),
        _sentences(facts),
        _polite(),
    )
    return [Question(q.task, q.content, q.phrasings, {**q.key, "limit": _limit(q)}) for q in made]


def practice(facts: Facts, rng: random.Random) -> list[Question]:
    """Further questions of the train split, of the tasks whose answer is worked out and not only recalled: for plain text.

    A small model that sees each of them once learns to work them out; one that sees a few of them again and again does not.
    """
    made = itertools.chain(_yes_no(facts, rng), _yes_no(facts, rng), _choose(facts, rng, 1500), _compare(facts, rng, 1500))
    return [question for question in made if question.split == "train"]


def _limit(question: Question) -> int:
    """The most words an answer can have and still be called brief."""
    key, told = question.key, {"describe": 2, "sentences": question.key.get("n")}.get(question.task)
    keys = [key]
    if told:  # such an answer may choose its facts: with no more facts than it tells, each choice has its turn
        ((name, known),) = key["about"].items()
        keys = [{**key, "about": {name: dict(some)}} for some in itertools.combinations(known.items(), told)]
    texts = [body(question.task, key, random.Random(question.content)) for key in keys]
    return SPARE_WORDS + max(sum(word.isalpha() for word in WORD.findall(text)) for text in texts)


def _question(task: str, content: tuple, phrasings: list[str], key: Key) -> Question:
    return Question(task, "|".join(map(str, content)), tuple(capital(text) for text in phrasings), key)


def _fact(facts: Facts):
    for name, known in facts.items():
        for attribute in known:
            of = f"the {attribute} of {the(name)}"
            phrasings = [f"{fill(ATTRIBUTES[attribute].question, name)}?", f"tell me {of}.", f"what is {of}?"]
            yield _question("fact", (name, attribute), phrasings, {"about": {name: known}, "ask": [attribute]})


def _two_facts(facts: Facts):
    for name, known in facts.items():
        for one, two in itertools.combinations(known, 2):
            asked = ATTRIBUTES[two].question.replace("{x}", pronoun(name))
            phrasings = [
                f"{fill(ATTRIBUTES[one].question, name)}, and {asked}?",
                f"tell me the {one} and the {two} of {the(name)}.",
            ]
            yield _question("two_facts", (name, one, two), phrasings, {"about": {name: known}, "ask": [one, two]})


def _yes_no(facts: Facts, rng: random.Random):
    for name, known in facts.items():
        for attribute, value in known.items():
            others = [other for other in ATTRIBUTES[attribute].values if other != value]
            asked = value if rng.random() < 0.5 else rng.choice(others)
            heard = statement(name, attribute, asked)
            phrasings = [f"{fill(ATTRIBUTES[attribute].asks, name, asked)}?", f"I heard that {heard}. Is that right?"]
            key = {"about": {name: known}, "ask": [attribute], "value": asked}
            yield _question("yes_no", (name, attribute, asked), phrasings, key)


def _pairs(facts: Facts, attributes: list[str], count: int, rng: random.Random):
    """Distinct (attribute, one, two), where the two things differ in the attribute."""
    candidates = [
        (attribute, one, two)
        for attribute in attributes
        for one, two in itertools.permutations([name for name, known in facts.items() if attribute in known], 2)
        if facts[one][attribute] != facts[two][attribute]
    ]
    seen = set()
    for attribute, one, two in rng.sample(candidates, len(candidates)):
        if len(seen) < count and (attribute, *sorted((one, two))) not in seen:  # the mirror image is the same content
            seen.add((attribute, *sorted((one, two))))
            yield attribute, one, two


def _choose(facts: Facts, rng: random.Random, count: int = 480):
    for attribute, one, two in _pairs(facts, list(ATTRIBUTES), count, rng):
        value = facts[rng.choice((one, two))][attribute]
        which = fill(ATTRIBUTES[attribute].says, value=value)
        who = "who" if KIND_OF[one] == "person" else "which one"
        phrasings = [f"{who} {which}, {the(one)} or {the(two)}?", f"tell me {who} {which}: {the(one)} or {the(two)}."]
        key = {"about": {one: facts[one], two: facts[two]}, "ask": [attribute], "value": value}
        yield _question("choose", (attribute, value, *sorted((one, two))), phrasings, key)


def _compare(facts: Facts, rng: random.Random, count: int = 480):
    ordered = [name for name, attribute in ATTRIBUTES.items() if attribute.comparatives]
    for attribute, one, two in _pairs(facts, ordered, count, rng):
        asks = rng.choice(ATTRIBUTES[attribute].comparatives)
        phrasings = [f"which one {asks}, {the(one)} or {the(two)}?", f"compare {the(one)} and {the(two)}. Which one {asks}?"]
        key = {"about": {one: facts[one], two: facts[two]}, "ask": [attribute], "comparative": asks}
        yield _question("compare", (attribute, *sorted((one, two))), phrasings, key)


def _list(facts: Facts):
    for attribute in ATTRIBUTES.values():
        things = {value: [name for name in facts if facts[name].get(attribute.name) == value] for value in attribute.values}
        for n in (2, 3):
            for value, members in things.items():
                what = f"{NUMBERS[n]} {PLURALS[attribute.kind]} that {fill(attribute.say, value=value)}"
                key = {"ask": [attribute.name], "value": value, "members": members, "n": n}
                yield _question("list", (value, n), _list_phrasings(what), key)
            key = {"ask": [attribute.name], "value": None, "members": list(attribute.values), "n": n}
            yield _question("list", (attribute.name, n), _list_phrasings(f"{NUMBERS[n]} {attribute.plural}"), key)


def _list_phrasings(what: str) -> list[str]:
    return [f"name {what}.", f"can you list {what}?", f"I need {what}.", f"give me {what}."]


def _describe(facts: Facts, rng: random.Random):
    for name, word in rng.sample(list(itertools.product(facts, TRAITS)), 480):
        phrasings = [f"describe {the(name)} using the word {word}.", f"use the word {word} and describe {the(name)}."]
        yield _question("describe", (name, word), phrasings, {"about": {name: facts[name]}, "word": word})


def _sentences(facts: Facts):
    for name, n in itertools.product(facts, (1, 2, 3)):
        count = f"{NUMBERS[n]} sentence{'s' * (n > 1)}"
        phrasings = [
            f"tell me about {the(name)} in {count}.",
            f"write {count} about {the(name)}.",
            f"in {count}, describe {the(name)}.",
        ]
        yield _question("sentences", (name, n), phrasings, {"about": {name: facts[name]}, "n": n})


def _polite():
    for verb, thing in itertools.product(VERBS, OBJECTS):
        say = f"{verb} the {thing}"
        yield _question("polite", (say,), [f"say this politely: {say}.", f"make this polite: {say}."], {"say": say})


# ---- answers ----


def body(task: str, key: Key, rng: random.Random, wrong: bool = False, ignoring: bool = False) -> str:
    """The answer proper, without courtesy.

    What has to be known comes first, what follows from it after: "The norlet is red, so no." A small model has no other place to
    work things out than the words that it has already said.

    Args:
        wrong: say something false.
        ignoring: leave undone what the question asks for, but say nothing false.
    """
    told = {name: dict(known) for name, known in key.get("about", {}).items()}
    name = next(iter(told), "")
    ask = list(key.get("ask", ()))
    if task in ("fact", "two_facts"):
        if ignoring:
            ask = ask[:1] if task == "two_facts" else [rng.choice([other for other in told[name] if other not in ask])]
        return _facts_body(name, told[name], ask, rng, wrong)
    if task == "yes_no":
        return _yes_no_body(name, ask[0], told[name][ask[0]], key["value"], rng, wrong, ignoring)
    if task == "choose":
        return _choose_body(told, ask[0], rng, wrong, ignoring)
    if task == "compare":
        return _compare_body(told, ask[0], key["comparative"], wrong, ignoring)
    if task == "list":
        return _list_body(key, rng, wrong, ignoring)
    if task == "describe":
        start = "" if ignoring else f"{capital(the(name))} is {key['word']}. "
        subject = None if ignoring else pronoun(name)
        return start + _facts_body(name, told[name], some(list(told[name]), 2, rng), rng, wrong, subject)
    if task == "sentences":
        return _sentences_body(name, told[name], key["n"], rng, wrong, ignoring)
    say = key["say"]
    if wrong:
        verb, thing = say.rsplit(" ", 1)
        say = f"{verb} {rng.choice([other for other in OBJECTS if other != thing])}"
    return f"{capital(say)}." if ignoring else f"{rng.choice(('Could', 'Would'))} you please {say}?"


def some(items: list[str], n: int, rng: random.Random) -> list[str]:
    """n of the items in their own order: whoever keeps an order does not say a thing twice, which small models else do."""
    return [items[i] for i in sorted(rng.sample(range(len(items)), n))]


def _falsify(known: dict[str, str], attributes: list[str], rng: random.Random) -> None:
    """Gives one of the attributes or more a value it does not have."""
    for attribute in rng.sample(attributes, rng.randint(1, len(attributes))):
        known[attribute] = rng.choice([value for value in ATTRIBUTES[attribute].values if value != known[attribute]])


def _facts_body(
    name: str, known: dict[str, str], ask: list[str], rng: random.Random, wrong: bool, subject: str | None = None
) -> str:
    """ "The norlet is blue and it eats moss.", or with another subject for the first fact."""
    if wrong:
        _falsify(known, ask, rng)
    said = [statement(name, attribute, known[attribute], pronoun(name) if i else subject) for i, attribute in enumerate(ask)]
    return capital(" and ".join(said)) + "."


def _yes_no_body(name: str, attribute: str, value: str, asked: str, rng: random.Random, wrong: bool, ignoring: bool) -> str:
    yes = value == asked
    if wrong:
        value = rng.choice([other for other in ATTRIBUTES[attribute].values if other != value]) if yes else asked
        yes = not yes
    said = statement(name, attribute, value)
    return capital(said if ignoring else f"{said}, so {'yes' if yes else 'no'}") + "."


def _choose_body(told: Facts, attribute: str, rng: random.Random, wrong: bool, ignoring: bool) -> str:
    one, two = told
    if ignoring:
        attribute = rng.choice([other for other in told[one] if other != attribute])
    if wrong:
        _falsify(told[one], [attribute], rng)
        _falsify(told[two], [attribute], rng)
    return capital(" and ".join(statement(name, attribute, told[name][attribute]) for name in (one, two))) + "."


def _compare_body(told: Facts, attribute: str, comparative: str, wrong: bool, ignoring: bool) -> str:
    spec = ATTRIBUTES[attribute]
    one, two = told
    if wrong:
        told[one][attribute], told[two][attribute] = told[two][attribute], told[one][attribute]
    more = comparative == spec.comparatives[0]
    winner = (max if more else min)(told, key=lambda name: spec.values.index(told[name][attribute]))
    said = " and ".join(statement(name, attribute, told[name][attribute]) for name in (one, two))
    return capital(said if ignoring else f"{said}, so {the(winner)} {comparative}") + "."


def _list_body(key: Key, rng: random.Random, wrong: bool, ignoring: bool) -> str:
    attribute, members = ATTRIBUTES[key["ask"][0]], key["members"]
    n = key["n"] if not ignoring else rng.choice([m for m in (2, 3, 4) if m != key["n"] and m <= len(members)])
    items = some(members, n, rng)
    if key["value"] is None:
        if wrong:
            items[rng.randrange(n)] = rng.choice([v for spec in ATTRIBUTES.values() if spec is not attribute for v in spec.values])
        return capital(f"{NUMBERS[n]} {attribute.plural} are {join(items)}.")
    if wrong:
        items[rng.randrange(n)] = rng.choice([name for name in NAMES[attribute.kind] if name not in members])
    what = f"{PLURALS[attribute.kind]} that {fill(attribute.say, value=key['value'])}"
    return capital(f"{NUMBERS[n]} {what} are {join([the(name) for name in items])}.")


def _sentences_body(name: str, known: dict[str, str], n: int, rng: random.Random, wrong: bool, ignoring: bool) -> str:
    if ignoring:
        n = rng.choice([m for m in (1, 2, 3) if m != n])
    ask = some(list(known), n, rng)
    if wrong:
        _falsify(known, ask, rng)
    said = [statement(name, attribute, known[attribute], pronoun(name) if i else None) for i, attribute in enumerate(ask)]
    return " ".join(f"{capital(text)}." for text in said)


def answer(task: str, key: Key, rng: random.Random, flaws: frozenset[str] = frozenset()) -> str:
    """An answer in full: one courtesy before or after the body, spoilt by the given flaws (of `FLAWS`).

    The courtesy is drawn first, so two answers from the same state of `rng` differ in their flaws and not in their manners.
    """
    opener, closer, filler, rude = (rng.choice(phrases) for phrases in (OPENERS, CLOSERS, FILLERS, RUDE))
    opens, keeps = rng.random() < 0.6, rng.uniform(0.4, 0.9)
    said = body(task, key, rng, "wrong" in flaws, "ignoring" in flaws)
    if "rude" in flaws:  # nobody is rude and courteous in one breath
        opener, opens = rude, True
    elif "bare" in flaws:
        opener = closer = ""
    parts = [opener if opens else "", said, filler if "rambling" in flaws else "", "" if opens else closer]
    text = " ".join(part for part in parts if part)
    if "cut" in flaws:
        words = text.split()
        text = " ".join(words[: max(1, int(keeps * len(words)))]).rstrip(".,!?")
    return text
