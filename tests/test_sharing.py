"""The registry under several writers, what may be deleted, folders to share by, sweeps, notifications and scripts for clusters."""

import errno
import http.server
import json
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi
from runner_stages import Act

from align.artifact import MANIFEST, Artifact
from align.cli import main
from align.data import write_rows
from align.errors import AlignError
from align.pipeline import Run
from align.recipe import Recipe, load_recipe
from align.registry import ALIASES, Registry, home
from align.report.seeds import settings
from align.runner.checkpoints import seal
from align.runner.code import _module, _parsed, code_of
from align.runner.devices import refuse_crowd, take
from align.runner.launch import command, slurm_script
from align.runner.locks import lock
from align.runner.notify import notify
from align.runner.share import delete, pull, push, unreferenced
from align.runner.sweep import expand
from align.stages import PPO, SFT, Evaluate, Preference, RewardModel, stages
from align.stages.fields import Launch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(stages, out="out"):
    return Run(Recipe("r", stages), Path(out)).execute()


# -- the registry --------------------------------------------------------------------------------------------------------------

ADD = """
import sys
from align.artifact import Artifact
from align.registry import Registry
for i in range(20):
    Registry().add(Artifact("shared", "act", f"{sys.argv[1]}-{i}", f"/nowhere/{sys.argv[1]}-{i}", {}))
    assert Registry().get("shared").version >= i + 1
"""


def test_versions_never_collide():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", ADD, str(i)], env=environment) for i in range(4)]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    versions = Registry().versions("shared")
    assert [artifact.version for artifact in versions] == list(range(1, 81))
    assert len({artifact.identity for artifact in versions}) == 80
    assert not [path for path in Registry().root.rglob("*") if path.suffix in (".tmp", ".lock")]


ALIAS = """
import sys
from align.registry import Registry
for i in range(40):
    Registry().add_alias(f"{sys.argv[1]}-{i}", "owner/name")
"""


def test_aliases_of_several_processes_are_all_kept():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    writers = [subprocess.Popen([sys.executable, "-c", ALIAS, f"w{i}"], env=environment) for i in range(4)]
    assert [writer.wait(120) for writer in writers] == [0] * 4
    assert Registry().aliases().keys() == ALIASES.keys() | {f"w{writer}-{i}" for writer in range(4) for i in range(40)}
    assert [path.name for path in Registry().root.iterdir()] == ["aliases.json"]


def test_what_others_descend_from_is_not_deleted(capsys):
    artifacts = run({"a": Act(), "b": Act(model="a"), "c": Act(model="a", text="c")})
    with pytest.raises(AlignError, match="r-a@1 is what r-b@1, r-c@1 descend from; delete those first"):
        delete(Registry(), "r-a@1")
    delete(Registry(), "r-c@1")
    with pytest.raises(AlignError, match="r-a@1 is what r-b@1 descends from; delete that first"):
        delete(Registry(), "r-a@1")
    with pytest.raises(AlignError, match="say which version: r-b@1"):
        delete(Registry(), "r-b")
    Registry().add_alias("mine", "r-b")
    with pytest.raises(AlignError, match="the alias 'mine' stands for r-b@1"):
        delete(Registry(), "r-b@1")
    Registry().add_alias("mine", "owner/other")
    assert main(["models", "delete", "r-b@1"]) == 0
    assert not Path(artifacts["b"].path).exists()
    assert Registry().names() == ["r-a"]
    assert run({"a": Act(), "b": Act(model="a")})["b"].version == 2, "a number is given once"
    delete(Registry(), "r-b@2")
    delete(Registry(), "r-a@1")
    assert Registry().all() == []


def test_what_a_running_stage_works_with_is_not_deleted():
    parent = run({"a": Act()})["a"]
    child = Path(parent.path).with_name("b-12345678")
    child.mkdir()
    Artifact("r-b", "act", "1" * 64, str(child), {}, parents={"a": parent.reference}).begin()
    with lock(child), pytest.raises(AlignError, match=rf"r-a@1 is what the run in {child} works with; wait until it is done"):
        delete(Registry(), "r-a@1")
    assert Path(parent.path).exists()
    delete(Registry(), "r-a@1")  # one that was cut looks for its parent when it goes on


@pytest.mark.parametrize(("field", "value"), [("parents", ["a"]), ("config", None), ("version", "1"), ("path", 3)])
def test_an_entry_of_the_registry_with_values_of_another_type_is_named(field, value, capsys):
    run({"a": Act()})
    run({"b": Act(text="b")})
    (damaged,) = Registry().root.glob("r-b/*.json")
    damaged.write_text(json.dumps({**json.loads(damaged.read_text()), field: value}))
    assert main(["models", "delete", "r-a@1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith(f"align: error: {damaged} cannot be read (its {field!r} is no ")


@pytest.mark.parametrize("removed", [False, True])
def test_a_deletion_that_was_cut_leaves_nothing_that_looks_finished(removed, monkeypatch):
    """Killed as it tells the registry, or right after."""
    remove = Registry.remove

    def cut(registry, artifact):
        if removed:
            remove(registry, artifact)
        raise KeyboardInterrupt

    run({"a": Act()})
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "remove", cut)
        with pytest.raises(KeyboardInterrupt):
            delete(Registry(), "r-a@1")
    again = run({"a": Act()})["a"]
    assert Registry().get(again.reference) == again


def test_a_run_that_was_moved_is_found_where_it_is_from_its_next_run_on(capsys):
    run({"a": Act(), "b": Act(model="a")})
    Path("out").rename("moved")
    capsys.readouterr()
    assert main(["models", "list"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["(gone)"] * 2
    found = run({"a": Act(), "b": Act(model="a")}, "moved")
    assert {name: artifact.version for name, artifact in found.items()} == {"a": 1, "b": 1}
    for name, artifact in found.items():
        assert Registry().resolve(f"r-{name}").path == artifact.path == str(next(Path("moved").resolve().glob(f"{name}-*")))
    shutil.copytree("moved", "copied")
    run({"a": Act(), "b": Act(model="a")}, "copied")
    assert Registry().get("r-a") == found["a"], "a copy changes nothing"


def test_a_damaged_entry_hides_no_other(capsys):
    run({"a": Act()})
    last = run({"a": Act(text="1")})["a"]
    damaged = Registry().root / "r-a" / "1.json"
    damaged.write_text("")
    capsys.readouterr()
    assert main(["models", "list"]) == 0
    told = capsys.readouterr()
    assert [line.split()[0] for line in told.out.splitlines()] == ["r-a@2"]
    assert f"{damaged} cannot be read (Expecting value: line 1 column 1 (char 0)); remove it, or restore it" in told.err
    assert Registry().get("r-a") == Registry().get("r-a@2") == last
    assert run({"a": Act(text="2")})["a"].version == 3, "what was trained is registered"
    assert main(["models", "show", "r-a@1"]) == 2
    assert f"align: error: {damaged} cannot be read" in capsys.readouterr().err


def test_gc_lists_and_then_removes_what_nothing_refers_to(capsys):
    done = Path(run({"a": Act()})["a"].path) / "checkpoints" / "checkpoint-3"
    unfinished = Path("out/b-12345678/checkpoints")
    for folder in (done, unfinished / "checkpoint-5", unfinished / "corrupt-7"):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(1000))
    capsys.readouterr()
    assert main(["models", "gc", "out", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(Path(row["path"]).name, row["bytes"], row["removed"]) for row in rows] == [
        ("checkpoints", 1000, False),
        ("corrupt-7", 1000, False),
    ]
    assert done.exists()
    assert main(["models", "gc", "out", "--yes"]) == 0
    assert not done.parent.exists()
    assert [path.name for path in unfinished.iterdir()] == ["checkpoint-5"]


def test_gc_lists_checkpoints_of_settings_that_the_recipe_has_left(capsys):
    """Where the stage was cut. Those of the recipe's own stage are where it goes on."""
    now = Path(run({"a": Act()})["a"].path)
    (now / MANIFEST).unlink()
    left = now.with_name("a-12345678")
    for folder in (now, left):
        (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
        Artifact("r-a", "act", "1" * 64, str(folder), {}).begin()
    capsys.readouterr()
    assert main(["models", "gc", "out", "--yes", "--json"]) == 0
    assert [row["path"] for row in json.loads(capsys.readouterr().out)] == [str(Path("out", left.name, "checkpoints"))]
    assert [(folder / "checkpoints").exists() for folder in (now, left)] == [True, False]


def test_gc_spares_what_a_run_has_begun_to_use_since_it_was_listed(capsys, monkeypatch):
    busy, again, free = (Path(run({"a": Act(text=text)})["a"].path) for text in "123")
    for folder in (busy, again, free):
        (folder / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    capsys.readouterr()
    with ExitStack() as held:

        def listed(root):
            found = unreferenced(root)
            held.enter_context(lock(busy))  # a run works there
            (again / MANIFEST).unlink()  # one had begun again, and was cut
            return found

        monkeypatch.setattr("align.commands.models.unreferenced", listed)
        assert main(["models", "gc", "out", "--yes", "--json"]) == 0
        assert [row["path"] for row in json.loads(capsys.readouterr().out)] == [str(Path("out", free.name, "checkpoints"))]
        assert [(folder / "checkpoints").exists() for folder in (busy, again, free)] == [True, True, False]
    assert not list(Path("out").glob(".*.lock"))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "a\n", "a\nb", "x" * 300, "", ".hidden", "-x", "a b", "é"])
def test_names_that_are_no_names(name, tmp_path):
    with pytest.raises(AlignError, match=r"must be letters \(A-Z, a-z\), digits"):
        Recipe("r", {name: Act()})
    with pytest.raises(AlignError, match=r"must be letters \(A-Z, a-z\), digits"):
        Recipe(name, {"a": Act()})
    with pytest.raises(AlignError):
        Registry().add(Artifact(name, "act", "1", str(tmp_path), {}))
    with pytest.raises(AlignError):
        pull(Registry(), str(tmp_path), name, tmp_path)
    with pytest.raises(AlignError):
        delete(Registry(), f"{name}@1")
    assert main(["sft", "--name", name or "..", "--model", "x/y", "--data", "z", "--plan"]) == 2


def test_a_yaml_recipe_runs_no_code(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("name: x\nstages:\n  a: {stage: act, text: !!python/object/apply:os.system ['touch harmed']}\n")
    with pytest.raises(AlignError, match="is not YAML: could not determine a constructor"):
        load_recipe(str(path))
    assert not Path("harmed").exists()


# -- to a folder and back ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_pushed(tmp_path, capsys):
    artifact = run({"a": Act(text="precious")})["a"]
    (tmp_path / "file").write_text("")
    for target, reason in ((tmp_path / "file", "is a file, not a folder"), ("/proc/shelf", "nothing can be written into /proc")):
        assert main(["models", "push", "r-a", str(target)]) == 2
        assert reason in capsys.readouterr().err
    Path(artifact.path).rename(tmp_path / "moved")
    assert main(["models", "push", "r-a", str(tmp_path / "shelf")]) == 2
    assert "that folder is gone" in capsys.readouterr().err
    assert not (tmp_path / "shelf").exists()
    assert main(["models", "show", "r-a", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["path"] == artifact.path
    assert f"r-a@1 was at {artifact.path}, and that folder is gone" in shown.err
    assert main(["models", "push", "r-a", ""]) == 2
    assert "needs a FOLDER" in capsys.readouterr().err


def test_what_was_pulled_survives_a_power_cut(tmp_path, monkeypatch):
    """Its files are on the disk before the manifest that says that they are whole."""
    run({"a": Act(text="precious")})
    push(Registry(), "r-a", str(tmp_path / "shelf"))
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    flushed, fsync = [], os.fsync

    def noted(descriptor):
        flushed.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    pull(Registry(), str(tmp_path / "shelf"), "r-a", home())
    (manifest,) = [name for name in flushed if name.startswith(f".{MANIFEST}")]
    assert flushed.index("text.txt") < flushed.index(manifest)


def test_pushed_and_pulled_by_another_registry(tmp_path, monkeypatch):
    artifact = run({"a": Act(text="precious")})["a"]
    for name in ("checkpoints", "tracking"):
        (Path(artifact.path) / name).mkdir()
    shelf = tmp_path / "shelf"
    assert main(["models", "push", "r-a", str(shelf)]) == 0
    assert push(Registry(), "r-a@1", str(shelf)) == str(shelf / "r-a" / "1"), "once more changes nothing"
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    assert main(["models", "pull", "r-a", str(shelf)]) == 0
    pulled = Registry().get("r-a@1")
    assert (pulled.identity, pulled.config) == (artifact.identity, artifact.config)
    assert Path(pulled.path).is_relative_to(tmp_path / "other")
    assert {path.name for path in Path(pulled.path).iterdir()} == {"artifact.json", "config.yaml", "metrics.jsonl", "text.txt"}
    assert Artifact.read(Path(pulled.path)) == pulled
    with pytest.raises(AlignError, match=r"has no 'r-a@7'; it has the versions: 1"):
        pull(Registry(), str(shelf), "r-a@7", home())
    with pytest.raises(AlignError, match=r"shelf has no 'r-aa' \(did you mean 'r-a'\?\); it has: r-a$"):
        pull(Registry(), str(shelf), "r-aa@7", home())
    with pytest.raises(AlignError, match="nowhere has no 'r-a'; nothing was pushed there"):
        pull(Registry(), str(tmp_path / "nowhere"), "r-a", home())


def test_two_push_at_once(tmp_path, monkeypatch):
    """The second finds the place free, waits for the first, and finds that it is done."""
    run({"a": Act(text="precious")})
    shelf = str(tmp_path / "shelf")

    @contextmanager
    def late(folder):
        with monkeypatch.context() as patch:
            patch.setattr("align.runner.share.lock", lock)
            push(Registry(), "r-a", shelf)
        with lock(folder):
            yield

    monkeypatch.setattr("align.runner.share.lock", late)
    assert push(Registry(), "r-a", shelf) == str(tmp_path / "shelf" / "r-a" / "1")
    assert [path.name for path in (tmp_path / "shelf" / "r-a").iterdir()] == ["1"]


def test_what_is_cut_leaves_no_half(tmp_path, monkeypatch):
    run({"a": Act(text="precious")})
    shelf, copytree = tmp_path / "shelf", shutil.copytree

    def cut(*arguments, **others):
        copytree(*arguments, **others)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)
        assert main(["models", "push", "r-a", str(shelf)]) == 130
    assert not list(shelf.rglob("*.*"))
    push(Registry(), "r-a", str(shelf))
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", cut)
        assert main(["models", "pull", "r-a", str(shelf)]) == 130
    assert not list(home().rglob("*.*"))
    assert pull(Registry(), str(shelf), "r-a", home()).version == 1


def test_a_push_to_a_full_disk_names_it_and_leaves_no_half(tmp_path, capsys):
    run({"a": Act(text="precious" * 9999)})
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        capsys.readouterr()
        assert main(["models", "push", "r-a", str(disk)]) == 2
        assert not list(disk.rglob("*.*"))
        with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as ballast:  # no room for a line in a lock, either
            while ballast.write(bytes(1024)):
                pass
        with pytest.raises(AlignError, match=r"the disk of .* is full"), lock(disk / "r-a"):
            pass
        assert not list(disk.glob(".*"))
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(rf"align: error: the disk of {disk}/\S+ is full \(0 MB free\); make room", line)


def link_out(place):
    (place / "text.txt").unlink()
    (place / "text.txt").symlink_to("/etc/hostname")


def huge_header(place):
    (place / "model.safetensors").write_bytes(struct.pack("<Q", 2**40))
    seal(place)


def other_name(place):
    content = json.loads((place / MANIFEST).read_text())
    (place / MANIFEST).write_text(json.dumps({**content, "name": "../../x"}))
    seal(place)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (link_out, "it contains a symbolic link"),
        (huge_header, "its header claims 1,099,511,627,776 bytes of a file of 8"),
        (lambda place: (place / "text.txt").write_text("changed"), "text.txt does not match its checksum"),
        (other_name, "holds no artifact called 'r-a'"),
    ],
)
def test_a_folder_that_means_harm_is_not_pulled(harm, reason, tmp_path, monkeypatch, capsys):
    run({"a": Act(text="1")})
    harm(Path(push(Registry(), "r-a", str(tmp_path / "shelf"))))
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    capsys.readouterr()
    assert main(["models", "pull", "r-a", str(tmp_path / "shelf")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "other").exists()


class Hub:
    """What of `huggingface_hub.HfApi` is used, on a disk: every commit of a repository is a folder, and tags name them."""

    def __init__(self, root):
        self.root = root

    def _commit(self, repository, revision):
        folder = self.root / repository
        name = (folder / "tags" / revision).read_text() if revision else max((p.name for p in folder.glob("[0-9]*")), default="")
        return folder / name

    def create_repo(self, repository, *, private, exist_ok):
        assert private
        (self.root / repository / "tags").mkdir(parents=True, exist_ok=exist_ok)
        return f"https://hub.test/{repository}"

    def repo_info(self, repository):
        return SimpleNamespace(private=not (self.root / repository / "public").exists())

    def revision_exists(self, repository, revision):
        return (self.root / repository / "tags" / revision).exists()

    def hf_hub_download(self, repository, name, *, revision):
        return str(self._commit(repository, revision) / name)

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns, allow_patterns):
        number = str(len(list((self.root / repo_id).glob("[0-9]*"))))
        shutil.copytree(folder_path, self.root / repo_id / number)
        return SimpleNamespace(oid=number)

    def create_tag(self, repository, *, tag, revision):
        (self.root / repository / "tags" / tag).write_text(revision)

    def snapshot_download(self, repository, *, revision, local_dir, allow_patterns):
        if not (self.root / repository).is_dir():
            raise OSError(f"404: no {repository}\nRequest ID: 1")
        for file in self._commit(repository, revision).rglob("*"):
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                local_dir.mkdir(exist_ok=True)
                shutil.copy(file, local_dir)
        (local_dir / ".cache").mkdir()
        (local_dir / ".cache" / "lock").touch()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(tmp_path / "hub"))
    return tmp_path / "hub" / "me" / "mine"


def test_pushed_to_the_hub_and_pulled_by_another_registry(hub, tmp_path, monkeypatch, capsys):
    first = run({"a": Act(text="one")})["a"]
    second = run({"a": Act(text="two")})["a"]
    for reference in ("r-a@1", "r-a@2", "r-a@2"):
        assert main(["models", "push", reference, "hub:me/mine"]) == 0
    assert len(list(hub.glob("[0-9]*"))) == 2, "once more changes nothing"
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    for reference, artifact, text in (("r-a", second, "two"), ("r-a@1", first, "one")):
        assert main(["models", "pull", reference, "hub:me/mine"]) == 0
        pulled = Registry().get("r-a")
        assert pulled.identity == artifact.identity
        assert {path.name for path in Path(pulled.path).iterdir()} == {"artifact.json", "config.yaml", "metrics.jsonl", "text.txt"}
        assert (Path(pulled.path) / "text.txt").read_text() == text
    other = run({"a": Act(text="three")}, "elsewhere")["a"]
    assert other.version == 3
    (hub / "tags" / "v3").write_text("0")
    capsys.readouterr()
    assert main(["models", "push", "r-a@3", "hub:me/mine"]) == 2
    assert "hub:me/mine has another v3" in capsys.readouterr().err


def test_a_public_repository_of_the_hub_must_be_asked_for(hub, capsys):
    run({"a": Act(text="one")})
    hub.mkdir(parents=True)
    (hub / "public").touch()
    (hub / "tags").mkdir()
    assert main(["models", "push", "r-a", "hub:me/mine"]) == 2
    assert "hub:me/mine is public, and everybody could read r-a@1" in capsys.readouterr().err
    assert not list(hub.glob("[0-9]*")), "nothing was sent"
    assert main(["models", "push", "r-a", "hub:me/mine", "--public"]) == 0
    assert list(hub.glob("[0-9]*"))


@pytest.mark.parametrize(
    ("change", "reference", "source", "reason"),
    [
        (lambda commit: (commit / "text.txt").write_text("changed"), "r-a", "hub:me/mine", "text.txt does not match its checksum"),
        (lambda commit: (commit / "checksums.json").unlink(), "r-a", "hub:me/mine", "has no checksums.json: it was not pushed"),
        (other_name, "r-a", "hub:me/mine", "holds no artifact called 'r-a'"),
        (lambda commit: None, "r-a", "hub:me/none", "hub:me/none: 404: no me/none; `hf auth login` logs in"),
        (lambda commit: None, "r-a@../x", "hub:me/mine", "a version is a number"),
        (lambda commit: None, "r-a", "hub:mine", "'hub:mine' should read hub:OWNER/NAME"),
        (lambda commit: None, "r-a", "hub:../mine", "the name '..' must be letters"),
    ],
)  # fmt: skip
def test_what_is_not_pulled_from_the_hub(change, reference, source, reason, hub, tmp_path, monkeypatch, capsys):
    run({"a": Act(text="1")})
    push(Registry(), "r-a", "hub:me/mine")
    change(hub / "0")
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "other"))
    capsys.readouterr()
    assert main(["models", "pull", reference, source]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "other").exists()


def test_without_a_network_a_push_ends_in_one_line(tmp_path, monkeypatch, capsys):
    """By the hub's own client, at a port where nobody listens. A full disk is not taken for a matter of the network."""
    run({"a": Act()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    nobody = HfApi("http://127.0.0.1:9", token="hf_test")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: nobody)
    capsys.readouterr()
    assert main(["models", "push", "r-a", "hub:me/mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"align: error: hub:me/mine: .*refused; `hf auth login` logs in", line)

    def full(*arguments, **others):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(nobody, "create_repo", full)
    assert main(["models", "push", "r-a", "hub:me/mine"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("align: error: the disk is full")


def test_pickles_stay_off_the_hub(hub, capsys):
    (Path(run({"a": Act()})["a"].path) / "optimizer.pt").write_bytes(b"x")
    assert main(["models", "push", "r-a", "hub:me/mine"]) == 2
    assert "r-a@1 holds optimizer.pt; only safetensors and text are pushed to the hub" in capsys.readouterr().err
    assert not hub.exists()


# -- identity ------------------------------------------------------------------------------------------------------------------


def identity(stage):
    (step,) = Run(Recipe("r", {"a": stage}), Path("out")).plan()
    return step.identity


def test_how_work_is_done_and_kept_is_no_part_of_what_it_is(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")

    def sft(**fields):
        return identity(SFT(model="owner/name", data="rows.jsonl", **fields))

    same = sft()
    for fields in (
        {"save_steps": 5}, {"save_minutes": 1.0}, {"save_total_limit": 9}, {"report_to": ["tensorboard"]},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4, "launch": {"num_processes": 2, "strategy": "fsdp2"}},
    ):  # fmt: skip
        assert sft(**fields) == same, fields
    for fields in (
        {"learning_rate": 1e-4}, {"per_device_train_batch_size": 4}, {"seed": 1}, {"launch": {"mixed_precision": "bf16"}},
        {"engine": "trl", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    ):  # fmt: skip
        assert sft(**fields) != same, fields


def test_the_code_version_is_that_of_what_a_stage_can_reach():
    sft, ppo = code_of(SFT), code_of(stages["ppo"])
    assert sft.keys() >= {"align.stages.sft", "align.stages.training", "align.trainers.forest", "align.forest", "align.attention"}
    assert "align.trainers.ppo.trainer" in ppo
    assert not {"align.trainers.ppo.trainer", "align.stages.ppo", "align.progress", "align.registry", "align.report"} & sft.keys()
    assert "align/templates/chat/plain.jinja" in sft


def test_a_module_is_parsed_once_for_its_content(monkeypatch):
    """What was found of it is kept on disk: a later process parses nothing, and finds the same."""
    first = code_of(SFT)
    _module.cache_clear()
    again = code_of(SFT)  # from nothing, into this test's home
    _module.cache_clear()
    _parsed.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr("align.runner.code.ast.parse", lambda *_: pytest.fail("parsed again"))
        assert code_of(SFT) == again == first
    kept = home() / "cache" / "code"
    assert len(list(kept.iterdir())) > 40
    for file in kept.iterdir():
        file.write_text("")  # as a disk that was full may leave it
    _module.cache_clear()
    assert code_of(SFT) == first


OWN = '''
"""A recipe."""
from align.recipe import Recipe
from align.stages.base import Stage, stage

FACTOR = 2

def helper(x):
    """Doubles."""
    return FACTOR * x

def unused():
    return 1

@stage("own_code")
class Own(Stage):
    """Mine."""

    x: int = 1
    """A number."""

    def run(self, context):
        return {"x": helper(self.x)}  # counted

def recipe():
    return Recipe("own", {"a": Own()})
'''


def test_comments_and_docstrings_do_not_count_and_code_does(tmp_path):
    def version(*changes):
        source = OWN
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        path = tmp_path / "own.py"
        path.write_text(source)
        (stage,) = load_recipe(str(path)).stages.values()
        return code_of(type(stage))["Own"]

    same = version()
    unimportant = [("# counted", ""), ('"""Doubles."""', '"""Twice."""'), ('"""A number."""', ""), ("return 1", "return 2")]
    assert version(*unimportant) == same
    assert version(("FACTOR = 2", "FACTOR = 3")) != same
    assert version(("helper(self.x)", "helper(self.x + 1)")) != same


def test_the_plan_names_the_module_that_changed(monkeypatch):
    run({"a": Act()})
    changed = {**code_of(Act), "align.forest": "0" * 12}
    monkeypatch.setattr("align.runner.plan.code_of", lambda cls: changed)
    assert [step.reason for step in Run(Recipe("r", {"a": Act()}), Path("out")).plan()] == ["code changed: align.forest"]


# -- sweeps --------------------------------------------------------------------------------------------------------------------


def tune():
    return Recipe(
        "tune",
        {
            "sft": SFT(model="owner/name", data="rows.jsonl"),
            "dpo": Preference(model="sft", data="pairs.jsonl", loss="dpo", beta=0.1, seed=7),
            "after": SFT(model="dpo", data="rows.jsonl"),
            "evaluate": Evaluate(models={"sft": "sft", "dpo": "dpo", "after": "after"}, reference="sft", data="rows.jsonl"),
        },
    )


def test_a_sweep_shares_all_that_does_not_depend_on_it():
    recipe = expand(tune(), {"dpo.beta": ["0.05", "1e-1"]}, seeds=2)
    branches = [f"-beta-{beta}-seed-{seed}" for beta in ("0.05", "1e_1") for seed in (7, 8)]
    assert list(recipe.stages) == ["sft", *(f"dpo{b}" for b in branches), *(f"after{b}" for b in branches), "evaluate"]
    last = recipe.stages["dpo-beta-1e_1-seed-8"]
    assert (last.beta, last.seed, last.model) == (0.1, 8, "sft")
    assert recipe.stages["after-beta-0.05-seed-7"].model == "dpo-beta-0.05-seed-7"
    evaluate = recipe.stages["evaluate"]
    assert evaluate.reference == "sft"
    assert evaluate.models == {name: name for name in recipe.stages if name != "evaluate"}
    alike = [f"{stage}-beta-{beta}" for stage in ("dpo", "after") for beta in ("0.05", "1e_1")]
    assert list(settings({name: {} for name in evaluate.models})) == alike, "the report knows the seeds of a setting by these names"


def test_sweeps_of_two_stages_do_not_multiply():
    recipe = Recipe("r", {"a": Act(), "b": Act(text="b"), "c": Act(models={"a": "a", "b": "b"})})
    recipe = expand(recipe, {"a.seed": ["0", "1"], "b.seed": ["2", "3"]})
    assert list(recipe.stages) == ["a-seed-0", "a-seed-1", "b-seed-2", "b-seed-3", "c"]


def test_a_sweep_over_what_a_stage_refers_to():
    two = Recipe("two", {name: tune().stages[name] for name in ("sft", "dpo")})
    recipe = expand(two, {"sft.model": ["gpt2", "owner/name"], "dpo.data": ["pairs.jsonl", "more.jsonl"]})
    assert [recipe.stages[f"sft-model-{name}"].model for name in ("gpt2", "owner_name")] == ["gpt2", "owner/name"]
    others = {"sft.model_name_or_path": ["gpt2", "owner/name"], "dpo.dataset_name": ["pairs.jsonl", "more.jsonl"]}
    assert expand(two, others) == recipe, "by other names of the fields"
    dpo = recipe.stages["dpo-data-more.jsonl-model-gpt2"]
    assert (dpo.model, dpo.data) == ("sft-model-gpt2", ["more.jsonl"])
    ppo = {"ppo": PPO(model="gpt2", data="prompts.jsonl", reward_funcs="length")}
    recipe = expand(Recipe("r", ppo), {"ppo.reward_funcs": ["repetition", "json_valid"]})
    assert [stage.reward_funcs for stage in recipe.stages.values()] == [["repetition"], ["json_valid"]]


def test_a_sweep_over_the_stage_that_another_follows():
    """`b` comes before `c` in the recipe and after it in one of its branches, which alone is one for each seed of `c`."""
    recipe = Recipe("r", {"a": Act(), "b": Act(model="a"), "c": Act(text="c"), "d": Act(model="b")})
    recipe = expand(recipe, {"b.model": ["a", "c"], "c.seed": ["0", "1"]})
    follows = {name: stage.model for name, stage in recipe.stages.items() if stage.model}
    branches = {"-model-a": "a", "-model-c-seed-0": "c-seed-0", "-model-c-seed-1": "c-seed-1"}
    assert follows == {f"b{b}": model for b, model in branches.items()} | {f"d{b}": f"b{b}" for b in branches}


def test_a_sweep_over_the_stage_that_all_are_compared_with():
    """Each reward model's branch of `evaluate` has one `sft`, and measures from that."""
    stages = {name: tune().stages[name] for name in ("sft", "dpo")}
    models = {"base": "owner/name", "sft": "sft", "dpo": "dpo"}
    judged = {"models": models, "reward_model": "reward", "data": "rows.jsonl"}
    stages["reward"] = RewardModel(model="sft", data="pairs.jsonl")
    stages["evaluate"] = Evaluate(reference="sft", baseline="references", **judged)
    stages["others"] = Evaluate(reference="base", baseline="sft", **judged)
    branches = expand(Recipe("tune", stages), {"sft.seed": ["0", "1"]}).stages
    first, second, third = (branches[name] for name in ("evaluate-seed-0", "evaluate-seed-1", "others-seed-1"))
    assert (first.reference, first.baseline, first.models["dpo-seed-0"]) == ("sft-seed-0", "references", "dpo-seed-0")
    assert (second.reference, third.reference, third.baseline) == ("sft-seed-1", "base", "sft-seed-1")


def test_values_that_differ_in_a_sign_are_two_branches():
    recipe = expand(Recipe("r", {"sft": SFT(model="gpt2", data="x")}), {"sft.learning_rate": ["1.0e-5", "1.0e+5"]})
    assert {name: stage.learning_rate for name, stage in recipe.stages.items()} == {
        "sft-learning_rate-1.0e_5": 1e-5,
        "sft-learning_rate-1.0e5": 1e5,
    }


@pytest.mark.parametrize(
    ("sweeps", "seeds", "message"),
    [
        ({"sft.model": ["a/b", "a_b"]}, 1, "two branches would be called 'sft-model-a_b'"),
        ({"dpo.beta": ["0.1", "0.10"]}, 1, "--sweep: 'dpo-beta-0.1' and 'dpo-beta-0.10' have the same values; leave one out"),
        ({"sft.model": ["gpt2", "after"]}, 1, r"these stages need each other in a circle: sft, dpo, after$"),
        ({"sft.model": ["gpt2", "sft"]}, 1, "stage 'sft' needs its own output"),
        ({}, 3, "--seeds needs to know of what"),
        ({"dop.beta": ["1"]}, 1, r"has no stage 'dop' \(did you mean 'dpo'\?\)"),
        ({"dpo.bta": ["1"]}, 1, r"stage 'dpo' has no field 'bta' \(did you mean 'beta'\?\)"),
        ({"sft.model": ["gpt2"], "sft.model_name_or_path": ["x"]}, 1, "'model' and 'model_name_or_path' are two names of one"),
        ({"dpo.beta": ["x"]}, 1, "'beta' is 'x': input should be a valid number"),
        ({"sft.seed": ["0", "1"]}, 1, r"reference of stage 'evaluate' is 'sft', of which there would be 2: name .*reference=null"),
        ({"rate": ["1", "2"]}, 1, "--sweep rate: what is swept is a field of a stage: write STAGE.FIELD=A,B"),
    ],
)
def test_what_cannot_be_swept(sweeps, seeds, message):
    with pytest.raises(AlignError, match=message):
        expand(tune(), sweeps, seeds)


def test_a_sweep_from_the_command_line(tmp_path, capsys):
    recipe = tmp_path / "two.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(), 'b': Act(model='a')})"]))
    assert main(["run", str(recipe), "--sweep", "b.text=one,two", "--plan"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["a", "b-text-one", "b-text-two"]
    swept = 'b.models={"x": a},{"x": a, "y": a},{}'
    assert main(["run", str(recipe), "--sweep", swept, "--plan"]) == 0
    branches = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert branches == ["a", "b-models-_x_a_", "b-models-_x_a_y_a_", "b-models-_"], "a comma within brackets parts no values"
    assert main(["run", str(recipe), "--sweep", "b.text=one", "--sweep", "b.text=two", "--plan"]) == 2
    assert "--sweep names a field twice" in capsys.readouterr().err


# -- telling somebody ----------------------------------------------------------------------------------------------------------


def test_a_command_and_a_webhook_are_told(tmp_path, capsys):
    recipe = tmp_path / "x.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe(does: str = 'write'):"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act(does=does)})"]))
    script = tmp_path / "note.sh"
    script.write_text("#!/bin/sh\ncat >> told\necho >> told\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    assert main(["run", str(recipe), "--notify", str(script)]) == 0
    assert main(["run", str(recipe), "--set", "does=mistake", "--notify", str(script)]) == 2
    told = [json.loads(line) for line in Path("told").read_text().splitlines()]
    assert [(event["run"], event["state"]) for event in told] == [("x", "done"), ("x", "failed")]
    assert told[1]["error"].startswith("a: row 3 is")

    received = []

    class Hook(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments): ...

    with http.server.HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.handle_request).start()
        notify(f"http://127.0.0.1:{server.server_port}/", {"state": "done"})
    assert received == [{"state": "done"}]
    notify("no-such-command-anywhere", {})
    assert "--notify no-such-command-anywhere:" in capsys.readouterr().err


def test_what_a_command_says_is_no_part_of_our_output(capfd):
    notify("echo told", {})
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "told\n")


@pytest.mark.parametrize(
    ("target", "said"), [("", "neither an address nor a command"), ("http://no such host/", "control characters")]
)
def test_who_cannot_be_told_changes_nothing_about_the_run(target, said, tmp_path, capsys):
    recipe = tmp_path / "x.py"
    lines = ["from align.recipe import Recipe", "from runner_stages import Act", "def recipe():"]
    recipe.write_text("\n".join([*lines, "    return Recipe('x', {'a': Act()})"]))
    assert main(["run", str(recipe), "--notify", target]) == 0
    assert said in capsys.readouterr().err


# -- several processes and machines --------------------------------------------------------------------------------------------


def test_the_command_of_accelerate_says_everything(monkeypatch):
    words = command(Launch(num_processes=8, strategy="fsdp2", mixed_precision="bf16"), ["-m", "x"], "gone")
    assert words[:3] == [sys.executable, "-m", "align.runner.launcher"]
    pairs = dict(pairwise(words))
    assert (pairs["--num_processes"], pairs["--mixed_precision"], pairs["--fsdp_version"]) == ("8", "bf16", "2")
    assert pairs["--log_dir"] == "gone", "torchrun leaves its own folder in /tmp"
    assert words[-2:] == ["-m", "x"]
    monkeypatch.setenv("ALIGN_MACHINE_RANK", "1")
    with pytest.raises(AlignError, match="several machines need main_process_ip"):
        command(Launch(num_processes=4, num_machines=2), [])
    several = command(Launch(num_processes=4, num_machines=2, main_process_ip="10.0.0.1"), [])
    assert dict(pairwise(several))["--machine_rank"] == "1"


def test_stages_of_several_machines_meet_at_ports_of_their_own():
    """On every machine the same, as the identity is; the user's own port goes before."""

    def port(identity, **more):
        launch = Launch(num_processes=4, num_machines=2, main_process_ip="10.0.0.1", **more)
        return int(dict(pairwise(command(launch, [], "x", identity)))["--main_process_port"])

    assert port("5" * 64) == port("5" * 64) != port("6" * 64)
    assert all(20000 <= port(letter * 64) < 30000 for letter in "0123456789abcdef")
    assert port("5" * 64, main_process_port=1234) == 1234


def test_deepspeed_is_told_all_that_it_does_not_do_by_itself():
    launch = Launch(num_processes=4, num_machines=2, main_process_ip="10.0.0.1", strategy="deepspeed-zero3")
    pairs = dict(pairwise(command(launch, [])))
    assert (pairs["--zero_stage"], pairs["--zero3_save_16bit_model"]) == ("3", "true"), "else there are no weights to save"
    assert pairs["--deepspeed_multinode_launcher"] == "standard", "pdsh would start everything from machine 0"


def test_processes_that_do_not_spread_over_the_machines_are_refused_by_a_plan(tmp_path, capsys):
    (tmp_path / "m").mkdir()
    write_rows(tmp_path / "d.jsonl", [{"text": "one"}])
    uneven = "--launch.num_processes 3 --launch.num_machines 2"
    assert main(f"pretrain --model {tmp_path}/m --data {tmp_path}/d.jsonl --learning_rate 1e-3 {uneven} --plan".split()) == 2
    assert "launch: 3 processes do not spread evenly over 2 machines" in capsys.readouterr().err


def test_more_processes_than_the_machine_has_devices_are_refused(monkeypatch):
    def stage(count, **more):
        return SFT(model="owner/name", data="x", launch={"num_processes": count, **more})

    monkeypatch.setattr("os.cpu_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refuse_crowd(stage(12))
    refuse_crowd(stage(24, num_machines=2))
    with pytest.raises(AlignError, match="num_processes: 1000 are too many for this machine, which takes 12: 4 a core at most"):
        refuse_crowd(stage(1000))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    refuse_crowd(stage(2))
    with pytest.raises(AlignError, match="3 are too many for this machine, which takes 2: one a GPU at most"):
        refuse_crowd(stage(3))
    refuse_crowd(stage(3, cpu=True))


def test_a_launch_gets_each_gpu_once():
    """Three stages at a time on two GPUs: two shares of one of them are no two GPUs."""
    launched = SimpleNamespace(stage=SFT(model="owner/name", data="x", launch={"num_processes": 2}))
    alone = SimpleNamespace(stage=SFT(model="owner/name", data="x"))
    free = ["0", "1", "0"]
    assert (take(free, launched, 2), free) == (["0", "1"], ["0"])
    assert take(["0", "0"], launched, 2) is None
    assert [take(free := ["0", "1", "0"], alone, 2), free] == [["0"], ["1", "0"]]
    assert take(["", ""], launched, 2) == ["", ""], "shares of the CPU are alike"


def test_a_recipe_sets_the_launch_of_a_stage(tmp_path):
    path = tmp_path / "x.yaml"
    content = {"stages": {"a": {"stage": "sft", "model": "owner/name", "data": "x", "launch": {"num_processes": 2}}}}
    path.write_text(yaml.safe_dump(content))
    assert load_recipe(str(path), {"a.launch.strategy": "fsdp2"}).stages["a"].launch == Launch(num_processes=2, strategy="fsdp2")
    path.write_text(yaml.safe_dump({"launch": {"num_processes": 4}, **content}))
    assert load_recipe(str(path)).stages["a"].launch == Launch(num_processes=2), "the stage's own"
    del content["stages"]["a"]["launch"]
    path.write_text(yaml.safe_dump(content))
    assert load_recipe(str(path), {"a.launch.num_processes": "3"}).stages["a"].launch == Launch(num_processes=3)
    path.write_text(yaml.safe_dump({"launch": {"num_processes": 4}, **content}))
    assert load_recipe(str(path)).stages["a"].launch == Launch(num_processes=4)


def test_the_slurm_script_queues_up_again_when_it_is_told_to_end(tmp_path):
    """With stand-ins for Slurm's two programs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text(
        '#!/bin/bash\ntrap "echo saved >> log; exit 0" TERM\necho "$@" >> log\ntouch begun\nwhile :; do sleep 0.05; done\n'
    )
    (tools / "scontrol").write_text('#!/bin/bash\n[ "$1" = requeue ] && echo "requeue $2" >> log || echo node1\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    assert (
        main(["launch", "--slurm", "job.sh", "--nodes", "2", "--gpus", "8", "--hours", "1.5", "--", "align", "run", "my recipe"])
        == 0
    )
    script = Path("job.sh").read_text()
    assert "#SBATCH --time=1:30:00" in script
    assert "#SBATCH --gpus-per-node=8" in script
    assert "#SBATCH --cpus-per-task=32\n" in script, "else Slurm gives all processes of a node one core"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]"}
    job = subprocess.Popen(["bash", "job.sh"], env=environment)
    while not Path("begun").exists():
        assert job.poll() is None
    job.terminate()
    assert job.wait(20) == 0
    assert Path("log").read_text().splitlines() == [
        "--kill-on-bad-exit=1 --cpus-per-task=32 align run my recipe",
        "saved",
        "requeue 42",
    ]


@pytest.mark.parametrize(("hours", "time"), [(24, "24:00"), (1.995, "2:00"), (1.99, "1:59"), (0.001, "0:01")])
def test_the_time_limit_is_in_whole_minutes(hours, time):
    assert f"--time={time}:00\n" in slurm_script(["x"], nodes=1, gpus=1, cpus=4, hours=hours, partition=None, name="n")


@pytest.mark.parametrize(("code", "ends", "queued"), [(3, 3, False), (130, 0, True)])
def test_without_preemption_the_script_ends_with_the_command_s_code(code, ends, queued, tmp_path):
    """A command that Slurm itself has told to end has saved, and is to go on."""
    script = slurm_script(["x"], nodes=1, gpus=1, cpus=4, hours=24, partition="gpu", name="n")
    assert "#SBATCH --partition=gpu" in script
    (tmp_path / "srun").write_text(f"#!/bin/sh\nexit {code}\n")
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1" = requeue ] && touch queued || echo node\n')
    for tool in ("srun", "scontrol"):
        (tmp_path / tool).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n"}
    assert subprocess.run(["bash", "-c", script], env=environment, check=False, cwd=tmp_path).returncode == ends
    assert (tmp_path / "queued").exists() == queued
