"""Two processes against one, through ``launch``: losses, weights, resume, memory and throughput.

    python tests/chaos/launch.py [--only sft,dpo] [--steps 6]

For each stage: one process; two under DDP and FSDP2, finished by one after a cut; and one process, cut and finished by two. All
must log the same losses, to 1e-4 relative. An epoch is four steps, and the last of them has fewer rows than the others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from align.pipeline import Run  # noqa: E402
from align.recipe import Recipe  # noqa: E402
from align.stages import GRPO, KTO, PPO, RLOO, SFT, Preference, Pretrain, RewardModel, Stage  # noqa: E402

TWO = {"num_processes": 2}
LOSSES = ("loss", "eval_loss", "loss/policy_avg", "loss/value_avg", "objective/rlhf_reward", "eval_score")
REWARD = """
def varied(completions, completion_ids, **columns):
    return [len(set(ids)) / len(ids) + ids[0] / 300 for ids in completion_ids]
"""


def prepare(folder: Path) -> None:
    from helpers import llama

    from align.data import write_rows
    from align.encode import set_chat_template
    from align.tokenizers import train_bpe

    draw = random.Random(0)
    vocabulary = "the cat sat on a mat and said hello to me how are you fine thanks one two three"
    words = vocabulary.split()

    def say(longest: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, longest)))

    rows = [(say(9), say(9), say(9)) for _ in range(34)]
    write_rows(folder / "text.jsonl", [{"text": " ".join(row)} for row in rows])
    write_rows(folder / "sft.jsonl", [{"prompt": q, "completion": a} for q, a, _ in rows])
    write_rows(folder / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": f"{b} no"} for q, a, b in rows])
    write_rows(folder / "kto.jsonl", [{"prompt": q, "completion": a, "label": i % 2 == 0} for i, (q, a, _) in enumerate(rows)])
    tokenizer = train_bpe([" ".join(words)] * 8, vocab_size=320)
    set_chat_template(tokenizer, "plain")
    (folder / "mine.py").write_text(REWARD)
    llama().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def stages(folder: Path, steps: int) -> dict[str, Stage]:
    common = {
        "max_steps": steps,
        "num_train_epochs": 99,
        "held_out": 0.1,
        "max_length": 64,
        "logging_steps": 1,
        "learning_rate": 1e-3,
    }
    common |= {"per_device_train_batch_size": 8, "save_steps": 2, "save_total_limit": 9, "model": str(folder / "model")}
    pairs = f"{folder}/pairs.jsonl"
    sampled = {"reward_funcs": [f"{folder}/mine.py:varied"], "max_completion_length": 16, "data": f"{folder}/sft.jsonl"}
    names = ("held_out", "max_length", "logging_steps", "learning_rate", "save_steps", "save_total_limit", "model")
    on_prompts = {name: common[name] for name in names}
    return {
        "pretrain": Pretrain(data=f"{folder}/text.jsonl", **common),
        "sft": SFT(data=f"{folder}/sft.jsonl", **common),
        "reward": RewardModel(data=pairs, **common),
        "dpo": Preference(data=pairs, loss="dpo", beta=0.1, **common),
        "kto": KTO(data=f"{folder}/kto.jsonl", beta=0.1, **common),
        "ppo": PPO(total_episodes=steps * 16, episodes_per_step=16, num_ppo_epochs=2, **sampled, **on_prompts),
        "grpo": GRPO(max_steps=steps, num_generations=4, per_device_train_batch_size=16, **sampled, **on_prompts),
        "rloo": RLOO(max_steps=steps, num_generations=4, per_device_train_batch_size=16, **sampled, **on_prompts),
    }


def run(stage: Stage, out: Path) -> Path:
    return Path(Run(Recipe("x", {"x": stage}), out).execute()["x"].path)


def on_two(stage: Stage, strategy: str, **more: object) -> Stage:
    """The same rows a step on two processes."""
    fields = {**stage.model_dump(exclude_unset=True), "launch": {**TWO, "strategy": strategy}, **more}
    if "per_device_train_batch_size" in fields:
        fields["per_device_train_batch_size"] //= 2
    return type(stage).model_validate(fields)


def cut_back(folder: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of `step`."""
    import shutil

    for checkpoint in (folder / "checkpoints").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    for file in (folder / "artifact.json", *folder.glob("*.safetensors")):
        file.unlink(missing_ok=True)


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records for name in LOSSES if name in record]


def apart(one: Path, other: Path) -> tuple[float, float]:
    """Largest difference of the losses relative to them (or to 0.01: a policy's loss may be 0), and largest difference of a weight
    relative to the largest weight.
    """
    from safetensors.torch import load_file

    ours, theirs = losses(one), losses(other)
    assert len(ours) == len(theirs), (ours, theirs)
    weights = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    largest = max(((weights[0][k] - weights[1][k]).abs().max() / weights[0][k].abs().max()).item() for k in weights[0])
    return max(abs(a - b) / max(abs(a), 0.01) for a, b in zip(ours, theirs, strict=True)), largest


def check(name: str, stage: Stage, work: Path) -> float:
    os.environ["ALIGN_HOME"] = str(work / "home")
    start = time.monotonic()
    one = run(stage, work / "one")
    results = {}
    for strategy in ("ddp", "fsdp2"):
        two = run(on_two(stage, strategy), work / strategy)
        results[strategy] = apart(one, two)
        cut_back(two, 4)
        results[f"{strategy} to one"] = apart(one, run(stage, work / strategy))
    cut_back(one, 4)
    fresh = run(on_two(stage, "fsdp2"), work / "one")
    results["one to fsdp2"] = apart(run(stage, work / "again"), fresh)
    for how, (loss, weight) in results.items():
        print(f"{name:<9} {how:<14} losses {loss:.1e}  weights {weight:.1e}", flush=True)
    print(f"{name:<9} {time.monotonic() - start:.0f} s", flush=True)
    return max(loss for loss, _ in results.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only")
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", ALIGN_IN_PROCESS="0")
    with tempfile.TemporaryDirectory(prefix="align-launch-check-") as folder:
        prepare(Path(folder))
        chosen = {
            name: stage
            for name, stage in stages(Path(folder), options.steps).items()
            if not options.only or name in options.only.split(",")
        }
        worst = max(check(name, stage, Path(folder) / name) for name, stage in chosen.items())
    print(f"largest relative difference of a loss: {worst:.1e}")
    return 0 if worst <= 1e-4 else 1


if __name__ == "__main__":
    raise SystemExit(main())
