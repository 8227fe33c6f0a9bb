"""A recipe for the short version of `kill.py`: real training, in seconds, without the demo's world."""

from __future__ import annotations

import os
from typing import Any

from align.data import write_rows
from align.recipe import Recipe
from align.stages import SFT, Preference, Pretrain
from align.stages.base import Context, Stage, stage


@stage("quick_rows")
class Rows(Stage):
    """Writes a few rows of every kind."""

    def run(self, context: Context) -> dict[str, Any]:
        numbers = [str(i * 7919 % 1000) for i in range(40)]
        write_rows(context.folder / "text.jsonl", [{"text": f"the number {n} is here"} for n in numbers])
        write_rows(context.folder / "sft.jsonl", [{"prompt": f"say {n}", "completion": n} for n in numbers])
        pairs = [{"prompt": f"say {n}", "chosen": n, "rejected": f"no {n}"} for n in numbers]
        write_rows(context.folder / "pairs.jsonl", pairs)
        return {"rows": len(numbers)}


def recipe() -> Recipe:
    """Four stages; ALIGN_QUICK_STEPS optimizer steps in each that trains."""
    steps = int(os.environ.get("ALIGN_QUICK_STEPS", "6"))
    learn = {"max_steps": steps, "num_train_epochs": 99, "held_out": 0.1, "max_length": 64, "save_steps": 2, "logging_steps": 3}
    architecture = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return Recipe(
        "quick",
        {
            "rows": Rows(),
            "base": Pretrain(architecture=architecture, data="rows/text.jsonl", vocab_size=300, chat_template="plain", **learn),
            "sft": SFT(model="base", data="rows/sft.jsonl", **learn),
            "dpo": Preference(model="sft", data="rows/pairs.jsonl", loss="dpo", beta=0.1, **learn),
        },
    )
