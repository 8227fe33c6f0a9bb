"""Models of one setting and several seeds: what was measured of them together."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from typing import Any

from align.diagnostics.series import usable
from align.report.tables import measured

SEED = re.compile(r"-seed-_?[0-9]+(?![A-Za-z0-9.])")
"""How `align.runner.sweep` writes a seed into the names of branches."""


def settings(models: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By what is left of their names without the seed: which ``models`` differ by the seed alone, two at least, and of each number
    that all of them have the ``mean`` over seeds with ``sd``, the standard deviation of a sample; of two seeds the ``range``.
    """
    alike: dict[str, list[str]] = {}
    for model in models:
        if SEED.search(model):
            alike.setdefault(SEED.sub("", model), []).append(model)
    return {
        setting: {"models": names, "metrics": _metrics([models[name] for name in names])}
        for setting, names in alike.items()
        if len(names) > 1
    }


def _metrics(seeds: list[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found = {}
    for key in seeds[0]:
        values = [measured(metrics, key)[0] for metrics in seeds]
        if key != "n" and all(map(usable, values)):
            spread = {"range": [min(values), max(values)]} if len(values) == 2 else {"sd": statistics.stdev(values)}
            found[key] = {"mean": statistics.fmean(values), **spread}
    return found
