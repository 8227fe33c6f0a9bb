"""Export: a model as one folder that needs nothing of ours, with a card that says where it came from, and checked before it is
there.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from align.artifact import Artifact, library_versions
from align.errors import AlignError
from align.models import (
    DTYPES,
    is_adapter,
    is_classifier,
    load_config,
    load_language_model,
    load_reward_model,
    load_tokenizer,
)
from align.progress import say
from align.registry import Registry
from align.runner.files import named_when_full, refuse_unwritable
from align.tasks.base import TASK_FILE, is_task_model, read_task

TEMPLATES = Path(__file__).parent.parent / "templates"
SAME = 1e-4
"""Logits in fp32 that differ by at most this share of the largest (or by this much, where that is below 1) are the same."""

KEPT = ("score_scale.json", TASK_FILE)
"""Files of ours beside a model that belong to it."""

PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForConditionalGeneration": "text2text-generation",
}
"""What a model's card says that it is for, by the end of its class; others go on with a text."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    dtype: str
    parameters: int
    shards: int
    bytes: int
    largest_difference: float
    """Between the logits of the model before and after, over random tokens."""


def export(
    reference: str,
    to: Path,
    *,
    merge: bool,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    registry: Registry | None = None,
) -> Exported:
    """Write the model that `reference` names (see `Registry.resolve`) to the folder `to`: whole weights in shards of safetensors,
    tokenizer, chat template and a model card. It is loaded back and compared first; nothing is there unless it is right.

    Args:
        merge: allow an adapter to become part of its base.
        dtype: of the weights; by default that of the base. Adapters are merged in fp32 whatever it is.

    Raises:
        AlignError: there is no such model; it is a classifier that is no reward model and no task's; it is an adapter and `merge`
            is false; it cannot be merged; `to` is taken or cannot be made; or what was written answers differently.
    """
    registry = registry or Registry()
    resolved = registry.resolve(reference)
    if to.exists():
        raise AlignError(f"{to} exists, and an export overwrites nothing: name another folder, or remove it")
    refuse_unwritable(to.parent)
    if dtype is not None and dtype not in DTYPES:
        raise AlignError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", max_shard_size, re.IGNORECASE):
        raise AlignError(f"max_shard_size {max_shard_size!r} is not a size such as 500MB or 5GB")
    adapter = is_adapter(resolved.path)
    if adapter and not merge:
        raise AlignError(f"{reference} is an adapter: add --merge to export it as a part of its base")
    tokenizer = load_tokenizer(resolved.path)
    model, stored = _load(resolved.path, adapter, tokenizer)
    before = _logits(model)
    if adapter:
        model = model.merge_and_unload()
    dtype = dtype or stored
    model.to(DTYPES[dtype])
    to.parent.mkdir(parents=True, exist_ok=True)
    with named_when_full(to), tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as folder:
        aside = Path(folder) / to.name
        model.save_pretrained(aside, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(aside)
        for name in KEPT:
            if (Path(resolved.path) / name).is_file():
                shutil.copy(Path(resolved.path) / name, aside / name)
        parameters, kind = sum(p.numel() for p in model.parameters()), type(model)
        del model
        difference = _difference(before, _logits(kind.from_pretrained(aside, dtype=torch.float32)))
        if dtype == "float32" and difference > SAME * max(1.0, before.abs().max().item()):
            raise AlignError(f"{reference}: the exported model's logits differ by {difference:.1e}; nothing was written")
        files = sorted(aside.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        exported = Exported(str(to.resolve()), dtype, parameters, len(files), size, difference)
        (aside / "README.md").write_text(_card(reference, resolved.artifact, registry, exported, kind.__name__), encoding="utf-8")
        shutil.move(str(aside), to)
    say(f"{reference}: written to {to}: {parameters:,} parameters in {dtype}; logits differ by at most {difference:.1e}")
    return exported


def _load(path: str, adapter: bool, tokenizer: PreTrainedTokenizerBase) -> tuple[Any, str]:
    """The model in fp32 with its head, its adapter not merged, and the type that its weights are stored in."""
    config = load_config(path)
    load: Callable[..., nn.Module] = load_language_model
    if is_task_model(path):
        load = read_task(path, tokenizer).model
    elif is_classifier(path):
        load = load_reward_model
        if not adapter and config.num_labels > 1:
            raise AlignError(
                f"{path} is a classifier of {config.num_labels} labels, neither a reward model nor a task's: its folder is a plain "
                "one already"
            )
    model: Any = load(path, on_adapter="continue" if adapter else "merge")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise AlignError(
            f"{path} are virtual tokens ({model.active_peft_config.peft_type.value}), which are no part of the weights: use the "
            "folder as it is, with peft, on the model that it names"
        )
    return model, _type_of(config)


def _type_of(config: Any) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == config.dtype), "float32")


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Of eight rows of random tokens, without padding: (rows, numbers), all that the model says of a row."""
    config: Any = model.config
    ids = torch.randint(config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    if config.is_encoder_decoder:
        ids[:, -1] = config.eos_token_id  # where their classifiers read an answer
    said = []
    for row in ids.split(1):
        answer = {"decoder_input_ids": row[:, :8]} if config.is_encoder_decoder and hasattr(model, "lm_head") else {}
        output = model.eval()(input_ids=row, attention_mask=torch.ones_like(row), **answer)
        # A model that marks a span has logits of its start and of its end.
        said.append(torch.cat([value.float().flatten() for name, value in output.items() if name.endswith("logits")]))
    return torch.stack(said)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


# -- the card --------------------------------------------------------------------------------------------------------------------


def _card(reference: str, artifact: Artifact | None, registry: Registry, exported: Exported, kind: str) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    lineage = registry.lineage(artifact) if artifact is not None and artifact.version else []
    roots = [name for _, name, parent in lineage if parent is None and "/" in name]  # others are of another registry
    described = [
        {
            "depth": depth,
            "reference": _public(name),
            "stage": parent.stage if parent else None,
            "base": name in roots,
            "data": {_public(source): fingerprint for source, fingerprint in parent.data.items()} if parent else {},
        }
        for depth, name, parent in lineage
    ]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": next((tag for end, tag in PIPELINES.items() if kind.endswith(end)), "text-generation"),
        "tags": ["align", *([artifact.stage] if artifact else [])],
    }
    if hub := [root for root in roots if not Path(root).is_absolute()]:
        front["base_model"] = hub[0]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.get_template("card.md.jinja").render(
        front=yaml.safe_dump(front, sort_keys=False).strip(),
        name=artifact.reference if artifact else _public(reference),
        kind=kind,
        exported=exported,
        artifact=artifact,
        metrics=_numbers(artifact.metrics) if artifact else {},
        config=yaml.safe_dump(_public_config(artifact.config), sort_keys=False, allow_unicode=True).strip() if artifact else "",
        lineage=described,
        versions=artifact.versions if artifact else library_versions(),
    )


def _public(reference: str) -> str:
    """A path without the folders it lies in, which are nobody's business."""
    return Path(reference).name if Path(reference).is_absolute() else reference


def _public_config(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public_config(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_public_config(item) for item in value]
    return _public(value) if isinstance(value, str) else value


def _numbers(metrics: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in metrics.items() if isinstance(value, int | float)}
