"""What policy, reference and critic say of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from align import processes
from align.budget import Budget, Packed
from align.forest import Forest, Tree, plant
from align.heads import TokenScores
from align.shards import is_sharded
from align.trainers.ppo.critics import Critic, device_of, trainable
from align.tuning.tune import Reference


@dataclass(frozen=True)
class Measured:
    """Matrices (episodes, longest completion), zero where `mask` is false."""

    mask: Tensor
    logps: Tensor
    entropy: Tensor
    reference_logps: Tensor
    values: Tensor | None
    first_pass: list[TokenScores]
    """What the policy said, to begin the update with, and maybe the critic; empty unless asked for."""


class Models:
    """The roles that trees are shown to.

    Args:
        policy: an enabled causal language model (`align.engine.enable_forest`); its reference is itself as it is now.
        critic: or None, for estimators without one.
        temperature: of the distribution that is sampled and optimized.
        bf16: run forward and backward passes in bfloat16, weights and sums in float32.
    """

    def __init__(self, policy: nn.Module, critic: Critic | None, *, temperature: float, bf16: bool = False) -> None:
        self.policy, self.critic, self.temperature, self.bf16 = policy, critic, temperature, bf16
        self.device = device_of(policy)
        self.reference = Reference(policy)
        self.sharded = is_sharded(policy)
        """Whether the processes hold shards of the weights, and wait for each other in each pass."""

    def parameters(self) -> dict[str, dict[str, Tensor]]:
        """What trains, by role and name."""
        return {
            "policy": trainable(self.policy),
            "critic": {} if self.critic is None else self.critic.named_parameters(),
        }

    def train(self, mode: bool) -> None:
        """Set the mode of policy and critic."""
        self.policy.train(mode)
        if self.critic is not None:
            self.critic.train(mode)

    def answer(self, forest: Forest, *, with_entropy: bool) -> TokenScores:
        """The policy's, with values where the critic sits on its trunk."""
        head = None if self.critic is None else self.critic.on_policy_pass
        return self.policy(forest=forest, read="sources", temperature=self.temperature, with_entropy=with_entropy, score_head=head)

    def precision(self) -> torch.autocast:
        """Mixed precision where asked; sums and losses stay in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def measure(self, trees: Sequence[Tree], budget: Budget, *, passes: int = 0) -> Measured:
        """Log-probs, entropy and values of every branch of `trees`, from forests without padding.

        Args:
            passes: if one forest holds `trees`, the update can begin with so many: the policy's, and that of a critic of its own.
        """
        first_pass: list[TokenScores] = []
        lengths = torch.tensor([len(branch) for tree in trees for branch in tree.branches], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        firsts = torch.tensor([0, *(tree.targets for tree in trees)]).cumsum(0).tolist()

        def work(packed: Packed) -> dict[str, Tensor]:
            first_pass.clear()
            columns: dict[str, Tensor] = {}
            forests = processes.evened([forest for _, forest in packed], lambda: plant(trees[:1]), waiting=self.sharded)
            for number, (forest, counts) in enumerate(forests):
                answers, said = self._said(forest.to(self.device), passes if len(forests) == 1 else 0)
                if not counts:
                    continue
                place = torch.cat([torch.arange(firsts[i], firsts[i + 1], device=self.device) for i in packed[number][0]])
                if answers.logps.requires_grad:
                    first_pass.append(answers)
                for name, values in said.items():
                    columns.setdefault(name, torch.zeros(firsts[-1], device=self.device))[place] = values.float()
            return columns

        columns = budget.fit(trees, work, alone=not self.sharded)
        matrices = {
            name: torch.zeros(mask.shape, device=self.device).masked_scatter_(mask, column) for name, column in columns.items()
        }
        return Measured(mask, matrices["logps"], matrices["entropy"], matrices["reference"], matrices.get("values"), first_pass)

    def _said(self, forest: Forest, passes: int) -> tuple[TokenScores, dict[str, Tensor]]:
        self.train(passes > 0)
        with self.precision(), torch.set_grad_enabled(passes > 0):
            answers = self.answer(forest, with_entropy=True)
        self.train(False)
        with self.precision(), self.reference() as model:
            reference = model(forest=forest, temperature=self.temperature)
        said = {"logps": answers.logps, "entropy": answers.entropy, "reference": reference.logps, "values": answers.values}
        if self.critic is not None and self.critic.on_policy_pass is None:
            self.critic.train(passes > 1)
            with self.critic.acting(), self.precision(), torch.set_grad_enabled(passes > 1):
                said["values"] = values = self.critic(forest)
            self.critic.train(False)
            answers = replace(answers, values=values if passes > 1 else None)
        return answers, {name: values for name, values in said.items() if values is not None}
