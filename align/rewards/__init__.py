"""Reward functions: the protocol (TRL's), built-in ones, loading by name, and several together with checked outputs.

A reward is one plain function, ``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``, sync or async:
one number per completion, or None to abstain. Plain completions are strings, conversational ones lists of messages; the dataset's
other columns arrive as keyword lists. docs/rewards.md shows how to write one. This package imports nothing heavy.
"""

from align.rewards import builtin, math_answer, similarity  # noqa: F401  (they register themselves)
from align.rewards.adapters import from_openrlhf, from_verl
from align.rewards.composition import RewardScores, RewardSet
from align.rewards.loading import load_reward, reward_fingerprint
from align.rewards.protocol import RewardFunction, rewards, text_of
from align.rewards.spec import Gate, RewardSpec

__all__ = [
    "Gate",
    "RewardFunction",
    "RewardScores",
    "RewardSet",
    "RewardSpec",
    "from_openrlhf",
    "from_verl",
    "load_reward",
    "reward_fingerprint",
    "rewards",
    "text_of",
]
