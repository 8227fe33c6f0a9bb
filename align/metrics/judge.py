"""A local language model as judge: which of two answers is better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

from transformers import PreTrainedTokenizerBase

from align.budget import MaxTokens
from align.encode import Encoder
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.models import best_device, load_causal_lm, load_tokenizer
from align.schema import Message
from align.scoring import branch_logps

QUESTION = """Here is a request and two answers to it.

Request:
{prompt}

Answer A:
{first}

Answer B:
{second}

Which answer is better? Reply with the letter alone."""


def letters(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens of the answers "A" and "B" of the judge at `path`.

    Raises:
        AlignError: they are the same.
    """
    lead = "" if tokenizer.chat_template else " "
    first, second = (tokenizer(f"{lead}{letter}", add_special_tokens=False)["input_ids"] for letter in "AB")
    if first == second:  # then every pair would be a tie
        raise AlignError(f"the judge {path} reads the letters A and B as the same token, and cannot answer: take another model")
    return first, second


class JudgeModel:
    """Asks a model which of two answers is better, in both orders, and reads the probabilities of "A" and "B".

    With both orders a judge that prefers the first place prefers nobody (Zheng et al. 2023, arXiv:2306.05685, section 3.4).

    Raises:
        AlignError: there is no such model, or from `letters`.
    """

    def __init__(self, path: str, *, dtype: str, max_length: int, max_tokens: MaxTokens, trust_remote_code: bool = False) -> None:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self.encoder = Encoder(tokenizer, max_length)
        self.model = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model.to(best_device()).requires_grad_(False)
        enable_forest(self.model)
        self.max_tokens, self.chats, self.letters = max_tokens, bool(tokenizer.chat_template), letters(path, tokenizer)

    def __call__(self, prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> list[float | None]:
        """Probability (0 to 1) that each of `ours` is better than its counterpart of `theirs`; None where the question does not fit
        into `max_length` tokens.

        Raises:
            AlignError: none of them does.
        """
        rows = list(zip(prompts, ours, theirs, strict=True))
        asked = [[self._tree(prompt, *pair) for pair in ((a, b), (b, a))] for prompt, a, b in rows]
        most = self.encoder.max_length
        fits = [most is None or max(tree.longest for tree in both) <= most for both in asked]
        if not any(fits):
            shortest = min(max(tree.longest for tree in both) for both in asked)
            raise AlignError(f"each question to the judge takes {shortest} tokens or more; raise max_length ({most})")
        logps = branch_logps(self.model, [tree for both in compress(asked, fits) for tree in both], self.max_tokens)
        first = [1 / (1 + math.exp(min(b - a, 700))) for a, b in logps]
        said = iter((forward + 1 - backward) / 2 for forward, backward in zip(first[::2], first[1::2], strict=True))
        return [next(said) if fit else None for fit in fits]

    def _tree(self, prompt: str, first: str, second: str) -> Tree:
        text = QUESTION.format(prompt=prompt, first=first, second=second)
        asked = self.encoder.prompt_ids([Message(role="user", content=text)] if self.chats else f"{text}\nAnswer:")
        return Tree(asked, self.letters)
