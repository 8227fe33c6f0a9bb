"""Metrics from a model's log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

from align.errors import AlignError
from align.metrics.base import metrics


@metrics.add
def perplexity(nlls: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """The exponential of the token-weighted mean negative log-likelihood over the whole set.

    Args:
        nlls: of each row, the sum over its tokens, in nats.
        tokens: of each row, how many were predicted.
    """
    count = sum(tokens)
    if not count:
        raise AlignError("metric 'perplexity': no row has a token to predict")
    return {"perplexity": math.exp(min(math.fsum(nlls) / count, 700)), "predicted_tokens": count}
