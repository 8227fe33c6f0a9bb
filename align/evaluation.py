"""Measures one model after another on the same rows, with the same draws of chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from align.data import load_rows, split_by_prompt
from align.encode import Encoded, Encoder, set_chat_template
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.models import load_causal_lm, load_tokenizer, stop_token_ids
from align.progress import bar, say
from align.rollout import Completion, complete
from align.scoring import RewardScorer, branch_logps, branch_scores, component_means, mean_nll, plain
from align.stages.base import Context


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> list[float]:
    """The 95 % interval of the mean of `values` by the percentile bootstrap (Efron 1979), as [low, high]."""
    data = torch.tensor(values, dtype=torch.double)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(data), (resamples, len(data)), generator=generator)
    return torch.quantile(data[draws].mean(1), torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval and count."""
    return {"mean": statistics.fmean(values), "ci95": bootstrap_interval(values), "n": len(values)}


class Evaluation:
    """The measurements of an `Evaluate` stage. Rows are read when the first model is measured."""

    def __init__(self, stage: Any, context: Context) -> None:
        self.stage, self.context = stage, context
        self.prompts = self._rows(stage.data, "prompts")[: stage.max_prompts]
        self.demonstrations = self._rows(stage.perplexity_data, "sft")
        self.pairs = self._rows(stage.preference_data, "preference")
        if self.prompts and not (stage.reward_funcs or stage.reward_model):
            say(f"{context.name}: no reward is named, so answers are sampled but not scored")
        self._answers: list[dict[str, Any]] = [{} for _ in self.prompts]
        self._reference: tuple[nn.Module, list[list[float]]] | None = None

    def _rows(self, sources: list[str] | None, kind: str) -> list[Any]:
        rows = []
        for source in sources or []:
            loaded = load_rows(
                source,
                kind,
                format=self.stage.data_format,
                split=self.stage.data_split,
                limit=self.stage.max_rows,
                on_bad_row=self.stage.on_bad_row,
            )
            say(f"{self.context.name}: {source}: {loaded.summary()}")
            rows += loaded.rows
        if self.stage.held_out and sources:
            rows = split_by_prompt(rows, self.stage.held_out)[1]
            if not rows:
                raise AlignError(
                    f"{', '.join(sources)}: held_out={self.stage.held_out} keeps no prompt apart; raise it or give more rows"
                )
        return rows

    def policy(self, name: str, path: str) -> dict[str, Any]:
        """Everything that is measured of a language model."""
        stage = self.stage
        tokenizer = load_tokenizer(path, trust_remote_code=self.stage.trust_remote_code)
        set_chat_template(tokenizer, stage.chat_template)
        encoder = Encoder(tokenizer, stage.max_length)
        model = load_causal_lm(path, dtype=stage.dtype, trust_remote_code=stage.trust_remote_code)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        enable_forest(model)
        result: dict[str, Any] = {}
        if self.demonstrations:
            trees = self._trees(name, encoder.sft(self.demonstrations))
            result["perplexity"] = math.exp(min(mean_nll(model, trees, stage.max_tokens_per_micro_batch), 700))
        if self.prompts:
            result.update(self._answer(name, model, Encoder(tokenizer, stage.max_length - stage.max_completion_length)))
        if self.pairs:
            trees = self._trees(name, encoder.preference(self.pairs))
            logps = branch_logps(model, trees, stage.max_tokens_per_micro_batch)
            if name == stage.reference:
                self._reference = (model, logps)
            elif self._reference is not None:
                margins = [(c - rc) - (r - rr) for (c, r), (rc, rr) in zip(logps, self._reference[1], strict=True)]
                result["preference_accuracy"] = summarize([float(margin > 0) for margin in margins])
        if name == stage.reference and self._reference is None:
            self._reference = (model, [])
        self.context.history.add(0, {"model": name, **{key: value for key, value in result.items() if isinstance(value, float)}})
        return result

    def _answer(self, name: str, model: nn.Module, encoder: Encoder) -> dict[str, Any]:
        stage, tokenizer = self.stage, encoder.tokenizer
        encoded = encoder.prompts(self.prompts)
        if len(encoded.trees) < len(self.prompts):
            raise AlignError(f"{name}: {encoded.summary()}; raise max_length so that every model answers the same prompts")
        prompts = [tree.prompt for tree in encoded.trees]
        conversational = not isinstance(self.prompts[0].prompt, str)
        stops = {*stop_token_ids(model, tokenizer), encoder.end_of_turn if conversational else encoder.end_of_text}
        judge = None
        if stage.reward_funcs or stage.reward_model:
            judge = stage.judge(tokenizer, dtype=stage.dtype, max_tokens=stage.max_tokens_per_micro_batch)
        result: dict[str, Any] = {}
        for mode in ("sampled", "greedy") if stage.greedy else ("sampled",):
            sampling = stage.sampling(tokenizer) if mode == "sampled" else stage.sampling(tokenizer, temperature=0.0)
            generator = torch.Generator(next(model.parameters()).device).manual_seed(stage.seed)
            with bar(f"{name} {mode}", len(prompts), "answer") as progress:
                answers = complete(model, prompts, sampling, sorted(stops), generator, progress.update)
            totals, components = judge(encoded.rows, prompts, answers) if judge else ([], {})
            if mode == "sampled":
                result.update(self._sampled(model, prompts, answers, totals, components))
            elif totals:
                result["greedy_reward"] = summarize(self._headline(totals, components))
            texts = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
            rewards = self._headline(totals, components) if totals else [None] * len(texts)
            for entry, text, reward in zip(self._answers, texts, rewards, strict=True):
                entry.setdefault(name, {})[mode] = {"text": text.strip(), "reward": reward}
        return result

    @staticmethod
    def _trees(name: str, encoded: Encoded) -> Sequence[Tree]:
        """The trees of held-out rows.

        Raises:
            AlignError: none of them fits into `max_length`.
        """
        if not encoded.trees:
            raise AlignError(f"{name}: none of the rows can be used: {encoded.summary()}")
        return encoded.trees

    def _sampled(
        self, model: nn.Module, prompts: list[list[int]], answers: list[Completion], totals: list[float], components: dict[str, Any]
    ) -> dict[str, Any]:
        stage = self.stage
        result: dict[str, Any] = {}
        if totals:
            result[f"{self._headline_name(components)}_reward"] = summarize(self._headline(totals, components))
            result["parts"] = component_means(components)
        result["mean_completion_tokens"] = statistics.fmean(len(answer.tokens) for answer in answers)
        result["finished_share"] = statistics.fmean(answer.finished for answer in answers)
        if stage.reference is not None:
            trees = [Tree(prompt, (answer.tokens,)) for prompt, answer in zip(prompts, answers, strict=True)]
            budget = stage.max_tokens_per_micro_batch
            temperature = stage.temperature or 1.0
            own = branch_logps(model, trees, budget, temperature)
            other = branch_logps(self._reference[0], trees, budget, temperature) if self._reference else own
            result[f"kl_to_{stage.reference}"] = statistics.fmean(a - b for (a,), (b,) in zip(own, other, strict=True))
        return result

    def _headline_name(self, components: dict[str, Any]) -> str:
        return next(iter(components))

    def _headline(self, totals: list[float], components: dict[str, list[float | None]]) -> list[float]:
        """The first component; the weighted total where it abstained."""
        first = components[self._headline_name(components)]
        return [total if value is None else value for value, total in zip(first, totals, strict=True)]

    def reward_model(self, name: str, path: str) -> dict[str, Any]:
        """Share of held-out pairs that a reward model ranks right."""
        if not self.pairs:
            raise AlignError("reward_models needs preference_data: pairs to rank")
        tokenizer = load_tokenizer(path, trust_remote_code=self.stage.trust_remote_code)
        set_chat_template(tokenizer, self.stage.chat_template)
        budget = self.stage.max_tokens_per_micro_batch
        scorer = RewardScorer(path, tokenizer.get_vocab(), dtype=self.stage.dtype, max_tokens=budget, normalize=False)
        trees = self._trees(name, Encoder(tokenizer, self.stage.max_length).preference(self.pairs))
        pairs = branch_scores(scorer.model, trees, budget)
        right = summarize([float(chosen > rejected) for chosen, rejected in pairs])
        return {"accuracy": right["mean"], "accuracy_ci95": right["ci95"], "n": right["n"]}

    def samples(self) -> list[dict[str, Any]]:
        """The first prompts with every model's answers."""
        kept = list(zip(self.prompts, self._answers, strict=True))[: self.stage.samples_kept]
        return [{"prompt": plain(row.prompt), "columns": row.columns, "answers": answers} for row, answers in kept]
