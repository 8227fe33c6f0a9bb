"""Log-probs under the reference: computed once, kept on disk, and found there by every later run from the same weights and rows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align import __version__, processes
from align.budget import MaxTokens
from align.engine import base_model
from align.forest import Tree
from align.progress import say
from align.registry import home
from align.scoring import branch_logps, dealt
from align.tuning.tune import untouched

IN_ADAPTER = re.compile(r"\.(lora|ia3)_")
"""Names of an adapter's weights inside its base."""


def reference_logps(model: nn.Module, trees: Sequence[Tree], max_tokens: MaxTokens, label: str) -> list[list[float]]:
    """Log-probs (nats) of each tree's branches under `model` as it is before training; a new adapter is off.

    They are kept in ``$ALIGN_HOME/cache/reference_logps``, under a hash of all that they depend on: the weights themselves, the
    model's config, and the tokens (which say what the data, the chat template and the maximum length made of the rows). Of several
    processes the first looks there; where it finds nothing, each computes those of a share of the trees.
    """
    said = f"{label}: log-probs of {len(trees)} rows under the reference"
    path = _place(model, trees) if processes.number() == 0 else None
    kept = processes.first(None if path is None else _kept(path, trees, said))
    if kept is not None:
        return kept
    say(f"{said}: computed once")
    with untouched(model):
        logps = dealt(trees, partial(branch_logps, model, max_tokens=max_tokens))
    if path is not None:
        _write(path, torch.tensor([value for values in logps for value in values], dtype=torch.float64))
    return logps


def _place(model: nn.Module, trees: Sequence[Tree]) -> Path:
    return home() / "cache" / "reference_logps" / f"{_key(model, trees)}.safetensors"


def _kept(path: Path, trees: Sequence[Tree], said: str) -> list[list[float]] | None:
    """What the file has for `trees`; None where there is none, or a damaged one."""
    if not path.is_file():
        return None
    try:
        kept = iter(_read(path, sum(len(tree.branches) for tree in trees)))
    except (SafetensorError, ValueError) as error:
        say(f"{said}: the cache's {path} is damaged ({error})")
        return None
    say(f"{said}: from the cache")
    return [[next(kept) for _ in tree.branches] for tree in trees]


def _key(model: nn.Module, trees: Sequence[Tree]) -> str:
    """SHA-256 over everything that the log-probs depend on."""
    config = {name: value for name, value in base_model(model).config.to_dict().items() if name != "_name_or_path"}
    # On another kind of device half precision rounds differently.
    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    digest = hashlib.sha256(json.dumps([__version__, device, autocast, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(base_weights(model).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(_bytes(tensor))
    for tree in trees:
        digest.update(json.dumps([tree.prompt, tree.prompt_mask, tree.branches]).encode())
    return digest.hexdigest()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that answer before training: those of the base, where a new adapter is off, by the names that they have without
    one.
    """
    if not getattr(model, "off_is_base", False):
        return model.state_dict()
    state = base_model(model).state_dict()
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not IN_ADAPTER.search(name)}


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(path: Path, logps: Tensor) -> None:
    """Written aside and renamed, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        aside = Path(folder) / path.name
        save_file({"logps": logps}, aside, metadata={"sha256": hashlib.sha256(_bytes(logps)).hexdigest()})
        os.replace(aside, path)


def _read(path: Path, branches: int) -> list[float]:
    """The numbers of a file.

    Raises:
        SafetensorError, ValueError: it is not whole.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        logps = file.get_tensor("logps")
    if logps.shape != (branches,) or metadata.get("sha256") != hashlib.sha256(_bytes(logps)).hexdigest():
        raise ValueError(f"{tuple(logps.shape)} numbers that do not match their checksum, instead of ({branches},)")
    return logps.tolist()
