"""``align ui``: a page to talk to models, compare them blind, and read reports."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from align.commands.address import refuse_taken
from align.errors import AlignError, first_line


def add(verbs: Any) -> None:
    parser = verbs.add_parser("ui", help="a page to talk to models, compare two blind and vote, and read reports")
    parser.add_argument("models", nargs="*", metavar="NAME", help="models to choose from (default: all registered policies)")
    parser.add_argument("--votes", type=Path, metavar="FILE", help="where votes go as preference rows (default: runs/votes.jsonl)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is reached from this machine only")
    parser.add_argument("--port", type=int, default=7860, help="port to listen at")
    parser.add_argument("--max_completion_length", type=int, default=256, help="most tokens in an answer")
    parser.add_argument("--chat_template", default="auto", help="`auto`, a shipped template's name or a .jinja file")
    parser.set_defaults(handler=ui)


def ui(options: argparse.Namespace) -> int:
    if importlib.util.find_spec("gradio") is None:
        raise AlignError("align ui needs gradio: pip install 'align[ui]'")
    if options.max_completion_length < 1:
        raise AlignError(f"--max_completion_length {options.max_completion_length}: an answer has at least 1 token")
    refuse_taken(options.host, options.port)
    _refuse_proxy()
    from align.progress import say
    from align.registry import Registry, home

    registry = Registry()
    for name in options.models:
        registry.resolve(name)
    names = options.models or policies(registry)
    if not names:
        raise AlignError(f"the registry {registry.root} holds no language model: name one, or train one (`make demo`)")
    from align.chat.speaker import Decoding
    from align.chat.ui import build, launch
    from align.chat.votes import default_votes
    from align.runner.files import refuse_unwritable_file
    from align.runner.worker import quiet

    votes = options.votes or default_votes()
    refuse_unwritable_file(votes)
    quiet()
    page = build(
        names,
        votes=votes,
        runs=home(),
        decoding=Decoding(options.max_completion_length),
        chat_template=options.chat_template,
    )
    say(f"http://{options.host}:{options.port} (Ctrl-C ends it)")
    launch(page, options.host, options.port)
    page.block_thread()
    return 0


def _refuse_proxy() -> None:
    """Raise `AlignError` where the environment names a proxy that gradio could not be imported beside: it makes a client then,
    which is set up for every proxy that is named, whether it is ever used or not.
    """
    import httpx

    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:  # no package for its protocol, a protocol unknown, no address
        raise AlignError(
            f"a proxy of the environment (ALL_PROXY, HTTP_PROXY, HTTPS_PROXY) cannot be used: {first_line(error).rstrip('.')}; "
            f"unset it for this command: the page is on this machine"
        ) from error


def policies(registry: Any) -> list[str]:
    """Registered names whose latest version is a folder with a language model, not a reward model."""
    from align.artifact import Artifact

    def speaks(artifact: Artifact) -> bool:
        folder = Path(artifact.path)
        return artifact.stage != "reward" and any((folder / f).is_file() for f in ("config.json", "adapter_config.json"))

    return [name for name in registry.names() if speaks(registry.get(name))]
