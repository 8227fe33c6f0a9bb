"""Reward functions written for verl and OpenRLHF, as reward functions of ours."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any

from align.errors import AlignError
from align.rewards.protocol import RewardFunction, name_of, parameters_of, text_of


def adapted(function: RewardFunction, protocol: str, label_column: str | None = None) -> RewardFunction:
    """`function`, written in `protocol` (``trl``, ``verl`` or ``openrlhf``), in ours."""
    if protocol == "openrlhf":
        return from_openrlhf(function, label_column)
    return from_verl(function) if protocol == "verl" else function


def recognized(function: RewardFunction) -> str:
    """For whom `function` was written, by its parameters: ``trl`` (ours too), ``verl`` or ``openrlhf``."""
    parameters = parameters_of(function)
    if "completions" in parameters:
        return "trl"
    if {"data_source", "solution_str"} <= parameters.keys():
        return "verl"
    return "openrlhf" if {"queries", "prompts"} <= parameters.keys() else "trl"


def from_verl(compute_score: Callable[..., Any]) -> RewardFunction:
    """A verl ``compute_score(data_source, solution_str, ground_truth, extra_info)``, sync or async, as a reward function.

    It is called once per completion. Columns: `ground_truth`, or verl's `reward_model` with that key; `data_source` and
    `extra_info` if there. Of a dict that it returns, "score" is the reward.
    """

    def reward(completions: list, prompts: Any = None, completion_ids: Any = None, **columns: Any) -> Any:
        if "ground_truth" not in columns and "reward_model" not in columns:
            known = ", ".join(columns) or "none"
            raise AlignError(f"a verl reward needs a column 'ground_truth' or 'reward_model'; the rows have: {known}")
        nothing = [None] * len(completions)
        truths = (
            columns["ground_truth"] if "ground_truth" in columns else [cell["ground_truth"] for cell in columns["reward_model"]]
        )
        rows = zip(columns.get("data_source", nothing), completions, truths, columns.get("extra_info", nothing), strict=True)
        scores = [
            compute_score(data_source=source, solution_str=text_of(completion), ground_truth=truth, extra_info=info)
            for source, completion, truth, info in rows
        ]

        async def gather() -> list[Any]:
            return numbers(await asyncio.gather(*scores))

        return gather() if scores and inspect.isawaitable(scores[0]) else numbers(scores)

    def numbers(scores: list[Any]) -> list[Any]:
        return [score["score"] if isinstance(score, dict) else score for score in scores]

    reward.__name__ = name_of(compute_score)
    return reward


def from_openrlhf(reward_func: Callable[..., Any], label_column: str | None = None) -> RewardFunction:
    """An OpenRLHF ``reward_func(queries, prompts, labels)`` as a reward function.

    `label_column` is the column that OpenRLHF's ``--label_key`` would name; without one it is ``labels`` or ``label`` where there
    is such a column, else labels are empty strings, as there. A query is prompt and completion as text, end to end, with no chat
    template around a conversation's messages. Of a dict that it returns, "rewards" counts.
    """

    def reward(prompts: list, completions: list, completion_ids: Any = None, **columns: Any) -> Any:
        if label_column is not None and label_column not in columns:
            known = ", ".join(columns) or "none"
            raise AlignError(f"labels come from the column {label_column!r}, which is not there; the rows have: {known}")
        column = label_column or next((name for name in ("labels", "label") if name in columns), None)
        labels = [""] * len(prompts) if column is None else columns[column]
        texts = [text_of(prompt) for prompt in prompts]
        queries = [text + text_of(completion) for text, completion in zip(texts, completions, strict=True)]
        result = reward_func(queries, texts, labels)
        return result["rewards"] if isinstance(result, dict) else result

    reward.__name__ = name_of(reward_func)
    return reward
