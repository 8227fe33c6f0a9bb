"""Reward functions: the protocol (TRL's), a few built-ins, loading by name, and a weighted set with checked outputs.

A reward is one plain function, ``f(prompts, completions, completion_ids=None, **columns) -> list[float | None]``, sync or async:
one number per completion, or None to abstain. Plain completions are strings, conversational ones lists of messages; the dataset's
other columns arrive as keyword lists. docs/rewards.md shows how to write one. This module imports nothing heavy.
"""

from __future__ import annotations

import ast
import asyncio
import functools
import hashlib
import importlib
import inspect
import math
import re
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from align.catalog import Catalog
from align.errors import AlignError, near_miss

RewardFunction = Callable[..., Any]
rewards: Catalog[RewardFunction] = Catalog("reward")


def text_of(value: Any) -> str:
    """The text of a prompt or completion, whether it is a string or a list of messages (their contents, one a line)."""
    if isinstance(value, str):
        return value
    contents = [message.get("content") or "" for message in value]
    parts = [[content] if isinstance(content, str) else [part.get("text", "") for part in content] for content in contents]
    return "\n".join(text for part in parts for text in part)


# --- built-ins: keyword-only parameters are set by the spec, e.g. "length_band(low=20, high=80)"; other parameters are columns ---


@rewards.add
def exact_match(completions: list, answer: list, *, ignore_case: bool = False, **columns: Any) -> list[float | None]:
    """1 when the completion is the row's `answer`, white space apart, else 0. Abstains where `answer` is None."""

    def normalized(text: Any) -> str:
        text = " ".join(str(text).split())
        return text.casefold() if ignore_case else text

    return [
        None if wanted is None else float(normalized(text_of(completion)) == normalized(wanted))
        for completion, wanted in zip(completions, answer, strict=True)
    ]


@rewards.add
def length_band(completions: list, *, low: int, high: int, **columns: Any) -> list[float]:
    """1 for a completion of `low` to `high` words; falls linearly to 0 at no words, and at twice `high`."""
    if not 0 <= low <= high or high == 0:
        raise AlignError(f"length_band needs 0 <= low <= high and high > 0, not low={low}, high={high}")
    counts = [len(text_of(completion).split()) for completion in completions]
    return [count / low if count < low else max(0.0, min(1.0, 2 - count / high)) for count in counts]


@rewards.add
def keyword(completions: list, *, words: str | Sequence[str], ignore_case: bool = True, **columns: Any) -> list[float]:
    """The share of `words` that occur in the completion, as whole words."""
    wanted = [words] if isinstance(words, str) else list(words)
    if not wanted:
        raise AlignError("keyword needs at least one word in words")
    patterns = [re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE if ignore_case else 0) for word in wanted]
    return [sum(bool(p.search(text_of(completion))) for p in patterns) / len(patterns) for completion in completions]


@rewards.add
def regex_format(completions: list, *, pattern: str, **columns: Any) -> list[float]:
    """1 when the whole completion, stripped, matches the regular expression `pattern` ('.' matches newlines too), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise AlignError(f"regex_format: {pattern!r} is no regular expression: {error}") from error
    return [float(bool(compiled.fullmatch(text_of(completion).strip()))) for completion in completions]


@rewards.add
def repetition(completions: list, *, ngram: int = 3, penalty: float = 1.0, **columns: Any) -> list[float]:
    """``-penalty`` times the share of the completion's `ngram`-word sequences that occurred before in it."""
    if ngram < 1:
        raise AlignError(f"repetition needs ngram >= 1, not {ngram}")

    def repeated(words: list[str]) -> float:
        ngrams = [tuple(words[i : i + ngram]) for i in range(len(words) - ngram + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

    return [-penalty * repeated(text_of(completion).lower().split()) for completion in completions]


# --- loading by name ---

FORMS = "a built-in, package.module:function or file.py:function"


def load_reward(spec: str) -> RewardFunction:
    """The reward function that `spec` names: a built-in, ``package.module:function``, ``package.module.function`` or
    ``file.py:function`` (relative to the working directory), each optionally with arguments: ``length_band(low=20, high=80)``.

    Raises:
        AlignError: no such file, module, function or argument.
    """
    target, arguments = _parse(spec)
    if target in rewards:
        rewards.check_arguments(target, arguments)
        settings = {p.name: p.default for p in _parameters(rewards[target]).values() if p.kind is p.KEYWORD_ONLY}
        return functools.partial(rewards[target], **(settings | arguments))
    module, name = _locate(target)
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise AlignError(
            f"reward {target!r}: {getattr(module, '__file__', module.__name__)} has no {name!r}{near_miss(name, functions)}"
        )
    if not callable(function):
        raise AlignError(f"reward {target!r} is no function but a {type(function).__name__}")
    if not arguments:
        return function
    parameters = _parameters(function)
    for key in arguments:
        if key not in parameters and not _takes_any(parameters):
            raise AlignError(f"reward {target!r} takes no {key!r}{near_miss(key, parameters)}; it takes: {', '.join(parameters)}")
    return functools.partial(function, **arguments)


def reward_fingerprint(spec: str) -> str:
    """SHA-256, in hex, of the source file of the function that `spec` names; of both files if its module only imports it.

    Arguments in the spec are no part of it: keep the spec beside it.

    Raises:
        AlignError: no such function, or one without Python source.
    """
    target, _ = _parse(spec)
    function = inspect.unwrap(_unbound(load_reward(spec)))
    owners: list[Any] = [function if inspect.isroutine(function) else type(function)]
    if target not in rewards:
        owners.append(_locate(target)[0])
    sources = {source for owner in owners if (source := _source_file(owner))}
    if not sources:
        raise AlignError(f"reward {target!r} has no Python source file to fingerprint")
    return hashlib.sha256(b"".join(sorted(Path(source).read_bytes() for source in sources))).hexdigest()


def _source_file(thing: Any) -> str | None:
    try:
        return inspect.getsourcefile(thing)
    except TypeError:  # written in C
        return None


def _unbound(function: RewardFunction) -> RewardFunction:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """``"name(key=literal)"`` as its name and its arguments."""
    match = re.fullmatch(r"([^()]+)(\(.*\))", spec.strip(), re.DOTALL)
    if not match:
        return spec.strip(), {}
    try:
        call = ast.parse(f"f{match[2]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("only key=value arguments")
        return match[1].strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise AlignError(f"reward {spec!r}: its arguments must read (key=value, ...) with plain values: {error}") from error


def _locate(target: str) -> tuple[ModuleType, str]:
    """The module and the function's name in ``module:name``, ``module.name`` or ``file.py:name``."""
    path, colon, name = target.rpartition(":")
    if not colon:
        if target.endswith(".py"):
            raise AlignError(f"reward {target!r} names a file: add the function, {target}:function")
        path, dot, name = target.rpartition(".")
        if not dot:
            raise AlignError(f"unknown reward {target!r}{near_miss(target, rewards)}; known: {', '.join(rewards)}; or name {FORMS}")
    if not path or not name:
        raise AlignError(f"reward {target!r} is incomplete: name {FORMS}")
    return (_load_file(Path(path).expanduser()) if path.endswith(".py") else _import(path)), name


def _import(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise AlignError(
                f"reward module {path!r}: no module {error.name!r}; for a file, name path/to/file.py:function"
            ) from error
        raise AlignError(f"importing the reward module {path!r} failed: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """The module in the file `path`, run once per content, under a name in `sys.modules` that nothing else can have."""
    if not path.is_file():
        siblings = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise AlignError(f"reward file {path} does not exist (looked in {Path.cwd()}){near_miss(path.name, siblings)}")
    path, source = path.resolve(), path.read_bytes()
    name = f"_align_reward_{path.stem}_{hashlib.sha256(bytes(path) + source).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = ModuleType(name)  # registered before it runs: dataclasses look it up
    module.__file__ = str(path)
    try:
        # not through importlib: its bytecode cache can miss a quick edit
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except Exception as error:
        del sys.modules[name]
        raise AlignError(f"running the reward file {path} failed: {type(error).__name__}: {error}") from error
    return module


# --- scoring ---


@dataclass(frozen=True)
class RewardScores:
    """`total` has one number per completion; `components` has, per function, its unweighted values, None where it abstained."""

    total: list[float]
    components: dict[str, list[float | None]]


class RewardSet:
    """Reward functions with weights.

    Args:
        functions: specs (see `load_reward`) or functions.
        weights: one per function, 1 by default; a weight of 0 logs a function without training on it.

    A component is named after its function; a second one of that name gets ``_2``.
    """

    def __init__(self, functions: Sequence[str | RewardFunction], weights: Sequence[float] | None = None) -> None:
        functions = [functions] if isinstance(functions, str) else list(functions)
        if not functions:
            raise AlignError(f"no reward function is named: name {FORMS}")
        self.weights = [1.0] * len(functions) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(functions) or not all(map(math.isfinite, self.weights)):
            raise AlignError(f"reward_weights must be {len(functions)} finite numbers, one per function, not {weights}")
        self.functions: dict[str, RewardFunction] = {}
        for function in functions:
            function = load_reward(function) if isinstance(function, str) else function
            base = name = _name(function)
            count = 1
            while name in self.functions:
                name = f"{base}_{(count := count + 1)}"
            self.functions[name] = function

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> RewardScores:
        """Call every function, the async ones together, and add up what they return.

        The total is the weighted sum over the functions that did not abstain. Columns named like an argument of the protocol
        (`prompts`, `completion`, ...) are not passed on.

        Raises:
            AlignError: a function raised (the cause is kept), needs a column that is not there, or returned something other than
                one finite number or None per completion; or all functions abstained on a completion.
            ValueError: prompts, completions and columns differ in length.
        """
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        extra = {key: value for key, value in (columns or {}).items() if key not in {*own, "prompt", "completion"}}
        for key, value in {**own, **extra}.items():
            if value is not None and len(value) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts, but {len(value)} {key}")
        results: dict[str, Any] = {}
        try:
            for name, function in self.functions.items():
                results[name] = _call(name, function, own, extra)
        except AlignError:
            for result in filter(inspect.iscoroutine, results.values()):
                result.close()  # or Python warns that it was never awaited
            raise
        pending = {name: result for name, result in results.items() if inspect.isawaitable(result)}
        for name, result in zip(pending, _await_all(list(pending.values())), strict=True):
            if isinstance(result, BaseException):
                raise _raised(name, result) from result
            results[name] = result
        components = {name: _checked(name, result, prompts) for name, result in results.items()}
        total = []
        for row, prompt in enumerate(prompts):
            given = [w * v for w, v in zip(self.weights, (c[row] for c in components.values()), strict=True) if v is not None]
            if not given:
                raise AlignError(f"every reward function abstained on row {row} (prompt {_short(prompt)}): one must score it")
            total.append(sum(given))
        return RewardScores(total, components)


def _name(function: RewardFunction) -> str:
    function = _unbound(function)
    return getattr(function, "__name__", type(function).__name__)


def _parameters(function: RewardFunction) -> Mapping[str, inspect.Parameter]:
    """The function's parameters; ``**kwargs`` alone for one that cannot be inspected."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return inspect.signature(lambda **kwargs: None).parameters


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _call(name: str, function: RewardFunction, own: dict[str, Any], columns: dict[str, Any]) -> Any:
    """The function's result, or the awaitable it returned. It gets copies of the lists, and only what its signature takes."""
    parameters = _parameters(function)
    bound = function.keywords if isinstance(function, functools.partial) else {}
    passed = {**own, **{key: value for key, value in columns.items() if key not in bound}}
    for p in parameters.values():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in passed:
            known = ", ".join(columns) or "none"
            raise AlignError(f"reward {name!r} needs a column {p.name!r}{near_miss(p.name, columns)}; the rows have: {known}")
    if not _takes_any(parameters):
        passed = {key: value for key, value in passed.items() if key in parameters}
    try:
        return function(**{key: value if value is None else list(value) for key, value in passed.items()})
    except AlignError:
        raise
    except Exception as error:
        raise _raised(name, error) from error


def _raised(name: str, error: BaseException) -> AlignError:
    return error if isinstance(error, AlignError) else AlignError(f"reward {name!r} raised {type(error).__name__}: {error}")


@functools.cache
def _event_loop() -> tuple[ThreadPoolExecutor, asyncio.Runner]:
    """One loop on one thread for the whole process: works inside a notebook's running loop, and lets clients outlive a call."""
    return ThreadPoolExecutor(1, thread_name_prefix="align-rewards"), asyncio.Runner()


def _await_all(awaitables: list[Awaitable[Any]]) -> list[Any]:
    """Their results, or exceptions, awaited together."""
    if not awaitables:
        return []

    async def gather() -> list[Any]:
        return await asyncio.gather(*awaitables, return_exceptions=True)

    thread, runner = _event_loop()
    return thread.submit(lambda: runner.run(gather())).result()


def _checked(name: str, result: Any, prompts: Sequence[Any]) -> list[float | None]:
    """The result as plain numbers, after checking that there is one finite number or None per completion."""
    values = result.tolist() if hasattr(result, "tolist") else result
    if not isinstance(values, list | tuple):
        raise AlignError(
            f"reward {name!r} returned {_short(result)}; expected a list of {len(prompts)} numbers, one per completion"
        )
    if len(values) != len(prompts):
        first = f" (the first prompt is {_short(prompts[0])})" if prompts else ""
        raise AlignError(f"reward {name!r} returned {len(values)} values; expected {len(prompts)}, one per completion{first}")
    checked: list[float | None] = []
    for row, (value, prompt) in enumerate(zip(values, prompts, strict=True)):
        number = value.tolist() if hasattr(value, "tolist") else value  # numpy and torch scalars
        if number is not None and not (isinstance(number, Real) and math.isfinite(number)):
            where = f"reward {name!r}, row {row} (prompt {_short(prompt)})"
            raise AlignError(f"{where}: got {_short(value)}; expected a finite number, or None to abstain")
        checked.append(None if number is None else float(number))
    return checked


def _short(value: Any, width: int = 60) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict) and "content" in value[-1]:
        value = text_of(value[-1:])
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


# --- functions written for other tools ---


def from_verl(compute_score: Callable[..., Any]) -> RewardFunction:
    """A verl ``compute_score(data_source, solution_str, ground_truth, extra_info)``, sync or async, as a reward function.

    It is called once per completion. Columns: `ground_truth`, or verl's `reward_model` with that key; `data_source` and
    `extra_info` if there. Of a dict that it returns, "score" is the reward.
    """

    def reward(completions: list, prompts: Any = None, completion_ids: Any = None, **columns: Any) -> Any:
        if "ground_truth" not in columns and "reward_model" not in columns:
            known = ", ".join(columns) or "none"
            raise AlignError(f"a verl reward needs a column 'ground_truth' or 'reward_model'; the rows have: {known}")
        nothing = [None] * len(completions)
        truths = (
            columns["ground_truth"] if "ground_truth" in columns else [cell["ground_truth"] for cell in columns["reward_model"]]
        )
        rows = zip(columns.get("data_source", nothing), completions, truths, columns.get("extra_info", nothing), strict=True)
        scores = [
            compute_score(data_source=source, solution_str=text_of(completion), ground_truth=truth, extra_info=info)
            for source, completion, truth, info in rows
        ]

        async def gather() -> list[Any]:
            return numbers(await asyncio.gather(*scores))

        return gather() if scores and inspect.isawaitable(scores[0]) else numbers(scores)

    def numbers(scores: list[Any]) -> list[Any]:
        return [score["score"] if isinstance(score, dict) else score for score in scores]

    reward.__name__ = getattr(compute_score, "__name__", "compute_score")
    return reward


def from_openrlhf(reward_func: Callable[..., Any], label_column: str | None = None) -> RewardFunction:
    """An OpenRLHF ``reward_func(queries, prompts, labels)`` as a reward function.

    `label_column` is the column that OpenRLHF's ``--label_key`` would name; without one, labels are empty strings, as there. A
    query is prompt and completion as text, end to end, with no chat template around a conversation's messages. Of a dict that it
    returns, "rewards" counts.
    """

    def reward(prompts: list, completions: list, completion_ids: Any = None, **columns: Any) -> Any:
        if label_column is not None and label_column not in columns:
            known = ", ".join(columns) or "none"
            raise AlignError(f"labels come from the column {label_column!r}, which is not there; the rows have: {known}")
        labels = [""] * len(prompts) if label_column is None else columns[label_column]
        texts = [text_of(prompt) for prompt in prompts]
        queries = [text + text_of(completion) for text, completion in zip(texts, completions, strict=True)]
        result = reward_func(queries, texts, labels)
        return result["rewards"] if isinstance(result, dict) else result

    reward.__name__ = getattr(reward_func, "__name__", "reward_func")
    return reward
