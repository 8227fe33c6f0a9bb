"""The tutorial, step by step as it is written, on a demo that is shrunk to seconds."""

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers import llama

from align.cli import main
from align.data import write_rows
from align.models import save_model
from align.pipeline import Run
from align.recipe import Recipe
from align.registry import Registry
from align.stages import SFT, Preference

PAGE = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A folder with the tutorial's files, and a finished run of the name `demo`."""
    folder = tmp_path_factory.mktemp("tutorial")
    for language, named, saved in (("python", "shout.py", 0), ("jsonl", "questions.jsonl", 0), ("jsonl", "mine.jsonl", 1)):
        blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        (folder / named).write_text(blocks[saved], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ALIGN_HOME", str(folder / "runs"))
        save_model(llama(), tokenizer, folder / "base")
        write_rows("rows.jsonl", [{"instruction": f"Say {n}.", "output": f"{n} cats"} for n in range(8)])
        write_rows("pairs.jsonl", [{"prompt": f"Say {n}.", "chosen": "hello", "rejected": "a mat"} for n in range(8)])
        policy = {"data": "pairs.jsonl", "beta": 0.1, "max_steps": 2, "held_out": 0, "model": "sft"}
        stages = {"sft": SFT(model="base", data="rows.jsonl", max_steps=2, held_out=0)}
        stages |= {name: Preference(**policy, seed=seed) for seed, name in enumerate(("dpo", "ppo"))}
        Run(Recipe("demo", stages), Path("runs/demo")).execute()
    return folder


def test_every_step_runs_as_it_is_written(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGN_HOME", str(folder / "runs"))
    said = iter(["What color is the norlet?", "a"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said, "/quit"))
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        assert program == "align"
        assert main(arguments) == 0, f"{command}: {capsys.readouterr().err}"
    assert {"shouter", "mine"} <= set(Registry().names())
    (vote,) = Path("votes.jsonl").read_text().splitlines()
    assert json.loads(vote)["prompt"][0]["content"] == "What color is the norlet?"
