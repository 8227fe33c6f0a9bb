"""The runner's processes: what a stage's process is, what becomes of one that dies, who waits for whom, and what stays."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import urllib.error
from contextlib import suppress
from dataclasses import replace
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from runner_stages import Act

from align.artifact import MANIFEST, Artifact
from align.cli import main
from align.commands.run import show_plan
from align.errors import AlignError, StageFailed
from align.pipeline import Options, Run
from align.recipe import Recipe
from align.registry import Registry
from align.runner import execute
from align.runner.locks import is_locked, lock, lock_file
from align.runner.view import statuses
from align.runner.worker import is_transient
from align.stages import SFT, Evaluate

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def processes(monkeypatch):
    """Stages run in processes of their own."""
    monkeypatch.setenv("ALIGN_IN_PROCESS", "0")


def test_the_process_that_forks_is_not_taken_down_piece_by_piece():
    """Who stopped a run for the second time waited for that, up to five seconds."""
    lines = "import atexit, align.runner.zygote as z; z.PRELOAD = (); atexit.register(print, 'taken down', flush=True); z.serve()"
    ended = subprocess.run([sys.executable, "-c", lines], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def run(stages, only=None, force=(), **options):
    return Run(Recipe("r", stages), Path("out"), force=force, options=Options(backoff=0.0, **options)).execute(only)


def states():
    return {status["name"]: status["state"] for status in statuses(Path("out"))}


# -- a process for each stage --------------------------------------------------------------------------------------------------


def test_each_stage_is_a_process_of_its_own_forked_from_a_warm_one_without_threads(processes, capsys):
    artifacts = run({"a": Act(text="1"), "b": Act(text="2", model="a")})
    seen = [artifact.metrics for artifact in artifacts.values()]
    assert len({os.getpid(), *(metrics["pid"] for metrics in seen)}) == 3
    assert seen[0]["parent"] == seen[1]["parent"] != os.getpid()
    assert all(metrics["torch"] for metrics in seen)
    assert len(os.listdir(f"/proc/{seen[0]['parent']}/task")) == 1, "a fork of threads may hang"
    assert states() == {"a": "done", "b": "done"}
    (log,) = Path("out/logs").glob("a-*.log")
    assert "a prints" in log.read_text()
    assert "a prints" in capsys.readouterr().err, "the runner's terminal shows it, too"
    assert Registry().get("r-b").parents == {"a": "r-a@1"}


def test_what_a_stage_needs_no_more_is_gone_with_its_process(processes):
    pid = run({"a": Act()})["a"].metrics["pid"]
    assert not Path(f"/proc/{pid}").exists()


def test_a_mistake_ends_in_one_line_and_takes_nothing_else_with_it(processes, capsys):
    with pytest.raises(AlignError, match=r"^b: row 3 is\sno row; c waits for b$"):
        run({"a": Act(), "b": Act(does="mistake"), "c": Act(model="b"), "d": Act(text="d")})
    assert [artifact.name for artifact in Registry().all()] == ["r-a", "r-d"]
    assert states() == {"a": "done", "b": "failed", "d": "done"}
    assert not list(Path("out").glob("b-*"))
    capsys.readouterr()
    assert main(["status", "out"]) == 0
    assert re.search(r"^b  failed +row 3 is no row$", capsys.readouterr().out, re.MULTILINE), "one line, its name once"


def test_processes_of_a_launch_meet_before_their_stage_begins(processes):
    """So that each has a GPU of its own when the first model is loaded. They may save for as long as the run lets them."""
    artifacts = run({"a": Act(launch={"num_processes": 2, "cpu": True}), "b": Act()}, grace=90.5)
    assert [artifacts[name].metrics["met"] for name in "ab"] == [True, False]
    assert artifacts["a"].metrics["patience"] > 90.5


def test_stages_side_by_side_share_the_cores_also_with_a_launch(processes, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    artifacts = run({"a": Act(launch={"num_processes": 1, "cpu": True}), "b": Act()}, jobs=2)
    assert [artifacts[name].metrics["share"] for name in "ab"] == [1, 1]


def test_a_crash_shows_the_end_of_its_log(processes, capsys):
    with pytest.raises(StageFailed, match=r"a: RuntimeError: a bug; .*/out/logs/a-\w{8}\.log tells more"):
        run({"a": Act(does="crash"), "b": Act()})
    shown = capsys.readouterr().err
    assert "-- a failed; the end of" in shown
    assert 'raise RuntimeError("a bug")' in shown
    assert Registry().names() == ["r-b"]


def test_exit_codes(processes, tmp_path, capsys):
    for does, code in (("mistake", 2), ("crash", 1), ("ended", 1), ("write", 0)):
        recipe = tmp_path / f"{does}.py"
        lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
        source = "\n".join([*lines, f"    return Recipe('x', {{'a': Act(does={does!r})}})"])
        recipe.write_text(source)
        assert main(["run", str(recipe), "--out", f"out-{does}"]) == code
    assert re.search(r"error: a: one of its processes ended; \S+\.log tells more\n", capsys.readouterr().err)


@pytest.mark.parametrize("does", ["die_once", "flaky"])
def test_a_passing_fault_is_tried_again(does, processes, capsys):
    Path("met").mkdir()
    assert run({"a": Act(does=does, where=str(Path("met").resolve()))})["a"].version == 1
    assert "trying again in 0 s (1 of 2)" in capsys.readouterr().err


def test_a_network_that_fails_within_an_error_of_ours_is_a_passing_fault_too(processes, capsys):
    """After the last attempt it is the one line that it was."""
    Path("met").mkdir()
    where = str(Path("met").resolve())
    assert run({"a": Act(does="unreached", where=where)})["a"].version == 1
    assert "a: judge: no server answers; trying again in 0 s (1 of 2)" in capsys.readouterr().err
    with pytest.raises(AlignError, match=r"^a: judge: no server answers$") as met:
        run({"a": Act(does="unreached", where=where, text="down")}, retries=1)
    assert type(met.value) is AlignError
    assert capsys.readouterr().err.count("trying again") == 1


def test_what_another_attempt_does_not_mend_is_no_passing_fault():
    def http(code):
        return urllib.error.HTTPError("http://x", code, "no", Message(), None)

    def within(cause):
        error = AlignError("no model")
        error.__cause__ = cause
        return error

    assert [is_transient(within(http(code))) for code in (401, 404, 408, 429, 503)] == [False, False, True, True, True]
    missing = RepositoryNotFoundError("no", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))
    assert not is_transient(within(missing))
    assert not is_transient(within(OfflineModeIsEnabled("offline")))
    assert not is_transient(within(ValueError("7")))
    assert is_transient(within(httpx.ConnectTimeout("slow")))


def test_but_not_for_ever(processes):
    with pytest.raises(StageFailed, match=r"a: its process was ended by SIGKILL \(is memory short\?\)"):
        run({"a": Act(does="die")}, retries=1)
    assert Registry().names() == []


def test_the_process_that_forks_is_killed_before_it_is_asked(processes, tmp_path, monkeypatch, capsys):
    """As by the kernel, short of memory, while the runner looks at the next stage's data."""
    recipe = tmp_path / "x.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe(text: str):"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(text=text)})"]))
    take = execute.take

    def killed(*arguments):
        process = execute._zygote()._process
        process.kill()
        process.wait()
        return take(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(execute, "take", killed)
        assert main(["run", str(recipe), "--set", "text=one"]) == 1
    assert "the process that starts the stages was killed; the same command goes on" in capsys.readouterr().err
    assert main(["run", str(recipe), "--set", "text=one"]) == 0


def test_independent_stages_run_side_by_side(processes):
    """Each waits for the other: one after the other they would wait for ever."""
    Path("met").mkdir()
    meet = {"does": "meet", "where": str(Path("met").resolve())}
    artifacts = run({"a": Act(text="1", **meet), "b": Act(text="2", **meet), "c": Act(models={"a": "a", "b": "b"})}, jobs=2)
    assert set(artifacts) == {"a", "b", "c"}


def test_a_stage_that_needs_all_devices_waits_for_them(processes, monkeypatch):
    take = execute.take

    def wide(free, step, slots):
        return None if step.name == "b" and len(free) < slots else take(free, step, slots)

    monkeypatch.setattr(execute, "take", wide)
    assert set(run({"a": Act(text="1"), "b": Act(text="2"), "c": Act(text="3")}, jobs=2)) == {"a", "b", "c"}


def test_a_stage_defined_in_a_recipe_file_is_found_by_its_process(processes, tmp_path):
    recipe = tmp_path / "own.py"
    recipe.write_text(
        "from align.recipe import Recipe\nfrom align.stages.base import Stage, stage\n"
        "@stage('own')\nclass Own(Stage):\n    def run(self, context):\n        return {'own': True}\n"
        "def recipe(): return Recipe('own', {'a': Own(), 'b': Own()})\n"
    )
    assert main(["run", str(recipe)]) == 0
    assert Registry().get("own-b").metrics == {"own": True}


def test_a_recipe_may_import_what_lies_beside_it(processes, tmp_path, capsys):
    """In the process of its stage, too; and it is part of what the stage computes with."""
    folder = tmp_path / "with others"
    folder.mkdir()
    (folder / "beside_recipe.py").write_text("def number():\n    return 7\n")
    (folder / "own.py").write_text(
        "from beside_recipe import number\nfrom align.recipe import Recipe\nfrom align.stages.base import Stage, stage\n"
        "@stage('numbered')\nclass Numbered(Stage):\n    def run(self, context):\n        return {'number': number()}\n"
        "def recipe(): return Recipe('own', {'a': Numbered(), 'b': Numbered()})\n"
    )
    assert main(["run", str(folder / "own.py"), "--out", "out"]) == 0
    assert Registry().get("own-b").metrics == {"number": 7}
    (folder / "beside_recipe.py").write_text("def number():\n    return 2**3\n")
    capsys.readouterr()
    assert main(["run", str(folder / "own.py"), "--out", "out", "--only", "a", "--plan"]) == 0
    assert "code changed: beside_recipe" in capsys.readouterr().out


def test_a_full_disk_is_told_in_one_line_and_registers_nothing(processes, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(AlignError, match=r"^a: the disk of .* is full \(0 MB free\); make room") as caught:
            Run(Recipe("r", {"a": Act(does="fill"), "b": Act()}), disk / "out").execute()
        assert "\n" not in str(caught.value)
        assert Registry().names() == ["r-b"]
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:  # no room for a log or a status, either
            while True:
                ballast.write(bytes(2**10))
        with pytest.raises(AlignError, match=r"^c: the disk of .* is full \(0 MB free\); make room"):
            Run(Recipe("r", {"c": Act(text="c" * 2**16)}), disk / "out").execute()
        recipe = tmp_path / "x.py"
        lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
        recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(), 'b': Act()})"]))
        assert main(["run", str(recipe), "--out", str(disk / "other")]) == 2
        (disk / "ballast").unlink()
        assert main(["run", str(recipe), "--out", str(disk / "other")]) == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_one_stage_stands_in_its_own_folder(processes, capsys):
    folder = run({"a": Act(), "b": Act(text="b")})["a"].path
    assert main(["status", folder]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["a", "done"]]


# -- what lies in the way --------------------------------------------------------------------------------------------------------


def into(folder, **fields):
    """The artifact of a stage that writes into exactly this folder."""
    return Run(Recipe("a", {"a": Act(**fields)}), folder.parent, folder, options=Options(retries=0)).execute()["a"]


def test_what_is_no_stages_is_left_as_it_is(processes):
    Path("file").touch()
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text('{"mine": 1}')
    Path("mine/metrics.jsonl").write_text("old\n")
    before = sorted(Path().rglob("*"))
    with pytest.raises(AlignError, match="file is a file, not a folder"):
        into(Path("file"))
    with pytest.raises(AlignError, match="mine is not empty and no folder of align's; choose another output_dir"):
        into(Path("mine"))
    assert sorted(Path().rglob("*")) == before, "no log, either"
    assert Path("mine/config.yaml").read_text() == '{"mine": 1}'


def test_a_stage_goes_on_in_the_folder_of_one_that_was_killed(processes):
    with pytest.raises(StageFailed, match="SIGKILL"):
        into(Path("out"), does="die")
    assert into(Path("out")).reference == "a@1"
    Path("at_its_first_file").mkdir()
    Path("at_its_first_file/.begun.json.host.1.tmp").touch()
    assert into(Path("at_its_first_file")).reference == "a@2"


# -- stopping ------------------------------------------------------------------------------------------------------------------


SCRIPT = """
import json, sys
from pathlib import Path
from runner_stages import Act
from align.pipeline import Options, Run
from align.recipe import Recipe
recipe = Recipe("r", {"a": Act(does=sys.argv[1], where=sys.argv[2], launch=json.loads(sys.argv[3]))})
Run(recipe, Path("out").resolve(), options=Options(grace=20, backoff=0.0)).execute()
"""


def begin(met, does="hang", launch=None, **how):
    """A runner in a process of its own, whose stage has begun and hangs, or does something else that takes time."""
    met.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, does, str(met), json.dumps(launch)], env=environment, **how)
    pause = threading.Event()
    while not list(met.iterdir()):
        assert process.poll() is None
        pause.wait(0.05)  # looking all the time takes the processor from what is waited for
    (status,) = statuses(Path("out"))
    return process, status


@pytest.fixture
def hanging(processes, tmp_path):
    """`begin`, ended by the test."""
    process, status = begin(tmp_path / "met", stderr=subprocess.PIPE, text=True)
    yield process, status
    process.kill()
    process.wait()
    process.stderr.close()


def until(holds):
    """Wait until `holds`, for 20 seconds at most."""
    pause = threading.Event()
    for _ in range(2000):
        if holds():
            return True
        pause.wait(0.01)
    return False


def interrupted(seconds):
    """As by Ctrl-C. (Its signal reaches nobody who was started in the background.)"""
    raise KeyboardInterrupt


@pytest.mark.parametrize("content", ["[1]", "3", '{"x": 1}', "{", ""])
def test_status_passes_over_what_no_stage_wrote(content, tmp_path, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.json").write_text(content)
    assert main(["status", str(tmp_path)]) == 2
    assert "no stage has begun there" in capsys.readouterr().err


def own_terminal():
    """In a new process, before its program: standard input becomes the terminal that ends it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def begin_in_a_terminal_that_closes(met, hangup):
    """`begin`; a terminal that closes is what `hangup` says, as of `signal.signal`."""
    terminal, ours = pty.openpty()
    before = signal.signal(signal.SIGHUP, hangup)
    try:
        how = {"stdin": ours, "stdout": ours, "stderr": ours, "start_new_session": True, "preexec_fn": own_terminal}
        begun = begin(met, **how)
    finally:
        signal.signal(signal.SIGHUP, before)
    os.close(ours)
    os.close(terminal)
    return begun


def test_a_terminal_that_closes_is_a_request_to_stop(processes, tmp_path):
    process, status = begin_in_a_terminal_that_closes(tmp_path / "met", signal.SIG_DFL)
    process.wait(30)
    assert not Path(f"/proc/{status['pid']}").exists()
    assert states() == {"a": "stopped"}


@pytest.fixture
def nohup(processes, tmp_path):
    """`begin` under nohup, whose terminal is closed; ended by the test."""
    process, status = begin_in_a_terminal_that_closes(tmp_path / "met", signal.SIG_IGN)
    yield process, status
    process.kill()
    process.wait()


def test_a_second_look_at_a_run_under_nohup_and_sigterm(nohup, capsys, monkeypatch):
    """Where a terminal that closes is ignored, the run goes on, until it is told to stop."""
    process, status = nohup
    assert status["state"] == "running"
    assert main(["status", "out"]) == 0
    assert re.match(r"a +running  .* GB  for \d+ s", capsys.readouterr().out)
    assert until(lambda: main(["status", "out"]) == 0 and " 3/10 steps" in capsys.readouterr().out)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("align.commands.status.time", SimpleNamespace(sleep=interrupted))
        assert main(["status", "out", "--watch"]) == 130
    assert capsys.readouterr().err == "", "that is how one stops watching"
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(30)
    assert not Path(f"/proc/{status['pid']}").exists()
    assert states() == {"a": "stopped"}
    assert main(["status", "out"]) == 0
    assert re.fullmatch(r"a  stopped +3/10 steps\n", capsys.readouterr().out), "how far it came"
    assert not list(Path("out").rglob("*.lock"))


def test_what_has_not_begun_is_not_said_to_go_on(processes, capsys, monkeypatch):
    """Ctrl-C while the process that forks is still importing."""
    recipe = Path("one.py")
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act()})"]))
    monkeypatch.setattr(execute.Zygote, "events", lambda self, wait: interrupted(wait))
    assert main(["run", str(recipe), "--out", "out"]) == 130
    assert capsys.readouterr().err == "align: interrupted\n"


def test_what_has_no_checkpoints_is_not_said_to_save():
    stages = {"sft": SFT(model="gpt2", data="x"), "look": Evaluate(models={"m": "gpt2"}, perplexity_data="x"), "b": Act()}
    sft, *others = (SimpleNamespace(name=name, stage=stage) for name, stage in stages.items())
    assert (
        execute.stopping([sft, *others], 60.0) == "stopping: sft may save for up to 60 s (again: at once); look, b will begin anew"
    )
    assert execute.stopping(others, 60.0) == "stopping: look, b will begin anew"
    assert execute.stopping([sft], 60.0) == "stopping: sft may save for up to 60 s (again: at once)"


def test_a_killed_runner_leaves_no_process_behind_and_status_says_interrupted(hanging):
    process, status = hanging
    process.kill()
    process.wait()
    assert until(lambda: states() == {"a": "interrupted"})
    assert until(lambda: not Path(f"/proc/{status['pid']}").exists())
    (folder,) = Path("out").glob("a-*")
    assert Artifact.read(folder) is None


def launched():
    """The processes of a launch below this folder, the launcher among them, and the parent of each."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.fsencode(Path.cwd() / "out" / "logs") in (folder / "cmdline").read_bytes():
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends a process with its parent")
def test_a_launch_ends_with_its_stage_and_with_its_runner(processes, tmp_path):
    """Else its processes would go on in the folder beside those of the next attempt. The same command ends as ever."""
    (met := tmp_path / "met").mkdir()
    process, _ = begin(met, "meet", {"num_processes": 2, "cpu": True})
    first = launched()
    assert len(first) == 3, "a launcher and two processes"
    (stage,) = set(first.values()) - set(first)
    os.kill(stage, signal.SIGKILL)
    assert until(lambda: not set(first) & set(launched()))
    assert until(lambda: len(launched()) == 3), "another attempt"
    process.kill()
    process.wait()
    assert until(lambda: not launched())
    (met / "b").touch()
    assert run({"a": Act(does="meet", where=str(met), launch={"num_processes": 2, "cpu": True})})["a"].version == 1
    assert not launched()


def test_a_process_whose_parent_ended_before_it_could_ask_for_that_ends_too():
    script = "from align.runner.launch import end_with_parent; end_with_parent(); print('lives')"
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = {**os.environ, "ALIGN_PARENT": str(gone.pid), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_launch_of_one_process_saves_before_it_stops(strategy, processes, tmp_path):
    process, _ = begin(tmp_path / "met", "save", {"num_processes": 1, "cpu": True, "strategy": strategy})
    process.terminate()
    process.wait(30)
    assert states() == {"a": "stopped"}
    assert sorted(path.name for path in (tmp_path / "met").iterdir()) == ["begun", "saved"]


def test_a_signal_to_all_processes_lets_the_stage_save(processes, tmp_path):
    """A machine that shuts down, or systemd, tells every process to end, and in what order is chance."""
    process, status = begin(tmp_path / "met", "save")
    zygote = int(Path(f"/proc/{status['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (zygote, status["pid"], process.pid):
        os.kill(pid, signal.SIGTERM)
    process.wait(30)
    assert states() == {"a": "stopped"}
    assert sorted(path.name for path in (tmp_path / "met").iterdir()) == ["begun", "saved"]


# -- two runs on one folder ----------------------------------------------------------------------------------------------------


def test_the_second_run_refuses_or_waits():
    step = Run(Recipe("r", {"a": Act()}), Path("out")).plan()[0]
    with lock(step.folder):
        assert is_locked(step.folder)
        with pytest.raises(AlignError, match=rf"a: process {os.getpid()} on \S+ works in {step.folder}; wait until it is done"):
            run({"a": Act()}, wait=False)
        waiting = threading.Thread(target=run, args=({"a": Act()},))
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive()
        assert not (step.folder / MANIFEST).exists()
    waiting.join(30)
    assert Artifact.read(step.folder).version == 1
    assert not is_locked(step.folder)
    assert not lock_file(step.folder).exists()


def test_who_only_looks_whether_a_folder_is_locked_makes_nobody_refuse(tmp_path):
    folder = tmp_path / "stage"
    with lock_file(folder).open("w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (look, fcntl.LOCK_UN)).start()
        with lock(folder, "a", wait=False):
            assert is_locked(folder)


# -- a second machine -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def second(monkeypatch):
    """Does what machine 1 does, in this process."""

    def start(stages, **options):
        with monkeypatch.context() as patched:
            patched.setenv("ALIGN_MACHINE_RANK", "1")
            return run(stages, **options)

    monkeypatch.setattr("align.runner.worker.PATIENCE", 0.3)
    return start


def test_a_stage_that_failed_on_machine_0_fails_on_the_others(processes, second, monkeypatch):
    with pytest.raises(AlignError, match="a: row 3 is"):
        run({"a": Act(does="mistake")})
    monkeypatch.setenv("ALIGN_IN_PROCESS", "1")
    with pytest.raises(StageFailed, match=r"the stage in \S+/a-\w+ ended on machine 0 without a result"):
        second({"a": Act(does="mistake")})
    monkeypatch.setenv("ALIGN_MACHINE_RANK", "1")
    (step,) = Run(Recipe("r", {"a": Act(does="mistake")}), Path("out")).plan()
    assert step.log.name == f"{step.folder.name}.machine-1.log", "what machine 0 says of the stage stays"


def test_the_other_machines_wait_for_what_machine_0_runs_again(second):
    stages = {"a": Act()}
    old = run(stages)["a"]
    status = Path("out/logs", f"{Path(old.path).name}.json")
    status.parent.mkdir()
    status.write_text('{"state": "running"}')
    found = []
    with lock(Path(old.path)):
        waiting = threading.Thread(target=lambda: found.append(second(stages, force=["a"])["a"]))
        waiting.start()
        waiting.join(1.0)
        assert not found
        new = replace(old, created="later")
        new.write()
        waiting.join(10)
    assert found == [new]
    status.write_text('{"state": "done"}')
    assert second(stages, force=["a"])["a"] == new, "machine 0 was done with it before"


# -- what was cut ---------------------------------------------------------------------------------------------------------------


def test_cut_between_the_manifest_and_the_registry(monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "add", lambda self, artifact: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run({"a": Act()})
    assert Registry().all() == []
    artifact = run({"a": Act()})["a"]
    assert artifact.reference == "r-a@1"
    assert Registry().all() == [artifact] == [Artifact.read(Path(artifact.path))]


@pytest.mark.parametrize("content", ['{"name": "r-a", "sta', "", '{"unknown": 1}'])
def test_a_damaged_manifest_counts_as_unfinished(content, capsys):
    artifact = run({"a": Act()})["a"]
    Path(artifact.path, MANIFEST).write_text(content)
    again = run({"a": Act()})["a"]
    assert "its manifest cannot be read" in capsys.readouterr().err
    assert (again.reference, again.identity) == (artifact.reference, artifact.identity)


def test_a_report_is_written_without_the_stage_whose_manifest_is_damaged(capsys):
    artifacts = run({"a": Act(), "b": Act(text="b")})
    Path(artifacts["a"].path, MANIFEST).write_text('{"name": "r-a", "sta')
    capsys.readouterr()
    assert main(["report", "out"]) == 0
    told = capsys.readouterr().err
    assert f"{Path(artifacts['a'].path).name}: its manifest cannot be read (Unterminated string" in told
    assert json.loads(Path("out/results.json").read_text())["stages"].keys() == {"b"}
    assert main(["sft", "--model", artifacts["a"].path, "--data", "x", "--plan"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{artifacts['a'].path}/artifact.json cannot be read (Unterminated string" in line
    assert "remove it, or restore it" in line


def test_force_runs_a_stage_and_what_follows_again():
    stages = {"a": Act(), "b": Act(model="a"), "c": Act(text="c")}
    first = run(stages)
    recipe = Run(Recipe("r", stages), Path("out"), force=["a"])
    assert [step.reason for step in recipe.plan()] == ["forced", "forced: follows a", "up to date"]
    Path(first["a"].path, "text.txt").write_text("spoiled")
    second = run(stages, force=["a"])
    assert Path(first["a"].path, "text.txt").read_text() == ""
    assert [a.reference for a in Registry().all()] == ["r-a@1", "r-b@1", "r-c@1"], "the same thing again is no new version"
    assert second["c"] == first["c"]
    assert Registry().get("r-a") == second["a"]
    with pytest.raises(AlignError, match=r"has no stage 'd'"):
        run(stages, force=["d"])


def test_what_is_left_over_of_earlier_settings_is_told_apart(processes, capsys):
    stages = {"a": Act(), "b": Act(model="a")}
    run(stages)
    run({"a": Act(text="1"), "c": Act(model="a")})
    with pytest.raises(StageFailed):
        run({"d": Act(does="crash")})
    run(stages)  # nothing is to be done
    capsys.readouterr()
    assert main(["status", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == ["a", "c", "d", "a", "b"]
    assert [line.endswith("  (left over: not of the recipe that ran last)") for line in lines] == [True] * 3 + [False] * 2
    assert main(["report", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["name"] == "r"
    assert {stage: content["reference"] for stage, content in found["stages"].items()} == {"a": "r-a@1", "b": "r-b@1"}
    assert "crash" not in Path("out/report.html").read_text()
    Path("out/recipe.json").write_text("{")  # of a run without one, the newest of each name
    assert main(["report", "out", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["stages"]) == {"a", "b", "c"}


def test_where_the_recipe_cannot_be_noted_a_finished_run_is_up_to_date(capsys):
    """As in a folder that is read-only by now; to root a file in the way is the same."""
    done = run({"a": Act()})
    Path("out/recipe.json").unlink()
    Path("out/recipe.json").mkdir()
    capsys.readouterr()
    assert run({"a": Act()}) == done
    assert "a: up to date" in capsys.readouterr().err
    assert not list(Path("out").glob(".*"))


def test_force_goes_on_after_an_interruption_with_what_follows():
    stages = {"a": Act(), "b": Act(model="a")}
    done = run(stages)["a"]
    done.begin()
    Path(done.path, MANIFEST).unlink()  # as a stage does when it runs again
    forced = Run(Recipe("r", stages), Path("out"), force=["a"])
    assert [step.reason for step in forced.plan()] == ["forced; interrupted, starts again", "forced: follows a"]


def test_the_plan_says_how_the_last_attempt_ended(processes):
    with pytest.raises(StageFailed):
        run({"a": Act(does="crash")})
    (step,) = Run(Recipe("r", {"a": Act(does="crash")}), Path("out")).plan()
    assert step.reason == "failed, starts again"
    with lock(step.folder):
        (step,) = Run(Recipe("r", {"a": Act(does="crash")}), Path("out")).plan()
        assert step.reason == "begun by another run"


def test_force_beside_only_runs_that_stage_again_or_is_refused(capsys):
    stages = {"a": Act(), "b": Act(model="a"), "c": Act(model="b"), "d": Act(text="d")}
    first = run(stages)
    capsys.readouterr()
    run(stages, only="c", force=["a"])
    assert re.findall(r"^(\w): forced", capsys.readouterr().err, re.MULTILINE) == ["c"]
    with pytest.raises(AlignError, match=r"^--force b has nothing to do: --only runs 'd', which does not follow from it"):
        run(stages, only="d", force=["d", "b"])
    with pytest.raises(AlignError, match="nothing to do"):
        show_plan(Run(Recipe("r", stages), Path("out"), force=["c"]), "a", as_json=False)
    assert Artifact.read(Path(first["b"].path)) == first["b"]


def test_the_plan_as_json_says_what_it_took(capsys, tmp_path):
    recipe = tmp_path / "two.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe(text: str = '1'):"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(text=text)})"]))
    assert main(["run", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["run", str(recipe), "--set", "text=two", "--plan", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["runs"], row["reason"]) == (True, 'changed: text "1" -> "two"')
    assert row["seconds_last_time"] >= 0


def test_the_plan_and_the_result_of_one_stage_are_of_that_alone(processes, capsys, tmp_path):
    recipe = tmp_path / "two.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(), 'b': Act(model='a')})"]))
    assert main(["run", str(recipe), "--only", "a", "--plan"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["run", "a"]]
    assert main(["run", str(recipe), "--only", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "x-a"


def test_how_the_stages_of_a_moved_run_stand(processes, capsys):
    done = run({"a": Act()})["a"]
    Path("out").rename("there")
    folder = Path("there", Path(done.path).name)
    assert main(["status", str(folder), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert status["folder"] == str(folder.resolve())
    log = Path("there", "logs", f"{folder.name}.json")
    log.write_text(json.dumps(status | {"state": "running", "folder": done.path}))  # of a copy that was made while it ran
    with lock(Path(done.path)):
        assert [status["state"] for status in statuses(Path("there"))] == ["interrupted"]


def test_a_run_that_was_moved_is_told_of_from_where_it_is(tmp_path, capsys):
    recipe = tmp_path / "two.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(), 'b': Act(model='a')})"]))
    assert main(["run", str(recipe), "--out", "here"]) == 0
    Path("here").rename("there")
    for command in (["run", str(recipe), "--out", "there"], ["report", "there"]):
        assert main(command) == 0
        stages = json.loads(Path("there/results.json").read_text())["stages"]
        assert [Path(stage["path"]).parent for stage in stages.values()] == [Path("there").resolve()] * 2
    assert len(Registry().all()) == 2
