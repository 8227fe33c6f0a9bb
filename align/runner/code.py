"""The code version of a stage: a hash for every module of this package that its computation can reach.

Only what computes counts: comments, docstrings and layout are not part of it, nor are the modules that show, name or schedule.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path

from align.registry import home
from align.runner.files import write_atomically

PACKAGE = Path(__file__).resolve().parent.parent
NAME = PACKAGE.name

NOT_COMPUTATION = (
    "errors",
    "progress",
    "catalog",
    "registry",
    "artifact",
    "recipe",
    "pipeline",
    "report",
    "preflight",
    "runner",
    "commands",
    "cli",
)
"""Modules that decide how work is found, shown and kept, never what it gives."""

READS = {f"{NAME}.encode": "templates/chat/*.jinja"}
"""Files beside the code that a module computes with."""


def code_of(cls: type) -> dict[str, str]:
    """Module name to hash (12 hex digits) for everything that `cls` can reach by imports; for a class outside this package, itself
    and the names of its file that it uses come first, and the modules that its file imports from beside it.
    """
    file = _file_of(cls)
    found: dict[str, str] = {}
    if file is None:
        return found
    if file.is_relative_to(PACKAGE):
        waiting = [_module_name(file)]
    else:
        tree = _parsed(str(file), file.stat().st_mtime_ns)
        found[cls.__qualname__] = _hash(_definition(tree, cls.__name__))
        beside = modules_beside(file)
        waiting = [module for each in (tree, *beside.values()) for module in _modules(_imported(each))]
        found |= {name: _hash(other) for name, other in beside.items()}
    while waiting:
        module = waiting.pop()
        if module in found or module.split(".")[1] in NOT_COMPUTATION:
            continue
        path = _path(module)
        found[module], imported = _module(str(path), path.stat().st_mtime_ns)
        if module in READS:
            for read in sorted(PACKAGE.glob(READS[module])):
                found[f"{NAME}/{read.relative_to(PACKAGE).as_posix()}"] = hashlib.sha256(read.read_bytes()).hexdigest()[:12]
        waiting += imported
    return dict(sorted(found.items()))


def _file_of(cls: type) -> Path | None:
    module = sys.modules.get(cls.__module__)
    name = getattr(module, "__file__", None)
    if name is None:
        try:
            name = inspect.getsourcefile(cls)
        except TypeError:
            return None
    path = Path(name).resolve() if name else None
    return path if path is not None and path.is_file() else None


def modules_beside(file: Path) -> dict[str, ast.Module]:
    """Modules in the folder of `file` that it imports, and that those import."""
    found: dict[str, ast.Module] = {}
    waiting = [file]
    while waiting:
        current = waiting.pop()
        for node in ast.walk(_parsed(str(current), current.stat().st_mtime_ns)):
            imports = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imports += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for name in (name.partition(".")[0] for name in imports):
                other = file.with_name(f"{name}.py")
                if name not in found and other != file and other.is_file():
                    found[name] = _parsed(str(other), other.stat().st_mtime_ns)
                    waiting.append(other)
    return found


def _module_name(file: Path) -> str:
    return ".".join((NAME, *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


def _path(module: str) -> Path:
    """The file of a module of this package."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


@cache
def _parsed(path: str, changed: int) -> ast.Module:
    return ast.parse(Path(path).read_text(encoding="utf-8"), path)


@cache
def _module(path: str, changed: int) -> tuple[str, list[str]]:
    """Hash of a module, and the modules of this package that it imports anywhere. Parsing all of them takes most of a second, so
    what came out is kept in ``$ALIGN_HOME/cache/code``, by what is in the file.
    """
    content = Path(path).read_bytes()
    kept = home() / "cache" / "code" / hashlib.sha256(sys.version.encode() + content).hexdigest()
    words = kept.read_text(encoding="utf-8").split() if kept.is_file() else []
    if not words:
        tree = _parsed(path, changed)
        words = [_hash(tree), *_imported(tree)]
        with suppress(OSError):  # no room, or a home that is only read: it is parsed again
            write_atomically(kept, " ".join(words))
    return words[0], _modules(words[1:])


def _imported(tree: ast.AST) -> list[str]:
    """What is imported from this package: modules, and names in modules."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return list(dict.fromkeys(name for name in found if name.startswith(f"{NAME}.")))


def _modules(imported: Iterable[str]) -> list[str]:
    """The modules among `imported`, and those of its names; ``from align.stages import training`` means that one, not the package
    with all of its stages.
    """
    found = dict.fromkeys(name if _is_module(name) else name.rpartition(".")[0] for name in imported)
    return [name for name in found if name not in (NAME, f"{NAME}.stages")]


def _is_module(name: str) -> bool:
    return _path(name).is_file()


def _definition(tree: ast.Module, name: str) -> ast.Module:
    """The top-level definition of `name`, and of every top-level name that it uses."""
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name):
                    definitions[target.id] = node
    needed, waiting = {}, [name]
    while waiting:
        current = waiting.pop()
        if current in definitions and current not in needed:
            needed[current] = definitions[current]
            waiting += [node.id for node in ast.walk(definitions[current]) if isinstance(node, ast.Name)]
    return ast.Module([needed[key] for key in sorted(needed)], [])


def _hash(tree: ast.AST) -> str:
    return hashlib.sha256(ast.dump(_Bare().visit(tree)).encode()).hexdigest()[:12]


class _Bare(ast.NodeTransformer):
    """Leaves out docstrings, those of attributes included."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node
