"""What both sides do: the rows as token trees, the batches, and the model with random weights."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from align.data import load_rows
from align.encode import Encoder, set_chat_template
from align.forest import Tree
from align.schema import PreferenceRow, SFTRow
from align.tokenizers import train_bpe

REAL = Path(os.environ.get("ALIGN_REAL_DATA", Path(__file__).parents[2] / "shared" / "real"))
"""Where the real data sets lie, if anywhere."""

BATCH = 8
"""Pairs (or rows) in an optimizer step."""

VOCABULARY = 8192
MAX_LENGTH = 2048
"""Tokens. Longer rows are left out, because the two sides would cut them differently."""

PAD, BOS, EOS = 0, 1, 2
"""As `train_bpe` numbers them."""

LLAMA_14M = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1280,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": MAX_LENGTH,
}


class Length(NamedTuple):
    """Median and mean of a log-normal distribution, in tokens."""

    median: float
    mean: float

    def draw(self, count: int, generator: random.Random) -> list[int]:
        """`count` lengths of at least 2 tokens in random order: the distribution's quantiles, so that few rows hit the mean."""
        spread = NormalDist(math.log(self.median), math.sqrt(2 * math.log(self.mean / self.median)) or 1e-9)
        lengths = [max(2, round(math.exp(spread.inv_cdf((i + 0.5) / count)))) for i in range(count)]
        generator.shuffle(lengths)
        return lengths


@dataclass(frozen=True)
class Data:
    """A data set: where it lies under `REAL`, and what its lengths are like where it does not."""

    file: str
    kind: str
    """``preference`` or ``sft``."""
    count: int
    prompt: Length
    answers: tuple[Length, ...]

    def generated(self, vocabulary: int, max_length: int = MAX_LENGTH, seed: int = 0) -> list[Tree]:
        """Random tokens in rows of these lengths, answers ended by `EOS` and cut to `max_length`."""
        generator = random.Random(seed)

        def tokens(n: int) -> list[int]:
            return [generator.randrange(3, vocabulary) for _ in range(n)]

        columns = [length.draw(self.count, generator) for length in (self.prompt, *self.answers)]
        trees = []
        for prompt_length, *lengths in zip(*columns, strict=True):
            prompt = tokens(min(prompt_length, max_length * 3 // 4))
            answers = [[*tokens(min(n, max_length - len(prompt)) - 1), EOS] for n in lengths]
            trees.append(_tree(self.kind, prompt, answers))
        return trees

    def real(self) -> list[Tree]:
        """The first `count` rows that `MAX_LENGTH` leaves whole."""
        encode = getattr(Encoder(tokenizer()), self.kind)
        return [tree for tree in encode(_rows(self.file, self.kind)).trees if tree.longest <= MAX_LENGTH][: self.count]

    def trees(self) -> list[Tree]:
        """The real rows where they are here, else generated ones."""
        return self.real() if REAL.is_dir() else self.generated(VOCABULARY)


def _tree(kind: str, prompt: list[int], answers: list[list[int]]) -> Tree:
    if kind == "preference":
        return Tree(prompt, tuple(answers))
    (answer,) = answers
    return Tree(prompt + answer, prompt_mask=[False] * len(prompt) + [True] * len(answer))


DATA = {
    "hh": Data("pref/hh_rlhf_harmless_base_test.jsonl.gz", "preference", 160, Length(89, 116), (Length(29, 40), Length(32, 52))),
    "long": Data("pref/dpo_en_demo.jsonl", "preference", 80, Length(253, 418), (Length(272, 299), Length(362, 367))),
    "alpaca": Data("sft/alpaca_en_demo.jsonl", "sft", 160, Length(25, 29), (Length(135, 168),)),
}
"""The lengths are those of the real rows under `tokenizer`."""


@cache
def _rows(file: str, kind: str) -> list[Any]:
    return load_rows(str(REAL / file), kind).rows


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of `VOCABULARY` tokens, trained on all the real data sets, with the plain chat template."""
    tokenizer = train_bpe(
        (text for data in DATA.values() for row in _rows(data.file, data.kind) for text in _texts(row)), VOCABULARY
    )
    set_chat_template(tokenizer, "plain")
    return tokenizer


def _texts(row: PreferenceRow | SFTRow) -> Iterator[str]:
    names = ("prompt", "chosen", "rejected", "completion", "messages")
    for part in (getattr(row, name, None) for name in names):
        if part is not None:
            yield from [part] if isinstance(part, str) else (message.content for message in part)


# -- batches --------------------------------------------------------------------------------------------------------------------


def batches(trees: Sequence[Tree], steps: int, *, by_length: bool) -> list[list[Tree]]:
    """`steps` batches of `BATCH` rows: the first ones in random order, or evenly spaced ones of the rows sorted by length.

    Begins anew where the data hold fewer.
    """
    order = sorted(trees, key=lambda tree: tree.longest) if by_length else random.Random(0).sample(trees, len(trees))
    whole = [order[i : i + BATCH] for i in range(0, len(order) - BATCH + 1, BATCH)]
    if by_length and steps < len(whole):
        return [whole[int((i + 0.5) * len(whole) / steps)] for i in range(steps)]
    return [whole[i % len(whole)] for i in range(steps)]


def tokens_of(trees: Iterable[Tree]) -> int:
    """Unique tokens of `trees`."""
    return sum(tree.tokens for tree in trees)


def lightest(plan: Sequence[list[Tree]]) -> list[Tree]:
    """The batch whose longest row is the shortest."""
    return min(plan, key=_longest)


def heaviest_last(plan: Sequence[list[Tree]], steps: int) -> list[list[Tree]]:
    """`steps` batches, the last one with the longest row of `plan`: peak memory is reached with the optimizer's state in place."""
    light = sorted(plan, key=_longest)
    return [*(light[i % len(light)] for i in range(steps - 1)), light[-1]]


def _longest(batch: Sequence[Tree]) -> int:
    return max(tree.longest for tree in batch)


# -- one run --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Everything a side needs to train: the method, the model, and the batches in order."""

    method: str
    """``dpo``, ``orpo``, ``simpo``, ``reward`` or ``sft``."""
    architecture: dict[str, Any]
    """``model_type`` and the fields of its config."""
    batches: list[list[Tree]]
    bf16: bool = False
    """Autocast to bfloat16."""
    compiled: bool = False
    """Ours: the model is compiled."""
    precompute: bool = False
    """TRL: log-probs of the reference before training instead of in every step. (Ours always does.)"""
    weights: str = "float32"
    device: str = "cpu"
    learning_rate: float = 1e-4
    logging_steps: int = 1
    warm_up: int = 1
    """The first so many batches are not timed."""
    seed: int = 0

    @property
    def trees(self) -> list[Tree]:
        return [tree for batch in self.batches for tree in batch]

    @property
    def warm_up_rows(self) -> int:
        """Rows of the batches that are not timed."""
        return sum(map(len, self.batches[: self.warm_up]))

    @property
    def longest(self) -> int:
        """Tokens in the longest path."""
        return _longest(self.trees)

    def over(self, plan: list[list[Tree]]) -> Job:
        """The job on the batches of `plan`, behind two steps that warm up on the one with the longest row: they ask the machine for
        all the memory that the others take; the optimizer's is there from the second.
        """
        warm_up = heaviest_last(plan, 1) * 2
        return replace(self, batches=warm_up + plan, warm_up=len(warm_up))

    def write(self, path: Path) -> None:
        """As JSON, for another process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        fields["batches"] = [[Tree(**{**tree, "branches": tuple(tree["branches"])}) for tree in b] for b in fields["batches"]]
        return cls(**fields)


def build(job: Job) -> nn.Module:
    """The model of `job`, its weights drawn by its seed, a score head's too: from zero all first losses would be log 2."""
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    config = AutoConfig.for_model(**{**special, **job.architecture})
    auto: Any = AutoModelForCausalLM
    if job.method == "reward":
        config.num_labels = 1
        auto = AutoModelForSequenceClassification
    torch.manual_seed(job.seed)
    with torch.device(job.device):
        return auto.from_config(config, dtype=getattr(torch, job.weights))
