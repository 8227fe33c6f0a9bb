"""The update: epochs of mini-batches of the clipped objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from align import processes
from align.budget import Budget, Packed
from align.errors import AlignError, NonFiniteLoss
from align.forest import Forest, Tree, pack, plant
from align.heads import TokenScores
from align.losses import ppo_policy_loss, ppo_value_loss
from align.shards import gathered
from align.trainers.ppo.data import Episodes, Shuffled
from align.trainers.ppo.kl import KL_ESTIMATORS
from align.trainers.ppo.models import Models
from align.trainers.settings import PPOSettings


@dataclass(frozen=True)
class Batch:
    """A mini-batch over all processes: what its losses are means over."""

    tokens: float
    completions: int
    longest: int
    """The most tokens that a completion may have."""
    ptx_tokens: float
    """Tokens with a loss in the rows that are mixed in."""


LOSS_WEIGHTS = {
    "tokens": lambda lengths, batch: torch.ones_like(lengths) / batch.tokens,
    "completions": lambda lengths, batch: 1 / (batch.completions * lengths),
    "constant": lambda lengths, batch: torch.ones_like(lengths) / (batch.completions * batch.longest),
}
"""Weight of a token's loss by the length of its completion."""


class Learner:
    """Improves policy and critic on episodes.

    Args:
        ptx: trees with a language-model loss, mixed into every update.
        shuffle: draws the order of episodes and of `ptx`; the same on every process.
    """

    def __init__(
        self,
        models: Models,
        settings: PPOSettings,
        *,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        budget: Budget,
        max_grad_norm: float,
        longest: int,
        shuffle: torch.Generator,
        ptx: Sequence[Tree] = (),
    ) -> None:
        if settings.ptx_coef and not ptx:
            raise AlignError("ptx_coef mixes in a language-model loss, and there are no rows for it: set ptx_data")
        self.models, self.settings = models, settings
        self.optimizer, self.scheduler, self.budget = optimizer, scheduler, budget
        self.max_grad_norm, self.longest, self.shuffle = max_grad_norm, longest, shuffle
        self.ptx, self.ptx_order = ptx, Shuffled(len(ptx), shuffle)
        self.roles = {role: list(named.values()) for role, named in models.parameters().items()}
        self.first_pass: list[TokenScores] = []
        """What the policy, and maybe the critic, said already of the forest that comes next."""

    def passes_to_keep(self, trees: Sequence[Tree]) -> int:
        """How many passes over this process' `trees`, of one forest each, may wait for the update to begin with: together they must
        fit the budget. None may where a mini-batch is less than these trees, or where weights in shards are released in between.
        """
        if self.settings.num_mini_batches > 1 or self.models.sharded:
            return 0
        return self.budget.tokens // sum(tree.tokens for tree in trees)

    def update(self, episodes: Episodes, kl_coef: float, *, policy: bool = True) -> dict[str, float]:
        """Epochs of mini-batches; means of what was seen.

        Args:
            kl_coef: price of the divergence, where it is paid in the loss.
            policy: False trains the critic alone.
        """
        # Mini-batches are drawn from the episodes of all processes, and each then dealt to them: the same ones for any number.
        trees = processes.gathered(episodes.with_columns())
        size = len(trees) // self.settings.num_mini_batches
        planned, done = self.settings.num_ppo_epochs * self.settings.num_mini_batches, 0
        sums: dict[str, Tensor] = {}
        self.first_pass = episodes.first_pass
        self.models.train(True)
        for mini_batch in self._mini_batches(trees, size):
            seen = self._gradient(mini_batch, kl_coef, policy)
            for name, value in seen.items():
                sums[name] = sums.get(name, 0.0) + value
            if policy and self._too_far(seen):
                break
            self._step()
            done += 1
        self.optimizer.zero_grad()
        for _ in range(planned - done):  # the schedule is one of episodes
            self.scheduler.step()
        means = {name: (value / sums["tokens"]).item() for name, value in sums.items() if name != "tokens"}
        return {**means, "policy/updates": float(done)}

    def _too_far(self, seen: dict[str, Tensor]) -> bool:
        limit = self.settings.target_kl
        return limit is not None and (seen["policy/approxkl_avg"] / seen["tokens"]).item() > limit

    def _mini_batches(self, trees: list[Tree], size: int) -> Iterator[list[Tree]]:
        for _ in range(self.settings.num_ppo_epochs):
            order = torch.randperm(len(trees), generator=self.shuffle).tolist()
            if size == len(trees):
                order.sort()  # so that the forest is the one that was measured
            for start in range(0, len(order), size):
                yield [trees[i] for i in order[start : start + size]]

    def _gradient(self, trees: list[Tree], kl_coef: float, policy: bool) -> dict[str, Tensor]:
        """Leave the gradient of one mini-batch; its sums over tokens. However it is dealt to processes, and cut into forests."""
        completions = sum(len(tree.branches) for tree in trees)
        ptx = self._ptx_batch(completions) if policy and self.settings.ptx_coef else []
        tokens, ptx_tokens = (float(sum(tree.targets for tree in every)) for every in (trees, ptx))
        batch = Batch(tokens, completions, self.longest, ptx_tokens)
        mine = processes.share(trees)
        work = partial(self._accumulate, batch, mine[0], processes.share(ptx), kl_coef, policy)
        seen = self.budget.fit(mine, work, alone=not self.models.sharded, telling=not self.first_pass)
        if not policy:
            for parameter in self.roles["policy"]:
                parameter.grad = None
        for parameters in self.roles.values():
            processes.sum_gradients(parameters)
        names = sorted(seen)
        sums = dict(zip(names, processes.total(torch.stack([seen[name] for name in names])), strict=True))
        if not torch.isfinite(loss := sums.pop("loss")):
            raise NonFiniteLoss(f"PPO's loss is {loss.item()}; no update was made. Lower learning_rate or look at the rewards")
        return sums

    def _accumulate(
        self, batch: Batch, spare: Tree, ptx: Sequence[Tree], kl_coef: float, policy: bool, packed: Packed
    ) -> dict[str, Tensor]:
        """The gradient from nothing: one loss after the other, so that no two hold their activations at a time."""
        self.optimizer.zero_grad()
        zero = torch.zeros((), device=self.models.device)
        sums = {"loss": zero, **({"loss/ptx_avg": zero} if batch.ptx_tokens else {})}

        def learn(loss: Tensor, seen: dict[str, Tensor], counts: bool) -> None:
            (loss if counts else 0 * loss).backward()
            for name, values in {"loss": loss, **seen}.items():
                sums[name] = sums.get(name, zero) + counts * values.detach().sum()

        for forest, counts in self._passes([forest for _, forest in packed], spare):
            for loss, seen in self._losses(forest.to(self.models.device), batch, kl_coef, policy):
                learn(loss, seen, counts)
        for loss, seen, counts in self._ptx_losses(ptx, batch):
            learn(loss, seen, counts)
        return {**sums, "tokens": torch.tensor(float(sum(f.targets.numel() for _, f in packed)), device=self.models.device)}

    def _passes(self, forests: list[Forest], spare: Tree) -> list[tuple[Forest, bool]]:
        return processes.evened(forests, lambda: plant([spare]), waiting=self.models.sharded)

    def _losses(self, forest: Forest, batch: Batch, kl_coef: float, policy: bool) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The losses of a forest, each with the sums it is logged by; policy and critic apart where their passes are."""
        critic, kept = self.models.critic, self.first_pass.pop() if self.first_pass else None
        apart = critic is not None and critic.on_policy_pass is None
        if policy or (critic is not None and not apart):
            answers = kept or self._asked(forest)
            loss = torch.zeros((), device=self.models.device)
            seen: dict[str, Tensor] = {}
            if policy:
                loss, seen = self._policy_loss(answers, forest, batch, kl_coef)
            if not apart and answers.values is not None:
                value_loss, more = self._value_loss(answers.values, forest, batch)
                loss, seen = loss + value_loss, {**seen, **more}
            yield loss, seen
        if critic is not None and apart:
            with critic.acting():
                values = None if kept is None else kept.values
                if values is None:
                    with self.models.precision():
                        values = critic(forest)
                yield self._value_loss(values, forest, batch)

    def _asked(self, forest: Forest) -> TokenScores:
        with self.models.precision():
            return self.models.answer(forest, with_entropy=bool(self.settings.entropy_coef))

    def _policy_loss(self, answers: TokenScores, forest: Forest, batch: Batch, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        settings, columns = self.settings, forest.values
        clipped = ppo_policy_loss(
            answers.logps,
            columns["old_logps"],
            columns["advantages"],
            cliprange=settings.cliprange,
            dual_clip=settings.dual_clip,
        )
        loss = clipped.loss
        if settings.kl_in == "loss":
            loss = loss + kl_coef * KL_ESTIMATORS[settings.kl_estimator](answers.logps, columns["reference_logps"])
        if settings.entropy_coef and answers.entropy is not None:
            loss = loss - settings.entropy_coef * answers.entropy
        lengths = forest.target_counts()[forest.owner].float()
        weights = LOSS_WEIGHTS[settings.loss_average](lengths, batch)
        return (weights * loss).sum(), {
            "loss/policy_avg": weights * loss * batch.tokens,
            "policy/approxkl_avg": clipped.metrics["approxkl"],
            "policy/clipfrac_avg": clipped.metrics["clipfrac"],
            "val/ratio": clipped.metrics["ratio"],
        }

    def _value_loss(self, values: Tensor, forest: Forest, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        clipped = ppo_value_loss(
            values, forest.values["old_values"], forest.values["returns"], cliprange_value=self.settings.cliprange_value
        )
        seen = {"loss/value_avg": clipped.loss, "val/clipfrac_avg": clipped.metrics["clipfrac"]}
        return self.settings.vf_coef * clipped.loss.sum() / batch.tokens, seen

    def _ptx_batch(self, completions: int) -> list[Tree]:
        wanted = self.settings.ptx_batch_size or completions
        return [self.ptx[i] for i in self.ptx_order.take(wanted)]

    def _ptx_losses(self, ptx: Sequence[Tree], batch: Batch) -> Iterator[tuple[Tensor, dict[str, Tensor], bool]]:
        """Mean negative log-likelihood of the mixed-in rows' tokens, weighted; and whether it counts."""
        forests = [plant([ptx[i] for i in indices]) for indices in pack(ptx, self.budget.tokens)]
        for forest, counts in self._passes(forests, self.ptx[0]) if batch.ptx_tokens else ():
            with self.models.precision():
                logps = self.models.policy(forest=forest.to(self.models.device)).logps
            nll = -logps.sum() / batch.ptx_tokens
            yield self.settings.ptx_coef * nll, {"loss/ptx_avg": nll * batch.tokens}, counts

    def _step(self) -> None:
        totals = {role: get_total_norm([p.grad for p in own if p.grad is not None]) for role, own in self.roles.items()}
        norms = {role: gathered(total).item() for role, total in totals.items()}
        for role, norm in norms.items():
            if not math.isfinite(norm):
                raise NonFiniteLoss(f"the norm of the {role}'s gradient is {norm}; no update was made. Lower learning_rate")
        for role, norm in norms.items():
            if norm > self.max_grad_norm:  # torch would also multiply all of them by 1
                clip_grads_with_norm_(self.roles[role], self.max_grad_norm, totals[role])
        self.optimizer.step()
        self.scheduler.step()
