"""Kill a PPO run again and again, start it again each time, and compare its end with that of a run that was never killed.

``python tests/chaos/kill_ppo.py --kills 50``: SIGKILL at random moments of a real command in a process of its own, forked from one
that has imported everything and does nothing else. Policy, critic, optimizer, coefficients and logged metrics must be the same to
the bit. Exit code 1 where they are not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS = 8
FLAGS = (
    f"--total_episodes {STEPS * 8} --episodes_per_step 8 --num_generations 2 --num_ppo_epochs 2 --num_mini_batches 2 "
    "--max_completion_length 12 --learning_rate 1e-2 --critic_learning_rate 2e-2 --kl_coef 0.05 --kl_target 0.5 --kl_horizon 64 "
    "--ptx_coef 0.1 --ptx_data demonstrations.jsonl --ptx_batch_size 3 --held_out 0.3 --logging_steps 2 --save_steps 1 "
    "--sample_steps 3 --lr_scheduler_type cosine --missing_eos_penalty 0.5"
)
VARIANTS = {"separate": "", "shared": "--critic shared", "adapter": "--critic adapter --use_peft --lora_r 2"}

REWARD = """
import random
import time

def noisy(completions, completion_ids, **columns):
    time.sleep(0.05)  # so that some kills fall here
    return [len(set(ids)) / len(ids) + random.gauss(0, 0.1) for ids in completion_ids]
"""


def prepare(folder: Path) -> None:
    """A model of two layers, prompts, demonstrations and a reward that draws random numbers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from align.encode import set_chat_template
    from align.tokenizers import train_bpe

    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    tokenizer = train_bpe([" ".join(words)] * 8, vocab_size=280)
    set_chat_template(tokenizer, "plain")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder / "model")
    rows = {
        "prompts": [{"prompt": f"say {word}"} for word in words],
        "demonstrations": [{"prompt": f"say {word}", "completion": word} for word in words],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "mine.py").write_text(REWARD)


def start(folder: Path, out: str, flags: str) -> ForkServerProcess:
    """The command, in a process of its own."""
    command = f"ppo --model model --data prompts.jsonl --reward_funcs mine.py:noisy --output_dir {out} {FLAGS} {flags}"
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["align.cli", "align.stages.reinforcement"])
    process = forks.Process(target=obey, args=(folder, command.split()))
    process.start()
    return process


def obey(folder: Path, words: list[str]) -> None:
    """Be the command line."""
    from align.cli import main

    os.environ.update(ALIGN_HOME=str(folder / "home"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    os.chdir(folder)
    with (folder / "log.txt").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    sys.exit(main(words))


def finish(process: ForkServerProcess, folder: Path) -> None:
    """Wait for an end that must be a good one."""
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run ended with code {process.exitcode}:\n{(folder / 'log.txt').read_text()[-2000:]}")


def outcome(out: Path) -> dict[str, object]:
    """What must be the same: every weight and moment, every coefficient, every metric but the clock's."""
    (checkpoint,) = out.glob(f"checkpoints/checkpoint-{STEPS}")
    state = json.loads((checkpoint / "state.json").read_text())
    clock = ("seconds", "time/")

    def without_clock(record: dict[str, object]) -> dict[str, object]:
        return {name: value for name, value in record.items() if not name.startswith(clock)}

    records = [without_clock(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    weights = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    own = json.loads((checkpoint / "process-0.json").read_text())
    return {
        "weights": weights,
        "state": (checkpoint / "state.safetensors").read_bytes(),
        "plain": {name: value for name, value in state.items() if name != "pending"},
        "own": own,
        "metrics": records,
    }


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """Names of what is not the same."""
    return [name for name, value in one.items() if value != other[name]]


def changed(path: Path) -> int:
    """When `path` last was, in nanoseconds; 0 where it is not."""
    return path.stat().st_mtime_ns if path.exists() else 0


def killed_run(folder: Path, out: str, flags: str, moments: random.Random, kills: int) -> Counter[str]:
    """Run to the end through at most `kills` kills; where they fell."""
    fell: Counter[str] = Counter()
    checkpoints = folder / out / "checkpoints"
    while True:
        process = start(folder, out, flags)
        if sum(fell.values()) < kills:
            # From when it has sampled, or now and then from when it writes anything: before that is the start of Python.
            signs = [checkpoints, checkpoints / "rollouts"] if moments.random() < 0.8 else [folder / out / "metrics.jsonl"]
            before = [changed(path) for path in signs]
            while process.is_alive() and before == [changed(path) for path in signs]:
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 0.5))
            if process.is_alive():
                process.kill()
                process.join()
                step = max((int(p.name.rpartition("-")[2]) for p in checkpoints.glob("checkpoint-*")), default=0)
                if any(checkpoints.glob(".checkpoint-*")):
                    fell["while a checkpoint was written"] += 1
                elif (checkpoints / "rollouts" / f"{step + 1}-0-of-1.jsonl").is_file():
                    fell["mid-update"] += 1
                else:
                    fell["mid-rollout"] += 1
                continue
        finish(process, folder)
        return fell


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--critic", choices=VARIANTS, default="separate")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments, fell, runs, wrong = random.Random(options.seed), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="align-kill-") as temporary:
        folder = Path(temporary)
        prepare(folder)
        finish(start(folder, "whole", VARIANTS[options.critic]), folder)
        wanted = outcome(folder / "whole")
        while sum(fell.values()) < options.kills:
            new = killed_run(folder, "killed", VARIANTS[options.critic], moments, options.kills - sum(fell.values()))
            fell, runs = fell + new, runs + 1
            found = differences(wanted, outcome(folder / "killed"))
            wrong += bool(found)
            end = f"differs in {', '.join(found)}" if found else "the same"
            print(f"run {runs}: {sum(new.values())} kills {dict(new)}; {end}", flush=True)
            shutil.rmtree(folder / "killed")
    print(f"{sum(fell.values())} kills in {runs} runs ({dict(fell)}): {runs - wrong} ended as the run that was never killed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")  # the processes' to inherit
    sys.exit(main())
