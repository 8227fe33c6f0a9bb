"""The built-in rewards that need more than a line: JSON, math answers, sentence similarity."""

import json
import math
import sys
import time

import pytest

from align.errors import AlignError
from align.rewards import RewardSet, load_reward
from align.rewards.math_answer import final_answer


def test_json_valid():
    function = load_reward("json_valid")
    assert function(
        ['{"a": 1}', "[1, 2]", "{a: 1}", "", 'Here: {"a": 1}', '```json\n{"a": 1}\n```', "Sure.\n```\n[1]\n```\nDone."]
    ) == [
        1,
        1,
        0,
        0,
        0,
        1,
        1,
    ]
    assert function(["[" * 100_000, "```\r\n\n {} \n\n```", "```json\n{}", "``` json\n{}\n```", "```JSON\n{}\n```"]) == [
        0,
        1,
        0,
        0,
        1,
    ]
    function = load_reward("json_valid(keys=['name', 'age'])")
    assert function(['{"name": "Ada", "age": 36, "x": 0}', '{"name": "Ada"}', '["name", "age"]']) == [1, 0, 0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        # what GSM8K marks wins over all else
        ("2 * 36 = 72 apples.\n#### 72", "72"),
        ("#### 12\nno, wait\n#### 13\nThe answer is 14", "13"),
        # the last box
        (r"so \boxed{41}, no: \boxed{42}. There are 7 others.", "42"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{\dfrac{-3}{4}}", "-3/4"),
        (r"\boxed{12\text{ cm}}", "12"),
        (r"$\boxed{1{,}000}$ or \boxed{1,000}", "1000"),
        (r"\boxed{x + 1}", "x+1"),
        (r"\boxed{\left( 1, 2 \right)}", r"\boxed{(1,2)}"),
        # the cell is the answer itself, as in MATH
        (r"\boxed{90^\circ}", r"90^\circ"),
        (r"\boxed{90^{\circ}}", "90"),
        (r"\boxed{(1,2)}", "(1, 2)"),
        (r"\boxed{[0,\infty)}", r"[0,\infty)"),
        (r"\boxed{x^2+1}", "x^2 + 1"),
        (r"\boxed{x=5}", "x = 5"),
        (r"\boxed{5\text{ cm}^2}", "5"),
        (r"\boxed{60 km/h}", "60"),
        (r"\boxed{\text{Monday}}", "Monday"),
        (r"\boxed{\frac12}", "0.5"),
        (r"\boxed{0.5}", r"\tfrac12"),
        (r"\boxed{10000}", r"10,\!000"),
        (r"\boxed{10\,000}", "10,000"),
        # words
        ("The answer is 5, not 6.", "5"),
        ("Answer: $1,250.50 in 3 parts", "1250.5"),
        ("final answer = 3 / 4 of them (see 2)", "0.75"),
        # the last number
        ("First 3, then 4, in all 7.", "7"),
        ("it costs 1,234,567 dollars", "1234567"),
        ("about 50%", "50"),
        ("-7", "-7"),
        ("7 - 3 = 4", "4"),
        ("the difference 10-3", "3"),
        ("−2.5 degrees", "-2.5"),
        ("1.5e3 metres", "1500"),
        (".5", "1/2"),
        ("3.", "3"),
        ("x3 is 4", "4"),
        ("0.333333333", "1/3"),
        ("0.333333", "1/3"),
        ("#### 18", "He pays 2 * 9 = 18.\n#### 18"),
    ],
)
def test_math_answer_finds_the_final_number(text, wanted):
    assert load_reward("math_answer")([text], [wanted]) == [1]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "3"),
        ("no idea", "3"),
        ("3.01", "3"),
        ("#### 30", "3"),
        ("3 1", "3"),
        (r"\boxed{x}", "y"),
        ("1/0", "1"),
        ("-3", "3"),
        (r"\boxed{y + 1}", "x+1"),
        (r"\boxed{3}", r"\sqrt{3}"),
        (r"\boxed{2}", r"\frac{\pi}{2}"),
        ("2", "(1, 2)"),
        (r"\boxed{2y}", "2x"),
    ],
)
def test_math_answer_is_not_taken_in(text, wanted):
    assert load_reward("math_answer")([text], [wanted]) == [0]


def test_math_answer_reads_whatever_a_model_says():
    """A malformed fraction is no number, and one of thousands of digits is compared as text."""
    function = load_reward("math_answer")
    nines = "9" * 5000
    said = [r"\frac{1..2}{3}", r"\boxed{\frac{1.}{.5}}", nines, f"#### {nines}", "2e" + nines, r"\frac{" + nines + "}{1}"]
    assert function(said, ["1", "2", "1", nines, "2", "1"]) == [0, 1, 0, 1, 0, 0]


def test_math_answer_compares_cells_that_are_no_numbers_as_text():
    said = [r"\boxed{True}", "1", r"\boxed{nan}", "3", r"\boxed{inf}"]
    assert load_reward("math_answer")(said, [True, True, math.nan, math.nan, math.inf]) == [1, 0, 1, 0, 1]


def test_json_valid_of_one_key_and_of_what_json_does_not_know():
    assert load_reward("json_valid(keys='name')")(['{"name": 1}', '{"n": 1, "a": 2, "m": 3, "e": 4}']) == [1, 0]
    assert load_reward("json_valid")(["NaN", '{"a": [-Infinity]}', '{"a": "NaN"}']) == [0, 0, 1]


@pytest.mark.parametrize("spec", ["json_valid", "math_answer", "exact_match", "keyword(words='a')", "repetition"])
def test_a_degenerate_answer_takes_no_time(spec):
    function, started = load_reward(spec), time.perf_counter()
    for start in ("", "```\n", r"\boxed{", "answer:"):
        for unit in ("\n", " ", "`", "1", "1,111", "[", r"\frac{", "```\n", "answer: ", "####"):
            function([start + 4000 * unit], answer=["1"])
    assert time.perf_counter() - started < 5


def test_math_answer_reads_numbers_messages_and_none():
    function = load_reward("math_answer(tolerance=0.1)")
    completions = [[{"role": "assistant", "content": "It is 3.9"}]] * 3
    assert function(completions, [4, 4.5, None]) == [1, 0, None]
    assert final_answer("none here") is None


class TestSentenceSimilarity:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A BERT of one layer with mean pooling, as sentence-transformers saves it."""
        models = pytest.importorskip("sentence_transformers.models")
        from sentence_transformers import SentenceTransformer
        from transformers import BertConfig, BertModel, BertTokenizer

        folder = tmp_path_factory.mktemp("bert")
        (folder / "vocab.txt").write_text(
            "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "cat", "dog", "."])
        )
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(folder / "raw")
        BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "raw")
        word = models.Transformer(str(folder / "raw"))
        SentenceTransformer(modules=[word, models.Pooling(16)], device="cpu").save(str(folder / "model"))
        return folder / "model"

    def test_is_the_cosine_of_two_embeddings(self, folder):
        """1 for the same text; between two texts what the model itself says; None without an answer."""
        from sentence_transformers import SentenceTransformer

        function = load_reward(f"sentence_similarity(model={str(folder)!r})")
        completions = ["red cat", [{"role": "assistant", "content": "blue dog"}], "dog"]
        same, other, nothing = function(completions, ["red cat", "red cat .", None])
        model = SentenceTransformer(str(folder), device="cpu")
        vectors = model.encode(["blue dog", "red cat ."])
        assert same == pytest.approx(1, abs=1e-5)
        assert other == pytest.approx(float(model.similarity(vectors[0], vectors[1])), abs=1e-5)
        assert other < 0.999
        assert nothing is None
        assert function(["dog", "dog"], [12, "12"])[0] == function(["dog"], ["12"])[0]  # a column of numbers

    def test_without_the_library_or_the_model(self, folder, tmp_path, monkeypatch):
        with pytest.raises(AlignError, match="nowhere is no folder"):
            RewardSet(["sentence_similarity(model='nowhere')"]).score(["a"], ["b"], {"answer": ["c"]})
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
        with pytest.raises(AlignError, match=r"pip install 'align\[similarity\]'"):
            RewardSet([f"sentence_similarity(model={str(tmp_path)!r})"]).score(["a"], ["b"], {"answer": ["c"]})


def test_the_reward_model_is_the_stages():
    with pytest.raises(AlignError, match="stands for a reward model, and there is none"):
        RewardSet(["reward_model"]).score(["a"], ["b"])
    assert RewardSet(["reward_model"]).score(["a"], ["b"], model_scores=[0.5]).total == [0.5]


def test_math_answer_agrees_with_the_graders_of_gsm8k(real):
    """Solutions of four models to the 929 problems that OpenAI published with what its own grader said of each."""
    rows = [json.loads(line) for line in (real / "kto" / "gsm8k_example_model_solutions.jsonl").read_text().splitlines()]
    said = [(row[by], row["ground_truth"]) for row in rows for by in row if by.endswith(("_finetuning", "_verification"))]
    found = load_reward("math_answer")([one["solution"] for one, _ in said], [truth for _, truth in said])
    assert len(found) == 3716
    assert found == [float(one["is_correct"]) for one, _ in said]


def test_a_number_of_600_characters_is_still_read_as_one():
    """10^597 has 598 digits; with ".0" behind it is 600 characters and the same number. One digit more, and the text counts."""
    number = "1" + "0" * 597
    assert load_reward("math_answer")([number + ".0", number + "0.0"], [number, number + "0"]) == [1.0, 0.0]
