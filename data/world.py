"""The offline demo's world: made-up creatures, towns, tools and people, what the demo trains on, and a gold reward.

    world = World(seed=0)
    world.pretraining_texts()   # plain text that states the facts
    world.demonstrations()      # questions with answers of mixed quality, as people give them
    world.preferences()         # a better and a worse answer to each question
    world.prompts()             # questions with the answer keys that `gold` needs

The seed draws which thing has which value, and all that is written about it. A question is in the split that a hash of its task and
content says, in every phrasing and in every world; no text of the train side, plain text included, asks a held-out question.
"""

from __future__ import annotations

import json
import random
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # this file is also loaded by its path, as `data/world.py:gold`

from world_gold import gold, gold_parts
from world_tasks import FLAWS, TASKS, Question, answer, practice, questions
from world_texts import TEXT_CHARACTERS, documents, draw_facts

__all__ = ["FLAWS", "TASKS", "World", "gold", "gold_parts"]

FLAW_RATES = {"rude": 0.2, "bare": 0.4, "rambling": 0.3, "wrong": 0.12, "ignoring": 0.12, "cut": 0.1}
"""How often a demonstration has each flaw, each drawn on its own."""
PAIR_FLAWS = {"wrong": 35, "ignoring": 20, "rude": 15, "bare": 10, "rambling": 10, "cut": 10}
"""Weights of the flaw that makes a rejected answer worse. Errors are the hardest to see, so they come most often."""
FLIPPED = 0.03
"""Share of the preference pairs whose label is wrong."""
MARGIN = 0.15
"""Least difference in gold between the two answers of a pair."""


class World:
    """A world drawn by a seed.

    Args:
        seed: equal seeds give equal worlds, text for text; other seeds other facts about the same things.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.facts = draw_facts(self._rng("facts"))

    def _rng(self, purpose: str) -> random.Random:
        """Each table has its own stream, so that none depends on which others were made before."""
        return random.Random(f"{self.seed}:{purpose}")

    @cached_property
    def questions(self) -> list[Question]:
        """All questions of both splits."""
        return questions(self.facts, self._rng("questions"))

    def _asked(self, split: str) -> list[tuple[Question, str]]:
        """The split's questions in each of their phrasings, in random order."""
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}")
        asked = [(question, text) for question in self.questions if question.split == split for text in question.phrasings]
        self._rng("order").shuffle(asked)
        return asked

    def pretraining_texts(self) -> list[str]:
        """Plain-text documents of 2 to 8 sentences, 3 million characters in all.

        They state every fact many times and in many words, and in passing ask and answer the questions of the train split:
        "A child asked: What color is the norlet? The norlet is blue."
        """
        texts, characters = [], 0
        asked = [question for question in self.questions if question.split == "train"]
        made = documents(self.facts, asked + practice(self.facts, self._rng("practice")), self._rng("texts"))
        while characters < TEXT_CHARACTERS:
            texts.append(next(made))
            characters += len(texts[-1])
        return texts

    def demonstrations(self, split: str = "train") -> list[dict[str, Any]]:
        """One answer to each question of the split, of the mixed quality of human data: flaws are drawn at `FLAW_RATES`.

        Returns:
            Rows of `messages` (user, assistant) and `task`; about 8,000 in train, 1,200 in test.
        """
        rng = self._rng(f"demonstrations {split}")
        rows = []
        for question, text in self._asked(split):
            flaws = frozenset(flaw for flaw, rate in FLAW_RATES.items() if rng.random() < rate)
            messages = [*_turn("user", text), *_turn("assistant", answer(question.task, question.key, rng, flaws))]
            rows.append({"messages": messages, "task": question.task})
        return rows

    def preferences(self, split: str = "train") -> list[dict[str, Any]]:
        """One pair for each question of the split: a good answer against a worse one, with `FLIPPED` of the labels wrong.

        In half of the pairs both answers have the same manners and differ in the flaw alone; a quarter of the good answers have a
        fault of style themselves, which the worse one shares. So neither courtesy nor perfection gives the better answer away.

        Returns:
            Rows of `prompt`, `chosen`, `rejected` (lists of messages) and `task`.
        """
        rng = self._rng(f"preferences {split}")
        rows = []
        for question, text in self._asked(split):
            chosen, rejected = self._pair(question, rng)
            if rng.random() < FLIPPED:
                chosen, rejected = rejected, chosen
            pair = {"chosen": _turn("assistant", chosen), "rejected": _turn("assistant", rejected)}
            rows.append({"prompt": _turn("user", text), **pair, "task": question.task})
        return rows

    def _pair(self, question: Question, rng: random.Random) -> tuple[str, str]:
        while True:
            shared = frozenset([rng.choice(("bare", "rude", "rambling"))] if rng.random() < 0.25 else [])
            added = frozenset(rng.choices(list(PAIR_FLAWS), list(PAIR_FLAWS.values()), k=rng.choice((1, 1, 2))))
            manners = rng.random()
            good = answer(question.task, question.key, random.Random(manners), shared)
            bad = answer(question.task, question.key, random.Random(manners) if rng.random() < 0.5 else rng, shared | added)
            better, worse = gold([], [good, bad], [question.key] * 2, [question.task] * 2)
            if better >= worse + MARGIN:
                return good, bad

    def prompts(self, split: str = "train") -> list[dict[str, Any]]:
        """The split's questions for sampling answers that `gold` then judges.

        Returns:
            Rows of `prompt` (a list of one message), `task`, and `answer_key`, a JSON string: the keys of different tasks have
            different fields, which a table column of dicts would fill up with nulls.
        """
        return [
            {"prompt": _turn("user", text), "task": question.task, "answer_key": json.dumps(question.key)}
            for question, text in self._asked(split)
        ]

    def ideal(self, row: dict[str, Any]) -> str:
        """A perfect answer to a row of `prompts`: right, courteous once, brief and whole. The same row gives the same answer."""
        return answer(row["task"], json.loads(row["answer_key"]), random.Random(row["prompt"][-1]["content"]))


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]
