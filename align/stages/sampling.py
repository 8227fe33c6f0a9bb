"""Fields shared by the stages that sample answers and score them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from align.errors import AlignError
from align.rewards.spec import REWARD_MODEL, RewardSpec
from align.stages.config import Address, Fields, MaxTokens, ModelRef, RewardRefs

if TYPE_CHECKING:
    from torch import nn

    from align.rewards.composition import RewardSet, Totals
    from align.rollout import Engine, Sampling
    from align.schema import PromptRow
    from align.scoring import Judge


class DecodingFields(Fields):
    """How an answer is drawn."""

    max_completion_length: int = Field(128, gt=0)
    """Most tokens in an answer."""
    temperature: float = Field(1.0, ge=0)
    """0 is greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this much probability."""
    top_k: int = Field(0, ge=0)
    """Sample from this many likeliest tokens; 0 for all."""


class SamplingFields(DecodingFields):
    """How answers are drawn by our own sampler, or by a server."""

    rollout_batch_size: int = Field(128, gt=0)
    """Answers sampled side by side."""
    stop_strings: list[str] = Field(default_factory=list)
    """An answer also ends with the token that completes one of these in its text."""
    rollout_server: Annotated[str | None, Address()] = Field(None, pattern=r"^https?://[^/\s]+/?$")
    """Address of a vLLM server that samples in place of our engine, with the policy's weights (docs/rollouts.md)."""

    def sampler(self, model: nn.Module, folder: Path) -> nn.Module | Engine:
        """What `align.rollout.complete` asks: `model`, or a server that gets its weights by way of `folder`."""
        from align.rollout.server import ServerEngine

        return model if self.rollout_server is None else ServerEngine(self.rollout_server, model, folder)

    def sampling(self, tokenizer: Any = None, **changes: Any) -> Sampling:
        """How answers are drawn; `tokenizer` finds the `stop_strings`."""
        from align.rollout import Sampling

        settings = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, **changes}
        stops = {"stop_strings": tuple(self.stop_strings), "tokenizer": tokenizer}
        return Sampling(self.max_completion_length, batch_size=self.rollout_batch_size, **stops, **settings)


def check_launch(stage: Any) -> None:
    """Raise `ValueError` for a launch that a stage which samples its own policy cannot have."""
    launch = stage.launch
    if launch is None:
        return
    if launch.strategy not in ("ddp", "fsdp2"):
        raise ValueError(f"a policy that samples is not DeepSpeed's: strategy must be ddp or fsdp2, not {launch.strategy}")
    if launch.mixed_precision == "fp16":
        raise ValueError("mixed_precision fp16 needs a loss scale, which is not kept here: take bf16")
    stage.check_shards(stage.strategy.name)
    if stage.in_shards and stage.strategy.name == "qlora":
        raise ValueError("tuning 'qlora' has a base in blocks of 4 bits, which are not dealt here: strategy must be ddp")
    if stage.in_shards and stage.rollout_server is not None:
        raise ValueError("rollout_server is brought whole weights, and these would lie in shards: strategy must be ddp")


class RewardFields(Fields):
    """What judges an answer: functions, a reward model, or both."""

    reward_funcs: RewardRefs = Field(default_factory=list)
    """Reward functions: built-in names, `package.module:function` or `file.py:function`. Or mappings with the key `reward` and any
    of name, weight, clip, normalize, gate, on_error, timeout, protocol (docs/rewards.md). `reward_model` among them is the reward
    model.
    """
    reward_weights: list[float] | None = None
    """One weight for each of `reward_funcs`, then one for the reward model if it is not among them; 1 by default."""
    reward_model: ModelRef | None = None
    """A reward model made by the stage `reward`."""
    normalize_scores: bool = True
    """Shift and scale the reward model's scores by the mean and deviation it had on held-out answers."""

    def rewards(self) -> list[str | dict[str, Any]]:
        """What judges, the reward model among it.

        Raises:
            AlignError: nothing does, or a weight is too many or too few.
        """
        entries = list(self.reward_funcs)
        named = REWARD_MODEL in (RewardSpec.of(entry).reward for entry in entries)
        if named and self.reward_model is None:
            raise AlignError(f"reward_funcs names {REWARD_MODEL!r}: set the field reward_model, too")
        if self.reward_model is not None and not named:
            entries.append(REWARD_MODEL)
        if not entries:
            raise AlignError("nothing judges the answers: set reward_funcs, reward_model or both")
        if self.reward_weights is not None and len(self.reward_weights) != len(entries):
            raise AlignError(
                f"reward_weights has {len(self.reward_weights)} numbers; there are {len(entries)} rewards (functions first, then "
                "the reward model)"
            )
        return entries

    def check_rewards(self, *, hub: bool = True) -> None:
        """What can be found wrong with the rewards without rows; quick, but for a reward model that is there (see
        `check_reward_model`).

        Raises:
            AlignError: see `rewards` and `RewardSet`; or the reward model is none.
        """
        from align.rewards import RewardSet

        RewardSet(self.rewards(), self.reward_weights)
        if self.reward_model is not None:
            check_reward_model(self.reward_model, hub)

    def reward_set(self, columns: Collection[str], totals: Totals = list) -> RewardSet:
        """What judges answers to rows that have `columns`.

        Args:
            totals: sums numbers over the processes that share a batch.

        Raises:
            AlignError: see `rewards` and `RewardSet`; or a function needs another column.
        """
        from align.rewards import RewardSet

        found = RewardSet(self.rewards(), self.reward_weights, totals)
        found.refuse_missing(columns)
        return found

    def judge(
        self,
        tokenizer: Any,
        rows: Sequence[PromptRow],
        *,
        dtype: str,
        max_tokens: MaxTokens,
        model: nn.Module | None = None,
        totals: Totals = list,
    ) -> Judge:
        """Build the judge of answers to `rows`.

        Args:
            model: the reward model, where it is in memory already.
            totals: see `reward_set`.

        Raises:
            AlignError: see `reward_set` and `RewardScorer`.
        """
        from align.scoring import Judge, RewardScorer, row_columns

        columns = row_columns(rows).keys()
        rewards = self.reward_set(columns, totals)
        scorer = None
        if self.reward_model is not None:
            scorer = RewardScorer(
                self.reward_model,
                tokenizer,
                dtype=dtype,
                max_tokens=max_tokens,
                normalize=self.normalize_scores,
                model=model,
            )
        return Judge(tokenizer, rewards, scorer, columns)


def check_reward_model(path: str, hub: bool) -> None:
    """Find out before anything runs whether what should be a reward model is one. What a stage has yet to make is not looked at.

    Args:
        hub: whether to ask the hub of what is there.

    Raises:
        AlignError: it is none.
    """
    here = any((Path(path) / name).is_file() for name in ("config.json", "adapter_config.json"))
    if here or (hub and not Path(path).is_absolute()):
        from align.scoring import refuse_language_model

        refuse_language_model(path)
