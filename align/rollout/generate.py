"""transformers' `generate` as the engine for models that ours cannot serve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from align.compiling import uncompiled
from align.engine import PROBE_BOUNDS, PROBE_TOLERANCE, base_model, frequency_border, rounding_twice
from align.progress import say_once
from align.rollout.sampling import Completion, Sampling, StopTable, StopText, chances, draw

PROBE_PROMPTS = (6, 3, 1)
"""Tokens in prompts that are answered together and alone."""

_apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class GenerateEngine:
    """Runs batches of similar length to the end of their longest completion, with the model's own cache.

    Tokens are drawn by our `draw` in place of transformers' sampling, so the distribution and the draws of chance are the same.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def complete(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        stop_ids: Sequence[int],
        generator: torch.Generator | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> list[Completion]:
        """See `align.rollout.complete`."""
        device = next(self.model.parameters()).device
        chance = chances(len(prompts), sampling, generator).to(device)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        completions: dict[int, Completion] = {}
        was_training = self.model.training
        self.model.eval()
        try:
            size = min(sampling.batch_size, len(prompts))
            if size > 1 and not self._keeps_rows_apart(max(map(len, prompts)) + sampling.max_new_tokens):
                kind = type(self.model).__name__
                say_once(self.model, f"one at a time, as a row of {kind} is told otherwise in a batch, beside others")
                size = 1
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                draws = _Draws(sampling, StopTable(stop_ids, device), chance[batch])
                self._generate([prompts[i] for i in batch], draws)
                completions.update(zip(batch, draws.completions(), strict=True))
                if progress is not None:
                    progress(len(batch))
        finally:
            self.model.train(was_training)
        return [completions[i] for i in range(len(prompts))]

    def _keeps_rows_apart(self, longest: int) -> bool:
        """Whether random prompts of several lengths are answered in a batch as each is alone. Some families (RWKV, BART's
        decoder) read the padding or count it as places, which a model is asked once; rotary frequencies may be others in a batch
        with a row of `longest` tokens.
        """
        base = base_model(self.model)
        if (border := frequency_border(base)) is not None and longest > border:
            return False
        if base not in _apart:
            _apart[base] = self._are_apart(base)
        return _apart[base]

    def _are_apart(self, base: Any) -> bool:
        generator = torch.Generator().manual_seed(0)
        prompts = [torch.randint(base.config.vocab_size, (length,), generator=generator).tolist() for length in PROBE_PROMPTS]
        alone = torch.cat([self._likeliest([prompt]) for prompt in prompts])
        with rounding_twice(base):
            noise = (torch.cat([self._likeliest([prompt]) for prompt in prompts]) - alone).abs().mean().item()
        lower, upper = PROBE_BOUNDS
        difference = (self._likeliest(prompts) - alone).abs().mean().item()
        return difference <= min(max(lower, PROBE_TOLERANCE * noise), upper)

    def _likeliest(self, prompts: list[list[int]]) -> Tensor:
        """Log-prob of the likeliest token after each prompt (prompts,)."""
        sampling, device = Sampling(1, temperature=0), next(self.model.parameters()).device
        draws = _Draws(sampling, StopTable([], device), chances(len(prompts), sampling, None).to(device))
        self._generate(prompts, draws)
        return torch.tensor(draws.logps)[:, 0]

    def _generate(self, prompts: list[list[int]], draws: _Draws) -> None:
        device, width = draws.chance.device, max(map(len, prompts))
        base = base_model(self.model)
        # Padding on the left, so that every row's next token is in the last column; an encoder reads from the first.
        left = [0 if getattr(base.config, "is_encoder_decoder", False) else width - len(p) for p in prompts]
        right = [width - len(p) - n for p, n in zip(prompts, left, strict=True)]
        input_ids = torch.tensor([[0] * a + p + [0] * b for p, a, b in zip(prompts, left, right, strict=True)], device=device)
        mask = torch.tensor([[0] * a + [1] * len(p) + [0] * b for p, a, b in zip(prompts, left, right, strict=True)], device=device)
        config = {"max_new_tokens": draws.sampling.max_new_tokens, "do_sample": False, "pad_token_id": 0, "use_cache": True}
        with _plain_config(base), uncompiled():
            self.model.generate(  # type: ignore[operator]
                inputs=input_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([draws]),
                stopping_criteria=StoppingCriteriaList([draws.stopping]),
                **config,
            )


class _Draws(LogitsProcessor):
    """Draws each token and leaves `generate` no other choice."""

    def __init__(self, sampling: Sampling, stops: StopTable, chance: Tensor) -> None:
        self.sampling, self.stops, self.chance = sampling, stops, chance
        self.text = StopText(sampling)
        self.tokens: list[list[int]] = [[] for _ in chance]
        self.logps: list[list[float]] = [[] for _ in chance]
        self.ended = [False] * len(chance)
        self.count = 0
        self.stopping = _Stopping(self)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logps = draw(scores.float(), self.sampling, self.chance[:, self.count])
        stop = self.stops.of(tokens, scores.shape[1]).tolist()
        for row, (token, logp) in enumerate(zip(tokens.tolist(), logps.tolist(), strict=True)):
            if not self.ended[row]:
                self.tokens[row].append(token)
                self.logps[row].append(logp)
                self.ended[row] = stop[row] or self.text.ends(self.tokens[row])
        self.count += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)

    def completions(self) -> list[Completion]:
        return [Completion(*parts) for parts in zip(self.tokens, self.ended, self.logps, strict=True)]


class _Stopping(StoppingCriteria):
    """Says which rows have ended."""

    def __init__(self, draws: _Draws) -> None:
        self.draws = draws

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(self.draws.ended, device=input_ids.device)


@contextmanager
def _plain_config(base: Any) -> Iterator[None]:
    """Within, the model's generation config (a repetition penalty, say) has no part in what is drawn."""
    before = base.generation_config
    kept = {name: getattr(before, name, None) for name in ("bos_token_id", "decoder_start_token_id")}
    base.generation_config = GenerationConfig(**kept)
    try:
        yield
    finally:
        base.generation_config = before
