"""How much memory a pass takes: it runs without data, on torch's meta device, and a ledger is kept of the tensors it makes.

Nothing is guessed about a model's layers. The model itself goes forward and backward over a forest of the stage's own rows, with an
attention that keeps what ours keeps and a head in the same blocks. What does not depend on the rows is arithmetic:

    training  = weights + optimizer + the most that is alive in a pass (gradients, activations, what is on its way)
    loading   = weights, and the file that they are read from
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.pytorch_utils import Conv1D

from align import onednn
from align.attention import AttentionPlan
from align.engine import base_model, trunk_of
from align.forest import Forest
from align.heads import block_size, blocks_kept
from align.layers import in_fewer_passes
from align.models import DTYPES
from align.rollout.packed import MOST_BYTES
from align.segments import kept_weights, pays
from align.tuning.strategies import ADAPTERS, Tuning
from align.tuning.tune import tune

METER = "align_meter"
"""Name of the attention that stands for ours on the meta device."""
LIBRARIES = 40 * 2**20
"""What libraries take once a stage runs: workspaces, code that is loaded late (measured on a CPU)."""
HEAP = 1.06
"""On a CPU: what the C library's heap takes for a pass, for what its tensors take (measured)."""
HALF = 0.8
"""What activations take with bf16: matrix products and what feeds them in 16 bits, norms and the residual stream in 32 (measured on
a CPU).
"""
HOLES = 0.5
"""On a CPU: of each adapted layer's output, what its adapter makes unusable by a small tensor in a freed place (measured)."""
SCATTERED = 0.4
"""On a CPU: of the activations of a model that trains whole, what the next one finds taken by gradients in between (measured)."""


class Ledger(TorchDispatchMode):
    """Bytes of the tensors made within, as long as they live, and the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given | self._alive:  # no view, nor changed in place
                self._enter(x.untyped_storage())
        return made

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.held -= size


class _Attend(torch.autograd.Function):
    """Keeps what an attention keeps: queries, keys, values, and its result or so many weights of each head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, weights: int | None) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out if weights is None else query.new_empty(query.shape[2], weights))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


@dataclass(frozen=True)
class _Seen:
    """Which tokens an attention gathers as queries and keys, and the way back; no queries where they stay in their places."""

    plan: AttentionPlan
    queries: Tensor | None  # (padded queries,)
    keys: Tensor  # (padded keys,)
    restore: Tensor  # (tokens,)

    @classmethod
    def of(cls, forest: Forest, *, gpu: bool) -> _Seen:
        """FlashAttention shares keys between the heads of a group and takes queries as they lie; a CPU's attention does not."""
        plan = AttentionPlan(forest)
        if gpu:
            return cls(plan, None, plan.runs.key_index.to("meta"), forest.position_ids.to("meta"))
        buckets = plan.buckets
        return cls(plan, buckets.query_index.to("meta"), buckets.key_index.to("meta"), buckets.restore.to("meta"))


def _meter(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, forest: _Seen, **kwargs: Any
) -> tuple[Tensor, None]:
    heads, plan = query.shape[1], forest.plan
    if forest.queries is not None:
        key, value = (repeat_kv(x, heads // x.shape[1]) for x in (key, value))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if forest.queries is None:
        return _Attend.apply(query, *(x.index_select(1, forest.keys) for x in (key, value)), None), None
    window = kwargs.get("sliding_window")
    if (window is None or window >= plan.longest) and pays(plan.segments, heads, plan.longest):
        return _Attend.apply(query, key, value, kept_weights(plan.segments)), None
    query, key, value = (x.index_select(1, at) for x, at in ((query, forest.queries), (key, forest.keys), (value, forest.keys)))
    return _Attend.apply(query, key, value, None).index_select(1, forest.restore), None


AttentionInterface.register(METER, _meter)


class _Score(torch.autograd.Function):
    """The head of `align.heads`: logits in blocks, made again on the way back but for those that are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, keeps: int, gpu: bool) -> Tensor:
        ctx.rows, ctx.columns = block_size(len(hidden), len(weight), gpu=gpu)
        kept: list[Tensor] = []
        for part in hidden.split(ctx.rows):
            for some in weight.split(ctx.columns):
                logits = (part @ some.T).float()  # held until the next ones are made
                if len(kept) < keeps:
                    kept.append(logits)
        ctx.save_for_backward(hidden, weight, *kept)
        return hidden.new_empty(len(hidden))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, *_ = ctx.saved_tensors
        to_hidden, to_weight = torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part, place in zip(hidden.split(ctx.rows), to_hidden.split(ctx.rows), strict=True):
            for some in weight.split(ctx.columns):
                logits = (part @ some.T).float()
                place.add_(logits.to(weight.dtype) @ some)
        return to_hidden, to_weight, None, None


@dataclass
class Skeleton:
    """A model without data.

    Args:
        config: transformers' config.
        dtype: type of its weights.
        tuning: what of it is trained; None for nothing.
        bf16: passes in 16 bits over weights in 32.
        gpu: which attention it runs.
    """

    config: Any
    dtype: str = "float32"
    tuning: Tuning | None = field(default_factory=Tuning)
    score_head: bool = False
    bf16: bool = False
    checkpointing: bool = False
    gpu: bool = False

    @cached_property
    def model(self) -> Any:
        """The model on the meta device, tuned as the stage would tune it."""
        auto: Any = AutoModelForSequenceClassification if self.score_head else AutoModelForCausalLM
        self.config.num_labels = 1
        with torch.device("meta"):
            model: Any = auto.from_config(self.config, dtype=DTYPES[self.dtype], attn_implementation=METER)
            if not self.gpu and not self.bf16:  # 16 bits run the family's own way
                in_fewer_passes(model)
            if self.tuning is None:
                return model.requires_grad_(False)
            # What these do to the weights needs weights; what they add is what lora does.
            name = {"pissa": "lora", "qlora": "lora"}.get(self.tuning.name, self.tuning.name)
            model = tune(model, Tuning(name, self.tuning.arguments))
            if self.checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            return model

    @property
    def adapted(self) -> bool:
        """Whether what trains is an adapter, and the rest stays as it is."""
        return self.tuning is not None and self.tuning.name in ADAPTERS

    @cached_property
    def weights(self) -> float:
        """Bytes; the frozen matrices of qlora take 4 bits a number, and a little for their scales."""
        four_bits = self.tuning is not None and self.tuning.name == "qlora"
        named = self.model.named_parameters()
        return sum(p.numel() * (0.55 if four_bits and _is_base(name, p) else p.element_size()) for name, p in named)

    @cached_property
    def parameters(self) -> int:
        """How many numbers it has, those of its adapter among them."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of everything that is trained; AdamW's two moments are twice that."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    @cached_property
    def gathered(self) -> float:
        """Bytes of weights and gradients that FSDP2 holds whole at a time: what lies in no layer, one layer and the next."""
        base = base_model(self.model)
        layers = [module for module in base.modules() if type(module).__name__ in (base._no_split_modules or ())]
        sizes = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        return (self.weights - sum(sizes) + 2 * max(sizes, default=0)) * (1 + self.gradients / self.weights)

    @cached_property
    def packed(self) -> float:
        """Bytes of the copies of its layers that a CPU samples with (`align.rollout.packed`)."""
        if self.gpu or self.bf16 or self.dtype != "float32" or not onednn.faster_packed():
            return 0.0
        weights = {module.weight for module in self.model.modules() if isinstance(module, nn.Linear | Conv1D)}
        return float(min(MOST_BYTES, sum(weight.nbytes for weight in weights)))

    def forward(self, forest: Forest, *, learning: bool = True) -> Tensor:
        """One forward pass over `forest`: a number to go backward from, which leaves gradients."""
        base, forest, gathered = base_model(self.model), forest.to("meta"), _Seen.of(forest, gpu=self.gpu)
        trunk = trunk_of(base)
        trunk.train(learning)
        with torch.set_grad_enabled(learning):
            hidden = trunk(
                input_ids=forest.input_ids[None],
                position_ids=forest.position_ids[None],
                attention_mask=torch.empty(1, 1, 0, 0, device="meta"),
                use_cache=False,
                forest=gathered,
            ).last_hidden_state[0]
            if self.score_head:
                return base.score(hidden[forest.ends]).sum()
            keeps = blocks_kept(getattr(self.config, "final_logit_softcapping", None), gpu=self.gpu)
            return _Score.apply(hidden[forest.sources], base.get_output_embeddings().weight, keeps, self.gpu).sum()

    def cache(self, tokens: int) -> float:
        """Bytes of keys and values of so many tokens, and of the longer copy that they are moved to."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 1.5 * tokens * 2 * heads * size * text.num_hidden_layers * (2 if self.dtype != "float32" else 4)


def peak(models: Sequence[Skeleton], forest: Forest, *, times: int = 1, backward: bool = True, together: bool = False) -> float:
    """Bytes taken at the worst moment while each of `models` goes `times` over `forest`, gradients kept: one after the other, or
    forward `together` and then backward.
    """
    with Ledger() as ledger:
        for group in [models] if together else [[model] for model in models]:
            for _ in range(times):
                totals = [model.forward(forest, learning=backward) for model in group]
                while backward and totals:
                    totals.pop(0).backward()
    for model in models:
        model.model.zero_grad(set_to_none=True)
    made, gradients = float(ledger.peak), sum(model.gradients for model in models)
    if models[0].bf16 and models[0].dtype == "float32":
        made = HALF * max(made - gradients, 0.0) + min(made, gradients)
    if models[0].gpu:
        return made
    adapted = sum(module.out_features for each in models for module in each.model.modules() if hasattr(module, "lora_A"))
    scattered = 0.0 if adapted else SCATTERED * (made - gradients) * (len(models) - 1)
    return HEAP * made + HOLES * 4 * forest.tokens * adapted * backward + scattered


def _is_base(name: str, parameter: nn.Parameter) -> bool:
    """A frozen matrix of a linear layer."""
    return parameter.ndim == 2 and not parameter.requires_grad and "embed" not in name and "lm_head" not in name
