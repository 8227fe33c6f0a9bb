"""How much memory a training step takes: weights, gradients, optimizer and activations, counted on the meta device.

Nothing is guessed about a model's layers: the model itself runs without data (torch's meta device) on as many tokens as a pass will
have, and what autograd keeps for the backward pass is added up. The rest is arithmetic:

    training  = weights + optimizer + the larger of: gradients; activations (and gradients, if a step takes several passes)
    loading   = weights, and the file that they are read from
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSequenceClassification

from align.heads import CHUNK_ELEMENTS
from align.models import DTYPES
from align.tuning.strategies import ADAPTERS, Tuning
from align.tuning.tune import tune

METER = "align_meter"
"""Name of the attention that stands for ours on the meta device."""
CHUNKS = 4
"""Tensors of the size of a chunk of logits that are held at a time, in the head's backward pass."""
PASSING = 3
"""Tensors of the size of the largest in a layer that are on their way, forward or backward."""
HEAP = 1.32
"""On a CPU: what the C library's heap takes for tensors of up to 32 MB, for what they take themselves (measured)."""
MAPPED = 2**25
"""Larger ones it maps, and gives back whole."""
LIBRARIES = 30 * 2**20
"""What libraries take once a stage runs: workspaces, code that is loaded late (measured on a CPU)."""
HOLES = 1.4
"""On a CPU: of each adapted layer's output, what its adapter makes unusable by a small tensor in a freed place (measured)."""


class _Attention(torch.autograd.Function):
    """Keeps what attention over a forest keeps: queries, keys and values gathered, and its result."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query.clone(), key.clone(), value.clone(), out)
        return out


def _meter(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
    repeats = 1 if module.meter_shares else query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    return _Attention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(METER, _meter)


@dataclass
class Skeleton:
    """A model without data.

    Args:
        config: transformers' config.
        dtype: type of its weights.
        tuning: what of it is trained; None for nothing.
        gpu: FlashAttention shares keys and values between the heads of a group, a CPU's attention copies them for each.
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
        auto: Any = AutoModelForSequenceClassification if self.score_head else AutoModelForCausalLM
        self.config.num_labels = 1
        with torch.device("meta"):
            model = auto.from_config(self.config, dtype=DTYPES[self.dtype], attn_implementation=METER)
            if self.tuning is None:
                return model.requires_grad_(False)
            # What these do to the weights needs weights; what they add is what lora does.
            name = {"pissa": "lora", "qlora": "lora"}.get(self.tuning.name, self.tuning.name)
            return tune(model, Tuning(name, self.tuning.arguments))

    @property
    def adapted(self) -> bool:
        """Whether what trains is an adapter, and the rest stays as it is."""
        return self.tuning is not None and self.tuning.name in ADAPTERS

    @cached_property
    def weights(self) -> float:
        """Bytes; the frozen matrices of qlora take 4 bits a number, and a little for their scales."""
        four_bits = self.tuning is not None and self.tuning.name == "qlora"
        return sum(p.numel() * (0.55 if four_bits and _is_base(name, p) else p.element_size()) for name, p in self.named())

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of everything that is trained; AdamW's two moments are twice that."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)

    def base(self) -> Any:
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _forward(self, tokens: int) -> Callable[[], Any]:
        base = self.base()
        trunk = base.model if base.base_model is base else base.base_model
        trunk.train()
        for module in trunk.modules():
            module.meter_shares = self.gpu
        ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
        positions = torch.arange(tokens, device="meta")[None]
        no_mask = torch.empty(1, 1, 0, 0, device="meta")
        return lambda: trunk(input_ids=ids, position_ids=positions, attention_mask=no_mask, use_cache=False)

    def _counted(self, tokens: int) -> tuple[int, int]:
        """Bytes that autograd keeps of a forward pass on so many tokens, and those of the largest tensor among them."""
        known = {p.untyped_storage()._cdata for p in self.model.parameters()}
        kept: dict[int, Tensor] = {}

        def note(x: Tensor) -> Tensor:
            storage = x.untyped_storage()._cdata
            if storage not in known:
                kept[storage] = x
            return x

        with saved_tensors_hooks(note, lambda x: x):
            self._forward(tokens)()
        sizes = [x.untyped_storage().nbytes() for x in kept.values()]
        total = sum(sizes) if self.gpu else sum(size * HEAP if size <= MAPPED else size for size in sizes)
        return round(total + self.holes(tokens)), max(sizes, default=0)

    def holes(self, tokens: int) -> float:
        """Bytes of the heap that adapters make unusable."""
        if not self.adapted or self.gpu:
            return 0.0
        outputs = [tokens * 4 * module.out_features for module in self.model.modules() if hasattr(module, "lora_A")]
        return HOLES * sum(size for size in outputs if size <= MAPPED)

    def activations(self, tokens: int) -> int:
        """Bytes held when the backward pass of so many tokens begins, what is on its way included."""
        kept, largest = self._counted(tokens)
        if self.checkpointing:
            layers = self.config.get_text_config().num_hidden_layers
            kept = kept // layers + tokens * self.hidden * layers * (2 if self.bf16 else 4)
        if self.bf16 and self.dtype == "float32":
            kept, largest = int(0.6 * kept), largest // 2  # matrix products and what feeds them in 16 bits, norms in 32
        return kept + PASSING * largest

    def passing(self, tokens: int) -> int:
        """Bytes of a forward pass that nothing is kept of."""
        widest = max(getattr(self.config.get_text_config(), "intermediate_size", None) or 4 * self.hidden, self.hidden)
        return tokens * (PASSING * widest + 4 * self.hidden) * (2 if self.bf16 else 4)

    def cache(self, tokens: int) -> float:
        """Bytes of keys and values of so many tokens, and of the longer copy that they are moved to."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 1.5 * tokens * 2 * heads * size * text.num_hidden_layers * (2 if self.dtype != "float32" else 4)

    @property
    def hidden(self) -> int:
        return self.config.get_text_config().hidden_size

    def head(self, targets: int) -> int:
        """Bytes of the head: logits in chunks, and the gradient of its weights before it is added to theirs."""
        if self.score_head:
            return 0
        vocabulary = self.config.get_text_config().vocab_size
        chunk = min(targets, max(1, CHUNK_ELEMENTS // vocabulary)) * vocabulary * 4
        own = vocabulary * self.hidden * 4 if self.model.get_output_embeddings().weight.requires_grad else 0
        return CHUNKS * chunk + own


def _is_base(name: str, parameter: nn.Parameter) -> bool:
    """A frozen matrix of a linear layer."""
    return parameter.ndim == 2 and not parameter.requires_grad and "embed" not in name and "lm_head" not in name
