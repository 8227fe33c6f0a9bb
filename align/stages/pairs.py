"""On-policy preference pairs: sample several answers to a prompt, score them, set the better against the worse."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import permutations
from typing import TYPE_CHECKING, Any

from pydantic import Field

from align.errors import AlignError
from align.stages.base import Context, Stage, stage
from align.stages.config import MaxTokens, Seed
from align.stages.fields import DataFields, ModelFields
from align.stages.sampling import RewardFields, SamplingFields

if TYPE_CHECKING:
    from align.schema import PromptRow


@stage("pairs")
class Pairs(Stage, DataFields, ModelFields, SamplingFields, RewardFields):
    """Sample several answers to each prompt, score them, and set the better against the worse.

    Writes the best against the worst of each prompt, ``preferences.jsonl`` (from `data`) and ``held_out.jsonl`` (from the held-out
    prompts), and ``comparisons.jsonl``: all pairs of `data` that differ enough, on which a reward model learns most
    (InstructGPT, arXiv:2203.02155, Sect. 3.5).
    """

    num_generations: int = Field(4, gt=1)
    """Answers sampled for each prompt."""
    min_gap: float = Field(0.0, ge=0)
    """Answers that lie closer than this give no pair."""
    label_noise: float = Field(0.0, ge=0)
    """Deviation of Gaussian noise on the scores of training pairs, as of a person who is not sure. Held-out pairs get none."""
    max_tokens_per_micro_batch: MaxTokens = 8192
    """Tokens in one forward pass, or `auto`: 8192, and on CUDA what memory holds."""
    seed: Seed = 0
    """Seed of sampling and noise."""

    def check(self) -> None:
        self.check_rewards()

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        from align.data import write_rows
        from align.models import best_device, load_causal_lm, stop_token_ids
        from align.progress import bar, say
        from align.rollout import complete
        from align.stages import training as t

        rows, held = t.rows_of(self, "prompts", context)
        tokenizer, encoder = t.tokenizer_of(self, room=self.max_completion_length)
        judge = self.judge(tokenizer, [*rows, *held], dtype=self.dtype, max_tokens=self.max_tokens_per_micro_batch)
        model = load_causal_lm(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        model.to(best_device())
        stops = sorted({*stop_token_ids(model, tokenizer), encoder.end_of_answer(rows[0])})
        sampler = self.sampler(model, context.folder)
        generator = torch.Generator().manual_seed(self.seed)
        noise = random.Random(self.seed)

        metrics: dict[str, Any] = {}
        for name, part, deviation in (("preferences", rows, self.label_noise), ("held_out", held, 0.0)):
            encoded = encoder.prompts(part)
            if name == "preferences":
                t.usable(encoded, context.name)
            prompts = [tree.prompt for tree in encoded.trees for _ in range(self.num_generations)]
            repeated = [row for row in encoded.rows for _ in range(self.num_generations)]
            with bar(f"{context.name}", len(prompts), "answer") as progress:
                answers = complete(sampler, prompts, self.sampling(tokenizer), stops, generator, progress.update)
            scores, _ = judge(repeated, prompts, answers)
            scores = [score + noise.gauss(0.0, deviation) if deviation else score for score in scores]
            # A template sets its own white space around a message; behind a raw prompt it is a part of the text.
            said = zip(repeated, judge.texts(answers), strict=True)
            texts = [text if isinstance(row.prompt, str) else text.strip() for row, text in said]
            best, every = [], []
            for start in range(0, len(prompts), self.num_generations):
                group = range(start, start + self.num_generations)
                compared = [_pair(repeated[start], texts[a], texts[b]) for a, b in self._comparisons(group, scores, texts)]
                best += compared[:1]
                every += compared
            if name == "preferences" and not best:
                raise AlignError(
                    f"no pair came of {len(encoded.trees)} prompts: no two answers to one differ by more than min_gap "
                    f"({self.min_gap:g}) in their scores; raise num_generations or temperature, lower min_gap, or try the reward "
                    f"(`align reward test`)"
                )
            write_rows(context.folder / f"{name}.jsonl", best)
            if name == "preferences":
                write_rows(context.folder / "comparisons.jsonl", every)
            say(f"{context.name}: {len(encoded.trees)} prompts gave {len(best)} pairs ({name}); {encoded.summary()}")
            metrics[f"{name}_pairs"] = len(best)
            if scores:  # no prompts may be held out
                metrics[f"{name}_mean_score"] = sum(scores) / len(scores)
        return metrics

    def _comparisons(self, group: range, scores: Sequence[float], texts: Sequence[str]) -> list[tuple[int, int]]:
        """The better and the worse of the answers to one prompt that differ enough, the widest gap first, equal texts once. White
        space around them makes no difference.
        """
        texts = [text.strip() for text in texts]
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for a, b in permutations(group, 2):
            if scores[a] - scores[b] > self.min_gap and texts[a] != texts[b]:
                found.setdefault((texts[a], texts[b]), (a, b))
        return sorted(found.values(), key=lambda pair: scores[pair[1]] - scores[pair[0]])


def _pair(row: PromptRow, chosen: str, rejected: str) -> dict[str, Any]:
    from align.scoring import answer, plain

    return {"prompt": plain(row.prompt), "chosen": answer(row, chosen), "rejected": answer(row, rejected)}
