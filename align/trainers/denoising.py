"""Pretraining of models that are no causal decoders: masked words for encoders, span corruption for encoder-decoders. transformers'
Trainer does the training, on padded rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from align.catalog import Catalog
from align.checkpointing import SafeTrainer
from align.errors import AlignError
from align.guarded import FiniteTrainer
from align.schema import TextRow

Item = dict[str, Any]
IGNORED = -100

denoisers: Catalog[Any] = Catalog("pretraining objective")
"""By the family of the model (`align.models.family_of`)."""


class Denoiser:
    """Makes blocks of text and corrupts them, drawing from torch's generator."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def blocks(self, rows: Iterable[TextRow]) -> list[Item]:
        """Documents in blocks of at most `max_length` tokens, special tokens included; a block without two words of its own is
        left out.
        """
        items, special = [], set(self.tokenizer.all_special_ids)  # asked once: the tokenizer looks each up anew
        for row in rows:
            encoding = self.tokenizer(row.text, truncation=True, max_length=self.max_length, return_overflowing_tokens=True)
            items += [{"input_ids": ids} for ids in encoding["input_ids"] if sum(i not in special for i in ids) >= 2]
        return items

    def corrupt(self, item: Item) -> Item:
        """``input_ids`` and ``labels`` of a block, drawn anew at each call."""
        raise NotImplementedError

    def fixed(self, items: Sequence[Item], seed: int) -> list[Item]:
        """`items` corrupted as `seed` has it, each alike whatever stands beside it; the generator is left alone."""
        corrupted = []
        with torch.random.fork_rng(devices=[]):
            for item in items:
                torch.default_generator.manual_seed(hash((seed, *item["input_ids"])))
                corrupted.append(self.corrupt(item))
        return corrupted

    def collate(self, batch: Sequence[Item]) -> dict[str, Tensor] | list[Item]:
        """A padded batch; of blocks that are not corrupted yet, themselves."""
        return dict(DataCollatorForSeq2Seq(self.tokenizer)(batch)) if "labels" in batch[0] else list(batch)


class MaskedWords(Denoiser):
    """15 % of the tokens, at least one, are to be told: 80 % of them are masked, 10 % replaced, 10 % left as they are (BERT,
    arXiv:1810.04805).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        if tokenizer.mask_token is None:
            tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        self._mask = DataCollatorForLanguageModeling(tokenizer)

    def corrupt(self, item: Item) -> Item:
        while True:  # each token is drawn by itself, so of a short block often none is; a batch of such has no mean
            masked = self._mask([{"input_ids": item["input_ids"]}])
            if (masked["labels"] != IGNORED).any():
                return {"input_ids": masked["input_ids"][0].tolist(), "labels": masked["labels"][0].tolist()}


class SpanCorruption(Denoiser):
    """15 % of the tokens, in spans of 3 on average, are replaced by a sentinel each; the target is the sentinels with what they
    stand for (T5, arXiv:1910.10683, section 3.1.4).
    """

    density, mean_span = 0.15, 3.0

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        super().__init__(tokenizer, max_length)
        most = max(1, round(max_length * self.density / self.mean_span))
        names = [f"<extra_id_{i}>" for i in range(most + 1)]
        vocabulary = tokenizer.get_vocab()
        if names[0] not in vocabulary:
            tokenizer.add_special_tokens({"additional_special_tokens": names})
            vocabulary = tokenizer.get_vocab()
        self.sentinels = [vocabulary[name] for name in names if name in vocabulary]
        if most > len(self.sentinels):
            raise AlignError(
                f"blocks of {max_length} tokens have up to {most} spans, and the tokenizer {len(self.sentinels)} sentinels"
            )
        if tokenizer.eos_token_id is None:
            raise AlignError("span corruption needs a tokenizer with an end token (eos_token)")

    def corrupt(self, item: Item) -> Item:
        end = self.tokenizer.eos_token_id
        ids = [i for i in item["input_ids"] if i != end]
        noise = min(max(1, round(len(ids) * self.density)), len(ids) - 1)
        spans = min(max(1, round(noise / self.mean_span)), noise, len(ids) - noise)
        source: list[int] = []
        target: list[int] = []
        place = 0
        for sentinel, kept, gone in zip(self.sentinels, _cut(len(ids) - noise, spans), _cut(noise, spans), strict=False):
            source += [*ids[place : place + kept], sentinel]
            target += [sentinel, *ids[place + kept : place + kept + gone]]
            place += kept + gone
        return {"input_ids": [*source, end], "labels": [*target, end]}


denoisers.add(MaskedWords, "masked")
denoisers.add(SpanCorruption, "encoder-decoder")


def _cut(total: int, parts: int) -> list[int]:
    """`total` cut at random into `parts` positive whole numbers."""
    cuts = sorted((torch.randperm(total - 1)[: parts - 1] + 1).tolist())
    return [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]


class DenoisingTrainer(FiniteTrainer, SafeTrainer):
    """The loss is the mean over the told tokens of the optimizer step's whole batch, whatever the model's head makes of it; an
    evaluation's is over all tokens of the set, and reports the share told rightly as ``token_accuracy``.
    """

    def __init__(self, *args: Any, denoiser: Denoiser, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=denoiser.collate, **kwargs)
        self.denoiser = denoiser
        self.model_accepts_loss_kwargs = True  # so that the step's told tokens are counted, and its micro-steps' losses added

    def get_batch_samples(self, epoch_iterator: Iterator[list[Item]], num_batches: int, device: torch.device) -> Any:
        """The step's micro-batches, corrupted by its number, whichever process has them. The loader is ahead of the steps: what it
        drew would be lost to a run that goes on from a checkpoint.
        """
        batches = list(islice(epoch_iterator, num_batches))
        seed = hash((self.args.seed, self.state.global_step))
        items = iter(self.denoiser.fixed([item for batch in batches for item in batch], seed))
        corrupted: list[Any] = [self.denoiser.collate(list(islice(items, len(batch)))) for batch in batches]
        if corrupted:  # of the rows that the last batch of several processes is filled up with nothing is told
            corrupted[-1]["labels"][self.own_rows(len(batches[-1]), self.train_remainder) :] = IGNORED
        return super().get_batch_samples(iter(corrupted), num_batches, device)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part of a micro-batch. Most heads take the number of the step's tokens, and then do not look at it."""
        outputs = model(**inputs)
        logits, labels = outputs.logits.float().flatten(0, -2), inputs["labels"].flatten()
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        # The Trainer averages over processes; that is undone, as the tokens are those of all.
        loss = loss / num_items_in_batch * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._told = torch.zeros(3, dtype=torch.double)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss, right, count = self._told.tolist()
        output.metrics.update({f"{prefix}_loss": loss / count, f"{prefix}_token_accuracy": right / count})
        return output

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits.float()
        labels = inputs["labels"]
        told = labels != IGNORED
        losses = logits.new_zeros(labels.shape)
        losses[told] = nn.functional.cross_entropy(logits[told], labels[told], reduction="none")
        right = told & (logits.argmax(-1) == labels)
        rows = torch.stack([losses.double(), right.double(), told.double()]).sum(2).T
        # All processes' rows, without those that the last batches were filled up with.
        self._told += self.accelerator.gather_for_metrics(rows.contiguous()).sum(0).cpu()
        return losses.sum() / told.sum().clamp(min=1), None, None
