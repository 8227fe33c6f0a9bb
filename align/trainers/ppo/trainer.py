"""Proximal policy optimization (Schulman et al., arXiv:1707.06347) for language models, as numbered steps.

An *episode* is a prompt and one sampled completion. The state before a token is the text so far, the action is the token, the
reward is minus the price of diverging from the reference, plus the score of the whole completion on its last token.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from align import processes
from align.budget import Budget, MaxTokens
from align.errors import AlignError
from align.forest import Tree
from align.ops import kl_k1, masked_moments, masked_whiten
from align.progress import History, bar, say, shown
from align.rollout import Completion, Engine, Sampling
from align.rollout.together import complete_together
from align.runner.checkpoints import resuming
from align.runner.files import flush
from align.runner.stop import Stopped, stop_requested
from align.shards import dealt, kept, whole
from align.trainers.ppo.advantages import Rewarded, estimators, parameters
from align.trainers.ppo.checkpoint import (
    Checkpoints,
    State,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
)
from align.trainers.ppo.data import Episodes, Sampled, Shuffled, sampled_logps
from align.trainers.ppo.kl import KL_ESTIMATORS, KLController
from align.trainers.ppo.models import Models
from align.trainers.ppo.update import Learner
from align.trainers.settings import PPOSettings

Scorer = Callable[[list[int], list[Completion]], tuple[list[float], dict[str, float]]]
"""The index of each completion's prompt, and completions, to a score for each and, for each component of the reward, its mean over
all processes."""

SAMPLES = 4
"""Completions that `sample_steps` leaves."""


class PPOTrainer:
    """Trains `models.policy` against `scorer`.

    Args:
        prompts: token ids of the prompts, sampled in a shuffled order, again and again.
        scorer: scores completions; see `Scorer`.
        sampler: who samples the policy; None is the policy itself.
        sampling: its temperature is that of the distribution that is optimized, too.
        max_tokens: tokens in a forward pass; see `align.budget.Budget`.
        checkpoints: None keeps none.
        ptx: trees with a language-model loss, for `ptx_coef`.
        text: decodes tokens, for `sample_steps`.

    Raises:
        AlignError: settings that contradict each other, the sampling or the models.
    """

    def __init__(
        self,
        models: Models,
        prompts: Sequence[list[int]],
        scorer: Scorer,
        settings: PPOSettings,
        *,
        sampler: nn.Module | Engine | None = None,
        sampling: Sampling,
        stop_ids: Sequence[int],
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        history: History,
        max_tokens: MaxTokens,
        max_grad_norm: float,
        seed: int,
        checkpoints: Checkpoints | None = None,
        ptx: Sequence[Tree] = (),
        text: Callable[[list[int]], str] = str,
    ) -> None:
        check(settings, sampling, has_critic=models.critic is not None)
        self.models, self.prompts, self.scorer, self.settings = models, prompts, scorer, settings
        self.sampling, self.stop_ids, self.history, self.text = sampling, stop_ids, history, text
        self.sampler = models.policy if sampler is None else sampler
        self.checkpoints = checkpoints
        self.generator = torch.Generator().manual_seed(seed)  # both are the same on every process
        self.shuffle = torch.Generator().manual_seed(seed)
        self.order = Shuffled(len(prompts), self.shuffle)
        self.kl = KLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.budget = Budget(max_tokens)
        self.learner = Learner(
            models,
            settings,
            optimizer=optimizer,
            scheduler=scheduler,
            budget=Budget(max_tokens),
            max_grad_norm=max_grad_norm,
            longest=sampling.max_new_tokens,
            shuffle=self.shuffle,
            ptx=ptx,
        )
        self.done = 0
        self._pending: dict[str, list[float]] = defaultdict(list)
        self._seconds: dict[str, float] = {}

    def train(self, label: str = "ppo", log_every: int = 1, after_step: Callable[[int], bool] = lambda step: False) -> None:
        """Run what is left of all steps, or until `after_step` says that it is enough, logging means over each `log_every`.

        Raises:
            Stopped: the process was asked to end; what was done until then is kept.
        """
        steps = self.settings.steps
        with bar(label, steps) as progress:
            progress.update(self.done)
            while self.done < steps:
                for name, value in self.step().items():
                    self._pending[name].append(value)
                self.done += 1
                progress.update()
                if self.done % log_every == 0 or self.done == steps:
                    progress.set_postfix_str(shown(self._log_means()), refresh=False)
                enough = after_step(self.done)
                if enough and self._pending:  # the rounds since the last line
                    self._log_means()
                stopping = processes.any_of(stop_requested())
                if self.checkpoints is not None and (stopping or self.checkpoints.due(self.done)):
                    flush(self.history.path)
                    self.checkpoints.save(self.done, self.state())
                if stopping:
                    raise Stopped
                if enough:
                    break

    def step(self) -> dict[str, float]:
        """One round; what it was like."""
        self._seconds = {}
        everyones = self.order.take(self.settings.episodes_per_step // self.settings.num_generations)
        indices = list(processes.share(everyones))
        prompts = [self.prompts[i] for i in indices]
        sampled = self._kept()
        if sampled is None:
            # 1. Sample the policy.
            with self._timed("sample"):
                completions = self.sample([self.prompts[i] for i in everyones])
            # 2. Score what it said.
            with self._timed("score"):
                sampled = Sampled(completions, *self.scorer(self._repeated(indices), completions))
            self._keep(sampled)
        # 3. Price the divergence from the reference and estimate the advantages.
        with self._timed("estimate"):
            episodes = self.estimate(prompts, sampled.completions, sampled.scores)
        # 4. Improve policy and critic on these episodes.
        with self._timed("update"):
            update = self.learner.update(episodes, self.kl.coef, policy=self._policy_learns())
        # 5. Say what happened, and set the price for the next round.
        said = {**self.describe(episodes), **sampled.components}
        if self._policy_learns():  # one that stands still says nothing of the price
            self.kl.update(said["objective/kl"], self.settings.episodes_per_step)
        self._show_samples(prompts, sampled)
        return {**said, **update, **self._seconds}

    def sample(self, prompts: Sequence[list[int]]) -> list[Completion]:
        """`num_generations` completions for each of this process' share of `prompts`, next to each other."""
        with whole(self.models.policy):
            return complete_together(self.sampler, self._repeated(prompts), self.sampling, self.stop_ids, self.generator)

    def _repeated(self, items: Sequence[Any]) -> list[Any]:
        return [item for item in items for _ in range(self.settings.num_generations)]

    @torch.no_grad()
    def estimate(self, prompts: Sequence[list[int]], completions: Sequence[Completion], scores: Sequence[float]) -> Episodes:
        """Log-probs, values, per-token rewards and advantages of sampled episodes."""
        settings, size = self.settings, self.settings.num_generations
        branches = [completion.tokens for completion in completions]
        trees = [Tree(prompt, tuple(branches[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)]
        device = self.models.device
        finished = torch.tensor([completion.finished for completion in completions], device=device)
        score = torch.tensor(scores, dtype=torch.float, device=device)
        if settings.score_clip is not None:
            score = score.clamp(-settings.score_clip, settings.score_clip)
        if settings.missing_eos_penalty is not None:
            score = score - settings.missing_eos_penalty * (~finished)

        passes = self.learner.passes_to_keep(trees) if self._policy_learns() else 0
        said = self.models.measure(trees, self.budget, passes=passes)
        kl = KL_ESTIMATORS[settings.kl_estimator](said.logps, said.reference_logps)
        rewards = -self.kl.coef * kl if settings.kl_in == "reward" else torch.zeros_like(kl)
        last = said.mask.sum(1) - 1
        rewards[torch.arange(len(last), device=device), last] += score
        if settings.whiten_rewards:
            rewards = masked_whiten(rewards, said.mask, shift_mean=False, total=processes.total)
        rewarded = Rewarded(rewards, said.mask, size, said.values, processes.total)
        name = settings.advantage_estimator
        advantages, returns = estimators[name](rewarded, **parameters(name, settings))
        if settings.whiten_advantages:
            advantages = masked_whiten(advantages, said.mask, total=processes.total)
        return Episodes(
            trees=trees,
            mask=said.mask,
            scores=score,
            finished=finished,
            old_logps=said.logps,
            sampled_logps=sampled_logps(completions, said.mask),
            first_pass=said.first_pass,
            reference_logps=said.reference_logps,
            entropy=said.entropy,
            kl=kl,
            rewards=rewards,
            advantages=advantages,
            old_values=said.values,
            returns=returns,
        )

    def _policy_learns(self) -> bool:
        return self.done >= self.settings.critic_warmup_steps

    def describe(self, episodes: Episodes) -> dict[str, float]:
        """What the episodes of all processes looked like before they were trained on. Sums over tokens, means over episodes."""
        mask, kl = episodes.mask, kl_k1(episodes.old_logps, episodes.reference_logps)
        price = -self.kl.coef * episodes.kl.sum(1)
        said = {
            "objective/kl": kl.sum(1).mean(),
            "objective/entropy": episodes.entropy.sum(1).mean(),
            "objective/scores": episodes.scores.mean(),
            "objective/non_score_reward": price.mean(),
            "objective/rlhf_reward": (episodes.scores + price).mean(),
            "objective/kl_coef": torch.tensor(self.kl.coef),
            "policy/entropy_avg": masked_moments(episodes.entropy, mask, processes.total)[0],
            "val/num_eos_tokens": processes.total(episodes.finished.sum()),
            "completions/mean_length": mask.sum(1).float().mean(),
            "completions/cut_share": 1 - episodes.finished.float().mean(),
        }
        if episodes.old_values is not None and episodes.returns is not None:
            mean, _ = masked_moments(episodes.old_values, mask, processes.total)
            _, missed = masked_moments(episodes.returns - episodes.old_values, mask, processes.total)
            _, whole = masked_moments(episodes.returns, mask, processes.total)
            said |= {"val/mean_value": mean, "val/explained_variance": 1 - missed / whole.clamp(min=1e-8)}
        if episodes.sampled_logps is not None:
            gap = (episodes.sampled_logps - episodes.old_logps).abs()
            said["sampling/sampling_logp_difference/mean"] = masked_moments(gap, mask, processes.total)[0]
        return processes.means({name: value.item() for name, value in said.items()})

    # -- logs ---------------------------------------------------------------------------------------------------------------

    def _log_means(self) -> dict[str, float]:
        """Log the means over the rounds since the last line; returns them."""
        metrics = {name: sum(values) / len(values) for name, values in self._pending.items()}
        self._pending.clear()
        if processes.number() == 0:
            episode = self.done * self.settings.episodes_per_step
            rate = self.learner.scheduler.get_last_lr()[0]
            self.history.add(self.done, {"episode": episode, "learning_rate": rate, **metrics})
        return metrics

    def _show_samples(self, prompts: Sequence[list[int]], sampled: Sampled) -> None:
        every = self.settings.sample_steps
        if every and self.done % every == 0 and processes.number() == 0:
            rows = zip(self._repeated(prompts), sampled.completions, sampled.scores, strict=True)
            shown = [
                {"prompt": self.text(prompt), "completion": self.text(completion.tokens), "score": score}
                for prompt, completion, score in list(rows)[:SAMPLES]
            ]
            self.history.add(self.done + 1, {"samples": shown})

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[f"time/{phase}"] = time.perf_counter() - start

    # -- stopping and going on ----------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Everything that the rest of the run depends on."""
        learner = self.learner
        tensors = self._weights() | {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(learner.optimizer).items()}
        plain = {
            "groups": learner.optimizer.state_dict()["param_groups"],
            "scheduler": learner.scheduler.state_dict(),
            "kl_coef": self.kl.coef,
            "prompts": self.order.waiting,
            "ptx": learner.ptx_order.waiting,
            "pending": self._pending,
        }
        own = {"random": random_state(self.generator, self.shuffle), "budgets": [self.budget.tokens, learner.budget.tokens]}
        return State(kept(tensors), plain, own)

    def resume(self) -> bool:
        """Go on from the last checkpoint. False where there is none."""
        step = None if self.checkpoints is None else self.checkpoints.latest()
        if self.checkpoints is None or step is None:
            return False
        place = self.checkpoints.place(step)
        with resuming(place):
            self._restore(self.checkpoints.load(step), place)
        self.done = step
        say(f"going on from step {step} of {self.settings.steps}")
        return True

    def _restore(self, state: State, place: Path) -> None:
        learner = self.learner
        if wrong := self._misfit(state.tensors):
            raise AlignError(f"the checkpoint {place} does not fit the model ({wrong}); remove it to start before it")
        with torch.no_grad():
            for name, parameter in self._weights().items():
                parameter.copy_(dealt(state.tensors[name], parameter))
        prefix = "optimizer/"
        moments = {name.removeprefix(prefix): tensor for name, tensor in state.tensors.items() if name.startswith(prefix)}
        restore_optimizer(learner.optimizer, moments, state.plain["groups"])
        learner.scheduler.load_state_dict(state.plain["scheduler"])
        self.kl.coef = state.plain["kl_coef"]
        self.order.waiting, learner.ptx_order.waiting = state.plain["prompts"], state.plain["ptx"]
        self._pending = defaultdict(list, state.plain["pending"])
        self.budget.tokens, learner.budget.tokens = state.own["budgets"]
        restore_random_state(state.own["random"], self.generator, self.shuffle)

    def _misfit(self, tensors: dict[str, Tensor]) -> str | None:
        """What of a checkpoint is not there or of another shape. (One number would be taken for all of a row.)"""
        shapes = {name: tuple(weight.shape) for name, weight in self._weights().items()}
        trained = [p for group in self.learner.optimizer.param_groups for p in group["params"]]
        moments = {f"optimizer/{number}": tuple(p.shape) for number, p in enumerate(trained)}
        known = [name for name, tensor in tensors.items() if name.startswith("optimizer/") and tensor.dim()]
        for name, shape in {**shapes, **{name: moments.get(name.rpartition(".")[0]) for name in known}}.items():
            if name not in tensors:
                return f"{name} is missing"
            if tuple(tensors[name].shape) != shape:
                return f"{name} has the shape {tuple(tensors[name].shape)}, expected {shape}"
        return None

    def _weights(self) -> dict[str, Tensor]:
        return {f"{role}/{name}": weight for role, named in self.models.parameters().items() for name, weight in named.items()}

    def _kept(self) -> Sampled | None:
        """What a run that was cut had sampled and scored for this step."""
        kept = None if self.checkpoints is None else self.checkpoints.rollout(self.done + 1)
        if kept is None:
            return None
        restore_random_state(kept["random"], self.generator)
        return Sampled.read(kept["sampled"])

    def _keep(self, sampled: Sampled) -> None:
        if self.checkpoints is not None:
            kept = {"sampled": sampled.plain(), "random": random_state(self.generator)}
            self.checkpoints.keep_rollout(self.done + 1, kept)


def check(settings: PPOSettings, sampling: Sampling, *, has_critic: bool) -> None:
    """Raise `AlignError` where settings, sampling and models do not fit together."""
    if sampling.temperature <= 0:
        raise AlignError("PPO samples its policy: temperature must be above 0")
    if sampling.top_p != 1.0 or sampling.top_k != 0:
        raise AlignError("PPO optimizes the distribution it samples: top_p must be 1 and top_k 0")
    name = settings.advantage_estimator
    estimator = estimators[name]
    if estimator.needs_critic != has_critic:
        raise AlignError(f"advantage_estimator {name!r} " + ("needs a critic" if estimator.needs_critic else "takes no critic"))
    if estimator.needs_group and settings.num_generations < 2:
        raise AlignError(f"advantage_estimator {name!r} compares the completions of one prompt: set num_generations to 2 or more")
    if settings.critic_warmup_steps and not has_critic:
        raise AlignError(f"critic_warmup_steps trains a critic, and advantage_estimator {name!r} has none")
    each = processes.count() * settings.num_mini_batches * settings.num_generations
    if settings.episodes_per_step % each:
        raise AlignError(f"episodes_per_step ({settings.episodes_per_step}) must be a multiple of {each} on this many processes")
