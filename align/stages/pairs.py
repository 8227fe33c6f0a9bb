"""On-policy preference pairs: sample several answers to a prompt, score them, keep the best against the worst."""

from __future__ import annotations

import random
from typing import Any

from pydantic import Field

from align.stages.base import Context, DataFields, MaxTokens, ModelFields, Stage, stage
from align.stages.sampling import RewardFields, SamplingFields


@stage("pairs")
class Pairs(Stage, DataFields, ModelFields, SamplingFields, RewardFields):
    """Sample several answers to each prompt, score them, and keep the best against the worst. Writes ``preferences.jsonl`` (from
    `data`) and ``held_out.jsonl`` (from the held-out prompts).
    """

    num_generations: int = Field(4, gt=1)
    """Answers sampled for each prompt."""
    min_gap: float = Field(0.0, ge=0)
    """Prompts whose best and worst answer lie closer than this give no pair."""
    label_noise: float = Field(0.0, ge=0)
    """Deviation of Gaussian noise on the scores of training pairs, as of a person who is not sure. Held-out pairs get none."""
    max_tokens_per_micro_batch: MaxTokens = 8192
    """Tokens in one forward pass, or `auto`: 8192, and on CUDA what memory holds."""
    seed: int = 0
    """Seed of sampling and noise."""

    def run(self, context: Context) -> dict[str, Any]:
        import torch

        from align.data import write_rows
        from align.encode import Encoder
        from align.models import load_causal_lm, stop_token_ids
        from align.progress import bar, say
        from align.rollout import complete
        from align.scoring import answer, plain
        from align.stages import training as t

        rows, held = t.rows_of(self, "prompts", context)
        tokenizer, _ = t.tokenizer_of(self)
        encoder = Encoder(tokenizer, None if self.max_length is None else self.max_length - self.max_completion_length)
        judge = self.judge(tokenizer, dtype=self.dtype, max_tokens=self.max_tokens_per_micro_batch)
        model = load_causal_lm(self.model, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        stops = sorted({*stop_token_ids(model, tokenizer), t.end_token(encoder, rows)})
        sampler = self.sampler(model, context.folder)
        generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)
        noise = random.Random(self.seed)

        metrics: dict[str, Any] = {}
        for name, part, deviation in (("preferences", rows, self.label_noise), ("held_out", held, 0.0)):
            encoded = encoder.prompts(part)
            prompts = [tree.prompt for tree in encoded.trees for _ in range(self.num_generations)]
            repeated = [row for row in encoded.rows for _ in range(self.num_generations)]
            with bar(f"{context.name}", len(prompts), "answer") as progress:
                answers = complete(sampler, prompts, self.sampling(tokenizer), stops, generator, progress.update)
            scores, _ = judge(repeated, prompts, answers)
            scores = [score + noise.gauss(0.0, deviation) if deviation else score for score in scores]
            texts = judge.texts(answers)
            pairs = []
            for start in range(0, len(prompts), self.num_generations):
                group = range(start, start + self.num_generations)
                best, worst = max(group, key=scores.__getitem__), min(group, key=scores.__getitem__)
                if scores[best] - scores[worst] > self.min_gap and texts[best] != texts[worst]:
                    row = repeated[start]
                    pairs.append(
                        {"prompt": plain(row.prompt), "chosen": answer(row, texts[best]), "rejected": answer(row, texts[worst])}
                    )
            write_rows(context.folder / f"{name}.jsonl", pairs)
            say(f"{context.name}: {len(encoded.trees)} prompts gave {len(pairs)} pairs ({name}); {encoded.summary()}")
            metrics[f"{name}_pairs"] = len(pairs)
            metrics[f"{name}_mean_score"] = sum(scores) / max(len(scores), 1)
        return metrics
