"""The road: every stage as a box, an arrow from what it was made from, finished or not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.diagnostics.doctor import Patient
from align.recipe import reference_kinds
from align.runner.locks import is_locked
from align.runner.notes import left_over, status_of
from align.stages import stages as catalog
from align.stages.config import MADE

BOX, GAP = (148, 62), (52, 18)
"""Width and height of a box, and the space between boxes, in pixels."""


@dataclass(frozen=True)
class Stop:
    """One stage of the road."""

    name: str
    kind: str
    state: str
    """``finished``, ``interrupted``, or what its process last said, or ``not finished``."""
    seconds: float | None
    memory_gb: float | None
    needs: tuple[str, ...]


def stops(out: Path, stages: Mapping[str, Artifact]) -> list[Stop]:
    """The finished `stages`, and those in `out` that are not finished."""
    found = [
        Stop(name, a.stage, "finished", a.seconds, memory(Path(a.path)), needs(a.stage, a.config, stages))
        for name, a in stages.items()
    ]
    known = {Path(artifact.path).resolve() for artifact in stages.values()}
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        patient = Patient.read(folder) if folder.is_dir() and folder.resolve() not in known and not left_over(folder) else None
        if patient is not None and patient.artifact is None and patient.name not in stages:
            state = status_of(folder).get("state", "not finished")
            if state == "running" and not is_locked(folder):  # who was killed cannot say so
                state = "interrupted"
            needed = needs(patient.kind, patient.config, stages)
            found.append(Stop(patient.name, patient.kind, state, None, memory(folder), needed))
    return found


def memory(folder: Path) -> float | None:
    """The most memory (GB) that the stage's process used, where it was measured."""
    value = status_of(folder).get("memory_gb")
    return float(value) if isinstance(value, int | float) else None


def needs(kind: str, config: Mapping[str, Any], stages: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that the fields of `config` name: a model, or data by what stands before the first slash. Of a stage that only its
    own recipe's file knows, whose fields are not known, any text may.
    """
    kinds = reference_kinds(catalog[kind]) if kind in catalog else dict.fromkeys(config, "data")
    texts = ((text, of) for field, of in kinds.items() if of in MADE for text in _texts(config.get(field)))
    named = (text.split("/", 1)[0] if of == "data" else text for text, of in texts)
    return tuple(dict.fromkeys(name for name in named if name in stages))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


Columns = defaultdict[int, dict[str, list[str]]]
"""Who is in a column, boxes and lanes, and what each comes from."""
Places = dict[tuple[str, int], tuple[int, int]]
"""Name and column to x and y, in pixels, of the upper left corner."""


@dataclass(frozen=True)
class Diagram:
    """Boxes with their places, and arrows as paths of an SVG of `width` x `height`."""

    width: int
    height: int
    boxes: list[tuple[Stop, int, int]]
    arrows: list[str]


def diagram(road: list[Stop]) -> Diagram:
    """A column for each number of steps from the beginning; arrows run from left to right, and pass the columns between on lanes of
    their own, as if they were boxes.
    """
    depth: dict[str, int] = {}
    for stop in _ordered(road):
        depth[stop.name] = 1 + max((depth[name] for name in stop.needs if name in depth), default=-1)
    direct = {stop.name: [name for name in _direct(stop, road) if name in depth and name != stop.name] for stop in road}
    columns: Columns = defaultdict(dict)
    for name, sources in direct.items():
        columns[depth[name]][name] = sources
        for source in sources:
            for column in range(depth[source] + 1, depth[name]):
                columns[column][source] = [source]
    (width, height), (right, below) = BOX, GAP
    rows = max(map(len, columns.values()), default=0)
    places = _places(columns, rows)
    arrows = [
        _arrow([(source, column) for column in range(depth[source], depth[name])] + [(name, depth[name])], places)
        for name, sources in direct.items()
        for source in sources
    ]
    boxes = [(stop, *places[stop.name, depth[stop.name]]) for stop in road]
    return Diagram(len(columns) * (width + right) - right, max(rows * (height + below) - below, 0), boxes, arrows)


def _places(columns: Columns, rows: int) -> Places:
    """Who stands where: within a column in the order of what they come from, in the middle of the `rows` that the longest has."""
    (width, height), (right, below) = BOX, GAP
    places: Places = {}
    for column in sorted(columns):
        levels = {
            name: [places[source, column - 1][1] for source in sources if (source, column - 1) in places]
            for name, sources in columns[column].items()
        }
        top = (rows - len(levels)) * (height + below) // 2
        for row, name in enumerate(sorted(levels, key=lambda name: sum(levels[name]) / max(len(levels[name]), 1))):
            places[name, column] = column * (width + right), top + row * (height + below)
    return places


def _arrow(way: list[tuple[str, int]], places: Places) -> str:
    """A path from the first of `way` to the last, straight through the lanes between."""
    (width, height), (right, _) = BOX, GAP
    x, y = places[way[0]]
    arrow = f"M{x + width} {y + height // 2}"
    for place in way[1:]:
        start, level = x + width, y + height // 2
        x, y = places[place]
        arrow += f"C{start + right // 2} {level} {x - right // 2} {y + height // 2} {x} {y + height // 2}"
        arrow += f"H{x + width}" if place != way[-1] else ""
    return arrow


def _direct(stop: Stop, road: list[Stop]) -> list[str]:
    """What `stop` needs and no other of its needs is made from: an arrow from there says it already."""
    needs = {other.name: set(other.needs) for other in road}

    def before(name: str) -> set[str]:
        found, waiting = set[str](), [name]
        while waiting:  # each stage once: of rounds that are made from each other there are very many paths
            new = needs.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found - {name}

    implied = set[str]().union(*(before(name) for name in stop.needs if name != stop.name))
    return [name for name in stop.needs if name not in implied]


def _ordered(road: list[Stop]) -> Iterator[Stop]:
    """Each stop after those that it needs."""
    waiting, done = {stop.name: stop for stop in road}, set[str]()
    while waiting:
        ready = next((s for s in waiting.values() if not (set(s.needs) & waiting.keys()) - {s.name}), next(iter(waiting.values())))
        done.add(ready.name)
        yield waiting.pop(ready.name)
