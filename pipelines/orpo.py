"""ORPO: base → SFT → odds-ratio preference optimization → evaluation.

align run orpo --set model=Qwen/Qwen2.5-0.5B --set sft_data=tatsu-lab/alpaca --set preference_data=Anthropic/hh-rlhf
"""

from __future__ import annotations

from align.recipe import Recipe, main
from align.stages import SFT, Evaluate, Preference


def recipe(
    model: str = "Qwen/Qwen2.5-0.5B",
    sft_data: str = "tatsu-lab/alpaca",
    preference_data: str = "Anthropic/hh-rlhf",
    max_rows: int | None = None,
    max_length: int = 512,
    held_out: float = 0.1,
    chat_template: str = "auto",
) -> Recipe:
    """ORPO (arXiv:2403.07691) needs no reference; its negative log-likelihood term lets it stand more steps than DPO."""
    rows = {"max_rows": max_rows, "max_length": max_length, "held_out": held_out}
    return Recipe(
        "orpo",
        {
            "sft": SFT(model=model, data=sft_data, chat_template=chat_template, **rows),
            "orpo": Preference(model="sft", loss="orpo", lam=0.1, learning_rate=8e-6, data=preference_data, **rows),
            "evaluate": Evaluate(
                models={"sft": "sft", "orpo": "orpo"},
                reference="sft",
                perplexity_data=sft_data,
                preference_data=preference_data,
                **rows,
            ),
        },
    )


if __name__ == "__main__":
    main(recipe)
