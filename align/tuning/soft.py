"""Virtual tokens: learned embeddings (prompt tuning, P-tuning) or learned keys and values (prefix tuning) in front of every row.

peft makes them, saves them and loads them. How a model runs with them is ours: they are put in where the trunk is called, so that
padded rows, generation step by step and the forest all see them, and no caller has to know. On the forest each tree begins with
the virtual tokens, as slots in the row: what branches share is shared here, too, and the answers are those of the padded rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from types import MethodType
from typing import Any

import peft
import torch
import transformers
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from align.attention import AttentionPlan
from align.engine import base_model, trunk_of
from align.errors import AlignError
from align.tuning.adapters import task_of

ENCODER = "prompt_encoder.safetensors"
"""Beside an adapter's weights: the network that made its virtual tokens, which peft does not keep, so that training can go on."""

SOFT_TYPES = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
"""What peft calls them."""

MASKED = "FEATURE_EXTRACTION"
"""The task of peft's whose class hands on what it is given, as a masked language model needs; it has no task for these."""


def add_prompt(model: Any, count: int) -> Any:
    """See `align.tuning.strategies.prompt`."""
    wrapped = _wrap(model, PromptTuningConfig(num_virtual_tokens=count, token_dim=_width(model)))
    with torch.no_grad():
        embed, weight = base_model(wrapped).get_input_embeddings(), wrapped.prompt_encoder["default"].embedding.weight
        weight.copy_(embed(_random_tokens(wrapped, len(weight))))  # an encoder-decoder has a prompt for each
    return wrapped


def add_ptuning(model: Any, count: int, hidden_size: int | None, encoder: str) -> Any:
    """See `align.tuning.strategies.ptuning`."""
    size = hidden_size or model.config.hidden_size
    return _wrap(
        model,
        PromptEncoderConfig(
            num_virtual_tokens=count,
            token_dim=_width(model),
            encoder_hidden_size=size,
            encoder_reparameterization_type=encoder.upper(),
            encoder_dropout=0.0,
        ),
    )


def add_prefix(model: Any, count: int) -> Any:
    """See `align.tuning.strategies.prefix`."""
    wrapped = _wrap(model, PrefixTuningConfig(num_virtual_tokens=count))
    if not isinstance(wrapped, _Soft):
        return wrapped
    with torch.no_grad(), wrapped.disable_adapter():
        was_training = wrapped.training
        output = base_model(wrapped).eval()(input_ids=_random_tokens(wrapped, count)[None], use_cache=True)
        wrapped.train(was_training)
        cache = output.get(_cache_name(trunk_of(model)))
        if cache is None:
            raise AlignError(f"tuning 'prefix' puts keys and values into a model's cache, and {_name(wrapped)} has none")
        # (tokens, layers x (key, value) x heads x dim), as peft lays them out
        states = torch.stack([state for layer in cache.layers for state in (layer.keys[0], layer.values[0])])
        weight = wrapped.prompt_encoder["default"].embedding.weight
        try:
            weight.copy_(states.permute(2, 0, 1, 3).reshape(count, -1))
        except RuntimeError as error:
            raise AlignError(f"tuning 'prefix': peft lays out other keys than {_name(wrapped)} has ({error})") from error
    return wrapped


def _random_tokens(model: Any, count: int) -> Tensor:
    base = base_model(model)
    return torch.randint(base.config.vocab_size, (count,)).to(base.device)


def _width(model: Any) -> int:
    """Of its embeddings, which may be narrower than its layers (ALBERT, ELECTRA)."""
    return model.get_input_embeddings().weight.shape[1]


def _name(model: Any) -> str:
    return type(base_model(model)).__name__


def _cache_name(trunk: Any) -> str | None:
    """What the forward of `trunk` calls its cache, since transformers 5.24 and before it; None if it takes none."""
    taken = signature(type(trunk).forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in taken), None)


def _wrap(model: Any, config: PeftConfig) -> Any:
    """`model` with the virtual tokens of `config`, which are new: without them it is the base."""
    config.task_type = task_of(model) or MASKED
    if config.task_type == MASKED and not isinstance(config, PrefixTuningConfig):
        raise AlignError(
            f"virtual tokens in front of {_name(model)} would move the places at which its answers are read: use tuning 'prefix'"
        )
    if model.config.is_encoder_decoder and config.task_type != "SEQ_2_SEQ_LM":
        raise AlignError(
            f"virtual tokens go in front of an encoder-decoder that writes, and {_name(model)} answers with scores: use another "
            "tuning"
        )
    if isinstance(config, PrefixTuningConfig) and _cache_name(trunk_of(model)) is None:
        raise AlignError(f"tuning 'prefix' puts keys and values into a model's cache, and {_name(model)} has none")
    try:
        wrapped: Any = _class_for(model, config)(model, config)
    except ValueError as error:
        raise AlignError(f"virtual tokens cannot be put in front of {_name(model)}: {error}") from error
    wrapped.off_is_base = True
    return wrapped.train(model.training)


def is_decoder(model: Any) -> bool:
    """Whether `model` is a causal language model, or a classifier on one (which transformers call its ``score``)."""
    task = task_of(model)
    return task == "CAUSAL_LM" or (task == "SEQ_CLS" and hasattr(model, "score"))


def load_soft_prompt(model: Any, folder: str, *, trainable: bool = False) -> Any:
    """`model` with the virtual tokens that were saved in `folder`, frozen or to be trained further.

    Raises:
        AlignError: they are to be trained further, and the network that made them was not kept.
    """
    config: Any = PeftConfig.from_pretrained(folder)
    config.inference_mode = not trainable
    if trainable and config.peft_type == "P_TUNING" and not (Path(folder) / ENCODER).is_file():
        raise AlignError(f"{folder}: ptuning cannot be continued: there are its tokens, and no {ENCODER} with what made them")
    wrapped = _class_for(model, config)(model, config)
    wrapped.load_adapter(folder, "default", is_trainable=trainable)
    return wrapped


class _Keeping(PeftModel):
    """Beside virtual tokens, keeps the network that made them."""

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        super().save_pretrained(folder, **kwargs)
        encoder = self.prompt_encoder["default"]
        if hasattr(encoder, "mlp_head"):
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}, Path(folder) / ENCODER
            )

    def load_adapter(self, folder: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().load_adapter(folder, *args, **kwargs)
        self.read_encoder(folder)
        return result

    def read_encoder(self, folder: Any) -> None:
        """Take back the network that made the virtual tokens, where there is one that trains."""
        encoder = self.prompt_encoder["default"]
        if hasattr(encoder, "mlp_head") and (Path(folder) / ENCODER).is_file():
            encoder.load_state_dict(load_file(Path(folder) / ENCODER))


class _Soft(_Keeping):
    """What our classes change in peft's: they call the base model, whose trunk knows of the virtual tokens."""

    def __init__(self, model: Any, config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, config, *args, **kwargs)
        self.is_off = False
        trunk = trunk_of(model)
        trunk = getattr(trunk, "decoder", trunk)  # OPT's head calls this part of the trunk, past the trunk
        trunk.__dict__["virtual"] = self  # past nn.Module, which would take it for a child
        trunk.forward = MethodType(_with_virtual_tokens, trunk)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        before, self.is_off = self.is_off, True
        try:
            yield
        finally:
            self.is_off = before


class SoftCausalLM(_Soft, PeftModelForCausalLM):
    """A causal language model behind virtual tokens."""


class SoftClassifier(_Soft, PeftModelForSequenceClassification):
    """A score head on a decoder behind virtual tokens."""


CLASSES: dict[str | None, Any] = {"CAUSAL_LM": SoftCausalLM, "SEQ_CLS": SoftClassifier}

# Encoders, alone or with a decoder, never run on a forest: peft's own way will do.
OTHERS = {task: type(kind.__name__, (_Keeping, kind), {}) for task, kind in MODEL_TYPE_TO_PEFT_MODEL_MAPPING.items()}


def _class_for(model: Any, config: PeftConfig) -> Any:
    if is_decoder(model):
        return CLASSES[config.task_type]
    # It would find no cache, and begin each word of an answer anew.
    if isinstance(config, PrefixTuningConfig) and _cache_name(trunk_of(model)) != "past_key_values":
        raise AlignError(
            f"tuning 'prefix' of {_name(model)} is peft's, and peft {peft.__version__} does not know what transformers "
            f"{transformers.__version__} calls a model's cache: use another tuning, or transformers below 5.24"
        )
    return OTHERS[config.task_type]


# -- the trunk with virtual tokens -----------------------------------------------------------------------------------------------


def _with_virtual_tokens(
    trunk: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    forest: AttentionPlan | None = None,
    **rest: Any,
) -> Any:
    """The forward of a trunk whose rows all begin with the virtual tokens. Its answers are those of the real tokens."""
    soft: Any = trunk.__dict__["virtual"]
    plain = type(trunk).forward
    if soft.is_off:
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids}
        if forest is not None:
            given["forest"] = forest
        return plain(trunk, input_ids=input_ids, inputs_embeds=inputs_embeds, **given, **rest)
    embeds = trunk.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
    if forest is not None:
        return _on_forest(soft, trunk, embeds, forest, attention_mask=attention_mask, **rest)
    count, cache_name = soft.active_peft_config.num_virtual_tokens, _cache_name(trunk) or "cache"
    cache = rest.pop(cache_name, None)
    rows, seen = embeds.shape[0], 0 if cache is None else cache.get_seq_length()
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(rows, count), attention_mask], dim=1)
    if position_ids is not None:
        position_ids = position_ids + count
    skipped = 0
    if not seen and _is_prefix(soft):
        if trunk.training and getattr(trunk, "gradient_checkpointing", False):
            raise AlignError("prefix tuning on padded rows cannot be combined with gradient_checkpointing; switch it off")
        cache = DynamicCache(config=trunk.config) if cache is None else cache
        for number, (key, value) in enumerate(_keys_and_values(soft)):
            cache.update(*(x.expand(rows, -1, -1, -1) for x in (key, value)), number)
    elif not seen:
        skipped = count
        embeds = torch.cat([_embeddings(soft).to(embeds.dtype).expand(rows, -1, -1), embeds], dim=1)
        if position_ids is not None:
            first = torch.arange(count, device=embeds.device).expand(rows, -1)
            position_ids = torch.cat([first, position_ids.expand(rows, -1)], dim=1)
    output = plain(
        trunk,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **{cache_name: cache},
        **rest,
    )
    output.last_hidden_state = output.last_hidden_state[:, skipped:]
    return output


def _on_forest(soft: Any, trunk: Any, embeds: Tensor, plan: AttentionPlan, **rest: Any) -> Any:
    """One row (1, tokens, hidden), longer by the virtual tokens of each tree."""
    count = soft.active_peft_config.num_virtual_tokens
    longer, slots, kept = plan.behind(count)
    row = embeds.new_zeros(1, len(longer.positions), embeds.shape[2]).index_copy(1, kept, embeds)
    if _is_prefix(soft):
        longer.learned = slots.flatten(), _keys_and_values(soft)
    else:
        row = row.index_copy(1, slots.flatten(), _embeddings(soft).to(row.dtype).repeat(1, len(slots), 1))
    rest.pop("position_ids", None)
    output = type(trunk).forward(trunk, inputs_embeds=row, position_ids=longer.positions[None], forest=longer, **rest)
    output.last_hidden_state = output.last_hidden_state[:, kept]
    return output


def _is_prefix(soft: Any) -> bool:
    return soft.active_peft_config.peft_type == "PREFIX_TUNING"


def _embeddings(soft: Any) -> Tensor:
    """(1, virtual tokens, hidden)"""
    if soft.active_peft_config.inference_mode:  # what the encoder made is what was saved
        return soft.prompt_encoder["default"].embedding.weight[None]
    return soft.get_prompt(1)


def _keys_and_values(soft: Any) -> list[tuple[Tensor, Tensor]]:
    """For each layer, both (1, heads, virtual tokens, dim)."""
    return [(layer.keys, layer.values) for layer in soft.get_prompt(1).layers]
