"""The state of a `transformers.Trainer` as safetensors and JSON: nothing is unpickled, and any number of processes can go on.

Weights are written by the Trainer. Optimizer states are keyed by parameter names and gathered, so that a checkpoint of two
processes resumes with one and the other way round, under DDP and FSDP2 alike. What was summed since the last log is kept too: a
resumed run logs the same numbers.
"""

from __future__ import annotations

import json
import os
import random
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from align import shards
from align.allocator import moments_first
from align.errors import AlignError
from align.guarded import WarmTrainer
from align.runner.checkpoints import fault, learning_rate_scale, resuming
from align.tuning.adapters import names_in_model

OPTIMIZER, PROGRESS, RANDOM = "optimizer.safetensors", "progress.json", "random-{}.json"
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"


class SafeTrainer(WarmTrainer):
    """A Trainer that saves and resumes without pickles. Subclasses add to `progress`."""

    def progress(self) -> dict[str, Any]:
        """What was seen so far and is not in the Trainer's own state, as JSON."""
        return {
            "tr_loss": self.accelerator.gather(self._tr_loss.reshape(1)).mean().item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
        }

    def restore_progress(self, progress: dict[str, Any]) -> None:
        """Take up what `progress` returned."""
        self._tr_loss = torch.tensor(progress["tr_loss"], device=self.args.device)
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]

    # -- what the Trainer calls --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        optimizer: Optimizer = super().create_optimizer(model)
        if self.accelerator.num_processes == 1:  # shards are made of the weights later
            moments_first(optimizer)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:
            weights = whole_weights(self)
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        # Every process takes part, as shards are gathered and sums are over all of them; the first has the result.
        content: dict[str, Any] = {"progress": self.progress()}
        if self.is_deepspeed_enabled:  # which keeps its state in files of its own
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            state: dict[str, Any] = get_optimizer_state_dict(self.model_wrapped, self._optimizer(), options=_OPTIONS)
            if self.args.should_save:
                tensors = {
                    f"{name}/{key}": torch.as_tensor(value).contiguous()
                    for name, values in state["state"].items()
                    for key, value in values.items()
                }
                save_file(tensors, folder / OPTIMIZER)
                scheduler = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
                content |= {"groups": state["param_groups"], "scheduler": scheduler, "scale": learning_rate_scale(folder.parent)}
        if self.args.should_save:
            (folder / PROGRESS).write_text(json.dumps(content))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        folder = Path(checkpoint)
        with resuming(folder):
            content = json.loads((folder / PROGRESS).read_text())
            state: dict[str, dict[str, Tensor]] = {}
            for key, tensor in load_file(folder / OPTIMIZER).items():
                name, _, part = key.rpartition("/")
                state.setdefault(name, {})[part] = tensor
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=self.args.world_size > 1)
            saved = {"state": state, "param_groups": content["groups"]}
            self._check_shapes(state)
            set_optimizer_state_dict(self.model_wrapped, self._optimizer(), saved, options=options)
            self.lr_scheduler.load_state_dict({**self.lr_scheduler.state_dict(), **content["scheduler"]})
            self._scale_learning_rate(learning_rate_scale(folder.parent) / content["scale"])

    def _check_shapes(self, state: dict[str, dict[str, Tensor]]) -> None:
        shapes = {name.replace("module.", "", 1): tuple(p.shape) for name, p in self.model_wrapped.named_parameters()}
        for name, parts in state.items():
            if name in shapes and (
                bad := {k: tuple(t.shape) for k, t in parts.items() if t.dim() and tuple(t.shape) != shapes[name]}
            ):
                raise ValueError(f"{name} has the shape {shapes[name]}, its optimizer state {bad}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not any((folder / name).is_file() for name in (WEIGHTS, ADAPTER, f"{WEIGHTS}.index.json")):
            raise AlignError(f"the checkpoint {folder} holds no {WEIGHTS} and no {ADAPTER}; remove it to start before it")
        try:
            if self.is_fsdp_enabled:
                options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
                set_model_state_dict(model or self.model, _weights_in(folder, model or self.model), options=options)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise AlignError(f"the checkpoint {folder} does not fit the model ({_line(error)}); remove it") from error

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if reason := fault(best):
            raise AlignError(
                f"the best weights are those of {best}, and {reason}; the same command goes on from a checkpoint before"
            )
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(str(best))
        else:
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        numpy = np.random.get_state(legacy=False)
        numpy["state"]["key"] = numpy["state"]["key"].tolist()
        state: dict[str, Any] = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state().tolist()}
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state().tolist()
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RANDOM.format(self.args.process_index)).write_text(json.dumps(state))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        file = folder / RANDOM.format(self.args.process_index)
        with resuming(folder):
            state = json.loads((file if file.is_file() else folder / RANDOM.format(0)).read_text())
            version, internal, gauss = state["python"]
            random.setstate((version, tuple(internal), gauss))
            np.random.set_state(state["numpy"])
            torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
            if torch.cuda.is_available() and "cuda" in state:
                torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
            self.restore_progress(json.loads((folder / PROGRESS).read_text())["progress"])

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.accelerator.distributed_type is DistributedType.MULTI_CPU:
            # accelerate shards on GPUs only. Without one it does so over gloo, if told after it was made: how FSDP is tested here.
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
            for state in (AcceleratorState, PartialState):  # of which the one asks the other
                state._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            # In place of autocast accelerate would gather weights, add gradients and return log-probs and scores in 16 bits.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def compute_loss_context_manager(self) -> ExitStack:
        """With autocast under FSDP2, too: mixed precision is what it is in one process."""
        stack = super().compute_loss_context_manager()
        if self.is_fsdp_enabled:
            stack.enter_context(self.accelerator.autocast())
        return stack

    # -- its pieces ----------------------------------------------------------------------------------------------------------------

    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._scale_learning_rate(learning_rate_scale(Path(self.args.output_dir)))
        return scheduler

    def _scale_learning_rate(self, factor: float) -> None:
        if factor == 1.0:
            return
        for name in ("base_lrs", "_last_lr"):
            setattr(self.lr_scheduler, name, [rate * factor for rate in getattr(self.lr_scheduler, name)])
        for group in self._optimizer().param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor


_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def whole_weights(trainer: Any) -> dict[str, Tensor]:
    """The model's weights, gathered from all processes; all of them must ask. Beside an adapter those that train: its base is on
    disk.
    """
    model = trainer.model_wrapped
    if trainer.is_deepspeed_enabled:
        return shards.each_once(model, trainer.accelerator.get_state_dict(model))
    return shards.whole_weights(model)


def _weights_in(folder: Path, model: Any) -> dict[str, Any]:
    """The weights of a checkpoint, by the names that they have in `model`."""
    if isinstance(model, PeftModel):
        saved = load_file(folder / ADAPTER)
        return {name: saved[key] for key, name in names_in_model(model).items()}
    return {name: tensor for file in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(file).items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
