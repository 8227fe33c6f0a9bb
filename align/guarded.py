"""What transformers' Trainer does not guard against by itself: an update with a loss or a gradient that is not finite, a
warm-up that is the whole run, and rows that count twice on several processes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from align.errors import NonFiniteLoss


class WarmTrainer(Trainer):
    """A Trainer whose warm-up leaves something to train."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if num_training_steps == 1:  # any share of one step is the whole of it, at a learning rate of 0
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)


class FiniteTrainer(WarmTrainer):
    """A Trainer for padded rows. By itself it would go on with weights that are NaN."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._stop(f"the loss is {loss.item()}")
        return loss

    def own_rows(self, rows: int, remainder: int) -> int:
        """How many of the `rows` of this process' batch are its own: accelerate fills the last batches of several processes up with
        rows from the start, behind the others.

        Args:
            remainder: the rows that all processes' last batches have together, 0 where those are whole.
        """
        if not remainder or not self.accelerator.gradient_state.end_of_dataloader:
            return rows
        return max(0, min(rows, remainder - rows * self.accelerator.process_index))

    @property
    def train_remainder(self) -> int:
        """The `remainder` of the training rows; accelerate's own is not set in an epoch that is resumed."""
        return len(self.train_dataset) % (self._train_batch_size * self.accelerator.num_processes)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):  # a scaler leaves such steps out
            self._stop(f"the gradient's norm is {float(norm)}")
        return norm

    def _stop(self, what: str) -> None:
        raise NonFiniteLoss(
            f"{what} at step {self.state.global_step + 1}; no update was made. Lower learning_rate or look at the rows"
        )
