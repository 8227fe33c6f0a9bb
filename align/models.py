"""Loading, adapting and saving models: transformers and peft do the work, this module holds the choices."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME

from align.errors import AlignError, first_line, near_file, near_miss
from align.runner.files import json_record
from align.tuning.adapters import HEADS, save_adapter
from align.tuning.soft import SOFT_TYPES, load_soft_prompt

UNREADABLE = (OSError, ValueError, KeyError, StrictDataclassError)
"""What transformers raises of a folder that holds no model, or a damaged one; the last is of a value of the wrong type."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """Where models run: on the GPU, where torch sees one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


ADAPTER = "adapter_config.json"
"""In the folder of any adapter of peft's."""


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with a PEFT adapter instead of whole weights."""
    return (Path(path) / ADAPTER).is_file()


def adapter_config(path: str) -> dict[str, Any] | None:
    """What the adapter in the folder `path` says of itself (``base_model_name_or_path``, ``task_type`` …); None without one.

    Raises:
        AlignError: the file is damaged.
    """
    config = json_record(Path(path) / ADAPTER) if is_adapter(path) else None
    for name in ("base_model_name_or_path", "task_type", "peft_type"):
        if config is not None and name not in config:
            raise AlignError(f"{Path(path) / ADAPTER} has no {name!r}, which peft writes for every adapter: save it again")
    return config


def adapter_base(path: str) -> str:
    """The base that the adapter in the folder `path` names. Where that was a folder and is gone, the two may have been moved
    together: it is the folder of that name within the adapter's, or beside it.

    Raises:
        AlignError: it names none.
    """
    config = adapter_config(path)
    if config is None or config["base_model_name_or_path"] is None:
        raise AlignError(f"{path} is an adapter of no base: write one as base_model_name_or_path into its {ADAPTER}")
    named = str(config["base_model_name_or_path"])
    if not Path(named).is_absolute() or Path(named).is_dir():
        return named
    here = Path(path).resolve()
    moved = (place / Path(named).name for place in (here, here.parent))
    return next((str(folder) for folder in moved if (folder / "config.json").is_file()), named)


def family_of(config: Any) -> Literal["causal", "masked", "encoder-decoder"]:
    """What kind of language model a transformers config describes: what it was trained for where the config says so, else the first
    that its type can be.
    """
    if config.is_encoder_decoder:
        return "encoder-decoder"
    named = " ".join(config.architectures or ())
    causal = "CausalLM" in named or "LMHeadModel" in named or getattr(config, "is_decoder", False)
    return "masked" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal else "causal"


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""One of these is in any folder with a tokenizer."""


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id.

    Raises:
        AlignError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        if os.path.isdir(path) and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
            if not (Path(path) / "config.json").is_file():
                raise AlignError(f"{path} is no model's folder: it holds neither a config.json nor a tokenizer") from error
            raise AlignError(
                f"{path} holds no tokenizer: copy the one that the model was trained with into it (tokenizer.json and "
                "tokenizer_config.json)"
            ) from error
        raise AlignError(_not_loadable("tokenizer", path, error)) from error


CLASSIFIERS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
)
"""How transformers' classes and peft's types end that answer with scores."""

OnAdapter = Literal["merge", "continue"]
"""What becomes of an adapter that is loaded: a part of the weights, or what is trained further."""


def load_causal_lm(
    path: str, *, dtype: str = "float32", trust_remote_code: bool = False, on_adapter: OnAdapter = "merge", four_bits: bool = False
) -> nn.Module:
    """A causal language model from a folder or hub id. An adapter comes back merged into its base, or on it, to be continued.
    Virtual tokens (prefix and prompt tuning) cannot be merged: they come back in front of their base.

    Args:
        four_bits: hold the weights in 4 bits (NF4), for LoRA on top of them.

    Raises:
        AlignError: there is no such model, or none that writes from left to right; or nothing to continue; 4 bits are not to be had
            here.
    """
    return load_model(
        AutoModelForCausalLM, path, dtype=dtype, trust_remote_code=trust_remote_code, on_adapter=on_adapter, four_bits=four_bits
    )


def load_language_model(path: str, *, trust_remote_code: bool = False, **options: Any) -> nn.Module:
    """The language model of whatever family the folder or hub id `path` holds; arguments as for `load_causal_lm`.

    Raises:
        AlignError: there is no such model.
    """
    auto = LANGUAGE_MODELS[family_of(load_config(path, trust_remote_code=trust_remote_code))]
    return load_model(auto, path, trust_remote_code=trust_remote_code, **options)


def load_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a folder or hub id; of an adapter, that of its base.

    Raises:
        AlignError: there is none.
    """
    source = adapter_base(path) if is_adapter(path) else path
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise AlignError(_not_loadable("config", path, error)) from error


def is_classifier(path: str, *, trust_remote_code: bool = False) -> bool:
    """Whether the model or adapter at `path` answers with scores (a reward model or a classifier), not with words."""
    adapter = adapter_config(path)
    if adapter is not None:
        return (adapter["task_type"] or "").endswith(CLASSIFIERS)
    kinds = load_config(path, trust_remote_code=trust_remote_code).architectures
    return any(kind.endswith(CLASSIFIERS) for kind in kinds or ())


def load_reward_model(
    path: str, *, dtype: str = "float32", trust_remote_code: bool = False, on_adapter: OnAdapter = "merge", four_bits: bool = False
) -> nn.Module:
    """A sequence classifier with one output. On a model without a score head the head starts at zero, so the start is the same
    for every seed. Arguments as for `load_causal_lm`.

    Raises:
        AlignError: there is no such model, it has several outputs, or it cannot be continued as a reward model.
    """
    model: Any = load_model(
        AutoModelForSequenceClassification,
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        on_adapter=on_adapter,
        four_bits=four_bits,
        num_labels=1,
    )
    if not hasattr(model, "score"):
        raise AlignError(f"{path}: {type(model).__name__} has no linear score head on its last hidden state")
    return model


def load_model(
    auto: Any,
    path: str,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    on_adapter: OnAdapter = "merge",
    four_bits: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A model by the transformers class `auto`; a head that is not on disk is new.

    Args:
        kwargs: fields of its config. The other arguments are those of `load_causal_lm`.

    Raises:
        AlignError: there is no such model, its family has no such class, or a language model is wanted and it is a classifier.
    """
    if dtype not in DTYPES:
        raise AlignError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    adapter = adapter_config(path)
    if adapter is None and on_adapter == "continue":
        raise AlignError(f"{path} is a whole model, not an adapter that could be continued: leave on_adapter at merge")
    if adapter is not None and adapter["task_type"] == "CAUSAL_LM" and auto is AutoModelForSequenceClassification:
        return _with_score_head(path, dtype, trust_remote_code, on_adapter, four_bits)
    if four_bits:
        kwargs["quantization_config"] = _in_four_bits(path, merged=adapter is not None and on_adapter == "merge")
    source = path if adapter is None else adapter_base(path)
    try:
        if auto is AutoModelForCausalLM:
            family = family_of(AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code))
            if family != "causal":
                raise AlignError(
                    f"{path} is of the family {family!r}, and this takes a causal language model; `align task` trains others"
                )
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
        new = [key for key in info["missing_keys"] if not re.fullmatch(HEADS, key)]  # such as the pooler of a masked language model
        model.rows_on_disk = None if new else model.get_input_embeddings().weight.shape[0]
        if adapter is not None:
            if (Path(path) / GENERATION_CONFIG_NAME).is_file():  # the end tokens that training taught
                model.generation_config = GenerationConfig.from_pretrained(path)
            model = _with_adapter(model, path, adapter["peft_type"], on_adapter)
    except (*UNREADABLE, RuntimeError, SafetensorError) as error:  # the last is of a file that was cut
        raise AlignError(_not_loadable("model", path, error)) from error
    if auto is AutoModelForCausalLM and not hasattr(model.config, "vocab_size"):  # it is in the config of a part
        raise AlignError(f"{path} is a {type(model).__name__}, made of several models (for pictures, say): take one for text alone")
    # Transformers gives a classifier a language head of random weights.
    if auto in LANGUAGE_MODELS.values() and is_classifier(path, trust_remote_code=trust_remote_code):
        raise AlignError(
            f"{path} is a reward model or a classifier and has no language head; take the language model that it was made from"
        )
    return model


def _with_adapter(model: Any, path: str, kind: str, on_adapter: OnAdapter) -> Any:
    if kind in SOFT_TYPES:
        return load_soft_prompt(model, path, trainable=on_adapter == "continue")
    if on_adapter == "continue":
        return PeftModel.from_pretrained(model, path, is_trainable=True)
    model = PeftModel.from_pretrained(model, path).merge_and_unload()
    model.merged_from = path
    return model


def _in_four_bits(path: str, *, merged: bool) -> Any:
    """How bitsandbytes is to hold the weights.

    Raises:
        AlignError: there is no GPU or no bitsandbytes, or the model is an adapter to be merged first.
    """
    if not torch.cuda.is_available():
        raise AlignError("tuning 'qlora' needs a CUDA GPU for its 4-bit weights, and this machine has none; use tuning 'lora'")
    if find_spec("bitsandbytes") is None:
        raise AlignError("tuning 'qlora' needs bitsandbytes: pip install 'align[qlora]'")
    if merged:
        raise AlignError(f"{path} is an adapter, and 4-bit weights take no merge: `align export {path} --merge` first")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )


def _with_score_head(path: str, dtype: str, trust_remote_code: bool, on_adapter: OnAdapter, four_bits: bool) -> nn.Module:
    """A sequence classifier on the trunk of a causal language model that is an adapter, its head zero.

    Raises:
        AlignError: the adapter would have to be kept.
    """
    if on_adapter == "continue":
        raise AlignError(f"{path} is an adapter of a language model; a reward model has its own head: leave on_adapter at merge")
    model: Any = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code, four_bits=four_bits)
    if isinstance(model, PeftModel):
        raise AlignError(f"{path} are virtual tokens of a language model, which cannot be merged: take the model that it stands on")
    model.config.num_labels = 1
    classifier = AutoModelForSequenceClassification.from_config(model.config, dtype=model.dtype)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    nn.init.zeros_(classifier.score.weight)
    classifier.merged_from = getattr(model, "merged_from", None)
    return classifier


def _not_loadable(what: str, path: str, error: Exception) -> str:
    where = "the folder" if os.path.isdir(path) else f"no folder of that name{near_file(Path(path))}, and the hub gave"
    return f"cannot load a {what} from {path!r}: {where}: {first_line(error)}"


LANGUAGE_MODELS = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM}
"""The transformers class of each family of language models."""


def architecture_config(architecture: dict[str, Any]) -> Any:
    """The transformers config that `architecture` describes: ``model_type`` and the fields of its config.

    Raises:
        AlignError: the model type or one of the fields is unknown, or values do not fit.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type", "llama")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError as error:
        raise AlignError(f"architecture: model_type {model_type!r} is unknown to transformers") from error
    if unknown := fields.keys() - known.keys():
        name = min(unknown)
        raise AlignError(f"architecture: a {model_type} config has no {name!r}{near_miss(name, known)}")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (StrictDataclassError, ValueError, ZeroDivisionError) as error:
        raise AlignError(f"architecture: {first_line(error.__cause__ or error)}") from error


def build_model(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """A language model of the family of `architecture` with random weights, and embeddings for `tokenizer`.

    Raises:
        AlignError: as from `architecture_config`; or it describes no model that can be built.
    """
    config = architecture_config(architecture)
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in {"vocab_size": len(tokenizer), **special}.items():
        if name not in architecture:
            setattr(config, name, value)
    if config.is_encoder_decoder and "decoder_start_token_id" not in architecture:
        config.decoder_start_token_id = tokenizer.pad_token_id
    try:
        return LANGUAGE_MODELS[family_of(config)].from_config(config)
    except (ValueError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise AlignError(f"architecture: no model can be built of it: {first_line(error)}") from error


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


def settle_generation(model: Any) -> list[str]:
    """Leave out what does nothing in the model's generation config, such as a temperature without `do_sample`, and return the
    names: transformers refuses to save such a config once anything in it was changed, as a padding or an end token is.
    """
    config = getattr(model, "generation_config", None)
    try:
        if config is not None:
            config.validate(strict=True)
        return []
    except ValueError as error:
        named = re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
    for name in named:
        setattr(config, name, None)
    return named


def disable_dropout(model: nn.Module) -> None:
    """Switch dropout off for good: the probabilities compared in preference losses and PPO must come from one and the same
    network. (Falcon alone reads its shares from the config, where published models have 0.)
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Many families drop out by a function, with a share of their own: `dropout`, `hidden_dropout`, `attn_pdrop` …
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(module, name, 0.0)


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write `model` and `tokenizer` (chat template included) as a folder that ``from_pretrained`` loads.

    Args:
        weights: what to write instead of the model's own, where those are in shards.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, folder, weights)
        base: Any = model.get_base_model()
        if base.can_generate():  # its end tokens are the adapter's, too, and peft does not keep them
            base.generation_config.save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=weights)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
