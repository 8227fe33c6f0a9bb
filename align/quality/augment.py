"""Augmentation: new rows out of rows. Prompts (and documents) are reworded, replies are left as people or models gave them."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from align.catalog import Catalog
from align.data import plain_fields
from align.errors import AlignError, first_line
from align.registry import Registry
from align.schema import PreferenceRow, Row

Made = Iterator[tuple[int, Row]]
"""Indices of rows and what was made of each."""
Augmentation = Callable[..., Made]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]

augmentations: Catalog[Augmentation] = Catalog("augmentation")
"""Functions of the rows and a `random.Random`; keyword-only parameters are set by the spec, as in ``synonyms(rate=0.2)``."""

THESAURUS = Path(__file__).with_name("thesaurus.json")
PARAPHRASES = (
    "{prompt}\n\nThink about it, then answer.",
    "Please help me with this: {prompt}",
    "I have a question. {prompt}",
    "{prompt} Thank you!",
)
"""Ways to put a request; ``{prompt}`` stands for its words."""


def augment(rows: Sequence[Row], specs: Sequence[str], seed: int = 0) -> list[dict[str, Any]]:
    """The fields of `rows` and of what each of `specs` makes of them. What was made carries its ``origin``: the number of its row,
    from 1, and how.

    Raises:
        AlignError: an unknown augmentation or argument; a file or model that cannot be read.
    """
    chosen = [(spec, *augmentations.parse(spec)) for spec in specs]
    for _, name, arguments in chosen:
        augmentations.check_values(name, arguments)
    found: dict[int, dict[str, Any]] = {i: plain_fields(row) for i, row in enumerate(rows)}
    new: list[dict[str, Any]] = []
    for spec, name, arguments in chosen:
        made = augmentations[name]
        for i, row in made(rows, random.Random(f"{seed}:{spec}"), **arguments):
            fields = {**plain_fields(row), "origin": {"row": i + 1, "how": spec}}
            if getattr(made, "in_place", False):
                found[i] = fields
            else:
                new.append(fields)
    return [*found.values(), *new]


def reword(row: Row, change: Callable[[str], str]) -> Row | None:
    """`row` with the text of its latest request (or its document) changed; None if it has none, or nothing changed."""
    if isinstance(text := getattr(row, "text", None), str):
        field, value = "text", change(text)
    elif isinstance(text := getattr(row, "prompt", None), str):
        field, value = "prompt", change(text)
    else:
        field = "messages" if getattr(row, "messages", None) else "prompt"
        messages = list(getattr(row, field, None) or [])
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        if not asked:
            return None
        latest = messages[asked[-1]]
        messages[asked[-1]] = latest.model_copy(update={"content": change(latest.content)})
        return None if messages[asked[-1]] == latest else row.model_copy(update={field: messages})
    return None if value == text else row.model_copy(update={field: value})


@augmentations.add
def synonyms(
    rows: Sequence[Row], rng: random.Random, *, rate: Share = 0.2, thesaurus: str | None = None, copies: Count = 1
) -> Made:
    """Each word of a prompt that the thesaurus has is replaced with probability `rate` (Wei and Zou, arXiv:1901.11196).

    The thesaurus is a JSON file, ``{"big": ["large"]}``; a small English one is shipped.
    """
    known = load_thesaurus(thesaurus)

    def swap(match: re.Match[str]) -> str:
        options = known.get(match[0].lower())
        if not options or rng.random() >= rate:
            return match[0]
        word = rng.choice(options)
        return word.capitalize() if match[0][0].isupper() else word

    for i, row in enumerate(rows):
        found: list[Row] = []
        for _ in range(copies):
            made = reword(row, lambda text: re.sub(r"\w+", swap, text))
            if made is not None and made not in found:
                found.append(made)
        yield from ((i, made) for made in found)


def load_thesaurus(path: str | None) -> dict[str, list[str]]:
    """Words in lower case with their synonyms.

    Raises:
        AlignError: the file is not there, or something else than lists of words.
    """
    file = THESAURUS if path is None else Path(os.path.expanduser(path))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AlignError(f"thesaurus {file}: cannot be read: {error}") from error
    lists = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(words, list) and words and all(isinstance(word, str) for word in words) for words in lists):
        raise AlignError(f'thesaurus {file}: expected words with their synonyms, as in {{"big": ["large"]}}')
    return {word.lower(): others for word, others in found.items()}


@augmentations.add
def paraphrases(rows: Sequence[Row], rng: random.Random, *, templates: str | None = None, copies: Count = 1) -> Made:
    """Prompts put another way: `templates` is a text file with a way a line, each with ``{prompt}`` in it; a few are shipped."""
    ways = list(PARAPHRASES)
    if templates is not None:
        try:
            text = Path(os.path.expanduser(templates)).read_text(encoding="utf-8")
            ways = [line.replace("\\n", "\n") for line in text.splitlines() if line.strip()]
        except (OSError, ValueError) as error:  # a ValueError: bytes that are no text
            raise AlignError(f"templates {templates}: cannot be read: {error}") from error
        if not ways:
            raise AlignError(f"templates {templates}: is empty, expected a way to put a request a line, each with {{prompt}} in it")
        if bad := next((way for way in ways if "{prompt}" not in way), None):
            raise AlignError(f"templates {templates}: the line {bad!r} has no {{prompt}} in it")
    for i, row in enumerate(rows):
        for way in rng.sample(ways, min(copies, len(ways))):
            if (made := reword(row, partial(way.replace, "{prompt}"))) is not None:
                yield i, made


@augmentations.add
def swapped(rows: Sequence[Row], rng: random.Random, *, share: Share) -> Made:
    """For studies of noise: of that share of the pairs, chosen and rejected change places, in place."""
    if not all(isinstance(row, PreferenceRow) for row in rows):
        raise AlignError("swapped: the rows are no preference pairs")
    for i in sorted(rng.sample(range(len(rows)), round(share * len(rows)))):
        row: Any = rows[i]
        margin = None if row.margin is None else -row.margin
        yield i, row.model_copy(update={"chosen": row.rejected, "rejected": row.chosen, "margin": margin})


swapped.in_place = True  # type: ignore[attr-defined]


@augmentations.add
def back_translation(
    rows: Sequence[Row], rng: random.Random, *, there: str, back: str, batch_size: Count = 16, max_new_tokens: Count = 256
) -> Made:
    """Prompts through two translation models (Sennrich et al., arXiv:1511.06709): `there` into another language, `back` from it.
    Both are seq2seq models, folders or hub ids; the best beam of four is taken. A prompt that is longer than a model reads, or
    whose translation does not end within `max_new_tokens`, would come back without its end: nothing is made of it, which is said.
    """
    from align.progress import say

    requests: list[str] = []

    def noted(text: str) -> str:
        requests.append(text)
        return text

    for row in rows:
        reword(row, noted)
    whole = dict(enumerate(requests))
    for model in (there, back):
        translated = _translate(model, list(whole.values()), batch_size, max_new_tokens)
        whole = {i: new or whole[i] for i, new in zip(whole, translated, strict=True) if new is not None}
    if cut := len(requests) - len(whole):
        why = f"longer than a model reads, or not translated to the end in max_new_tokens={max_new_tokens}"
        say(f"back_translation: nothing is made of {cut:,} of {len(requests):,} prompts: {why}")
    numbers = iter(range(len(requests)))
    for i, row in enumerate(rows):
        if (made := reword(row, lambda text: whole.get(next(numbers), text))) is not None:
            yield i, made


def _translate(path: str, texts: Sequence[str], batch_size: int, max_new_tokens: int) -> list[str | None]:
    """The translation of each of `texts`; None for one that does not fit into the model, or whose translation does not end."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from align.models import best_device, load_tokenizer
    from align.progress import bar

    path = Registry().resolve(path).path
    tokenizer = load_tokenizer(path)
    try:
        model: Any = AutoModelForSeq2SeqLM.from_pretrained(path, use_safetensors=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise AlignError(f"cannot load a translation model from {path!r}: {first_line(error)}") from error
    model.to(best_device())
    end = model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else end, dtype=torch.long, device=model.device)
    room = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length)
    fit = [i for i, text in enumerate(texts) if len(tokenizer(text, verbose=False)["input_ids"]) <= room]
    done: list[str | None] = [None] * len(texts)
    with bar("translating", len(fit), "text") as progress, torch.no_grad():
        for start in range(0, len(fit), batch_size):
            chosen = fit[start : start + batch_size]
            batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            out = model.generate(**inputs, num_beams=4, do_sample=False, max_new_tokens=max_new_tokens)
            # The first token begins every answer, and may be an end; one at the limit may be one that the model is made to write.
            ended = torch.isin(out[:, 1:max_new_tokens], ends).any(-1).tolist()
            for i, text, has_end in zip(chosen, tokenizer.batch_decode(out, skip_special_tokens=True), ended, strict=True):
                done[i] = text.strip() if has_end else None
            progress.update(len(out))
    return done
