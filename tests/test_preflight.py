"""Preflight: every planted fault is found and named, and its clean twin raises no alarm."""

import copy
import json
import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import add_begin, llama
from transformers import AutoConfig

from align import onednn, segments
from align.cli import main
from align.data import write_rows
from align.engine import enable_forest
from align.errors import AlignError
from align.forest import Tree, plant
from align.pipeline import Run
from align.preflight import memory
from align.preflight.cards import Machine, card, named_in
from align.preflight.checks import checks
from align.preflight.inspect import inspect, preflight
from align.preflight.labels import suspicious
from align.preflight.memory import Ledger, Skeleton, peak
from align.preflight.show import html, paths, terminal
from align.recipe import Recipe
from align.schema import PreferenceRow
from align.stages import GRPO, PPO, RLOO, SFT, Evaluate, Pairs, Preference, Pretrain, TaskTraining
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

NOUNS = ["cat", "mat", "sea", "king", "letter", "harbour", "train", "garden", "lamp", "river", "teacher", "ship", "town", "song"]
GOOD, BAD = ["thanks", "gladly", "certainly", "kindly"], ["whatever", "never", "nonsense", "shut"]


def sft_rows(count=60, seed=0):
    """Questions that share no run of five words, answers of uneven length."""
    rng = random.Random(seed)
    return [
        {"messages": [{"role": "user", "content": f"{i} {' '.join(rng.sample(NOUNS, 4))}?"},
                      {"role": "assistant", "content": " ".join(rng.choices(NOUNS, k=rng.randint(3, 9)))}]}
        for i in range(count)
    ]  # fmt: skip


def pairs(count=200, seed=0):
    """Pairs of which the longer answer is chosen as often as not, and a polite word tells the better one."""
    rng = random.Random(seed)

    def answer(words):
        return " ".join(rng.sample([*rng.choices(NOUNS, k=rng.randint(3, 9)), *rng.sample(words, 2)], k=5))

    return [
        {
            "prompt": f"{i} {' '.join(rng.sample(NOUNS, 4))}?",
            "chosen": answer(GOOD) + " thanks",
            "rejected": answer(BAD) + " nonsense",
        }
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    tokenizer = copy.deepcopy(tokenizer)
    llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_rows("sft.jsonl", sft_rows())
    write_rows("eval.jsonl", sft_rows(20, seed=9))
    write_rows("pairs.jsonl", pairs())
    return tokenizer


def found(**stages):
    """Everything found in the stages."""
    plan = Run(Recipe("r", stages), Path("runs")).plan()
    return [finding for each in inspect(plan) for finding in each.findings]


def findings(**stages):
    """Level and name of everything found in the stages."""
    return sorted({(finding.level, finding.check) for finding in found(**stages)})


def sft(**fields):
    return SFT(**{"model": "model", "data": "sft.jsonl", "eval_data": "eval.jsonl", "max_length": 128, **fields})


def dpo(**fields):
    return Preference(**{"model": "model", "data": "pairs.jsonl", "beta": 0.1, "max_length": 256, **fields})


def test_the_clean_twins_raise_no_alarm(folder):
    assert findings(sft=sft(), dpo=dpo()) == []


TASKS = {"classification": ("text", "label", ["cat", "mat"]), "ner": ("tokens", "tags", [["O", "B-X"], ["O", "O"]])}


def task(name, **fields):
    return TaskTraining(**{"task": name, "model": "model", "data": "own.jsonl", "eval_data": "held.jsonl", **fields})


def of_task(name, count=60, seed=0, labels=None):
    """Rows of a task, no two alike."""
    text, label, own = TASKS[name]
    said = [row["messages"][0]["content"] for row in sft_rows(count, seed)]
    texts = said if name == "classification" else [[said[i], "a"] for i in range(count)]
    return [{text: each, label: (labels or own)[i % 2]} for i, each in enumerate(texts)]


@pytest.mark.parametrize("name", TASKS)
def test_the_rows_of_a_task_are_looked_at(folder, name):
    """They were not: what stopped the stage came after the stages before it had run."""
    write_rows("own.jsonl", of_task(name))
    write_rows("held.jsonl", of_task(name, 20, seed=9))
    plan = Run(Recipe("r", {"task": task(name)}), Path("runs")).plan()
    (looked,) = inspect(plan, samples=2, machine=card("H100"))
    kind = "tagging" if name == "ner" else name
    assert (looked.about, looked.findings) == (f"task on 60 rows ({kind}), 20 held out", [])
    assert findings(task=task(name, max_length=9)) == [("warning", "truncated")]
    write_rows("own.jsonl", of_task(name) * 2)
    assert findings(task=task(name)) == [("warning", "duplicates")]
    write_rows("own.jsonl", of_task(name, 20, seed=9))
    assert findings(task=task(name)) == [("warning", "leaked_prompts")]
    for rows, said in (
        ([*of_task(name), {"text": "a"}], "own.jsonl row 61, "),
        (of_task(name, labels=TASKS[name][2][1:] * 2), "there is nothing to tell apart"),
    ):
        write_rows("own.jsonl", rows)
        (looked,) = inspect(Run(Recipe("r", {"task": task(name)}), Path("runs")).plan())
        assert [(finding.level, finding.check) for finding in looked.findings] == [("error", "input")]
        assert said in looked.findings[0].message


def test_a_template_without_an_end_token(folder):
    Path("endless.jinja").write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert findings(sft=sft(chat_template="endless.jinja")) == [("error", "encoding")]


def test_an_end_token_that_no_row_teaches(folder):
    """Every answer is cut."""
    endless = {"role": "assistant", "content": "one " * 99}
    write_rows("sft.jsonl", [{"messages": [row["messages"][0], endless]} for row in sft_rows()])
    assert findings(sft=sft()) == [("error", "end_token"), ("warning", "truncated")]


def test_no_template(folder):
    folder.chat_template = None
    folder.save_pretrained("model")
    Path("model/chat_template.jinja").unlink()
    assert findings(sft=sft()) == [("error", "encoding")]
    assert findings(sft=sft(chat_template="auto")) == []


def test_pad_is_eos(folder):
    folder.pad_token = folder.eos_token
    folder.save_pretrained("model")
    assert findings(sft=sft(), dpo=dpo()) == [("warning", "pad_is_eos")]


@pytest.mark.parametrize("where", ["template", "rows"])
def test_a_begin_token_that_comes_twice(folder, where):
    if where == "template":
        folder.chat_template = "{{ bos_token }}" + folder.chat_template
        folder.save_pretrained("model")
    else:
        rows = sft_rows()
        rows[0]["messages"][0]["content"] = "<|bos|>" + rows[0]["messages"][0]["content"]
        write_rows("sft.jsonl", rows)
        Path("bare.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert findings(sft=sft(chat_template="bare.jinja" if where == "rows" else None)) == [("warning", "doubled_begin")]


def test_a_begin_token_that_chat_leaves_out(folder):
    add_begin(folder).save_pretrained("model")
    assert findings(sft=sft()) == []  # the tokenizer adds it, the template writes it: the encoder takes one
    Path("bare.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert findings(sft=sft(chat_template="bare.jinja")) == [("warning", "missing_begin")]


def test_leaked_prompts(folder):
    write_rows("eval.jsonl", [*sft_rows(18, seed=9), *sft_rows()[:2]])
    assert findings(sft=sft()) == [("warning", "leaked_prompts")]


def test_prompts_that_leak_into_an_evaluation_of_the_recipe(folder):
    evaluation = {"models": {"sft": "sft"}, "data": "eval.jsonl", "perplexity_data": "eval.jsonl"}
    assert findings(sft=sft(eval_data=None), evaluate=Evaluate(**evaluation)) == []
    write_rows("eval.jsonl", sft_rows()[:2])
    assert findings(sft=sft(eval_data=None, held_out=0), evaluate=Evaluate(**evaluation)) == [("warning", "leaked_prompts")]


def test_leaks_are_looked_for_beside_what_another_stage_makes_and_beside_broken_rows(folder):
    write_rows("eval.jsonl", sft_rows()[:2])
    with Path("eval.jsonl").open("a") as file:
        file.write("{\n")
    made = {"pairs": Pairs(model="model", data="sft.jsonl", reward_funcs="length_band(low=1, high=9)")}
    evaluation = {"models": {"sft": "sft"}, "data": "pairs/held_out.jsonl", "perplexity_data": "eval.jsonl"}
    evaluate = Evaluate(on_bad_row="quarantine", **evaluation)
    assert findings(sft=sft(eval_data=None, held_out=0), **made, evaluate=evaluate) == [("warning", "leaked_prompts")]


def test_no_more_rows_are_looked_at_than_a_source_may_give(folder):
    plan = Run(Recipe("r", {"sft": sft(data=["sft.jsonl", "eval.jsonl"], max_rows_per_source=[7, None])}), Path("runs")).plan()
    (looked,) = inspect(plan)
    assert looked.about.startswith("sft on 27 rows (sft), 20 held out")  # 7 and all 20


def test_a_long_run_of_words_in_common_is_a_leak(folder):
    long = "the old lighthouse keeper wrote a letter to his sister every sunday evening by the window"

    def row(text):
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]}

    write_rows("sft.jsonl", [*sft_rows(), row(f"Translate this: {long}")])
    write_rows("eval.jsonl", [*sft_rows(19, seed=9), row(f"Who says: {long}?")])
    assert findings(sft=sft()) == [("warning", "leaked_prompts")]


def test_truncated_rows(folder):
    """30 % of the answers are longer than max_length."""
    rows = sft_rows()
    for row in rows[::3]:
        row["messages"][1]["content"] = " ".join(NOUNS * 8)
    write_rows("sft.jsonl", rows)
    assert findings(sft=sft()) == [("warning", "truncated")]


def test_rows_that_are_all_held_out(folder):
    write_rows("sft.jsonl", sft_rows()[:1] * 40)
    (finding,) = found(sft=sft(eval_data=None, held_out=0.999))
    assert (finding.check, finding.message) == (
        "input",
        "sft.jsonl: no row is left to train on after holding out 100% of the prompts",
    )


def test_the_split_that_trains_is_looked_at(folder):
    Path("splits").mkdir()
    write_rows("splits/train.jsonl", sft_rows())
    bad = sft_rows()
    for row in bad:
        row["messages"][1]["content"] = "..."
    write_rows("splits/validation.jsonl", bad)
    assert findings(sft=sft(data="splits")) == []
    assert ("warning", "empty_texts") in findings(sft=sft(data="splits", data_split="validation"))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_length_bias(folder, side):
    rows = pairs()
    for row in rows[: int(0.85 * len(rows))]:
        row[side] += " " + " ".join(NOUNS)
    write_rows("pairs.jsonl", rows)
    (finding,) = found(dpo=dpo())
    assert (finding.level, finding.check) == ("warning", "length_bias")
    assert finding.message.startswith(f"the {side} answer is the longer one in 9")


def test_swapped_labels(folder):
    """A fifth of the pairs, at random: the words of the rest tell which."""
    rows = pairs()
    swapped = random.Random(1).sample(range(len(rows)), len(rows) // 5)
    for i in swapped:
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    write_rows("pairs.jsonl", rows)
    assert findings(dpo=dpo()) == [("warning", "swapped_labels")]
    found = suspicious([PreferenceRow(**row) for row in rows])
    assert len(set(found) & set(swapped)) >= 0.9 * len(swapped)
    assert len(set(found) - set(swapped)) <= 0.02 * len(rows)


def test_pairs_that_say_the_opposite_of_others(folder):
    rows = pairs()
    write_rows("pairs.jsonl", [*rows, *({**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:10])])
    told = [finding.message for finding in found(dpo=dpo()) if finding.check == "swapped_labels"]
    assert "18 of 198 pairs (9.1%) say the opposite of another pair" in told  # of ten couples one is held out


def test_words_that_say_nothing_raise_no_suspicion(folder):
    rng = random.Random(0)

    def words():
        return " ".join(rng.sample(NOUNS, 6))

    rows = [PreferenceRow(prompt=str(i), chosen=words(), rejected=words()) for i in range(300)]
    assert suspicious(rows) == []


def test_margins_that_speak_against_their_pair(folder):
    rows = pairs()
    write_rows("pairs.jsonl", [{**row, "margin": -1.0 if i % 5 == 0 else 1.0} for i, row in enumerate(rows)])
    assert findings(dpo=dpo()) == [("warning", "swapped_labels")]


def test_mojibake(folder):
    rows = sft_rows()
    rows[7]["messages"][1]["content"] += " it’s naïve".encode().decode("cp1252")
    write_rows("sft.jsonl", rows)
    assert findings(sft=sft()) == [("warning", "mojibake")]
    rows[7]["messages"][1]["content"] = "it’s naïve"
    write_rows("sft.jsonl", rows)
    assert findings(sft=sft()) == []


def test_empty_answers(folder):
    rows = sft_rows()
    rows[7]["messages"][1]["content"] = " "
    write_rows("sft.jsonl", rows)
    assert findings(sft=sft()) == [("warning", "empty_texts")]
    rows[7]["messages"][1]["content"] = "7"
    write_rows("sft.jsonl", rows)
    assert findings(sft=sft()) == []


def test_duplicates(folder):
    write_rows("sft.jsonl", [*sft_rows(), *sft_rows(6)])
    assert findings(sft=sft()) == [("warning", "duplicates")]


def test_a_template_that_refuses_some_rows(folder):
    Path("strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    rows = sft_rows()
    rows[0]["messages"].insert(0, {"role": "system", "content": "be brief"})
    write_rows("sft.jsonl", rows)
    assert findings(sft=sft(chat_template="strict.jinja")) == [("warning", "encoding")]


def test_every_check_has_a_docstring():
    assert all((checks[name].__doc__ or "").strip() for name in checks)


# -- before a pipeline runs ------------------------------------------------------------------------------------------------------


def test_findings_that_were_damaged_are_written_anew(folder):
    write_rows("pairs.jsonl", [{**pair, "margin": -1.0} for pair in pairs()])
    Path("notes.json").write_text("{")
    assert preflight(Run(Recipe("r", {"dpo": dpo()}), Path("runs")).plan(), ["dpo"], Path("notes.json")) == {"dpo"}
    assert {note["stage"] for note in json.loads(Path("notes.json").read_text())} == {"dpo"}


def test_an_error_stops_the_run_before_anything_is_written(folder, capsys):
    recipe = Recipe("r", {"sft": sft(max_steps=1), "dpo": dpo(model="sft", data="sft.jsonl")})
    with pytest.raises(AlignError, match=r"dpo: sft\.jsonl row 1"):
        Run(recipe, Path("runs/r")).execute()
    assert not Path("runs/r").exists()


def test_warnings_are_said_and_do_not_stop_it(folder, capsys):
    write_rows("sft.jsonl", [*sft_rows(), *sft_rows(6)])
    Run(Recipe("r", {"sft": sft(max_steps=1)}), Path("runs/r")).execute()
    said = capsys.readouterr().err
    assert said.count("sft: warning: duplicates: 6 of 66 rows (9.1%) repeat another.") == 1


def test_what_a_stage_makes_is_looked_at_before_the_next_one_uses_it(folder, capsys):
    """The rows of the second stage do not exist when the run begins."""
    from typing import Any

    from align.stages.base import Context, DataRefs, Stage, stage, stages

    @stage("repeats_rows")
    class Repeats(Stage):
        """Writes rows that repeat each other."""

        data: DataRefs
        """Unused."""

        def run(self, context: Context) -> dict[str, Any]:
            write_rows(context.folder / "rows.jsonl", sft_rows(5) * 8)
            return {}

    try:
        recipe = Recipe("r", {"made": Repeats(data="sft.jsonl"), "sft": sft(data="made/rows.jsonl", eval_data=None, max_steps=1)})
        (made, looked) = inspect(Run(recipe, Path("runs/r")).plan())
        assert made.about == "trains nothing"
        assert looked.about == "not looked at yet: its rows are made by the stage 'made'"
        beside = f"{Run(recipe, Path('runs/r')).plan()[0].folder}x"  # no part of that folder, for all that its name begins so
        Path(beside).mkdir(parents=True)
        write_rows(f"{beside}/rows.jsonl", sft_rows(5) * 8)
        other = Recipe("r", {**recipe.stages, "sft": sft(data=f"{beside}/rows.jsonl", eval_data=None, max_steps=1)})
        assert not inspect(Run(other, Path("runs/r")).plan())[1].about.startswith("not looked at yet")
        Run(recipe, Path("runs/r")).execute()
    finally:
        del stages._entries["repeats_rows"]
    assert capsys.readouterr().err.count("sft: warning: duplicates") == 1


def test_a_parameter_of_another_loss_is_found_before_the_pairs_are_made(folder):
    after = Preference(model="sft", data="pairs/preferences.jsonl", loss="orpo", beta=0.1)
    assert findings(sft=sft(), pairs=Pairs(model="sft", data="sft.jsonl", reward_funcs=["repetition"]), orpo=after) == [
        ("error", "input")
    ]


@pytest.mark.parametrize("stage", [PPO, GRPO, RLOO, Pairs])
def test_answers_that_nothing_judges_are_found_before_the_policy_is_trained(folder, stage):
    asked = {"model": "sft", "data": "sft.jsonl"}
    assert findings(sft=sft(), after=stage(**asked)) == [("error", "input")]
    assert findings(sft=sft(), after=stage(**asked, reward_funcs=["repetition"], reward_weights=[1, 2])) == [("error", "input")]
    assert findings(sft=sft(), after=stage(**asked, reward_funcs=["repetition"])) == []


@pytest.mark.parametrize("stage", [PPO, GRPO])
def test_a_column_that_a_reward_lacks_is_found_before_the_policy_is_trained(folder, stage):
    """The run met it only when the stage itself had begun, after all that it stands on."""
    fields = {"model": "sft", "data": "prompts.jsonl", "reward_funcs": ["exact_match"]}
    write_rows("prompts.jsonl", [{"prompt": f"{i} {noun}?", "answers": "yes"} for i, noun in enumerate(NOUNS)])
    with pytest.raises(AlignError, match=r"last: reward 'exact_match' needs a column 'answer' \(did you mean 'answers'"):
        Run(Recipe("t", {"sft": sft(), "last": stage(**fields)}), Path("runs")).execute()
    assert not list(Path("runs").glob("sft-*"))


def test_a_model_that_is_yet_to_be_trained_speaks_through_its_base(folder):
    """The tokenizer and the template of a stage's output are known before it runs."""
    folder.chat_template = None
    folder.save_pretrained("model")
    Path("model/chat_template.jinja").unlink()

    def said(role, text):
        return [{"role": role, "content": text}]

    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    chat = [{side: said(role, row[side]) for side, role in roles.items()} for row in pairs()]
    write_rows("pairs.jsonl", chat)
    assert findings(sft=sft(), dpo=dpo(model="sft")) == [("error", "encoding")]
    assert findings(sft=sft(chat_template="plain"), dpo=dpo(model="sft")) == []


# -- what is shown -----------------------------------------------------------------------------------------------------------------


def test_what_carries_a_loss_is_marked(tokenizer):
    from align.encode import Encoder
    from align.schema import Message, SFTRow

    encoder = Encoder(tokenizer)
    turns = [Message(role="user", content="<b> one"), Message(role="assistant", content="two")]
    (tree,) = encoder.sft([SFTRow(messages=turns)]).trees
    (pieces,) = paths(encoder, tree)
    assert pieces == [("<|bos|>User: <b> one\nAssistant:", False), (" two<|eos|>", True)]
    assert html(pieces).endswith("<mark> two&lt;|eos|&gt;</mark>")
    assert "&lt;b&gt;" in html(pieces)
    assert terminal(pieces, colour=False).endswith("Assistant:⟦ two<|eos|>⟧")
    assert terminal(pieces, colour=True).endswith("\033[32m two<|eos|>\033[0m")
    (pair,) = encoder.preference([PreferenceRow(prompt="a", chosen=" b", rejected=" c")]).trees
    assert [path[-1] for path in paths(encoder, pair)] == [(" b<|eos|>", True), (" c<|eos|>", True)]


@pytest.fixture
def recipe(folder):
    stages = {"sft": {"stage": "sft", "model": "model", "data": "sft.jsonl", "max_length": 128}}
    Path("recipe.yaml").write_text(json.dumps({"name": "mine", "stages": stages}))
    return "recipe.yaml"


def test_the_command(recipe, capsys):
    assert main(["check", recipe, "--json", "--gpu", "H100", "--samples", "1", "--html", "page.html"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["errors"], found["warnings"]) == ("mine", 0, 0)
    (stage,) = found["stages"]
    assert stage["estimate"]["machine"] == "H100"
    assert stage["estimate"]["peak_bytes"] > stage["estimate"]["states_bytes"] / 2 > 0
    assert "<mark>" in stage["samples"][0]
    assert "<mark>" in Path("page.html").read_text()
    assert {path.name for path in Path("home").glob("*")} <= {"cache"}  # fingerprints of code, where no test before left them


def test_a_plan_with_estimates(recipe, capsys):
    """Those of `align check`, of what would run."""
    assert main(["run", recipe, "--estimate", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert main(["check", recipe, "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    assert row["runs"]
    assert row["estimate"]["phases"] == stage["estimate"]["phases"]
    assert row["no_estimate"] is stage["no_estimate"] is None
    assert not Path("runs").exists()
    assert main(["sft", "--model", "model", "--data", "sft.jsonl", "--max_length", "128", "--tuning", "prompt", "--estimate"]) == 0
    assert "\n      no estimate: virtual tokens in front of the rows have none" in capsys.readouterr().out


def test_the_command_says_what_to_do(recipe, capsys):
    assert main(["check", recipe, "--set", "sft.max_length=24"]) == 1
    page = capsys.readouterr().out
    assert "error: lengths: none of the rows can be used: 57 rows = 0 used + 57 set aside" in page
    assert "Raise max_length" in page
    assert page.splitlines()[-1].startswith("mine: 1 errors, ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--only", "stf"], "recipe 'mine' has no stage 'stf' (did you mean 'sft'?)"),
        (["--html", "."], ". is a folder: name a file in it"),
        (["--html", "sft.jsonl/page.html"], "sft.jsonl is a file, not a folder"),
        (["--samples", "-1"], "--samples -1"),
    ],
)
def test_flags_of_the_command_that_do_not_fit_are_one_line(recipe, capsys, flags, said):
    assert main(["check", recipe, *flags]) == 2
    out, error = capsys.readouterr()
    assert said in error
    assert (out, error.count("\n")) == ("", 1)


def test_the_page_makes_its_folder(recipe):
    assert main(["check", recipe, "--only", "sft", "--samples", "0", "--html", "new/page.html"]) == 0
    assert "preflight" in Path("new/page.html").read_text()


def test_time_is_that_of_the_tokens_in_the_rows(folder):
    """A step that is larger than all rows has no more of them, and of a long document every block counts."""
    write_rows("short.jsonl", [{"text": " ".join(NOUNS)}] * 40)
    write_rows("long.jsonl", [{"text": " ".join(NOUNS * 10)}] * 40)
    text = {"model": "model", "max_length": 16, "learning_rate": 1e-3, "held_out": 0.0}
    stages = {
        "small": sft(per_device_train_batch_size=1, held_out=0.0),
        "large": sft(per_device_train_batch_size=512, held_out=0.0),
        "steps": sft(per_device_train_batch_size=8, max_steps=10, held_out=0.0),
        "short": Pretrain(data="short.jsonl", **text),
        "long": Pretrain(data="long.jsonl", **text),
    }
    plan = Run(Recipe("r", stages), Path("runs")).plan()
    seconds = {each.name: each.estimate.seconds for each in inspect(plan, machine=card("H100"))}
    assert seconds["large"] == seconds["small"]
    assert seconds["steps"] == pytest.approx(seconds["small"] * 10 * 8 / len(sft_rows()))
    assert seconds["long"] / seconds["short"] == pytest.approx(10, rel=0.15)


def test_what_samples_is_estimated_by_its_own_batches(folder):
    """GRPO takes as many answers as PPO with the settings that it amounts to, and on an H100 16 bits are 15 times as fast."""
    shared = {"model": "model", "data": "sft.jsonl", "eval_data": "eval.jsonl", "reward_funcs": "length_band(low=1, high=9)"}
    shared |= {"max_length": 128, "max_completion_length": 32}
    batches = {"episodes_per_step": 32, "num_generations": 8, "num_mini_batches": 1, "total_episodes": 15 * 32}
    stages = {
        "ppo": PPO(**shared, **batches, advantage_estimator="grpo"),
        "ppo16": PPO(**shared, **batches, advantage_estimator="grpo", bf16=True),
        "grpo": GRPO(**shared, per_device_train_batch_size=32),  # of 60 prompts 8 answers each: 15 batches of 32
    }
    looked = inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=card("H100"))
    estimates = {each.name: each.estimate for each in looked}
    assert estimates["grpo"].parts == estimates["ppo"].parts
    assert estimates["grpo"].seconds == estimates["ppo"].seconds
    assert estimates["ppo"].seconds / estimates["ppo16"].seconds == pytest.approx(989 / 66.9)
    assert estimates["ppo"].made_of["optimizer"] == 2 * estimates["ppo"].made_of["weights"]  # two moments of each weight


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "d_model": 32,
    "d_ff": 32,
    "d_kv": 16,
    "num_hidden_layers": 1,
    "n_layer": 1,
    "n_head": 2,
}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("bloom", "bloom models have none: a pass without weights fails ("),
        ("gptj", "gptj models have none: a pass without weights fails ("),
        ("t5", "encoders, encoder-decoders and tasks have none"),
        ("distilbert", "encoders, encoder-decoders and tasks have none"),
    ],
)
def test_what_cannot_be_estimated_is_told(folder, kind, told):
    """`align check` ended in a traceback."""
    AutoConfig.for_model(kind, **SIZES).save_pretrained("model")
    write_rows("text.jsonl", [{"text": f"{i} {' '.join(NOUNS)}"} for i in range(40)])
    stages = {"text": Pretrain(model="model", data="text.jsonl", max_length=16, learning_rate=1e-3, held_out=0.1)}
    (looked,) = inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=card("H100"))
    assert looked.estimate is None
    assert looked.outlook.startswith(f"no estimate: {told}")


@pytest.fixture
def llama_8b(folder):
    """Its config as the model; weights there are none."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    AutoConfig.for_model("llama", vocab_size=128256, **sizes).save_pretrained("model")


def test_a_model_too_large_for_a_card(llama_8b):
    plan = Run(Recipe("r", {"full": sft(), "lora": sft(use_peft=True, dtype="bfloat16", bf16=True)}), Path("runs")).plan()
    full, lora = inspect(plan, machine=card("rtx 4090"))
    assert [(finding.level, finding.check) for finding in full.findings] == [("error", "memory")]
    assert full.estimate.states == pytest.approx(16 * 8.03e9, rel=0.01)  # 4 fp32 numbers for each of 8.03 billion parameters
    assert lora.estimate.states == pytest.approx(2 * 8.03e9, rel=0.05)
    assert all(finding.level == "warning" for finding in lora.findings)
    with pytest.raises(AlignError, match=r"unknown card 'H10' \(did you mean 'H100'\?\)"):
        card("H10")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100-40GB"),  # both A100s are as fast, and its memory is asked of the device
        ("NVIDIA A10", "A10"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("Tesla T4", "T4"),
        ("Quadro T400", None),
    ],
)
def test_a_card_is_known_by_its_whole_name(device, name):
    assert named_in(device) == name


def forest_of(pairs):
    """`pairs` trees of a prompt of 10 tokens and two answers of 20 and 15: 45 tokens each, none shared."""
    return plant([Tree([5 + i] * 10, ([6] * 20, [7] * 15)) for i in range(pairs)])


def test_the_ledger_counts_what_is_alive():
    """Of 10 and 20 fp32 numbers, 40 and 80 bytes; views and changes in place take nothing."""
    with Ledger() as ledger:
        x = torch.zeros(10)
        y = torch.cat([x, x.view(2, 5).flatten()])
        y.add_(1)[3:].mul_(2)
        assert (ledger.held, ledger.peak) == (120, 120)
        del y
        assert (ledger.held, ledger.peak) == (40, 120)


@pytest.mark.parametrize("worth", [0, 1e9], ids=["segments", "buckets"])
@pytest.mark.parametrize("tuning", [Tuning(), Tuning("lora", {"r": 2})], ids=["full", "lora"])
def test_a_pass_without_data_takes_what_one_with_data_takes(tuning, worth, monkeypatch):
    """The same ledger over the engine's own pass, with attention both ways and the real head."""
    monkeypatch.setattr(segments, "WORTH", worth)
    forest = forest_of(40)
    imagined = peak([Skeleton(llama().config, tuning=tuning, gpu=True)], forest)
    cpu = Skeleton(llama().config, tuning=tuning)
    with Ledger() as meant:
        cpu.forward(forest).backward()
    model = tune(llama(), tuning)
    assert enable_forest(model) is None
    model.train()
    with Ledger() as ledger:
        (-model(forest=forest).logps.mean()).backward()
    assert meant.peak == pytest.approx(ledger.peak, rel=0.1)
    assert imagined < meant.peak  # FlashAttention shares keys between heads


def test_16_bits_are_counted_as_they_run(monkeypatch):
    """In the family's own passes, which keep more than those that stand for them in fp32."""
    monkeypatch.setattr(memory, "HALF", 1.0)
    cpu = Skeleton(llama().config)
    assert peak([replace(cpu, bf16=True)], forest_of(40)) > peak([cpu], forest_of(40))


def test_what_memory_grows_with(monkeypatch):
    """Weights, gradients and moments are exact, activations grow with the tokens, and checkpointing, LoRA and 16 bits take less."""
    config = llama().config
    full = Skeleton(config, gpu=True)
    parameters = sum(p.numel() for p in llama().parameters())
    assert full.weights == full.gradients == 4 * parameters
    one = peak([full], forest_of(40))
    assert 1.9 < peak([full], forest_of(80)) / one < 2.1
    assert peak([full], forest_of(40), times=2) == pytest.approx(one + full.gradients, rel=0.05)
    assert peak([full], forest_of(40), backward=False) < one / 2
    assert peak([replace(full, checkpointing=True)], forest_of(40)) < one
    assert peak([replace(full, bf16=True)], forest_of(40)) < one
    assert peak([replace(full, gpu=False)], forest_of(40)) > one
    matrices = sum(module.weight.numel() for module in llama().modules() if isinstance(module, torch.nn.Linear))
    monkeypatch.setattr(onednn, "faster_packed", lambda: True)
    assert replace(full, gpu=False).packed == 4 * matrices
    assert full.packed == replace(full, gpu=False, bf16=True).packed == replace(full, gpu=False, dtype="bfloat16").packed == 0
    monkeypatch.setattr(onednn, "faster_packed", lambda: False)
    assert replace(full, gpu=False).packed == 0
    lora = replace(full, tuning=Tuning("lora", {"r": 2}))
    assert lora.gradients < full.gradients / 5
    assert lora.weights == full.weights + lora.gradients
    frozen = replace(full, tuning=None)
    assert (frozen.weights, frozen.gradients) == (full.weights, 0)


def test_processes_of_a_launch_share_what_it_divides(llama_8b):
    """By docs/scaling.md 8B take 16 bytes a parameter on every GPU under ddp, a share of them under fsdp2, and gradients and
    moments in shares under zero2; of time each takes its part, and the weights are whole in each once, when they are loaded.
    """
    strategies = {"ddp": "ddp", "zero2": "deepspeed-zero2", "fsdp2": "fsdp2"}
    stages = {name: sft(launch={"num_processes": 8, "strategy": strategy}) for name, strategy in strategies.items()}
    alone, *shared = inspect(Run(Recipe("r", {"alone": sft(), **stages}), Path("runs")).plan(), machine=card("B200"))
    ddp, zero2, fsdp2 = (each.estimate for each in shared)
    gradients = 4 * 8.03e9
    assert ddp.states == pytest.approx(4 * gradients, rel=0.01)
    assert zero2.states == pytest.approx(gradients + 3 * gradients / 8, rel=0.01)
    assert fsdp2.states == pytest.approx(gradients, rel=0.01)
    training = [each.parts["training"] for each in (alone.estimate, ddp, zero2, fsdp2)]
    copied, halves, layers = (b - a for a, b in pairwise(training))
    assert copied == pytest.approx(gradients, rel=0.01)  # what DDP sends
    assert halves == pytest.approx(-gradients - 3 * 7 / 8 * gradients, rel=0.01)
    # Embedding, head and two layers of 32 are whole, with their gradients, for a while.
    whole = 2 * 4 * (2 * 128256 * 4096 + 2 * 218.1e6)
    assert layers == pytest.approx(-7 / 8 * gradients + 7 / 8 * whole, rel=0.01)
    assert [each.seconds for each in (ddp, zero2, fsdp2)] == [pytest.approx(alone.estimate.seconds / 8)] * 3
    assert [each.machine.name for each in (ddp, fsdp2)] == ["B200, each of 8 processes"] * 2


def test_the_models_of_ppo(llama_8b):
    """By docs/scaling.md the policy takes 16 bytes a parameter, the reference 4 and a critic of its own 16 (it has a head of scores
    in place of the one of words, of 0.53 billion numbers); with LoRA all of them are one base.
    """
    fields = {"model": "model", "data": "sft.jsonl", "reward_funcs": "length_band(low=1, high=9)", "total_episodes": 128}
    launch = {"num_processes": 8, "strategy": "ddp"}
    lora = {"critic": "adapter", "tuning": "lora", "dtype": "bfloat16", "bf16": True}
    stages = {
        "separate": PPO(**fields, critic="separate", launch=launch),
        "shards": PPO(**fields, critic="separate", launch={**launch, "strategy": "fsdp2"}),
        "shared": PPO(**fields, critic="shared", launch=launch),
        "lora": PPO(**fields, **lora, launch=launch),
    }
    looked = inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=card("B200"))
    separate, shards, shared, lora = (each.estimate.states / 8.03e9 for each in looked)
    assert separate == pytest.approx(16 + 4 + 16 * (1 - 128256 * 4096 / 8.03e9), rel=0.01)
    assert shards == pytest.approx(separate / 8, rel=0.01)
    assert shared == pytest.approx(16 + 4, rel=0.01)
    assert lora == pytest.approx(2, rel=0.05)


def test_whole_weights_that_fit_no_card_are_what_is_told(llama_8b, folder):
    """8.03 billion numbers in float32 are 29.9 GiB, which each process loads before fsdp2 divides them, and 15.0 in bfloat16, to
    which full training adds 44.9.
    """
    eight = {"launch": {"num_processes": 8, "strategy": "fsdp2"}}
    half = {"dtype": "bfloat16", "bf16": True}
    ppo = PPO(model="model", data="sft.jsonl", reward_funcs="length_band(low=1, high=9)", total_episodes=128, **half)
    stages = {"alone": sft(), "shared": sft(**eight), "half": sft(**half), "ppo": ppo}
    looked = inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=card("rtx 4090"))
    found = {each.name: finding for each in looked for finding in each.findings if finding.check == "memory"}
    whole = "every process loads the whole weights, which alone take 29.9 GB of 24.0 GB"
    assert found["alone"].message == found["shared"].message == whole
    assert found["alone"].advice == "Set dtype bfloat16, or take a smaller model, or a larger GPU"
    states = "weights, gradients and optimizer alone take "
    assert found["half"].message == states + "59.8 GB of 24.0 GB"
    assert found["ppo"].message.startswith(states)
    assert all("fsdp2" in found[name].advice for name in ("half", "ppo"))


def test_a_policy_in_shards_is_whole_while_it_samples(llama_8b):
    """Of 32 GB of weights, as much each for reference, gradients and critic, an eighth; the policy's are gathered to sample."""
    ppo = partial(PPO, model="model", data="sft.jsonl", reward_funcs="length_band(low=1, high=9)", total_episodes=128)
    stages = {name: ppo(launch={"num_processes": 8, "strategy": name}) for name in ("ddp", "fsdp2")}
    ddp, fsdp2 = (each.estimate for each in inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=card("B200")))
    weights, critic = 4 * 8.03e9, 4 * 7.5e9
    assert ddp.states == pytest.approx(5 * weights + 4 * critic, rel=0.01)
    assert fsdp2.states == pytest.approx(ddp.states / 8, rel=0.01)
    gained = 7 / 8 * (2 * weights + critic + 2 * (weights + critic))  # policy, reference, critic, moments
    assert ddp.parts["sampling"] - fsdp2.parts["sampling"] == pytest.approx(gained - 7 / 8 * weights, rel=0.01)


def test_processes_on_a_cpu_share_its_memory_and_cores(folder):
    """So a step takes as long as in one process, and of a GPU machine's cards each has its own."""
    launch = {"num_processes": 2, "strategy": "ddp"}
    stages = {"alone": sft(), "two": sft(launch=launch)}
    machine = Machine("box", 1e9, 1e9, 1e9, gpu=False)
    alone, two = inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=machine)
    assert two.estimate.seconds == pytest.approx(alone.estimate.seconds)
    small = Machine("box", 1.5 * alone.estimate.peak, 1e9, 1e9, gpu=False)
    alone, two = inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=small)
    assert [finding.check for finding in alone.findings] == []
    assert [finding.check for finding in two.findings] == ["memory"]


def test_answers_of_a_round_are_dealt_to_its_processes(folder):
    shared = {"model": "model", "data": "sft.jsonl", "eval_data": "eval.jsonl", "reward_funcs": "length_band(low=1, high=9)"}
    shared |= {"max_length": 128, "max_completion_length": 32, "episodes_per_step": 64, "total_episodes": 640}
    stages = {"alone": PPO(**shared), "four": PPO(**shared, launch={"num_processes": 4})}
    alone, four = (each.estimate for each in inspect(Run(Recipe("r", stages), Path("runs")).plan(), machine=card("H100")))
    assert four.tokens < alone.tokens / 2
    assert four.parts["sampling"] < alone.parts["sampling"]
    assert four.seconds == pytest.approx(alone.seconds / 4)
