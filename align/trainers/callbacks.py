"""Connects transformers' Trainer to our progress bar and history, and to checkpoints that can be trusted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.progress import History, bar, shown
from align.runner.checkpoints import prune, seal
from align.runner.files import flush
from align.runner.stop import Stopped, stop_requested


class Watch(TrainerCallback):
    """A bar with the time left, and every log appended to the history.

    Whatever their numbers, the last step is logged, and where the best weights are kept, each evaluated one: it may be the last.
    """

    def __init__(self, label: str, history: History) -> None:
        self.label = label
        self.history = history
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = bar(self.label, state.max_steps)
            self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps or (args.load_best_model_at_end and control.should_evaluate)
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= args.load_best_model_at_end and control.should_evaluate

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "train_runtime" not in logs:
            self.history.add(state.global_step, {k: v for k, v in logs.items() if isinstance(v, int | float)})
            if self.bar is not None:
                self.bar.set_postfix_str(shown(logs), refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the bar as it is, so that what is said next stands below it."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Checkpoints(TrainerCallback):
    """Seals what the Trainer saves, keeps the newest few, saves every so many minutes, and at once when asked to stop.

    A save that falls on the end of an epoch waits for the evaluation there: a run that goes on from it must not miss that.
    """

    def __init__(self, history: History, keep: int, minutes: float | None) -> None:
        self.history = history
        self.keep = keep
        self.minutes = minutes
        self._saved = time.monotonic()
        self._stopping = self._postponed = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = self.minutes is not None and time.monotonic() - self._saved > 60 * self.minutes
        self._stopping, due = _any_process(args, stop_requested(), due)
        control.should_save |= self._stopping or due
        ends = state.epoch == int(state.epoch or 0) or state.global_step >= state.max_steps
        if control.should_save and args.eval_strategy == "epoch" and ends:
            control.should_save, self._postponed = False, True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= self._postponed
        self._postponed = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._saved = time.monotonic()
        if args.world_size > 1:
            torch.distributed.barrier()  # a checkpoint has a file of each process
        if state.is_world_process_zero:
            flush(self.history.path)
            folder = Path(str(args.output_dir))
            checkpoint = folder / f"checkpoint-{state.global_step}"
            (checkpoint / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody reads
            seal(checkpoint)
            prune(folder, self.keep, state.best_model_checkpoint)
        if args.world_size > 1:
            torch.distributed.barrier()  # who leaves before it is sealed may have the first ended over it
        if self._stopping:
            raise Stopped


def _any_process(args: TrainingArguments, *flags: bool) -> list[bool]:
    """Each flag, set where any process has set it: all save at the same step."""
    if args.world_size == 1:
        return list(flags)
    joined = torch.tensor([float(flag) for flag in flags], device=args.device)
    torch.distributed.all_reduce(joined, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in joined.tolist()]
