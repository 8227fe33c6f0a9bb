"""The whole road in miniature: from random weights to an evaluation of every method, and what the outside world can load of it."""

import json
import math
import random
from pathlib import Path

import pytest

from align.cli import main
from align.data import load_rows, write_rows
from align.pipeline import Run
from align.recipe import Recipe
from align.registry import Registry
from align.report import write_report
from align.stages import PPO, SFT, Evaluate, Pairs, Preference, Pretrain, RewardModel

COLORS = ("red", "blue", "green", "white", "black")
THINGS = ("norlet", "bimko", "tavu", "pelk", "zorra", "quim", "drond", "hasp", "mivel", "ochre", "lupin", "gantry")
POLICIES = ("base", "sft", "ppo", "dpo", "orpo", "simpo", "lora")
REWARD = """
def says_the_color(prompts, completions, answer, **columns):
    return [float(wanted in completion[0]["content"]) for completion, wanted in zip(completions, answer)]
"""


def write_data(folder):
    draw = random.Random(0)
    facts = [(thing, draw.choice(COLORS)) for thing in THINGS]
    asked = [(f"What color is the {thing}?", color) for thing, color in facts] + [
        (f"Name the color of a {t}.", c) for t, c in facts
    ]
    user = [[{"role": "user", "content": question}] for question, _ in asked]
    write_rows(
        folder / "text.jsonl", [{"text": f"The {thing} is {color}. A {thing} has the color {color}."} for thing, color in facts]
    )
    write_rows(folder / "sft.jsonl", [{"instruction": q, "input": "", "output": f"It is {c}."} for q, c in asked])
    write_rows(folder / "prompts.jsonl", [{"prompt": turns, "answer": c} for turns, (_, c) in zip(user, asked, strict=True)])
    chosen = [[{"role": "assistant", "content": f"It is {color}."}] for _, color in asked]
    rejected = [[{"role": "assistant", "content": f"No idea, ask the {draw.choice(THINGS)}."}] for _ in asked]
    columns = zip(user, chosen, rejected, strict=True)
    write_rows(folder / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in columns])
    (folder / "mine.py").write_text(REWARD)


def recipe(folder):
    common = {"held_out": 0.25, "max_length": 96, "seed": 1}
    learn = {"max_steps": 120, "learning_rate": 1e-2, "per_device_train_batch_size": 12, **common}
    steps = {"max_steps": 4, "learning_rate": 1e-3, "per_device_train_batch_size": 8, "logging_steps": 1, **common}
    answers = {"max_completion_length": 12, "reward_funcs": [f"{folder}/mine.py:says_the_color"]}
    pairs = {"data": [f"{folder}/pairs.jsonl"], "model": "sft", **steps}
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return Recipe(
        "road",
        {
            "base": Pretrain(
                architecture={
                    **architecture,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 128,
                    "tie_word_embeddings": True,
                },
                data=f"{folder}/text.jsonl",
                vocab_size=300,
                chat_template="plain",
                **learn,
            ),
            "sft": SFT(model="base", data=f"{folder}/sft.jsonl", **{**learn, "max_steps": 30}),
            "pairs": Pairs(model="sft", data=f"{folder}/prompts.jsonl", num_generations=3, held_out=0.25, max_length=96, **answers),
            "reward": RewardModel(**pairs),
            "ppo": PPO(
                model="sft",
                reward_model="reward",
                data=f"{folder}/prompts.jsonl",
                total_episodes=16,
                episodes_per_step=8,
                num_mini_batches=2,
                learning_rate=1e-3,
                **answers,
                **common,
            ),
            "dpo": Preference(loss="dpo", beta=0.1, **pairs),
            "orpo": Preference(loss="orpo", lam=0.1, **pairs),
            "simpo": Preference(loss="simpo", beta=2.0, gamma=1.0, **pairs),
            "lora": SFT(model="sft", data=f"{folder}/sft.jsonl", use_peft=True, lora_r=4, **{**steps, "learning_rate": 1e-2}),
            "lora_reward": RewardModel(use_peft=True, lora_r=4, **pairs),
            "evaluate": Evaluate(
                models={name: name for name in POLICIES},
                reward_models={"reward": "reward", "lora_reward": "lora_reward"},
                reference="sft",
                data=f"{folder}/prompts.jsonl",
                perplexity_data=f"{folder}/sft.jsonl",
                preference_data=f"{folder}/pairs.jsonl",
                max_prompts=24,
                samples_kept=4,
                max_length=96,
                **answers,
            ),
        },
    )


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """Run it once: the artifacts, the output folder and the folder with the data."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out")
    write_data(data)
    run = Run(recipe(data), out, registry=Registry(out / "home"))
    artifacts = run.execute()
    write_report(out, "road", artifacts)
    return artifacts, out, data


def path(road, name):
    return road[0][name].path


def load(road, name, auto):
    return auto.from_pretrained(path(road, name)).eval()


# -- what the run leaves -------------------------------------------------------------------------------------------------------


def test_every_stage_finished_and_is_registered(road):
    artifacts, out, data = road
    assert list(artifacts) == recipe(data).ordered()
    registry = Registry(out / "home")
    for name, artifact in artifacts.items():
        assert registry.get(f"road-{name}@1") == artifact
        assert artifact.seconds > 0
    assert artifacts["ppo"].parents == {"sft": "road-sft@1", "reward": "road-reward@1"}
    assert artifacts["sft"].data.keys() == {f"{data}/sft.jsonl"}
    ancestors = ["road-reward@1", "road-sft@1", "road-base@1", "road-sft@1"]
    assert [reference for _, reference, _ in registry.lineage("road-ppo")] == ["road-ppo@1", *ancestors]


def test_a_second_run_does_nothing(road):
    artifacts, out, data = road
    run = Run(recipe(data), out, registry=Registry(out / "home"))
    assert {step.reason for step in run.plan()} == {"up to date"}
    assert run.execute() == artifacts


@pytest.mark.parametrize("name", ["base", "sft", "reward", "dpo", "orpo", "simpo", "lora"])
def test_training_learns_something(name, road):
    metrics = road[0][name].metrics
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def test_and_what_it_learns_can_be_heard(road):
    """Nothing but the demonstrations tells how to answer; the facts are in the plain text."""
    models = json.loads((road[1] / "results.json").read_text())["models"]
    assert models["base"]["greedy_reward"]["mean"] <= 0.15 < 0.4 <= models["sft"]["greedy_reward"]["mean"]
    assert models["reward"]["accuracy"] >= 0.8


def test_training_logs_what_its_readers_know(road):
    def logged(name):
        return {key for line in (Path(path(road, name)) / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}

    assert logged("sft") >= {"loss", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_perplexity"}
    assert logged("reward") >= {"loss", "accuracy", "margin", "eval_accuracy"}
    preference = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"}
    assert logged("dpo") >= preference
    assert logged("orpo") >= preference | {"nll_loss", "log_odds_ratio", "log_odds_chosen"}
    assert logged("ppo") >= {
        *(
            "objective/kl",
            "objective/entropy",
            "objective/scores",
            "objective/rlhf_reward",
            "objective/non_score_reward",
            "episode",
        ),
        *("policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg"),
        *("val/clipfrac_avg", "val/ratio", "val/num_eos_tokens", "rewards/says_the_color", "rewards/reward_model", "eval_score"),
    }


def test_sampled_pairs_are_rows_that_load(road):
    folder = Path(path(road, "pairs"))
    assert road[0]["pairs"].metrics.keys() >= {"preferences_pairs", "preferences_mean_score", "held_out_pairs"}
    lines = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    assert len(lines) == road[0]["pairs"].metrics["preferences_pairs"]
    assert len(load_rows(folder / "preferences.jsonl", "preference").rows) == len(lines) > 0
    comparisons = [json.loads(line) for line in (folder / "comparisons.jsonl").read_text().splitlines()]
    assert len(comparisons) > len(lines)
    assert all(line in comparisons for line in lines)


def test_comparisons_are_all_pairs_that_differ_enough():
    stage = Pairs(model="m", data=["d"], reward_funcs=["r"], min_gap=0.2)
    scores, texts = [9.0, 0.1, 0.9, 0.5, 0.5, 0.45], ["other", "a", "b", "c", "c", "d"]  # the first is of another prompt
    assert stage._comparisons(range(1, 6), scores, texts) == [(2, 1), (2, 5), (2, 3), (3, 1), (5, 1)]


def test_results(road):
    artifacts, out, _ = road
    results = json.loads((out / "results.json").read_text())
    assert results["seconds"] > 0
    assert results["stages"].keys() == artifacts.keys()
    assert list(results["models"]) == [*POLICIES, "reward", "lora_reward"]
    for name in POLICIES:
        measured = results["models"][name]
        for reward in ("says_the_color_reward", "greedy_reward"):
            low, high = measured[reward]["ci95"]
            assert 0 <= low <= measured[reward]["mean"] <= high <= 1
            assert measured[reward]["n"] == 24
        assert measured["perplexity"] > 1
        assert 1 <= measured["mean_completion_tokens"] <= 12
        assert 0 <= measured["finished_share"] <= 1
        assert math.isfinite(measured["kl_to_sft"])
    assert results["models"]["sft"]["kl_to_sft"] == pytest.approx(0, abs=1e-6)
    assert results["models"]["dpo"]["preference_accuracy"]["n"] == len(THINGS) * 2
    for name in ("reward", "lora_reward"):
        low, high = results["models"][name]["accuracy_ci95"]
        assert low <= results["models"][name]["accuracy"] <= high


def test_reports_show_every_model(road):
    _, out, _ = road
    for file in ("report.md", "report.html"):
        text = (out / file).read_text()
        assert all(name in text for name in POLICIES)
    samples = [json.loads(line) for line in (Path(path(road, "evaluate")) / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    assert samples[0]["answers"].keys() == set(POLICIES)
    assert samples[0]["answers"]["ppo"].keys() == {"sampled", "greedy"}


# -- what plain transformers and peft make of the folders ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["base", "sft", "ppo", "dpo", "orpo", "simpo"])
def test_a_policy_loads_and_answers(name, road):
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    assert not {file.suffix for file in Path(path(road, name)).iterdir()} & {".bin", ".pt", ".pkl"}, "safetensors only"
    model, tokenizer = load(road, name, AutoModelForCausalLM), AutoTokenizer.from_pretrained(path(road, name))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<|bos|>User: Hi"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    chat = pipeline("text-generation", model=path(road, name), device="cpu")
    (said,) = chat([{"role": "user", "content": "What color is the pelk?"}], max_new_tokens=5, do_sample=False)
    assert said["generated_text"][-1]["role"] == "assistant"


def test_an_adapter_loads_and_answers(road):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, pipeline

    base = load(road, "sft", AutoModelForCausalLM)
    assert PeftModel.from_pretrained(base, path(road, "lora")).peft_config["default"].r == 4
    chat = pipeline("text-generation", model=path(road, "lora"), device="cpu")
    (said,) = chat([{"role": "user", "content": "What color is the pelk?"}], max_new_tokens=5, do_sample=False)
    assert said["generated_text"][-1]["role"] == "assistant"


def mean_loss(model, tokenizer, data):
    """Mean negative log-likelihood of the held-out answers by the model's own forward, one row at a time."""
    import torch

    from align.data import split_by_prompt

    total = count = 0
    for row in split_by_prompt(load_rows(data / "sft.jsonl", "sft").rows, 0.25)[1]:
        question, answer = row.messages[-2].content, row.messages[-1].content
        head = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        prompt, whole = (
            tokenizer(text, add_special_tokens=False).input_ids for text in (head, f"{head} {answer}{tokenizer.eos_token}")
        )
        with torch.no_grad():
            logps = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
        total, count = total - logps[len(prompt) - 1 :].sum().item(), count + len(whole) - len(prompt)
    return total / count


@pytest.mark.parametrize("name", ["sft", "lora"])
def test_a_reloaded_policy_has_the_loss_that_training_ended_with(name, road):
    """Computed on the forest before saving, and row by row by plain transformers after loading."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    artifacts, _, data = road
    model = load(road, "sft", AutoModelForCausalLM)
    if name == "lora":
        model = PeftModel.from_pretrained(model, path(road, "lora")).eval()
    tokenizer = AutoTokenizer.from_pretrained(path(road, name))
    assert mean_loss(model, tokenizer, data) == pytest.approx(artifacts[name].metrics["eval_loss"], rel=1e-5)


def test_a_reward_model_that_keeps_its_language_keeps_more_of_it(road, tmp_path):
    """Held-out answers under the head of the model that it came from: where that counts, they stay likelier."""
    kept = {}
    for coef in (0.01, 10.0):
        stage = RewardModel(
            model=path(road, "sft"), data=f"{road[2]}/pairs.jsonl", sft_coef=coef, held_out=0.25, max_steps=12, learning_rate=1e-2
        )
        kept[coef] = Run(Recipe("kept", {"reward": stage}), tmp_path / str(coef)).execute()["reward"].metrics
    assert kept[10.0]["eval_nll"] < kept[0.01]["eval_nll"]
    assert kept[10.0]["eval_nll_before"] == pytest.approx(kept[0.01]["eval_nll_before"])


def test_a_reward_model_has_no_language_to_keep(road, capsys):
    assert main(f"reward --model {path(road, 'reward')} --data {road[2]}/pairs.jsonl --sft_coef 1".split()) == 2
    said = capsys.readouterr().err
    assert "sft_coef: " in said
    assert "is a reward model or a classifier and has no language head" in said


@pytest.mark.parametrize("reward", ["reward", "lora_reward"])
@pytest.mark.parametrize("verb", ["sft --data sft.jsonl", "dpo --data pairs.jsonl --beta 0.1", "eval --data prompts.jsonl"])
def test_a_reward_model_does_not_speak(verb, reward, road, capsys, monkeypatch):
    monkeypatch.chdir(road[2])
    assert main([*verb.split(), "--models.it" if verb.startswith("eval") else "--model", path(road, reward)]) == 2
    assert "is a reward model or a classifier and has no language head" in capsys.readouterr().err


def test_a_language_model_does_not_score(road, capsys, monkeypatch):
    monkeypatch.chdir(road[2])
    words = ["ppo", "--model", path(road, "sft"), "--reward_model", path(road, "dpo"), "--data", "prompts.jsonl"]
    assert main([*words, "--normalize_scores", "false"]) == 2
    assert "is a language model, not a reward model: train one with `align reward`" in capsys.readouterr().err


def test_the_last_step_is_logged_whatever_its_number(road, tmp_path, monkeypatch):
    """Else the training loss of a short run would be that of its first step."""
    monkeypatch.chdir(road[2])
    fields = {"max_steps": 3, "logging_steps": 10, "learning_rate": 1e-3, "chat_template": "plain"}
    stage = SFT(model=path(road, "base"), data="sft.jsonl", **fields)
    artifact = Run(Recipe("last", {"last": stage}), tmp_path).execute()["last"]
    logged = [json.loads(line) for line in (Path(artifact.path) / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["loss"] for record in logged if "loss" in record}
    assert list(losses) == [1, 3]
    assert artifact.metrics["train_loss"] == losses[3] < losses[1]


@pytest.mark.parametrize("field", ["sft_coef 1.0", "use_margin true", "group_by_prompt true"])
def test_what_trl_cannot_do_for_a_reward_model_is_refused(field, capsys):
    assert main(f"reward --model x --data y.jsonl --engine trl --{field}".split()) == 2
    assert f"{field.split()[0]} runs on engine 'forest' only" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["reward", "lora_reward"])
def test_a_reloaded_reward_model_gives_the_scores_that_it_was_saved_with(name, road):
    """Mean and deviation of the scores of held-out answers: from forests before saving, from padded batches after loading."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from align.data import split_by_prompt

    artifacts, _, data = road
    if name == "reward":
        model = load(road, "reward", AutoModelForSequenceClassification)
    else:
        base = AutoModelForSequenceClassification.from_pretrained(path(road, "sft"), num_labels=1)
        model = PeftModel.from_pretrained(base, path(road, name)).eval()
    tokenizer = AutoTokenizer.from_pretrained(path(road, name))
    held_out = split_by_prompt(load_rows(data / "pairs.jsonl", "preference").rows, 0.25)[1]
    chats = [
        [turn.model_dump(include={"role", "content"}) for turn in [*r.prompt, *reply]]
        for r in held_out
        for reply in (r.chosen, r.rejected)
    ]
    texts = tokenizer.apply_chat_template(chats, tokenize=False)
    with torch.no_grad():
        scores = model(**tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")).logits[:, 0]
    metrics = artifacts[name].metrics
    assert scores.mean().item() == pytest.approx(metrics["score_mean"], rel=1e-4, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(metrics["score_std"], rel=1e-4)
    assert (scores[::2] > scores[1::2]).float().mean().item() == pytest.approx(metrics["eval_accuracy"])
