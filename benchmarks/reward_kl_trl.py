"""TRL 1.12's PPO on the work of `benchmarks.reward_kl`, in a process with that TRL first on the path.

``python -m benchmarks.reward_kl_trl JOB`` reads the prompts (token ids), the model and the settings from the file JOB and writes
the rounds' divergences and rewards beside it, as ``curve.json``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, ppo_trainer

from align.models import load_tokenizer
from benchmarks.reward_kl import happy
from benchmarks.trl_ppo import QUIET, Listening


class Function(nn.Module):
    """Stands where the trainer wants a reward model."""


def pay(tokenizer: Any) -> None:
    """Let the trainer take the reward function's scores for those of `Function`; values come from the critic as before."""
    of_model = ppo_trainer.get_reward

    def get_reward(model: Any, whole: torch.Tensor, pad: int, context: int) -> tuple[Any, torch.Tensor, Any]:
        if not isinstance(model, Function):
            return of_model(model, whole, pad, context)
        texts = tokenizer.batch_decode(whole[:, context:], skip_special_tokens=True)
        return None, torch.tensor(happy(None, texts)), None

    ppo_trainer.get_reward = get_reward


def main(file: Path) -> None:
    job = json.loads(file.read_text())
    torch.manual_seed(job["seed"])
    tokenizer = load_tokenizer(job["model"])
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    pay(tokenizer)
    args = PPOConfig(
        output_dir=str(file.parent / "out"),
        seed=job["seed"],
        per_device_train_batch_size=job["episodes"],
        total_episodes=job["episodes"] * job["rounds"],
        local_rollout_forward_batch_size=job["episodes"],
        response_length=job["new_tokens"],
        temperature=1.0,
        stop_token="eos",
        **QUIET,
        **job["settings"],
    )
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"]) for _ in range(2))
    critic = AutoModelForSequenceClassification.from_pretrained(job["model"], num_labels=1)
    prompts = Dataset.from_list([{"input_ids": prompt} for prompt in job["prompts"]])
    trainer = Listening(args, tokenizer, policy, reference, Function(), prompts, critic)
    trainer.train()
    points = [(record["objective/kl"], record["objective/scores"]) for record in trainer.kept if "objective/kl" in record]
    (file.parent / "curve.json").write_text(json.dumps(points))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
