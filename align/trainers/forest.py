"""`transformers.Trainer` on forests. The loop, checkpoints, mixed precision and distribution are the Trainer's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import repeat
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from align import processes
from align.budget import Budget, MaxTokens, Packed, measuring
from align.checkpointing import SafeTrainer
from align.engine import base_model
from align.errors import NonFiniteLoss
from align.forest import Forest, Tree, deal, plant
from align.progress import say
from align.trainers.objectives import Objective

MOST_SKIPPED = 10
"""Steps in a row that may be left out because their loss is not finite."""


class PromptSampler(Sampler[int]):
    """Indices of `trees`, those of one prompt next to each other, the prompts in a new order each epoch.

    Comparisons of one prompt's answers then fall into one batch, where each answer is computed once however many comparisons it
    stands in (InstructGPT, arXiv:2203.02155, Sect. 3.5).
    """

    def __init__(self, trees: Sequence[Tree], seed: int) -> None:
        groups: dict[int, list[int]] = defaultdict(list)
        for index, tree in enumerate(trees):
            groups[hash(tuple(tree.prompt))].append(index)  # where two hashes are one, two prompts come together, no more
        self.groups = list(groups.values())
        self.rows, self.seed, self.epoch = len(trees), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch, of a resumed one too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for number in torch.randperm(len(self.groups), generator=generator).tolist():
            yield from self.groups[number]


class ForestTrainer(SafeTrainer):
    """Trains `model` (see `align.engine.enable_forest`) on token trees.

    The trees of an optimizer step are dealt to the processes and packed into forests of at most `max_tokens` tokens, each with its
    own forward and backward pass. The loss is the mean over the units (tokens or pairs) of the step's *whole* batch: the gradient
    is the same for any packing, any number of accumulation steps and any number of processes. So a step that runs out of memory is
    done again with smaller forests.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        args: TrainingArguments,
        trees: Sequence[Tree],
        eval_trees: Sequence[Tree] | None = None,
        *,
        max_tokens: MaxTokens,
        tokenizer: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        skip_non_finite: bool = False,
        group_by_prompt: bool = False,
    ) -> None:
        self.objective = objective
        self.group_by_prompt = group_by_prompt
        self.skip_non_finite = skip_non_finite
        self._skipped, self._last_skipped = 0, -1  # steps in a row, and the last of them
        # Evaluation needs less memory than training, so what it learns of memory must not be used for training.
        self.budget, self.eval_budget = Budget(max_tokens), measuring(max_tokens)
        self._sums: dict[str, float] = defaultdict(float)
        self._tokens_seen = 0.0
        super().__init__(
            model=model,
            args=args,
            data_collator=list,
            train_dataset=trees,
            eval_dataset=eval_trees,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        if self.is_fsdp_enabled:
            model.register_forward_pre_hook(_gather_head)

    def get_batch_samples(
        self, epoch_iterator: Iterator[list[Tree]], num_batches: int, device: torch.device
    ) -> tuple[list[list[Tree] | None], None]:
        """This process' trees of one optimizer step, all in the last of its micro-steps, the only one with something to do."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mine = self._ready(self._share(self._rows_of_the_step(gather_object([batches]))))
        return [*repeat(None, len(batches) - 1), mine][: len(batches)], None

    def _rows_of_the_step(self, batches: list[list[list[Tree]]]) -> list[Tree]:
        """The trees of all processes' batches, without those that the last ones of an epoch were filled up with from its start.

        Args:
            batches: (processes, micro-steps, rows).
        """
        together = [[tree for batch in step for tree in batch] for step in zip(*batches, strict=True)]
        # accelerate's own `remainder` is not set in an epoch that is resumed.
        remainder = len(self.train_dataset) % (self._train_batch_size * self.accelerator.num_processes)
        if together and remainder and self.accelerator.gradient_state.end_of_dataloader:
            together[-1] = together[-1][:remainder]
        return [tree for step in together for tree in step]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if self.group_by_prompt:
            return PromptSampler(self.train_dataset, self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _share(self, trees: list[Tree]) -> list[Tree]:
        return [trees[index] for index in deal(trees, self.accelerator.num_processes)[self.accelerator.process_index]]

    def _ready(self, trees: list[Tree]) -> list[Tree]:
        """This process' trees of a step or an evaluation, with what the loss needs to know of those of all processes."""
        return trees

    def training_step(self, model: nn.Module, inputs: list[Tree] | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of the step's forests; returns the sum of their losses over the step's units."""
        if inputs is None:
            return torch.zeros((), device=self.args.device)
        model.train()
        alone = self.accelerator.num_processes == 1
        try:
            total, sums = self.budget.fit(inputs, partial(self._accumulate, model), alone=alone)
        except NonFiniteLoss as error:
            self._skip(model, error)
            return torch.zeros((), device=self.args.device)
        for name, value in sums.items():
            self._sums[name] += value
        return total

    def _accumulate(self, model: nn.Module, packed: Packed) -> tuple[Tensor, dict[str, float]]:
        """The gradient of the step, from nothing; returns its loss and the sums of its metrics."""
        model.zero_grad()  # of an attempt that ran out of memory halfway
        forests = [forest for _, forest in packed]
        units = self._over_all(sum(self.objective.units(forest) for forest in forests))
        total = torch.zeros((), device=self.args.device)
        measured: list[tuple[str, Tensor]] = []
        passes = self._passes(forests)
        for number, (forest, counts) in enumerate(passes, start=1):
            # Gradients are exchanged once, in the last pass.
            with self.accelerator.no_sync(model) if number < len(passes) else nullcontext():
                with self.compute_loss_context_manager():
                    output = self.objective(model, forest.to(self.args.device))
                    # The Trainer averages over processes; that is undone, as the units are those of all.
                    loss = counts * output.loss.sum() / units * self.accelerator.num_processes
                if self.is_deepspeed_enabled:  # whose backward also makes the update
                    self._refuse_non_finite(loss)
                self.accelerator.backward(loss)
            if counts:
                measured += _sums_of(output.metrics, output.where)
            total += loss.detach()
        # From here on a GPU is waited for.
        self._refuse_non_finite(total)
        return total, {**_fetched(measured), "num_tokens": sum(forest.tokens for forest in forests)}

    def _over_all(self, count: int) -> int:
        """The sum of all processes' counts."""
        if self.accelerator.num_processes == 1:
            return count
        return int(self.accelerator.reduce(torch.tensor(count, device=self.args.device), "sum"))

    def _passes(self, forests: list[Forest]) -> list[tuple[Forest, bool]]:
        """`forests`, each to be counted, and behind them a spare one, not to be counted, until every process has as many.

        Processes pack their trees into different numbers of forests, and the replicas or shards of a model wait for each other.
        """
        return processes.evened(forests, self._spare, waiting=True)

    def _spare(self) -> Forest:
        return plant(self.train_dataset[:1])

    def _refuse_non_finite(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss.detach()).float()
        if self.accelerator.num_processes > 1:  # all of them go on, or none does
            finite = self.accelerator.gather(finite.reshape(1)).min()
        if not finite:
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; no update was made. "
                "Lower learning_rate, set max_grad_norm, or look at the rows"
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """A finite loss can have a gradient that is not, and clipping makes NaN of it."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and self.accelerator.scaler is None and not math.isfinite(norm):  # a scaler leaves such steps out
            error = NonFiniteLoss(
                f"the gradient's norm is {float(norm)} at step {self.state.global_step + 1}; no update was made. "
                "Lower learning_rate or look at the rows"
            )
            self._skip(model, error)
        return norm

    def _skip(self, model: nn.Module, error: NonFiniteLoss) -> None:
        """Leave the step out where that is asked for: without gradients the optimizer changes nothing."""
        step = self.state.global_step
        self._skipped = self._skipped + 1 if self._last_skipped == step - 1 else 1
        self._last_skipped = step
        if not self.skip_non_finite or self._skipped > MOST_SKIPPED:
            raise error
        model.zero_grad(set_to_none=True)
        say(f"step {step + 1} is skipped: its loss or gradient is not finite")

    def progress(self) -> dict[str, Any]:
        return {**super().progress(), "sums": self._over_processes(self._sums), "tokens_seen": self._tokens_seen}

    def restore_progress(self, progress: dict[str, Any]) -> None:
        super().restore_progress(progress)
        self._tokens_seen = progress["tokens_seen"]
        first = self.accelerator.process_index == 0
        self._sums = defaultdict(float, progress["sums"] if first else dict.fromkeys(progress["sums"], 0.0))

    def _over_processes(self, sums: dict[str, float]) -> dict[str, float]:
        """By name: a process that had no tree of a step or an evaluation has fewer sums than the others."""
        if self.accelerator.num_processes == 1:
            return dict(sums)
        together: dict[str, float] = defaultdict(float)
        for part in gather_object([dict(sums)]):
            for name, value in part.items():
                together[name] += value
        return dict(together)

    @staticmethod
    def _means(sums: dict[str, float]) -> dict[str, float]:
        return {name: total / sums[f"{name}/units"] for name, total in sums.items() if sums.get(f"{name}/units")}

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
        trees = self._ready(self._share(self.eval_dataset if eval_dataset is None else eval_dataset))
        sums = self.eval_budget.fit(trees, partial(self._measure, model), alone=self.accelerator.num_processes == 1)
        model.train(was_training)
        means = self._means(self._over_processes(sums))
        if "mean_token_accuracy" in means:
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self, model: nn.Module, packed: Packed) -> dict[str, float]:
        """Sums of loss and metrics."""
        measured: list[tuple[str, Tensor]] = []
        for forest, counts in self._passes([forest for _, forest in packed]):
            with self.compute_loss_context_manager():
                output = self.objective(model, forest.to(self.args.device))
            if counts:
                measured += _sums_of({"loss": output.loss, **output.metrics}, output.where)
        return _fetched(measured)

    def floating_point_ops(self, inputs: list[Tree] | None) -> int:
        """6 x parameters x tokens, the usual estimate for forward and backward."""
        return 6 * sum(p.numel() for p in self.model.parameters()) * sum(tree.tokens for tree in inputs or ())


def _sums_of(metrics: dict[str, Tensor], where: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The sum of each metric and, as ``NAME/units``, how many units it is over, where they are: a GPU is not waited for."""
    for name, values in metrics.items():
        mask = where.get(name)
        yield name, (values if mask is None else values.where(mask, 0)).sum()
        yield f"{name}/units", values.new_full((), values.numel()) if mask is None else mask.sum()


def _fetched(sums: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    """`sums` of the same name together, all fetched at once."""
    found: dict[str, float] = defaultdict(float)
    if sums:
        for (name, _), value in zip(sums, torch.stack([value.double() for _, value in sums]).tolist(), strict=True):
            found[name] += value
    return found


def _gather_head(model: nn.Module, _: Any) -> None:
    """The head's weight is read, but nobody calls the head. accelerate gathers it with the norm before it, which it does not find
    inside an adapter.
    """
    head = base_model(model).get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()
