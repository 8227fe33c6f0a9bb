"""Connects transformers' Trainer to our progress bar and history."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from align.progress import History, bar, shown


class Watch(TrainerCallback):
    """A bar with the time left, and every log appended to the history."""

    def __init__(self, label: str, history: History) -> None:
        self.label = label
        self.history = history
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = bar(self.label, state.max_steps)
            self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
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
