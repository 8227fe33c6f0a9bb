"""The checks of a preflight: a catalog of functions that look at one stage and say what is wrong, and what to do about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from align.catalog import Catalog
from align.data import first_prompt, prompt_key
from align.errors import AlignError
from align.forest import Tree
from align.preflight.labels import suspicious
from align.preflight.subject import Subject
from align.quality.overlap import Overlap
from align.quality.rules import Rule, contradictory_pairs, empty, exact_duplicates, mojibake_rows
from align.quality.texts import texts
from align.schema import PreferenceRow, Row


@dataclass(frozen=True)
class Finding:
    """Something wrong with what a stage would train on. Errors stop the run, warnings do not."""

    level: Literal["error", "warning"]
    check: str
    message: str
    advice: str

    def line(self) -> str:
        return f"{self.level}: {self.check}: {self.message}. {self.advice}"

    def plain(self) -> dict[str, str]:
        return asdict(self)


Check = Callable[[Subject], Iterator[Finding]]
checks: Catalog[Check] = Catalog("preflight check")

CUT = 0.1
"""Share of cut rows from which it is worth a warning."""
DUPLICATES = 0.05
GARBLED = 0.005
EMPTY = 0.005
CONTRADICTORY = 0.01
SWAPPED = 0.05
LONGER = 0.7
"""Share of pairs in which one side is the longer one from which length alone tells chosen from rejected."""
FEWEST = 20
"""Rows below which shares say nothing."""


def _warn(check: str, message: str, advice: str) -> Finding:
    return Finding("warning", check, message, advice)


def _of(count: int, total: int, what: str = "rows") -> str:
    return f"{count:,} of {total:,} {what} ({count / total:.1%})"


def look(subject: Subject) -> list[Finding]:
    """The findings of all checks."""
    return [finding for name in checks for finding in checks[name](subject)]


# -- tokens --------------------------------------------------------------------------------------------------------------------


@checks.add
def encoding(subject: Subject) -> Iterator[Finding]:
    """Rows that cannot be made into tokens at all: no chat template, or one that does not fit."""
    result = subject.encoded
    for problem in subject.problems:
        fault, _, advice = str(problem).rstrip(".").partition("; ")
        advice = advice[:1].upper() + advice[1:]
        yield Finding("error", "encoding", fault, advice or "Mend the chat template, or name another with chat_template")
    refused = sum(count for reason, count in result.set_aside.items() if "refuses" in reason)
    if refused:
        reason = next(reason for reason in result.set_aside if "refuses" in reason)
        yield _warn("encoding", f"{refused} rows are left out: {reason}", "Change these rows, or name another chat_template")


@checks.add
def end_token(subject: Subject) -> Iterator[Finding]:
    """Whether the end token is a trained label in every row that is not cut: without it a model never learns to stop."""
    trees, encoder = subject.encoded.trees, subject.encoder
    if not trees or encoder is None or subject.kind not in ("sft", "preference", "unpaired"):
        return
    end = encoder.end_of_answer(subject.encoded.rows[0])
    limit = encoder.max_length
    whole = [tree for tree in trees if limit is None or tree.longest < limit]
    lacking = sum(not _teaches(tree, end) for tree in whole)
    shown = encoder.tokenizer.convert_ids_to_tokens(end)
    if not any(_teaches(tree, end) for tree in trees):
        yield Finding(
            "error",
            "end_token",
            f"the end token {shown!r} carries a loss in none of {len(trees)} rows, so the model would never learn to stop",
            "Raise max_length if every answer is cut; else mend the chat template",
        )
    elif lacking:
        where = f"{_of(lacking, len(whole))} that are not cut"
        yield _warn("end_token", f"the end token {shown!r} carries no loss in {where}", "Look at these rows")


def _teaches(tree: Tree, end: int) -> bool:
    if tree.prompt_mask is not None:
        return any(token == end and counts for token, counts in zip(tree.prompt, tree.prompt_mask, strict=True))
    return all(branch and branch[-1] == end for branch in tree.branches)


@checks.add
def padding(subject: Subject) -> Iterator[Finding]:
    """pad = eos: whoever masks padding masks the end of every answer with it."""
    if subject.encoder is None:
        return
    tokenizer = subject.encoder.tokenizer
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        yield _warn(
            "pad_is_eos",
            f"the tokenizer pads with its end token ({tokenizer.eos_token!r})",
            "Training here gives it a padding token of its own; tools that mask padding would mask the end of every answer: "
            "set pad_token in the tokenizer's folder",
        )


@checks.add
def begin_token(subject: Subject) -> Iterator[Finding]:
    """A begin token that comes twice, or that chat leaves out though the tokenizer adds it to every other text."""
    encoder = subject.encoder
    if encoder is None or encoder.tokenizer.bos_token_id is None or subject.problems:
        return
    begin = encoder.tokenizer.bos_token_id
    doubled = without = 0
    for row in subject.encoded.rows:
        text, special = _text(subject, row)
        ids = encoder.tokenizer(text, add_special_tokens=special)["input_ids"]
        doubled += ids[:2] == [begin, begin]
        without += not special and ids[:1] != [begin] and encoder.tokenizer(text)["input_ids"][:1] == [begin]
    shown, total = encoder.tokenizer.bos_token, max(len(subject.encoded.rows), 1)
    if doubled:
        yield _warn(
            "doubled_begin",
            f"the begin token {shown!r} comes twice at the start of {_of(doubled, total)}",
            "Training here keeps one; other tools would not: take it out of the chat template or the rows",
        )
    if without:
        yield _warn(
            "missing_begin",
            f"the chat template leaves out the begin token {shown!r}, which the tokenizer puts in front of every other text",
            "If the model was pretrained with it, write {{ bos_token }} at the template's start",
        )


def _text(subject: Subject, row: Any) -> tuple[str, bool]:
    """The beginning of what is tokenized for `row`, and whether the tokenizer adds its special tokens."""
    assert subject.encoder is not None
    start = getattr(row, "messages", None) or getattr(row, "prompt", None) or getattr(row, "text", None) or ""
    if not isinstance(start, str):
        return subject.encoder.render(start, tools=getattr(row, "tools", None)), False
    return start + str(getattr(row, "completion", None) or ""), True


@checks.add
def lengths(subject: Subject) -> Iterator[Finding]:
    """Rows that are cut, left out or fully masked."""
    result = subject.encoded
    if subject.encoder is None or not (result.trees or result.set_aside):
        return
    too_long = sum(count for reason, count in result.set_aside.items() if "no room" in reason)
    total, limit = result.used + result.set_aside.total(), subject.encoder.max_length
    if not result.trees and not subject.problems:
        yield Finding("error", "lengths", f"none of the rows can be used: {result.summary()}", "Raise max_length")
    elif subject.kind != "text" and (result.cut_rows + too_long) / total > CUT:
        longest = f"{_of(result.cut_rows + too_long, total)} do not fit into max_length {limit}"
        yield _warn(
            "truncated",
            f"{longest}: {result.cut_rows} are cut ({result.cut_tokens:,} tokens), {too_long} left out",
            "Raise max_length, or take these rows out: a cut answer does not teach to stop",
        )
    silent = sum(tree.targets == 0 for tree in result.trees) if subject.kind != "prompts" else 0
    if silent:
        yield Finding(
            "error" if silent == len(result.trees) else "warning",
            "fully_masked",
            f"no token carries a loss in {_of(silent, len(result.trees))}",
            "Look at these rows, and at the chat template",
        )


@checks.add
def task_rows(subject: Subject) -> Iterator[Finding]:
    """Rows of a task that are cut or set aside."""
    made, limit = subject.features, subject.stage.max_length
    if made is not None:
        lost = made.cut + made.set_aside.total()
        total = len(made.rows) + made.set_aside.total()
        if lost / total > CUT:
            said = f"{_of(lost, total)} are cut or set aside at max_length {limit}: {made.summary()}"
            yield _warn("truncated", said, "Raise max_length, or take these rows out")


# -- rows ----------------------------------------------------------------------------------------------------------------------


@checks.add
def duplicates(subject: Subject) -> Iterator[Finding]:
    """Rows that are there several times."""
    found = sum(1 for _ in exact_duplicates(subject.rows))
    if len(subject.rows) >= FEWEST and found / len(subject.rows) > DUPLICATES:
        yield _warn(
            "duplicates",
            f"{_of(found, len(subject.rows))} repeat another",
            "`align data clean FILE --out CLEAN.jsonl` takes them out",
        )


@checks.add
def empty_texts(subject: Subject) -> Iterator[Finding]:
    """Answers without a letter or a digit: a model learns from them to say nothing."""
    yield from _many(subject, empty, EMPTY, "empty_texts", "hold nothing to learn", "`align data clean` takes these rows out")


@checks.add
def mojibake(subject: Subject) -> Iterator[Finding]:
    """Text that was decoded wrongly."""
    advice = "Decode the source as UTF-8, or `align data clean` takes these rows out"
    yield from _many(subject, mojibake_rows, GARBLED, "mojibake", "have garbled characters", advice)


def _many(subject: Subject, rule: Rule, share: float, check: str, what: str, advice: str) -> Iterator[Finding]:
    """The finding where the cleaning `rule` names more than this share of the rows."""
    found = list(rule(subject.rows))
    if subject.rows and len(found) / len(subject.rows) > share:
        yield _warn(check, f"{_of(len(found), len(subject.rows))} {what}, first row {found[0][0] + 1}: {found[0][1]}", advice)


@checks.add
def leaks(subject: Subject) -> Iterator[Finding]:
    """Evaluation rows whose prompt is among the training rows, or repeats a run of 13 words of one."""
    if subject.apart:
        yield from leaked(subject.rows, subject.held_out, "eval_data")


def leaked(rows: Sequence[Row], held_out: Sequence[Row], name: str) -> Iterator[Finding]:
    """The finding for evaluation rows `held_out`, that are called `name`, beside training `rows`."""
    known = {prompt_key(row) for row in rows}
    same = [row for row in held_out if prompt_key(row) in known]
    seen = Overlap(first_prompt(row) for row in rows)
    alike = sum(prompt_key(row) not in known and bool(seen.with_text(first_prompt(row))) for row in held_out)
    if same or alike > 0.02 * len(held_out):
        known_share = _of(len(same), len(held_out), "prompts")
        yield _warn(
            "leaked_prompts",
            f"{known_share} of {name} are in the training rows, and {alike:,} more share a long run of words with one",
            f"`align data clean TRAIN --against EVAL` takes them out of the training rows{_first(same)}",
        )


def _first(rows: Sequence[Row]) -> str:
    return f"; the first: {first_prompt(rows[0])[:60]!r}" if rows else ""


# -- pairs ---------------------------------------------------------------------------------------------------------------------


def _pairs(subject: Subject) -> list[PreferenceRow]:
    return [row for row in subject.rows if isinstance(row, PreferenceRow)]


@checks.add
def length_bias(subject: Subject) -> Iterator[Finding]:
    """Pairs in which the longer answer is nearly always the chosen one (or the rejected one): a model learns length from them."""
    differences = [len(said["chosen"]) - len(said["rejected"]) for said in map(texts, _pairs(subject))]
    uneven = [difference for difference in differences if difference]
    if len(uneven) < FEWEST:
        return
    share = sum(difference > 0 for difference in uneven) / len(uneven)
    # Three standard deviations from a half, so that few pairs raise no alarm by chance.
    if max(share, 1 - share) >= max(LONGER, 0.5 + 1.5 / math.sqrt(len(uneven))):
        side, part = ("chosen", share) if share > 0.5 else ("rejected", 1 - share)
        mean = sum(map(abs, differences)) / len(differences)
        yield _warn(
            "length_bias",
            f"the {side} answer is the longer one in {part:.0%} of {len(uneven):,} pairs (by {mean:,.0f} characters on average)",
            "Balance the pairs, or take a loss that discounts length: simpo, dpo_norm, ld_dpo",
        )


@checks.add
def swapped_labels(subject: Subject) -> Iterator[Finding]:
    """Hints that chosen and rejected have changed places: negative margins, pairs that contradict others, and pairs that speak
    against what the rest agrees on.
    """
    pairs = _pairs(subject)
    if len(pairs) < FEWEST:
        return
    scored = [pair.margin for pair in pairs if pair.margin is not None]
    negative = sum(margin < 0 for margin in scored)
    against = suspicious(pairs)
    opposite = sum(1 for _ in contradictory_pairs(pairs))
    reasons = Counter[str]()
    if scored and negative / len(scored) > SWAPPED:
        reasons["have a rejected answer that was scored higher than the chosen one"] = negative
    if len(against) / len(pairs) > SWAPPED:
        reasons["speak against what the words of the other pairs agree on"] = len(against)
    if opposite / len(pairs) > CONTRADICTORY:
        reasons["say the opposite of another pair"] = opposite
    for reason, count in reasons.items():
        yield _warn(
            "swapped_labels",
            f"{_of(count, len(pairs), 'pairs')} {reason}",
            "Look whether chosen and rejected are swapped there; `align data show` prints rows",
        )


def broken(name: str, error: AlignError) -> Finding:
    """The finding for a stage whose settings do not go together, or whose rows or tokenizer cannot be read."""
    return Finding("error", "input", str(error).rstrip("."), f"The stage {name!r} would stop there")
