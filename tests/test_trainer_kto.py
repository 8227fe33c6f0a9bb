"""KTO on forests: the divergence estimate belongs to the whole batch, no cut changes a result, and it learns."""

import random
from dataclasses import replace

import pytest
import torch
from helpers import Alone, assert_close, llama, tokens
from transformers import TrainerCallback, TrainingArguments

from align.data import write_rows
from align.encode import Encoder
from align.engine import enable_forest
from align.forest import Tree
from align.models import save_model
from align.progress import History
from align.schema import LabelledRow
from align.stages import KTO
from align.stages.base import Context
from align.trainers.kto import KTOTrainer, add_mismatched
from align.trainers.objectives import Unpaired, add_reference_logps

WEIGHTS = {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.3}


class Enough(Exception):
    """What there is to see is seen."""


def answers(seed, count, label=None):
    """Good answers are of tokens 10 to 29, bad ones of tokens 30 to 49; a third is bad, or all are `label`."""
    draw, trees = random.Random(seed), []
    for number in range(count):
        good = number % 3 > 0 if label is None else label
        low = 10 if good else 30
        answer = [draw.randrange(low, low + 20) for _ in range(draw.randint(2, 9))]
        trees.append(Tree(tokens(draw, draw.randint(1, 8)), (answer,), values={"desirable": [float(good)]}))
    return trees


def paired(trees, batch_size=8):
    return add_mismatched(trees, [tree.branches[0] for tree in trees], batch_size, None)


@pytest.fixture
def make(tmp_path):
    """Builds a trainer whose reference is another model than the policy, so that z₀ is not 0 from the start."""

    def build_trainer(model, trees, held=None, *, max_tokens=64, callbacks=None, reference=None, **arguments):
        assert enable_forest(model) is None
        if reference is None:
            reference = llama(seed=3)
            assert enable_forest(reference) is None
        trees, held = (add_reference_logps(reference, part, 512) for part in (trees, held or []))
        quiet = {"report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
        quiet |= {"remove_unused_columns": False, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential"}
        defaults = {"output_dir": str(tmp_path), "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_steps": 3}
        args = TrainingArguments(**{**defaults, **quiet, **arguments})
        return KTOTrainer(model, Unpaired(**WEIGHTS), args, trees, held or None, max_tokens=max_tokens, callbacks=callbacks)

    return build_trainer


def test_each_prompt_meets_the_answer_of_its_neighbour_in_the_batch():
    trees = [Tree([n] * n, ([n] * 3,), values={"desirable": [1.0]}) for n in (1, 2, 3, 4, 5)]
    answers = [[n] * 3 for n in (1, 2, 3, 4, 5)]
    found = add_mismatched(trees, answers, 2, 5)
    assert [tree.branches for tree in found] == [
        ([1] * 3, [2] * 3),
        ([2] * 3, [1] * 3),
        ([3] * 3, [4] * 2),
        ([4] * 3, [3] * 1),
        ([5] * 3, []),
    ], "cut to 5 tokens with the prompt"
    assert [tree.values for tree in found] == [tree.values for tree in trees]
    assert add_mismatched(trees[:2], answers, 2, None)[0].branches[1] == [2] * 3
    assert add_mismatched(trees, answers, 2, None)[4].branches[1] == [4] * 3, "a row alone in the last batch"
    assert add_mismatched(trees[:1], answers[:1], 2, None)[0].branches[1] == [1] * 3, "there is no other"


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    seen = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = self.seen or {name: p.grad.clone() for name, p in model.named_parameters()}


def test_a_stage_pairs_its_rows_alike_however_a_step_is_cut(tmp_path, tokenizer):
    """z₀, above 0 in the last step, depends on which answers are mismatched."""
    save_model(llama(), tokenizer, tmp_path / "base")
    words = ["one", "two three", "four", "five six seven", "eight", "nine ten"]
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"say {word}:", "completion": f" {word}", "label": True} for word in words])
    seen = {}
    for rows, steps in ((6, 1), (2, 3)):
        context = Context("kto", tmp_path, History(tmp_path / f"{rows}.jsonl"))
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        fixed = {"beta": 0.1, "learning_rate": 1e-2, "held_out": 0, "max_steps": 3, "logging_steps": 1, "warmup_ratio": 0}
        stage = KTO(model=str(tmp_path / "base"), data=str(tmp_path / "rows.jsonl"), **fixed, **cut)
        stage.run(context)
        seen[rows] = [record["kl"] for record in context.history.records if "kl" in record]
    assert seen[6][-1] > 0.1
    assert seen[2] == pytest.approx(seen[6], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_a_stage_hands_to_its_trainer(seed, tmp_path, tokenizer, monkeypatch):
    """Rows shuffled by the seed and then in that order, each with its neighbour's whole answer cut behind its own prompt; no
    dropout, the stage's weights, and whether a step that is not finite is left out.
    """
    save_model(llama(attention_dropout=0.5), tokenizer, tmp_path / "base")
    said = ["sat on a mat and said hello to me", "one", "two three four five", "Fine, thanks!", "six seven eight how are you"]
    prompts = ["Fine, thanks! one two three four five six", "a", "the cat", "hello", "are you"]
    rows = [{"prompt": p, "completion": f" {word}", "label": True} for p, word in zip(prompts, said, strict=True)]
    write_rows(tmp_path / "rows.jsonl", rows)
    seen = []

    def watched(*given, **rest):
        seen.append((*given, rest["skip_non_finite"]))
        raise Enough

    monkeypatch.setattr("align.trainers.kto.KTOTrainer", watched)
    weights = {"beta": 0.5, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    place = {"model": str(tmp_path / "base"), "data": str(tmp_path / "rows.jsonl"), "held_out": 0}
    place["on_non_finite"] = ("stop", "skip")[seed]
    with pytest.raises(Enough):
        KTO(**place, **weights, seed=seed, max_length=20).run(Context("kto", tmp_path, History(tmp_path / "metrics.jsonl")))
    ((model, objective, args, trees, _, skips),) = seen
    assert skips == (seed == 1)
    assert objective == Unpaired(**weights)
    assert args.train_sampling_strategy == "sequential"
    assert model.model.layers[0].self_attn.attention_dropout == 0
    random.Random(seed).shuffle(rows)
    whole = Encoder(tokenizer).unpaired([LabelledRow(**row) for row in rows]).trees
    assert [tree.prompt for tree in trees] == [tree.prompt for tree in whole]
    for number, tree in enumerate(trees):
        room = 20 - len(tree.prompt)
        assert tree.branches == tuple(whole[at].branches[0][:room] for at in (number, number - 1))
    assert max(tree.longest for tree in whole) > 20


CUTS = {
    "one forest": {"per_device_train_batch_size": 8, "max_tokens": 10_000},
    "a tree a forest": {"per_device_train_batch_size": 8, "max_tokens": 1},
    "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_tokens": 50},
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "max_tokens": 10_000},
}


def test_nothing_depends_on_the_cut(make):
    """Loss, z₀, gradient and weights; z₀ is of the optimizer step's whole batch and above 0, so it matters."""
    results = {}
    for name, cut in CUTS.items():
        spy, model, trees = Gradients(), llama(), paired(answers(1, 24))
        trainer = make(model, trees, callbacks=[spy], optim="sgd", max_grad_norm=1e9, **cut)
        trainer.train()
        logged = [{k: r[k] for k in ("loss", "kl", "rewards/margins")} for r in trainer.state.log_history if "loss" in r]
        results[name] = spy.seen, {n: p.detach() for n, p in model.named_parameters()}, logged
    gradients, weights, logged = results.pop("one forest")
    assert min(record["kl"] for record in logged) > 0.1
    for name, (other_gradients, other_weights, other_logged) in results.items():
        for record, other in zip(logged, other_logged, strict=True):
            assert other == pytest.approx(record, rel=1e-5), name
        for parameter, gradient in gradients.items():
            assert_close(other_gradients[parameter], gradient, what=parameter)
            assert_close(other_weights[parameter], weights[parameter], what=parameter)


def test_the_loss_is_the_paper_s(make):
    """Every sequence alone through the models' own forward; z₀ from the second branches, over all held-out rows."""
    policy, reference, held = llama(seed=3), llama(), paired(answers(11, 7))

    def sums(model):
        per_token = iter(Alone(model, [Tree(t.prompt, t.branches) for t in held])().logps.tolist())
        return torch.tensor([[sum(next(per_token) for _ in branch) for branch in tree.branches] for tree in held])

    with torch.no_grad():
        ratios = sums(policy) - sums(reference)
    assert enable_forest(reference) is None
    found = make(policy, held, held, max_tokens=30, reference=reference).evaluate()
    kl = max(0.0, ratios[:, 1].mean().item())
    good = torch.tensor([tree.values["desirable"][0] for tree in held]).bool()
    rewards = 0.5 * (ratios[:, 0] - kl)
    losses = torch.where(good, 1 - torch.sigmoid(rewards), 1.3 * (1 - torch.sigmoid(-rewards)))
    assert kl > 0.1
    assert found["eval_kl"] == pytest.approx(kl, rel=1e-4)
    assert found["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    means = [0.5 * ratios[part, 0].mean().item() for part in (good, ~good)]
    assert [found["eval_rewards/chosen"], found["eval_rewards/rejected"]] == pytest.approx(means, rel=1e-4)
    assert found["eval_rewards/margins"] == pytest.approx(means[0] - means[1], rel=1e-4)


def test_the_estimate_is_at_least_0(make):
    """Though its mean of log ratios is below 0: no answer is as likely as under this reference."""
    certain = [replace(tree, values={**tree.values, "reference_logps": [0.0, 0.0]}) for tree in paired(answers(11, 7))]
    found = make(llama(), paired(answers(1, 8))).evaluate(certain)
    assert found["eval_kl"] == 0
    assert found["eval_rewards/chosen"] < 0


def test_rows_of_one_label_have_no_mean_of_the_other(make):
    trainer = make(llama(), paired(answers(5, 4, label=True), 2), max_steps=1)
    trainer.train()
    (record,) = [record for record in trainer.state.log_history if "loss" in record]
    assert "rewards/chosen" in record
    assert not {"rewards/rejected", "rewards/margins"} & record.keys()


def test_it_separates_good_answers_from_bad_ones(make):
    model = llama(initializer_range=0.02)
    assert enable_forest(model) is None
    trees, held = (paired(answers(seed, count), 16) for seed, count in ((6, 96), (7, 24)))
    trainer = make(
        model, trees, held, reference=model, max_steps=30, per_device_train_batch_size=16, max_tokens=512, learning_rate=3e-3
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(0.5 * (2 + 1.3) / 3, rel=1e-5), "policy = reference: σ(0) for each"
    assert before["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert after["eval_rewards/chosen"] > after["eval_rewards/rejected"] + 1
