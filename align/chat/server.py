"""What stands in front of transformers' server, which answers a wrong request with a traceback and takes one of any size."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from transformers import PreTrainedTokenizerBase
from transformers.cli.serving.utils import GenerateManager

from align.chat.speaker import COLDEST, context_of
from align.errors import first_line

MOST = 4 * 2**20
"""Bytes of a request."""
OURS = ("127.0.0.1", "localhost")
"""Names of this machine: at one of them nobody else asks, but a page in a browser may under the name that led it here."""
CLIENTS = (ValueError, TypeError, LookupError, AttributeError, TemplateError)
"""What their code raises of a request that it does not understand."""

TEXTS = ("text", "input_text", "output_text", "refusal")
"""Types of the parts of a message that are texts."""

IGNORED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "generation_config": (),  # a way past all that is checked; a stream with beams in it never begins
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "response_format": ({"type": "text"},),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields that the server behind passes over without a word to who asks, or takes for something else (`frequency_penalty` for
transformers' `repetition_penalty`), and their values that ask for nothing more.
"""

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
"""OpenAI's. A template would write any that it is given."""

LEFT: ContextVar[threading.Event] = ContextVar("LEFT")
"""Of a request, set when who asked is gone."""
WITH_USAGE: ContextVar[bool] = ContextVar("WITH_USAGE")
"""Whether who asked for a stream asked for the usage as well."""

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _no_hair_above_0(temperature: float) -> float:
    if 0 < temperature < COLDEST:
        raise ValueError(f"0 is greedy, and the least above it is {COLDEST}")
    return temperature


def _something(stop: str | list[str] | None) -> str | list[str] | None:
    if stop is not None and not (stop and all(stop)):
        raise ValueError("a text of at least one character, or a list of such; leave it out to stop nowhere")
    return stop


def _same(one: Any, other: Any) -> bool:
    """To Python 0 is False as well; of `/v1/completions` 0 asks for the log-probs of what is said."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class _StreamOptions(_Body):
    include_usage: bool = False


class _Request(_Body):
    """What the requests have in common. Of fields that are not here their server knows more."""

    needs_template: ClassVar[bool] = True
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0), AfterValidator(_no_hair_above_0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    n: Literal[1] | None = None
    stop: Annotated[str | list[str] | None, AfterValidator(_something)] = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def contents(self) -> list[Any]:
        """What the model is to read: texts, and lists of parts."""
        return []


class _Turn(_Body):
    role: Role
    content: str | list[dict[str, Any]] | None = None


class _Chat(_Request):
    messages: Annotated[list[_Turn], Field(min_length=1)]
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    def contents(self) -> list[Any]:
        return [turn.content for turn in self.messages]


class _Text(_Request):
    needs_template = False
    prompt: str

    def contents(self) -> list[Any]:
        return [self.prompt]


class _Response(_Request):
    input: str | list[dict[str, Any]]

    def contents(self) -> list[Any]:
        return [self.input] if isinstance(self.input, str) else [item.get("content") for item in self.input]


REQUESTS: dict[str, type[_Request]] = {
    "/v1/chat/completions": _Chat,
    "/v1/completions": _Text,
    "/v1/responses": _Response,
}


class Guard:
    """ASGI middleware that refuses what the server behind it would choke on: too much, or no request."""

    def __init__(self, app: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        self.app, self.tokenizer = app, tokenizer

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not (scope["path"] in (*REQUESTS, "/health") or scope["path"].startswith("/v1/models")):  # others load any model
            await refusal(404, f"there is no {scope['path']}")(scope, receive, send)
            return
        content, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            content, more = content + message.get("body", b""), message.get("more_body", False)
            if len(content) > MOST:
                await refusal(413, f"a request has at most {MOST} bytes")(scope, receive, send)
                return
        if scope["method"] == "POST" and scope["path"] in REQUESTS:
            kind = dict(scope["headers"]).get(b"content-type", b"").decode("latin-1")
            if kind.partition(";")[0].strip().lower() != "application/json":
                await refusal(415, f"the content type is {kind!r}: send it as application/json")(scope, receive, send)
                return
            if wrong := self.wrong(REQUESTS[scope["path"]], content):
                await refusal(400, wrong)(scope, receive, send)
                return
            asked = json.loads(content)
            WITH_USAGE.set((asked.get("stream_options") or {}).get("include_usage", False))
            content = json.dumps(_as_theirs(scope["path"], asked)).encode()
        unread = [{"type": "http.request", "body": content, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return unread.pop() if unread else await receive()

        left = threading.Event()
        LEFT.set(left)
        watching = asyncio.create_task(_watch(receive, left))
        try:
            await self.app(scope, again, send)
        except asyncio.CancelledError:
            pass  # uvicorn's, which ends and would show a traceback
        finally:
            watching.cancel()
            left.set()

    def wrong(self, kind: type[_Request], content: bytes) -> str | None:
        """What is wrong with a request, in one line."""
        try:
            asked = kind.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            place, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
            return f"{place}: {said}" if place else said
        for name, value in (asked.model_extra or {}).items():
            if value is not None and not any(_same(value, nothing) for nothing in IGNORED.get(name, (value,))):
                return f"{name}: nothing here does what it asks for; leave it out"
        for token in getattr(asked, "logit_bias", None) or {}:
            if not token.isdecimal() or int(token) >= len(self.tokenizer):
                return f"logit_bias: {token!r} is no token's number, which are 0 to {len(self.tokenizer) - 1}"
        if kind.needs_template and not self.tokenizer.chat_template:
            return "the model has no chat template, as base models have none: ask /v1/completions, or serve one that has"
        lists = [content for content in asked.contents() if isinstance(content, list)]
        parts = [part for content in lists for part in content if isinstance(part, dict)]
        if unread := [part["type"] for part in parts if part.get("type", "text") not in TEXTS]:
            return f"the model reads text alone, and here is a part of type {unread[0]!r}"
        return None


def _as_theirs(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What is asked, as their server takes it."""
    if path == "/v1/responses":  # theirs streams where nothing is said of it, OpenAI's does not
        asked = {"stream": False, **asked}
    if bias := asked.pop("logit_bias", None):
        asked["logit_bias"] = {token: float(value) for token, value in bias.items()}
    return asked


async def _watch(receive: Receive, left: threading.Event) -> None:
    """Set `left` when who asked is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    left.set()


class Generating(GenerateManager):
    """Theirs, which goes on beyond the end of the model's context, and with a whole answer when who asked is gone."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, settings: Any, *rest: Any, **more: Any) -> Any:
        _end_with_context(model, inputs, settings)
        return super().generate_streaming(model, processor, inputs, settings, *rest, **more)

    async def generate_non_streaming(self, model: Any, processor: Any, inputs: Any, settings: Any, *rest: Any, **more: Any) -> Any:
        _end_with_context(model, inputs, settings)
        left = LEFT.get()

        def gone(ids: torch.Tensor, _: Any) -> torch.Tensor:
            return torch.full((len(ids),), left.is_set(), device=ids.device)

        inputs = {**inputs, "stopping_criteria": [gone]}
        return await super().generate_non_streaming(model, processor, inputs, settings, *rest, **more)


def _end_with_context(model: Any, inputs: Any, settings: Any) -> None:
    """Bound the answer of `settings` by what the model reads, as `align chat` does.

    Raises:
        HTTPException: there is nothing to read, or no room for an answer.
    """
    tokens, context = inputs["input_ids"].shape[-1], context_of(model)
    if not tokens:
        raise HTTPException(400, "the request has no token that the model could go on from")
    if context is not None:
        if tokens >= context:
            raise HTTPException(400, f"the model reads {context} tokens, and the request has {tokens}")
        settings.max_new_tokens = min(settings.max_new_tokens, context - tokens)


def ended(build: Callable[..., str]) -> Callable[..., str]:
    """Their `build` of a stream's chunk. Their last one holds the usage, and nothing follows it; OpenAI's clients hear `[DONE]`,
    and before that the usage, in a chunk of its own, where they asked for it.
    """

    def chunk(handler: Any, *parts: Any, usage: Any = None, **more: Any) -> str:
        told = build(handler, *parts, **more)
        if usage is None:
            return told
        counts = {**json.loads(told.removeprefix("data: ")), "choices": [], "usage": usage.model_dump(exclude_none=True)}
        return told + (handler.chunk_to_sse(json.dumps(counts)) if WITH_USAGE.get() else "") + handler.chunk_to_sse("[DONE]")

    return chunk


def refusal(status: int, message: str) -> JSONResponse:
    """An answer as OpenAI's clients read it."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status)


def guarded(app: FastAPI, tokenizer: PreTrainedTokenizerBase, host: str, served: dict[str, Any]) -> FastAPI:
    """`app` behind a `Guard`, with an address for the one model that is `served`; at one of this machine it answers to no other
    name.
    """

    def model(name: str) -> dict[str, Any]:
        if name != served["id"]:
            raise HTTPException(404, f"there is no model {name!r} here, only {served['id']!r}")
        return served

    async def misunderstood(_: Request, error: Exception) -> JSONResponse:
        return refusal(400, f"{type(error).__name__}: {first_line(error)}")

    async def refused(_: Request, error: Any) -> JSONResponse:
        return refusal(error.status_code, error.detail)

    app.add_api_route("/v1/models/{name:path}", model)
    app.add_exception_handler(HTTPException, refused)
    for raised in CLIENTS:
        app.add_exception_handler(raised, misunderstood)
    app.add_middleware(Guard, tokenizer=tokenizer)
    if host in OURS:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*OURS])
    return app
