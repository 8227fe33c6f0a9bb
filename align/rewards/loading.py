"""Reward functions by name: built-in, in a module, in a file."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from align.catalog import parse_call
from align.errors import AlignError, near_miss
from align.rewards.adapters import adapted, recognized
from align.rewards.protocol import RewardFunction, parameters_of, rewards, takes_any, unbound
from align.rewards.spec import REWARD_MODEL
from align.runner.code import modules_beside

FORMS = "a built-in, package.module:function or file.py:function"


def load_reward(spec: str, protocol: str | None = None) -> RewardFunction:
    """The reward function that `spec` names: a built-in, ``package.module:function``, ``package.module.function`` or
    ``file.py:function`` (relative to the working directory), each optionally with arguments: ``length_band(low=20, high=80)``.
    One that was written for verl or OpenRLHF is adapted; `protocol` says so where its parameters do not.

    Raises:
        AlignError: no such file, module, function or argument.
    """
    target, arguments = parse_call(spec, "reward")
    if target in rewards:
        rewards.check_arguments(target, arguments)
        settings = {p.name: p.default for p in parameters_of(rewards[target]).values() if p.kind is p.KEYWORD_ONLY}
        made = functools.partial(rewards[target], **(settings | arguments))
        if target != REWARD_MODEL and rewards[target].__module__.startswith(f"{__package__}."):
            _try_values(spec, made)
        return made
    function = _function(target)
    protocol = protocol or recognized(function)
    label_column = arguments.pop("label_column", None) if protocol == "openrlhf" else None
    parameters = parameters_of(function)
    named = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in arguments:
        # A function that names nothing (a decorator's) may hand all on; any other one has its ** for the columns of the rows.
        if key not in named and (named or not takes_any(parameters)):
            columns = "; ** holds columns of the rows: name an argument beside it" if takes_any(parameters) else ""
            raise AlignError(f"reward {target!r} takes no {key!r}{near_miss(key, named)}; it takes: {', '.join(named)}{columns}")
    return adapted(functools.partial(function, **arguments) if arguments else function, protocol, label_column)


def _try_values(spec: str, function: RewardFunction) -> None:
    """Raise `AlignError` for values that a shipped reward does not take: it looks at them first, also with nothing to score."""
    columns = [p.name for p in parameters_of(function).values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    try:
        function(**{name: [] for name in columns})
    except AlignError:
        raise
    except Exception as error:
        raise AlignError(f"reward {spec!r}: its values do not fit: {type(error).__name__}: {error}") from error


def _function(target: str) -> RewardFunction:
    """What the module holds under the name, as it is."""
    module, name = _locate(target)
    function = getattr(module, name, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise AlignError(
            f"reward {target!r}: {getattr(module, '__file__', module.__name__)} has no {name!r}{near_miss(name, functions)}"
        )
    if not callable(function):
        raise AlignError(f"reward {target!r} is no function but a {type(function).__name__}")
    if isinstance(function, type):  # called, it gives an object and no rewards: at the end of a round's sampling
        raise AlignError(f"reward {target!r} is a class: make an object of it there (judge = {name}()), and name that")
    return function


def reward_fingerprint(spec: str) -> str:
    """SHA-256, in hex, of the source file of the function that `spec` names; of both files if its module only imports it. Modules
    that lie beside such a file and are imported there by name, as a recipe may, are part of it.

    Arguments in the spec are no part of it: keep the spec beside it.

    Raises:
        AlignError: no such function, or one without Python source.
    """
    target, _ = parse_call(spec, "reward")
    function = inspect.unwrap(unbound(rewards[target] if target in rewards else _function(target)))
    owners: list[Any] = [function if inspect.isroutine(function) else type(function)]
    if target not in rewards:
        owners.append(_locate(target)[0])
    sources = {source for owner in owners if (source := _source_file(owner))}
    if not sources:
        raise AlignError(f"reward {target!r} has no Python source file to fingerprint")
    sources |= {str(Path(source).with_name(f"{name}.py")) for source in sources for name in modules_beside(Path(source))}
    return hashlib.sha256(b"".join(sorted(Path(source).read_bytes() for source in sources))).hexdigest()


def _source_file(thing: Any) -> str | None:
    try:
        return inspect.getsourcefile(thing)
    except TypeError:  # written in C
        return None


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
    return (_load_file(Path(os.path.expanduser(path))) if path.endswith(".py") else _import(path)), name


def _import(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except (Exception, SystemExit) as error:  # a script that was not written to be imported may leave
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
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise AlignError(f"running the reward file {path} failed: {type(error).__name__}: {error}{_beside(error, path)}") from error
    return module


def _beside(error: BaseException, path: Path) -> str:
    """What to do where `path` imports by name what lies beside it."""
    name = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
    if not name or not ((path.parent / name).is_dir() or (path.parent / f"{name}.py").is_file()):
        return ""
    advice = "make them a package that PYTHONPATH leads to, and name package.module:function"
    return f"; a reward file cannot import its neighbours: {advice}"
