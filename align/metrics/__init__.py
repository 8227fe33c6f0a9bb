"""Metrics by name, offline: ``measure("rouge", predictions=…, references=…)``. One file a kind; importing this fills the catalog
and imports nothing heavy.
"""

from align.metrics import classes, generation, instructions, likelihood, preferences
from align.metrics.base import HUB, check, columns_of, measure, metrics

__all__ = ["HUB", "check", "classes", "columns_of", "generation", "instructions", "likelihood", "measure", "metrics", "preferences"]
