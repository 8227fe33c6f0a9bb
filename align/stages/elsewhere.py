"""Keys that other toolkits have for a stage, and what they are here (docs/migrating.md)."""

from __future__ import annotations

from collections.abc import Collection

from align.errors import near_miss

RENAMED = {
    "actor_learning_rate": "learning_rate",
    "base_model": "model",
    "cutoff_len": "max_length",
    "dataset": "data",
    "datasets": "data",
    "eps_clip": "cliprange",
    "generate_max_len": "max_completion_length",
    "init_kl_coef": "kl_coef",
    "lambd": "lam",
    "lora_rank": "lora_r",
    "loss_type": "loss",
    "max_new_tokens": "max_completion_length",
    "max_samples": "max_rows",
    "max_seq_length": "max_length",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "ppo_buffer_size": "episodes_per_step",
    "ppo_epochs": "num_ppo_epochs",
    "pref_beta": "beta",
    "pref_ftx": "rpo_alpha",
    "pref_loss": "loss",
    "prompt_data": "data",
    "reward_model_path": "reward_model",
    "reward_pretrain": "reward_model",
    "sequence_len": "max_length",
    "simpo_gamma": "gamma",
    "template": "chat_template",
    "val_set_size": "held_out",
    "val_size": "held_out",
    "value_clip": "cliprange_value",
}

_PACKED = "every stage is packed, exactly"
_ASSISTANT = "the loss is on the assistant's words alone"
NOTHING_TO_SET = {
    "assistant_only_loss": _ASSISTANT,
    "attn_implementation": "attention is chosen by device and dtype",
    "completion_only_loss": _ASSISTANT,
    "packing": _PACKED,
    "padding_free": _PACKED,
    "precompute_ref_log_probs": "the reference's log-probs are computed once, before training, and kept on the disk",
    "sample_packing": _PACKED,
    "train_on_inputs": _ASSISTANT,
    "use_liger_kernel": "the head never holds whole logits",
}
"""Why there is no such switch."""


def advice(key: str, known: Collection[str]) -> str:
    """What to do about a `key` that is none of the `known` ones, to stand behind its name."""
    if RENAMED.get(key) in known:
        return f": here it is {RENAMED[key]!r}"
    if key in NOTHING_TO_SET:
        return f": leave it out, as {NOTHING_TO_SET[key]}"
    return near_miss(key, known)
