"""Checkpoints: tensors as safetensors, the rest as JSON, written aside, sealed and renamed, so that what is there is whole.

Any number of processes may go on from them. Between two checkpoints the scored completions of every step are kept as well: a run
that goes on with as many processes does not sample them again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from align import processes
from align.progress import say
from align.runner.checkpoints import last_good, prune, seal, step_of
from align.runner.files import flush, write_atomically
from align.shards import dealt


@dataclass(frozen=True)
class State:
    """What a run is made of at the end of a step."""

    tensors: dict[str, Tensor]
    """Where it is saved, those that the first process writes."""
    plain: dict[str, Any]
    own: dict[str, Any]
    """What each process has of its own."""


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        steps: between two; None makes none for that.
        minutes: between two, besides; None makes none for that.
        keep: how many stay.
        fault_of_best: what is wrong with the best weights until one, which is then set aside.
    """

    def __init__(
        self,
        folder: Path,
        steps: int | None,
        minutes: float | None,
        keep: int,
        fault_of_best: Callable[[Path], str | None] | None = None,
    ) -> None:
        self.folder, self.steps, self.minutes, self.keep = folder, steps, minutes, keep
        self.fault_of_best = fault_of_best
        self.rollouts = folder / "rollouts"
        self._last = time.monotonic()

    def latest(self) -> int | None:
        """The step of the last one that is whole; the first process sets damaged ones aside."""
        found = last_good(self.folder, self.fault_of_best) if processes.number() == 0 else None
        return processes.first(None if found is None else step_of(found))

    def due(self, step: int) -> bool:
        """Whether it is time for one."""
        late = self.minutes is not None and time.monotonic() - self._last >= 60 * self.minutes
        return bool(self.steps and step % self.steps == 0) or processes.any_of(late)

    def clear(self) -> None:
        """Take all of them away."""
        if processes.number() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        processes.wait()

    def save(self, step: int, state: State) -> None:
        """Write one for `step`; the oldest beyond `keep` go, and so do kept completions."""
        aside, place = self.folder / f".checkpoint-{step}", self.place(step)
        if processes.number() == 0:
            for leftover in self.folder.glob(".checkpoint-*"):
                shutil.rmtree(leftover)
            aside.mkdir(parents=True)
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
            save_file(contiguous, aside / "state.safetensors")
            write_atomically(aside / "state.json", json.dumps({"step": step, **state.plain}))
        processes.wait()
        write_atomically(aside / f"process-{processes.number()}.json", json.dumps(state.own))
        processes.wait()
        if processes.number() == 0:
            seal(aside)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(aside, place)
            flush(self.folder)
            prune(self.folder, self.keep, None)
            shutil.rmtree(self.rollouts, ignore_errors=True)
        processes.wait()
        self._last = time.monotonic()

    def place(self, step: int) -> Path:
        """Where the one for `step` is."""
        return self.folder / f"checkpoint-{step}"

    def load(self, step: int) -> State:
        """The one for `step`."""
        place = self.place(step)
        mine, first = (place / f"process-{number}.json" for number in (processes.number(), 0))
        own = json.loads((mine if mine.is_file() else first).read_text())
        return State(load_file(place / "state.safetensors"), json.loads((place / "state.json").read_text()), own)

    def keep_rollout(self, step: int, rollout: dict[str, Any]) -> None:
        """Keep what this process sampled in `step`, with its checksum in a line before it."""
        text = json.dumps(rollout)
        write_atomically(self._rollout(step), f"{_sealed(text)}\n{text}")

    def rollout(self, step: int) -> dict[str, Any] | None:
        """What this process kept of `step`; None unless every process has, undamaged."""
        path = self._rollout(step)
        line, _, text = path.read_text(errors="replace").partition("\n") if path.is_file() else ("", "", "")
        whole = line == _sealed(text)
        if line and not whole:
            say(f"{path} is damaged: what it held is sampled again")
        return json.loads(text) if processes.all_of(whole) else None

    def _rollout(self, step: int) -> Path:
        return self.rollouts / f"{step}-{processes.number()}-of-{processes.count()}.jsonl"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by ``PARAMETER.NAME``."""
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], groups: list[dict[str, Any]]) -> None:
    """The inverse, with the settings of its groups."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        states.setdefault(int(number), {})[name] = dealt(value, trained[int(number)]) if value.dim() else value
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def random_state(*generators: torch.Generator) -> dict[str, Any]:
    """The state of every source of randomness of this process, and of `generators`, as JSON holds it."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,  # of the process' own device
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "own": [_text(generator.get_state()) for generator in generators],
    }


def restore_random_state(state: dict[str, Any], *generators: torch.Generator) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(_tensor(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    for generator, text in zip(generators, state["own"], strict=True):
        generator.set_state(_tensor(text))


def _sealed(text: str) -> str:
    """The line that goes before `text`."""
    return json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest()})


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
