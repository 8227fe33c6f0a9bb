"""The doctor: rules over a training history, each with its evidence, a cause in plain words and the knob to turn.

One file a subject; a rule is one decorated function from a `Case` to a `Diagnosis` or None. `align.diagnostics.doctor` asks them.
"""

from align.diagnostics import policy, supervised, road, pairs  # noqa: F401, I001  (the order in which they are asked)
from align.diagnostics.case import Case, Diagnosis, Finding, ask, rule, rules

__all__ = ["Case", "Diagnosis", "Finding", "ask", "rule", "rules"]
