"""Short versions of the scripts in tests/chaos; docs/reliability.md has the results of the long ones."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "chaos"))

import kill
import launch
import pytest
import soak
import two_machines

from align.allocator import large_pages
from align.errors import AlignError
from align.runner import launch as runner_launch
from align.runner.files import disk_is_full
from align.runner.worker import Task
from align.stages import SFT


def test_a_pipeline_that_is_killed_ends_as_one_that_was_not(capsys):
    assert kill.main(["--kills", "2", "--seed", "2", "--every", "2", "--recipe", "tests/chaos/quick.py"]) == 0
    assert "2 kills in" in capsys.readouterr().out


def test_nothing_piles_up(tmp_path, monkeypatch, capsys):
    for name in ("ALIGN_HOME", "ALIGN_IN_PROCESS", "TMPDIR"):
        monkeypatch.setenv(name, "")  # to be taken back at the end
    monkeypatch.setattr(tempfile, "tempdir", None)
    soak.soak(12, 6, tmp_path)


def test_shards_of_two_processes_resume_as_one(tmp_path, monkeypatch):
    """FSDP2 on two processes until step 4, then one process: the losses of one."""
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ALIGN_IN_PROCESS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch.prepare(tmp_path)
    stage = launch.stages(tmp_path, 6)["reward"]
    one = launch.run(stage, tmp_path / "one")
    two = launch.run(launch.on_two(stage, "fsdp2"), tmp_path / "two")
    assert max(launch.apart(one, two)) < 1e-4
    launch.cut_back(two, 4)
    assert max(launch.apart(one, launch.run(stage, tmp_path / "two"))) < 1e-4


def test_a_process_leaves_with_its_code_and_everything_said():
    script = "import atexit; from align.runner.rank import leave; atexit.register(print, 'registered'); print('said'); leave(3)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "said\nregistered\n")


RAISED = {
    "a bug": ("ValueError('no such thing')", 1, None),
    "a mistake": ("AlignError('wrong field')", 0, "wrong field"),
    "no space": ("OSError(28, 'No space left on device')", 0, ""),
    "a full disk": ("DiskFull('the disk of x is full')", 0, ""),
    "stopped": ("Stopped()", 130, None),
    "left over": ("ValueError('the other is gone')", 0, None),
}
"""What a stage raises in one of its processes; the code that it ends with, and what it leaves as its mistake."""
RAISING = """
import os, sys, types
import torch  # as `leave` would in each
from pathlib import Path
from align.errors import AlignError, DiskFull
from align.runner import rank
from align.runner.stop import Stopped

def attempt(*_):
    raise eval(raised)

for folder, raised in zip(sys.argv[1::2], sys.argv[2::2]):
    task = types.SimpleNamespace(status=f"{folder}/status.json", name="one", stage=lambda: None, draft={"path": folder})
    rank.attempt, rank.read_task = attempt, lambda _: task
    if (child := os.fork()) == 0:
        os.dup2(os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT), 2)
        rank.leave(rank.main("task.json", f"{folder}/outcome.json"))
    Path(folder, "code").write_text(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


@pytest.fixture(scope="module")
def raising(tmp_path_factory):
    """A folder for each of `RAISED`, in which a process, a fork of one, has ended."""
    folders = {name: tmp_path_factory.mktemp("raising") for name in RAISED}
    (folders["left over"] / "mistake-1").write_text("wrong field")
    words = [word for name, folder in folders.items() for word in (str(folder), RAISED[name][0])]
    subprocess.run([sys.executable, "-c", RAISING, *words], check=True)
    return folders


@pytest.mark.parametrize("name", RAISED)
def test_a_process_whose_stage_raises_ends_with_a_code_that_says_so(raising, name):
    """Where another has left over a mistake, it says nothing."""
    (_, code, mistake), folder = RAISED[name], raising[name]
    said = (folder / "stderr").read_text()
    assert int((folder / "code").read_text()) == code
    assert ("ValueError: no such thing" in said) == (code == 1)
    assert name != "left over" or said == ""
    found = folder / "mistake-0"
    assert (found.read_text() if found.exists() else None) == mistake
    assert not (folder / "outcome.json").exists()


ONE_OF_TWO = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit("Traceback (most recent call last):"))
Path(sys.argv[1]).with_name("mistake-1").write_text("row 3 is no row")
if sys.argv[2] == "ends":
    Path(sys.argv[1]).write_text('{"loss": 1.0}')
else:
    time.sleep(600)
"""


def task_of(folder):
    return Task("a", "", {}, {"identity": "1f"}, "", str(folder / "logs" / "a.log"), "", "", None)


FULL_DISK = """
import sys
from pathlib import Path
Path(sys.argv[1]).with_name("mistake-0").touch()
"""


@pytest.mark.parametrize("other", ["ends", "waits"])
def test_a_mistake_that_one_process_meets_is_the_stages(other, monkeypatch, capfd, tmp_path):
    """Whether the other comes to its end, or waits for the one that left. The launcher adds nothing of its own."""
    script = lambda launch, words, folder, identity: [sys.executable, "-c", ONE_OF_TWO, words[-1], other]  # noqa: E731
    monkeypatch.setattr(runner_launch, "command", script)
    monkeypatch.setattr(runner_launch, "PATIENCE", 0.1, raising=False)
    stage = SFT(model="owner/name", data="x", launch={"num_processes": 2})
    with pytest.raises(AlignError, match="row 3 is no row"):
        runner_launch.run_launched(task_of(tmp_path), stage)
    assert capfd.readouterr().err == ""


def test_a_full_disk_in_a_launched_stage_is_told_as_one(monkeypatch, tmp_path):
    script = lambda launch, words, folder, identity: [sys.executable, "-c", FULL_DISK, words[-1]]  # noqa: E731
    monkeypatch.setattr(runner_launch, "command", script)
    stage = SFT(model="owner/name", data="x", launch={"num_processes": 2})
    with pytest.raises(OSError, match="No space left") as raised:
        runner_launch.run_launched(task_of(tmp_path), stage)
    assert disk_is_full(raised.value)


PATIENT = """
import json, sys
from pathlib import Path
from torch.distributed.launcher.api import LaunchConfig
Path(sys.argv[1]).write_text(json.dumps({"seconds": LaunchConfig(1, 1, 1).shutdown_timeout}))
"""


def test_torchrun_gives_the_processes_longer_to_save_than_the_runner(monkeypatch, tmp_path):
    monkeypatch.setattr(
        runner_launch, "command", lambda launch, words, folder, identity: [sys.executable, "-c", PATIENT, words[-1]]
    )
    stage = SFT(model="owner/name", data="x", learning_rate=1e-3, launch={"num_processes": 2})
    assert runner_launch.run_launched(replace(task_of(tmp_path), grace=300.5), stage)["seconds"] > 300.5


TELLS_OF_PAGES = "import json, os, sys; open(sys.argv[1], 'w').write(json.dumps({'told': os.environ['GLIBC_TUNABLES']}))"


def test_processes_of_a_launch_have_large_pages_too(monkeypatch, tmp_path):
    script = lambda launch, words, folder, identity: [sys.executable, "-c", TELLS_OF_PAGES, words[-1]]  # noqa: E731
    monkeypatch.setattr(runner_launch, "command", script)
    stage = SFT(model="owner/name", data="x", learning_rate=1e-3, launch={"num_processes": 2})
    assert runner_launch.run_launched(task_of(tmp_path), stage) == {"told": large_pages()["GLIBC_TUNABLES"]}


KILLS_ITS_PARENT = "import os, sys, signal; open(sys.argv[1] + '/mistake-1', 'x').close(); os.kill(os.getppid(), signal.SIGKILL)"


def test_what_a_killed_launch_leaves_lies_in_the_run_and_goes_with_the_next(monkeypatch, tmp_path):
    """It stayed in the system's folder for temporary files, where nobody looks."""
    (tmp_path / "tmp").mkdir()
    script = f"""
import sys
from align.runner import launch
from align.runner.worker import Task
from align.stages import SFT
launch.command = lambda launch, words, folder, identity: [sys.executable, "-c", {KILLS_ITS_PARENT!r}, folder]
launch.run_launched(Task(**{asdict(task_of(tmp_path))!r}), SFT(model="owner/name", data="x", learning_rate=1e-3))
"""
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path / "tmp")})
    assert killed.returncode == -signal.SIGKILL
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["a.launch"]
    ends = "import sys; open(sys.argv[1], 'x').write('{\"loss\": 1.0}')"
    monkeypatch.setattr(runner_launch, "command", lambda launch, words, folder, identity: [sys.executable, "-c", ends, words[-1]])
    stage = SFT(model="owner/name", data="x", learning_rate=1e-3, launch={"num_processes": 2})
    assert runner_launch.run_launched(task_of(tmp_path), stage) == {"loss": 1.0}
    assert list((tmp_path / "logs").iterdir()) == []


@pytest.mark.skipif(not two_machines.permitted(), reason="network namespaces cannot be made here")
def test_two_machines_of_which_one_dies(tmp_path):
    assert two_machines.check(tmp_path, steps=6) <= two_machines.CLOSE
