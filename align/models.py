"""Loading, adapting and saving models: transformers and peft do the work, this module holds the choices."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from align.errors import AlignError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with a PEFT adapter instead of whole weights."""
    return (Path(path) / "adapter_config.json").is_file()


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        AlignError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise AlignError(_not_loadable("tokenizer", path, error)) from error


def load_causal_lm(path: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> nn.Module:
    """A causal language model from a folder or hub id. An adapter comes back merged into its base.

    Raises:
        AlignError: there is no such model.
    """
    return _load(AutoModelForCausalLM, path, dtype, trust_remote_code)


def load_reward_model(path: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> nn.Module:
    """A sequence classifier with one output. On a model without a score head the head starts at zero, so the start is the same
    for every seed.

    Raises:
        AlignError: there is no such model, or it has several outputs.
    """
    model: Any = _load(AutoModelForSequenceClassification, path, dtype, trust_remote_code, num_labels=1)
    if not hasattr(model, "score"):
        raise AlignError(f"{path}: {type(model).__name__} has no linear score head on its last hidden state")
    return model


def _load(auto: Any, path: str, dtype: str, trust_remote_code: bool, **kwargs: Any) -> nn.Module:
    if dtype not in DTYPES:
        raise AlignError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    adapter = json.loads((Path(path) / "adapter_config.json").read_text()) if is_adapter(path) else None
    if adapter is not None and adapter["task_type"] == "CAUSAL_LM" and auto is AutoModelForSequenceClassification:
        return _with_score_head(load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code))
    source = path if adapter is None else adapter["base_model_name_or_path"]
    try:
        model, info = auto.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **kwargs,
        )
        if any(key.startswith("score.") for key in info["missing_keys"]):
            nn.init.zeros_(model.score.weight)
        model.rows_on_disk = _embedding_rows(model)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, path).merge_and_unload()
            model.merged_from = path
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise AlignError(_not_loadable("model", path, error)) from error
    return model


def _embedding_rows(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _with_score_head(model: Any) -> nn.Module:
    """A sequence classifier on the trunk of a causal language model, its head zero."""
    model.config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(model.config, dtype=model.dtype)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    nn.init.zeros_(classifier.score.weight)
    classifier.merged_from = getattr(model, "merged_from", None)
    return classifier


def _not_loadable(what: str, path: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    where = "the folder" if os.path.isdir(path) else "no folder of that name, and the hub gave"
    return f"cannot load a {what} from {path!r}: {where}: {first}"


def build_causal_lm(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """A model with random weights: `architecture` holds ``model_type`` and the fields of its config.

    Raises:
        AlignError: the model type or one of the fields is unknown.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type", "llama")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError as error:
        raise AlignError(f"architecture: model_type {model_type!r} is unknown to transformers") from error
    if unknown := fields.keys() - known.keys():
        raise AlignError(f"architecture: a {model_type} config has no {sorted(unknown)[0]!r}")
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **fields})
    return AutoModelForCausalLM.from_config(config)


def ensure_pad_token(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Give `tokenizer` and `model` a padding token other than the end token.

    A score head reads the last token that is not padding: with padding = end token it would skip the end of every answer.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
            if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[operator]
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # type: ignore[operator]
    model.config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id  # type: ignore[union-attr]


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: what the generation config says, and the tokenizer's end token."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    return ids


@dataclass(frozen=True)
class Lora:
    """What to put on the model's linear layers (all but the head where `target_modules` is None)."""

    r: int
    alpha: int
    dropout: float
    target_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False


def add_lora(model: nn.Module, lora: Lora, folder: Path | None = None) -> PeftModel:
    """Freeze `model` and put LoRA adapters on it. A score head is trained and saved with the adapter.

    An adapter's folder must name a base that loads. A model that was merged from an earlier adapter exists nowhere on disk, so it
    is written to ``folder/base`` first (without a `folder` the adapter cannot be saved for later).

    Raises:
        AlignError: a target module is not in the model.
    """
    base: Any = model
    on_disk = getattr(base, "rows_on_disk", None) == _embedding_rows(base) and not getattr(base, "merged_from", None)
    if not on_disk and folder is not None:
        base.save_pretrained(folder / "base")
        base.name_or_path = str((folder / "base").resolve())
    config = LoraConfig(
        task_type="SEQ_CLS" if hasattr(base, "score") else "CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise AlignError(f"lora_target_modules {lora.target_modules}: {error}") from error


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: the probabilities compared in preference losses and PPO must come from one and the same
    network.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write `model` and `tokenizer` (chat template included) as a folder that ``from_pretrained`` loads."""
    # TRL adds a copy of the adapter as its reference; it is not what was trained.
    only: dict[str, Any] = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, **only)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
