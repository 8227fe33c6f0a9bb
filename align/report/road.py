"""The road: every stage as a box, an arrow from what it was made from, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.diagnostics.doctor import Patient

BOX, GAP = (148, 62), (52, 18)
"""Width and height of a box, and the space between boxes, in pixels."""


@dataclass(frozen=True)
class Stop:
    """One stage of the road."""

    name: str
    kind: str
    state: str
    """``finished``, or what its process last said, or ``not finished``."""
    seconds: float | None
    memory_gb: float | None
    needs: tuple[str, ...]


def stops(out: Path, stages: Mapping[str, Artifact]) -> list[Stop]:
    """The finished `stages`, and those in `out` that are not finished."""
    found = [Stop(n, a.stage, "finished", a.seconds, memory(Path(a.path)), needs(a.config, stages)) for n, a in stages.items()]
    known = {Path(artifact.path).resolve() for artifact in stages.values()}
    for folder in sorted(out.iterdir()) if out.is_dir() else ():
        patient = Patient.read(folder) if folder.is_dir() and folder.resolve() not in known else None
        if patient is not None and patient.artifact is None and patient.name not in stages:
            state = status(folder).get("state", "not finished")
            found.append(Stop(patient.name, patient.kind, state, None, memory(folder), needs(patient.config, stages)))
    return found


def status(folder: Path) -> dict[str, Any]:
    """What the process of the stage in `folder` last said of itself, where it did."""
    path = folder.parent / "logs" / f"{folder.name}.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def memory(folder: Path) -> float | None:
    """The most memory (GB) that the stage's process used, where it was measured."""
    value = status(folder).get("memory_gb")
    return float(value) if isinstance(value, int | float) else None


def needs(config: Mapping[str, Any], stages: Mapping[str, Any]) -> tuple[str, ...]:
    """The stages that the fields of `config` name: all of a value, or its part before the first slash."""
    named = (text.split("/", 1)[0] for value in config.values() for text in _texts(value))
    return tuple(dict.fromkeys(name for name in named if name in stages))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


@dataclass(frozen=True)
class Diagram:
    """Boxes with their places, and arrows as paths of an SVG of `width` x `height`."""

    width: int
    height: int
    boxes: list[tuple[Stop, int, int]]
    arrows: list[str]


def diagram(road: list[Stop]) -> Diagram:
    """A column for each number of steps from the beginning; arrows run from left to right."""
    depth: dict[str, int] = {}
    for stop in _ordered(road):
        depth[stop.name] = 1 + max((depth[name] for name in stop.needs if name in depth), default=-1)
    columns: dict[int, list[Stop]] = {}
    for stop in road:
        columns.setdefault(depth[stop.name], []).append(stop)
    (width, height), (right, below) = BOX, GAP
    rows = max(map(len, columns.values()), default=0)
    places: dict[str, tuple[int, int]] = {}
    for column, held in columns.items():
        top = (rows - len(held)) * (height + below) // 2
        places |= {stop.name: (column * (width + right), top + row * (height + below)) for row, stop in enumerate(held)}
    arrows = []
    for stop in road:
        x, y = places[stop.name]
        for name in _direct(stop, road):
            if name in places and name != stop.name:
                start, level = places[name][0] + width, places[name][1] + height // 2
                end, bend = y + height // 2, right // 2
                arrows.append(f"M{start} {level}C{start + bend} {level} {x - bend} {end} {x} {end}")
    boxes = [(stop, *places[stop.name]) for stop in road]
    return Diagram(len(columns) * (width + right) - right, max(rows * (height + below) - below, 0), boxes, arrows)


def _direct(stop: Stop, road: list[Stop]) -> list[str]:
    """What `stop` needs and no other of its needs is made from: an arrow from there says it already."""
    needs = {other.name: set(other.needs) for other in road}

    def before(name: str, seen: frozenset[str] = frozenset()) -> set[str]:
        direct = needs.get(name, set()) - seen - {name}
        return direct.union(*(before(other, seen | {name}) for other in direct))

    implied = set[str]().union(*(before(name) for name in stop.needs if name != stop.name))
    return [name for name in stop.needs if name not in implied]


def _ordered(road: list[Stop]) -> Iterator[Stop]:
    """Each stop after those that it needs."""
    waiting, done = {stop.name: stop for stop in road}, set[str]()
    while waiting:
        ready = next((s for s in waiting.values() if not (set(s.needs) & waiting.keys()) - {s.name}), next(iter(waiting.values())))
        done.add(ready.name)
        yield waiting.pop(ready.name)
