"""The critic: a model of its own, an adapter on the policy's base, or a head on the policy's trunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn

from align.engine import base_model
from align.forest import Forest

POLICY, CRITIC = "default", "critic"
"""Names of their adapters."""


class Critic(Protocol):
    """Values of the states before a forest's targets."""

    @property
    def on_policy_pass(self) -> ValueHead | None:
        """A head that the policy's own pass reads, so that values cost no pass of their own."""

    def acting(self) -> Any:
        """Within, forward and backward passes are the critic's. Checkpointed layers run again in the backward pass, so that
        belongs inside.
        """

    def __call__(self, forest: Forest) -> Tensor:
        """(targets,)"""

    def named_parameters(self) -> dict[str, Tensor]:
        """What is trained and belongs to the critic alone."""

    def train(self, mode: bool = True) -> Any: ...


class SeparateCritic:
    """An enabled model with one score per token."""

    on_policy_pass: ValueHead | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.train = model.train

    def acting(self) -> Any:
        return nullcontext()

    def __call__(self, forest: Forest) -> Tensor:
        return self.model(forest=forest, read="sources")

    def named_parameters(self) -> dict[str, Tensor]:
        return trainable(self.model)


class AdapterCritic:
    """An adapter ``critic`` on the policy's base with a value head: no second copy of the base's weights."""

    on_policy_pass: ValueHead | None = None

    def __init__(self, policy: PeftModel, head: ValueHead) -> None:
        self.policy, self.head = policy, head
        self.train = head.train

    def acting(self) -> Any:
        return adapter(self.policy, CRITIC)

    def __call__(self, forest: Forest) -> Tensor:
        return self.policy(forest=forest, read="sources", score_head=self.head, with_logps=False)

    def named_parameters(self) -> dict[str, Tensor]:
        with self.acting():
            return {**trainable(self.policy), "value_head.weight": self.head.weight}


class SharedCritic:
    """A value head on the policy's trunk, which learns from both losses. Its values come with the policy's log-probs."""

    def __init__(self, head: ValueHead) -> None:
        self.on_policy_pass: ValueHead | None = head
        self.head, self.train = head, head.train

    def acting(self) -> Any:
        return nullcontext()

    def __call__(self, forest: Forest) -> Tensor:
        raise TypeError("the values of a shared trunk come with the policy's pass")

    def named_parameters(self) -> dict[str, Tensor]:
        return {"value_head.weight": self.head.weight}


class ValueHead(nn.Linear):
    """(n, hidden) to (n, 1), from zero, so that the start is the same for every seed."""

    def __init__(self, policy: nn.Module) -> None:
        base = base_model(policy)
        weight = base.get_output_embeddings().weight
        super().__init__(weight.shape[1], 1, bias=False, device=weight.device)
        nn.init.zeros_(self.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype))


@contextmanager
def adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Within, the adapter `name` of `model` acts in place of the policy's."""
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(POLICY)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
