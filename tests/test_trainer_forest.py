"""The trainer: one gradient for any cut of the batch, exact evaluation, exact resume, and it learns."""

import copy
import itertools
import json
import math
import random
import runpy
import sys
from dataclasses import replace

import pytest
import torch
from helpers import Alone, assert_close, build, documents, llama, pairs, run_alone, tokens
from launched import launch_two
from transformers import Trainer, TrainingArguments

from align.checkpointing import OPTIMIZER
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree
from align.heads import Head
from align.losses import LossOutput, preference_losses
from align.progress import History
from align.scoring import branch_logps, branch_scores, mean_nll, token_accuracy
from align.trainers.callbacks import Watch
from align.trainers.forest import ForestTrainer, PromptSampler
from align.trainers.objectives import LanguageModel, Preference, RewardModel, add_reference_logps

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def make(tmp_path):
    """Builds a trainer; what is not given is small, plain and quiet."""

    def build_trainer(model, objective, trees, held=None, *, max_tokens=64, callbacks=None, group_by_prompt=False, **arguments):
        if not hasattr(model, "forest_padded"):
            assert enable_forest(model) is None
        defaults = {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3}
        quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
        quiet |= {"remove_unused_columns": False, "dataloader_pin_memory": False}
        args = TrainingArguments(**{**defaults, **quiet, **arguments})
        others = {"max_tokens": max_tokens, "callbacks": callbacks, "group_by_prompt": group_by_prompt}
        return ForestTrainer(model, objective, args, trees, held, **others)

    return build_trainer


class Gradients:
    """Keeps the gradients of the first optimizer step, as they are before clipping would change them."""

    def __new__(cls):
        from transformers import TrainerCallback

        class Spy(TrainerCallback):
            seen = None

            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                if self.seen is None:
                    self.seen = {name: p.grad.clone() for name, p in model.named_parameters()}

        return Spy()


def repeated(seed, count, prompts=3):
    """Pairs of a few prompts, in no order."""
    trees = pairs(seed, count)
    return [replace(tree, prompt=trees[i % prompts].prompt) for i, tree in enumerate(trees)]


def comparisons(seed, prompts=8):
    """All comparisons of three answers to each of a few prompts, in no order."""
    draw = random.Random(seed)
    trees = []
    for _ in range(prompts):
        prompt, answers = tokens(draw, draw.randint(1, 6)), [tokens(draw, n) for n in (4, 6, 10)]
        trees += [Tree(prompt, pair, values={"margin": [draw.random()]}) for pair in itertools.combinations(answers, 2)]
    return draw.sample(trees, len(trees))


def referenced(count):
    """`repeated` with made-up log-probs of the reference, so that a value that went to another row would show."""
    draw = random.Random(count)
    return [replace(t, values={"reference_logps": [-40 * draw.random(), -40 * draw.random()]}) for t in repeated(1, count)]


GOALS = {
    "sft": (llama, LanguageModel(), documents(1, 24)),
    "orpo": (llama, Preference(preference_losses["orpo"], {"lam": 0.1}), pairs(1, 24)),
    "reward": (lambda: build("llama", score_head=True, **SIZES), RewardModel(), pairs(1, 24)),
    "pairs of few prompts": (llama, Preference(preference_losses["rpo"], {"beta": 0.3, "rpo_alpha": 0.5}), referenced(24)),
    "rewards of few prompts": (
        lambda: build("llama", score_head=True, **SIZES),
        RewardModel(center_rewards_coefficient=0.1, use_margin=True),
        repeated(1, 24),
    ),
    "rewards beside a language model": (
        lambda: build("llama", score_head=True, **SIZES),
        RewardModel(sft_coef=0.5, language_head=Head(torch.randn(320, 32, generator=torch.Generator().manual_seed(3)))),
        pairs(1, 24),
    ),
    "comparisons": (lambda: build("llama", score_head=True, **SIZES), RewardModel(), comparisons(1)),
}
CUTS = {
    "8 x 1, one forest": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_tokens": 10_000},
    "8 x 1, a tree a forest": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_tokens": 1},
    "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens": 50},
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_tokens": 10_000},
}


@pytest.mark.parametrize("goal", GOALS)
def test_gradient_and_weights_do_not_depend_on_the_cut(make, goal):
    """SGD, so that weights show a gradient's size and not only its sign. Rows are uneven, so a mean of means would differ."""
    build_model, objective, trees = GOALS[goal]
    results = {}
    for name, cut in CUTS.items():
        spy, model = Gradients(), build_model()
        trainer = make(model, objective, trees, callbacks=[spy], optim="sgd", max_grad_norm=1e9, seed=5, **cut)
        trainer.train()
        results[name] = spy.seen, {n: p.detach() for n, p in model.named_parameters()}, trainer.state.log_history[0]["loss"]
    gradients, weights, loss = results.pop("8 x 1, one forest")
    for name, (other_gradients, other_weights, other_loss) in results.items():
        assert other_loss == pytest.approx(loss, rel=1e-5), name
        for parameter, gradient in gradients.items():
            assert_close(other_gradients[parameter], gradient, what=parameter)
            assert_close(other_weights[parameter], weights[parameter], what=parameter)


@pytest.mark.parametrize("goal", GOALS)
def test_the_gradient_is_that_of_the_mean_over_the_batch(make, goal):
    """One step of the trainer against each sequence alone through the model's own forward."""
    build_model, objective, trees = GOALS[goal]
    spy, model = Gradients(), build_model()
    losses, gradients = run_alone(objective, copy.deepcopy(model), trees)
    batch = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}
    trainer = make(model, objective, trees, callbacks=[spy], max_steps=1, max_grad_norm=1e9, max_tokens=10_000, **batch)
    trainer.train()
    for name, gradient in gradients.items():
        assert_close(spy.seen[name], gradient, what=name)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    prompts = {tuple(tree.prompt) for tree in trees if tree.branches}
    answers = {(tuple(tree.prompt), tuple(branch)) for tree in trees for branch in tree.branches}
    texts = sum(len(tree.prompt) for tree in trees if not tree.branches)
    assert logged["num_tokens"] == texts + sum(map(len, prompts)) + sum(len(branch) for _, branch in answers)


class Scarce:
    """`objective` on a device that holds forests of at most `limit` tokens.

    The backward pass of a larger one fails at its very end, when all other gradients have been added already.
    """

    def __init__(self, model, objective, limit):
        self.objective, self.limit, self.tokens, self.failures = objective, limit, 0, 0
        self.units = objective.units
        next(model.parameters()).register_hook(self._fail)

    def _fail(self, gradient):
        if self.tokens > self.limit:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    def __call__(self, model, forest):
        self.tokens = forest.tokens
        return self.objective(model, forest)


@pytest.mark.parametrize("goal", GOALS)
def test_a_step_that_runs_out_of_memory_is_done_again_and_nothing_is_lost(make, goal, capsys):
    """The first step does not fit into one forest, nor into two; weights and logs are those of a run that had memory enough."""
    build_model, objective, trees = GOALS[goal]
    results = []
    for scarce in (False, True):
        model = build_model()
        goal_here = Scarce(model, objective, 70) if scarce else objective
        shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens": 10_000}
        trainer = make(model, goal_here, trees, optim="sgd", max_grad_norm=1e9, seed=5, max_steps=4, **shape)
        trainer.train()
        results.append((dict(model.named_parameters()), [r for r in trainer.state.log_history if "loss" in r]))
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(said) == goal_here.failures > 0
    assert trainer.budget.tokens <= 70
    assert trainer.eval_budget.tokens == 10_000
    (weights, logs), (ours, our_logs) = results
    for name, weight in weights.items():
        assert_close(ours[name].detach(), weight.detach(), what=name)
    for record, other in zip(logs, our_logs, strict=True):
        record.pop("num_tokens"), other.pop("num_tokens")  # where forests are smaller, fewer rows share a prompt
        assert other == pytest.approx(record, rel=1e-4, abs=1e-6)


def test_evaluation_that_runs_out_of_memory_counts_every_row_once(make):
    class Narrow(LanguageModel):
        def __call__(self, model, forest):
            if forest.tokens > 40:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return super().__call__(model, forest)

    trees = documents(4, 20)
    wanted = make(llama(), LanguageModel(), documents(1), trees, max_tokens=1000).evaluate()
    trainer = make(llama(), Narrow(), documents(1), trees, max_tokens=1000)
    assert trainer.evaluate() == pytest.approx(wanted, rel=1e-6)
    assert trainer.budget.tokens == 1000


def test_a_row_too_large_for_memory_stops_with_what_to_do(make):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    trainer = make(model, Scarce(model, LanguageModel(), 15), documents(1, 8), per_device_train_batch_size=8)
    with pytest.raises(AlignError, match=r"out of memory on a row of 2\d tokens by itself .* Lower max_length"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_step_takes_as_few_passes_as_its_tokens_need(make):
    """Eight micro-steps of one row each share their passes."""

    class Counting(LanguageModel):
        passes = 0

        def __call__(self, model, forest):
            self.passes += 1
            return super().__call__(model, forest)

    objective, trees = Counting(), documents(1, 8)
    assert 50 < sum(tree.tokens for tree in trees) < 100
    shape = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_tokens": 50}
    make(llama(), objective, trees, max_steps=2, **shape).train()
    assert objective.passes == 4


def test_scores_come_in_the_order_of_the_rows(make, monkeypatch):
    """Rows are packed by length, in pieces of a long list, and some share a prompt; each gets its own score all the same."""
    trees = repeated(5, 30) + pairs(6, 10)
    model = llama()
    assert enable_forest(model) is None
    wanted = [branch_logps(model, [tree], 1)[0] for tree in trees]
    for max_tokens in (1, 50, 10_000, "auto"):
        found = branch_logps(model, trees, max_tokens)
        assert [pytest.approx(values, rel=1e-5) for values in found] == wanted
    monkeypatch.setattr("align.scoring.WINDOW", 16)
    assert [pytest.approx(values, rel=1e-5) for values in branch_logps(model, trees, 50)] == wanted
    hot = branch_logps(model, trees, 50, temperature=1e6)  # where each of 320 tokens is as likely as any other
    assert hot == [pytest.approx([-len(branch) * math.log(320) for branch in tree.branches], rel=1e-4) for tree in trees]


def test_the_last_batch_of_an_epoch_is_a_mean_of_its_own(make):
    """5 rows in batches of 2 x 2: the second step has one row, and its logged loss is the mean over that row's tokens."""
    trees = documents(3, 5)
    trainer = make(
        llama(), LanguageModel(), trees, max_steps=-1, num_train_epochs=1, learning_rate=1e-12,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, seed=1,
    )  # fmt: skip
    trainer.train()
    first, second = (record["loss"] for record in trainer.state.log_history if "loss" in record)
    alone = [(-Alone(llama(), [tree])().logps).detach() for tree in trees]
    candidates = [losses.mean().item() for losses in alone]
    last = min(range(5), key=lambda i: abs(candidates[i] - second))
    assert second == pytest.approx(candidates[last], rel=1e-5)
    assert first == pytest.approx(torch.cat(alone[:last] + alone[last + 1 :]).mean().item(), rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_update(make, poison):
    class Poisoned(LanguageModel):
        def __call__(self, model, forest):
            output = super().__call__(model, forest)
            self.calls = getattr(self, "calls", 0) + 1
            return LossOutput(output.loss * (poison if self.calls == 3 else 1), output.metrics)

    model = llama()
    before = copy.deepcopy(model.state_dict())
    trainer = make(
        model,
        Poisoned(),
        documents(1, 8),
        max_tokens=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        logging_nan_inf_filter=False,
    )
    with pytest.raises(AlignError, match=rf"the loss is {poison} at step 1; no update was made"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Poisoned(LanguageModel):
    """NaN at the steps `at`."""

    def __init__(self, at):
        self.at, self.calls = at, 0

    def __call__(self, model, forest):
        output = super().__call__(model, forest)
        self.calls += 1
        return LossOutput(output.loss * (math.nan if self.calls in self.at else 1), output.metrics)


def test_steps_that_are_left_out_change_nothing_and_ten_in_a_row_may_be(make):
    """Every second one may be, for as long as it takes; an eleventh in a row stops the run."""

    def trained(at, steps):
        model = llama()
        trainer = make(model, Poisoned(at), documents(1, 2), per_device_train_batch_size=2, max_tokens=10_000, max_steps=steps)
        trainer.skip_non_finite = True
        trainer.train()
        return model.state_dict()

    start = llama().state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in trained(range(1, 11), 10).items())
    assert all(weight.isfinite().all() for weight in trained(range(1, 23, 2), 22).values())
    with pytest.raises(AlignError, match="the loss is nan at step 13"):
        trained(range(3, 14), 14)


class Steep(LanguageModel):
    """The same loss with gradients of about 1e30, whose squares have no number."""

    def __call__(self, model, forest):
        output = super().__call__(model, forest)
        return LossOutput(output.loss + (output.loss - output.loss.detach()) * 1e30, output.metrics)


def test_a_gradient_whose_norm_overflows_stops_the_run(make):
    """Clipping by that norm makes 0 of it: the step would be lost without a word."""
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AlignError, match="the gradient's norm is inf at step 1; no update was made"):
        make(model, Steep(), documents(1)).train()
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_evaluation_is_exact_over_uneven_batches(make):
    """7 rows in batches of 3, 3 and 1, each cut further: means are over tokens, not batches. One is what the model would say."""
    model, trees = llama(), documents(4, 6)
    likeliest = [5]
    with torch.no_grad():
        for _ in range(4):
            likeliest.append(model(input_ids=torch.tensor([likeliest])).logits[0, -1].argmax().item())
    trees.insert(2, Tree(likeliest, prompt_mask=[True] * 5))
    with torch.no_grad():
        alone = Alone(copy.deepcopy(model), trees)()
    trainer = make(model, LanguageModel(), documents(1), trees, per_device_eval_batch_size=3, max_tokens=30)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(-alone.logps.mean().item(), rel=1e-6)
    assert found["eval_perplexity"] == pytest.approx(math.exp(-alone.logps.mean().item()), rel=1e-5)
    assert found["eval_mean_token_accuracy"] == pytest.approx(alone.correct.float().mean().item(), rel=1e-6) != 0
    assert mean_nll(model, trees, 30) == pytest.approx(found["eval_loss"], rel=1e-6)
    assert token_accuracy(model, trees, 30) == pytest.approx(found["eval_mean_token_accuracy"], rel=1e-6)


def test_evaluation_is_without_dropout_and_leaves_the_mode_as_it_was(make):
    model, trees = llama(attention_dropout=0.5), documents(4, 7)
    with torch.no_grad():
        alone = Alone(copy.deepcopy(model), trees)()
    found = make(model.train(), LanguageModel(), documents(1), trees).evaluate()
    assert found["eval_loss"] == pytest.approx(-alone.logps.mean().item(), rel=1e-6)
    assert model.training
    assert mean_nll(model, trees, 64) == pytest.approx(found["eval_loss"], rel=1e-6)


def test_evaluation_of_pairs_is_a_mean_over_pairs(make):
    model, trees = build("llama", score_head=True, **SIZES), pairs(4, 7)
    with torch.no_grad():
        chosen, rejected = Alone(copy.deepcopy(model), trees)().view(-1, 2).T
    found = make(model, RewardModel(), pairs(1), trees, per_device_eval_batch_size=3, max_tokens=30).evaluate()
    assert found["eval_loss"] == pytest.approx((1 + (rejected - chosen).exp()).log().mean().item(), rel=1e-5)
    assert found["eval_accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert "eval_perplexity" not in found


def test_pairs_ranked_right_are_told_apart_by_the_length_of_the_chosen(make):
    """By a quarter at least; which pairs are ranked right is up to the reference, so far is it from any model."""
    longer = {(5, 4): True, (9, 2): True, (8, 6): False}
    shorter = {(4, 5): True, (2, 9): False, (6, 8): False, (1, 3): False}
    alike = {(6, 5): False, (5, 6): True, (4, 4): True}
    draw = random.Random(0)
    trees = [
        Tree(tokens(draw, 3), [tokens(draw, n) for n in lengths], values={"reference_logps": [-1e4, 0] if right else [0, -1e4]})
        for lengths, right in (longer | shorter | alike).items()
    ]
    goal = Preference(preference_losses["dpo"], {"beta": 0.1})
    found = make(llama(), goal, trees, trees, per_device_eval_batch_size=4, max_tokens=60).evaluate()
    assert found["eval_accuracies/chosen_longer"] == pytest.approx(2 / 3)
    assert found["eval_accuracies/chosen_shorter"] == pytest.approx(1 / 4)


def test_a_reward_model_tells_its_pairs_apart_too(make):
    """Of pairs that it ranks by chance; none is right while it scores all answers alike."""
    draw, lengths = (
        random.Random(0),
        [(5, 4), (9, 2), (8, 6), (7, 1), (6, 4), (4, 5), (2, 9), (6, 8), (1, 7), (4, 6), (6, 5), (5, 6)],
    )
    trees = [Tree(tokens(draw, 3), tuple(tokens(draw, n) for n in pair)) for pair in lengths]
    model = build("llama", score_head=True, **SIZES)
    with torch.no_grad():
        chosen, rejected = Alone(copy.deepcopy(model), trees)().view(-1, 2).T
    right = (chosen > rejected).float()
    longer, shorter = right[:5].mean().item(), right[5:10].mean().item()
    assert {longer, shorter}.isdisjoint({0, 1})
    assert longer != shorter
    trainer = make(model, RewardModel(), trees, trees, max_tokens=60)
    found = trainer.evaluate()
    assert [found[f"eval_accuracies/chosen_{than}"] for than in ("longer", "shorter")] == pytest.approx([longer, shorter])
    torch.nn.init.zeros_(model.score.weight)
    assert {v for name, v in trainer.evaluate().items() if "accurac" in name} == {0}


def test_the_loss_of_a_reward_model_with_a_margin_beside_a_language_model(make):
    """Bradley-Terry with the row's margin, and half the chosen answer's negative log-likelihood a token under the other head."""
    model, trees = build("llama", score_head=True, **SIZES), pairs(4, 7)
    head = Head(torch.randn(320, 32, generator=torch.Generator().manual_seed(3)))
    with torch.no_grad():
        said = Alone(copy.deepcopy(model), trees)(language_head=head)
    chosen, rejected = said.values.view(-1, 2).T
    margin = torch.tensor([tree.values["margin"][0] for tree in trees])
    per_answer = iter(said.logps.split([len(branch) for tree in trees for branch in tree.branches]))
    nll = torch.stack([-logps.mean() for logps in per_answer])[::2]
    for use_margin, sft_coef in ((True, 0.5), (False, 0.0)):
        goal = RewardModel(use_margin=use_margin, sft_coef=sft_coef, language_head=head if sft_coef else None)
        found = make(model, goal, trees, trees, max_tokens=60).evaluate()
        losses = (1 + (rejected - chosen + use_margin * margin).exp()).log() + sft_coef * nll
        assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert ("eval_nll" in found) is bool(sft_coef)
    assert margin.abs().max() > 0.1


def test_prompts_are_drawn_whole_and_in_another_order_each_epoch():
    trees = comparisons(1)
    sampler = PromptSampler(trees, seed=0)
    first, again = list(sampler), list(PromptSampler(trees, seed=0))
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second
    assert sorted(first) == sorted(second) == list(range(len(sampler)))
    for order in (first, second):
        prompts = [tuple(trees[i].prompt) for i in order]
        assert len(list(itertools.groupby(prompts))) == len(set(prompts)) == 8


def test_comparisons_drawn_by_prompt_cost_less_and_come_to_the_same(make):
    """A batch of 12 comparisons: 4 prompts with 3 answers each, 20 tokens of answers a prompt instead of 40."""
    trees = comparisons(1)
    trainer = make(
        build("llama", score_head=True, **SIZES),
        RewardModel(),
        trees,
        max_steps=2,
        per_device_train_batch_size=12,
        group_by_prompt=True,
        max_tokens=10_000,
    )
    trainer.train()
    prompts = {tuple(tree.prompt) for tree in trees}
    assert trainer.state.log_history[1]["num_tokens"] == sum(map(len, prompts)) + 8 * 20


@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "prompts"])
def test_resume_is_bit_for_bit(make, tmp_path, grouped):
    """6 steps at once, and 3 steps, a checkpoint, a new process' worth of objects, 3 more: the same weights and losses.

    The batches are shuffled, the learning rate falls, AdamW has moments: each must be picked up where it was.
    """
    trees = comparisons(1, 6) if grouped else documents(1, 16)
    objective = Preference(preference_losses["orpo"], {"lam": 0.1}) if grouped else LanguageModel()
    fields = {"max_steps": 6, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 4, "warmup_steps": 2, "seed": 3}
    fields["group_by_prompt"] = grouped

    whole = make(llama(), objective, trees, output_dir=str(tmp_path / "whole"), **fields)
    whole.train()
    saving = {"output_dir": str(tmp_path / "cut"), "save_strategy": "steps", "save_steps": 3}
    make(llama(), objective, trees, **saving, **fields).train()
    torch.manual_seed(77)
    resumed = make(llama(seed=8), objective, trees, **saving, **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))

    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    losses = [[record["loss"] for record in t.state.log_history if "loss" in record] for t in (resumed, whole)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6


def test_deepspeed_keeps_its_own_state_and_we_what_was_summed(make, tmp_path, monkeypatch):
    """DeepSpeed is not here, so its part is left out: a run that goes on finds ours."""
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", lambda self, folder: None)
    trainer, other = (make(llama(), LanguageModel(), documents(1, 4), max_steps=1) for _ in range(2))
    trainer.train()
    trainer.is_deepspeed_enabled = True
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    trainer._save_rng_state(str(tmp_path))
    other._load_rng_state(str(tmp_path))
    assert other._tokens_seen == trainer._tokens_seen > 0
    assert not (tmp_path / OPTIMIZER).exists()


ROWS = {21: 7, 17: 1}
"""Rows to train on, and how many are held out beside them."""
TWO_PROCESSES = """
import sys
import torch
from helpers import documents, llama
from transformers import TrainingArguments
from align.engine import enable_forest
from align.trainers.forest import ForestTrainer
from align.trainers.objectives import LanguageModel

processes = int(sys.argv[2])
for rows, held in zip(*[map(int, sys.argv[3:])] * 2):
    folder = f"{sys.argv[1]}/{rows}-{processes}"
    args = TrainingArguments(
        folder, max_steps=4, learning_rate=0.1, adam_epsilon=1.0, lr_scheduler_type="constant", max_grad_norm=1e9, seed=5,
        per_device_train_batch_size=4 // processes, gradient_accumulation_steps=2, report_to=[], save_steps=2, logging_steps=1,
        remove_unused_columns=False, dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
    )
    for resume in (None, f"{folder}/checkpoint-2"):
        model = llama()
        enable_forest(model)
        trainer = ForestTrainer(model, LanguageModel(), args, documents(1, rows), documents(2, held), max_tokens=25)
        trainer.train(resume_from_checkpoint=resume)
    trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [{k: r[k] for k in r if k.endswith(("loss", "accuracy", "num_tokens"))} for r in trainer.state.log_history]
        torch.save((dict(model.named_parameters()), logs), f"{folder}.pt")
"""


def test_two_processes_do_as_one(tmp_path, monkeypatch):
    """Each cuts its rows into a number of forests of its own; weights, logged means and the evaluation are the same.

    The third step is the end of an epoch, with 5 rows left of 21 instead of 8, or 1 of 17, of which the second process gets none:
    accelerate fills up the processes' batches with rows from the epoch's start, which must not count, in a run that was resumed one
    step before either.
    """
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    rows = [str(number) for pair in ROWS.items() for number in pair]
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "1", *rows])
    runpy.run_path(str(script))
    launch_two([str(script), str(tmp_path), "2", *rows], tmp_path)
    for number in ROWS:
        (one, logs), (two, two_logs) = (torch.load(tmp_path / f"{number}-{n}.pt") for n in (1, 2))
        for name, weight in one.items():
            assert_close(two[name].detach(), weight.detach(), what=f"{name}, of {number} rows")
        assert [record.keys() for record in logs] == [record.keys() for record in two_logs]
        for record, other in zip(logs, two_logs, strict=True):
            assert other == pytest.approx(record, rel=1e-5), number
        assert "num_tokens" in logs[0]
        assert "eval_loss" in logs[-1]


def counting(draw, n):
    """Token k is followed by k + 1: something a tiny model can learn."""
    start = draw.randrange(10, 60)
    return list(range(start, start + n))


def test_sft_learns_what_carries_over_to_held_out_rows(make):
    """From about the uniform distribution's perplexity (320 tokens) to below 5 on rows that were not trained on."""
    draw = random.Random(0)
    rows = [Tree(counting(draw, n), prompt_mask=[False] + [True] * (n - 1)) for n in (6, 9, 12, 15) * 24]
    trainer = make(
        llama(initializer_range=0.02),
        LanguageModel(),
        rows[:80],
        rows[80:],
        max_steps=60,
        per_device_train_batch_size=16,
        max_tokens=512,
    )
    before = trainer.evaluate()["eval_perplexity"]
    trainer.train()
    after = trainer.evaluate()["eval_perplexity"]
    assert before > 250
    assert after < 5


def preferred(draw, count):
    """Answers of tokens 10 to 29 are chosen over longer answers of tokens 30 to 49."""
    low, high = (lambda: [draw.randrange(10, 30) for _ in range(4)]), (lambda: [draw.randrange(30, 50) for _ in range(6)])
    return [Tree(tokens(draw, 5), (low(), high()), values={"margin": [0.0]}) for _ in range(count)]


def test_dpo_separates_chosen_from_rejected(make):
    draw = random.Random(1)
    model = llama(initializer_range=0.02)
    assert enable_forest(model) is None
    trees, held = preferred(draw, 48), add_reference_logps(model, preferred(draw, 16), 512)
    objective = Preference(preference_losses["dpo"], {"beta": 0.1})
    trees = add_reference_logps(model, trees, 512)
    trainer = make(model, objective, trees, held, max_steps=30, per_device_train_batch_size=16, max_tokens=512, learning_rate=3e-3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)  # policy = reference: -log σ(0)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_rewards/accuracies"] == 1
    assert after["eval_rewards/margins"] > 1
    assert after["eval_loss"] < 0.4


def test_reward_model_separates_chosen_from_rejected(make):
    draw = random.Random(2)
    model = build("llama", score_head=True, **{**SIZES, "initializer_range": 0.02})
    torch.nn.init.zeros_(model.score.weight)
    trees, held = preferred(draw, 48), preferred(draw, 16)
    trainer = make(
        model, RewardModel(), trees, held, max_steps=30, per_device_train_batch_size=16, max_tokens=512, learning_rate=3e-3
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)  # a head of zeros prefers nothing
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] == 1
    assert all(chosen > rejected for chosen, rejected in branch_scores(model, held, 64))


def test_metrics_are_written_by_the_watch(make, tmp_path):
    history = History(tmp_path / "metrics.jsonl")
    trees = documents(1, 12)
    trainer = make(
        llama(), LanguageModel(), trees, documents(2, 4), callbacks=[Watch("sft", history)],
        eval_strategy="steps", eval_steps=2, max_steps=4, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records == history.records
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [1, 2, 3, 4]
    assert {"mean_token_accuracy", "grad_norm", "learning_rate", "num_tokens", "seconds"} <= training[0].keys()
    assert training[2]["num_tokens"] == sum(tree.tokens for tree in trees)  # three batches of 4 are one epoch
    assert [record["step"] for record in records if "eval_loss" in record] == [2, 4]
    assert history.last("eval_loss") == records[-1]["eval_loss"]


def test_reference_log_probs_are_the_model_s_own_now_and_do_not_change_its_mode():
    model, trees = llama().train(), pairs(3)
    theirs = Alone(copy.deepcopy(model).eval(), [replace(tree, values={}) for tree in trees])
    assert enable_forest(model) is None
    found = add_reference_logps(model, trees, 30)
    assert [tree.values["margin"] for tree in found] == [tree.values["margin"] for tree in trees]
    with torch.no_grad():
        per_token = iter(theirs().logps.tolist())
    for tree, (branch, other) in zip(found, branch_logps(model, trees, 1), strict=True):
        sums = [sum(next(per_token) for _ in branch_tokens) for branch_tokens in tree.branches]
        assert tree.values["reference_logps"] == pytest.approx(sums, rel=1e-5)
        assert [branch, other] == pytest.approx(sums, rel=1e-5)
