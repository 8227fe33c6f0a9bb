"""A model whose weights, gradients and optimizer states lie in shards over the processes (FSDP2): a policy and its critic, which no
Trainer divides.

Each pass gathers the weights, a layer at a time, from all processes: so all of them make the same number of passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import SUPPORTED_NODES, register_dataclass

from align import processes
from align.engine import base_model
from align.forest import Tree, plant
from align.heads import TokenScores


def shard(model: nn.Module) -> None:
    """Leave each process a part of every weight of `model`, an enabled one. Gradients become sums over processes."""
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (processes.count(),))
    layers = base_model(model)._no_split_modules or ()
    for module in [*(m for m in model.modules() if type(m).__name__ in layers), model]:
        # Also what is in no layer: between two passes all that the model holds are shards.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    if TokenScores not in SUPPORTED_NODES:  # what a pass returns is gone through for tensors that a backward pass begins with
        register_dataclass(TokenScores)
    with torch.no_grad():  # the first pass must be the whole model's: it finds out what belongs together
        model(forest=plant([Tree([0], ([0],))]).to(next(model.parameters()).device))


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of `model` lie in shards."""
    return isinstance(model, FSDPModule)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within, every process has all weights of `model`, and passes wait for nobody; all processes enter and leave."""
    for part in _parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in _parts(model):
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered(tensor: Tensor) -> Tensor:
    """The whole of `tensor`; all processes ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def kept(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole of each of `tensors` in the main memory of the first process, and nothing in the others; no device holds more than
    one at a time. All processes ask for them.
    """
    first, found = processes.number() == 0, {}
    for name, tensor in tensors.items():
        tensor = gathered(tensor.detach())
        if first:
            found[name] = tensor.cpu()
    return found


def dealt(tensor: Tensor, like: Tensor) -> Tensor:
    """This process' shard of `tensor`, which all of them have, where `like` is one: the inverse of `gathered`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of `model`, gathered from all processes; all of them must ask. Beside an adapter those that train: its base is on
    disk.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=isinstance(model, PeftModel))
    # On a CPU torch leaves shards as they are, though asked for the whole.
    whole = {name: gathered(torch.as_tensor(value)) for name, value in get_model_state_dict(model, options=options).items()}
    return each_once(model, whole)


def each_once(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` of `model`, where a head that is the embedding's weight stays one tensor, which is saved once."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[Any, Tensor] = {}
    return {name: found.setdefault(parameters.get(name, name), tensor) for name, tensor in weights.items()}
