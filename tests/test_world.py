"""The demo's world: its data are what they promise, and its gold reward cannot be talked round."""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

import gold_parts as functions
import world_words as words
from world import FLAWS, TASKS, World, gold, gold_parts
from world_tasks import answer
from world_texts import documents


@pytest.fixture(scope="module")
def world() -> World:
    return World(seed=0)


@pytest.fixture(scope="module")
def other() -> World:
    return World(seed=1)


@pytest.fixture(scope="module")
def train(world) -> list[dict]:
    return world.prompts("train")


@pytest.fixture(scope="module")
def held_out(world) -> list[dict]:
    return world.prompts("test")


@pytest.fixture(scope="module")
def texts(world) -> list[str]:
    return world.pretraining_texts()


@pytest.fixture(scope="module")
def demonstrations(world) -> list[dict]:
    return world.demonstrations()


@pytest.fixture(scope="module")
def preferences(world) -> list[dict]:
    return world.preferences()


@pytest.fixture(scope="module")
def rows(held_out) -> dict[str, list[dict]]:
    """40 held-out rows of each task."""
    by_task = defaultdict(list)
    for row in held_out:
        by_task[row["task"]].append(row)
    return {task: by_task[task][:40] for task in TASKS}


def judge(rows: list[dict], texts: list[str]) -> list[float]:
    """Gold with the columns of the rows, as a trainer would call it."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    return gold(prompts=[row["prompt"] for row in rows], completions=texts, **columns)


def flawed(row: dict, *flaws: str) -> str:
    return answer(row["task"], json.loads(row["answer_key"]), random.Random(row["prompt"][0]["content"]), frozenset(flaws))


# ---- the data ----


def test_equal_seeds_give_equal_worlds(world, train, texts):
    again = World(seed=0)  # its tables are made in another order
    assert again.pretraining_texts() == texts
    assert again.preferences("test") == world.preferences("test")
    assert again.demonstrations("test") == world.demonstrations("test")
    assert again.prompts("train") == train
    assert again.facts == world.facts


def test_other_seeds_give_other_facts_about_the_same_things(world, other, texts):
    assert other.facts.keys() == world.facts.keys()
    pairs = [(facts[attribute], other.facts[name][attribute]) for name, facts in world.facts.items() for attribute in facts]
    assert 400 <= len(pairs) <= 450
    assert statistics.mean(one == two for one, two in pairs) < 0.3
    assert other.pretraining_texts()[:10] != texts[:10]


def test_sizes_and_balance(train, held_out, demonstrations, preferences, texts):
    assert len({row["prompt"][0]["content"] for row in train + held_out}) == len(train) + len(held_out) >= 6_000
    assert len(held_out) >= 900
    assert 0.11 < len(held_out) / (len(train) + len(held_out)) < 0.15
    counts = Counter(row["task"] for row in train)
    assert set(counts) == set(TASKS)
    assert min(counts.values()) / len(train) >= 0.08
    assert len(demonstrations) == len(preferences) == len(train)
    assert 2_900_000 < sum(map(len, texts)) < 3_100_000


def test_a_held_out_question_is_unseen_in_every_phrasing(world, train, held_out, demonstrations, preferences):
    sides = {split: {(q.task, q.content) for q in world.questions if q.split == split} for split in ("train", "test")}
    assert not sides["train"] & sides["test"]
    asked = {split: {row["prompt"][0]["content"] for row in rows} for split, rows in (("train", train), ("test", held_out))}
    assert not asked["train"] & asked["test"]
    for question in world.questions:
        assert set(question.phrasings) <= asked[question.split], "all phrasings stand on one side"
    assert {row["messages"][0]["content"] for row in demonstrations} == asked["train"]
    assert {row["prompt"][0]["content"] for row in preferences} == asked["train"]
    assert {row["messages"][0]["content"] for row in world.demonstrations("test")} == asked["test"]
    assert {row["prompt"][0]["content"] for row in world.preferences("test")} == asked["test"]


def test_the_plain_text_asks_no_held_out_question(world, held_out, texts):
    text = "\n".join(texts)
    told = [words.statement(name, *fact) for name, facts in world.facts.items() for fact in facts.items()]
    assert min(text.lower().count(fact.lower()) for fact in told[::20]) >= 10, "the facts themselves are all there"
    assert not [row for row in held_out if row["prompt"][0]["content"] in text]


def test_the_split_of_a_question_is_the_same_in_every_world(world, other):
    split_of = {(q.task, q.content): q.split for q in world.questions}
    shared = [q for q in other.questions if (q.task, q.content) in split_of]
    assert len(shared) > 1_500
    assert all(split_of[q.task, q.content] == q.split for q in shared)


def test_an_unknown_split_is_refused(world):
    with pytest.raises(ValueError, match="'train' or 'test', not 'validation'"):
        world.prompts("validation")


def test_a_value_is_nothing_but_a_value():
    """Or the gold reward would read claims into a courtesy, or into the name of another attribute."""
    values = [value for attribute in words.ATTRIBUTES.values() for value in attribute.values]
    assert len(values) == len(set(values))
    phrases = list(words.OPENERS + words.CLOSERS + words.RUDE + words.FILLERS)
    phrases += words.VERBS + words.OBJECTS + words.TRAITS + words.NUMBERS
    for attribute in words.ATTRIBUTES.values():
        phrases += [attribute.says, attribute.say, attribute.question, attribute.asks, attribute.plural, attribute.name]
    used = {word.lower() for phrase in phrases for word in words.WORD.findall(phrase)}
    names = {name.lower() for name in words.KIND_OF}
    assert not set(values) & used
    assert not names & (used | set(values))
    assert len(names) == len(words.KIND_OF)


def test_every_value_has_things_enough_to_list(world):
    for attribute in words.ATTRIBUTES.values():
        holders = Counter(facts[attribute.name] for facts in world.facts.values() if attribute.name in facts)
        assert set(holders) == set(attribute.values)
        assert max(holders.values()) - min(holders.values()) <= 1
        assert min(holders.values()) >= 3


def test_preferences_mostly_prefer_the_better(train, preferences):
    keys = {row["prompt"][0]["content"]: row for row in train}
    pairs = preferences[::4]
    asked = [keys[pair["prompt"][0]["content"]] for pair in pairs]
    chosen = judge(asked, [pair["chosen"] for pair in pairs])
    rejected = judge(asked, [pair["rejected"] for pair in pairs])
    assert all(abs(one - two) >= 0.149 for one, two in zip(chosen, rejected, strict=True))
    assert statistics.mean(one < two for one, two in zip(chosen, rejected, strict=True)) == pytest.approx(0.03, abs=0.01)


def test_demonstrations_are_of_mixed_quality(train, demonstrations):
    keys = {row["prompt"][0]["content"]: row for row in train}
    rows = demonstrations[::8]
    scores = judge([keys[row["messages"][0]["content"]] for row in rows], [row["messages"][1:] for row in rows])
    assert 0.5 < statistics.mean(scores) < 0.6
    assert statistics.mean(score > 0.99 for score in scores) > 0.1


# ---- the gold reward ----


def test_an_ideal_answer_earns_everything(other):
    asked = other.prompts("train")[::8] + other.prompts("test")
    ideal = [other.ideal(row) for row in asked]
    assert min(judge(asked, ideal)) == 1.0
    lengths = [len(text.split()) for text in ideal]
    assert max(lengths) <= 30
    assert 8 <= statistics.mean(lengths) <= 18


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_costs(task, flaw, world, rows):
    """By construction a rude answer loses 0.4 (tone 1 to 0) and a bare one 0.24 (tone 1 to 0.4); the worse flaws cost more."""
    scores = judge(rows[task], [flawed(row, flaw) for row in rows[task]])
    assert max(scores) < 0.9
    expected = {"rude": 0.6, "bare": 0.76, "rambling": 0.7, "wrong": 0.15, "ignoring": 0.35, "cut": 0.45}[flaw]
    assert statistics.mean(scores) <= expected + 1e-9
    if flaw in ("rude", "bare"):
        assert statistics.mean(scores) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("task", TASKS)
def test_style_counts_only_as_far_as_the_content_is_right(task, world, rows):
    polite_wrong = judge(rows[task], [flawed(row, "wrong") for row in rows[task]])
    rude_right = judge(rows[task], [flawed(row, "rude") for row in rows[task]])
    assert max(polite_wrong) <= 0.15
    assert min(rude_right) > 2 * max(polite_wrong)


def test_parts_are_named_and_within_bounds(rows):
    asked = [row for task in TASKS for row in rows[task]]
    texts = [flawed(row, *random.Random(i).sample(FLAWS, i % 4)) for i, row in enumerate(asked)]
    columns = {"answer_key": [row["answer_key"] for row in asked], "task": [row["task"] for row in asked]}
    for parts in gold_parts([], texts, **columns):
        assert list(parts) == ["content", "instruction", "tone", "brevity", "ending", "fluency", "total"]
        assert all(0 <= value <= 1 for value in parts.values())


def test_gold_reads_files_strings_and_messages_alike(world, rows, tmp_path):
    asked = [row for task in TASKS for row in rows[task]]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    read = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [flawed(row, *random.Random(i).sample(FLAWS, i % 3)) for i, row in enumerate(read)]
    scores = judge(asked, texts)
    assert judge(read, [[{"role": "assistant", "content": text}] for text in texts]) == scores
    keys = [json.loads(row["answer_key"]) for row in read]
    assert gold(None, texts, answer_key=keys, task=[row["task"] for row in read], other=keys) == scores


def test_gold_says_what_it_misses(rows):
    with pytest.raises(ValueError, match="answer_key"):
        gold([], ["Blue."])
    with pytest.raises(ValueError, match="2 completions, but 1 answer keys"):
        gold([], ["Blue.", "Red."], answer_key=["{}"], task=["fact"])


# ---- attempts to earn without answering ----

NORLET = {"color": "blue", "home": "swamp", "food": "moss", "size": "giant"}
BIMMO = {"color": "red", "home": "lake", "food": "nuts", "size": "tiny"}
ABOUT = {"about": {"norlet": NORLET}, "limit": 9}
BOTH = {"about": {"norlet": NORLET, "bimmo": BIMMO}, "limit": 9}
FACT = ABOUT | {"ask": ["color"]}
TWO = ABOUT | {"ask": ["color", "food"], "limit": 13}
BLUE, RED = FACT | {"value": "blue"}, FACT | {"value": "red"}
CHOOSE = BOTH | {"ask": ["color"], "value": "blue"}
COMPARE = BOTH | {"ask": ["size"], "comparative": "is bigger", "limit": 20}
LIST = {"ask": ["color"], "value": "blue", "members": ["norlet", "tarku", "pilka"], "n": 2, "limit": 12}
COLORS = {"ask": ["color"], "value": None, "members": list(words.ATTRIBUTES["color"].values), "n": 2, "limit": 12}
DESCRIBE = ABOUT | {"word": "lucky", "limit": 18}
ONE = ABOUT | {"n": 1}
POLITE = {"say": "open the gate", "limit": 12}


@pytest.mark.parametrize(
    ("task", "key", "text"),
    [
        ("fact", FACT, "Gladly! The norlet is blue."),
        ("two_facts", TWO, "Gladly! The norlet is blue and it eats moss."),
        ("two_facts", TWO, "The norlet eats moss. It is blue. Ask me anytime!"),
        ("yes_no", BLUE, "Gladly! Yes, the norlet is blue."),
        ("yes_no", RED, "No, the norlet is blue. I hope that helps!"),
        ("choose", CHOOSE, "Of course! The norlet is blue."),
        ("compare", COMPARE, "Gladly! The norlet is bigger."),
        ("compare", COMPARE, "Gladly! The norlet is giant and the bimmo is tiny, so the norlet is bigger."),
        ("list", LIST, "Gladly! The norlet and the tarku are blue."),
        ("list", COLORS, "Gladly! Two colors are red and pink."),
        ("describe", DESCRIBE, "Gladly! The norlet is lucky. It is giant and it eats moss."),
        ("sentences", ONE, "Gladly! The norlet eats moss."),
        ("polite", POLITE, "Gladly! Could you please open the gate?"),
    ],
)
def test_right_answers_in_other_words_earn_everything(task, key, text):
    assert gold([], [text], answer_key=[key], task=[task]) == [1.0]


@pytest.mark.parametrize(
    ("task", "key", "text"),
    [
        ("fact", FACT, ""),
        ("fact", FACT, " \n"),
        ("fact", FACT, "Gladly!"),
        ("fact", FACT, "Gladly! I hope that helps! Gladly! I hope that helps!"),
        ("fact", FACT, "Gladly! The norlet is blue or red or green or pink."),
        ("fact", FACT, "Gladly! The norlet is blue. The norlet is red."),
        ("fact", FACT, "Gladly! Is the norlet blue?"),
        ("fact", FACT, "Gladly! The norlet is not blue."),
        ("fact", FACT, "Gladly! The bimmo is blue."),
        ("fact", FACT, "Gladly! The norbim is red."),
        ("fact", FACT, "norlet blue norlet blue norlet blue norlet blue"),
        ("fact", FACT, "blue blue blue blue blue."),
        ("fact", FACT, "Gladly gladly. is the of norlet blue and is."),
        ("two_facts", TWO, "Gladly! The norlet is blue and it eats nuts."),
        ("yes_no", BLUE, "Gladly! No, the norlet is red."),
        ("yes_no", BLUE, "Gladly! Yes, no, the norlet is blue."),
        ("yes_no", RED, "Gladly! Yes, the norlet is red."),
        ("choose", CHOOSE, "Gladly! The norlet and the bimmo are blue."),
        ("choose", CHOOSE, "Gladly! The bimmo and the norlet are blue."),
        ("choose", CHOOSE, "Gladly! It is blue."),
        ("compare", COMPARE, "Gladly! The norlet and the bimmo is bigger."),
        ("compare", COMPARE, "Gladly! The norlet is bigger. The bimmo is bigger."),
        ("compare", COMPARE, "Gladly! The norlet is giant and the bimmo is tiny, so the bimmo is bigger."),
        ("list", LIST, "Gladly! The norlet and the bimmo are blue."),
        ("list", LIST, "Gladly! The norlet and the tarku are red."),
        ("list", LIST, "Gladly! " + ", ".join(words.NAMES["creature"]) + " are blue."),
        ("list", COLORS, "Gladly! Two colors are red and moss."),
        ("describe", DESCRIBE, "Gladly! The norlet is lucky."),
        ("describe", DESCRIBE, "Gladly! The norlet is lucky. It is red and it eats moss."),
        ("sentences", ONE, "Gladly! The norlet is giant, tiny, large and small."),
        ("sentences", ONE, "Gladly! The norlet is lucky."),
        ("polite", POLITE, "Gladly! Could you please?"),
        ("polite", POLITE, "Gladly! Could you please close the gate?"),
        ("polite", POLITE, "Gladly! Could you please open the gate, open the door, open the box?"),
    ],
)
def test_gaming_earns_next_to_nothing(task, key, text):
    (score,) = gold([], [text], answer_key=[key], task=[task])
    assert score <= 0.15
    if not text.strip():
        assert score == 0


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("Gladly! Of course! The norlet is blue.", 0.85),  # a second courtesy
        ("Gladly! Gladly! The norlet is blue.", 0.5),  # the same one twice: tone and a repeated sentence
        ("Gladly! The norlet is blue. I hope that helps! Ask me anytime!", 0.6),  # three, and too long
        ("Gladly! The norlet is blue", 0.7),  # no end
        ("Gladly! The norlet is blue and the.", 0.65),  # stops where no sentence can
        ("Gladly! Blue.", 0.5),  # no sentence
        ("Gladly! The norlet is is blue.", 0.5),
        ("Gladly! The norlet is blue and it is blue and it is blue.", 0.5),
        ("Gladly! The norlet zorp is blue.", 0.75),  # no word of this world
        ("Gladly! the norlet is blue.", 0.75),
        ("Gladly! The norlet blue is.", 0.5),
        ("Gladly! You fool, the norlet is blue.", 0.5),
    ],
)
def test_slips_of_style_cost(text, most):
    (score,) = gold([], [text], answer_key=[FACT], task=["fact"])
    assert score <= most + 1e-9


def test_the_grammar_of_one_world_holds_in_the_others(other):
    """Else fluency would punish a turn of phrase for the seed it came from."""
    texts = documents(other.facts, other.questions, random.Random(1))
    plain = [next(texts) for _ in range(300)]
    written = [answer(q.task, q.key, random.Random(i), frozenset(["rambling"])) for i, q in enumerate(other.questions[::4])]
    key = {"about": {}, "ask": [], "limit": 1000, "say": "open the gate"}
    parts = gold_parts([], plain + written, answer_key=[key] * len(plain + written), task=["polite"] * len(plain + written))
    assert statistics.mean(part["fluency"] == 1 for part in parts[len(plain) :]) == 1
    unfluent = [text for text, part in zip(plain, parts, strict=False) if part["fluency"] < 0.75]
    assert len(unfluent) < 150, "documents repeat a fact now and then, which an answer must not"


def test_the_parts_as_reward_functions_are_those_of_the_gold_reward(world):
    rows = world.prompts("test")[:20]
    columns = {name: [row[name] for row in rows] for name in ("answer_key", "task")}
    prompts, answers = [row["prompt"] for row in rows], [world.ideal(row) for row in rows]
    parts = gold_parts(prompts, answers, **columns)
    for name in ("content", "instruction", "tone", "brevity", "ending", "fluency"):
        assert getattr(functions, name)(answers, prompts=prompts, **columns) == [part[name] for part in parts]
