"""Recipes and their runner: order, plans, what runs again and what does not, and what is left behind by a failure."""

import ast
import graphlib
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from align.artifact import MANIFEST, Artifact
from align.errors import AlignError
from align.pipeline import Run
from align.recipe import Recipe, load_recipe, parse_value
from align.registry import Registry, home
from align.runner.sweep import expand
from align.stages import SFT, Preference, Stage
from align.stages.base import Context, DataRefs, ModelRef, RewardRefs, stage
from align.stages.task import TaskTraining

ROOT = Path(__file__).parent.parent
RAN: list[str] = []


@stage("note")
class Note(Stage):
    """Writes down what it was given."""

    text: str = ""
    """What to write."""
    options: dict[str, Any] = Field(default_factory=dict)
    """A nested mapping."""
    model: ModelRef | None = None
    """A parent."""
    models: dict[str, ModelRef] = Field(default_factory=dict)
    """More parents."""
    data: DataRefs | None = None
    """Files."""
    reward_funcs: RewardRefs = Field(default_factory=list)
    """Functions."""
    fail: bool = False
    """Find something wrong with the input."""

    def run(self, context: Context) -> dict[str, Any]:
        RAN.append(context.name)
        assert not (context.folder / MANIFEST).exists()
        (context.folder / "note.txt").write_text(self.text)
        if self.fail:
            raise AlignError("row 3 is\nno row")
        return {"read": [Path(source).read_text() for source in self.data or []], "model": self.model, "models": self.models}


@stage("edits")
class Edits(Stage):
    """Writes or removes a file that is none of its own, as a person may do while a stage runs."""

    path: str
    """Which."""
    content: str | None = None
    """What is in it from then on; without it the file is removed."""

    def run(self, context: Context) -> dict[str, Any]:
        Path(self.path).unlink()
        if self.content is not None:
            Path(self.path).write_text(self.content)
        return {}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RAN.clear()


def run(recipe, only=None):
    """Run `recipe`; returns the names of the stages that did run, and the artifacts."""
    RAN.clear()
    artifacts = Run(recipe, Path("out")).execute(only)
    return RAN[:], artifacts


def reasons(recipe):
    return {step.name: step.reason for step in Run(recipe, Path("out")).plan()}


def chain(**changes: Stage) -> Recipe:
    return Recipe("chain", {"a": Note(text="a"), "b": Note(model="a"), "c": Note(data=["b/note.txt"]), **changes})


# -- recipes -------------------------------------------------------------------------------------------------------------------

PYTHON = """
from align.recipe import Recipe
from align.stages import SFT, Preference

def recipe(model: str = "owner/name", rate: float = 1e-3, names: list[str] = []) -> Recipe:
    return Recipe("two", {
        "sft": SFT(model=model, data=["a.jsonl"], learning_rate=rate, lr_scheduler_kwargs={"min_lr_rate": 1e-2}),
        "dpo": Preference(model="sft", data="b.jsonl", beta=0.1),
    })
"""
YAML = """
name: two
stages:
  sft:
    stage: sft
    model_name_or_path: owner/name
    dataset_name: a.jsonl
    learning_rate: 1e-3
    lr_scheduler_kwargs: {min_lr_rate: 1e-2}
  dpo: {stage: preference, model: sft, data: [b.jsonl], beta: 0.1}
"""


@pytest.fixture
def python(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(PYTHON)
    return str(path)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(YAML)
    return str(path)


def test_python_and_yaml_give_the_same(python, written):
    assert load_recipe(python) == load_recipe(written)
    assert load_recipe(python).stages["dpo"] == Preference(model="sft", data=["b.jsonl"], beta=0.1)


def test_a_recipe_file_is_run_again_when_it_was_edited(python):
    before = load_recipe(python)
    assert load_recipe(python) == before
    Path(python).write_text(PYTHON.replace("beta=0.1", "beta=0.2"))
    assert load_recipe(python).stages["dpo"].beta == 0.2


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_by_name(path):
    assert load_recipe(path.stem).ordered() == load_recipe(str(path)).ordered()


def test_order_follows_needs_not_the_order_of_writing():
    recipe = Recipe("r", {"c": Note(model="b"), "b": Note(data="a/note.txt"), "d": Note(models={"x": "c", "y": "a"}), "a": Note()})
    assert recipe.ordered() == ["a", "b", "c", "d"]
    assert recipe.needs("d") == {"a", "c"}


def test_circles_are_refused():
    """What only waits for the circle is no part of it."""
    with pytest.raises(AlignError, match=r"need each other in a circle: a, b$"):
        Recipe("r", {"a": Note(model="b"), "b": Note(model="a"), "c": Note(), "d": Note(model="b"), "e": Note(model="d")}).ordered()
    with pytest.raises(AlignError, match="stage 'a' needs its own output"):
        Recipe("r", {"a": Note(model="a"), "b": Note()}).ordered()


def test_a_single_stage_speaks_of_the_registry_and_of_folders(tmp_path):
    """`align sft --model sft --data sft/rows.jsonl`: its own name is not its own output."""
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "rows.jsonl").write_text("rows")
    _, artifacts = run(Recipe("sft", {"sft": Note(model=str(tmp_path), data="sft/rows.jsonl")}))
    assert artifacts["sft"].metrics["read"] == ["rows"]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ({"modle": "x"}, r"has no setting 'modle' \(did you mean 'model'\?\); it has: model, rate, names"),
        ({"rate": "fast"}, "--set rate: 'fast': input should be a valid number"),
        ({"stf.seed": "1"}, r"recipe 'two' has no stage 'stf' \(did you mean 'sft'\?\)"),
        ({"sft.sede": "1"}, r"unknown key 'sede' \(did you mean 'seed'\?\)"),
        ({"sft.seed": "one"}, "'seed' is 'one': input should be a valid integer"),
        ({"sft.seed.x": "1"}, "--set sft.seed.x: 'seed' is not a mapping"),
        ({"sft.learning_rate": "-1"}, "'learning_rate' is -1: input should be greater than 0"),
    ],
)
def test_what_cannot_be_set(assignments, message, python):
    with pytest.raises(AlignError, match=message):
        load_recipe(python, assignments)


def test_the_values_that_a_setting_may_have_are_told_as_they_are_written(tmp_path):
    lines = ["from typing import Literal", "from align.recipe import Recipe", "def recipe(size: Literal['S', 'XL'] = 'S'): ..."]
    (tmp_path / "r.py").write_text("\n".join(lines))
    with pytest.raises(AlignError, match="--set size: 'M': input should be 'S' or 'XL'"):
        load_recipe(str(tmp_path / "r.py"), {"size": "M"})


def test_settings_fields_and_entries_of_mappings_can_be_set(python):
    recipe = load_recipe(
        python,
        {
            "model": "gpt2",
            "rate": "5e-4",
            "names": "[a, b]",
            "sft.lr_scheduler_kwargs.min_lr_rate": "2e-2",
            "sft.dataset_name": "[c.jsonl, d.jsonl]",
            "dpo.max_steps": "3",
        },
    )
    changes = {"min_lr_rate": 0.02}
    assert recipe.stages["sft"] == SFT(model="gpt2", data=["c.jsonl", "d.jsonl"], learning_rate=5e-4, lr_scheduler_kwargs=changes)
    assert recipe.stages["dpo"].max_steps == 3


def test_processes_count_where_they_change_what_comes_out():
    """On the forest two processes of four rows are one of eight; TRL's trainers take the mean of the processes' own means."""

    def essence(engine, processes, rows):
        launch = {"num_processes": processes}
        return SFT(model="gpt2", data="c.jsonl", engine=engine, launch=launch, per_device_train_batch_size=rows).essence()

    assert essence("forest", 1, 8) == essence("forest", 2, 4) != essence("forest", 2, 8)
    assert essence("trl", 1, 8) not in (essence("trl", 2, 4), essence("trl", 2, 8))
    assert (
        essence("trl", 2, 8)
        == SFT(
            model="gpt2", data="c.jsonl", engine="trl", launch={"num_processes": 2, "main_process_port": 2}, save_steps=3
        ).essence()
    )


def test_how_a_task_s_rows_are_shared_does_not_count():
    """Its losses are means over the whole step, too."""

    def essence(rows, steps, processes=1):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        return TaskTraining(task="ner", model="bert", data="c.jsonl", launch={"num_processes": processes}, **sizes).essence()

    assert essence(8, 1) == essence(4, 2) == essence(4, 1, 2) != essence(8, 1, 2)


@pytest.mark.parametrize("order", [1, -1])
def test_fields_of_a_stage_are_set_together(order, python):
    """`lora_r` without `use_peft` is refused; whichever stands first, they are not judged alone."""
    entries = [("sft.lora_r", "4"), ("sft.use_peft", "true")][::order]
    inner = [("dpo.launch.num_processes", "2"), ("dpo.launch.strategy", "fsdp2")][::order]
    recipe = load_recipe(python, dict(entries + inner))
    assert (recipe.stages["sft"].use_peft, recipe.stages["sft"].lora_r) == (True, 4)
    assert recipe.stages["dpo"].launch.model_dump(exclude_unset=True) == {"num_processes": 2, "strategy": "fsdp2"}
    whole = [("dpo.launch", "{num_processes: 2}"), ("dpo.launch.strategy", "fsdp2")][::order]
    assert load_recipe(python, dict(whole)).stages["dpo"].launch == recipe.stages["dpo"].launch
    with pytest.raises(AlignError, match=r"--set sft\.lora_r --set sft\.seed: lora_r belongs to use_peft"):
        load_recipe(python, {"sft.lora_r": "4", "dpo.seed": "1", "sft.seed": "1"})


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e-3", 1e-3), ("2.5E4", 25000.0), (".5e1", 5.0), ("true", True), ("null", None), ("[1, x]", [1, "x"])]
    + [(text, text) for text in ("a: b: c", "e5", "qwen2.5-0.5b", "[x", "1e", "2026-02-30")],
)
def test_values_are_read_as_yaml_with_numbers_as_everyone_writes_them(text, value):
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["### User:", "User:", "a: b", "{x}", "end # of it", "2024", "1e5", "no", " x", "\\n|"])
def test_where_a_field_takes_text_alone_it_is_taken_as_it_stands(text, python):
    recipe = load_recipe(python, {"sft.model": text, "sft.data": text})
    assert (recipe.stages["sft"].model, recipe.stages["sft"].data) == (text, [text])
    swept = next(iter(expand(recipe, {"sft.data": [text, "other"]}).stages.values()))
    assert swept.data == [text]


@pytest.mark.parametrize(("text", "value"), [("null", None), ("~", None), ('"null"', "null"), ("'a: b'", "a: b")])
def test_where_a_field_takes_text_alone_quotes_and_null_mean_what_they_do_in_yaml(text, value, python):
    assert load_recipe(python, {"sft.chat_template": text}).stages["sft"].chat_template == value


def test_references_keep_no_secret_meaning(python):
    """A data path whose first part is no stage is a path, and a model name that is no stage is looked up."""
    recipe = load_recipe(python)
    assert recipe.stage_of("data", "sft/x.jsonl") == recipe.stage_of("model", "sft") == "sft"
    assert recipe.stage_of("data", "a.jsonl") is recipe.stage_of("model", "sft/x") is recipe.stage_of("reward", "sft") is None


# -- plans ---------------------------------------------------------------------------------------------------------------------


def test_a_plan_says_why():
    assert reasons(chain()) == {"a": "never ran", "b": "never ran", "c": "never ran"}
    run(chain())
    assert set(reasons(chain()).values()) == {"up to date"}
    changed = chain(b=Note(model="a", text="new", options={"x": 1}))
    why = 'changed: text "" -> "new", options {} -> {"x": 1}'
    assert reasons(changed) == {"a": "up to date", "b": why, "c": "its inputs changed: b/note.txt"}
    assert RAN == ["a", "b", "c"], "planning runs nothing"


def test_a_plan_checks_every_reference_before_anything_runs():
    with pytest.raises(AlignError, match="no model 'nobody'"):
        run(chain(z=Note(model="nobody")))
    with pytest.raises(AlignError, match=r"stage 'z': nothing\.jsonl: no such file"):
        run(chain(z=Note(data="nothing.jsonl")))
    with pytest.raises(AlignError, match=r"bb/note\.jsonl: no such file .* no stage is called 'bb' \(did you mean 'b'\?\)"):
        run(chain(z=Note(data="bb/note.jsonl")))
    with pytest.raises(AlignError, match=r"gone\.py does not exist"):
        run(chain(z=Note(reward_funcs="gone.py:f")))
    assert RAN == []
    assert not Path("out").exists()


# -- what runs -----------------------------------------------------------------------------------------------------------------


def test_a_finished_stage_is_not_run_again():
    ran, first = run(chain())
    assert ran == ["a", "b", "c"]
    ran, second = run(chain())
    assert ran == []
    assert second == first
    assert [a.reference for a in Registry().all()] == ["chain-a@1", "chain-b@1", "chain-c@1"]


def test_nor_after_the_recipe_was_something_else_in_between():
    run(chain())
    assert run(chain(a=Note(text="other")))[0] == ["a", "b", "c"]
    assert run(chain())[0] == [], "both results are kept"


def test_a_field_that_changed_runs_the_stage_and_those_behind_it():
    run(chain())
    assert run(chain(b=Note(model="a", text="new")))[0] == ["b", "c"]
    assert Registry().get("chain-c").reference == "chain-c@2"


def test_a_plan_tells_of_all_that_changed_and_of_nothing_that_decides_nothing():
    """Data that changed beside fields: `save_steps` is none of the identity, of two ways to the same batch neither is."""
    data = "a.jsonl"
    Path(data).write_text('{"prompt": "p", "completion": "c"}\n')
    stage = SFT(model="m", data=[data], learning_rate=1e-3, per_device_train_batch_size=8)
    before = Artifact("r-a", "sft", "1" * 64, "out/a-11111111", stage.model_dump(mode="json"), inputs={data: "1"})
    before.write()
    more = {"save_steps": 5, "report_to": ["wandb"], "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    again = Recipe("r", {"a": stage.model_copy(update=more)})
    Path("m").mkdir()
    assert reasons(again)["a"].startswith(f"its inputs changed: {data}; code changed: ")
    other = Recipe("r", {"a": stage.model_copy(update={**more, "learning_rate": 2e-3, "chat_template": "x" * 50})})
    told = f"changed: learning_rate 0.001 -> 0.002, chat_template; its inputs changed: {data}; code"
    Path("x" * 50).write_text("")
    assert reasons(other)["a"].startswith(told)


def test_a_data_file_that_changed(tmp_path):
    Path("rows.txt").write_text("one")
    recipe = chain(b=Note(data="rows.txt"))
    assert run(recipe)[1]["b"].metrics["read"] == ["one"]
    Path("rows.txt").write_text("two")
    assert reasons(recipe) == {"a": "up to date", "b": "its inputs changed: rows.txt", "c": "its inputs changed: b/note.txt"}
    ran, artifacts = run(recipe)
    assert ran == ["b", "c"]
    assert artifacts["b"].metrics["read"] == ["two"]
    assert artifacts["b"].data.keys() == {"rows.txt"}


def test_a_stage_is_of_what_its_data_are_when_it_begins():
    """They may change while the stages before it run. It was registered as of the data that the plan had seen."""
    Path("rows.txt").write_text("one")
    recipe = chain(a=Edits(path="rows.txt", content="two"), b=Note(model="a", data="rows.txt"))
    made = run(recipe)[1]["b"]
    assert made.metrics["read"] == ["two"]
    assert made.data == {"rows.txt": hashlib.sha256(b"two").hexdigest()}
    assert reasons(recipe)["b"] == "up to date"
    Path("rows.txt").write_text("one")
    assert reasons(recipe)["b"] == "its inputs changed: rows.txt"


def test_data_that_are_gone_when_their_stage_is_to_begin():
    """Stages that do not need them run."""
    Path("rows.txt").write_text("one")
    recipe = Recipe(
        "r", {"a": Edits(path="rows.txt"), "b": Note(model="a", data="rows.txt"), "c": Note(data="b/note.txt"), "d": Note()}
    )
    with pytest.raises(AlignError, match=r"^stage 'b': rows\.txt: no such file or folder.*; c waits for b$"):
        run(recipe)
    assert RAN == ["d"]


def test_a_data_file_that_moved_with_the_same_content():
    Path("rows.txt").write_text("one")
    run(chain(b=Note(data="rows.txt")))
    Path("rows.txt").rename("same.txt")
    assert run(chain(b=Note(data="same.txt")))[0] == []


def test_a_reward_file_that_changed():
    Path("mine.py").write_text("def f(completions, **columns): return [0.0 for _ in completions]\n")
    recipe = chain(b=Note(reward_funcs=["mine.py:f"]))
    run(recipe)
    assert run(recipe)[0] == []
    Path("mine.py").write_text("def f(completions, **columns): return [1.0 for _ in completions]\n")
    assert run(recipe)[0] == ["b", "c"]


def test_a_chat_template_that_changed():
    """A file is what it says, a shipped template its name."""
    Path("rows.txt").write_text("one")

    def identity(template):
        sft = SFT(model="some/base", data="rows.txt", chat_template=template)
        (step,) = Run(Recipe("s", {"s": sft}), Path("out")).plan()
        return step.identity

    Path("mine.jinja").write_text("{{ messages }}")
    before = identity("mine.jinja")
    assert identity("mine.jinja") == before
    Path("mine.jinja").write_text("{{ messages }}!")
    assert len({before, identity("mine.jinja"), identity("plain"), identity("chatml"), identity(None)}) == 5


def test_a_registered_parent_that_has_a_newer_version():
    run(Recipe("base", {"base": Note(text="1")}))
    recipe = chain(b=Note(model="base"))
    _, artifacts = run(recipe)
    assert artifacts["b"].parents == {"base": "base@1"}
    run(Recipe("base", {"base": Note(text="2")}))
    assert reasons(recipe)["b"] == "its inputs changed: base"
    assert run(recipe)[1]["b"].parents == {"base": "base@2"}
    assert run(chain(b=Note(model="base@1")))[0] == [], "the first parent by its full name: that has run"


def test_a_model_folder_that_changed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    recipe = chain(b=Note(model=str(folder)))
    run(recipe)
    (folder / "config.json").write_text("{ }")
    assert run(recipe)[0] == ["b", "c"]


@pytest.mark.parametrize("name", ["model.safetensors", "modeling_own.py"])
def test_a_byte_in_the_middle_of_a_model_s_file_changed(name, tmp_path, monkeypatch):
    """Its size and its time of modification stay; the digest of what it was before is kept."""
    file = tmp_path / "model" / name
    file.parent.mkdir()
    file.write_bytes(bytes(3 * 2**20))
    times = os.stat(file)
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    recipe = chain(b=Note(model=str(file.parent)))
    run(recipe)
    assert run(recipe)[0] == []
    with file.open("r+b") as stream:
        stream.seek(3 * 2**19)
        stream.write(b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert reasons(recipe)["b"] == f"its inputs changed: {file.parent}"


def test_a_large_file_of_a_model_is_read_once(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(2**20 + 1))
    now = file.stat().st_ctime + 1
    monkeypatch.setattr(time, "time", lambda: now)
    recipe = chain(b=Note(model=str(tmp_path)))
    run(recipe)
    assert not (home() / "cache" / "sha256").exists(), "a file that was only just written may be written to again"
    now += 2
    assert run(recipe)[0] == []
    (kept,) = (home() / "cache" / "sha256").iterdir()
    assert kept.read_text() == hashlib.sha256(bytes(2**20 + 1)).hexdigest()
    monkeypatch.setattr(hashlib, "file_digest", lambda *arguments: pytest.fail("it was read again"))
    assert run(recipe)[0] == []


def test_parents_are_handed_over_as_folders():
    _, artifacts = run(chain(b=Note(model="a", models={"first": "a", "hub": "owner/name"})))
    assert artifacts["b"].metrics["model"] == artifacts["a"].path
    assert artifacts["b"].metrics["models"] == {"first": artifacts["a"].path, "hub": "owner/name"}
    assert artifacts["b"].parents == {"a": "chain-a@1", "owner/name": "owner/name"}
    assert artifacts["c"].parents == {"b/note.txt": "chain-b@1"}


def test_only_one_stage():
    with pytest.raises(AlignError, match="stage 'b' needs a, which has not run"):
        run(chain(), only="b")
    with pytest.raises(AlignError, match=r"recipe 'chain' has no stage 'bb' \(did you mean 'b'\?\)"):
        run(chain(), only="bb")
    assert run(chain(), only="a")[0] == ["a"]
    ran, artifacts = run(chain(), only="b")
    assert ran == ["b"]
    assert artifacts.keys() == {"a", "b"}


def test_what_a_stage_leaves_behind():
    _, artifacts = run(chain())
    folder = Path(artifacts["b"].path)
    assert folder.parent == Path("out").resolve()
    assert {path.name for path in folder.iterdir()} == {"artifact.json", "config.yaml", "metrics.jsonl", "note.txt"}
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"stage": "note", **artifacts["b"].config}
    assert Artifact.read(folder) == artifacts["b"] == Registry().get("chain-b@1")
    assert artifacts["b"].versions.keys() >= {"align", "torch", "transformers"}


# -- failures ------------------------------------------------------------------------------------------------------------------


def test_a_stage_that_fails_registers_nothing_and_leaves_no_folder():
    with pytest.raises(AlignError, match="b: row 3 is"):
        run(chain(b=Note(model="a", fail=True)))
    assert RAN == ["a", "b"]
    assert [path.name.split("-")[0] for path in Path("out").glob("*/")] == ["a"]
    assert [a.reference for a in Registry().all()] == ["chain-a@1"]


def test_a_stage_that_fails_takes_away_no_file_that_was_there():
    Path("mine").mkdir()
    Path("mine/precious.txt").write_text("mine")
    with pytest.raises(AlignError):
        Run(Recipe("a", {"a": Note(fail=True)}), Path(), Path("mine")).execute()
    assert Path("mine/precious.txt").read_text() == "mine"
    assert Artifact.read(Path("mine")) is None


def test_the_manifest_is_written_last(monkeypatch):
    """Cut off at any moment before that, the stage has not run; then the same command runs it."""

    def cut_off(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Artifact, "write", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(chain())
    (folder,) = Path("out").glob("*/")
    assert {path.name for path in folder.iterdir()} == {"begun.json", "config.yaml", "metrics.jsonl", "note.txt"}
    assert reasons(chain())["a"] == "interrupted, starts again"
    assert run(chain())[0] == ["a", "b", "c"]
    assert Registry().get("chain-a").reference == "chain-a@1", "and it is not registered twice"


def test_a_folder_that_holds_another_result_is_not_overwritten():
    target = Path("mine")
    Run(Recipe("a", {"a": Note(text="1")}), Path(), target).execute()
    with pytest.raises(AlignError, match=r'holds another result \(a@1; changed: text "1" -> "2"\)'):
        Run(Recipe("a", {"a": Note(text="2")}), Path(), target).execute()
    assert (target / "note.txt").read_text() == "1"


# -- imports -------------------------------------------------------------------------------------------------------------------

RANKS = {"trainers": 1, "evaluation": 2, "stages": 2, "recipe": 3, "diagnostics": 3, "pipeline": 4, "report": 4, "chat": 4}
RANKS |= {"commands": 5, "cli": 6, "__main__": 7}
RANKS |= {
    f"runner.{name}": 4
    for name in ("plan", "launch", "view", "sweep", "worker", "zygote", "rank", "execute", "devices", "share", "launcher")
}
"""From the bottom up; what is not named stands below all of these. A module imports from its own rank and from lower ones, and no
two import each other, however long the way round. `recipe.main` alone reaches up, for scripts that hand their arguments to the
command line."""

ALLOWED = {("recipe", "cli"), ("runner.zygote", "runner.worker")}


def imports(path):
    """Every module that the file imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [name for name in inner if (ROOT / (name.replace(".", "/") + ".py")).is_file()]
            yield from files if len(files) == len(inner) else [node.module, *files]


def sources():
    for path in sorted((ROOT / "align").rglob("*.py")):
        yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removeprefix("align.")


def test_imports_point_one_way():
    graph = {
        module: {name.removeprefix("align.") for name in imports(path) if name.split(".")[0] == "align"} - {module}
        for path, module in sources()
    }
    used = {(module, other) for module, others in graph.items() for other in others} - ALLOWED
    assert [f"{a} imports {b}" for a, b in used if _rank(b) > _rank(a)] == []
    sorter = graphlib.TopologicalSorter({module: {b for a, b in used if a == module} for module in graph})
    sorter.prepare()  # raises where modules import each other in a circle, and names them


def _rank(module):
    return RANKS.get(module, RANKS.get(module.split(".")[0], 0))


def test_nothing_imports_what_trl_may_remove():
    assert not [f"{path}: {name}" for path, _ in sources() for name in imports(path) if name.startswith("trl.experimental")]
    assert not [path for path, _ in sources() if "trl.experimental" in path.read_text(encoding="utf-8")]


def loaded_by(statement):
    """Which heavy modules `statement` loads in a fresh interpreter."""
    heavy = ["torch", "transformers", "datasets", "peft", "trl", "accelerate", "matplotlib"]
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    return ast.literal_eval(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    )


def test_the_command_line_starts_without_torch():
    assert loaded_by("import align.cli, align.report") == []
    plan = "from align.cli import main; import io, contextlib; contextlib.redirect_stdout(io.StringIO()).__enter__(); "
    assert loaded_by(plan + "main(['run', 'compare', '--plan']); sys.stdout = sys.__stdout__") == []


def test_losses_need_torch_and_nothing_heavier():
    assert loaded_by("import align.losses") == ["torch"]
