"""Scores of token sequences under a model: rewards, log-probs, divergences."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

from align import processes
from align.budget import Budget, MaxTokens, Packed, measuring
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import WINDOW, Forest, Tree, deal, plant
from align.models import best_device, is_classifier, load_reward_model, load_tokenizer
from align.progress import say
from align.rewards import RewardSet
from align.rollout import Completion
from align.runner.files import json_record
from align.schema import PromptRow, Text

SCORE_SCALE = "score_scale.json"
"""In a reward model's folder: mean and deviation of its scores on held-out answers."""


def branch_logps(model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens, temperature: float = 1.0) -> list[list[float]]:
    """Log-probs (nats) of each tree's branches, summed over tokens."""
    return _per_branch(
        model, trees, measuring(max_tokens), lambda forest: forest.per_sequence(model(forest=forest, temperature=temperature).logps)
    )


def branch_scores(model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens | Budget) -> list[list[float]]:
    """A reward model's score of each tree's branches."""
    budget = max_tokens if isinstance(max_tokens, Budget) else measuring(max_tokens)
    return _per_branch(model, trees, budget, lambda forest: model(forest=forest, read="ends"))


def mean_nll(model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens) -> float:
    """Mean negative log-likelihood (nats) of the target tokens; its exponential is the perplexity."""
    sums = _over_forests(model, trees, measuring(max_tokens), lambda forest: model(forest=forest).logps.sum()[None])
    return -sum(total for _, (total,) in sums) / sum(tree.targets for tree in trees)


def token_accuracy(model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens) -> float:
    """Share of the target tokens (0 to 1) that are the model's likeliest."""
    sums = _over_forests(model, trees, measuring(max_tokens), lambda forest: model(forest=forest).correct.sum()[None])
    return sum(total for _, (total,) in sums) / sum(tree.targets for tree in trees)


def dealt(trees: Sequence[Tree], measure: Callable[[Sequence[Tree]], list[list[float]]]) -> list[list[float]]:
    """What `measure` says of each of `trees`, of which every process of the stage measures a share."""
    if processes.alone():
        return measure(trees)
    mine = sorted(deal(trees, processes.count())[processes.number()])
    said = dict(processes.gathered(list(zip(mine, measure([trees[index] for index in mine]), strict=True))))
    return [said[index] for index in range(len(trees))]


def _per_branch(model: nn.Module, trees: Sequence[Tree], budget: Budget, answer: Callable[[Forest], Tensor]) -> list[list[float]]:
    """`answer`'s numbers, one for each sequence, in the order of `trees`."""
    found: list[list[float]] = [[] for _ in trees]
    for indices, values in _over_forests(model, trees, budget, answer):
        numbers = iter(values)
        for index in indices:
            found[index] = [next(numbers) for _ in trees[index].branches]
    return found


@torch.no_grad()
def _over_forests(
    model: nn.Module, trees: Sequence[Tree], budget: Budget, answer: Callable[[Forest], Tensor]
) -> Iterator[tuple[list[int], list[float]]]:
    """The numbers (n,) that `answer` gives for each forest that `trees` are packed into, with the indices of its trees."""
    model.eval()
    device = next(model.parameters()).device
    sharded = isinstance(model, FSDPModule)

    def work(packed: Packed) -> list[tuple[list[int], list[float]]]:
        answers = []
        for indices, forest in packed:
            if sharded:
                processes.any_of(True)
            answers.append((indices, answer(forest.to(device))))
        return [(indices, values.tolist()) for indices, values in answers]  # a GPU is waited for once

    for start in range(0, len(trees), WINDOW):  # in pieces: where memory runs out, no more than a piece is done again
        for indices, values in budget.fit(trees[start : start + WINDOW], work, alone=not sharded):
            yield [start + index for index in indices], values
    # Every pass takes all processes, who gather the weights for each other: who has none left helps the others.
    while sharded and processes.any_of(False):
        answer(plant([Tree([0], ([0],))]).to(device))


def score_scale(path: str) -> tuple[float, float]:
    """Mean and deviation of the scores of the reward model in the folder `path`.

    Raises:
        AlignError: it stores none.
    """
    stored = json_record(Path(path) / SCORE_SCALE)
    if not stored.keys() >= {"score_mean", "score_std"}:
        raise AlignError(f"{path} stores no scale of its scores ({SCORE_SCALE}); set normalize_scores to false")
    return stored["score_mean"], max(stored["score_std"], 1e-6)


def refuse_language_model(path: str) -> None:
    """Raise `AlignError` where the model at `path`, a folder or an id of the hub, is no reward model."""
    if not is_classifier(path):
        raise AlignError(f"{path} is a language model, not a reward model: train one with `align reward`")


class RewardScorer:
    """A reward model that scores sampled tokens as they are.

    Args:
        tokenizer: what the tokens are of. Where it writes a conversation in another way than the model learned, a line says so.
        normalize: subtract the mean and divide by the deviation of the scores that the reward stage stored with the model.
        model: answers as an enabled model of `path` would; None loads that.

    Raises:
        AlignError: it is none, its tokenizer differs from the policy's, or there is no stored scale to normalize by.
    """

    def __init__(
        self,
        path: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        max_tokens: MaxTokens,
        normalize: bool,
        model: nn.Module | None = None,
    ) -> None:
        refuse_language_model(path)
        own = load_tokenizer(path)
        if own.get_vocab() != tokenizer.get_vocab():
            raise AlignError(f"the reward model {path} has another tokenizer than the policy; train both from one base")
        if own.chat_template and tokenizer.chat_template and _asked(own) != _asked(tokenizer):
            say(f"the reward model {path} has another chat template than the policy: it judges texts as the policy writes them")
        if model is None:
            model = load_reward_model(path, dtype=dtype)
            model.to(best_device())
            model.requires_grad_(False)
            enable_forest(model)
        self.model = model
        self.budget = measuring(max_tokens)
        self.mean, self.std = 0.0, 1.0
        if normalize:
            self.mean, self.std = score_scale(path)

    def __call__(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[float]:
        """Scores of completions, read at their last token."""
        trees = [Tree(prompt, (completion,)) for prompt, completion in zip(prompts, completions, strict=True)]
        return [(score - self.mean) / self.std for (score,) in branch_scores(self.model, trees, self.budget)]


def _asked(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A question as the chat template of `tokenizer` writes it."""
    return tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True)


class Judge:
    """Scores sampled answers by reward functions and a reward model together.

    Args:
        rewards: what the total is made of.
        reward_model: what its component ``reward_model`` says, or None where it has none.
        columns: names of columns that some rows have; for all others they are None, also where a whole batch has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rewards: RewardSet,
        reward_model: RewardScorer | None = None,
        columns: Collection[str] = (),
    ) -> None:
        self.tokenizer, self.rewards, self.reward_model, self.columns = tokenizer, rewards, reward_model, columns

    def __call__(
        self, rows: Sequence[PromptRow], prompts: Sequence[list[int]], completions: Sequence[Completion]
    ) -> tuple[list[float], dict[str, list[float | None]]]:
        """Total of each completion and its components."""
        ids = [completion.tokens for completion in completions]
        model_scores = None if self.reward_model is None else self.reward_model(prompts, ids)
        answers = [answer(row, text) for row, text in zip(rows, self.texts(completions), strict=True)]
        result = self.rewards.score(
            [plain(row.prompt) for row in rows], answers, row_columns(rows, self.columns), ids, model_scores
        )
        return result.total, result.components

    def by_itself(self) -> Judge:
        """A judge who says the same of a completion whatever else is scored with it."""
        return Judge(self.tokenizer, self.rewards.by_itself(), self.reward_model, self.columns)

    def texts(self, completions: Sequence[Completion]) -> list[str]:
        """Without special tokens; white space at both ends is part of what was said."""
        return [self.tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in completions]


def row_columns(rows: Sequence[PromptRow], also: Collection[str] = ()) -> dict[str, list[Any]]:
    """The rows' other columns as reward functions get them, those called `also` among them."""
    names = sorted({*also, *(name for row in rows for name in row.columns)})
    return {name: [row.columns.get(name) for row in rows] for name in names}


def plain(text: Text) -> Any:
    """A prompt as reward functions get it: a string, or a list of plain dictionaries."""
    return text if isinstance(text, str) else [message.model_dump(exclude_none=True) for message in text]


def answer(row: PromptRow, text: str) -> Any:
    """A completion as reward functions get it: a string behind a raw prompt, else one assistant message."""
    return text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]


def component_means(components: dict[str, list[float | None]]) -> dict[str, float]:
    """Mean of each component over the completions on which it did not abstain."""
    kept = {name: [value for value in values if value is not None] for name, values in components.items()}
    return {name: statistics.fmean(values) for name, values in kept.items() if values}
