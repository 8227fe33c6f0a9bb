"""``align data show``: rows as they are read, or as the model will see them."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from typing import Any

from align.commands.data.arguments import add_reading, visible
from align.errors import AlignError
from align.registry import Registry


def add(actions: Any) -> None:
    parser = actions.add_parser("show", help="rows as they are read, or, with --model, as its chat template renders them")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="how many")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="rows before the first one shown")
    add_reading(parser, json="print a line of JSON for each row")
    parser.add_argument("--model", help="render messages with this model's chat template")
    parser.add_argument("--chat_template", default="auto", help="auto, the name of a shipped template, or a file")
    parser.set_defaults(handler=show)


def show(options: argparse.Namespace) -> int:
    from align.data import RowStream, refuse_empty

    if options.rows < 1 or options.skip < 0:
        raise AlignError("--rows is at least 1, --skip at least 0")
    render = _renderer(options.model, options.chat_template) if options.model else _plain
    stream = RowStream(options.file, options.kind, format=options.format, split=options.split, on_bad_row="quarantine")
    shown = 0
    for row in islice(stream, options.skip, options.skip + options.rows):
        shown += 1
        if options.json:
            print(json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False, default=str))
            continue
        assert stream.item is not None
        print(f"--- {stream.item.file} row {stream.item.number} ({stream.read_as}, {stream.kind})")
        for name, value in row.__dict__.items():
            if value is not None and value != {}:
                print(f"{name}:\n{_indented(render(name, value, row))}")
    if not shown:
        refuse_empty(stream)
        raise AlignError(f"{options.file}: --skip {options.skip} leaves nothing to show of {stream.account.gave:,} rows")
    return 0


def _plain(name: str, value: Any, row: Any) -> str:
    if isinstance(value, list) and value and hasattr(value[0], "role"):
        return "\n".join(f"[{turn.role}] {turn.content}{_calls(turn)}" for turn in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _calls(turn: Any) -> str:
    return f" {json.dumps(turn.tool_calls, ensure_ascii=False)}" if turn.tool_calls else ""


def _renderer(model: str, template: str) -> Any:
    from align.encode import Encoder, set_chat_template
    from align.models import load_tokenizer

    tokenizer = load_tokenizer(Registry().resolve(model).path)
    set_chat_template(tokenizer, template)
    encoder = Encoder(tokenizer)

    def render(name: str, value: Any, row: Any) -> str:
        if not (isinstance(value, list) and value and hasattr(value[0], "role")):
            return _plain(name, value, row)
        tools = getattr(row, "tools", None)
        if name in ("messages", "prompt"):
            return encoder.render(value, generate=name == "prompt", tools=tools)
        head = encoder.render(row.prompt, generate=True, tools=tools)
        return encoder.render([*row.prompt, *value], tools=tools).removeprefix(head)

    return render


def _indented(text: str) -> str:
    """Each line set in."""
    return "\n".join(f"  {line}" for line in visible(text).split("\n"))
