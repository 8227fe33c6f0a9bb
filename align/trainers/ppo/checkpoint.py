"""Checkpoints: tensors as safetensors, the rest as JSON, written aside, flushed and renamed, so that what is there is whole.

Between two checkpoints the scored completions of every step are kept as well: a run that goes on does not sample them again.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align.runner.files import flush, write_atomically
from align.trainers.ppo import processes


@dataclass(frozen=True)
class State:
    """What a run is made of at the end of a step."""

    tensors: dict[str, Tensor]
    plain: dict[str, Any]
    own: dict[str, Any]
    """What each process has of its own."""


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        every: steps between two.
        keep: how many stay.
    """

    def __init__(self, folder: Path, every: int, keep: int) -> None:
        self.folder, self.every, self.keep = folder, every, keep
        self.rollouts = folder / "rollouts"

    def latest(self) -> int | None:
        """The step of the last one."""
        steps = [int(path.name.rpartition("-")[2]) for path in self.folder.glob("checkpoint-*")]
        return max(steps, default=None)

    def clear(self) -> None:
        """Take all of them away."""
        if processes.number() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        processes.wait()

    def save(self, step: int, state: State) -> None:
        """Write one for `step`; the oldest beyond `keep` go, and so do kept completions."""
        aside, place = self.folder / f".checkpoint-{step}", self._place(step)
        if processes.number() == 0:
            for leftover in self.folder.glob(".checkpoint-*"):
                shutil.rmtree(leftover)
            aside.mkdir(parents=True)
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            save_file(contiguous, aside / "state.safetensors")
            flush(aside / "state.safetensors")
            write_atomically(aside / "state.json", json.dumps({"step": step, **state.plain}))
        processes.wait()
        write_atomically(aside / f"process-{processes.number()}.json", json.dumps(state.own))
        processes.wait()
        if processes.number() == 0:
            flush(aside)
            os.replace(aside, place)
            flush(self.folder)
            for old in sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))[: -self.keep]:
                # Under another name first: what is half taken away must not look like a checkpoint.
                os.replace(old, self.folder / f".{old.name}")
                shutil.rmtree(self.folder / f".{old.name}")
            shutil.rmtree(self.rollouts, ignore_errors=True)
        processes.wait()

    def load(self, step: int) -> State:
        """The one for `step`."""
        place = self._place(step)
        own = json.loads((place / f"process-{processes.number()}.json").read_text())
        return State(load_file(place / "state.safetensors"), json.loads((place / "state.json").read_text()), own)

    def keep_rollout(self, step: int, rollout: dict[str, Any]) -> None:
        """Keep what this process sampled in `step`."""
        write_atomically(self._rollout(step), json.dumps(rollout))

    def rollout(self, step: int) -> dict[str, Any] | None:
        """What this process kept of `step`; None unless every process has."""
        path = self._rollout(step)
        return json.loads(path.read_text()) if processes.all_of(path.is_file()) else None

    def _place(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _rollout(self, step: int) -> Path:
        return self.rollouts / f"{step}-{processes.number()}.json"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by ``PARAMETER.NAME``."""
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """The inverse, with the settings of its groups."""
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def random_state(*generators: torch.Generator) -> dict[str, Any]:
    """The state of every source of randomness of this process, and of `generators`, as JSON holds it."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": [_text(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "own": [_text(generator.get_state()) for generator in generators],
    }


def restore_random_state(state: dict[str, Any], *generators: torch.Generator) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_tensor(text) for text in state["cuda"]])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for generator, text in zip(generators, state["own"], strict=True):
        generator.set_state(_tensor(text))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
