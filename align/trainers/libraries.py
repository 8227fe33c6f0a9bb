"""What transformers and accelerate say to a stage's settings, asked before anything is loaded."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from transformers import get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from align.errors import AlignError, near_miss


def check_libraries(stage: Any) -> None:
    """Raise `AlignError` for a schedule with arguments that it does not take or lacks, and for a tracker that is unknown or not
    installed.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=stage.learning_rate)
    try:
        schedule = get_scheduler(
            stage.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=dict(stage.lr_scheduler_kwargs)
        )
        schedule.lr_lambdas[0](2)  # some arguments are read after the warm-up
    except (TypeError, ValueError) as error:
        raise AlignError(f"lr_scheduler_kwargs {stage.lr_scheduler_kwargs} of {stage.lr_scheduler_type!r}: {error}") from error
    known = {"none", "all", *INTEGRATION_TO_CALLBACK, *LOGGER_TYPE_TO_CLASS}
    installed = {"none", "all", *get_available_reporting_integrations(), *map(str, get_available_trackers())}
    for name in stage.report_to:
        if name not in known:
            raise AlignError(f"report_to: no tracker {name!r}{near_miss(name, known)}; known: {', '.join(sorted(known))}")
        if name not in installed:
            raise AlignError(f"report_to: the package of the tracker {name!r} is not installed")
