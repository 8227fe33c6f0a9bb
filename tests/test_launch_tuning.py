"""What of a model is trained, on two processes: the losses and the weights of one, whatever the strategy, and the checkpoints
of either go on in the other.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

import launch
from helpers import llama
from launched import run_on_two

from align.runner.worker import attempt
from align.scoring import SCORE_SCALE
from align.stages import SFT
from align.tuning.strategies import UNSHARDED

CASES = {
    "fsdp2": [
        ("sft", "lora", {}),
        ("sft", "full", {"model": "tied", "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}),
        ("dpo", "lora", {"load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}),
        ("dpo", "dora", {}),
        ("reward", "lora", {}),
        ("reward", "ia3", {}),
        ("kto", "lora", {"undesirable_weight": 0.1}),  # so that its z₀, of mismatched answers, is above 0
        ("kto", "pissa", {}),
    ],
    "ddp": [("sft", "adapter", {}), ("dpo", "lora", {}), ("dpo", "prefix", {}), ("reward", "ptuning", {}), ("kto", "pissa", {})],
}


def weights(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("strategy", CASES)
def test_two_processes_train_as_one(strategy, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    launch.prepare(tmp_path)
    shutil.copytree("model", "tied")
    llama(tie_word_embeddings=True).save_pretrained("tied")
    made = launch.stages(tmp_path, 4)
    stages, tasks = {}, []
    for name, tuning, more in CASES[strategy]:
        fields = {**made[name].model_dump(exclude_unset=True), "tuning": tuning, "learning_rate": 3e-3, **more}
        stages[f"{name}-{tuning}"] = stage = type(made[name]).model_validate(fields)
        folder = tmp_path / f"{name}-{tuning}"
        two = launch.on_two(stage, strategy).model_dump(exclude_unset=True)
        tasks.append((stage.stage, two, str(folder)))
    run_on_two(tasks, strategy, tmp_path, cut=2)
    for name, stage in stages.items():
        two, one = tmp_path / name, tmp_path / f"{name}-one"
        one.mkdir()
        attempt(stage, name, one)

        def assert_same(name=name, one=one, two=two):
            assert launch.losses(two) == pytest.approx(launch.losses(one), rel=1e-4, abs=1e-6), name
            if name.startswith("reward"):
                scales = [json.loads((folder / SCORE_SCALE).read_text()) for folder in (one, two)]
                assert scales[1] == pytest.approx(scales[0], rel=1e-3), name
            ours, theirs = weights(two), weights(one)
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                # As a whole: AdamW blows the rounding of single gradients up that are next to nothing.
                assert (tensor - theirs[key]).norm() <= 2e-3 * theirs[key].norm(), f"{name}: {key}"

        assert_same()
    launch.cut_back(two, 2)
    attempt(stage, name, two)
    assert_same()


def test_mixed_precision_in_shards_is_that_of_whole_replicas(tmp_path, monkeypatch):
    """accelerate's own would round the log-probs of DPO and the scores of a reward model, and add gradients up in bfloat16."""
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.prepare(tmp_path)
    for strategy in ("ddp", "fsdp2"):
        tasks = []
        for name in ("dpo", "reward"):
            processes = {"num_processes": 2, "strategy": strategy, "mixed_precision": "bf16"}
            stage = launch.on_two(launch.stages(tmp_path, 2)[name], strategy, launch=processes, learning_rate=3e-3)
            tasks.append((stage.stage, stage.model_dump(exclude_unset=True), str(tmp_path / f"{name}-{strategy}")))
        run_on_two(tasks, strategy, tmp_path)
    for name in ("dpo", "reward"):
        whole, shards = (tmp_path / f"{name}-{strategy}" for strategy in ("ddp", "fsdp2"))
        assert launch.losses(shards) == pytest.approx(launch.losses(whole), rel=1e-6)
        for key, tensor in weights(whole).items():
            assert (tensor - weights(shards)[key]).norm() <= 1e-3 * tensor.norm(), f"{name}: {key}"


@pytest.mark.parametrize("tuning", UNSHARDED)
def test_what_cannot_be_sharded_is_refused(tuning):
    fields = {"model": "owner/name", "data": "x", "tuning": tuning, "launch": {"num_processes": 2, "strategy": "fsdp2"}}
    with pytest.raises(ValidationError, match=f"tuning '{tuning}' trains whole in every process: strategy must be ddp, not fsdp2"):
        SFT(**fields)
