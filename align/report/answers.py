"""Every model's answers to the same prompts, as the page's script reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.artifact import Artifact
from align.progress import OVERRIDES
from align.report.results import finite
from align.runner.files import json_lines

MODES, NO_ANSWER = ("sampled", "greedy"), {"text": None, "reward": None}


def samples(artifact: Artifact, models: Iterable[str]) -> list[dict[str, Any]]:
    """The prompts of an evaluation, each as (role, text) turns, with the answers of `models` in order."""
    rows = []
    for line in json_lines(Path(artifact.path) / "samples.jsonl"):
        prompt = line["prompt"]
        turns = [("", prompt)] if isinstance(prompt, str) else [(turn.get("role", ""), _said(turn)) for turn in prompt]
        columns = json.dumps(line["columns"], ensure_ascii=False) if line.get("columns") else ""
        given = {model: line["answers"][model] for model in models if model in line["answers"]}
        answers = {model: {mode: {**NO_ANSWER, **modes.get(mode, {})} for mode in MODES} for model, modes in given.items()}
        rows.append({"turns": turns, "columns": columns, "answers": answers})
    return rows


def _said(turn: Mapping[str, Any]) -> str:
    """The text of a message; one without text, or with parts, as JSON."""
    content = turn.get("content")
    return content if isinstance(content, str) and content else json.dumps(content or {**turn}, ensure_ascii=False)


def payload(answered: Iterable[tuple[Artifact, list[dict[str, Any]]]]) -> str:
    """All answers as JSON that can stand inside a ``<script>`` element whatever it holds: no ``<``, ``>`` or ``&``. What would turn
    round the order of letters is shown as its escape.
    """
    content = [{"name": artifact.name, "rows": rows} for artifact, rows in answered]
    text = json.dumps(finite(content), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    for character in OVERRIDES:
        text = text.replace(character, f"\\\\u{ord(character):04x}")
    return text
