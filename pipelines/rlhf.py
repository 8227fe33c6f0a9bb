"""RLHF: base → SFT → reward model → PPO → evaluation.

align run rlhf --set model=Qwen/Qwen2.5-0.5B --set sft_data=tatsu-lab/alpaca --set preference_data=Anthropic/hh-rlhf
"""

from __future__ import annotations

from align.recipe import Recipe, main
from align.stages import PPO, SFT, Evaluate, RewardModel


def recipe(
    model: str = "Qwen/Qwen2.5-0.5B",
    sft_data: str = "tatsu-lab/alpaca",
    preference_data: str = "Anthropic/hh-rlhf",
    max_rows: int | None = None,
    max_length: int = 512,
    held_out: float = 0.1,
    chat_template: str = "auto",
) -> Recipe:
    """The road of InstructGPT (arXiv:2203.02155). The reward model judges, in PPO and in the evaluation."""
    rows = {"max_rows": max_rows, "max_length": max_length, "held_out": held_out}
    return Recipe(
        "rlhf",
        {
            "sft": SFT(model=model, data=sft_data, chat_template=chat_template, **rows),
            "reward": RewardModel(model="sft", data=preference_data, **rows),
            "ppo": PPO(model="sft", reward_model="reward", data=sft_data, missing_eos_penalty=1.0, **rows),
            "evaluate": Evaluate(
                models={"sft": "sft", "ppo": "ppo"},
                reward_models={"reward": "reward"},
                reward_model="reward",
                reference="sft",
                data=sft_data,
                perplexity_data=sft_data,
                preference_data=preference_data,
                **rows,
            ),
        },
    )


if __name__ == "__main__":
    main(recipe)
