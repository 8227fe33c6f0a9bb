"""PPO on a reward function of your own, written in the recipe.

align run custom_reward --set model=Qwen/Qwen2.5-0.5B-Instruct --set data=tatsu-lab/alpaca
"""

from __future__ import annotations

from typing import Any

from align.recipe import Recipe, main
from align.stages import PPO, Evaluate


def brevity(prompts: list, completions: list, **columns: Any) -> list[float]:
    """1 for an answer of at most ten words, falling to 0 at forty."""
    scores = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        words = len(text.split())
        scores.append(min(1.0, max(0.0, (40 - words) / 30)) if words else 0.0)
    return scores


def recipe(
    model: str = "Qwen/Qwen2.5-0.5B-Instruct", data: str = "tatsu-lab/alpaca", max_rows: int | None = None, max_length: int = 512
) -> Recipe:
    """The function is called as TRL's are; data columns arrive as keyword lists."""
    rows = {"data": data, "max_rows": max_rows, "max_length": max_length, "held_out": 0.1, "chat_template": "auto"}
    return Recipe(
        "custom_reward",
        {
            "ppo": PPO(model=model, reward_funcs=[brevity], missing_eos_penalty=1.0, **rows),
            "evaluate": Evaluate(models={"before": model, "ppo": "ppo"}, reference="before", reward_funcs=[brevity], **rows),
        },
    )


if __name__ == "__main__":
    main(recipe)
