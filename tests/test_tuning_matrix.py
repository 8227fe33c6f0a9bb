"""Every strategy in every stage, on models shaped like Llama and GPT-2: it trains, it lowers its loss, nothing else
moves; what is saved loads, answers the same and goes on training.
"""

import shutil

import pytest
import torch
from helpers import assert_close, build
from peft import PeftModel

from align.data import write_rows
from align.models import load_causal_lm, load_reward_model, save_model
from align.progress import History
from align.stages import KTO, PPO, SFT, Preference, Pretrain, RewardModel, training
from align.stages.base import Context
from align.tuning.strategies import SOFT, strategies

HIDDEN, WIDTH, LAYERS, HEADS, KV_HEADS, TOKENS, ROWS = 16, 24, 2, 2, 1, 3, 320
SHAPES = {
    "llama": {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": HIDDEN, "n_inner": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128},
}
ARGUMENTS = {
    "freeze": {"train_last": 1},
    "adapter": {"size": 4},
    "lora": {"r": 2},
    "rslora": {"r": 2},
    "dora": {"r": 2},
    "pissa": {"r": 2},
    "prefix": {"num_virtual_tokens": TOKENS},
    "prompt": {"num_virtual_tokens": TOKENS},
    "ptuning": {"num_virtual_tokens": TOKENS},
}
STAGES = {
    "pretrain": (Pretrain, "text", {}),
    "sft": (SFT, "sft", {}),
    "reward": (RewardModel, "pairs", {}),
    "dpo": (Preference, "pairs", {"loss": "dpo", "beta": 0.5}),
    "orpo": (Preference, "pairs", {"loss": "orpo", "lam": 0.1}),
    "simpo": (Preference, "pairs", {"loss": "simpo", "beta": 2.0, "gamma": 0.5}),
    "kto": (KTO, "pairs", {"beta": 0.5}),
}
PROMPTS = ["How are you?", "hello to me", "one two", "and said"]
TRAINED = [name for name in strategies if name != "qlora"]


def expected(shape, name, *, score_head):
    """How many parameters train, from the shapes alone: d hidden, w hidden units, k width of keys and values, L layers."""
    d, w, layers, score = HIDDEN, WIDTH, LAYERS, HIDDEN * score_head
    gated = shape == "llama"
    k = d * KV_HEADS // HEADS if gated else d
    attention = 2 * d * d + 2 * d * k if gated else 4 * d * d + 4 * d
    ffn = 3 * d * w if gated else 2 * d * w + w + d
    norm = d if gated else 2 * d
    layer = attention + ffn + 2 * norm
    head = ROWS * d if gated and not score_head else 0  # GPT-2's is its embeddings
    embeddings = ROWS * d + (0 if gated else 128 * d)
    # what goes into and comes out of each linear layer
    ways = [(d, d), (d, k), (d, k), (d, d), (d, w), (d, w), (w, d)] if gated else [(d, 3 * d), (d, d), (d, w), (w, d)]
    biases = 0 if gated else 4 * d + w + d
    lora = layers * sum(2 * (i + o) for i, o in ways)
    return (
        score
        + {
            "full": lambda: embeddings + layers * layer + norm + head,
            "freeze": lambda: layer + norm + head,
            "ffn": lambda: layers * ffn,
            "attention": lambda: layers * attention,
            "bias_norm": lambda: layers * (2 * norm + biases) + norm,
            "head": lambda: ffn,
            "adapter": lambda: layers * 4 * (3 * d if gated else 2 * d + 1),
            "lora": lambda: lora,
            "rslora": lambda: lora,
            "pissa": lambda: lora,
            "dora": lambda: lora + layers * sum(o for _, o in ways),
            "ia3": lambda: layers * (2 * k + w if gated else 3 * d + w),
            "prefix": lambda: TOKENS * layers * 2 * k,
            "prompt": lambda: TOKENS * d,
            "ptuning": lambda: TOKENS * d + 3 * (d * d + d),
        }[name]()
    )


@pytest.fixture(scope="module")
def ground(tmp_path_factory, tokenizer):
    """A folder with a base of each shape and rows for each stage."""
    folder = tmp_path_factory.mktemp("matrix")
    for shape, fields in SHAPES.items():
        save_model(build(shape, **fields), tokenizer, folder / shape)
    said = ["one two", "three four five", "six", "seven eight"]
    write_rows(folder / "text.jsonl", [{"text": f"the cat said {words}. hello to me {words}"} for words in said])
    write_rows(folder / "prompts.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    (folder / "one.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    write_rows(folder / "sft.jsonl", [{"instruction": "How are you?", "input": "", "output": f"Fine, {words}"} for words in said])
    write_rows(
        folder / "pairs.jsonl",
        [{"prompt": "How are you?", "chosen": f"Fine, {words}", "rejected": f"sat on a mat {words}"} for words in said],
    )
    return folder


@pytest.fixture
def seen(monkeypatch):
    """The model as it was made ready, parameter by parameter, and the model that was saved."""
    seen = {}
    ready, save = training.make_ready, training.save_model

    def make_ready(*arguments):
        model = ready(*arguments)
        seen.setdefault("start", {name: p.detach().clone() for name, p in model.named_parameters()})  # PPO's critic comes second
        return model

    def save_it(model, *rest):
        seen["model"] = model
        save(model, *rest)

    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)  # slow, and no part of this
    monkeypatch.setattr(training, "make_ready", make_ready)
    monkeypatch.setattr(training, "save_model", save_it)
    return seen


def run(stage, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return stage.run(Context("cell", folder, History(folder / "metrics.jsonl")))


def cut_after(step, folder):
    """What the run in `folder`/whole had left behind after `step` steps, as `folder`/cut."""
    name = f"checkpoint-{step}"
    shutil.copytree(folder / "whole" / "checkpoints" / name, folder / "cut" / "checkpoints" / name)
    shutil.copy(folder / "whole" / "metrics.jsonl", folder / "cut" / "metrics.jsonl")


def answers(model):
    ids = torch.tensor([[5, 40, 99, 7, 250, 31, 8, 100]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_strategy_in_a_stage(name, shape, kind, ground, seen, tmp_path):
    cls, rows, fields = STAGES[kind]
    data = str(ground / f"{rows}.jsonl")
    stage = cls(
        model=str(ground / shape),
        data=data,
        eval_data=data,
        tuning=name,
        tuning_args=ARGUMENTS.get(name, {}),
        chat_template="plain",
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        max_length=64,
        **fields,
    )
    metrics = run(stage, tmp_path / "whole")
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert metrics["trainable_parameters"] == expected(shape, name, score_head=kind == "reward")
    model = seen["model"]
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, seen["start"][path]), path
    assert any(not torch.equal(p, seen["start"][path]) for path, p in model.named_parameters())

    load = load_reward_model if kind == "reward" else load_causal_lm
    found = answers(load(str(tmp_path / "whole")))
    assert_close(found, answers(model), 2e-5)

    if kind in ("orpo", "simpo"):  # where they go on is DPO's way, and all that differs is a formula
        return
    # Cut after the first step, it goes on to the same end.
    cut_after(1, tmp_path)
    run(stage, tmp_path / "cut")
    assert_close(answers(seen["model"]), answers(model), 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_strategy_in_ppo(name, shape, ground, seen, tmp_path, monkeypatch, capsys):
    """The critic's loss falls, as every answer is worth 1; the policy moves away from its reference, which is the base. Cut after
    the second step, it goes on to the same end.
    """
    monkeypatch.setattr("align.models.save_model", training.save_model)
    stage = PPO(
        model=str(ground / shape),
        data=str(ground / "prompts.jsonl"),
        reward_funcs=[f"{ground}/one.py:one"],
        held_out=0,
        tuning=name,
        tuning_args=ARGUMENTS.get(name, {}),
        chat_template="plain",
        total_episodes=12,
        episodes_per_step=4,
        save_steps=1,
        num_mini_batches=1,
        max_completion_length=4,
        learning_rate=3e-3,
        critic_learning_rate=3e-2,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        max_length=64,
    )
    metrics = run(stage, tmp_path / "whole")
    assert metrics["trainable_parameters"] == expected(shape, name, score_head=False)
    records = History(tmp_path / "whole" / "metrics.jsonl").records
    assert records[-1]["loss/value_avg"] < records[0]["loss/value_avg"]
    if name not in SOFT:  # the first answers come from the base; new virtual tokens are not nothing
        assert abs(records[0]["objective/kl"]) < 1e-4
    assert abs(records[-1]["objective/kl"]) > 1e-6
    model = seen["model"]
    for path, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, seen["start"][path]), path
    assert_close(answers(load_causal_lm(str(tmp_path / "whole"))), answers(model), 2e-5)

    cut_after(2, tmp_path)
    run(stage, tmp_path / "cut")
    assert "going on from step 2 of 3" in capsys.readouterr().err
    assert_close(answers(seen["model"]), answers(model), 1e-6)
