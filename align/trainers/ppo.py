"""Proximal policy optimization (Schulman et al., arXiv:1707.06347) for language models, as numbered steps.

An *episode* is a prompt and one sampled completion. The state before a token is the text so far, the action is the token, the
reward is minus the price of diverging from the reference, plus the score of the whole completion on its last token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from align.errors import AlignError
from align.forest import Forest, Tree, cut, plant
from align.losses import ppo_policy_loss, ppo_value_loss
from align.ops import gae, kl_k1, kl_k3, masked_mean, masked_whiten
from align.progress import History, bar, shown
from align.rollout import Completion, Sampling, complete
from align.trainers.settings import PPOSettings
from align.tuning.tune import Reference

KL_ESTIMATORS = {"k1": kl_k1, "k3": kl_k3}

Scorer = Callable[[list[int], list[Completion]], tuple[list[float], dict[str, float]]]
"""Indices of prompts and their completions to a score for each completion and a mean for each component of the reward."""


@dataclass(frozen=True)
class Episodes:
    """A batch of episodes. Matrices are (episodes, longest completion), zero where `mask` is."""

    trees: list[Tree]
    mask: Tensor
    scores: Tensor  # (episodes,)
    finished: Tensor  # (episodes,) bool
    old_logps: Tensor
    reference_logps: Tensor
    old_values: Tensor
    entropy: Tensor
    kl: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor


class PPOTrainer:
    """Trains `policy` against `scorer`.

    Args:
        policy: an enabled causal language model (`align.engine.enable_forest`); its reference is itself as it is now.
        critic: an enabled model with one score per token.
        prompts: token ids of the prompts, sampled in a shuffled order, again and again.
        scorer: scores completions; see `Scorer`.
        sampling: its temperature is that of the distribution that is optimized, too.
        bf16: run forward and backward passes in bfloat16, weights and sums in float32.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module,
        prompts: Sequence[list[int]],
        scorer: Scorer,
        settings: PPOSettings,
        *,
        sampling: Sampling,
        stop_ids: Sequence[int],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        history: History,
        max_tokens: int,
        max_grad_norm: float,
        seed: int,
        bf16: bool = False,
    ) -> None:
        if sampling.temperature <= 0:
            raise AlignError("PPO samples its policy: temperature must be above 0")
        if sampling.top_p != 1.0 or sampling.top_k != 0:
            raise AlignError("PPO optimizes the distribution it samples: top_p must be 1 and top_k 0")
        self.policy, self.critic, self.scorer, self.settings = policy, critic, scorer, settings
        self.prompts, self.sampling, self.stop_ids = prompts, sampling, stop_ids
        self.optimizer, self.scheduler, self.history = optimizer, scheduler, history
        self.max_tokens, self.max_grad_norm = max_tokens, max_grad_norm
        self.device = next(policy.parameters()).device
        self.bf16 = bf16
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.shuffle = torch.Generator().manual_seed(seed)
        self._reference = Reference(policy)

    @property
    def steps(self) -> int:
        """Batches of episodes in the whole run."""
        return self.settings.total_episodes // self.settings.episodes_per_step

    def train(self, label: str = "ppo", log_every: int = 1) -> None:
        """Run all steps, logging means over each `log_every`."""
        batches = self._prompt_batches()
        pending: dict[str, list[float]] = defaultdict(list)
        with bar(label, self.steps) as progress:
            for step in range(1, self.steps + 1):
                for name, value in self.step(next(batches)).items():
                    pending[name].append(value)
                progress.update()
                if step % log_every == 0 or step == self.steps:
                    metrics = {name: sum(values) / len(values) for name, values in pending.items()}
                    episode = step * self.settings.episodes_per_step
                    self.history.add(step, {"episode": episode, "learning_rate": self.scheduler.get_last_lr()[0], **metrics})
                    progress.set_postfix_str(shown(metrics), refresh=False)
                    pending.clear()

    def _prompt_batches(self) -> Iterator[list[int]]:
        """Indices of prompts, every prompt once before any comes again."""
        queue: list[int] = []
        while True:
            while len(queue) < self.settings.episodes_per_step:
                queue += torch.randperm(len(self.prompts), generator=self.shuffle).tolist()
            yield queue[: self.settings.episodes_per_step]
            queue = queue[self.settings.episodes_per_step :]

    def step(self, indices: list[int]) -> dict[str, float]:
        """One round on the prompts at `indices`."""
        # 1. Sample the policy.
        completions = complete(
            self.policy, [self.prompts[i] for i in indices], self.sampling, self.stop_ids, generator=self.generator
        )
        # 2. Score what it said.
        scores, components = self.scorer(indices, completions)
        # 3. Price the divergence from the reference and estimate the advantages.
        episodes = self.estimate([self.prompts[i] for i in indices], completions, scores)
        # 4. Improve policy and critic on these episodes.
        update = self.update(episodes)
        # 5. Say what happened.
        return {**self.describe(episodes), **update, **components}

    @torch.no_grad()
    def estimate(self, prompts: Sequence[list[int]], completions: Sequence[Completion], scores: Sequence[float]) -> Episodes:
        """Log-probs, values, per-token rewards and advantages of sampled episodes, from forests without padding."""
        settings = self.settings
        trees = [Tree(prompt, (completion.tokens,)) for prompt, completion in zip(prompts, completions, strict=True)]
        lengths = torch.tensor([len(completion.tokens) for completion in completions], device=self.device)
        finished = torch.tensor([completion.finished for completion in completions], device=self.device)
        score = torch.tensor(scores, dtype=torch.float, device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]

        self.policy.eval()
        self.critic.eval()
        logps, entropy, reference, values = [], [], [], []
        for forest in self._forests(trees):
            with self._precision():
                token = self.policy(forest=forest, temperature=self.sampling.temperature, with_entropy=True)
                logps.append(token.logps)
                entropy.append(token.entropy)
                with self._reference() as model:
                    reference.append(model(forest=forest, temperature=self.sampling.temperature).logps)
                values.append(self.critic(forest=forest, read="sources"))

        def matrix(parts: list[Tensor]) -> Tensor:
            return torch.zeros(mask.shape, device=self.device).masked_scatter_(mask, torch.cat(parts))

        old_logps, reference_logps, old_values = matrix(logps), matrix(reference), matrix(values)
        kl = KL_ESTIMATORS[settings.kl_estimator](old_logps, reference_logps)
        if settings.missing_eos_penalty is not None:
            score = score - settings.missing_eos_penalty * (~finished)
        rewards = -settings.kl_coef * kl
        rewards[torch.arange(len(trees), device=self.device), lengths - 1] += score
        if settings.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, mask, gamma=settings.gamma, lam=settings.lam)
        if settings.whiten_advantages:
            advantages = masked_whiten(advantages, mask)
        return Episodes(
            trees, mask, score, finished, old_logps, reference_logps, old_values, matrix(entropy), kl, rewards, advantages, returns
        )

    def update(self, episodes: Episodes) -> dict[str, float]:
        """Epochs of mini-batches of the clipped objectives; means of what was seen."""
        columns = {name: getattr(episodes, name) for name in ("old_logps", "old_values", "advantages", "returns")}
        trees = [
            replace(tree, values={name: matrix[i][episodes.mask[i]].tolist() for name, matrix in columns.items()})
            for i, tree in enumerate(episodes.trees)
        ]
        size = len(trees) // self.settings.num_mini_batches
        sums: dict[str, float] = defaultdict(float)
        self.policy.train()
        self.critic.train()
        for _ in range(self.settings.num_ppo_epochs):
            order = torch.randperm(len(trees), generator=self.shuffle).tolist()
            for start in range(0, len(order), size):
                self._optimize([trees[i] for i in order[start : start + size]], sums)
        tokens = sums.pop("tokens")
        return {name: total / tokens for name, total in sums.items()}

    def _optimize(self, trees: list[Tree], sums: dict[str, float]) -> None:
        """One optimizer step on one mini-batch; the losses are means over its tokens, however it is cut."""
        tokens = sum(tree.targets for tree in trees)
        for forest in self._forests(trees):
            with self._precision():
                token = self.policy(forest=forest, temperature=self.sampling.temperature, with_entropy=True)
                values = self.critic(forest=forest, read="sources")
            policy_loss = ppo_policy_loss(
                token.logps, forest.values["old_logps"], forest.values["advantages"], cliprange=self.settings.cliprange
            )
            value_loss = ppo_value_loss(
                values,
                forest.values["old_values"],
                forest.values["returns"],
                cliprange_value=self.settings.cliprange_value,
            )
            loss = (policy_loss.loss.sum() + self.settings.vf_coef * value_loss.loss.sum()) / tokens
            if not torch.isfinite(loss):
                raise AlignError(f"PPO's loss is {loss.item()}; no update was made. Lower learning_rate or look at the rewards")
            loss.backward()
            for name, seen in {
                "loss/policy_avg": policy_loss.loss,
                "loss/value_avg": value_loss.loss,
                "policy/approxkl_avg": policy_loss.metrics["approxkl"],
                "policy/clipfrac_avg": policy_loss.metrics["clipfrac"],
                "policy/entropy_avg": token.entropy,
                "val/ratio": policy_loss.metrics["ratio"],
                "val/clipfrac_avg": value_loss.metrics["clipfrac"],
            }.items():
                sums[name] += seen.detach().sum().item()
            sums["tokens"] += forest.targets.numel()
        for model in (self.policy, self.critic):
            clip_grad_norm_(model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def describe(self, episodes: Episodes) -> dict[str, float]:
        """What a batch of episodes looked like before it was trained on. Sums over tokens, means over episodes."""
        mask, kl = episodes.mask, kl_k1(episodes.old_logps, episodes.reference_logps)
        price = -self.settings.kl_coef * episodes.kl.sum(1)
        explained = 1 - (episodes.returns - episodes.old_values)[mask].var() / episodes.returns[mask].var().clamp(min=1e-8)
        return {
            "objective/kl": kl.sum(1).mean().item(),
            "objective/entropy": episodes.entropy.sum(1).mean().item(),
            "objective/scores": episodes.scores.mean().item(),
            "objective/non_score_reward": price.mean().item(),
            "objective/rlhf_reward": (episodes.scores + price).mean().item(),
            "val/num_eos_tokens": float(episodes.finished.sum().item()),
            "val/explained_variance": explained.item(),
            "val/mean_value": masked_mean(episodes.old_values, mask).item(),
            "completions/mean_length": mask.sum(1).float().mean().item(),
            "completions/cut_share": 1 - episodes.finished.float().mean().item(),
        }

    def _forests(self, trees: list[Tree]) -> Iterator[Forest]:
        for pack in cut(trees, self.max_tokens):
            yield plant(pack).to(self.device)

    def _precision(self) -> torch.autocast:
        """Mixed precision where asked; sums and losses stay in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
