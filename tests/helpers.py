"""Tiny models, random trees, and the slow ways of computing what the engine computes fast."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.attention import FOREST
from align.engine import base_model
from align.forest import Tree, cut, plant
from align.heads import TokenScores

VOCABULARY = 320


def build(model_type: str, *, seed: int = 0, score_head: bool = False, **fields: Any) -> Any:
    """A model in evaluation mode with seeded random weights. The spread of the weights is wide, so that every token matters."""
    torch.manual_seed(seed)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **{**special, "initializer_range": 0.15, **fields})
    if score_head:
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config).eval()
    return AutoModelForCausalLM.from_config(config).eval()


def llama(seed: int = 0, **fields: Any) -> Any:
    """A Llama of two layers, four heads on two key-value heads, hidden size 32, fp32."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return build("llama", seed=seed, **{**sizes, "max_position_embeddings": 512, **fields})


def tokens(draw: random.Random, n: int) -> list[int]:
    """`n` random tokens, none of them special."""
    return [draw.randrange(3, VOCABULARY) for _ in range(n)]


def pairs(seed: int, count: int = 6) -> list[Tree]:
    """Preference trees of uneven lengths."""
    draw = random.Random(seed)
    return [
        Tree(
            tokens(draw, draw.randint(1, 14)),
            (tokens(draw, draw.randint(1, 11)), tokens(draw, draw.randint(1, 11))),
            values={"margin": [draw.random()]},
        )
        for _ in range(count)
    ]


def documents(seed: int, count: int = 6) -> list[Tree]:
    """Conversations without branches, about half of the tokens with a loss."""
    draw = random.Random(seed)
    lengths = [draw.randint(2, 24) for _ in range(count)]
    return [Tree(tokens(draw, n), prompt_mask=[False, *(draw.random() < 0.5 for _ in range(n - 2)), True]) for n in lengths]


def add_begin(tokenizer: Any) -> Any:
    """Have `tokenizer` put its begin token in front of every text, as Llama's does; returns it."""
    begin, number = tokenizer.bos_token, tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, number)])
    assert tokenizer("one")["input_ids"][0] == number
    return tokenizer


def learned(encoder: Any, tree: Tree) -> list[str]:
    """The runs of tokens of `tree`'s prompt that carry a loss, as text."""
    both = zip(tree.prompt, tree.prompt_mask or (), strict=True)
    runs = [[token for token, _ in run] for counts, run in groupby(both, key=itemgetter(1)) if counts]
    return [encoder.tokenizer.decode(run) for run in runs]


class Alone:
    """Answers the engine's call the slow way: each sequence of `trees` alone, through the model's own forward."""

    def __init__(self, model: Any, trees: Sequence[Tree]) -> None:
        self.model, self.trees = model, trees

    def __call__(
        self,
        forest: Any = None,
        read: str = "ends",
        temperature: float = 1.0,
        with_entropy: bool = True,
        language_head: Any = None,
    ) -> Any:
        if hasattr(self.model, "score"):
            scores = torch.stack([value for tree in self.trees for value in self._scores(tree, read)])
            if language_head is None:
                return scores
            logps = torch.cat([part for tree in self.trees for part in self._under(language_head, tree)])
            return TokenScores(logps, logps > 0, values=scores)
        parts = [part for tree in self.trees for part in self._sequences(tree, temperature)]
        return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _sequences(self, tree: Tree, temperature: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number, (whole, wanted) in enumerate(sequences(tree)):
            # What the prompt itself predicts is counted once a tree.
            wanted = [i for i in wanted if number == 0 or i >= len(tree.prompt)]
            log_p = (self.model(input_ids=torch.tensor([whole])).logits[0].float() / temperature).log_softmax(1)
            rows = log_p[[i - 1 for i in wanted]]
            target = torch.tensor([whole[i] for i in wanted], dtype=torch.long)
            yield rows.gather(1, target[:, None])[:, 0], rows.argmax(1) == target, -(rows.exp() * rows).sum(1)

    def _under(self, head: Any, tree: Tree) -> Iterator[Tensor]:
        """Log-probs of the answers' tokens under a head that is not the model's own."""
        for whole, wanted in sequences(tree):
            hidden = self.model.base_model(input_ids=torch.tensor([whole])).last_hidden_state[0]
            log_p = (hidden @ head.weight.T).log_softmax(1)
            yield log_p[[i - 1 for i in wanted], [whole[i] for i in wanted]]

    def _scores(self, tree: Tree, read: str) -> Iterator[Tensor]:
        for whole, wanted in sequences(tree):
            ids = torch.tensor([whole])
            if read == "ends":
                yield self.model(input_ids=ids).logits[0, 0]
            else:
                values = self.model.score(self.model.base_model(input_ids=ids).last_hidden_state)[0, :, 0]
                yield from (values[i - 1] for i in wanted)


def sequences(tree: Tree) -> Iterator[tuple[list[int], list[int]]]:
    """Each path of `tree` with the indices of its target tokens."""
    masked = [i for i in range(1, len(tree.prompt)) if tree.prompt_mask and tree.prompt_mask[i]]
    for branch in tree.branches or ([],):
        whole = tree.prompt + branch
        yield whole, masked + [i for i in range(len(tree.prompt), len(whole)) if i]


@contextmanager
def padded(model: Any) -> Iterator[Any]:
    """`model` on the padded path."""
    base = base_model(model)
    base.set_attn_implementation("sdpa")
    model.forest_padded = True
    try:
        yield model
    finally:
        base.set_attn_implementation(FOREST)
        model.forest_padded = False


Losses = tuple[Tensor, dict[str, Tensor]]


def run(
    objective: Callable, model: Any, trees: Sequence[Tree], budget: int | None = None, parameters: nn.Module | None = None
) -> Losses:
    """Losses of `objective`, one per unit, and the gradient of their mean by parameter name, over packs of `budget` tokens."""
    module = parameters if parameters is not None else model
    module.zero_grad(set_to_none=True)
    packs = [plant(pack) for pack in cut(trees, budget)]
    units, losses = sum(objective.units(forest) for forest in packs), []
    for forest in packs:
        loss = objective(model, forest).loss
        (loss.sum() / units).backward()
        losses.append(loss.detach())
    return torch.cat(losses), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def run_alone(objective: Callable, model: Any, trees: Sequence[Tree]) -> Losses:
    """`run` by `Alone`."""
    return run(objective, Alone(model, trees), trees, parameters=model)


def assert_close(ours: Tensor, theirs: Tensor, rel: float = 1e-5, what: str = "") -> None:
    """The largest difference is at most `rel` of the largest value."""
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0, f"{what} is 0 everywhere: nothing is compared"
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert difference <= rel, f"{what} differs by {difference:.1e}"


def assert_same(ours: Losses, theirs: Losses, rel: float = 1e-5) -> None:
    """The same losses and the same gradient of every parameter."""
    assert_close(ours[0], theirs[0], rel, "loss")
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert_close(ours[1][name], gradient, rel, name)


def objective(units: str, function: Callable) -> Any:
    """An objective out of a function of (model, forest); `units` is ``trees`` or ``tokens``."""
    count = (lambda forest: forest.trees) if units == "trees" else (lambda forest: forest.targets.numel())

    class Made(SimpleNamespace):
        def __call__(self, model: Any, forest: Any) -> Any:
            return function(model, forest)

    return Made(units=count)
