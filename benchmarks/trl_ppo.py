"""TRL 1.12's PPO: ``python -m benchmarks.trl_ppo FOLDER`` with that TRL first on the path.

FOLDER holds the models ``policy``, ``reference``, ``critic`` and ``reward``, and ``job.json``. What the trainer logs, the seconds
of all rounds but the first, and the peak of memory land in ``result.json``. Where the job has completions, they take the place of
what would be sampled; nothing else of the trainer is touched.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.update(TQDM_DISABLE="1", TRL_EXPERIMENTAL_SILENCE="1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.probe import peak_mb

PAD, EOS = 0, 2

QUIET: dict[str, Any] = {
    "num_sample_generations": 0,
    "weight_decay": 0.0,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
"""Fp32 on a CPU, and nothing but training. The optimizer is the default, fused AdamW."""


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Pads ids; text never reaches it."""
    inner = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token=f"<{PAD}>"))
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=f"<{PAD}>", eos_token=f"<{EOS}>", padding_side="left")


def give(completions: dict[tuple[int, ...], list[int]], temperature: float) -> None:
    """In place of sampling let the trainer find `completions` by their prompts, with the logits that sampling would return."""

    def given(model: Any, queries: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        prompts = [tuple(token for token in query if token != PAD) for query in queries.tolist()]
        whole = torch.cat([queries, torch.tensor([completions[prompt] for prompt in prompts])], dim=1)
        logits = ppo_trainer.forward(model, whole, PAD).logits[:, queries.shape[1] - 1 : -1]
        return whole, logits / (temperature + 1e-7)

    ppo_trainer.batch_generation = given


class Listening(PPOTrainer):
    """Keeps what it logs, and when."""

    def __init__(self, *args: Any, **rest: Any) -> None:
        self.kept: list[dict[str, float]] = []
        self.ends: list[float] = []
        super().__init__(*args, **rest)

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        self.kept.append(logs)
        self.ends.append(time.perf_counter())


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    if job["completions"]:
        give({tuple(p): c for p, c in zip(job["prompts"], job["completions"], strict=True)}, job["temperature"])
    args = PPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=job["batch"],
        total_episodes=job["batch"] * job["rounds"],
        local_rollout_forward_batch_size=job["batch"],
        num_mini_batches=1,
        response_length=job["new_tokens"],
        temperature=job["temperature"],
        lr_scheduler_type="constant",
        **QUIET,
        **job["settings"],
    )
    language_models = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("policy", "reference")]
    reward, critic = (AutoModelForSequenceClassification.from_pretrained(folder / name) for name in ("reward", "critic"))
    prompts = Dataset.from_list([{"input_ids": prompt} for prompt in job["prompts"]])
    trainer = Listening(args, tokenizer(job["vocabulary"]), *language_models, reward, prompts, critic)
    trainer.train()
    seconds = trainer.ends[-1] - trainer.ends[0]
    (folder / "result.json").write_text(json.dumps({"log": trainer.kept, "seconds": seconds, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
