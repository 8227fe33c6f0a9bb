"""What README.md and docs/ say is true: commands plan, examples run, links lead somewhere, no knob is left out."""

import contextlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
from helpers import llama
from transformers import AutoModelForSequenceClassification

from align.cli import main, parser
from align.data import load_rows, write_rows
from align.errors import AlignError
from align.losses import PreferenceLogps, preference_losses
from align.pipeline import Run
from align.recipe import load_recipe
from align.registry import Registry
from align.stages import PPO, stages
from align.trainers.settings import PPOSettings
from align.tuning.strategies import strategies

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands():
    for page in PAGES:
        for block in blocks(page, "(?:sh|bash|shell|console)"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(("align ", "python ")):
                    yield pytest.param(line, id=f"{page.name}: {' '.join(line.split())}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """What the commands in the pages speak of. A block that begins with ``# NAME`` is a file of that name."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("stories260k", "runs/sft", "runs/reward", "runs/ner"):
        llama().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    judge = AutoModelForSequenceClassification.from_pretrained(folder / "runs/sft", num_labels=1)
    judge.save_pretrained(folder / "runs/reward")
    write_rows(folder / "alpaca.jsonl", [{"instruction": "Say one.", "input": "", "output": "One."}] * 3)
    for name in ("pairs.jsonl", "votes.jsonl"):
        write_rows(folder / name, [{"prompt": "Say one.", "chosen": "One.", "rejected": "Two."}])
    write_rows(folder / "prompts.jsonl", [{"prompt": "Say one."}])
    for name in ("corpus.txt", "stories.txt"):
        (folder / name).write_text("One text.\n\nAnother text.\n")
    write_rows(folder / "labelled.jsonl", [{"text": "One text.", "label": "positive"}])
    write_rows(folder / "questions.jsonl", [{"prompt": "Say one."}])
    write_rows(folder / "mine.jsonl", [{"instruction": "Say one.", "output": "One."}])
    write_rows(folder / "tagged.jsonl", [{"tokens": ["One", "text"], "tags": ["O", "O"]}])
    write_rows(folder / "asked.jsonl", [{"question": "Which?", "context": "One text.", "answers": ["One"]}])
    for page in PAGES:
        for block in (*blocks(page, "python"), *blocks(page, "yaml")):
            if named := re.match(r"# (\w+\.(?:py|yaml))\n", block):
                (folder / named[1]).write_text(block)
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("command", commands())
def test_a_command_parses_and_plans(command, capsys, folder):
    program, *arguments = shlex.split(command, comments=True)
    if program == "python":
        script, *arguments = arguments
        arguments = ["run", str(ROOT / script if script.startswith("pipelines/") else script), *arguments]
    if arguments[0] in ("chat", "serve", "ui"):  # these go on until they are told to stop
        assert parser().parse_known_args(arguments)[1] == []
        return
    if arguments[0] in ("models", "report", "doctor", "data", "check", "status"):
        code = main(arguments)
        found = capsys.readouterr().err
        assert code == 0 or re.search("no model 'demo-|no model 'runs/demo|has no 'demo-|no run folder", found)
        return
    needs = dict.fromkeys(("my-dpo", "demo-sft"), "runs/sft")
    for name in needs.keys() & set(arguments):
        assert main(["models", "alias", name, needs[name]]) == 0
    plans = [] if {"--plan", "--help", "export"} & set(arguments) else ["--plan"]
    assert main([*arguments, *plans]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    assert Registry().all() == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    named = set(re.findall(r"`((?:align|pipelines|data|tests|docs)/[\w/.-]*\w)/?`", page.read_text(encoding="utf-8")))
    made_up = {"data/samples/<name>.jsonl", "docs/results.md"}
    assert not {name for name in named - made_up if not (ROOT / name).exists()}


def test_the_map_of_the_readme_is_the_house():
    text = README[README.index("## The map") : README.index("## Adding to it")]
    files = {path.name for path in (ROOT / "align").glob("*.py")} - {"__init__.py", "__main__.py", "errors.py", "catalog.py"}
    assert {name for name in files if name not in text} <= {"progress.py", "tokenizers.py", "schema.py", "turns.py"}
    listed = set(re.findall(r"\w+\.py", text))
    assert {name for name in listed if not list((ROOT / "align").rglob(name))} == set()
    for path in (ROOT / "pipelines").glob("*.py"):
        assert path.stem in text


def test_the_readme_opens_with_the_two_commands():
    assert README.index("make demo") < README.index("make test") < README.index("## ")


# -- the examples of the README ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def temporarily(catalog):
    """Take back what an example registers."""
    before = dict(catalog._entries)
    try:
        yield
    finally:
        catalog._entries.clear()
        catalog._entries.update(before)


def example(word):
    (block,) = [block for block in blocks(ROOT / "README.md", "python") if word in block]
    namespace = {"__name__": "an_example"}
    exec(compile(block, "README.md", "exec"), namespace)
    return namespace


def test_the_reward():
    brevity = example("def brevity")["brevity"]
    assert brevity(["a"] * 4, ["", "one two", " word" * 25, [{"role": "assistant", "content": "word " * 99}]]) == [
        0.0,
        1.0,
        0.5,
        0.0,
    ]


def test_adding_a_loss():
    """At beta 0.5, log-ratios 2 and -2: the margin is 0.5 (2 + 2) = 2, the loss e^-2 = 0.1353."""
    import torch

    one = torch.ones(1)
    with temporarily(preference_losses):
        example("def exponential")
        preference_losses.check_arguments("exponential", {"beta": 0.5})
        result = preference_losses["exponential"](PreferenceLogps(-one, -3 * one, one, one, -3 * one, -one), beta=0.5)
    assert result.loss.item() == pytest.approx(0.135335, abs=1e-6)


def test_adding_a_reward():
    from align.rewards import rewards

    with temporarily(rewards):
        example("def starts_with")
        with pytest.raises(AlignError, match="'starts_with' needs 'word'"):
            rewards.check_arguments("starts_with", {})


def test_adding_a_format(tmp_path):
    from align.formats import formats

    write_rows(tmp_path / "log.jsonl", [{"query": "Who?", "good": "Ada.", "bad": "No."}])
    with temporarily(formats):
        example("def search_log")
        loaded = load_rows(tmp_path / "log.jsonl", "preference")
    assert loaded.format == "search_log"
    assert loaded.rows[0].chosen[0].content == "Ada."


def test_the_examples_of_the_metrics_page():
    from align.metrics import metrics

    with temporarily(metrics):
        for block in blocks(ROOT / "docs" / "metrics.md", "python"):
            exec(compile(block, "metrics.md", "exec"), {"__name__": "an_example"})


def test_every_metric_and_task_is_in_its_table():
    from align.metrics import metrics
    from align.tasks import tasks

    for catalog, page in ((metrics, "metrics.md"), (tasks, "tasks.md")):
        rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(catalog)


def test_adding_a_stage(tmp_path):
    from align.recipe import Recipe

    with temporarily(stages):
        shortest = example("class Shortest")["Shortest"]
        assert stages["shortest"] is shortest
        write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b" * n} for n in (5, 2, 9)])
        recipe = Recipe("try", {"short": shortest(data=f"{tmp_path}/rows.jsonl", keep=2)})
        artifact = Run(recipe, tmp_path / "out").execute()["short"]
    assert artifact.metrics == {"rows": 3, "kept": 2}
    assert [row.completion for row in load_rows(f"{artifact.path}/rows.jsonl", "sft").rows] == ["bb", "bbbbb"]


# -- the other pages -----------------------------------------------------------------------------------------------------------


def test_the_two_recipes_of_the_pipelines_page_are_one():
    assert load_recipe("tune.py") == load_recipe("tune.yaml")


def test_the_stage_of_the_pipelines_page_works(tmp_path):
    artifacts = Run(load_recipe("count.py", {"data": "alpaca.jsonl"}), tmp_path / "out").execute("short")
    assert artifacts["short"].metrics == {"rows": 3, "short": 3}


def test_every_knob_of_ppo_is_explained_with_its_default():
    page = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    for name, info in PPOSettings.model_fields.items():
        (default,) = re.findall(rf"^\| `{name}` \| (.*?) \|", page, re.MULTILINE)
        if isinstance(info.default, bool):
            assert default == str(info.default).lower()
        elif info.default is not None:
            assert default.strip("`") == str(info.default)


def test_the_arguments_of_a_tuning_are_listed_with_their_defaults():
    page, told = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8"), {}
    for name, row in re.findall(r"^\| `(\w+)`.*?\|(.*)$", page[: page.index("## Where each works")], re.MULTILINE):
        told |= {(name, argument): float(default) for argument, default in re.findall(r"`(\w+)` \((\d+)\)", row)}
    assert len(told) == 7
    defaults = {(name, argument): inspect.signature(strategies[name]).parameters[argument].default for name, argument in told}
    assert told == defaults


def test_every_name_that_ppo_logs_is_explained():
    page = (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "align" / "trainers" / "ppo").glob("*.py"))
    logged = set(re.findall(r'"((?:objective|policy|loss|val|completions)/\w+)"', source))
    assert len(logged) > 10
    assert {name for name in logged if f"`{name}`" not in page} == set()
    assert set(re.findall(r"`((?:objective|policy|loss|val|completions)/\w+)`", page)) == logged


def test_pages_name_no_field_that_is_not_there():
    fields = {name for stage in stages for name in stages[stage].model_fields}
    assert set(re.findall(r"--(\w+) ", (ROOT / "docs" / "ppo.md").read_text(encoding="utf-8"))) <= fields
    assert PPO.model_fields.keys() >= PPOSettings.model_fields.keys()
