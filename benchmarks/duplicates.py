"""Near duplicates planted among rows: how many are found, and how much of what is found was planted.
``python -m benchmarks.duplicates [FILE]``: on the rows of FILE, else on made-up texts.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence

from align.quality.augment import load_thesaurus
from align.quality.duplicates import leaders

LETTERS = "abcdefghijklmnopqrstuvwxyz"
Edit = Callable[[list[str], random.Random], None]


def typo(words: list[str], rng: random.Random) -> None:
    i = rng.randrange(len(words))
    place = rng.randrange(len(words[i]) + 1)
    words[i] = words[i][:place] + rng.choice(LETTERS) + words[i][place:]


def drop(words: list[str], rng: random.Random) -> None:
    del words[rng.randrange(len(words))]


def insert(words: list[str], rng: random.Random) -> None:
    words.insert(rng.randrange(len(words) + 1), rng.choice(["really", "now", "also", "please"]))


def replace(words: list[str], rng: random.Random) -> None:
    words[rng.randrange(len(words))] = rng.choice(["thing", "other", "again", "some"])


def punctuation(words: list[str], rng: random.Random) -> None:
    i = rng.randrange(len(words))
    words[i] = f"{words[i].upper()} ,"


def synonyms(words: list[str], rng: random.Random) -> None:
    known = load_thesaurus(None)
    for i, word in enumerate(words):
        if word.lower() in known:
            words[i] = rng.choice(known[word.lower()])


def reorder(words: list[str], rng: random.Random) -> None:
    middle = len(words) // 2
    words[:] = [*words[middle:], *words[:middle]]


SMALL: tuple[Edit, ...] = (typo, drop, insert, replace, punctuation)


def made_up(count: int, seed: int = 0) -> list[str]:
    """Texts of 12 to 60 words out of 3,000 made-up ones, as frequent as Zipf's law has it. Every fifth begins as the one before."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(3000)]
    weights = [1 / (rank + 1) for rank in range(len(vocabulary))]
    texts: list[str] = []
    for i in range(count):
        words = rng.choices(vocabulary, weights, k=rng.randint(12, 60))
        if i % 5 == 4:
            before = texts[-1].split()
            words = [*before[: len(before) // 2], *words[: len(before) - len(before) // 2]]
        texts.append(" ".join(words))
    return texts


def planted(texts: Sequence[str], edits: Sequence[Edit], times: int, seed: int = 0) -> dict[str, int]:
    """Copies of every third of `texts`, edited so many times, each with the number of its source. Copies that say the same as their
    source are left out.
    """
    rng = random.Random(seed)
    copies: dict[str, int] = {}
    for i in range(0, len(texts), 3):
        words = texts[i].split()
        for _ in range(times):
            rng.choice(edits)(words, rng)
        if words != texts[i].split():
            copies[" ".join(words)] = i
    return copies


def precision_and_recall(texts: Sequence[str], copies: dict[str, int], threshold: float) -> tuple[float, float]:
    """With `copies` behind `texts`: of the rows that are found to repeat an earlier one, the share that is planted and put with its
    source, and the share of the planted that is.
    """
    found = leaders([*texts, *copies], threshold)
    right = sum(leader == found[source] for leader, source in zip(found[len(texts) :], copies.values(), strict=True))
    flagged = sum(leader != number for number, leader in enumerate(found))
    return right / max(flagged, 1), right / len(copies)


def main(file: str | None = None) -> None:
    texts = made_up(600)
    if file:
        from align.quality.reading import read
        from align.quality.texts import key, whole

        texts = list({key(text): text for row in read(file).rows if len((text := whole(row)).split()) >= 12}.values())
    print(f"{len(texts)} texts; precision and recall at thresholds\n")
    print("| planted | copies | 0.6 | 0.7 | 0.8 |\n|---|---|---|---|---|")
    kinds = [("1 small edit", SMALL, 1), ("2 small edits", SMALL, 2), ("4 small edits", SMALL, 4)]
    for name, edits, times in [*kinds, ("synonyms", (synonyms,), 1), ("halves exchanged", (reorder,), 1)]:
        if copies := planted(texts, edits, times):
            cells = ["{:.3f}, {:.3f}".format(*precision_and_recall(texts, copies, threshold)) for threshold in (0.6, 0.7, 0.8)]
            print(f"| {name} | {len(copies)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
