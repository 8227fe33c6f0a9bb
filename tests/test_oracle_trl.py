"""TRL as an oracle: on one batch, with the same weights, its trainers and ours have the same loss and the same gradient."""

import copy

import pytest
import torch
from helpers import assert_close, assert_same, build, documents, llama, pairs, run

from align.encode import Encoder
from align.engine import enable_forest
from align.errors import AlignError
from align.losses import preference_losses
from align.schema import Message, PreferenceRow
from align.trainers.objectives import LanguageModel, Preference, RewardModel, add_reference_logps
from align.trainers.trl import dpo_trainer, reward_trainer, sft_trainer

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


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "weather", "parameters": {}}}]])
def test_dpo(tokenizer, arguments, tools):
    """From rows, which TRL renders and tokenizes itself. The policy has moved away from the reference, else the loss is log 2."""
    tokenizer, rows = copy.deepcopy(tokenizer), [ROWS[0], ROWS[1].model_copy(update={"tools": tools}), ROWS[2]]
    tokenizer.chat_template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + tokenizer.chat_template
    reference = llama()
    policy = copy.deepcopy(reference)
    trainer = dpo_trainer(policy, tokenizer, rows, [], arguments, beta=0.3, label_smoothing=0.0, max_length=None)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.02 * torch.randn_like(p))
    moved = copy.deepcopy(policy)
    loss, gradients = theirs(trainer)

    assert enable_forest(reference) is None
    trees = add_reference_logps(reference, Encoder(tokenizer).preference(rows).trees, 64)
    our_loss, our_gradients = ours(Preference(preference_losses["dpo"], {"beta": 0.3}), moved, trees)
    assert abs(loss.item() - 0.6931) > 0.05
    assert_close(our_loss, loss, what="loss")
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert_close(our_gradients[name], gradient, what=name)


def test_what_trl_would_ignore_is_refused(tokenizer, arguments):
    with pytest.raises(AlignError, match="TRL's DPO loss ignores label_smoothing"):
        dpo_trainer(llama(), tokenizer, ROWS, [], arguments, beta=0.3, label_smoothing=0.2, max_length=None)
