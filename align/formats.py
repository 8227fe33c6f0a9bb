"""Foreign data formats: one decorated function each, from a raw row to the fields of a schema row.

A format function returns the fields it finds (``{"prompt": ..., "chosen": ..., "rejected": ...}``), a list of such dictionaries
when one raw row holds several rows, or `SetAside` when it holds none. Which kind of row the fields make, and what other kinds
that gives, is the business of `align.intake.kinds`. Formats are tried in the order of this file, behind those of
`align.intake.tasks`; the most general one comes last.
"""

from __future__ import annotations

import re
from typing import Any

from align.errors import AlignError
from align.intake import tasks as _tasks  # noqa: F401  registers its formats, in front of these
from align.intake.catalog import Format as Format
from align.intake.catalog import SetAside, data_format
from align.intake.catalog import formats as formats
from align.schema import missing, problem
from align.turns import Fields, Raw, assistant, cut, number, shared_prompt, string, tools, truth, turn, turns, user, weighted


@data_format("chosen", "rejected", when=lambda raw: isinstance(raw["chosen"], list) and not isinstance(raw.get("prompt"), list))
def ultrafeedback(raw: Raw) -> Fields | SetAside:
    """UltraFeedback-binarized: `chosen` and `rejected` repeat the prompt; the margin is the difference of their scores."""
    pair = _pair(turns(raw["chosen"], "chosen"), turns(raw["rejected"], "rejected"), raw)
    return pair if isinstance(pair, SetAside) else {**pair, **_margin(raw)}


def _pair(chosen: list[Fields], rejected: list[Fields], raw: Raw) -> Fields | SetAside:
    """Two whole conversations as a pair: what they share is the prompt, and a question must not be among the rest."""
    prompt = shared_prompt(chosen, rejected)
    if not prompt and isinstance(raw.get("prompt"), str):
        prompt, replies = [user(raw["prompt"])], (chosen, rejected)
    else:
        replies = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt or any(message["role"] in ("user", "system") for reply in replies for message in reply):
        return SetAside("chosen and rejected part before the last reply")
    return {"prompt": prompt, "chosen": replies[0], "rejected": replies[1], **tools(raw)}


@data_format("chosen", "rejected", when=lambda raw: isinstance(raw["chosen"], str) and raw["chosen"].startswith("\n\nHuman:"))
def hh(raw: Raw) -> Fields | SetAside:
    """Anthropic HH: whole transcripts; the turns they begin with in common are the prompt."""
    return _pair(_transcript(raw, "chosen"), _transcript(raw, "rejected"), {})


def _transcript(raw: Raw, column: str) -> list[Fields]:
    """``\\n\\nHuman: ...\\n\\nAssistant: ...`` as messages. The bare words inside a turn are text."""
    head, *parts = re.split(r"\n\n(Human|Assistant):", string(raw, column))
    if head or not parts:
        raise AlignError(problem(column, raw[column], r"a transcript that starts with '\n\nHuman:'"))
    speakers = {"Human": user, "Assistant": assistant}
    return [speakers[who](text.strip()) for who, text in zip(parts[::2], parts[1::2], strict=True)]


@data_format("prompt", when=lambda raw: isinstance(raw["prompt"], dict) and "replies" in raw["prompt"])
def oasst(raw: Raw) -> list[Fields] | SetAside:
    """Open Assistant message trees: the best against the worst reply wherever two or more are ranked."""
    pairs: list[Fields] = []

    def walk(node: Any, before: list[Fields], path: str) -> None:
        if not isinstance(node, dict) or not isinstance(node.get("replies") or [], list):
            raise AlignError(problem(path, node, "a message: a dictionary with role, text and a list of replies"))
        messages = [*before, turn({"role": node.get("role"), "content": node.get("text")}, path)]
        replies = [(f"{path}.replies[{i}]", reply) for i, reply in enumerate(node.get("replies") or [])]
        for place, reply in replies:
            if not isinstance(reply, dict):
                raise AlignError(problem(place, reply, "a message: a dictionary with role and text"))
        replies = [(place, reply) for place, reply in replies if not reply.get("deleted")]
        answers = [(place, reply) for place, reply in replies if reply.get("role") == "assistant"]
        ranks = {place: number(r["rank"], f"{place}.rank") for place, r in answers if r.get("rank") is not None}
        ranked = sorted((answer for answer in answers if answer[0] in ranks), key=lambda answer: ranks[answer[0]])
        if len(ranked) > 1:
            best, worst = string(ranked[0][1], "text"), string(ranked[-1][1], "text")
            pairs.append({"prompt": messages, "chosen": [assistant(best)], "rejected": [assistant(worst)]})
        for place, reply in replies:
            walk(reply, messages, place)

    walk(raw["prompt"], [], "prompt")
    return pairs or SetAside("no two ranked replies")


@data_format("conversations", prompt=("conversations", "system"))
def sharegpt(raw: Raw) -> Fields:
    """ShareGPT: from/value turns, tool calls and tools as JSON strings; with chosen and rejected (a message or a string) a pair."""
    return _conversation(raw, "conversations")


@data_format(
    when=lambda raw: "messages" in raw or {"chosen_messages", "rejected_messages"} <= raw.keys(), prompt=("messages", "system")
)
def openai(raw: Raw) -> Fields | SetAside:
    """OpenAI messages, content as string, null or parts; LLaMA-Factory v1's chosen_messages and rejected_messages."""
    if "messages" in raw or not {"chosen_messages", "rejected_messages"} & raw.keys():
        return _conversation(raw, "messages")
    for column in ("chosen_messages", "rejected_messages"):
        if column not in raw:
            raise AlignError(f"field {column}: {missing(column, raw)}")
    pair = _pair(turns(raw["chosen_messages"], "chosen_messages"), turns(raw["rejected_messages"], "rejected_messages"), raw)
    return pair if isinstance(pair, SetAside) else {**pair, **_margin(raw)}


def _conversation(raw: Raw, column: str) -> Fields:
    """A conversation by itself, with a label for its last reply, or with a chosen and a rejected reply."""
    if column not in raw:
        raise AlignError(f"field {column}: {missing(column, raw)}")
    messages = turns(raw[column], column)
    if raw.get("system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": string(raw, "system")})
    if "chosen" in raw and "rejected" in raw:
        replies = {side: _reply(raw[side], side) for side in ("chosen", "rejected")}
        return {"prompt": messages, **replies, **_margin(raw), **tools(raw)}
    label = raw.get("kto_tag", raw.get("label"))
    if label is not None:
        prompt, completion = cut(messages)
        return {"prompt": prompt, "completion": completion, "label": truth(label), **tools(raw)}
    system = [{"role": "system"}] * (len(messages) - len(raw[column]))
    return {**weighted([*system, *raw[column]], messages, column), **tools(raw)}


def _reply(value: Any, path: str) -> list[Fields]:
    """A reply given as a string, as one message or as a list of them."""
    if isinstance(value, str):
        return [assistant(value)]
    return turns(value, path) if isinstance(value, list) else [turn(value, path)]


@data_format(
    "instruction",
    when=lambda raw: "output" in raw or {"chosen", "rejected"} <= raw.keys(),
    prompt=("instruction", "input", "system", "history"),
)
def alpaca(raw: Raw) -> Fields | SetAside:
    """Alpaca: instruction and input are one user turn. With chosen and rejected, or with output ranked best to worst, a pair."""
    system = [{"role": "system", "content": string(raw, "system")}] if raw.get("system") else []
    prompt = [*system, *_history(raw.get("history") or []), _ask(raw, "instruction", "input")]
    if "chosen" in raw and "rejected" in raw:
        return {"prompt": prompt, **{side: _reply(raw[side], side) for side in ("chosen", "rejected")}, **_margin(raw)}
    if not isinstance(raw.get("output"), list):
        reply = [assistant(string(raw, "output"))]
        label = raw.get("kto_tag", raw.get("label"))
        return {"messages": prompt + reply} if label is None else {"prompt": prompt, "completion": reply, "label": truth(label)}
    if len(raw["output"]) < 2:
        return SetAside("fewer than two ranked replies")
    return {"prompt": prompt, "chosen": _reply(raw["output"][0], "output[0]"), "rejected": _reply(raw["output"][-1], "output[-1]")}


def _history(given: Any) -> list[Fields]:
    """Earlier turns: pairs of what was asked and what was answered."""
    if not isinstance(given, list):
        raise AlignError(problem("history", given, "a list of pairs: what was asked, what was answered"))
    messages = []
    for i, both in enumerate(given):
        if not isinstance(both, list) or len(both) != 2 or not all(isinstance(text, str) for text in both):
            raise AlignError(problem(f"history[{i}]", both, "a pair of strings: what was asked, what was answered"))
        messages += [user(both[0]), assistant(both[1])]
    return messages


def _ask(raw: Raw, question: str, material: str) -> Fields:
    """A user turn of a question and, after a blank line, the material it is about, if any."""
    about = string(raw, material) if raw.get(material) else ""
    return user("\n\n".join(part for part in (string(raw, question), about) if part))


@data_format("instruction", "output_1", "output_2", "preference", prompt=("instruction",))
def judged(raw: Raw) -> Fields | SetAside:
    """AlpacaEval annotations: `preference` 1 is for output_1, 2 for output_2, anything between a probability; 0 is a tie."""
    preference = 0 if raw["preference"] is None else number(raw["preference"], "preference")
    if preference in (0, 1.5):
        return SetAside("the judge had no preference")
    if not 1 <= preference <= 2:
        raise AlignError(problem("preference", preference, "1 for output_1, 2 for output_2, a number between, or 0 for a tie"))
    best, worst = ("output_1", "output_2") if preference < 1.5 else ("output_2", "output_1")
    return _answered(_ask(raw, "instruction", "input"), string(raw, best), string(raw, worst))


def _answered(question: Fields, chosen: str, rejected: str) -> Fields:
    return {"prompt": [question], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}


@data_format("prompt", "response_0", "response_1", "better_response_id", prompt=("prompt",))
def saferlhf(raw: Raw) -> Fields:
    """PKU-SafeRLHF: the helpfulness label `better_response_id` decides (safer_response_id may say otherwise)."""
    if raw["better_response_id"] not in (0, 1):
        raise AlignError(problem("better_response_id", raw["better_response_id"], "0 or 1"))
    better = raw["better_response_id"]
    return _answered(user(string(raw, "prompt")), string(raw, f"response_{better}"), string(raw, f"response_{1 - better}"))


@data_format("question", "response_j", "response_k", prompt=("question",))
def stack_exchange(raw: Raw) -> Fields:
    """Paired StackExchange answers: response_j was voted above response_k."""
    return _answered(user(string(raw, "question")), string(raw, "response_j"), string(raw, "response_k"))


@data_format("instruction", "response", prompt=("instruction", "context"))
def dolly(raw: Raw) -> Fields:
    """Dolly: an instruction, the context it is about, a response."""
    return {"messages": [_ask(raw, "instruction", "context"), assistant(string(raw, "response"))]}


@data_format("instruction", "instances", prompt=("instruction", "instances"))
def self_instruct(raw: Raw) -> list[Fields] | SetAside:
    """Self-Instruct seed tasks: one instruction, several instances of input and output, a row each."""
    if not isinstance(raw["instances"], list):
        raise AlignError(problem("instances", raw["instances"], "a list of dictionaries with input and output"))
    for i, instance in enumerate(raw["instances"]):
        if not isinstance(instance, dict) or "output" not in instance:
            raise AlignError(problem(f"instances[{i}]", instance, "a dictionary with input and output"))
    rows = [{"instruction": raw["instruction"], **instance} for instance in raw["instances"]]
    found = [{"messages": [_ask(row, "instruction", "input"), assistant(string(row, "output"))]} for row in rows]
    return found or SetAside("no instances")


def _graded(raw: Raw) -> list[Raw]:
    return [value for value in raw.values() if isinstance(value, dict) and {"is_correct", "solution"} <= value.keys()]


@data_format("question", when=lambda raw: bool(_graded(raw)))
def graded(raw: Raw) -> list[Fields]:
    """Solutions to one question, each marked right or wrong (GSM8K's model solutions)."""
    prompt = [user(string(raw, "question"))]
    each = _graded(raw)
    return [
        {"prompt": prompt, "completion": [assistant(string(one, "solution"))], "label": truth(one["is_correct"])} for one in each
    ]


@data_format("question", when=lambda raw: isinstance(raw["question"], str))
def qa(raw: Raw) -> Fields:
    """A question and, where there is one, its answer (GSM8K)."""
    question = user(string(raw, "question"))
    return {"messages": [question, assistant(string(raw, "answer"))]} if "answer" in raw else {"prompt": [question]}


@data_format("turns", prompt=("turns",))
def questions(raw: Raw) -> Fields | SetAside:
    """MT-Bench and Arena-Hard: the user's turns; the first is the prompt."""
    if not isinstance(raw["turns"], list):
        raise AlignError(problem("turns", raw["turns"], "a list of what the user says"))
    if not raw["turns"]:
        return SetAside("no turns")
    first = raw["turns"][0]
    return {"prompt": [user(string(first if isinstance(first, dict) else {"content": first}, "content"))]}


@data_format("text", when=lambda raw: not {"prompt", "chosen"} & raw.keys())
def text(raw: Raw) -> Fields:
    """Plain text: a `text` column, or the documents of a text file."""
    return {"text": raw["text"]}


@data_format("prompt")
def native(raw: Raw) -> Fields:
    """TRL's columns, strings or messages: prompt, prompt + completion [+ label], prompt + chosen + rejected [+ margin]."""
    replies = ("chosen", "rejected") if {"chosen", "rejected"} <= raw.keys() else ("completion",) if "completion" in raw else ()
    fields = {column: _text(raw, column) for column in ("prompt", *replies)}
    if "label" in raw and "completion" in fields:
        fields["label"] = truth(raw["label"])
    return {**fields, **(_margin(raw) if "chosen" in fields else {}), **tools(raw)}


@data_format("chosen", "rejected", prompt=("chosen", "rejected"))
def implicit(raw: Raw) -> Fields:
    """TRL's chosen + rejected [+ margin] as strings, without a prompt: the words that they begin with in common are the prompt."""
    return {**_split_strings(string(raw, "chosen"), string(raw, "rejected")), **_margin(raw), **tools(raw)}


def _text(raw: Raw, column: str) -> Any:
    return turns(raw[column], column) if isinstance(raw[column], list) else string(raw, column)


def _split_strings(chosen: str, rejected: str) -> Fields:
    """Two texts without a prompt of their own: the words that they begin with in common are the prompt."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = chosen[: next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))]
    word = "" if shared[-1:].isspace() else (shared.rsplit(maxsplit=1) or [""])[-1]  # they may part in the middle of it
    prompt = shared[: len(shared) - len(word)].rstrip()  # the white space goes with the word behind it, as tokenizers have it
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _margin(raw: Raw) -> Fields:
    """How much better the chosen reply was scored: given as such, or as two scores."""
    if raw.get("margin") not in (None, ""):
        return {"margin": number(raw.get("margin"), "margin")}
    scores = [raw.get(column) for column in ("score_chosen", "score_rejected")]
    if None in scores:
        return {}
    return {"margin": number(scores[0], "score_chosen") - number(scores[1], "score_rejected")}
