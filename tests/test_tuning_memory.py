"""One copy of the base: what LoRA takes while it trains with a reference beside it, measured as the process' peak memory."""

import ctypes
import gc
import shutil
from pathlib import Path

import pytest
from helpers import llama
from transformers import PreTrainedTokenizerFast

from align.data import write_rows
from align.models import save_model
from align.pipeline import Run
from align.recipe import Recipe
from align.registry import home
from align.stages import PPO, Preference

ONE_COPY = 1.5
"""Times the base: what is on its way beside it is less than half of it, and a second copy would be 2."""

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def kilobytes(name):
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def peak(work):
    """By how many bytes `work` raises the process' memory at its peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what earlier tests have freed would be used again, unseen
    CLEAR.write_text("5")  # forget the peak so far
    before = kilobytes("VmRSS")
    kept = work()
    after = 1024 * (kilobytes("VmHWM") - before)
    del kept
    return after


@pytest.fixture
def base(tmp_path, tokenizer: PreTrainedTokenizerFast):
    """A base of 240 MB, nearly all of it in layers, much more than what else comes and goes; returns its folder and its bytes."""
    try:
        CLEAR.write_text("5")
        ctypes.CDLL(None).malloc_trim  # noqa: B018
    except (OSError, AttributeError):
        pytest.skip("this system does not tell a process' peak memory")
    model = llama(hidden_size=512, intermediate_size=12288, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8)
    save_model(model, tokenizer, tmp_path / "base")
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "Hello?", "chosen": f"one {n}", "rejected": f"two {n}"} for n in range(4)])
    return tmp_path, sum(4 * p.numel() for p in model.parameters())


def dpo(folder, **fields):
    shutil.rmtree(home() / "cache", ignore_errors=True)  # the reference is computed every time
    stage = Preference(
        model=str(folder / "base"),
        data=str(folder / "pairs.jsonl"),
        beta=0.1,
        held_out=0,
        max_steps=2,
        max_length=32,
        chat_template="plain",
        **fields,
    )
    return Run(Recipe("m", {"m": stage}), folder / "out").execute()


def ppo(folder, **fields):
    write_rows(folder / "prompts.jsonl", [{"prompt": "Hello?"}, {"prompt": "How are you?"}])
    (folder / "long.py").write_text("def long(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    stage = PPO(
        model=str(folder / "base"),
        data=str(folder / "prompts.jsonl"),
        reward_funcs=[f"{folder}/long.py:long"],
        held_out=0,
        total_episodes=8,
        episodes_per_step=4,
        num_mini_batches=1,
        max_completion_length=4,
        max_length=32,
        chat_template="plain",
        **fields,
    )
    return Run(Recipe("p", {"p": stage}), folder / "out").execute()


def test_ppo_with_lora_holds_one_copy_of_the_base(base):
    """Policy, reference and critic are adapters, on and off, of one base."""
    folder, size = base
    adapters = {"tuning": "lora", "critic": "adapter"}
    ppo(folder, tuning_args={"r": 1}, **adapters)
    lora = peak(lambda: ppo(folder, tuning_args={"r": 2}, **adapters))
    full = peak(lambda: ppo(folder, critic="shared"))
    print(f"\npeak of PPO in bases of {size / 1e6:.0f} MB: LoRA {lora / size:.2f}, all weights {full / size:.2f}")
    assert lora < ONE_COPY * size
    assert full > 2.5 * size


def test_dpo_with_lora_holds_one_copy_of_the_base(base):
    folder, size = base
    dpo(folder, tuning="lora", tuning_args={"r": 1})  # what the first run of all leaves behind
    lora = peak(lambda: dpo(folder, tuning="lora", tuning_args={"r": 2}))
    full = peak(lambda: dpo(folder))
    print(f"\npeak of DPO in bases of {size / 1e6:.0f} MB: LoRA {lora / size:.2f}, all weights {full / size:.2f}")
    assert lora < ONE_COPY * size
    assert full > 2.5 * size
