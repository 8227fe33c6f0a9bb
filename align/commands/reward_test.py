"""``align reward test FUNCTION --data FILE``: a reward function tried on completions before any training."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.commands.parser import Parser
from align.errors import AlignError
from align.progress import bar, say
from align.registry import Registry
from align.rewards import RewardSet, RewardSpec
from align.stages.written import parse_value

if TYPE_CHECKING:
    from align.rewards.trial import Summary, Trial

Place = tuple[str, int, str]
"""A file, the number of a row there, and a prompt: a row may hold several."""


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="align reward test", description="Score completions with reward functions before anything is trained on them."
    )
    made.add_argument(
        "rewards",
        nargs="+",
        metavar="FUNCTION",
        help="a built-in, package.module:function, file.py:function, or {reward: NAME, ...}",
    )
    made.add_argument(
        "--data",
        required=True,
        metavar="SOURCE",
        help="rows with completions: demonstrations, pairs; with --model, prompts will do",
    )
    made.add_argument("--data_format", metavar="NAME", help="recognized by the columns by default")
    made.add_argument("--model", metavar="NAME", help="sample the completions from this model instead")
    made.add_argument("--reward_model", metavar="NAME", help="what the reward `reward_model` stands for")
    made.add_argument("--max_rows", type=int, default=64, metavar="N", help="rows to score")
    made.add_argument("--max_completion_length", type=int, default=128, metavar="N", help="tokens, of sampled completions")
    made.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of sampled completions")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of sampled completions")
    made.add_argument("--on_error", type=parse_value, default=None, metavar="WHAT", help="raise (default), abstain, or a number")
    made.add_argument("--timeout", type=float, metavar="S", help="seconds that a call may take")
    made.add_argument("--plan", action="store_true", help="load the functions, say what would be scored, and stop")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run(arguments: list[str]) -> int:
    """Returns the exit code; a broken function is an `AlignError`."""
    options = parser().parse_args(arguments)
    if options.max_rows < 1:
        raise AlignError(f"--max_rows: got {options.max_rows}, expected at least 1")
    with redirect_stdout(sys.stderr):  # what a reward function's file prints is no part of the report
        rewards = RewardSet([_spec(text, options) for text in options.rewards])
    if options.plan:
        source = "their own completions" if options.model is None else f"completions sampled from {options.model}"
        told = f"would score up to {options.max_rows} rows of {options.data}, {source}, by {', '.join(rewards.components)}"
        plan = {"data": options.data, "max_rows": options.max_rows, "model": options.model, "rewards": list(rewards.components)}
        print(json.dumps(plan, indent=1) if options.json else told)
        return 0
    with redirect_stdout(sys.stderr):
        trial = _trial(rewards, options)
    print(json.dumps(asdict(trial), indent=1) if options.json else shown(trial))
    return 0


def _trial(rewards: RewardSet, options: argparse.Namespace) -> Trial:
    from align.rewards.trial import run_trial
    from align.runner.worker import quiet

    quiet()
    rows, completions, ids, pairs = _sampled(options) if options.model else _given(options)
    from align.scoring import plain, row_columns

    prompts = [plain(row.prompt) for row in rows]
    more = {"completion_ids": ids, "model_scores": _model_scores(options, rows, completions, ids)}
    return run_trial(rewards, prompts, completions, row_columns(rows), pairs=pairs, **more)


def _spec(text: str, options: argparse.Namespace) -> RewardSpec:
    """What was written, with the policies of the flags where it has none of its own."""
    value = parse_value(text) if text.lstrip().startswith("{") else text
    flags = {"on_error": options.on_error, "timeout": options.timeout}
    given = {key: value for key, value in flags.items() if value is not None}
    try:
        return RewardSpec.of({**given, **(value if isinstance(value, dict) else {"reward": value})})
    except ValueError as error:
        raise AlignError(f"reward {text!r}: {error}") from error


def _given(options: argparse.Namespace) -> tuple[list[Any], list[Any], None, int]:
    """Prompts (with their columns) and the completions in the data: the chosen ones and then the rejected, or demonstrations."""
    from align.data import RowStream, refuse_empty
    from align.intake.kinds import GIVES
    from align.schema import PromptRow
    from align.scoring import plain

    def stream(kind: str | None, limit: int | None = options.max_rows) -> RowStream:
        return RowStream(options.data, kind, format=options.data_format, limit=limit, on_bad_row="quarantine")

    def placed(rows: RowStream) -> Iterator[tuple[Place, Any]]:
        for row in rows:
            row = _split(row) if rows.kind == "sft" else row
            assert rows.item is not None
            yield (rows.item.file, rows.item.number, json.dumps(plain(row.prompt))), row

    first = stream(None, limit=1)
    next(iter(first), None)
    refuse_empty(first)
    ways = [kind for kind in ("preference", "sft") if kind in GIVES[first.kind or "prompts"]]
    if not ways:
        raise AlignError(
            f"{options.data} holds no completions to score; name a --model that answers its prompts (its rows are {first.kind})"
        )
    for kind in ways:
        rows = [*placed(read := stream(kind))]
        if rows:
            break
    refuse_empty(read)
    sides = ("chosen", "rejected") if kind == "preference" else ("completion",)
    if read.set_aside:
        say(f"{options.data}: {read.account.summary()}")
    asked: dict[Place, Any] = {}
    missing = {place for place, _ in rows}
    for place, prompt in placed(stream("prompts", limit=None)):  # as prompts the same rows have their other columns, too
        if place in missing:
            asked[place] = prompt
            missing.remove(place)
            if not missing:
                break
    prompts = [asked.get(place) or PromptRow.model_construct(prompt=row.prompt, columns={}) for place, row in rows]
    completions = [plain(getattr(row, side)) for side in sides for _, row in rows]
    return prompts * len(sides), completions, None, len(prompts) if len(sides) == 2 else 0


def _split(row: Any) -> Any:
    """A demonstration as prompt and completion: a conversation is cut before its last turn of the assistant."""
    from align.schema import SFTRow

    if row.messages is None:
        return row
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    return SFTRow.model_construct(prompt=row.messages[:last], completion=[row.messages[last]])


def _sampled(options: argparse.Namespace) -> tuple[list[Any], list[Any], list[list[int]], int]:
    """Prompts and what the model answers."""
    import torch

    from align.data import load_rows
    from align.encode import Encoder, set_chat_template
    from align.models import best_device, load_causal_lm, load_tokenizer, stop_token_ids
    from align.rollout import Sampling, complete
    from align.scoring import answer

    path = Registry().resolve(options.model).path
    tokenizer, model = load_tokenizer(path), load_causal_lm(path)
    model.to(best_device())
    set_chat_template(tokenizer, "auto")
    read = load_rows(options.data, "prompts", format=options.data_format, limit=options.max_rows, on_bad_row="quarantine")
    if read.set_aside:
        say(f"{options.data}: {read.summary()}")
    rows = read.rows
    encoder = Encoder(tokenizer, None)
    encoded = encoder.prompts(rows)
    if len(encoded.rows) < len(rows):
        say(f"{options.data}: {encoded.summary()}")
    stops = {*stop_token_ids(model, tokenizer), encoder.end_of_answer(rows[0])}
    sampling = Sampling(options.max_completion_length, temperature=options.temperature)
    generator = torch.Generator().manual_seed(options.seed)
    with bar("sampling", len(encoded.trees), "answer") as progress:
        found = complete(model, [tree.prompt for tree in encoded.trees], sampling, sorted(stops), generator, progress.update)
    texts = tokenizer.batch_decode([one.tokens for one in found], skip_special_tokens=True)
    completions = [answer(row, text) for row, text in zip(encoded.rows, texts, strict=True)]
    return encoded.rows, completions, [one.tokens for one in found], 0


def _model_scores(
    options: argparse.Namespace, rows: Sequence[Any], completions: Sequence[Any], ids: Sequence[list[int]] | None
) -> list[float] | None:
    if options.reward_model is None:
        return None
    from align.encode import Encoder, set_chat_template
    from align.models import load_tokenizer
    from align.rewards import text_of
    from align.scoring import SCORE_SCALE, RewardScorer

    path = Registry().resolve(options.reward_model).path
    tokenizer = load_tokenizer(path)
    set_chat_template(tokenizer, "auto")
    normalize = (Path(path) / SCORE_SCALE).is_file()
    scorer = RewardScorer(path, tokenizer, dtype="float32", max_tokens=8192, normalize=normalize)
    encoder = Encoder(tokenizer, None)
    prompts = [encoder.prompt_ids(row.prompt, row.tools) for row in rows]
    if ids is None:  # a written completion ends where its turn or text does: that is where scores are read
        end = encoder.end_of_text if isinstance(completions[0], str) else encoder.end_of_turn
        ids = [[*tokenizer(text_of(one), add_special_tokens=False)["input_ids"], end] for one in completions]
    return scorer(prompts, ids)


# -- for people ------------------------------------------------------------------------------------------------------------------


def shown(trial: Trial) -> str:
    """The report as text."""
    what = f"{trial.pairs} pairs" if trial.pairs else f"{trial.completions} completions"
    lines = [f"{what}, {trial.per_second:.0f} completions a second ({trial.seconds:.3f} s)"]
    lines.append("deterministic: yes" if trial.deterministic else f"deterministic: NO: {trial.difference}")
    if trial.failure:
        lines.append(f"first failure: {trial.failure}")
    for component in trial.components:
        lines += ["", *_lines(component)]
    return "\n".join(lines)


def _lines(component: Summary) -> list[str]:
    lines = [f"{component.name}: {component.abstained:.0%} abstained, {component.failed:.0%} failed"]
    if not component.scored:
        return [*lines, "  no value at all"]
    lines[0] += f", mean {component.mean:.4g}, deviation {component.deviation:.4g}"
    correlation = component.length_correlation
    lines.append(
        f"  correlation with length: {'none: one of them does not vary' if correlation is None else f'{correlation:+.2f}'}"
    )
    if component.separates is not None:
        lines.append(f"  chosen above rejected: {component.separates:.0%} of the pairs")
    most = max(count for _, _, count in component.histogram)
    for low, high, count in component.histogram:
        label = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        lines.append(f"  {label:>24}  {'█' * round(40 * count / most)} {count}")
    return lines
