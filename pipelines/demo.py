"""The demo: from nothing to an aligned chat model in minutes, offline, on two cores.

A small made-up world (data/world.py) writes the texts, demonstrations and preferences; a programmatic gold reward judges. The road:
pretrain a tiny Llama, SFT, sample pairs, reward model, PPO, DPO, ORPO, SimPO, and evaluate all of them on held-out prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from align.recipe import Recipe, main
from align.stages import PPO, SFT, Evaluate, Pairs, Preference, Pretrain, RewardModel, Stage
from align.stages.base import Context, DataRefs, stage

DATA = Path(__file__).resolve().parent.parent / "data"
SOURCES = [str(path) for path in sorted(DATA.glob("world*.py"))]
HELD_OUT_WRITTEN_PAIRS = 400
"""Written pairs that the reward model is tested on, beside those sampled from the SFT model."""
GOLD = f"{DATA / 'world.py'}:gold"
PARTS = [f"{DATA / 'gold_parts.py'}:{part}" for part in ("content", "instruction", "tone", "brevity", "ending", "fluency")]


@stage("demo_world")
class World(Stage):
    """Writes the demo's data. Its code is an input: when the world changes, everything after it is made again."""

    sources: DataRefs = SOURCES
    """The generator's source files."""
    seed: int = 0
    """Which world: who lives where, what costs how much."""

    def run(self, context: Context) -> dict[str, Any]:
        from align.data import write_rows

        sys.path.insert(0, str(DATA))
        from world import World as Generator

        world = Generator(self.seed)
        parts: dict[str, list[dict[str, Any]]] = {"text": [{"text": text} for text in world.pretraining_texts()]}
        for split in ("train", "test"):
            parts[f"demonstrations_{split}"] = world.demonstrations(split)
            parts[f"prompts_{split}"] = world.prompts(split)
        parts["written_pairs"] = world.preferences("train")
        parts["written_pairs_held_out"] = world.preferences("test")[:HELD_OUT_WRITTEN_PAIRS]
        for name, rows in parts.items():
            write_rows(context.folder / f"{name}.jsonl", rows)
        return {name: len(rows) for name, rows in parts.items()}


def recipe(seed: int = 0, name: str = "demo") -> Recipe:
    """The whole road on the made-up world number `seed`."""
    common: dict[str, Any] = {"seed": seed, "max_length": 128, "max_tokens_per_micro_batch": 4096, "adam_beta2": 0.95}
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    answers = {"max_completion_length": 48, "rollout_batch_size": 256}
    held_out_pairs = ["pairs/held_out.jsonl", "world/written_pairs_held_out.jsonl"]
    # A reward model learns from all comparisons; a policy needs fewer, and clearer ones.
    comparisons = {"data": ["pairs/comparisons.jsonl", "world/written_pairs.jsonl"], "eval_data": held_out_pairs}
    pairs = {"data": ["pairs/preferences.jsonl", "world/written_pairs.jsonl"], "eval_data": held_out_pairs, "max_rows": 2000}
    return Recipe(
        name,
        {
            "world": World(seed=seed),
            "base": Pretrain(
                architecture={
                    "model_type": "llama",
                    "hidden_size": 128,
                    "intermediate_size": 384,
                    "num_hidden_layers": 3,
                    "num_attention_heads": 8,
                    "num_key_value_heads": 8,
                    "max_position_embeddings": 256,
                    "tie_word_embeddings": True,
                },
                data=["world/text.jsonl"],
                held_out=0.02,
                chat_template="plain",
                vocab_size=1280,
                num_train_epochs=3,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                **common,
                **schedule,
            ),
            "sft": SFT(
                model="base",
                data=["world/demonstrations_train.jsonl"],
                eval_data=["world/demonstrations_test.jsonl"],
                num_train_epochs=2,
                per_device_train_batch_size=32,
                learning_rate=2e-3,
                **common,
                **schedule,
            ),
            "pairs": Pairs(
                model="sft",
                data=["world/prompts_train.jsonl"],
                eval_data=["world/prompts_test.jsonl"],
                reward_funcs=[GOLD],
                min_gap=0.2,
                seed=seed,
                **answers,
            ),
            "reward": RewardModel(
                model="sft",
                sft_coef=1.0,  # what it knows is what it judges facts by
                group_by_prompt=True,
                num_train_epochs=3,
                per_device_train_batch_size=32,
                learning_rate=5e-4,
                **comparisons,
                **common,
                **schedule,
            ),
            "ppo": PPO(
                model="sft",
                reward_model="reward",
                data=["world/prompts_train.jsonl"],
                eval_data=["world/prompts_test.jsonl"],
                total_episodes=40 * 128,
                episodes_per_step=128,
                num_mini_batches=4,
                learning_rate=2e-4,
                critic_learning_rate=1e-3,
                kl_coef=0.1,
                missing_eos_penalty=1.0,
                **answers,
                **common,
                **schedule,
            ),
            "dpo": Preference(
                model="sft",
                loss="rpo",
                beta=0.2,
                rpo_alpha=0.2,
                per_device_train_batch_size=32,
                learning_rate=2e-4,
                **pairs,
                **common,
                **schedule,
            ),
            "orpo": Preference(
                model="sft",
                loss="orpo",
                lam=1.0,
                per_device_train_batch_size=32,
                learning_rate=1e-3,
                **pairs,
                **common,
                **schedule,
            ),
            "simpo": Preference(
                model="sft",
                loss="simpo",
                beta=2.0,
                gamma=1.0,
                per_device_train_batch_size=32,
                learning_rate=5e-5,
                **pairs,
                **common,
                **schedule,
            ),
            "evaluate": Evaluate(
                models={name: name for name in ("base", "sft", "ppo", "dpo", "orpo", "simpo")},
                reward_models={"reward": "reward"},
                reference="sft",
                data=["world/prompts_test.jsonl"],
                perplexity_data=["world/demonstrations_test.jsonl"],
                preference_data=held_out_pairs,
                reward_funcs=[GOLD, *PARTS],
                reward_weights=[1, *(0 for _ in PARTS)],
                max_prompts=500,
                max_length=128,
                seed=seed,
                **answers,
            ),
        },
    )


if __name__ == "__main__":
    main(recipe)
