"""Measures one model after another on the same rows, with the same draws of chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import nn

from align.data import Quarantine, RowStream, is_held_out, refuse_empty
from align.encode import Encoded, Encoder, set_chat_template
from align.engine import check_reach, enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.intake.files import Item
from align.intake.kinds import replies
from align.metrics import columns_of, measure
from align.metrics.base import check, check_columns, measure_all, refuse_missing
from align.metrics.judge import JudgeModel, letters
from align.metrics.preferences import preferences
from align.models import best_device, load_causal_lm, load_tokenizer, stop_token_ids
from align.progress import bar, say
from align.rewards import text_of
from align.rollout import Completion, complete
from align.schema import TextRow, problem
from align.scoring import Judge, RewardScorer, branch_logps, branch_scores, component_means, mean_nll, plain, row_columns
from align.stages.base import Context
from align.stages.rows import quarantine_in
from align.stages.sampling import SamplingFields
from align.tasks.base import is_task_model
from align.tasks.measure import TaskModel

RESAMPLED = 2**22
"""Values that a bootstrap has in memory at a time."""


def bootstrap_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> list[float]:
    """The 95 % interval of the mean of `values` by the percentile bootstrap (Efron 1979), as [low, high]."""
    data = torch.tensor(values, dtype=torch.double)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, RESAMPLED // len(data))
    counts = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [data[torch.randint(len(data), (count, len(data)), generator=generator)].mean(1) for count in counts]
    return torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()


def summarize(values: Sequence[float]) -> dict[str, Any]:
    """Mean, 95 % interval and count."""
    return {"mean": statistics.fmean(values), "ci95": bootstrap_interval(values), "n": len(values)}


REFERENCE_COLUMNS = ("references", "reference", "answers", "answer", "target")
"""Where reference answers are looked for, in this order; then the row's own answer is one."""
ANSWER_COLUMNS = ("completion", "output", "response", "chosen")
"""Where a row's own answer is looked for, in this order, if its format has none."""

OF_ANSWERS = {
    "reward_funcs": "use metrics",
    "reward_model": "use metrics",
    "baseline": "use metrics",
    "reference_column": "rows name the answers",
    "max_prompts": "use max_rows",
    "max_length": "theirs is the one that they were trained with",
    **dict.fromkeys(("chat_template", "greedy", "seed", "stride", *SamplingFields.model_fields), "leave it out"),
}
"""Fields that have no part in the measure of a task's model, and what has."""


Read = tuple[Any, Item, str]
"""A row, the item of its source that it was read from, and as which format."""


def reads_as(source: str, stage: Any) -> str:
    """``text`` for a source of documents, else ``sft``."""
    stream = RowStream(source, format=stage.data_format, split=stage.data_split, limit=1, on_bad_row="quarantine")
    next(iter(stream), None)
    return "text" if stream.kind in ("text", "classification") else "sft"


def _reference_text(value: Any, item: Item, column: str) -> Any:
    """A reference answer as metrics take it: a string, or a list of strings. No accepted answer is the empty one (SQuAD 2).

    Raises:
        AlignError: it is no text, number, list of those or message.
    """
    if isinstance(value, list) and value and all(isinstance(item, dict) and "content" in item for item in value):
        return text_of(value)
    if not all(isinstance(item, str | Real) for item in (value if isinstance(value, list) else [value])):
        raise AlignError(
            f"{item.file} row {item.number}, {problem(column, value, 'a reference answer: a text, a number or a list of them')}"
        )
    return [str(item) for item in value] or [""] if isinstance(value, list) else str(value)


@dataclass(frozen=True)
class Reference:
    """The model that others are measured from."""

    model: nn.Module
    vocabulary: dict[str, int]
    gaps: dict[int, float]
    """By pair, what its log-prob (nats) of the chosen answer is above that of the rejected one."""


class Evaluation:
    """The measurements of an `Evaluate` stage. Rows are read when the first model is measured."""

    def __init__(self, stage: Any, context: Context) -> None:
        self.stage, self.context = stage, context
        answered = [spec for spec in stage.metrics if check(spec)[0] != "perplexity"]
        alone = bool(stage.metrics) and not (answered or stage.reward_funcs or stage.reward_model or stage.baseline)
        tasked = [name for name, path in stage.models.items() if is_task_model(path)]
        for role in ("reference", "baseline"):
            if (name := getattr(stage, role)) in tasked:
                raise AlignError(f"{role}: {name} was trained for a task and answers no prompts; name a language model")
        talks = len(tasked) < len(stage.models)
        # What is about rows of pairs, reward models read as well.
        named = stage.model_fields_set - ({"max_length", "chat_template"} if stage.reward_models else set())
        if not talks and (unused := [name for name in OF_ANSWERS if name in named and getattr(stage, name) not in (None, [])]):
            told = f"all models were trained for a task, so {OF_ANSWERS[unused[0]]}"
            raise AlignError(f"{unused[0]} is about answers of language models; {told}")
        self.answer_metrics = answered
        refuse_missing(answered)
        if stage.judge_model is not None:
            letters(stage.judge_model, load_tokenizer(stage.judge_model, trust_remote_code=stage.trust_remote_code))
        asked = self._read(stage.data, "prompts") if talks and not alone else []
        self.references: list[Any] | None = None
        if asked and self._needs_references():
            asked, self.references = self._with_references(asked)
        self.prompts = [row for row, _, _ in asked[: stage.max_prompts]]
        if self.prompts:
            self._keep_what_fits([path for name, path in stage.models.items() if name not in tasked])
        if self.prompts and (stage.reward_funcs or stage.reward_model):
            stage.reward_set(row_columns(self.prompts))  # before any answer: what it does not fit is an error
        for spec in answered if self.prompts else []:
            check_columns(check(spec)[0], [*row_columns(self.prompts), "predictions", "references"])
        perplexity = talks and len(answered) < len(stage.metrics)  # asked for by its name
        self.demonstrations = self._readable(stage.perplexity_data or (stage.data if perplexity else None))
        self.pairs = self._rows(stage.preference_data, "preference")
        if self.prompts and not (stage.reward_funcs or stage.reward_model or stage.metrics):
            say(f"{context.name}: no reward and no metric is named, so answers are sampled but not scored")
        self._answers: list[dict[str, Any]] = [{} for _ in self.prompts]
        self._task_rows: dict[str, list[Any]] = {}
        """By kind, what models of tasks are measured on."""
        self._task_samples: dict[int, dict[str, Any]] = {}
        """By row, what `samples` says of it."""
        self._reference: Reference | None = None

    @cached_property
    def _quarantine(self) -> Quarantine:
        return quarantine_in(self.context)

    def _rows(self, sources: list[str] | None, kind: str) -> list[Any]:
        return [row for row, _, _ in self._read(sources, kind)]

    def _read(self, sources: list[str] | None, kind: str) -> list[Read]:
        rows: list[Read] = []
        for source in sources or []:
            stream = RowStream(
                source,
                kind,
                format=self.stage.data_format,
                split=self.stage.data_split,
                limit=self.stage.max_rows,
                on_bad_row=self.stage.on_bad_row,
                quarantine=self._quarantine,
            )
            for row in stream:
                assert stream.item is not None
                rows.append((row, stream.item, stream.read_as))
            refuse_empty(stream)
            say(f"{self.context.name}: {source}: {stream.account.summary()}{self._quarantine.note(stream.account)}")
        if self.stage.held_out and sources:
            rows = [each for each in rows if is_held_out(each[0], self.stage.held_out)]
            if not rows:
                raise AlignError(
                    f"{', '.join(sources)}: held_out={self.stage.held_out} keeps no prompt apart; raise it or give more rows"
                )
        return rows

    def _readable(self, sources: list[str] | None) -> list[Any]:
        """Demonstrations, or documents where a source holds nothing but text; of one kind."""
        kinds = {reads_as(source, self.stage) for source in sources or []}
        if len(kinds) > 1:
            raise AlignError(f"{', '.join(sources or [])}: both documents and demonstrations; measure them one after the other")
        return self._rows(sources, kinds.pop()) if kinds else []

    def _needs_references(self) -> bool:
        names = [check(spec)[0] for spec in self.answer_metrics]
        return self.stage.baseline == "references" or any("references" in columns_of(name) for name in names)

    def _with_references(self, asked: list[Read]) -> tuple[list[Read], list[Any]]:
        """The first `max_prompts` of `asked` that have a reference answer, and these: a column, or the row's own answer.

        Raises:
            AlignError: there are none, or a row has none in the column.
        """
        columns, most = asked[0][0].columns, self.stage.max_prompts
        first = asked[:most]
        there = [name for name in REFERENCE_COLUMNS if any(row.columns.get(name) is not None for row, _, _ in first)]
        column = self.stage.reference_column or next((name for name in there if name in columns), None)
        if column is not None:
            if lacking := next((item for row, item, _ in first if row.columns.get(column) is None), None):
                place = f"{lacking.file} row {lacking.number}"
                raise AlignError(f"{place} has no reference answer in column {column!r}; set reference_column")
            return first, [_reference_text(row.columns[column], item, column) for row, item, _ in first]
        kept: list[Read] = []
        references: list[Any] = []
        without, why = 0, "an unwanted answer, or none"
        for row, item, read_as in asked:
            assert isinstance(item.raw, dict)
            try:
                said: list[Any] = [text_of(reply) for reply in replies(read_as, item.raw, plain(row.prompt))]
            except AlignError as error:  # its format knows of none
                why = str(error)
                own = next((name for name in ANSWER_COLUMNS if row.columns.get(name) is not None), None)
                said = [] if own is None else [_reference_text(row.columns[own], item, own)]
            if said:
                kept.append((row, item, read_as))
                references.append(said if len(said) > 1 else said[0])
                if len(kept) == most:
                    break
            else:
                without += 1
        if not kept:
            raise AlignError(
                f"no reference answers: none of the columns {', '.join(columns) or '(none)'} is called "
                f"{', '.join(REFERENCE_COLUMNS)}; set reference_column, or give demonstrations ({why})"
            )
        if without:
            say(f"{self.context.name}: left out {without} prompts without a reference answer ({why})")
        return kept, references

    def _keep_what_fits(self, paths: Sequence[str]) -> None:
        """Leave out the prompts that one of the models at `paths` cannot answer: all of them answer the same ones."""
        count, room = len(self.prompts), self.stage.max_length - self.stage.max_completion_length
        encoded = [self._encoder(path, room).prompts(self.prompts) for path in paths]
        fitting = [{id(row) for row in each.rows} for each in encoded]
        kept = [number for number, row in enumerate(self.prompts) if all(id(row) in rows for rows in fitting)]
        reasons = " or ".join(dict.fromkeys(reason for each in encoded for reason in each.set_aside))
        more = "max_length less max_completion_length is what a prompt may take"
        if not kept:
            raise AlignError(f"none of {count} prompts can be answered, as they {reasons} ({more})")
        if len(kept) < count:
            say(f"{self.context.name}: left out {count - len(kept)} of {count} prompts, as they {reasons} ({more})")
        self.prompts = [self.prompts[number] for number in kept]
        if self.references is not None:
            self.references = [self.references[number] for number in kept]

    def _encoder(self, path: str, max_length: int) -> Encoder:
        tokenizer = load_tokenizer(path, trust_remote_code=self.stage.trust_remote_code)
        set_chat_template(tokenizer, self.stage.chat_template)
        return Encoder(tokenizer, max_length)

    def policy(self, name: str, path: str) -> dict[str, Any]:
        """Everything that is measured of a language model, or of a model that was trained for a task."""
        if is_task_model(path):
            return self._task_model(name, path)
        stage = self.stage
        encoder = self._encoder(path, stage.max_length)
        tokenizer = encoder.tokenizer
        model = load_causal_lm(path, dtype=stage.dtype, trust_remote_code=stage.trust_remote_code)
        model.to(best_device())
        enable_forest(model)
        result: dict[str, Any] = {}
        if self.demonstrations:
            result["perplexity"] = self._perplexity(name, model, encoder)
        if self.prompts:
            result.update(self._answer(name, model, Encoder(tokenizer, stage.max_length - stage.max_completion_length)))
        gaps = self._gaps(name, model, encoder) if self.pairs else {}
        if self.pairs and self._reference is not None:
            result["preference_accuracy"] = self._preference_accuracy(gaps, self._reference.gaps)
        if name == stage.reference:
            self._reference = Reference(model, tokenizer.get_vocab(), gaps)
        self.context.history.add(0, {"model": name, **{key: value for key, value in result.items() if isinstance(value, float)}})
        return result

    def _task_model(self, name: str, path: str) -> dict[str, Any]:
        stage = self.stage
        if not stage.data:
            raise AlignError(f"{name} was trained for a task; set data to rows of that task")
        model = TaskModel(path, dtype=stage.dtype, trust_remote_code=stage.trust_remote_code)
        kind = model.task.kind
        if stage.metrics:
            model.task.check_metrics(stage.metrics)
        if kind not in self._task_rows:
            self._task_rows[kind] = self._rows(stage.data, kind)
        found, answered = model.measure(self._task_rows[kind], stage.metrics)
        for row, text, expected in answered[: self.stage.samples_kept]:
            sample = {"prompt": model.task.prompt(row), "columns": {"expected": expected}, "answers": {}}
            answers = self._task_samples.setdefault(id(row), sample)["answers"]
            answers[name] = {"greedy": {"text": text, "reward": None}}
        return found

    def _perplexity(self, name: str, model: nn.Module, encoder: Encoder) -> float:
        documents = isinstance(self.demonstrations[0], TextRow)
        encoded = encoder.windows(self.demonstrations, self.stage.stride) if documents else encoder.sft(self.demonstrations)
        nll = mean_nll(model, self._trees(name, model, encoded), self.stage.max_tokens_per_micro_batch)
        return math.exp(min(nll, 700))

    def _gaps(self, name: str, model: nn.Module, encoder: Encoder) -> dict[int, float]:
        """See `Reference.gaps`, of `model`."""
        encoded = encoder.preference(self.pairs)
        logps = branch_logps(model, self._trees(name, model, encoded), self.stage.max_tokens_per_micro_batch)
        return {id(row): chosen - rejected for row, (chosen, rejected) in zip(encoded.rows, logps, strict=True)}

    @staticmethod
    def _preference_accuracy(gaps: dict[int, float], reference: dict[int, float]) -> dict[str, Any]:
        """How often the implicit reward of the chosen answer is the higher one; a tie counts one half."""
        both = [row for row in gaps if row in reference]  # another tokenizer may have set other rows aside
        return summarize(preferences("preference_accuracy", [gaps[row] for row in both], [reference[row] for row in both]))

    def _answer(self, name: str, model: nn.Module, encoder: Encoder) -> dict[str, Any]:
        stage, tokenizer = self.stage, encoder.tokenizer
        encoded = encoder.prompts(self.prompts)
        prompts = [tree.prompt for tree in encoded.trees]
        stops = {*stop_token_ids(model, tokenizer), encoder.end_of_answer(self.prompts[0])}
        judge = None
        if stage.reward_funcs or stage.reward_model:
            judge = stage.judge(tokenizer, self.prompts, dtype=stage.dtype, max_tokens=stage.max_tokens_per_micro_batch)
        result: dict[str, Any] = {}
        sampler = stage.sampler(model, self.context.folder)
        for mode in ("sampled", "greedy") if stage.greedy else ("sampled",):
            sampling = stage.sampling(tokenizer) if mode == "sampled" else stage.sampling(tokenizer, temperature=0.0)
            generator = torch.Generator().manual_seed(stage.seed)
            with bar(f"{name} {mode}", len(prompts), "answer") as progress:
                answers = complete(sampler, prompts, sampling, sorted(stops), generator, progress.update)
            totals, components = judge(encoded.rows, prompts, answers) if judge else ([], {})
            if mode == "sampled":
                result.update(self._sampled(model, tokenizer.get_vocab(), prompts, answers, totals, components))
            elif totals:
                result["greedy_reward"] = summarize(self._headline(totals, components))
            decoded = tokenizer.batch_decode([answer.tokens for answer in answers], skip_special_tokens=True)
            texts = [text.strip() for text in decoded]
            if mode == self._told:
                result.update(self._measured(texts))
            rewards = self._headline(totals, components) if totals else [None] * len(texts)
            for entry, text, reward in zip(self._answers, texts, rewards, strict=True):
                entry.setdefault(name, {})[mode] = {"text": text, "reward": reward}
        if stage.baseline == "references" and judge and "references" not in self._answers[0]:
            self._judge_references(judge, encoder, encoded.rows, prompts)
        return result

    @property
    def _told(self) -> str:
        """The answers that metrics and comparisons are about."""
        return "greedy" if self.stage.greedy else "sampled"

    def _measured(self, texts: list[str]) -> dict[str, float]:
        """Every metric that was asked for, of one model's answers."""
        columns = {**row_columns(self.prompts), "predictions": texts, "references": self.references}
        return measure_all(self.answer_metrics, **columns)

    def _judge_references(self, judge: Judge, encoder: Encoder, rows: list[Any], prompts: list[list[int]]) -> None:
        """Score the reference answers as if a model had given them."""
        assert self.references is not None
        firsts = [text if isinstance(text, str) else text[0] for text in self.references]
        ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in firsts]
        # A reward model scores an answer at its end token.
        said = [Completion([*own, encoder.end_of_answer(row)], True) for own, row in zip(ids, rows, strict=True)]
        totals, components = judge(rows, prompts, said)
        for entry, text, reward in zip(self._answers, firsts, self._headline(totals, components), strict=True):
            entry["references"] = {self._told: {"text": text, "reward": reward}}

    def compare(self, results: dict[str, Any]) -> None:
        """Add each model's win rate against the baseline, as it is and at equal length, to its results."""
        stage, mode = self.stage, self._told
        if stage.baseline is None:
            return
        if stage.judge_model is not None and stage.baseline == "references":
            for entry, text in zip(self._answers, self.references or [], strict=True):
                entry.setdefault("references", {mode: {"text": text if isinstance(text, str) else text[0], "reward": None}})
        theirs = [entry[stage.baseline][mode] for entry in self._answers]
        judge = None
        if stage.judge_model is not None:
            fields = {"dtype": stage.dtype, "max_length": stage.max_length, "max_tokens": stage.max_tokens_per_micro_batch}
            judge = JudgeModel(stage.judge_model, **fields, trust_remote_code=stage.trust_remote_code)
        for name in results:
            if name == stage.baseline or name not in self._answers[0]:  # a task's model gave none
                continue
            ours = [entry[name][mode] for entry in self._answers]
            if judge is None:
                scores, others = [answer["reward"] for answer in ours], [answer["reward"] for answer in theirs]
            else:
                prompts = [text_of(plain(row.prompt)) for row in self.prompts]
                scores = judge(prompts, [answer["text"] for answer in ours], [answer["text"] for answer in theirs])
                others = [0.5] * len(scores)
                if unasked := scores.count(None):
                    told = (
                        f"{name}: {unasked} of {len(scores)} questions to the judge do not fit into max_length, and are not asked"
                    )
                    say(f"{self.context.name}: {told}")
            judged = [number for number, score in enumerate(scores) if score is not None]
            scores, others, ours, beside = ([column[n] for n in judged] for column in (scores, others, ours, theirs))
            lengths = {"lengths": [len(a["text"]) for a in ours], "baseline_lengths": [len(a["text"]) for a in beside]}
            found = measure("win_rate", scores=scores, baseline_scores=others, **lengths)
            for key in ("win_rate", "win_rate_length_controlled"):
                interval = [found[f"{key}_low"], found[f"{key}_high"]]
                results[name][f"{key}_vs_{stage.baseline}"] = {"mean": found[key], "ci95": interval, "n": len(scores)}

    @staticmethod
    def _trees(name: str, model: nn.Module, encoded: Encoded) -> Sequence[Tree]:
        """The trees of held-out rows.

        Raises:
            AlignError: none of them fits into `max_length`, or one is too long for `model`.
        """
        if not encoded.trees:
            raise AlignError(f"{name}: none of the rows can be used: {encoded.summary()}")
        check_reach(model, max(tree.longest for tree in encoded.trees))
        return encoded.trees

    def _sampled(
        self,
        model: nn.Module,
        vocabulary: dict[str, int],
        prompts: list[list[int]],
        answers: list[Completion],
        totals: list[float],
        components: dict[str, Any],
    ) -> dict[str, Any]:
        stage = self.stage
        result: dict[str, Any] = {}
        if totals:
            result[f"{next(iter(components))}_reward"] = summarize(self._headline(totals, components))
            result["parts"] = component_means(components)
        result["mean_completion_tokens"] = statistics.fmean(len(answer.tokens) for answer in answers)
        result["finished_share"] = statistics.fmean(answer.finished for answer in answers)
        if self._reference is not None and self._reference.vocabulary != vocabulary:
            say(f"{self.context.name}: no divergence from {stage.reference}, as its tokenizer is another")
        elif stage.reference is not None:
            trees = [Tree(prompt, (answer.tokens,)) for prompt, answer in zip(prompts, answers, strict=True)]
            budget = stage.max_tokens_per_micro_batch
            temperature = stage.temperature or 1.0
            own = branch_logps(model, trees, budget, temperature)
            other = branch_logps(self._reference.model, trees, budget, temperature) if self._reference else own
            result[f"kl_to_{stage.reference}"] = statistics.fmean(a - b for (a,), (b,) in zip(own, other, strict=True))
        return result

    def _headline(self, totals: list[float], components: dict[str, list[float | None]]) -> list[float]:
        """The first component; the weighted total where it abstained."""
        first = next(iter(components.values()))
        return [total if value is None else value for value, total in zip(first, totals, strict=True)]

    def reward_model(self, name: str, path: str) -> dict[str, Any]:
        """Share of held-out pairs that a reward model ranks right."""
        if not self.pairs:
            raise AlignError("reward_models needs preference_data: pairs to rank")
        tokenizer = load_tokenizer(path, trust_remote_code=self.stage.trust_remote_code)
        set_chat_template(tokenizer, self.stage.chat_template)
        budget = self.stage.max_tokens_per_micro_batch
        scorer = RewardScorer(path, tokenizer, dtype=self.stage.dtype, max_tokens=budget, normalize=False)
        trees = self._trees(name, scorer.model, Encoder(tokenizer, self.stage.max_length).preference(self.pairs))
        pairs = branch_scores(scorer.model, trees, budget)
        columns = {"chosen_scores": [c for c, _ in pairs], "rejected_scores": [r for _, r in pairs]}
        right = summarize(preferences("ranking_accuracy", *columns.values()))
        lengths = {f"{side}_lengths": [len(tree.branches[i]) for tree in trees] for i, side in enumerate(("chosen", "rejected"))}
        bias = measure("length_bias", **columns, **lengths)
        return {
            "accuracy": right["mean"],
            "accuracy_ci95": right["ci95"],
            "n": right["n"],
            **measure("calibration_error", **columns),
            **bias,
        }

    def samples(self) -> list[dict[str, Any]]:
        """The first prompts with every model's answers; and the first rows of models of tasks, with the expected answers."""
        kept = list(zip(self.prompts, self._answers, strict=True))[: self.stage.samples_kept]
        asked = [{"prompt": plain(row.prompt), "columns": row.columns, "answers": answers} for row, answers in kept]
        return asked + list(self._task_samples.values())[: self.stage.samples_kept]
