"""Adapters of peft, on any transformers model. A task's head (scores, classes) is trained and saved with the adapter."""

from __future__ import annotations

import re
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from align.engine import base_model
from align.errors import AlignError

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "MarianMTModel": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""What peft calls the tasks of transformers' classes, by the end of their names; a masked language model is none of them."""


HEADS = r"(.*\.)?(score|(pre_)?classifier|classification_head|qa_outputs)(\..*)?"
"""Paths of what tasks' heads are made of: peft saves them whole, with the adapter."""


def task_of(model: Any) -> str | None:
    """What peft calls the task of `model`, or None."""
    name = type(base_model(model)).__name__
    if name == "BertLMHeadModel" or not name.endswith(tuple(TASKS)):
        return None
    return next(task for end, task in TASKS.items() if name.endswith(end))


def add_lora(
    model: Any, *, r: int, alpha: int, dropout: float, target_modules: str | list[str] | None, rslora: bool, dora: bool, pissa: bool
) -> PeftModel:
    """See `align.tuning.strategies.lora`.

    Raises:
        AlignError: a target module is not in the model, or (pissa) holds experts in one stack, which have no such components.
    """
    wrapped = _wrap(
        model,
        LoraConfig(
            task_type=task_of(model),
            r=r,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_names(target_modules) or "all-linear",
            exclude_modules=HEADS if any(re.fullmatch(HEADS, name) for name, _ in model.named_modules()) else None,
            use_rslora=rslora,
            use_dora=dora,
            fan_in_fan_out=_is_transposed(model),
            init_lora_weights="pissa" if pissa else True,
            modules_to_save=_head_unknown_to_peft(model),
        ),
    )
    wrapped.off_is_base = not pissa
    if pissa:
        wrapped.pissa_start = {name: tensor.clone() for name, tensor in _adapter_state(wrapped).items()}
    return wrapped


def add_ia3(model: Any, target_modules: str | list[str] | None, feedforward_modules: str | list[str] | None) -> PeftModel:
    """See `align.tuning.strategies.ia3`.

    Raises:
        AlignError: a target module is not in the model, or must be named as the family is not known.
    """
    targets, inner = _names(target_modules), _names(feedforward_modules)
    if None in (targets, inner) and model.config.model_type not in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING:
        raise AlignError(
            f"tuning 'ia3': peft does not know which layers of {type(base_model(model)).__name__} to scale: set target_modules "
            "(such as k_proj, v_proj and down_proj) and, of these, feedforward_modules (down_proj)"
        )
    wrapped = _wrap(
        model,
        IA3Config(
            task_type=task_of(model),
            target_modules=targets,
            feedforward_modules=inner,
            fan_in_fan_out=_is_transposed(model),
            modules_to_save=_head_unknown_to_peft(model),
        ),
    )
    wrapped.off_is_base = True
    return wrapped


def _head_unknown_to_peft(model: Any) -> list[str] | None:
    """The classes' head of an encoder-decoder: peft knows those of other models by name."""
    name = "classification_head"
    return [name] if hasattr(base_model(model), name) else None


def _is_transposed(model: Any) -> bool:
    """Whether its linear layers hold (inputs, outputs), as GPT-2's do."""
    return any(isinstance(module, Conv1D) for module in model.modules())


def _names(names: str | list[str] | None) -> list[str] | None:
    return [names] if isinstance(names, str) else names


def _wrap(model: Any, config: PeftConfig) -> PeftModel:
    try:
        return get_peft_model(model, config).train(model.training)
    except ValueError as error:
        if "ParamWrapper does not work with use_dora" in str(error):
            raise AlignError(
                f"DoRA takes the weights of linear layers apart, and the experts of {type(base_model(model)).__name__} are none: "
                "use 'lora', or name other target_modules"
            ) from error
        raise AlignError(f"target_modules {config.target_modules or 'of the family'}: {error}") from error
    except AttributeError as error:
        if getattr(config, "init_lora_weights", None) != "pissa":
            raise
        raise AlignError(
            "tuning 'pissa' takes the principal components of linear layers, and the experts of "
            f"{type(base_model(model)).__name__} are none: use 'lora', or name other target_modules"
        ) from error


def _adapter_state(model: PeftModel, weights: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    return get_peft_model_state_dict(model, state_dict=weights, adapter_name="default")


def names_in_model(model: PeftModel) -> dict[str, str]:
    """What each weight of the adapter's file is called in the state dict of `model`."""
    state = model.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    return {key: names[id(tensor)] for key, tensor in _adapter_state(model, state).items()}


def save_adapter(model: PeftModel, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the adapter of `model` as a folder that peft loads on the base that it names.

    Args:
        weights: the weights that train, instead of the model's own, where those are in shards.

    PiSSA took its starting values A₀, B₀ out of the base, which is not what is on disk. What it learned, BA - B₀A₀, is LoRA of
    twice the rank: [B | -B₀] [A ; A₀] (arXiv:2404.02948, App. C). A weight that has fewer components than the rank gets zeros for
    the others, as peft loads all layers by the one rank.
    """
    only = {"selected_adapters": ["default"]}  # TRL adds a copy as its reference; it is not what was trained
    start = getattr(model, "pissa_start", None)
    if start is None:
        model.save_pretrained(folder, state_dict=weights, **only)
        return
    state, config = _adapter_state(model, weights), model.peft_config["default"]
    for name, first in start.items():
        if ".lora_A." in name:
            both = torch.cat([state[name], first.to(state[name].device)], dim=0)
            state[name] = pad(both, (0, 0, 0, 2 * config.r - len(both)))
        elif ".lora_B." in name:
            both = torch.cat([state[name], -first.to(state[name].device)], dim=1)
            state[name] = pad(both, (0, 2 * config.r - both.shape[1]))
    doubled = copy(config)
    doubled.r, doubled.lora_alpha, doubled.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True
    if config.use_rslora:  # alpha / sqrt(2 r) is to be what alpha / sqrt(r) was
        doubled.use_rslora, doubled.lora_alpha = False, 2 * config.lora_alpha * config.r**0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    doubled.inference_mode = True
    doubled.save_pretrained(folder)
