"""A PPO run that is stopped and goes on ends as one that was never stopped, to the bit."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))

from chaos import kill_ppo

from align.cli import main
from align.runner.checkpoints import checkpoints, seal

COMMAND = f"ppo --model model --data prompts.jsonl --reward_funcs mine.py:noisy {kill_ppo.FLAGS}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    kill_ppo.prepare(folder)
    # Raises at the call that the environment names.
    (folder / "mine.py").write_text(
        "import os\nimport time\n"
        + kill_ppo.REWARD.replace("time.sleep(0.05)  # so that some kills fall here", "stop()")
        + "\ncalls = 0\n"
        "def stop():\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == int(os.environ.get('STOP_AT', 0)):\n"
        "        raise RuntimeError('stopped')\n"
    )
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def whole(folder):
    """A run that was never stopped, by critic."""
    made = {}

    def of(critic):
        if critic not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert main(f"{COMMAND} --output_dir {critic} {kill_ppo.VARIANTS[critic]}".split()) == 0
            made[critic] = kill_ppo.outcome(folder / critic)
        return made[critic]

    return of


def run(out, flags, capsys, code=0):
    assert main(f"{COMMAND} --output_dir {out} {flags}".split()) == code, capsys.readouterr().err
    return capsys.readouterr().err


@pytest.mark.parametrize("critic", kill_ppo.VARIANTS)
def test_a_run_that_failed_halfway_ends_as_a_whole_one(critic, folder, whole, capsys, monkeypatch):
    """It fails in the sixth step (the first call of the reward is for the held-out prompts), whose prompts are drawn by then. Rows
    to mix in are left of the shuffled ones, and a round that is not logged yet.
    """
    flags = kill_ppo.VARIANTS[critic]
    wanted = whole(critic)
    monkeypatch.setenv("STOP_AT", str(calls_so_far() + 7))
    assert "stopped" in run(f"{critic}-cut", flags, capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    assert sorted(path.name for path in (folder / f"{critic}-cut" / "checkpoints").glob("check*")) == [
        "checkpoint-4",
        "checkpoint-5",
    ]
    assert "going on from step 5 of 8" in run(f"{critic}-cut", flags, capsys)
    assert kill_ppo.differences(wanted, kill_ppo.outcome(folder / f"{critic}-cut")) == []


def calls_so_far():
    from align.rewards import load_reward

    return load_reward("mine.py:noisy").__globals__["calls"]


def test_a_killed_process(folder, whole, capsys):
    """SIGKILL behind the third checkpoint, in a process of its own."""
    wanted = whole("separate")
    process = kill_ppo.start(folder, "killed", "")
    deadline = time.monotonic() + 120
    while not (folder / "killed/checkpoints/checkpoint-3").is_dir():
        assert process.is_alive(), (folder / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert "going on from step" in run("killed", "", capsys)
    assert kill_ppo.differences(wanted, kill_ppo.outcome(folder / "killed")) == []


@pytest.mark.parametrize("role", ["policy/", "optimizer/"])
def test_a_checkpoint_of_another_shape_is_refused_in_one_line(role, folder, capsys, monkeypatch):
    """Sealed and well-formed, as somebody would who means harm. One number in place of a row would be taken for all of it."""
    out = f"shape-{role[:-1]}"
    monkeypatch.setenv("STOP_AT", str(calls_so_far() + 4))
    run(out, "", capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    checkpoint = checkpoints(folder / out / "checkpoints")[-1]
    tensors = load_file(checkpoint / "state.safetensors")
    changed = {name: tensor[..., :1].contiguous() for name, tensor in tensors.items() if name.startswith(role) and tensor.dim()}
    save_file({**tensors, **changed}, checkpoint / "state.safetensors")
    seal(checkpoint)
    told = run(out, "", capsys, code=2).splitlines()[-1]
    assert re.match(rf"align: error: .*the checkpoint .*{checkpoint.name} does not fit the model \({role}\S+ has the shape", told)


@pytest.mark.parametrize(("file", "content"), [("state.json", '{"step": 1}'), ("process-0.json", "[]"), ("state.json", "{")])
def test_a_checkpoint_of_other_content_is_refused_in_one_line(file, content, folder, capsys, monkeypatch):
    """Sealed again, so that its checksums say nothing."""
    out = f"content-{file}-{len(content)}"
    monkeypatch.setenv("STOP_AT", str(calls_so_far() + 4))
    run(out, "", capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    checkpoint = checkpoints(folder / out / "checkpoints")[-1]
    (checkpoint / file).write_text(content)
    seal(checkpoint)
    told = run(out, "", capsys, code=2).splitlines()[-1]
    assert re.match(rf"align: error: .*the checkpoint .*{checkpoint.name} cannot be resumed \(.*\); remove it to start", told)


def test_what_was_logged_is_on_the_disk_before_its_checkpoint(folder, capsys, monkeypatch):
    """After a power cut a run goes on from the checkpoint, and what was measured until then is there to choose the best by."""
    flushed, fsync = [], os.fsync

    def noted(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    run("flushed", "--save_steps 4", capsys)
    seals = [place for place, name in enumerate(flushed) if name.startswith(".checksums.json")]
    logs = [place for place, name in enumerate(flushed) if name == "metrics.jsonl"]
    assert len(seals) == 2
    assert logs[0] < seals[0] < logs[1] < seals[1]


def test_kept_completions_are_not_sampled_again(folder, whole, capsys, monkeypatch):
    """Between two checkpoints what was sampled and scored is kept: the reward is asked for the rest only."""
    wanted, before = whole("separate"), calls_so_far()
    monkeypatch.setenv("STOP_AT", str(before + 8))  # held-out prompts, six steps, and the seventh
    run("four", "--save_steps 4", capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    kept = sorted(path.name for path in (folder / "four/checkpoints/rollouts").iterdir())
    assert kept == ["5-0-of-1.jsonl", "6-0-of-1.jsonl"]
    before = calls_so_far()
    run("four", "--save_steps 4", capsys)
    assert calls_so_far() - before == 3  # steps seven and eight, and the held-out prompts
    assert kill_ppo.differences(wanted, kill_ppo.outcome(folder / "four")) == []


def test_damaged_completions_are_sampled_again(folder, whole, capsys, monkeypatch):
    wanted, before = whole("separate"), calls_so_far()
    monkeypatch.setenv("STOP_AT", str(before + 8))
    run("damaged", "--save_steps 4", capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    file = folder / "damaged/checkpoints/rollouts/6-0-of-1.jsonl"
    file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    before = calls_so_far()
    assert "6-0-of-1.jsonl is damaged: what it held is sampled again" in run("damaged", "--save_steps 4", capsys)
    assert calls_so_far() - before == 4  # steps six to eight, and the held-out prompts
    assert kill_ppo.differences(wanted, kill_ppo.outcome(folder / "damaged")) == []


def test_completions_from_before_the_first_checkpoint_are_kept_as_well(folder, whole, capsys, monkeypatch):
    wanted, before = whole("separate"), calls_so_far()
    monkeypatch.setenv("STOP_AT", str(before + 4))  # held-out prompts, two steps, and the third
    run("none", "--save_steps 4", capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    before = calls_so_far()
    assert "going on" not in run("none", "--save_steps 4", capsys)
    assert calls_so_far() - before == 8  # held-out prompts, steps three to eight, and the held-out prompts
    assert kill_ppo.differences(wanted, kill_ppo.outcome(folder / "none")) == []


def test_a_run_that_is_not_to_go_on_begins_anew(folder, whole, capsys, monkeypatch):
    """Neither the checkpoint behind the second step is used nor what was sampled in the third."""
    wanted, before = whole("separate"), calls_so_far()
    monkeypatch.setenv("STOP_AT", str(before + 5))  # held-out prompts, three steps, and the fourth
    run("anew", "--save_steps 2", capsys, code=2)
    monkeypatch.delenv("STOP_AT")
    left = folder / "anew/checkpoints"
    assert (left / "checkpoint-2").is_dir()
    assert (left / "rollouts/3-0-of-1.jsonl").is_file()
    before = calls_so_far()
    assert "going on" not in run("anew", "--save_steps 4 --resume_from_checkpoint false", capsys)
    assert calls_so_far() - before == 10  # held-out prompts, eight steps, and the held-out prompts
    assert not (left / "checkpoint-2").exists()
    assert kill_ppo.differences(wanted, kill_ppo.outcome(folder / "anew")) == []


def test_checkpoints_are_safetensors_and_json_only(folder, whole):
    whole("separate")
    files = [path for path in (folder / "separate/checkpoints").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    assert sorted(path.name for path in (folder / "separate/checkpoints").iterdir()) == ["checkpoint-7", "checkpoint-8"]
