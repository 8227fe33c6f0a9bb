"""`transformers.Trainer` on forests. The loop, checkpoints, mixed precision and distribution are the Trainer's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from align.errors import AlignError
from align.forest import Forest, Tree, cut, plant
from align.trainers.objectives import Objective


class ForestTrainer(Trainer):
    """Trains `model` (see `align.engine.enable_forest`) on token trees.

    A batch of trees is cut into forests of at most `max_tokens` tokens, each with its own forward and backward pass. The loss is
    the mean over the units (tokens or pairs) of the optimizer step's *whole* batch: the gradient is the same for any cut, any
    number of accumulation steps and any number of processes.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        args: TrainingArguments,
        trees: list[Tree],
        eval_trees: list[Tree] | None = None,
        *,
        max_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.objective = objective
        self.max_tokens = max_tokens
        self._sums: dict[str, float] = defaultdict(float)
        super().__init__(
            model=model,
            args=args,
            data_collator=self._forests,
            train_dataset=trees,
            eval_dataset=eval_trees,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def _forests(self, trees: list[Tree]) -> list[Forest]:
        return [plant(pack) for pack in cut(trees, self.max_tokens)]

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Forest]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Forest]], Tensor]:
        """The micro-batches of one optimizer step, and how many units they have over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        units = sum(self.objective.units(forest) for batch in batches for forest in batch)
        return batches, self.accelerator.reduce(torch.tensor(units, device=device), "sum")

    def training_step(self, model: nn.Module, inputs: list[Forest], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of each forest; returns the sum of their losses over the step's units."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for forest in inputs:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, forest, num_items_in_batch=num_items_in_batch)
            if not torch.isfinite(loss):
                raise AlignError(
                    f"the loss is {loss.item()} at step {self.state.global_step + 1}; no update was made. "
                    "Lower learning_rate, set max_grad_norm, or look at the data with `align data`"
                )
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def compute_loss(
        self, model: nn.Module, inputs: Forest, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Sum of the forest's losses over `num_items_in_batch`. Averaging over processes is undone, as the units are global."""
        output = self.objective(model, inputs.to(self.args.device))
        self._add_metrics(self._sums, output.metrics, inputs)
        assert num_items_in_batch is not None
        return output.loss.sum() / num_items_in_batch * self.accelerator.num_processes

    @staticmethod
    def _add_metrics(sums: dict[str, float], metrics: dict[str, Tensor], forest: Forest) -> None:
        for name, value in metrics.items():
            sums[name] += value.sum().item()
            sums[f"{name}/units"] += value.numel()
        sums["num_tokens"] += forest.tokens

    @staticmethod
    def _means(sums: dict[str, float]) -> dict[str, float]:
        return {name: total / sums[f"{name}/units"] for name, total in sums.items() if f"{name}/units" in sums}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the objective's metrics since the last log."""
        if "loss" in logs:
            logs.update(self._means(self._sums))
            tokens, self._tokens_seen = self._sums["num_tokens"], getattr(self, "_tokens_seen", 0.0) + self._sums["num_tokens"]
            if tokens:
                logs["num_tokens"] = self._tokens_seen
            self._sums.clear()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss and metrics over the held-out trees; perplexity where the unit is a token."""
        model = self._wrap_model(self.model, training=False)
        was_training = model.training
        model.eval()
        sums: dict[str, float] = defaultdict(float)
        batches: Iterable[list[Forest]] = self.get_eval_dataloader(eval_dataset)
        for forests in batches:
            for forest in forests:
                with self.compute_loss_context_manager():
                    output = self.objective(model, forest.to(self.args.device))
                self._add_metrics(sums, {"loss": output.loss, **output.metrics}, forest)
        model.train(was_training)
        names = sorted(sums)
        totals = self.accelerator.reduce(torch.tensor([sums[name] for name in names], device=self.args.device), "sum").tolist()
        means = self._means(dict(zip(names, totals, strict=True)))
        if "mean_token_accuracy" in means:
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: list[Forest]) -> int:
        """6 x parameters x tokens, the usual estimate for forward and backward."""
        return 6 * sum(p.numel() for p in self.model.parameters()) * sum(forest.tokens for forest in inputs)
