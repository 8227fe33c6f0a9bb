"""The parts of the demo's gold reward, each as a reward function of its own, so that a report shows them side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from world_gold import gold_parts


def content(completions: list, **columns: Any) -> list[float]:
    """How much of what was asked for is there and right."""
    return _part("content", completions, columns)


def instruction(completions: list, **columns: Any) -> list[float]:
    """Whether the form asked for was kept."""
    return _part("instruction", completions, columns)


def tone(completions: list, **columns: Any) -> list[float]:
    """Courtesy: one is enough."""
    return _part("tone", completions, columns)


def brevity(completions: list, **columns: Any) -> list[float]:
    """No longer than the answer needs."""
    return _part("brevity", completions, columns)


def ending(completions: list, **columns: Any) -> list[float]:
    """Whether it ends as a sentence ends."""
    return _part("ending", completions, columns)


def fluency(completions: list, **columns: Any) -> list[float]:
    """Whether its words follow each other as they do in the world's texts."""
    return _part("fluency", completions, columns)


def _part(name: str, completions: list, columns: dict[str, Any]) -> list[float]:
    prompts = columns.pop("prompts")
    return [parts[name] for parts in gold_parts(prompts, completions, **columns)]
