"""What an evaluation measures: perplexity against the direct computation, metrics against references, pairs against a baseline."""

import copy
import datetime
import json
import math
import re

import pytest
import torch
from helpers import build, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from align import evaluation
from align.artifact import Artifact
from align.cli import main
from align.data import write_rows
from align.encode import Encoder
from align.engine import enable_forest
from align.errors import AlignError
from align.intake.kinds import replies
from align.metrics import measure
from align.models import load_causal_lm, load_tokenizer
from align.progress import History
from align.registry import home
from align.rewards import text_of
from align.schema import TextRow
from align.scoring import mean_nll
from align.stages import Evaluate
from align.stages.base import Context
from align.turns import assistant, user

WORDS = ("the cat sat on a mat and said hello to me. " * 4).split()
DOCUMENTS = [" ".join(WORDS[i : i + n]) for i, n in ((0, 3), (2, 11), (5, 30), (1, 1), (7, 17))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("evaluation")
    for seed, name in enumerate(("one", "two", "judge")):
        llama(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [("say one", "one"), ("say two", "two cats"), ("say three", "three mats"), ("say four", "four")]
    write_rows(folder / "alpaca.jsonl", [{"instruction": a, "input": "", "output": b} for a, b in asked])
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in asked]
    write_rows(folder / "chat.jsonl", [{"messages": turn} for turn in turns])
    write_rows(folder / "prompts.jsonl", [{"prompt": a, "wanted": [b, "or this"]} for a, b in asked])
    write_rows(folder / "unwanted.jsonl", [{"prompt": a, "completion": b, "label": False} for a, b in asked])
    write_rows(folder / "texts.jsonl", [{"text": text} for text in DOCUMENTS])
    (folder / "mine.py").write_text("def long(completions, **columns): return [float(len(c[0]['content'])) for c in completions]\n")
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def results(capsys, command):
    assert main([*command.split(), "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)["metrics"]["models"]


def samples():
    """What the latest evaluation keeps for people."""
    folder = max(home().glob("stages/*/artifact.json"), key=lambda path: path.stat().st_mtime_ns).parent
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# -- perplexity ----------------------------------------------------------------------------------------------------------------


def directly(path, max_length, stride):
    """Every token but a document's first once: token t is predicted from the window that first reaches it."""
    model, tokenizer = load_causal_lm(str(path)), load_tokenizer(str(path))
    total = count = 0
    for text in DOCUMENTS:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        for t in range(1, len(ids)):
            end = max_length
            while end <= t:
                end += stride
            start = max(0, min(end, len(ids)) - max_length)
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([ids[start:t]])).logits[0, -1].double().log_softmax(0)
            total, count = total - log_p[ids[t]].item(), count + 1
    return math.exp(total / count), count


def on_the_forest(path, max_length, stride, budget):
    model, tokenizer = load_causal_lm(str(path)), load_tokenizer(str(path))
    enable_forest(model)
    trees = Encoder(tokenizer, max_length).windows([TextRow(text=text) for text in DOCUMENTS], stride).trees
    return math.exp(mean_nll(model, trees, budget)), sum(tree.targets for tree in trees)


@pytest.mark.parametrize("budget", [1, 50, 8192])
@pytest.mark.parametrize(("max_length", "stride"), [(512, 256), (512, 7), (12, 6), (12, 11), (12, 1)])
def test_perplexity_is_that_of_a_direct_computation(folder, max_length, stride, budget):
    """For any packing. Where documents fit into the window, it does not depend on the stride either."""
    wanted, count = directly(folder / "one", max_length, stride)
    found, targets = on_the_forest(folder / "one", max_length, stride, budget)
    assert targets == count
    assert found == pytest.approx(wanted, rel=1e-5)
    if max_length == 512:
        assert found == pytest.approx(directly(folder / "one", 512, 100)[0], rel=1e-5)


def test_perplexity_weighs_every_token_of_the_set_alike(folder):
    """Halves of the set together give the whole: exp of the token-weighted mean of their logarithms, not the mean."""
    model, tokenizer = load_causal_lm(str(folder / "one")), load_tokenizer(str(folder / "one"))
    enable_forest(model)
    trees = Encoder(tokenizer, 64).windows([TextRow(text=text) for text in DOCUMENTS]).trees
    nlls = [mean_nll(model, [tree], 64) * tree.targets for tree in trees]
    whole = measure("perplexity", nlls=nlls, tokens=[tree.targets for tree in trees])
    assert whole["perplexity"] == pytest.approx(math.exp(mean_nll(model, trees, 8192)), rel=1e-5)


def test_a_document_of_its_end_token_alone_has_nothing_to_measure(tokenizer):
    encoded = Encoder(tokenizer, 8).windows([TextRow(text=""), TextRow(text="a")])
    assert [row.text for row in encoded.rows] == ["a"]
    assert encoded.set_aside == {"have no token to predict": 1}


def test_windows_that_do_not_overlap_are_refused(tokenizer):
    with pytest.raises(AlignError, match="stride 8 must be below max_length 8"):
        Encoder(tokenizer, 8).windows([TextRow(text="a")], 8)


def test_rows_longer_than_the_learned_positions_are_one_line(capsys, tokenizer, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    assert main(f"eval {tmp_path}/gpt2 --data texts.jsonl --metrics perplexity --max_length 30".split()) == 2
    assert "GPT2LMHeadModel has places for 16: set max_length to 16 or less" in capsys.readouterr().err


def test_perplexity_of_documents_by_name(capsys, folder):
    found = results(capsys, "eval one --data texts.jsonl --metrics perplexity --max_length 12 --stride 5")
    assert found["one"] == {"perplexity": pytest.approx(directly(folder / "one", 12, 5)[0], rel=1e-5)}


def test_perplexity_of_demonstrations_needs_no_answers(capsys):
    alone = results(capsys, "eval one two --data alpaca.jsonl --metrics perplexity")
    named = results(capsys, "eval one two --perplexity_data alpaca.jsonl --name again")
    assert alone == named
    assert alone["one"]["perplexity"] != alone["two"]["perplexity"]


def test_perplexity_beside_other_metrics_is_measured_too(capsys):
    """Once it was left out without a word."""
    alone = results(capsys, "eval one --data alpaca.jsonl --metrics perplexity")
    beside = results(capsys, "eval one --data alpaca.jsonl --metrics length perplexity --max_completion_length 4")
    assert beside["one"]["perplexity"] == alone["one"]["perplexity"]
    assert "mean_words" in beside["one"]


# -- metrics by name -----------------------------------------------------------------------------------------------------------

SHORT = " --max_completion_length 4 --max_length 256"


@pytest.mark.parametrize(
    "data", ["alpaca.jsonl", "chat.jsonl", "prompts.jsonl --reference_column wanted"], ids=["output", "messages", "column"]
)
def test_metrics_of_the_greedy_answers(capsys, folder, data):
    found = results(capsys, f"eval one --data {data} --metrics bleu rouge distinct(n=1) token_f1{SHORT}")["one"]
    said = [sample["answers"]["one"]["greedy"]["text"] for sample in samples()]
    wanted = ["one", "two cats", "three mats", "four"]
    if "wanted" in data:
        wanted = [[text, "or this"] for text in wanted]
    expected = {}
    for name in ("bleu", "rouge", "distinct(n=1)", "token_f1"):
        expected |= measure(name, predictions=said, references=wanted)
    assert {key: found[key] for key in expected} == pytest.approx(expected)
    assert any(said)


def test_the_metrics_of_sampled_answers_where_nothing_is_greedy(capsys):
    found = results(capsys, f"eval one --data alpaca.jsonl --metrics length --greedy false{SHORT}")["one"]
    words = [len(sample["answers"]["one"]["sampled"]["text"].split()) for sample in samples()]
    assert found["mean_words"] == pytest.approx(sum(words) / len(words))


# -- against a baseline --------------------------------------------------------------------------------------------------------


def test_win_rate_by_a_function(capsys):
    command = f"eval --models.one one --models.two two --baseline one --data alpaca.jsonl --reward_funcs mine.py:long{SHORT}"
    found = results(capsys, command)
    said = [sample["answers"] for sample in samples()]
    rewards = [(s["two"]["greedy"]["reward"], s["one"]["greedy"]["reward"]) for s in said]
    share = sum(0.5 if a == b else a > b for a, b in rewards) / len(rewards)
    rate = found["two"]["win_rate_vs_one"]
    assert rate["mean"] == share
    assert rate["ci95"][0] <= share <= rate["ci95"][1]
    assert rate["n"] == 4
    assert "win_rate_vs_one" not in found["one"]


def test_win_rate_against_the_references(capsys):
    found = results(capsys, f"eval one --baseline references --data alpaca.jsonl --reward_funcs mine.py:long{SHORT}")
    said = [sample["answers"]["references"]["greedy"] for sample in samples()]
    assert [answer["text"] for answer in said] == ["one", "two cats", "three mats", "four"]
    assert said[1]["reward"] == len("two cats")
    assert 0 <= found["one"]["win_rate_vs_references"]["mean"] <= 1


def test_references_are_scored_where_answers_are(capsys, folder, tokenizer):
    """At their end token, as in the reward model's training: it read their last word, or, of no answer, the prompt's end."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    scorer = build("llama", score_head=True, **sizes)
    scorer.save_pretrained(folder / "scorer")
    tokenizer.save_pretrained(folder / "scorer")
    write_rows(folder / "unanswered.jsonl", [{"prompt": "say one", "answers": ["one two"]}, {"prompt": "say", "answers": []}])
    command = "eval one --baseline references --data unanswered.jsonl --reward_model scorer --normalize_scores false"
    results(capsys, f"{command}{SHORT}")
    said = [sample["answers"]["references"]["greedy"] for sample in samples()]
    end = tokenizer.eos_token
    with torch.no_grad():
        expected = [scorer(**tokenizer(text, return_tensors="pt")).logits.item() for text in (f"say oneone two{end}", f"say{end}")]
    assert [answer["reward"] for answer in said] == pytest.approx(expected, abs=1e-5)


PAIRED = {
    "labelled messages": (
        [
            {"messages": [user(asked), assistant(said)], "label": good}
            for asked, said, good in (("q1", "bad1", False), ("q2", "good2", True), ("q3", "good3", True), ("q4", "good4", True))
        ],
        [("q2", "good2"), ("q3", "good3")],
        1,
    ),
    "native, labelled": (
        [{"prompt": f"q{n}", "completion": f"a{n}", "label": n > 1} for n in (1, 2, 3)],
        [("q2", "a2"), ("q3", "a3")],
        1,
    ),
    "several good solutions": (
        [
            {
                "question": f"q{n}",
                "ground_truth": "1",
                "a": {"solution": f"s{n}a", "is_correct": True},
                "b": {"solution": f"s{n}b", "is_correct": n == 1},
            }
            for n in (1, 2)
        ],
        [("q1", "s1a"), ("q2", "s2a")],
        0,
    ),
    "several prompts in a row": (
        [{"instruction": "add", "instances": [{"input": "1 1", "output": "2"}, {"input": "2 2", "output": "4"}]}],
        [("add\n\n1 1", "2"), ("add\n\n2 2", "4")],
        0,
    ),
    "pairs that repeat the prompt": (
        [{side: [user(f"q{n}"), assistant(f"{side}{n}")] for side in ("chosen", "rejected")} for n in (1, 2)],
        [("q1", "chosen1"), ("q2", "chosen2")],
        0,
    ),
    "a question without an answer": (
        [{"question": "q1", "context": "", "answers": {"text": [], "answer_start": []}}, {"question": "q2", "answers": ["a", "b"]}],
        [("q1", ""), ("q2", "a")],
        0,
    ),
    "a column of the row": ([{"prompt": f"q{n}", "output": f"a{n}"} for n in (1, 2)], [("q1", "a1"), ("q2", "a2")], 0),
}


@pytest.mark.parametrize(("rows", "pairs", "without"), PAIRED.values(), ids=PAIRED)
def test_a_prompt_meets_the_answer_of_its_own_row(capsys, folder, rows, pairs, without):
    write_rows(folder / "paired.jsonl", rows)
    reward = "--reward_funcs length_band(low=1,high=9)"
    assert main(f"eval one --baseline references --data paired.jsonl {reward} --max_prompts 2{SHORT}".split()) == 0
    assert (f"left out {without} prompts without a reference answer" in capsys.readouterr().err) == bool(without)
    found = [(text_of(sample["prompt"]), sample["answers"]["references"]["greedy"]["text"]) for sample in samples()]
    assert found == pairs


def test_a_prompt_without_room_for_an_answer_is_left_out(capsys, folder):
    """It stopped the evaluation, which comes after all training. All models answer the same prompts, with their own references."""
    asked = [("say one", "one"), ("say " * 400, "two"), ("say three", "three")]
    write_rows(folder / "long.jsonl", [{"prompt": prompt, "answer": answer} for prompt, answer in asked])
    flags = " --data long.jsonl --metrics exact_match --max_completion_length 8 --max_length"
    assert main(f"eval one two{flags} 100".split()) == 0
    assert "left out 1 of 3 prompts, as they leave no room for an answer within 92 tokens (" in capsys.readouterr().err
    assert [sample["prompt"] for sample in samples()] == ["say one", "say three"]
    assert main(f"eval one two{flags} 9".split()) == 2
    assert "none of 3 prompts can be answered, as they leave no room for an answer within 1 tokens (" in capsys.readouterr().err


def test_rows_that_are_set_aside_lie_in_the_folder(capsys, folder):
    write_rows(folder / "bad.jsonl", [{"prompt": "say one"}, {"prompt": 7}])
    assert main(f"eval one --data bad.jsonl --on_bad_row quarantine --output_dir aside{SHORT}".split()) == 0
    assert "they are in " in capsys.readouterr().err
    (row,) = map(json.loads, (folder / "aside" / "quarantine.jsonl").read_text().splitlines())
    assert (row["row"], row["content"]) == (2, {"prompt": 7})


def test_a_null_in_the_first_row_does_not_hide_a_column(capsys, folder):
    """The columns of the first row decided for all: a reference was not found, an instruction not passed on."""
    write_rows(folder / "null.jsonl", [{"prompt": "say one", "answer": None}, {"prompt": "say two", "answer": "two"}])
    assert main(f"eval one --data null.jsonl --metrics token_f1{SHORT}".split()) == 2
    assert "null.jsonl row 1 has no reference answer in column 'answer'" in capsys.readouterr().err
    write_rows(folder / "whole.jsonl", [{"prompt": "say three", "answer": "three"}])
    assert main(f"eval one --data whole.jsonl null.jsonl --metrics token_f1{SHORT}".split()) == 2
    assert "null.jsonl row 1 has no" in capsys.readouterr().err, "not row 2 of all"
    asked = {"prompt": "say two", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write_rows(folder / "later.jsonl", [{"prompt": "say one"}, asked])
    assert main(f"eval one --data later.jsonl --metrics ifeval{SHORT}".split()) == 2
    assert "field instruction_id_list: got None" in capsys.readouterr().err


@pytest.mark.parametrize("value", [["a", None], {"text": "a"}, [{"text": "a"}]])
def test_a_reference_that_is_no_text_is_refused(capsys, folder, value):
    """It became the text that Python writes for it."""
    write_rows(folder / "odd.jsonl", [{"prompt": "say one", "answer": 4}, {"prompt": "say two", "answer": value}])
    assert main(f"eval one --data odd.jsonl --metrics token_f1{SHORT}".split()) == 2
    assert "row 2, field answer: got" in capsys.readouterr().err


def test_every_answer_that_is_labelled_as_wanted_is_a_reference():
    rows, _, _ = PAIRED["several good solutions"]
    assert replies("graded", rows[0], [user("q1")]) == [[assistant("s1a")], [assistant("s1b")]]
    assert replies("graded", rows[1], [user("q2")]) == [[assistant("s2a")]]
    assert replies("graded", rows[1], [user("q1")]) == []


def test_a_local_judge_asks_in_both_orders(capsys, folder):
    """Its answer is a probability, and swapping the sides turns it around exactly."""
    from align.metrics.judge import JudgeModel

    judge = JudgeModel(str(folder / "judge"), dtype="float32", max_length=512, max_tokens=8192)
    ours, theirs = ["one", "two two"], ["three", "four"]
    forward, backward = judge(["say"] * 2, ours, theirs), judge(["say"] * 2, theirs, ours)
    assert forward == pytest.approx([1 - p for p in backward])
    assert forward != pytest.approx([0.5, 0.5], abs=1e-4)
    assert judge(["say"], ["same"], ["same"]) == pytest.approx([0.5])
    with pytest.raises(AlignError, match=r"question to the judge takes .* raise max_length"):
        JudgeModel(str(folder / "judge"), dtype="float32", max_length=8, max_tokens=64)(["a"], ["b"], ["c"])
    long = judge(["say", "say " * 400], ours, theirs)
    assert long == [pytest.approx(forward[0]), None], "one that does not fit stopped the evaluation, after all answers"
    write_rows(folder / "mixed.jsonl", [{"prompt": "say one"}, {"prompt": "say " * 165}])
    assert main(f"eval one two --baseline one --judge_model judge --data mixed.jsonl{SHORT} --max_length 512 --json".split()) == 0
    told = capsys.readouterr()
    assert "two: 1 of 2 questions to the judge do not fit into max_length, and are not asked" in told.err
    found = json.loads(told.out)["metrics"]["models"]["two"]["win_rate_vs_one"]
    assert found["n"] == 1
    assert 0 <= found["mean"] <= 1


def test_a_judge_without_the_letters_is_refused(folder, tmp_path):
    """Both were its unknown token, and every pair a tie. It is told before anything is answered."""
    words = Tokenizer(WordLevel({"<unk>": 0, "one": 1, "<end>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<end>").save_pretrained(tmp_path)
    llama().save_pretrained(tmp_path)
    stage = Evaluate(models={"one": "one", "two": "two"}, data=["alpaca.jsonl"], baseline="one", judge_model=str(tmp_path))
    with pytest.raises(AlignError, match="reads the letters A and B as the same token"):
        evaluation.Evaluation(stage, Context("e", tmp_path, History(tmp_path / "metrics.jsonl")))


# -- mistakes ------------------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no such metric": ("eval one --data alpaca.jsonl --metrics blue", "unknown metric 'blue' .did you mean 'bleu'"),
    "no such setting": ("eval one --data alpaca.jsonl --metrics bleu(order=2)", "'bleu' takes no 'order'"),
    "no references": ("eval one --data prompts.jsonl --metrics bleu", "no reference answers: none of the columns wanted is called"),
    "no wanted answer": ("eval one --data unwanted.jsonl --metrics bleu", "no reference answers: .*an unwanted answer, or none"),
    "no such column": ("eval one --data alpaca.jsonl --metrics bleu --reference_column gold", "row 1 has no reference answer in"),
    "a column that a metric needs": ("eval one --data alpaca.jsonl --metrics ifeval", "'ifeval' needs 'instruction_id_list'"),
    "a baseline that is none": ("eval one --data alpaca.jsonl --baseline two", "baseline 'two' is neither `references` nor one of"),
    "a baseline and no judge": ("eval one two --data alpaca.jsonl --baseline two", "baseline needs something that judges"),
    "metrics of no answers": ("eval one --perplexity_data alpaca.jsonl --metrics bleu", "metrics is about answers to prompts, and"),
    "a reward of no answers": (
        "eval one --perplexity_data alpaca.jsonl --metrics perplexity --reward_funcs mine.py:long",
        "reward_funcs is about answers to prompts, and there are none: set data",
    ),
    "perplexity of nothing": ("eval one --preference_data pairs.jsonl --metrics perplexity", "metrics is about answers to prompts"),
    "two models of one name": ("eval one ./one --data alpaca.jsonl", "two of the models one, ./one have the same name"),
}


@pytest.mark.parametrize(("command", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(capsys, command, message):
    assert main(f"{command}{SHORT}".split()) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(home().glob("stages/*"))


def test_the_folder_one_stands_in_is_called_by_its_name(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder / "one")
    assert main(["eval", ".", "../one", "--data", "../alpaca.jsonl"]) == 2
    assert "two of the models ., ../one have the same name" in capsys.readouterr().err


@pytest.mark.parametrize(("metric", "column"), [("ifeval", "instruction_id_list"), ("win_rate", "scores")])
def test_a_column_that_a_metric_needs_is_missed_before_any_answer(metric, column, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "complete", lambda *_: pytest.fail("answers were sampled"))
    assert main(f"eval one --data alpaca.jsonl --metrics {metric}{SHORT}".split()) == 2
    assert f"metric '{metric}' needs '{column}'; given: " in capsys.readouterr().err


def test_a_column_that_a_reward_needs_is_missed_before_any_answer(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    (folder / "needy.py").write_text("def needy(completions, wished): return [0.0 for _ in completions]\n")
    assert main(f"eval one --data prompts.jsonl --reward_funcs needy.py:needy{SHORT}".split()) == 2
    assert "reward 'needy' needs a column 'wished'; the rows have: wanted" in capsys.readouterr().err


def test_reward_models_are_measured_for_calibration_and_length(folder, tmp_path, tokenizer):
    from align.pipeline import Run
    from align.recipe import Recipe
    from align.stages import Evaluate

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    build("llama", score_head=True, **sizes).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    rows = [{"prompt": f"say {word}", "chosen": word, "rejected": word * n} for n, word in enumerate(WORDS[:8], 2)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    stage = Evaluate(
        models={"one": str(folder / "one")},
        reward_models={"judge": str(tmp_path / "reward")},
        preference_data=f"{tmp_path}/pairs.jsonl",
    )
    artifact: Artifact = Run(Recipe("judged", {"evaluate": stage}), tmp_path / "out").execute()["evaluate"]
    found = artifact.metrics["models"]["judge"]
    assert 0 <= found["calibration_error"] <= 1
    assert -1 <= found["length_correlation"] <= 1
    assert found["longer_chosen"] == 0


def test_a_tie_is_half_right(capsys, folder):
    """A model that is the reference prefers neither answer, and had an accuracy of 0."""
    write_rows(folder / "pairs.jsonl", [{"prompt": f"say {word}", "chosen": word, "rejected": "hello"} for word in WORDS[:5]])
    models = "--models.a one --models.b one --reference a"
    assert results(capsys, f"eval {models} --preference_data pairs.jsonl")["b"]["preference_accuracy"]["mean"] == 0.5


# -- models that do not go together --------------------------------------------------------------------------------------------


def test_columns_that_json_cannot_hold_are_kept_as_text(capsys, folder):
    """Times of a Parquet file, and half of a surrogate pair: they stood in the way of samples.jsonl, when all was measured."""
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "say one", "when": datetime.datetime(2024, 2, 29), "answer": "one"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "times.parquet")
    (folder / "half.jsonl").write_text('{"prompt": "say two", "when": "\\ud83d", "answer": "one"}\n')
    for data, kept in (("times.parquet", "2024-02-29 00:00:00"), ("half.jsonl", "\ud83d")):
        found = results(capsys, f"eval one --data {data} --metrics exact_match --max_completion_length 4")
        assert "exact_match" in found["one"]
        assert samples()[0]["columns"]["when"] == kept


def test_nothing_to_measure_is_told(capsys):
    assert main(["eval", "one", "two"]) == 2
    assert re.search(r"[Nn]othing to measure: set data \(prompts\), perplexity_data", capsys.readouterr().err)


def test_a_reference_with_another_tokenizer(folder, tokenizer, capsys):
    """Pairs are ranked against it where both have them; tokens of one say nothing to the other, so there is no divergence."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["the cat sat on a mat and said hello to me"])
    model = llama(7)
    model.resize_token_embeddings(len(other), mean_resizing=False)
    model.save_pretrained(folder / "other")
    other.save_pretrained(folder / "other")
    long = "the cat sat on a mat and said hello to me " * 3
    pairs = [{"prompt": "say", "chosen": "one", "rejected": "two"}, {"prompt": long, "chosen": "one", "rejected": "two"}]
    write_rows(folder / "pairs.jsonl", pairs)
    command = (
        "eval one other --reference one --data alpaca.jsonl --preference_data pairs.jsonl --max_length 24 --max_completion_length 4"
    )
    found = results(capsys, f"{command} --chat_template plain")
    assert found["other"]["preference_accuracy"]["n"] == 1
    assert "kl_to_one" in found["one"]
    assert "kl_to_one" not in found["other"]


def test_the_interval_of_many_values_is_drawn_a_part_at_a_time(monkeypatch):
    """2,000 resamples of 100,000 pairs at once were 3 GB; the draws are the same ones."""
    values, sizes, draw = [(7 * i % 11) / 10 for i in range(50)], list[tuple[int, int]](), torch.randint
    whole = evaluation.bootstrap_interval(values)
    monkeypatch.setattr(torch, "randint", lambda high, size, **more: sizes.append(size) or draw(high, size, **more))
    monkeypatch.setattr(evaluation, "RESAMPLED", 7_000)
    assert evaluation.bootstrap_interval(values) == whole
    assert len(sizes) == 15
    assert all(rows * count <= 7_000 for rows, count in sizes)
