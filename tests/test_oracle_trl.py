"""TRL as an oracle: on one batch, with the same weights, its trainers and ours have the same loss and the same gradient."""

import copy

import pytest
import torch
from helpers import assert_same, build, documents, llama, pairs, run
from transformers import TrainingArguments

from align.encode import Encoder
from align.engine import enable_forest
from align.losses import preference_losses
from align.schema import LabelledRow, Message, PreferenceRow
from align.stages.preference import TRL_LOSSES
from align.stages.preference import Preference as PreferenceStage
from align.trainers.kto import KTOTrainer, add_mismatched
from align.trainers.objectives import LanguageModel, Preference, RewardModel, Unpaired, add_reference_logps
from align.trainers.trl import dpo_trainer, kto_trainer, reward_trainer, sft_trainer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def arguments(tmp_path):
    """Arguments of a TRL config: one batch holds everything."""
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False, "logging_steps": 1}
    return {"output_dir": str(tmp_path), "per_device_train_batch_size": 64, "bf16": False, "gradient_checkpointing": False, **quiet}


def theirs(trainer):
    """Loss and gradients of a TRL trainer on its first batch, before any step."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.model.zero_grad(set_to_none=True)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


def ours(objective, model, trees):
    """The same by the engine, in two packs."""
    assert enable_forest(model) is None
    losses, gradients = run(objective, model, trees, sum(tree.tokens for tree in trees) // 2 + 1)
    return losses.mean(), gradients


def test_sft(tokenizer, arguments):
    trees, model = documents(11, 9), llama()
    oracle = theirs(sft_trainer(copy.deepcopy(model), tokenizer, trees, [], arguments))
    assert_same(ours(LanguageModel(), model, trees), oracle)


@pytest.mark.parametrize("center", [0.0, 0.05])
def test_reward(tokenizer, arguments, center):
    trees, model = pairs(11, 9), build("llama", score_head=True, **SIZES)
    oracle = theirs(reward_trainer(copy.deepcopy(model), tokenizer, trees, [], arguments, center))
    assert_same(ours(RewardModel(center), model, trees), oracle)


def conversation(*turns):
    return [Message(role=role, content=content) for role, content in zip(("user", "assistant") * 4, turns, strict=False)]


def said(text):
    return [Message(role="assistant", content=text)]


ROWS = [
    PreferenceRow(prompt=conversation("How are you?"), chosen=said("Fine, thanks!"), rejected=said("a cat")),
    PreferenceRow(prompt=conversation("one two", "three", "four"), chosen=said("five"), rejected=said("the mat sat on me, thanks")),
    PreferenceRow(prompt=conversation("hello to the cat and a mat"), chosen=said("hello"), rejected=said("eight seven six")),
]


LOSSES = {
    "dpo": {"beta": 0.3},
    "ld_dpo": {"beta": 0.3, "alpha": 0.4},
    "dpo_norm": {"beta": 2.0},
    "ipo": {"beta": 0.3, "average": True},
    "robust": {"beta": 0.3, "label_smoothing": 0.1},
    "hinge": {"beta": 0.3},
    "apo_zero": {"beta": 0.3},
    "apo_down": {"beta": 0.3},
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def move(policy):
    """The policy away from the reference, where every loss is at a constant."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return copy.deepcopy(policy)


@pytest.fixture
def calling(tokenizer):
    """The tokenizer with a template that shows tools, in few tokens."""
    tokenizer = copy.deepcopy(tokenizer)
    assert "{%- if tools -%}" in tokenizer.chat_template
    without = tokenizer.chat_template.replace("{%- if tools -%}", "{%- if false -%}")
    tokenizer.chat_template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + without
    return tokenizer


@pytest.mark.parametrize("loss", TRL_LOSSES)
def test_dpo(calling, arguments, loss):
    """From rows, which TRL renders and tokenizes itself. One shows a tool; the longer answer is the chosen one here, there the
    other.
    """
    rows, reference = [ROWS[0], ROWS[1].model_copy(update={"tools": TOOLS}), ROWS[2]], llama()
    policy = copy.deepcopy(reference)
    stage = PreferenceStage(model="m", data="d", engine="trl", loss=loss, max_length=None, **LOSSES[loss])
    trainer = dpo_trainer(policy, calling, rows, [], arguments | stage.trl_arguments)
    moved = move(policy)
    oracle = theirs(trainer)

    assert enable_forest(reference) is None
    function = preference_losses[loss]
    trees = add_reference_logps(reference, Encoder(calling).preference(rows).trees, 64, common=function.needs_common)
    at_start, _ = ours(Preference(function, LOSSES[loss]), reference, trees)
    assert abs(oracle[0].item() - at_start.item()) > 0.01
    assert_same(ours(Preference(function, LOSSES[loss]), moved, trees), oracle)


LABELLED = [
    LabelledRow(prompt=row.prompt, completion=answer, label=label)
    for row in ROWS
    for label, answer in ((True, row.chosen), (False, row.rejected))
]
WEIGHTS = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}


@pytest.mark.parametrize("max_length", [None, 42])
@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_kto(calling, arguments, max_length, max_tokens):
    """z₀ is above 0 here. It is TRL's, however the batch is cut, and where answers are cut to `max_length`, each as much as the
    prompt before it asks for.
    """
    rows, reference = [LABELLED[0].model_copy(update={"tools": TOOLS}), *LABELLED[1:]], llama()
    encoded, whole = (Encoder(calling, length).unpaired(rows) for length in (max_length, None))
    assert len(encoded.trees) == 6
    assert encoded.cut_rows == (0 if max_length is None else 1)
    trees = add_mismatched(encoded.trees, [tree.branches[0] for tree in whole.trees], 64, max_length)
    policy = copy.deepcopy(reference)
    trainer = kto_trainer(policy, calling, rows, [], {**arguments, **WEIGHTS, "max_length": max_length})
    moved = move(policy)
    oracle = theirs(trainer)

    for model in (reference, moved):
        assert enable_forest(model) is None
    args = TrainingArguments(remove_unused_columns=False, **arguments)
    trees = add_reference_logps(reference, trees, 64)
    mine = KTOTrainer(moved, Unpaired(**WEIGHTS), args, trees, max_tokens=max_tokens)
    (batch,), count = mine.get_batch_samples(iter([trees]), 1, torch.device("cpu"))
    moved.zero_grad()
    loss = mine.training_step(moved, batch, count)
    metrics = mine._means(mine._sums)
    assert metrics["kl"] > 0.1
    assert metrics["kl"] == pytest.approx(trainer._metrics["eval"]["kl"][0], rel=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert metrics[name] == pytest.approx(trainer._metrics["eval"][name][0], rel=1e-4), name
    assert_same((loss, {name: p.grad for name, p in moved.named_parameters()}), oracle)
