"""Which format a row has, which kind of row its fields make, and which other kinds follow from that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from align.errors import AlignError
from align.formats import formats
from align.intake.catalog import SetAside
from align.schema import missing, problem
from align.turns import Fields, Raw, cut, same_reply, user

GIVES = {
    "text": ("text",),
    "sft": ("sft", "prompts"),
    "preference": ("preference", "sft", "prompts", "unpaired"),
    "unpaired": ("unpaired", "preference", "sft", "prompts"),
    "prompts": ("prompts",),
    "classification": ("classification", "text"),
    "tagging": ("tagging",),
    "qa": ("qa", "prompts", "sft"),
}
"""What rows of one kind can be used as."""

NATIVE = {
    "text": ("text",),
    "sft": ("prompt", "completion"),
    "preference": ("chosen", "rejected", "prompt"),
    "unpaired": ("label", "completion", "prompt"),
    "prompts": ("prompt",),
    "classification": ("text", "label"),
    "tagging": ("tokens", "tags"),
    "qa": ("question", "answers"),
}
"""The native columns of each kind."""

OF_TASKS = {"classification": "labelled", "tagging": "tagged", "qa": "squad"}
"""The one format here that gives rows of a task's kind."""

TELLING: dict[str, set[str]] = {
    "tagging": {"tokens"},
    "qa": {"question"},
    "classification": {"text", "label"},
    "unpaired": {"label"},
    "preference": {"chosen"},
    "sft": {"completion"},
    "prompts": {"prompt"},
    "text": {"text"},
}
"""The fields by which a kind is known; the first that fits."""


def kind_of(fields: Fields) -> str:
    """The kind of row that `fields` are, before any derivation."""
    if "messages" in fields:
        return "sft" if any(message["role"] == "assistant" for message in fields["messages"]) else "prompts"
    return next(kind for kind, columns in TELLING.items() if columns <= fields.keys())


MIXED = 8
"""A file may be of several formats: each that at least one of so many of its first rows match."""


def recognize(rows: Iterable[Raw], kind: str | None, named: str | None) -> tuple[tuple[str, ...], str | None]:
    """The formats of a file with these `rows` (or `named`), the most frequent first, and the kind that most of the rows of that one
    are by themselves (or `kind`); none for what they do not tell.

    A row that is broken in a way that makes it look like another format has no say, as it is one among many.
    """
    matched: dict[str, list[Raw]] = {}
    for raw in rows:
        if (name := named or match(raw, kind)) is not None:
            matched.setdefault(name, []).append(raw)
    if not matched:
        return (named,) if named else (), kind
    names = sorted(matched, key=lambda name: -len(matched[name]))
    total = sum(map(len, matched.values()))
    names = [name for name in names if name == names[0] or MIXED * len(matched[name]) >= total]
    if kind is None:
        kinds = Counter(found for raw in matched[names[0]] if (found := _kind_in(names[0], raw)) is not None)
        kind = kinds.most_common(1)[0][0] if kinds else None
    return tuple(names), kind


def _kind_in(name: str, raw: Raw) -> str | None:
    try:
        found = read(name, raw)[0]
    except AlignError:
        return None
    return None if isinstance(found, SetAside) else kind_of(found)


def match(raw: Raw, kind: str | None) -> str | None:
    """The name of the first format that `raw` matches, or None. Where documents are wanted, a row with a text is one."""
    if kind == "text" and "text" in raw:
        return "text"
    return next((name for name in formats if formats[name].matches(raw)), None)


UNNAMED = ", as the first line has a number, an empty cell or one cell twice, and so is no header: give each column a name"


def detect(raw: Raw, kind: str | None) -> str:
    """The name of the first format that `raw` matches.

    Raises:
        AlignError: none does; the message has the columns found, the one that a row of `kind` would have, and the nearest formats.
    """
    if (name := match(raw, kind)) is not None:
        return name
    wanted = "no format" if kind is None else f"no format of {kind} rows"
    unnamed = UNNAMED if {"column 1", "column 2"} <= raw.keys() else ""
    told = "rename the columns, or say in a dataset_info.json what they are (docs/data.md)"
    near = [_with_columns(OF_TASKS[kind], kind)] if kind in OF_TASKS else _nearest(frozenset(raw))
    known = f"nearest: {', '.join(near)}; {told}" if near else f"{told}; formats: {', '.join(formats)}"
    raise AlignError(f"the columns fit {wanted}{unnamed}; {_lacking(raw, kind)}; {known}")


def _with_columns(name: str, kind: str) -> str:
    return f"{name} ({', '.join(NATIVE[kind])})"


@lru_cache(maxsize=1024)
def _nearest(columns: frozenset[str]) -> list[str]:
    """The formats that share most of `columns`, in lower case, and of these those that lack fewest of what they need."""
    each = [(name, formats[name].needs, {*formats[name].needs, *formats[name].prompt}) for name in formats]
    each += [(_with_columns("native", kind), NATIVE[kind], {*NATIVE[kind]}) for kind in ("preference", "unpaired", "sft")]
    lower = {column.lower() for column in columns}
    scores = [(len(lower & known), len(lower.intersection(needs)) - len(needs)) for _, needs, known in each]
    best = max(scores)
    return [name for (name, *_), score in zip(each, scores, strict=True) if score == best] if best[0] else []


def known_columns() -> set[str]:
    """The columns that formats need or make prompts of, and those of the kinds."""
    return set().union(*((*formats[name].needs, *formats[name].prompt) for name in formats), *NATIVE.values())


MEDIA = ("images", "videos", "audios")
"""Columns of what a row speaks of beside its text: without it, the text teaches to answer about what is not there."""


def read(name: str, raw: Raw) -> Sequence[Fields | SetAside]:
    """What format `name` finds in `raw`.

    Raises:
        AlignError: the row lacks a column or is malformed. The message does not say where it stands.
    """
    entry = formats[name]
    for column in MEDIA:
        if isinstance(raw.get(column), list) and raw[column]:
            raise AlignError(problem(column, raw[column], "none, as only text is read; leave the row out, or the column"))
    for column in entry.needs:
        if column not in raw:
            raise AlignError(f"column {column!r} of format {name!r}: {missing(column, raw)}")
    try:
        fits = entry.when(raw)
        found = entry(raw)  # also of a row that does not fit, as its error says best what is wrong
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:  # a shape not foreseen
        columns = ", ".join(entry.needs or entry.prompt or raw)
        raise AlignError(f"fields {columns}: not those of a row of format {name!r}: {type(error).__name__}: {error}") from error
    if not fits:
        columns = ", ".join(entry.needs or entry.prompt or raw)
        raise AlignError(f"fields {columns}: not those of a row of format {name!r}, as which the file was recognized")
    return found


def convert(name: str, raw: Raw, kind: str) -> list[Fields | SetAside]:
    """Read `raw` as format `name` and give the fields of rows of `kind`.

    Raises:
        AlignError: the row lacks a column, is malformed, or cannot give `kind`. The message does not say where it stands.
    """
    return derive(read(name, raw), kind, raw, name)


def derive(found: Sequence[Fields | SetAside], kind: str, raw: Raw, name: str) -> list[Fields | SetAside]:
    """What format `name` found in `raw` as the fields of rows of `kind`.

    Raises:
        AlignError: it cannot give `kind`. The message does not say where it stands.
    """
    rows = [row for each in found for row in ([each] if isinstance(each, SetAside) else _as_kind(each, kind, raw, name))]
    labelled = [row for row in rows if isinstance(row, dict) and "label" in row]
    if kind == "preference" and len(labelled) > 1:
        return pairs_of(labelled)
    if kind != "prompts":
        return rows
    entry = formats[name]
    kept = {column: value for column, value in raw.items() if column not in (*entry.prompt, "prompt", "tools")}
    unique = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return [row if isinstance(row, SetAside) else {**row, "columns": {**kept, **row.get("columns", {})}} for row in unique]


def _as_kind(fields: Fields, kind: str, raw: Raw, name: str) -> list[Fields | SetAside]:
    """`fields` as rows of `kind`: as they are, or derived where there is one obvious way. Labelled rows that shall become pairs
    are given as they are: it takes two of them.
    """
    have = kind_of(fields)
    if have == "preference" and kind in ("preference", "unpaired") and same_reply(fields["chosen"], fields["rejected"]):
        return [SetAside("identical chosen and rejected")]
    if (kind == "sft" and "messages" in fields) or (have == kind and have != "prompts"):
        return [fields]  # messages without an assistant's turn included: the schema says best what is wrong with them
    if kind not in GIVES[have]:
        usable = " or ".join(GIVES[have])
        conll = " (the name of a CoNLL file ends in .conll)" if (have, kind) == ("text", "tagging") else ""
        raise AlignError(f"{_lacking(raw, kind)}; no {kind} row; by format {name!r} it is of kind {have}{conll}, good for {usable}")
    if have == "qa":
        return [_asked(fields, kind)]
    if have == "unpaired" and not isinstance(fields["label"], bool):
        raise AlignError(problem("label", fields["label"], "true or false"))
    if have == "unpaired" and kind == "preference":
        return [fields]
    if have == "classification":
        return [{"text": fields["text"]}]
    shared: Fields = {key: fields[key] for key in ("tools", "columns") if key in fields}
    if "messages" in fields:
        prompt = cut(fields["messages"])[0]
        return [{"prompt": prompt, **shared} if prompt else SetAside("no turn before the assistant's")]
    shared["prompt"] = fields["prompt"]
    if kind == "prompts":
        return [shared]
    if kind == "sft" and have == "unpaired":
        demonstration = {**shared, "completion": fields["completion"]}
        return [demonstration if fields["label"] else SetAside("an unwanted answer, nothing to imitate")]
    if kind == "sft":
        return [{**shared, "completion": fields["chosen"]}]
    return [{**shared, "completion": fields[side], "label": side == "chosen"} for side in ("chosen", "rejected")]


def replies(name: str, raw: Raw, prompt: str | list[Fields]) -> list[str | list[Fields]]:
    """What `raw`, read as format `name`, has as good answers to `prompt`, one of its prompts; none that is labelled as unwanted.

    Raises:
        AlignError: rows of that format have no answers. The message does not say where it stands.
    """
    found = []
    for fields in convert(name, raw, "sft"):
        if not isinstance(fields, SetAside):
            asked, said = cut(fields["messages"]) if "messages" in fields else (fields["prompt"], fields["completion"])
            found += [said] if asked == prompt and said else []
    return found


def _asked(fields: Fields, kind: str) -> Fields | SetAside:
    """A question about a context as a prompt with its reference answers, or as a demonstration of the first of them."""
    prompt = [user("\n\n".join(part for part in (fields["context"], fields["question"]) if part))]
    answers = fields["answers"]
    if kind == "prompts":
        return {"prompt": prompt, "columns": {"answer": answers[0] if answers else None, "answers": answers}}
    if not answers:
        return SetAside("a question without an answer")
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": answers[0]}]}


UNMATCHED = "no answer with the other label to the same prompt"


def pairs_of(labelled: Sequence[Fields]) -> list[Fields | SetAside]:
    """Wanted against unwanted answers to one prompt, in turn; those that are left over are set aside."""
    wanted = [row for row in labelled if row["label"]]
    unwanted = [row for row in labelled if not row["label"]]
    pairs: list[Fields | SetAside] = [pair(*both) for both in zip(wanted, unwanted, strict=False)]
    return pairs + [SetAside(UNMATCHED)] * abs(len(wanted) - len(unwanted))


def pair(wanted: Fields, unwanted: Fields) -> Fields | SetAside:
    """Two labelled answers to one prompt as a preference row."""
    if same_reply(wanted["completion"], unwanted["completion"]):
        return SetAside("identical chosen and rejected")
    shared: Fields = {key: wanted[key] for key in ("prompt", "tools") if key in wanted}
    return {**shared, "chosen": wanted["completion"], "rejected": unwanted["completion"]}


def _lacking(raw: Raw, kind: str | None) -> str:
    if kind is None:
        return f"found {', '.join(raw) or 'nothing'}"
    column = next((column for column in NATIVE[kind] if column not in raw), None)
    if column is None:
        return f"columns {' and '.join(NATIVE[kind])} are there, but not as expected"
    return f"column {column!r} is {missing(column, raw)}"
