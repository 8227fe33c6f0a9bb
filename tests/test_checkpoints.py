"""Checkpoints: a run that was stopped ends with the same bits, damaged ones are not used, hostile ones are refused in one line."""

import json
import os
import random
import shutil
import struct
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from chaos.outcome import differences
from helpers import llama
from transformers import BertConfig, BertForMaskedLM

from align.artifact import MANIFEST
from align.checkpointing import SafeTrainer
from align.data import write_rows
from align.errors import AlignError, NonFiniteLoss
from align.losses import preference_losses
from align.pipeline import Run
from align.recipe import Recipe
from align.runner import checkpoints as c
from align.runner.share import size
from align.runner.stop import Stopped
from align.stages import KTO, SFT, Preference, Pretrain, RewardModel, TaskTraining
from align.stages.training import final_weights

THINGS = ("cat", "mat", "hat", "dog", "sun", "car", "cup", "pen", "key", "box", "bed", "map")
ROWS = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    """Rows of every kind, and a model with dropout."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)
    write_rows(folder / "text.jsonl", [{"text": f"the {draw.choice(THINGS)} sat on a {draw.choice(THINGS)}"} for _ in range(ROWS)])
    questions = [f"What is {i} {draw.choice(THINGS)}?" for i in range(ROWS)]
    write_rows(folder / "sft.jsonl", [{"prompt": q, "completion": f"a {draw.choice(THINGS)}"} for q in questions])
    write_rows(folder / "pairs.jsonl", [{"prompt": q, "chosen": "a cat", "rejected": f"{q} mat"} for q in questions])
    write_rows(folder / "kto.jsonl", [{"prompt": q, "completion": "hello", "label": i % 2 == 0} for i, q in enumerate(questions)])
    write_rows(folder / "labels.jsonl", [{"text": q, "label": "even" if i % 2 == 0 else "odd"} for i, q in enumerate(questions)])
    llama(attention_dropout=0.2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    masked = deepcopy(tokenizer)
    masked.add_special_tokens({"mask_token": "<|mask|>"})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=len(masked), **sizes)).save_pretrained(folder / "bert")
    masked.save_pretrained(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Where the runs that nothing stops are: whichever test asks for one first makes it, and to the others it is up to date."""
    return tmp_path_factory.mktemp("undisturbed")


def stages(data):
    """Six steps each, over two epochs, so that logs, checkpoints and ends of epochs fall on different steps."""
    common = {
        "max_steps": 6, "num_train_epochs": 9, "per_device_train_batch_size": 6, "held_out": 0.2, "max_length": 64,
        "logging_steps": 4, "learning_rate": 1e-2, "seed": 3,
    }  # fmt: skip
    model = str(data / "model")
    return {
        "pretrain": Pretrain(model=model, data=f"{data}/text.jsonl", **common),
        "sft_lora": SFT(model=model, data=f"{data}/sft.jsonl", use_peft=True, lora_r=2, lora_dropout=0.3, **common),
        "reward": RewardModel(model=model, data=f"{data}/pairs.jsonl", gradient_accumulation_steps=2, **common),
        "reward_by_prompt": RewardModel(
            model=model, data=f"{data}/pairs.jsonl", group_by_prompt=True, sft_coef=0.5, gradient_accumulation_steps=2, **common
        ),
        "dpo": Preference(model=model, data=f"{data}/pairs.jsonl", loss="dpo", beta=0.1, **common),
        "kto": KTO(model=model, data=f"{data}/kto.jsonl", beta=0.1, **common),
        "early_stopping": SFT(
            model=model, data=f"{data}/sft.jsonl", eval_steps=1, early_stopping_patience=2, **{**common, "max_steps": 20}
        ),
        "masked_words": Pretrain(model=str(data / "bert"), data=f"{data}/text.jsonl", **common),
        "task": TaskTraining(task="classification", model=str(data / "bert"), data=f"{data}/labels.jsonl", **common),
        "trl": SFT(model=model, data=f"{data}/sft.jsonl", engine="trl", **common),
    }


def left(folder):
    """Weights, and metrics without times."""
    found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return found | {
        "metrics": [
            {k: v for k, v in r.items() if not k.endswith(("seconds", "per_second", "runtime", "preparation_time"))}
            for r in records
        ]
    }


def run(stage, out):
    return Run(Recipe("x", {"x": stage}), out).execute()["x"]


def stop_at(monkeypatch, step):
    """Ask to stop during the `step`th step of the next training."""
    asked = iter(range(1, 1000))
    monkeypatch.setattr("align.trainers.callbacks.stop_requested", lambda: next(asked) == step)


@pytest.mark.parametrize(
    "name", ["pretrain", "sft_lora", "reward", "reward_by_prompt", "dpo", "kto", "early_stopping", "masked_words", "task", "trl"]
)
def test_a_stage_that_was_stopped_twice_ends_with_the_same_bits(name, data, undisturbed, tmp_path, monkeypatch):
    stage = stages(data)[name]
    whole = run(stage, undisturbed)
    for step in (2, 1):  # at step 2, and one step later
        with monkeypatch.context() as patched:
            stop_at(patched, step)
            with pytest.raises(Stopped):
                run(stage, tmp_path / "cut")
    folder = next((tmp_path / "cut").glob("x-*"))
    assert [path.name for path in c.checkpoints(folder / "checkpoints")] == ["checkpoint-2", "checkpoint-3"]
    (step,) = Run(Recipe("x", {"x": stage}), tmp_path / "cut").plan()
    assert step.reason == "interrupted, goes on from checkpoint-3"
    if name != "trl":
        assert not [path for path in folder.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl"}]
    cut = run(stage, tmp_path / "cut")
    assert cut.identity == whole.identity
    # TRL's trainers forget what they summed since their last log.
    assert differences(left(Path(cut.path)), left(Path(whole.path))) == (["metrics"] if name == "trl" else [])
    assert name == "trl" or cut.metrics == whole.metrics


def test_another_runs_checkpoints_are_not_gone_on_from(data, undisturbed, tmp_path, monkeypatch):
    """In a folder of one's own choice (`--output_dir`), whose name says nothing of what is made there."""
    stage = stages(data)["dpo"]

    def execute(changed=stage):
        return Run(Recipe("x", {"x": changed}), tmp_path, tmp_path / "mine").execute()["x"]

    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(Stopped):
            execute()
    with pytest.raises(
        AlignError, match=r"mine holds what was begun of another run \(changed: learning_rate 0.01 -> 1e-06, seed 3 -> 7\); choose"
    ):
        execute(stage.model_copy(update={"learning_rate": 1e-6, "seed": 7}))
    assert execute().metrics == run(stage, undisturbed).metrics
    assert not (tmp_path / "mine" / "begun.json").exists()


@pytest.mark.parametrize(("name", "step"), [("dpo", 4), ("dpo", 6), ("reward", 6)])
def test_stopped_at_the_end_of_an_epoch_and_at_the_last_step(name, step, data, undisturbed, tmp_path, monkeypatch):
    """Four batches are an epoch, and six steps all. What is measured behind the last step is as precise as training."""
    stage = stages(data)[name].model_copy(update={"bf16": name == "reward"})
    whole = run(stage, undisturbed)
    with monkeypatch.context() as patched:
        stop_at(patched, step)
        with pytest.raises(Stopped):
            run(stage, tmp_path / "cut")
    cut = run(stage, tmp_path / "cut")
    assert differences(left(Path(cut.path)), left(Path(whole.path))) == []
    assert cut.metrics == whole.metrics


# -- damage --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """Two sealed checkpoints, 2 and 10."""
    import torch
    from safetensors.torch import save_file

    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.arange(6.0)}, folder / "model.safetensors")
        (folder / "progress.json").write_text("{}")
        c.seal(folder)
    return tmp_path


def truncate(checkpoint):
    (file,) = checkpoint.glob("*model.safetensors")
    os.truncate(file, file.stat().st_size // 2)


def flip(checkpoint):
    (file,) = checkpoint.glob("*model.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def link(checkpoint):
    (checkpoint / "progress.json").unlink()
    (checkpoint / "progress.json").symlink_to("/etc/hostname")


def huge_header(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    c.seal(checkpoint)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "model.safetensors does not match its checksum"),
        (flip, "model.safetensors does not match its checksum"),
        (link, "it contains a symbolic link"),
        (huge_header, "its header claims 4,611,686,018,427,387,904 bytes of a file of 10"),
        (lambda checkpoint: (checkpoint / "progress.json").unlink(), "progress.json is missing"),
        (lambda checkpoint: (checkpoint / "extra.pt").touch(), "extra.pt was not there when it was sealed"),
        (lambda checkpoint: (checkpoint / c.SEAL).write_text("{"), "its seal cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(damage, reason, saved, capsys):
    assert c.last_good(saved) == saved / "checkpoint-10"
    damage(saved / "checkpoint-10")
    assert c.last_good(saved) == saved / "checkpoint-2"
    assert reason in capsys.readouterr().err
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoint-2", "corrupt-10"]


def test_what_a_cut_save_left_is_removed(saved):
    (saved / "checkpoint-10" / c.SEAL).unlink()
    assert c.last_good(saved) == saved / "checkpoint-2"
    assert not (saved / "checkpoint-10").exists()
    assert c.last_good(saved / "nothing") is None


def test_the_newest_are_kept_and_the_best(saved):
    for step in (11, 12):
        (saved / f"checkpoint-{step}").mkdir()
        c.seal(saved / f"checkpoint-{step}")
    c.prune(saved, 1, but=str(saved / "checkpoint-10"))
    assert [c.step_of(path) for path in c.checkpoints(saved)] == [10, 12]


@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_run_whose_last_checkpoint_is_damaged_ends_with_the_same_bits(damage, data, undisturbed, tmp_path, monkeypatch, capsys):
    stage = stages(data)["sft_lora"].model_copy(update={"save_steps": 1})
    whole = run(stage, undisturbed)
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(Stopped):
            run(stage, tmp_path / "cut")
    (newest,) = tmp_path.glob("cut/x-*/checkpoints/checkpoint-3")
    damage(newest)
    cut = run(stage, tmp_path / "cut")
    said = capsys.readouterr().err
    assert "set aside as corrupt-3" in said
    assert "x: going on from step 2" in said
    assert differences(left(Path(cut.path)), left(Path(whole.path))) == []


def best_first(data):
    """Three steps, of which the first counts as the best: the loss falls, and the greatest one is kept."""
    return stages(data)["early_stopping"].model_copy(update={"greater_is_better": True})


@pytest.mark.parametrize("damage", [truncate, flip, shutil.rmtree])
def test_a_run_whose_best_checkpoint_is_damaged_ends_with_the_same_bits(damage, data, undisturbed, tmp_path, monkeypatch, capsys):
    stage = best_first(data)
    whole = run(stage, undisturbed)
    assert whole.metrics["best_step"] == 1
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(Stopped):
            run(stage, tmp_path / "cut")
    (kept,) = tmp_path.glob("cut/x-*/checkpoints/checkpoint-1")
    damage(kept)
    cut = run(stage, tmp_path / "cut")
    assert "checkpoint-1 has the best weights until then, and " in capsys.readouterr().err
    assert differences(left(Path(cut.path)), left(Path(whole.path))) == []
    assert cut.metrics == whole.metrics


def test_the_best_checkpoint_of_a_run_that_was_moved(data, undisturbed, tmp_path, monkeypatch):
    """Stopped behind its last step; where its best checkpoint was is noted by its path."""
    stage = best_first(data)
    whole = run(stage, undisturbed)
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(Stopped):
            run(stage, tmp_path / "cut")
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert differences(left(Path(run(stage, tmp_path / "moved").path)), left(Path(whole.path))) == []


def test_best_weights_that_were_damaged_while_training_went_on(data, undisturbed, tmp_path, monkeypatch):
    """They are loaded at its end, which may be hours later; given again, the command makes them anew."""
    stage = best_first(data)
    whole = run(stage, undisturbed)
    load = SafeTrainer._load_best_model

    def damaged(trainer):
        flip(Path(trainer.state.best_model_checkpoint))
        load(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(SafeTrainer, "_load_best_model", damaged)
        with pytest.raises(
            AlignError, match=r"the best weights are those of .*, and model.safetensors does not match its checksum"
        ):
            run(stage, tmp_path / "cut")
    assert differences(left(Path(run(stage, tmp_path / "cut").path)), left(Path(whole.path))) == []


def test_a_disk_that_is_full_during_a_save_and_has_room_again(data, tmp_path):
    stage = stages(data)["dpo"].model_copy(update={"save_steps": 2, "save_total_limit": 9})
    whole = run(stage, tmp_path / "whole")
    (first,) = Path(whole.path).glob("checkpoints/checkpoint-2")
    disk = tmp_path / "disk"
    disk.mkdir()
    room = size(first) * 5 // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(AlignError, match=r"^x: the disk of .* is full \(\d MB free\); make room"):
            run(stage, disk / "out")
        (folder,) = disk.glob("out/x-*")
        assert [c.fault(checkpoint) for checkpoint in c.checkpoints(folder / "checkpoints")] == [None, None]
        assert not (folder / MANIFEST).exists()
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        cut = run(stage, disk / "out")
        assert differences(left(Path(cut.path)), left(Path(whole.path))) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_checkpoint_of_another_shape_is_refused_in_one_line(file, data, tmp_path, monkeypatch):
    """Sealed and well-formed, as somebody would who means harm."""
    from safetensors.torch import load_file, save_file

    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(Stopped):
            run(stages(data)["dpo"], tmp_path)
    (checkpoint,) = tmp_path.glob("x-*/checkpoints/checkpoint-2")
    tensors = load_file(checkpoint / file)
    save_file(
        {name: tensor.repeat(2, *[1] * (tensor.dim() - 1)) if tensor.dim() else tensor for name, tensor in tensors.items()},
        checkpoint / file,
    )
    c.seal(checkpoint)
    with pytest.raises(
        AlignError, match=r"x: the checkpoint .*checkpoint-2 (does not fit the model|cannot be resumed) \("
    ) as caught:
        run(stages(data)["dpo"], tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"), [("random-0.json", "[]"), ("random-0.json", '{"python": 3'), ("progress.json", '{"scale": 1}')]
)
def test_a_checkpoint_of_other_content_is_refused_in_one_line(file, content, data, tmp_path, monkeypatch):
    """Sealed again, so that its checksums say nothing."""
    with monkeypatch.context() as patched:
        stop_at(patched, 2)
        with pytest.raises(Stopped):
            run(stages(data)["dpo"], tmp_path)
    (checkpoint,) = tmp_path.glob("x-*/checkpoints/checkpoint-2")
    (checkpoint / file).write_text(content)
    c.seal(checkpoint)
    with pytest.raises(AlignError, match=r"^x: the checkpoint .*checkpoint-2 cannot be resumed \(.*\); remove it to start"):
        run(stages(data)["dpo"], tmp_path)


def test_a_state_of_other_content_is_refused_in_one_line(tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    with pytest.raises(AlignError, match=r"checkpoint-2 cannot be resumed \('max_steps'\)"):
        final_weights(checkpoint)


def test_no_memory_is_no_fault_of_a_checkpoint(tmp_path):
    """It was told as one, and the advice was to remove it."""
    with pytest.raises(torch.OutOfMemoryError), c.resuming(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# -- losses that are no numbers ------------------------------------------------------------------------------------------------


@pytest.fixture
def bad(data, monkeypatch):
    """DPO whose loss is NaN in the steps `bad.at`, counted over all attempts, evaluations left out; or, in place of it, its
    gradient.
    """
    import torch

    whole = preference_losses["dpo"]

    class Bad:
        at: tuple[int, ...] = ()
        calls = 0
        finite_loss = False

        def stage(self, policy, **fields):
            fields = {
                **stages(data)["dpo"].model_dump(exclude_unset=True),
                "max_tokens_per_micro_batch": 4096,
                "logging_steps": 1,
                **fields,
            }
            return Preference.model_validate({**fields, "on_non_finite": policy})

    watch = Bad()

    def broken(x, **parameters):
        output = whole(x, **parameters)
        if torch.is_grad_enabled():
            watch.calls += 1
            if watch.calls in watch.at and watch.finite_loss:
                return type(output)(output.loss + (0 * output.loss).sqrt(), output.metrics)
            if watch.calls in watch.at:
                return type(output)(output.loss * float("nan"), output.metrics)
        return output

    broken.__signature__ = __import__("inspect").signature(whole)
    broken.needs_reference, broken.needs_common = whole.needs_reference, whole.needs_common
    monkeypatch.setitem(preference_losses._entries, "dpo", broken)
    return watch


def rates(artifact):
    records = [json.loads(line) for line in Path(artifact.path, "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["learning_rate"] for record in records if "learning_rate" in record}


def test_stop(bad, tmp_path):
    bad.at = (3,)
    with pytest.raises(NonFiniteLoss, match="x: the loss is nan at step 3; no update was made"):
        run(bad.stage("stop"), tmp_path)


def test_a_gradient_that_is_no_number_stops_too(bad, tmp_path):
    """The loss is finite; without a look at the gradient the weights would be NaN, and the checkpoint of that step with them."""
    bad.at, bad.finite_loss = (3,), True
    with pytest.raises(NonFiniteLoss, match="x: the gradient's norm is nan at step 3; no update was made"):
        run(bad.stage("stop"), tmp_path)


@pytest.mark.parametrize("finite_loss", [False, True])
def test_skip_a_batch(finite_loss, bad, tmp_path, capsys):
    bad.at, bad.finite_loss = (3,), finite_loss
    artifact = run(bad.stage("skip"), tmp_path)
    assert "step 3 is skipped" in capsys.readouterr().err
    assert len(rates(artifact)) == 6
    bad.calls, bad.at = 0, tuple(range(100))
    with pytest.raises(NonFiniteLoss):
        run(bad.stage("skip", seed=4, max_steps=20), tmp_path)


def test_lower_the_learning_rate(bad, tmp_path, capsys):
    """NaN in step 4; from the checkpoint of step 2 on at half the rate, and step 3 is the fifth call."""
    usual = rates(run(bad.stage("stop"), tmp_path / "usual"))
    bad.calls, bad.at = 0, (4,)
    lowered = rates(run(bad.stage("lower_learning_rate", save_steps=2), tmp_path / "lowered"))
    assert "going on from the last checkpoint with the learning rate times 0.5" in capsys.readouterr().err
    expected = {step: rate * (1 if step <= 2 else 0.5) for step, rate in usual.items()}
    assert lowered == pytest.approx(expected)
