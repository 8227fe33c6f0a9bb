"""Messages in every spelling that published data use, as schema messages; the helpers of `align.formats`.

Whatever is malformed raises `AlignError` with the path it has in the raw row, so that the message can be found in the file.
"""

from __future__ import annotations

import json
import math
from typing import Any

from align.errors import AlignError, near_miss
from align.schema import missing, problem, short

Raw = dict[str, Any]
Fields = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""The names that published data use for the four roles."""

EXPECTED = {
    "role": "'system', 'user', 'assistant' or 'tool'",
    "from": "'human', 'gpt', 'system', 'function_call' or 'observation'",
}
REASONING = ("reasoning_content", "thinking")
WEIGHTS = ("loss_weight", "weight")
IGNORED = ("id", "refusal", "annotations", "audio")
"""Keys of a message that say nothing to train on."""


def user(text: str) -> Fields:
    """A turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Fields:
    """A turn of the assistant."""
    return {"role": "assistant", "content": text}


def turns(value: Any, path: str) -> list[Fields]:
    """The messages in `value`: role/content or from/value, content as a string, as parts, or null beside tool calls.

    Raises:
        AlignError: `value` is no list of messages; `path` is its place in the raw row.
    """
    if not isinstance(value, list):
        raise AlignError(problem(path, value, f"a list of messages{_no_list(value)}"))
    return [turn(message, f"{path}[{i}]") for i, message in enumerate(value)]


def _no_list(value: Any) -> str:
    """What to say of a list that was written into a cell of a table."""
    written = isinstance(value, str) and value.lstrip()[:1] in ("[", "{")
    return ", not a string of one; tables hold no lists: save it as .jsonl" if written else ""


def turn(raw: Any, path: str) -> Fields:
    """One message, as `turns` reads it. Keys that no published format is known to have are left for the schema to refuse."""
    if not isinstance(raw, dict):
        raise AlignError(problem(path, raw, "a message: a dictionary with role and content"))
    role_key, content_key = ("from", "value") if "from" in raw else ("role", "content")
    if role_key not in raw:
        raise AlignError(f"field {path}.{role_key}: {missing(role_key, raw)}")
    said, content = raw[role_key], raw.get(content_key)
    if not isinstance(said, str) or said not in ROLES:
        raise AlignError(problem(f"{path}.{role_key}", said, EXPECTED[role_key] + near_miss(str(said), ROLES)))
    dropped = (*IGNORED, *WEIGHTS, role_key, content_key)
    rest = {key: value for key, value in raw.items() if key not in dropped and value is not None}
    thoughts = [{"type": "reasoning", "value": rest.pop(key)} for key in REASONING if key in rest]
    calls = rest.pop("function_call", None) or rest.pop("tool_calls", None)
    if said == "function_call":
        content, calls = None, content
    if isinstance(content, list) or thoughts:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        content, found = _join([*thoughts, *parts], f"{path}.{content_key}")
        calls = calls or found
    if not isinstance(content, str) and not (content is None and calls):
        if content_key not in raw:
            raise AlignError(f"field {path}.{content_key}: {missing(content_key, raw)}")
        raise AlignError(problem(f"{path}.{content_key}", content, "a string"))
    called = {"tool_calls": _calls(calls, path)} if calls else {}
    return {"role": ROLES[said], "content": content or "", **called, **rest}


def _join(parts: list[Any], path: str) -> tuple[str, list[Any]]:
    """The text and the tool calls of content given in parts. Reasoning is set in ``<think>`` tags, as chat templates expect it."""
    text, calls = "", []
    for i, part in enumerate(parts):
        kind, value = (part.get("type"), part.get("text", part.get("value"))) if isinstance(part, dict) else (None, None)
        if kind == "tool_call":
            calls.append(value)
        elif kind not in ("text", "reasoning") or not isinstance(value, str):
            raise AlignError(problem(f"{path}[{i}]", part, "a text, reasoning or tool_call part"))
        else:
            text += value if kind == "text" else f"<think>\n{value}\n</think>\n\n"
    return text, calls


def _calls(value: Any, path: str) -> list[Fields]:
    """Tool calls, as JSON or as objects, one or several, as ``{"type": "function", "function": {"name", "arguments"}}``."""
    calls = parse_json(value, path)
    return [_call(parse_json(call, path), path) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: Any, path: str) -> Fields:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or "name" not in function:
        raise AlignError(problem(f"{path}.tool_calls", call, "a call: a dictionary with name and arguments"))
    arguments = parse_json(function.get("arguments") or {}, f"{path}.tool_calls.arguments")
    identity = {"id": call["id"]} if call.get("id") else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def weighted(raw: list[Raw], messages: list[Fields], path: str) -> Fields:
    """The fields of a demonstration whose turns may carry a loss weight: all assistant turns, or the last reply only.

    Raises:
        AlignError: the weights ask for anything else, which no schema row can say.
    """
    learnt = [int(message["role"] == "assistant") for message in messages]
    given = [next((each[key] for key in WEIGHTS if each.get(key) is not None), None) for each in raw]
    weights = [default if weight is None else weight for weight, default in zip(given, learnt, strict=True)]
    if weights == learnt:
        return {"messages": messages}
    prompt, completion = cut(messages)
    if prompt and completion and weights == [0] * len(prompt) + [1] * len(completion):
        return {"prompt": prompt, "completion": completion}
    raise AlignError(problem(path, weights, "loss weights of 1 on every assistant turn or on the last one, 0 elsewhere"))


def cut(messages: list[Fields]) -> tuple[list[Fields], list[Fields]]:
    """A conversation before its last run of assistant turns, and that run (empty when another role has the last word)."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end], messages[end:]


def shared_prompt(chosen: list[Fields], rejected: list[Fields]) -> list[Fields]:
    """The longest common beginning of two conversations that leaves both a reply."""
    length, most = 0, min(len(chosen), len(rejected)) - 1
    while length < most and chosen[length] == rejected[length]:
        length += 1
    return cut(chosen[:length])[0]


def same_reply(chosen: Any, rejected: Any) -> bool:
    """Whether two replies are equal but for the white space around them, which chat templates strip."""
    return _bare(chosen) == _bare(rejected)


def _bare(reply: Any) -> Any:
    if isinstance(reply, list):
        return [{**message, "content": message["content"].strip()} for message in reply]
    return reply.strip() if isinstance(reply, str) else reply


def string(raw: Raw, name: str) -> str:
    """The string in column `name`.

    Raises:
        AlignError: it is missing, or no string.
    """
    if name not in raw:
        raise AlignError(f"field {name}: {missing(name, raw)}")
    if not isinstance(raw[name], str):
        raise AlignError(problem(name, raw[name], "a string"))
    return raw[name]


def strings(value: Any, path: str) -> list[str]:
    """`value`, if it is a list of strings.

    Raises:
        AlignError: it is not; `path` is its place in the raw row.
    """
    if not isinstance(value, list):
        raise AlignError(problem(path, value, f"a list of strings{_no_list(value)}"))
    for i, each in enumerate(value):
        if not isinstance(each, str):
            raise AlignError(problem(f"{path}[{i}]", each, "a string"))
    return value


def number(value: Any, path: str) -> float:
    """`value` as a finite number; tables write numbers as text.

    Raises:
        AlignError: it is none; `path` is its place in the raw row.
    """
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise AlignError(problem(path, value, "a finite number"))
    return found


def parse_json(value: Any, path: str) -> Any:
    """`value`, decoded if it is a string: many data sets keep JSON in strings."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise AlignError(f"field {path}: got {short(value)}, expected JSON ({error})") from error


def tools(raw: Raw) -> Fields:
    """``{"tools": [...]}`` if the row has any, each as ``{"type": "function", "function": {...}}``."""
    found = parse_json(raw.get("tools") or [], "tools")
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise AlignError(problem("tools", found, "a list of tools"))
    return {"tools": [tool if "function" in tool else {"type": "function", "function": tool} for tool in found]} if found else {}


TRUTHS = {
    True: ("true", "1", "1.0", "yes", "good", "desirable"),
    False: ("false", "0", "0.0", "-1", "no", "bad", "undesirable"),
}


def truth(value: Any) -> Any:
    """A label as a bool, also where it was written as a number or a word, as tables and classes have it; anything else as it is."""
    return next((meant for meant, words in TRUTHS.items() if str(value).strip().lower() in words), value)
