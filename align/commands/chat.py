"""``align chat NAME [OTHER]``: talk to a model, or to two side by side."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from align.errors import AlignError


def add(verbs: Any) -> None:
    parser = verbs.add_parser("chat", help="talk to a model, or to two side by side and vote")
    parser.add_argument("models", nargs="+", metavar="NAME", help="one model, or two to compare")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and stop")
    parser.add_argument(
        "--system", metavar="TEXT", help="a system prompt; for question answering, the text that questions are about"
    )
    parser.add_argument("--votes", type=Path, metavar="FILE", help="where votes go as preference rows (default: runs/votes.jsonl)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample from the likeliest tokens that hold this much probability")
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many likeliest tokens; 0 for all")
    parser.add_argument("--max_completion_length", type=int, default=256, help="most tokens in an answer")
    parser.add_argument("--seed", type=int, help="seed of sampling")
    parser.add_argument("--dtype", default="float32", help="precision of the weights")
    parser.add_argument("--chat_template", default="auto", help="`auto`, a shipped template's name or a .jinja file")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--json", action="store_true", help="with --prompt: print the answers as JSON")
    parser.set_defaults(handler=chat)


def chat(options: argparse.Namespace) -> int:
    _check(options)
    from transformers import set_seed

    from align.chat.speaker import Decoding, speaker
    from align.chat.terminal import Talk, talk_at_terminal
    from align.chat.votes import default_votes
    from align.runner.files import refuse_unwritable_file
    from align.runner.worker import quiet

    votes = options.votes or default_votes()
    if len(options.models) > 1 and options.prompt is None:
        refuse_unwritable_file(votes)
    quiet()
    how = {"dtype": options.dtype, "chat_template": options.chat_template, "trust_remote_code": options.trust_remote_code}
    speakers = [speaker(name, **how) for name in options.models]
    if options.seed is not None:
        set_seed(options.seed)
    decoding = Decoding(options.max_completion_length, options.temperature, options.top_p, options.top_k)
    talk = Talk(speakers, decoding, system=options.system, votes=votes)
    if options.prompt is None:
        talk_at_terminal(talk)
    elif options.json:
        answers = talk.ask(options.prompt, lambda text: None)
        rows = [{"model": name, "answer": answer} for name, answer in zip(options.models, answers, strict=True)]
        print(json.dumps({"prompt": options.prompt, "answers": rows}, indent=1))
    else:
        talk.ask(options.prompt, lambda text: print(text, end="", flush=True))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what makes no sense before a model is loaded."""
    if len(options.models) > 2:
        raise AlignError(f"align chat compares two models, not {len(options.models)}")
    if options.json and options.prompt is None:
        raise AlignError("--json needs --prompt TEXT: a conversation is no JSON")
    if options.prompt is None and sys.stdin is None:
        raise AlignError("there is no stdin to read questions from: --prompt TEXT asks one")
    for flag in ("prompt", "system"):
        if any("\ud800" <= character <= "\udfff" for character in getattr(options, flag) or ""):
            raise AlignError(f"--{flag} holds bytes that are no UTF-8")
    if options.seed is not None and not 0 <= options.seed < 2**32:
        raise AlignError(f"--seed {options.seed}: from 0 to {2**32 - 1}")
    if not 0 <= options.temperature < math.inf:
        raise AlignError(f"--temperature {options.temperature}: 0 is greedy, and below it is nothing")
    if not 0 < options.top_p <= 1:
        raise AlignError(f"--top_p {options.top_p}: a probability above 0 and at most 1")
    if options.top_k < 0 or options.max_completion_length < 1:
        raise AlignError("--top_k is at least 0, --max_completion_length at least 1")
