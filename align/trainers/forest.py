"""`transformers.Trainer` on forests. The loop, checkpoints, mixed precision and distribution are the Trainer's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import repeat
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
        self._tokens_seen = 0.0
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
        passes = self._passes(inputs, spare=inputs[0])
        for number, (forest, counts) in enumerate(passes, start=1):
            # Gradients are exchanged once, in the last pass.
            with self.accelerator.no_sync(model) if number < len(passes) else nullcontext():
                with self.compute_loss_context_manager():
                    if counts:
                        loss = self.compute_loss(model, forest, num_items_in_batch=num_items_in_batch)
                    else:
                        loss = 0.0 * self.objective(model, forest.to(self.args.device)).loss.sum()
                self._refuse_non_finite(loss)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _passes(self, forests: list[Forest], spare: Forest) -> list[tuple[Forest, bool]]:
        """`forests`, each to be counted, and behind them `spare`, not to be counted, until every process has as many.

        Processes cut their trees into different numbers of forests, and the replicas or shards of a model wait for each other.
        """
        most = self.accelerator.gather(torch.tensor([len(forests)], device=self.args.device)).max().item()
        return [*((forest, True) for forest in forests), *repeat((spare, False), int(most) - len(forests))]

    def _refuse_non_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise AlignError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; no update was made. "
                "Lower learning_rate, set max_grad_norm, or look at the rows"
            )

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

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        if self.accelerator.num_processes == 1:
            return dict(sums)
        names = sorted(sums)
        mine = torch.tensor([sums[name] for name in names], device=self.args.device)
        return dict(zip(names, self.accelerator.reduce(mine, "sum").tolist(), strict=True))

    @staticmethod
    def _means(sums: dict[str, float]) -> dict[str, float]:
        return {name: total / sums[f"{name}/units"] for name, total in sums.items() if f"{name}/units" in sums}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the objective's metrics since the last log."""
        if "loss" in logs:
            sums = self._over_processes(self._sums)
            logs.update(self._means(sums))
            if tokens := sums.get("num_tokens"):
                self._tokens_seen += tokens
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
        trees = self.eval_dataset if eval_dataset is None else eval_dataset
        forests = self._forests(trees[self.args.process_index :: self.args.world_size])  # every tree once, whatever their number
        for forest, counts in self._passes(forests, spare=plant(trees[:1])):
            with self.compute_loss_context_manager():
                output = self.objective(model, forest.to(self.args.device))
            if counts:
                self._add_metrics(sums, {"loss": output.loss, **output.metrics}, forest)
        model.train(was_training)
        means = self._means(self._over_processes(sums))
        if "mean_token_accuracy" in means:
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: list[Forest]) -> int:
        """6 x parameters x tokens, the usual estimate for forward and backward."""
        return 6 * sum(p.numel() for p in self.model.parameters()) * sum(forest.tokens for forest in inputs)
