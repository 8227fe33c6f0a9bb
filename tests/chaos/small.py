"""The demo pipeline, shrunk until each stage takes seconds, with a checkpoint every few steps."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from align.recipe import Recipe, main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6

TRAINING = {
    "max_steps": STEPS,
    "num_train_epochs": 100,
    "max_rows": 64,
    "per_device_train_batch_size": 8,
    "save_steps": 2,
    "logging_steps": 3,
    "held_out": 0.1,
}
CHANGES: dict[str, dict[str, Any]] = {
    "base": {
        **TRAINING,
        "architecture": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "attention_dropout": 0.1,
        },
        "vocab_size": 400,
    },
    "sft": {**TRAINING, "eval_data": None, "use_peft": False},
    "pairs": {"max_rows": 24, "num_generations": 2, "max_completion_length": 8, "rollout_batch_size": 32, "min_gap": 0.0},
    "reward": {**TRAINING, "data": ["world/written_pairs.jsonl"], "eval_data": None},
    "ppo": {"max_rows": 32, "total_episodes": 32, "episodes_per_step": 8, "max_completion_length": 8, "eval_prompts": 8},
    "dpo": {**TRAINING, "data": ["world/written_pairs.jsonl"], "eval_data": None},
    "orpo": {
        **TRAINING,
        "data": ["world/written_pairs.jsonl"],
        "eval_data": None,
        "use_peft": True,
        "lora_r": 2,
        "lora_dropout": 0.1,
    },
    "simpo": {**TRAINING, "data": ["world/written_pairs.jsonl"], "eval_data": None},
    "evaluate": {
        "max_prompts": 8,
        "max_rows": 16,
        "max_completion_length": 8,
        "preference_data": ["world/written_pairs_held_out.jsonl"],
    },
}


def _demo() -> Any:
    """The demo's module, which registers its stage."""
    if "align_demo" not in sys.modules:
        spec = importlib.util.spec_from_file_location("align_demo", ROOT / "pipelines" / "demo.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["align_demo"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["align_demo"])
    return sys.modules["align_demo"]


def recipe(seed: int = 0, name: str = "small") -> Recipe:
    """Every stage type of the demo, in seconds."""
    whole = _demo().recipe(seed, name)
    stages = {}
    for key, stage in whole.stages.items():
        fields = {**stage.model_dump(exclude_unset=True), **CHANGES.get(key, {})}
        stages[key] = type(stage).model_validate(fields)
    return Recipe(name, stages)


if __name__ == "__main__":
    main(recipe)
