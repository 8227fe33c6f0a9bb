"""Prompt-based classification: a pattern turns the text into a cloze, and a word for each label competes for the gap.

No weight is new, so a few examples a label can be enough (PET, Schick and Schütze 2021, arXiv:2001.07676; LM-BFF, Gao et al. 2021,
arXiv:2012.15723). A masked language model fills the gap anywhere, a causal one at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.models import family_of, load_config, load_language_model
from align.tasks.base import Feature, TaskTrainer, task
from align.tasks.classification import Classification

TEXT, GAP = "{text}", "{mask}"


class ClozeTrainer(TaskTrainer):
    """Trains and measures by the logits of the labels' words at the gap.

    The model stays the language model that it is; only which of its logits count is decided here.
    """

    task: ClozeClassification

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy over the labels' words."""
        scores = self.task.scores(model, inputs)
        loss = nn.functional.cross_entropy(scores, inputs["labels"])
        return (loss, {"logits": scores}) if return_outputs else loss


@task("cloze")
class ClozeClassification(Classification):
    """Classification without a new head.

    The model is a masked or a causal language model.

    Args:
        pattern: a text with {text} where the row's text goes, and {mask} where a label's word goes.
        verbalizer: the word of each label; a single token each.
    """

    trainer = ClozeTrainer
    per_token = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        labels: Sequence[str],
        *,
        pattern: str,
        verbalizer: dict[Any, str],
    ) -> None:
        super().__init__(tokenizer, max_length, labels)
        if pattern.count(TEXT) != 1 or pattern.count(GAP) != 1:
            raise AlignError(f"pattern {pattern!r} must hold {TEXT} once and {GAP} once")
        named = {str(label): word for label, word in verbalizer.items()}
        if set(named) != set(labels):
            raise AlignError(f"verbalizer has words for {', '.join(sorted(named))}; the labels are {', '.join(labels)}")
        if not tokenizer.mask_token_id and not pattern.endswith(GAP):
            raise AlignError(f"a causal model fills the gap at the end only: pattern {pattern!r} must end with {GAP}")
        self.pattern, self.verbalizer = pattern, named
        self.words = [self._token(named[label]) for label in labels]
        if len(set(self.words)) < len(self.words):
            raise AlignError(f"verbalizer: two labels have the same word: {named}")

    @property
    def masked(self) -> bool:
        """Whether the gap is a mask token; else it is what comes next."""
        return self.tokenizer.mask_token_id is not None

    def _token(self, word: str) -> int:
        """The id of `word` where it stands in the pattern."""
        spaced = " " if self.pattern[: self.pattern.index(GAP)].endswith(" ") else ""
        found = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f"{spaced}{word}", word)]
        if single := [ids[0] for ids in found if len(ids) == 1]:
            return single[0]
        parts = self.tokenizer.convert_ids_to_tokens(found[0])
        raise AlignError(
            f"verbalizer: {word!r} is {len(parts)} tokens ({' '.join(parts)}), and the gap holds one: take another word"
        )

    def model(self, path: str, **options: Any) -> nn.Module:
        wanted = "masked" if self.masked else "causal"
        family = family_of(load_config(path, trust_remote_code=options.get("trust_remote_code", False)))
        if family != wanted:
            raise AlignError(f"{path}: its tokenizer speaks for a {wanted} language model, and the model is {family}")
        return load_language_model(path, **options)

    def encode(self, text: str) -> tuple[Feature, bool]:
        """The pattern around `text`, which is cut where both do not fit."""
        gap = self.tokenizer.mask_token if self.masked else ""
        around = self.pattern.replace(GAP, gap).rstrip()
        room = self.max_length - len(self.tokenizer(around.replace(TEXT, ""))["input_ids"])
        if room < 1:
            raise AlignError(f"pattern {self.pattern!r} alone fills max_length ({self.max_length} tokens)")
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        fit = min(room, len(whole))
        while True:
            kept = text if fit == len(whole) else text[: whole[fit - 1][1]] if fit else ""
            item = dict(self.tokenizer(around.replace(TEXT, kept)))
            if len(item["input_ids"]) <= self.max_length or not fit:
                return item, fit < len(whole)
            fit -= 1  # a character of several tokens is kept whole or not at all, and may be too long for the room

    def scores(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (rows, labels) of the labels' words at the gap."""
        known = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in inputs}
        logits = model(**known).logits
        if self.masked:  # the text may hold a mask token, too
            at = inputs["input_ids"] == self.tokenizer.mask_token_id
            before = self.pattern.index(GAP) < self.pattern.index(TEXT)
            places = at.long() if before else at.long() * torch.arange(1, at.shape[1] + 1, device=at.device)
        else:
            places = inputs["attention_mask"].cumsum(1)
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, places.argmax(1)][:, self.words].float()
