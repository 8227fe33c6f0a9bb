"""One base, four roles: adapters of a reward model beside the policy's, on one copy of the base's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import safe_open
from torch import Tensor, nn

from align.forest import Forest
from align.models import adapter_base, is_adapter
from align.reference import base_weights
from align.trainers.ppo.critics import CRITIC, POLICY, AdapterCritic, ValueHead, adapter

REWARD = "reward"
"""Name of the reward model's adapter."""


class AdapterReward(nn.Module):
    """A reward model that is an adapter and a score head on the policy's base; answers as the enabled reward model would."""

    def __init__(self, policy: PeftModel, head: ValueHead) -> None:
        super().__init__()
        self.policy, self.head = policy, head

    def forward(self, forest: Forest, read: str = "ends") -> Tensor:
        with adapter(self.policy, REWARD):
            return self.policy(forest=forest, read=read, score_head=self.head, with_logps=False)


def reward_on_base(policy: nn.Module, folder: str | None) -> AdapterReward | None:
    """The reward model in `folder` on the base of `policy`; None unless both are adapters that can share one (see `same_base`)."""
    if folder is None or not isinstance(policy, PeftModel) or not same_base(policy, folder):
        return None
    head = _add_from(policy, folder, REWARD)
    head.requires_grad_(False)
    return AdapterReward(policy, head)


def critic_on_base(policy: PeftModel, reward_folder: str | None, deviation: float = 1.0) -> AdapterCritic:
    """A critic's adapter on the base of `policy`, from the reward model's where that is one on the same base, else from nothing.

    Args:
        deviation: what the reward model's scores are divided by before the critic sees them.
    """
    if reward_folder is not None and same_base(policy, reward_folder):
        head = _add_from(policy, reward_folder, CRITIC)
        with torch.no_grad():
            head.weight /= deviation
    else:
        policy.add_adapter(CRITIC, policy.peft_config[POLICY])
        head = ValueHead(policy)
    policy.set_adapter(POLICY)
    return AdapterCritic(policy, head)


def same_base(policy: PeftModel, folder: str) -> bool:
    """Whether `folder` holds an adapter of the policy's kind whose base has the weights of the base of `policy`.

    Two stages that start from one merged adapter each write the merged base anew, so where the names differ the numbers decide.
    peft keeps adapters of one kind beside each other, and of virtual tokens none with a score head. PiSSA takes its adapter's start
    out of the base, which is no longer what is on disk.
    """
    if not is_adapter(folder):
        return False
    own = policy.peft_config[POLICY]
    if PeftConfig.from_pretrained(folder).peft_type != own.peft_type or own.is_prompt_learning or hasattr(policy, "pissa_start"):
        return False
    theirs = adapter_base(folder)
    if theirs == own.base_model_name_or_path:
        return True
    files = sorted(Path(theirs).glob("*.safetensors"))
    ours = {name: tensor for name, tensor in base_weights(policy).items() if _in_trunk(name)}
    found = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in filter(_in_trunk, file.keys()):
                if name not in ours or not torch.equal(file.get_tensor(name).to(ours[name]), ours[name]):
                    return False
                found += 1
    return found == len(ours)


def _in_trunk(name: str) -> bool:
    """Whether the weight is neither of the head of a language model nor of a score head."""
    return not name.startswith(("lm_head.", "embed_out.", "score."))


def _add_from(policy: PeftModel, folder: str, name: str) -> ValueHead:
    """Load the adapter in `folder` under `name`; its score head comes back."""
    config: Any = PeftConfig.from_pretrained(folder)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    weights = load_peft_weights(folder, device="cpu")
    (score,) = [weights.pop(key) for key in list(weights) if key.endswith("score.weight")]
    policy.add_adapter(name, config)
    result = set_peft_model_state_dict(policy, weights, adapter_name=name)
    assert not result.unexpected_keys, result.unexpected_keys
    head = ValueHead(policy)
    with torch.no_grad():
        head.weight.copy_(score)
    policy.set_adapter(POLICY)
    return head
