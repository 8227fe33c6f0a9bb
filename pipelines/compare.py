"""Every method from one SFT model: reward model + PPO, DPO, ORPO and SimPO, and one report that compares them.

align run compare --set model=Qwen/Qwen2.5-0.5B --set sft_data=tatsu-lab/alpaca --set preference_data=Anthropic/hh-rlhf
"""

from __future__ import annotations

from align.recipe import Recipe, main
from align.stages import PPO, SFT, Evaluate, Preference, RewardModel


def recipe(
    model: str = "Qwen/Qwen2.5-0.5B",
    sft_data: str = "tatsu-lab/alpaca",
    preference_data: str = "Anthropic/hh-rlhf",
    max_rows: int | None = None,
    max_length: int = 512,
    held_out: float = 0.1,
    chat_template: str = "auto",
) -> Recipe:
    """Learning rates suit a pretrained model of half a billion parameters; for others set them, as ``--set
    dpo.learning_rate=1e-4``.
    """
    rows = {"max_rows": max_rows, "max_length": max_length, "held_out": held_out}
    pairs = {"model": "sft", "data": preference_data, **rows}
    return Recipe(
        "compare",
        {
            "sft": SFT(model=model, data=sft_data, chat_template=chat_template, **rows),
            "reward": RewardModel(**pairs),
            "ppo": PPO(model="sft", reward_model="reward", data=sft_data, missing_eos_penalty=1.0, **rows),
            "dpo": Preference(loss="dpo", beta=0.1, **pairs),
            "orpo": Preference(loss="orpo", lam=0.1, learning_rate=8e-6, **pairs),
            "simpo": Preference(loss="simpo", beta=2.0, gamma=1.0, **pairs),
            "evaluate": Evaluate(
                models={"base": model, **{name: name for name in ("sft", "ppo", "dpo", "orpo", "simpo")}},
                reward_models={"reward": "reward"},
                reward_model="reward",
                reference="sft",
                data=sft_data,
                perplexity_data=sft_data,
                preference_data=preference_data,
                chat_template=chat_template,
                **rows,
            ),
        },
    )


if __name__ == "__main__":
    main(recipe)
