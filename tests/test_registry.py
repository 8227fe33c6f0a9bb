"""The registry: versions, lineage, names, aliases, and what a model reference means."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from align.artifact import Artifact, write_atomically
from align.cli import main
from align.errors import AlignError
from align.registry import ALIASES, Registry, check_name, home


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "home")


@pytest.fixture
def artifact(tmp_path):
    """Build an artifact whose folder exists."""

    def build(name, identity="0", **fields):
        folder = tmp_path / f"{name}-{identity}"
        folder.mkdir(exist_ok=True)
        return Artifact(name, "sft", identity, str(folder), config={}, **fields)

    return build


def test_versions_count_up_and_a_reference_means_the_latest(registry, artifact):
    assert [registry.add(artifact("sft", identity)).reference for identity in "abc"] == ["sft@1", "sft@2", "sft@3"]
    assert registry.get("sft").identity == "c"
    assert registry.get("sft@1").identity == "a"
    assert [a.reference for a in registry.all()] == ["sft@1", "sft@2", "sft@3"]


def test_the_tenth_version_is_later_than_the_ninth(registry, artifact):
    for number in range(10):
        registry.add(artifact("sft", str(number)))
    assert registry.get("sft").reference == "sft@10"


def test_the_same_result_is_not_registered_twice(registry, artifact):
    assert registry.add(artifact("sft")) == registry.add(artifact("sft"))
    assert len(registry.versions("sft")) == 1


def test_the_same_result_in_another_folder_is(registry, artifact, tmp_path):
    registry.add(artifact("sft"))
    assert registry.add(replace(artifact("sft"), path=str(tmp_path))).version == 2


def test_versions_never_collide(registry, artifact):
    """Many writers at once: every one gets a version of its own, and the file of that version holds its artifact."""
    artifacts = [artifact("sft", str(number)) for number in range(40)]
    with ThreadPoolExecutor(16) as pool:
        added = list(pool.map(registry.add, artifacts))
    assert sorted(a.version for a in added) == list(range(1, 41))
    for one in added:
        assert registry.get(one.reference).identity == one.identity
    assert {path.suffix for path in (registry.root / "sft").iterdir()} == {".json"}, "no temporary file is left"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "-x", "a b", "a\n", "ä", "x" * 101, 5, None])
def test_a_name_is_checked_before_it_becomes_a_path(name, registry, artifact, tmp_path):
    with pytest.raises(AlignError, match="must be letters"):
        check_name(name)
    with pytest.raises(AlignError, match="must be letters"):
        registry.add(replace(artifact("sft"), name=name))
    with pytest.raises(AlignError, match="must be letters"):
        registry.add_alias(name, "owner/name")
    assert not (tmp_path / "home").exists()


def test_what_nothing_can_be_written_into_is_told_in_one_line(artifact, tmp_path, monkeypatch, capsys):
    """Of /proc, whose permissions do not tell; and of a file system that is only read."""
    monkeypatch.setenv("ALIGN_HOME", "/proc/home")
    assert main(["models", "alias", "small", "owner/name"]) == 2
    assert "nothing can be written into /proc" in capsys.readouterr().err
    assert main(["models", "pull", "sft", str(tmp_path)]) == 2
    assert "nothing can be written into /proc" in capsys.readouterr().err
    home, (mount, unmount) = tmp_path / "read", (["mount", "--bind"], ["umount"])
    home.mkdir()
    monkeypatch.setenv("ALIGN_HOME", str(home))
    Registry().add(artifact("sft"))
    if not shutil.which("mount") or subprocess.run([*mount, str(home), str(home)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(home)], check=True)
        assert main(["models", "delete", "sft@1"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "registry/sft/1.json: Read-only file system" in line
    finally:
        subprocess.run([*unmount, str(home)], check=True)


def test_a_file_that_cannot_be_written_is_told_of_by_its_own_name():
    with pytest.raises(FileNotFoundError) as told:
        write_atomically(Path("/proc/report.md"), "")
    assert told.value.filename == "/proc/report.md"


def test_what_runs_again_is_not_whole(registry, artifact, tmp_path, monkeypatch, capsys):
    """As a forced stage does, or one that was cut: its manifest is gone. Half of it was pushed, and no pull took that."""
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    again = registry.add(artifact("sft"))
    again.begin()
    for command in (["models", "push", "sft", str(tmp_path / "shelf")], ["export", "sft", "--to", str(tmp_path / "to")]):
        assert main(command) == 2
        assert f"sft@1 at {again.path} is not whole: its stage runs again, or was cut" in capsys.readouterr().err
    assert not (tmp_path / "shelf").exists()
    again.write()
    assert main(["models", "push", "sft", str(tmp_path / "shelf")]) == 0


@pytest.mark.parametrize("reference", ["../x", "../x@1", "@1", "a/b@1"])
def test_a_reference_that_is_no_name_is_not_looked_up(reference, registry, tmp_path):
    (tmp_path / "home" / "x").mkdir(parents=True)
    (tmp_path / "home" / "x" / "1.json").write_text("{}")
    with pytest.raises(AlignError, match="no model"):
        registry.get(reference)


def test_what_is_not_there(registry, artifact):
    registry.add(artifact("demo-sft"))
    with pytest.raises(AlignError, match=r"no model 'demo-sfd'.*did you mean 'demo-sft'"):
        registry.get("demo-sfd")
    with pytest.raises(AlignError, match="has no version '7'; it has 1"):
        registry.get("demo-sft@7")
    with pytest.raises(AlignError, match=r"no model 'demo-sfd'.*did you mean 'demo-sft'.*OWNER/NAME"):
        registry.resolve("demo-sfd")


# -- resolve: a folder, a registered name, an alias, a hub id ------------------------------------------------------------------


def test_a_folder_comes_first(registry, artifact, tmp_path, monkeypatch):
    registry.add(artifact("sft"))
    (tmp_path / "here" / "sft").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert registry.resolve("sft").path == str(tmp_path / "here" / "sft")
    assert registry.resolve("sft").artifact is None


def test_a_folder_with_a_manifest_is_its_artifact(registry, artifact):
    registered = registry.add(artifact("sft"))
    registered.write()
    assert registry.resolve(registered.path).artifact == registered


def test_a_folder_in_the_home_of_the_user(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert registry.resolve("~/models").path == str(tmp_path / "models")


def test_then_a_registered_name(registry, artifact, tmp_path):
    write_atomically(registry.root / "aliases.json", json.dumps({"sft": "owner/name"}))
    registered = registry.add(artifact("sft"))
    assert registry.resolve("sft").path == registry.resolve("sft@1").path == registered.path
    assert registry.resolve("sft").artifact == registered


def test_then_an_alias(registry, tmp_path):
    assert registry.resolve("qwen2.5-0.5b").path == ALIASES["qwen2.5-0.5b"] == "Qwen/Qwen2.5-0.5B"
    registry.add_alias("mine", "owner/name")
    assert registry.resolve("mine").path == "owner/name"


def test_then_a_hub_id(registry):
    assert registry.resolve("owner/name").path == "owner/name"


@pytest.mark.parametrize("reference", ["./nothing", "/nothing/here", "~/nothing", "a/b/c", "..nothing"])
def test_a_path_that_leads_nowhere_is_no_hub_id(reference, registry):
    with pytest.raises(AlignError, match="no model folder"):
        registry.resolve(reference)


@pytest.mark.parametrize("reference", ["", "nothing"])
def test_a_bare_word_is_no_hub_id(reference, registry):
    with pytest.raises(AlignError, match="no model"):
        registry.resolve(reference)


def test_a_version_whose_folder_holds_another_now(registry, artifact):
    """Its folder was taken away and trained into again: ``sft@1`` must not mean the weights of ``sft@2``."""
    old = registry.add(artifact("sft"))
    new = registry.add(replace(artifact("sft", "1"), path=old.path))
    new.write()
    assert registry.resolve("sft").artifact == new
    with pytest.raises(AlignError, match=f"sft@1 was at {old.path}, and that folder holds sft@2 now"):
        registry.resolve("sft@1")


def test_a_copy_of_an_entry_is_no_version(registry, artifact):
    registry.add(artifact("sft"))
    entry = registry.root / "sft" / "1.json"
    entry.with_name("1 (copy).json").write_bytes(entry.read_bytes())
    assert [found.reference for found in registry.all()] == ["sft@1"]


@pytest.mark.parametrize("own", [{"a": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_aliases_that_stand_for_each_other(own, registry):
    registry.root.mkdir(parents=True)
    (registry.root / "aliases.json").write_text(json.dumps(own))
    with pytest.raises(AlignError, match=r"the alias '[ab]' stands for itself in .*aliases\.json"):
        registry.resolve("a")


def test_a_registered_model_whose_folder_is_gone(registry, artifact):
    registered = registry.add(artifact("sft"))
    (registry.root.parent.parent / "sft-0").rmdir()
    with pytest.raises(AlignError, match=f"sft@1 was at {registered.path}, and that folder is gone"):
        registry.resolve("sft")


# -- aliases -------------------------------------------------------------------------------------------------------------------


def test_an_alias_keeps_its_meaning_in_another_folder(registry, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    registry.add_alias("mine", "./model")
    monkeypatch.chdir("/")
    assert registry.resolve("mine").path == str(tmp_path / "model")


def test_an_alias_of_a_registered_name_stays_with_that_version(registry, artifact):
    first = registry.add(artifact("sft", "a"))
    first.write()
    registry.add_alias("released", "sft")
    registry.add(artifact("sft", "b"))
    assert registry.resolve("released").artifact == first


def test_aliases_add_up_and_can_be_changed(registry):
    registry.add_alias("one", "owner/one")
    registry.add_alias("two", "one")
    registry.add_alias("one", "owner/other")
    registry.add_alias("gpt2", "owner/gpt2")
    assert registry.aliases() == {**ALIASES, "one": "owner/other", "two": "owner/one", "gpt2": "owner/gpt2"}


def test_an_alias_must_lead_somewhere_and_hide_nothing(registry, artifact):
    registry.add(artifact("sft"))
    with pytest.raises(AlignError, match="no model folder"):
        registry.add_alias("mine", "./nothing")
    with pytest.raises(AlignError, match="name of a registered model"):
        registry.add_alias("sft", "owner/name")


@pytest.mark.parametrize("content", ['{"mine": "./mo', "", "[1, 2]", '{"mine": 3}', "\x80"])
def test_a_damaged_file_of_aliases_is_one_line_and_is_left_as_it_is(registry, artifact, content):
    registered = registry.add(artifact("sft"))
    registered.write()
    file = registry.root / "aliases.json"
    file.write_bytes(content.encode("latin-1"))
    assert registry.resolve("sft").artifact == registered
    for asked in (lambda: registry.resolve("mine"), lambda: registry.add_alias("other", "owner/name")):
        with pytest.raises(AlignError, match=r"aliases\.json cannot be read .*align models alias"):
            asked()
    assert file.read_bytes() == content.encode("latin-1")


# -- lineage -------------------------------------------------------------------------------------------------------------------


def test_lineage_goes_back_to_the_base_model(registry, artifact):
    registry.add(artifact("sft", parents={"qwen": "Qwen/Qwen2.5-0.5B"}))
    registry.add(artifact("reward", parents={"sft": "sft@1"}))
    registry.add(artifact("ppo", parents={"sft": "sft@1", "reward": "reward@1", "same": "sft@1"}))
    registry.add(artifact("sft", "later"))
    found = [(depth, reference, artifact and artifact.stage) for depth, reference, artifact in registry.lineage("ppo")]
    assert found == [
        (0, "ppo@1", "sft"),
        (1, "sft@1", "sft"),
        (2, "Qwen/Qwen2.5-0.5B", None),
        (1, "reward@1", "sft"),
        (2, "sft@1", "sft"),  # its own ancestors are above
    ]


def test_lineage_of_many_rounds_is_told_once(registry, artifact):
    """Each round is made from the one before and from its samples: the paths back double in each."""
    registry.add(artifact("m0"))
    for i in range(1, 31):
        registry.add(artifact(f"s{i}", parents={"m": f"m{i - 1}@1"}))
        registry.add(artifact(f"m{i}", parents={"m": f"m{i - 1}@1", "s": f"s{i}@1"}))
    assert len(registry.lineage("m30")) == 1 + 3 * 30


def test_lineage_of_what_was_pulled_ends_where_this_registry_does(registry, artifact):
    """Of the parents one is not here, one has the name and version of something else, and one is a folder with an @ in its path."""
    registry.add(artifact("reward", "other"))
    registry.add(artifact("sft", "mine"))
    parents = {"a": "gone@1", "b": "reward@1", "c": "sft@1", "d": "/home/me@work/base"}
    registry.add(artifact("ppo", parents=parents, inputs={"a": "x", "b": "theirs", "c": "mine", "d": "y"}))
    found = [(reference, artifact and artifact.identity) for _, reference, artifact in registry.lineage("ppo")]
    assert found == [("ppo@1", "0"), ("gone@1", None), ("reward@1", None), ("sft@1", "mine"), ("/home/me@work/base", None)]


# -- files ---------------------------------------------------------------------------------------------------------------------


def test_home_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "elsewhere"))
    assert home() == tmp_path / "elsewhere"
    monkeypatch.setenv("ALIGN_HOME", "")
    assert str(home()) == "runs"
    monkeypatch.delenv("ALIGN_HOME")
    assert str(home()) == "runs"


def test_a_manifest_comes_back_as_it_was(artifact):
    written = artifact("sft", metrics={"loss": 0.5}, parents={"a": "b@1"}, version=3)
    written.write()
    assert Artifact.read(Path(written.path)) == written
    assert Artifact.read(Path(written.path) / "nothing") is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "file.json"
    write_atomically(file, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(file, "half \ud800")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_home_that_no_shell_has_read_is_the_users(tmp_path, monkeypatch):
    """`ALIGN_HOME="~/runs"` made a folder called ~ wherever a command was given."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALIGN_HOME", "~/runs")
    assert home() == tmp_path / "runs"


@pytest.mark.parametrize("command", ["models list", "doctor mine", "status mine", "chat mine", "run rlhf --plan"])
def test_a_home_that_is_a_file_is_told_of(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("ALIGN_HOME", str(tmp_path / "home"))
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert told == f"align: error: {tmp_path}/home is a file, and runs and the registry live in a folder: set ALIGN_HOME to one\n"


def test_a_user_that_nobody_is_leads_nowhere():
    with pytest.raises(AlignError, match="no model folder '~nobody-of-that-name/model'"):
        Registry().resolve("~nobody-of-that-name/model")
