"""The best weights of a run that is not transformers' Trainer's: kept on disk, so that a run that goes on has them as well."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align import processes
from align.errors import AlignError
from align.progress import say
from align.runner.checkpoints import checkpoints, fault, seal, step_of
from align.runner.files import flush
from align.shards import dealt, kept
from align.stages.base import Context
from align.stages.fields import SelectionFields
from align.stages.training import check_metric

WEIGHTS = "weights.safetensors"


class Best:
    """Which evaluation was the best follows from the history; what is kept are the weights of `model` that train.

    Args:
        stage: says which metric, and when to stop.
    """

    def __init__(self, stage: SelectionFields, context: Context, model: nn.Module) -> None:
        self.stage, self.context, self.model = stage, context, model
        self.name = f"eval_{stage.metric_for_best_model.removeprefix('eval_')}"
        self.folder = context.folder / "checkpoints"

    def check(self) -> None:
        """Raise `AlignError` unless the evaluation before training measured the metric."""
        measured = [name for name in next(iter(self.context.history.records), {}) if name.startswith("eval_")]
        if not measured:
            raise AlignError("keeping the best weights needs held-out prompts: set eval_data or held_out, and eval_prompts")
        check_metric(self.stage, measured)

    def fault_until(self, checkpoint: Path) -> str | None:
        """What is wrong with the best weights until `checkpoint`; None where they are whole, or there are none yet."""
        values = {step: value for step, value in self._values().items() if step <= step_of(checkpoint)}
        if not values:
            return None
        place = self._place(self._best(values))
        reason = fault(place) if place.is_dir() else "it is gone"
        return reason and f"{place.name} has the best weights until then, and {reason}"

    def see(self, step: int) -> bool:
        """After the evaluation at `step`: keep its weights if none was better. Returns whether it is time to stop."""
        values = self._values()
        best = self._best(values)
        if best == step:
            weights = kept(self._trained())
            if processes.number() == 0:
                self._keep(step, weights)
                self._prune(values)
        processes.wait()
        return self.enough()

    def _keep(self, step: int, weights: dict[str, Tensor]) -> None:
        place = self._place(step)
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, place / WEIGHTS)
        seal(place)
        flush(self.folder)  # a checkpoint that is on the disk goes by them

    def enough(self) -> bool:
        """Whether it is time to stop, by what was evaluated."""
        patience, values = self.stage.early_stopping_patience, self._values()
        if patience is None or not values:
            return False
        best = self._best(values)
        return sum(later > best for later in values) >= patience

    def restore(self) -> int:
        """Give the model its best weights back; returns their step.

        Raises:
            AlignError: they are damaged.
        """
        values = self._values()
        best = self._best(values)
        place = self._place(best)
        if reason := fault(place):
            told = f"the best weights are those of {place}, and {reason}"
            raise AlignError(f"{told}; the same command goes on from a checkpoint before")
        weights = load_file(place / WEIGHTS)
        for name, parameter in self._trained().items():
            parameter.data.copy_(dealt(weights[name], parameter))
        say(f"{self.context.name}: kept the weights of step {best}, of {max(values)}")
        return best

    def _place(self, step: int) -> Path:
        return self.folder / f"best-{step}"

    def _prune(self, values: dict[int, float]) -> None:
        """Leave the best of all, and the best until each checkpoint, from which a run that was cut goes on."""
        ends = [max(values), *map(step_of, checkpoints(self.folder))]
        until = [{step: value for step, value in values.items() if step <= end} for end in ends]
        needed = {self._place(self._best(some)) for some in until if some}
        for place in self.folder.glob("best-*"):
            if place not in needed:
                shutil.rmtree(place)

    def _values(self) -> dict[int, float]:
        """The metric by step."""
        records = self.context.history.records
        return {record["step"]: record[self.name] for record in records if self.name in record and record["step"] > 0}

    def _best(self, values: dict[int, float]) -> int:
        sign = 1 if self.stage.best_is_greatest else -1
        return max(values, key=lambda step: (sign * values[step], -step))

    def _trained(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
