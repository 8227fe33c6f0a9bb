"""Metrics: the published examples of the reference packages, numbers derived by hand, and what is refused."""

import math
import random
import time

import pytest

from align.errors import AlignError
from align.metrics import measure, metrics
from align.metrics.base import measure_all, refuse_missing
from align.metrics.generation import _NoWordNet
from align.metrics.instructions import followed, follows, instructions, sentences
from align.metrics.preferences import length_controlled

DOG = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
DOG_REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]


def one(name, key=None, **columns):
    return measure(name, **columns)[key or name]


# -- published examples --------------------------------------------------------------------------------------------------------


def test_the_readme_of_sacrebleu():
    """BLEU = 48.53 82.4/50.0/45.5/37.5 (BP = 0.943, hyp_len = 17, ref_len = 18), chrF2 = 59.73. The fractions are 14/17, 7/14, 5/11
    and 3/8.
    """
    precisions = (14 / 17) * (7 / 14) * (5 / 11) * (3 / 8)
    by_hand = 100 * math.exp(1 - 18 / 17) * precisions**0.25
    assert one("bleu", predictions=DOG, references=DOG_REFERENCES) == pytest.approx(by_hand, abs=1e-6)
    assert round(by_hand, 2) == 48.53
    assert round(one("chrf", predictions=DOG, references=DOG_REFERENCES), 2) == 59.73


def test_bleu_with_an_uneven_number_of_references():
    from sacrebleu import corpus_bleu

    streams = [[own[0] for own in DOG_REFERENCES], [DOG_REFERENCES[0][1], None, None]]
    uneven = [DOG_REFERENCES[0], DOG_REFERENCES[1][:1], DOG_REFERENCES[2][0]]
    assert one("bleu", predictions=DOG, references=uneven) == pytest.approx(corpus_bleu(DOG, streams).score, abs=1e-6)


def test_the_readme_of_rouge_score():
    """'The quick brown fox jumps over the lazy dog' against '... dog jumps on the log.': 6 of 8 and 6 of 9 words, so
    F = 2 (6/8) (6/9) / (6/8 + 6/9) = 12/17; the longest common subsequence has 5 words: F = 10/17; 2 of 7 and 2 of 8 bigrams: 4/15.
    """
    found = measure(
        "rouge",
        predictions=["The quick brown dog jumps on the log."],
        references=["The quick brown fox jumps over the lazy dog"],
    )
    assert found["rouge1"] == pytest.approx(12 / 17, abs=1e-6)
    assert found["rougeL"] == pytest.approx(10 / 17, abs=1e-6)
    assert found["rouge2"] == pytest.approx(4 / 15, abs=1e-6)


def test_settings_change_what_is_the_same():
    """By its stem alone "cats" is "cat"; of the second row one reference of two is the prediction. Of "b a" each word is in "a b",
    and no pair of words.
    """
    rows = {"predictions": ["cats", "dog"], "references": ["cat", ["bird", "dog"]]}
    assert one("rouge", "rouge1", **rows) == 0.5
    assert one("rouge(stemmer=True)", "rouge1", **rows) == 1
    loud = {"predictions": ["THE CAT SAT HERE"], "references": ["the cat sat here"]}
    assert one("bleu", **loud) == 0
    assert one("bleu(lowercase=True)", "bleu", **loud) == pytest.approx(100)
    turned = {"predictions": ["b a"], "references": ["a b"]}
    assert one("bleu(max_order=1)", "bleu", **turned) == pytest.approx(100)
    dogs = {"predictions": DOG, "references": DOG_REFERENCES}
    assert one("chrf(word_order=2)", "chrf", **dogs) < one("chrf", **dogs)


def test_the_docstring_of_nltk_meteor(monkeypatch):
    """0.6944 = 25/36, with the exact and stem stages alone too: no word of the example has a synonym in the other."""
    from align.metrics import generation

    monkeypatch.setattr(generation, "_wordnet", lambda: _NoWordNet())
    hypothesis = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    found = measure("meteor", predictions=[hypothesis], references=[reference])
    assert found == {"meteor": pytest.approx(25 / 36, abs=1e-6), "meteor_synonyms": 0.0}
    assert one("meteor", predictions=["this is a cat"], references=["non matching hypothesis"]) == 0


def test_the_readme_of_seqeval():
    references = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    predictions = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    found = measure("seqeval", predictions=predictions, references=references)
    assert found == {"entity_precision": 0.5, "entity_recall": 0.5, "entity_f1": 0.5}


def test_seqeval_strict():
    """The example of seqeval's README: by default the I-NP that follows nothing is an entity, strictly it is none."""
    columns = {"references": [["B-NP", "I-NP", "O"]], "predictions": [["I-NP", "I-NP", "O"]]}
    assert one("seqeval", "entity_f1", **columns) == 1
    assert one("seqeval(strict=True)", "entity_f1", **columns) == 0
    for tag in ("S-PER", "X"):  # a ValueError and a KeyError, after a model had answered
        with pytest.raises(AlignError, match=rf"references\[0\] has the tag '{tag}', which is none of IOB2; leave strict out"):
            measure("seqeval(strict=True)", predictions=[["O"]], references=[[tag]])


def test_tagged_sentences_are_measured_by_word():
    """Four of five words are right. NOUN: two right, one of them missed (F1 4/5); VERB: one right, one too many (2/3); ADV 1."""
    references, predictions = [["NOUN", "VERB"], ["NOUN", "NOUN", "ADV"]], [["NOUN", "VERB"], ["NOUN", "VERB", "ADV"]]
    columns = {"references": references, "predictions": predictions}
    assert one("accuracy", **columns) == pytest.approx(4 / 5)
    assert measure("f1", **columns) == pytest.approx({"f1_micro": 4 / 5, "f1_macro": (4 / 5 + 2 / 3 + 1) / 3})
    with pytest.raises(AlignError, match="sentence 1 has 1 predicted tags and 2"):
        measure("accuracy", predictions=[["A"], ["A"]], references=[["A"], ["A", "B"]])
    for tag in ("NOUN", "BANK", "U-PER", "M-PER"):  # seqeval made entities of type OUN, ANK and so on
        with pytest.raises(AlignError, match=rf"sentence 1 has the tag '{tag}', expected tags .* take f1 and accuracy"):
            measure("seqeval", predictions=[["O"], ["O"]], references=[["O"], [tag]])
    iobes = [["B-PER", "I-PER", "E-PER", "S-PER", "O"], ["B", "I"]]
    assert one("seqeval", "entity_f1", predictions=iobes, references=iobes) == 1


def test_the_examples_of_scikit_learn():
    assert one("accuracy", predictions=[0, 2, 1, 3], references=[0, 1, 2, 3]) == 0.5
    three = {"references": [0, 1, 2, 0, 1, 2], "predictions": [0, 2, 1, 0, 0, 1]}
    assert one("f1", "f1_macro", **three) == pytest.approx(0.8 / 3, abs=1e-6)
    assert one("f1", "f1_micro", **three) == pytest.approx(1 / 3, abs=1e-6)
    assert one("precision", "precision_macro", **three) == pytest.approx(2 / 9, abs=1e-6)
    assert one("recall", "recall_macro", **three) == pytest.approx(1 / 3, abs=1e-6)
    assert one("f1(positive=0)", "f1", **three) == pytest.approx(0.8, abs=1e-6)
    found = one("matthews", references=[+1, +1, +1, -1], predictions=[+1, -1, +1, +1])
    assert found == pytest.approx(-1 / 3, abs=1e-6)


@pytest.mark.filterwarnings("error")
def test_one_label_alone_tells_nothing_apart():
    """scikit-learn's warning about the shape of a matrix that nobody asked for came to the terminal."""
    for name, expected in (("matthews", 0), ("accuracy", 1), ("f1_micro", 1), ("f1_macro", 1)):
        assert one(name.partition("_")[0], name, predictions=["a", "a"], references=["a", "a"]) == expected


def test_labels_of_a_file_and_of_a_model_are_the_same():
    assert one("accuracy", predictions=["1", "0"], references=[1, 1]) == 0.5
    assert one("accuracy", predictions=[1, 0, 2], references=[1.0, 0.0, 2.0]) == 1
    assert one("accuracy", predictions=["1.0", "0.0"], references=[1, 0]) == 1
    assert one("accuracy", predictions=[True, False, True], references=[1, 0, 0]) == pytest.approx(2 / 3)
    assert one("accuracy", predictions=["True", "False"], references=[True, False]) == 1
    assert one("accuracy", predictions=[0.5, 1], references=["0.5", "1"]) == 1
    assert one("accuracy", predictions=[None, "a"], references=["None", "a"]) == 1
    with pytest.raises(AlignError, match=r"references\[1\] is list \['a'\], expected a label"):  # it was compared with "['a']"
        measure("accuracy", predictions=["b", "a"], references=["b", ["a"]])


@pytest.mark.parametrize("positive", ["1", "'1'", "1.0"])
@pytest.mark.parametrize(("ours", "theirs"), [(["1", "0"], [1, 1]), (["1", "0"], ["1", "1"]), ([1, 0], [1.0, 1.0])])
def test_the_positive_label_is_found_however_it_is_written(ours, theirs, positive):
    """One of two is found, none is wrong: F1 = 2/3."""
    assert one(f"f1(positive={positive})", "f1", predictions=ours, references=theirs) == pytest.approx(2 / 3)


def test_squads_normalization():
    """'The Normans!' is 'normans'. Two of three words of the prediction are two of the reference's four: F1 = 4/7."""
    columns = {"predictions": ["The  Normans!"], "references": [["a norman", "normans"]]}
    assert one("exact_match", **columns) == 1
    assert one("token_f1", **columns) == 1
    half = {"predictions": ["in the 10th century"], "references": ["10th and 11th century"]}
    assert one("exact_match", **half) == 0
    assert one("token_f1", **half) == pytest.approx(4 / 7, abs=1e-6)
    assert one("token_f1", predictions=[""], references=[["the"]]) == 1  # nothing is left of either: no answer, rightly


# -- by hand -------------------------------------------------------------------------------------------------------------------


def test_distinct_counts_over_all_texts():
    """a b a b | a c: 3 of 6 words, and ab, ba, ac of 4 pairs."""
    assert measure("distinct", predictions=["a b a b", "a c"]) == {"distinct_1": 0.5, "distinct_2": 0.75}
    assert one("distinct(n=3)", "distinct_3", predictions=["a", "b"]) == 0


def test_self_bleu_of_copies_and_of_strangers():
    assert one("self_bleu", predictions=["one two three four five"] * 3) == pytest.approx(100)
    assert one("self_bleu", predictions=["one two three four", "five six seven eight"]) == pytest.approx(0, abs=1e-6)


def test_self_bleu_of_a_sample():
    """Two of three texts are drawn: the two that are the same, or one of them and the stranger; one seed draws the same again."""
    texts = ["one two three four", "one two three four", "five six seven eight"]
    drawn = [[one(f"self_bleu(sample=2, seed={seed})", "self_bleu", predictions=texts) for seed in range(9)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {round(score) for score in drawn[0]} == {0, 100}


def test_perplexity_weighs_tokens_and_not_rows():
    """exp((1 + 6) / (1 + 2))."""
    assert one("perplexity", nlls=[1.0, 6.0], tokens=[1, 2]) == pytest.approx(math.exp(7 / 3))


def test_calibration_error():
    """Four pairs at confidence sigmoid(log 3) = 3/4, half of them right: the gap is 1/4. One more pair in another bin, at
    sigmoid(log 19) = 0.95 and right: (4 · 0.25 + 1 · 0.05) / 5.
    """
    log3, log19 = math.log(3), math.log(19)
    columns = {"chosen_scores": [log3, log3, 0, 0, log19], "rejected_scores": [0, 0, log3, log3, 0]}
    assert one("calibration_error", **columns) == pytest.approx((4 * 0.25 + 0.05) / 5, abs=1e-9)
    assert one("ranking_accuracy", **columns) == pytest.approx(3 / 5)


def test_length_bias():
    """Scores that are lengths: correlation 1, the longer always preferred; it was chosen in one pair of two."""
    found = measure("length_bias", chosen_scores=[5, 1], rejected_scores=[2, 7], chosen_lengths=[5, 1], rejected_lengths=[2, 7])
    assert found == {"length_correlation": pytest.approx(1), "longer_preferred": 1.0, "longer_chosen": 0.5}


def test_win_rate_with_its_interval():
    scores = [1.0] * 60 + [0.0] * 30 + [0.5] * 10
    columns = {"scores": scores, "baseline_scores": [0.5] * 100, "lengths": [7] * 100, "baseline_lengths": [7] * 100}
    found = measure("win_rate", **columns)
    assert found["win_rate"] == pytest.approx(0.65)
    deviation = math.sqrt((60 * 0.35**2 + 30 * 0.65**2 + 10 * 0.15**2) / 100) / 10
    assert found["win_rate_low"] == pytest.approx(0.65 - 1.96 * deviation, abs=0.02)
    assert found["win_rate_high"] == pytest.approx(0.65 + 1.96 * deviation, abs=0.02)
    assert found["win_rate_length_controlled"] == pytest.approx(0.65, abs=1e-3)


def test_length_control_takes_away_what_length_explains():
    """Answers win by their length alone: 'won' is drawn with probability sigmoid(2 tanh(gap)). Most are longer."""
    draw = random.Random(0)
    gaps = [draw.choice([1.0, 1.0, 1.0, -1.0]) for _ in range(4000)]
    wins = [float(draw.random() < 1 / (1 + math.exp(-2 * math.tanh(gap)))) for gap in gaps]
    assert sum(wins) / len(wins) > 0.63
    assert length_controlled(wins, gaps) == pytest.approx(0.5, abs=0.03)


def test_one_metric_in_several_ways():
    """The later one's numbers stood in place of the earlier one's."""
    columns = {"predictions": ["The cat runs home now"], "references": ["the Cat run home now"]}
    specs = ["bleu(lowercase=True)", "bleu", "exact_match", "bleu(max_order=1)", "bleu"]
    found = measure_all(specs, **columns)
    names = {"bleu": "bleu", **{spec: f"{spec}/bleu" for spec in ("bleu(lowercase=True)", "bleu(max_order=1)")}}
    assert found == {"exact_match": 0, **{name: one(spec, "bleu", **columns) for spec, name in names.items()}}
    assert len({round(value, 3) for value in found.values()}) == 4
    assert measure_all(["bleu(max_order=1)"], **columns) == measure("bleu(max_order=1)", **columns)


# -- instructions --------------------------------------------------------------------------------------------------------------

CASES = [
    ("keywords:existence", {"keywords": ["mom", "tea"]}, "Mom likes TEA.", "Mom likes coffee."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "A Cat!"),
    ("keywords:frequency", {"keyword": "war", "relation": "at least", "frequency": 2}, "War and war.", "War and peace."),
    ("keywords:frequency", {"keyword": "war", "relation": "less than", "frequency": 1}, "Peace.", "War."),
    ("keywords:letter_frequency", {"letter": "#", "let_relation": "at least", "let_frequency": 2}, "# a #b", "# a"),
    ("language:response_language", {"language": "de"}, "Der Hund läuft durch den Wald.", "The dog runs through the wood."),
    ("change_case:english_capital", {}, "THE DOG RUNS THROUGH THE WOOD.", "The dog runs through the wood."),
    ("change_case:english_lowercase", {}, "the dog runs through the wood.", "The dog runs through the wood."),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": "less than", "capital_frequency": 2},
        "An NGO of us",
        "An NGO, ALL of us",
    ),
    (
        "length_constraints:number_sentences",
        {"relation": "less than", "num_sentences": 3},
        "Dr. Ada ran. She won!",
        "A b. C d? E f.",
    ),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}, "one two three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        'a\n\n"Weekend" plans',
        "weekend\n\nplans",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP. P. S. Write!", "Bye.\nP.S. Write!"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Write!", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b\n**c**", "* a"),
    ("detectable_format:constrained_response", {}, "Well: My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2",
        "SECTION 1",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Home>>\nText", "<< >>"),
    ("combination:two_responses", {}, "a******b", "a******a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi!"),
    ("startend:end_checker", {"end_phrase": "Any questions?"}, 'So. any questions?"', "Any questions? No."),
    ("startend:quotation", {}, ' "all of it" ', '"half" of it'),
    ("punctuation:no_comma", {}, "None here.", "One, here."),
]


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES, ids=[f"{i} {case[0]}" for i, case in enumerate(CASES)])
def test_an_instruction(name, arguments, right, wrong):
    def strict(answer):
        return one("ifeval", "ifeval_prompt_strict", predictions=[answer], instruction_id_list=[[name]], kwargs=[[arguments]])

    assert strict(right) == 1
    assert strict(wrong) == 0
    assert strict(" ") == 0


def test_every_instruction_has_a_case():
    assert {case[0] for case in CASES} == set(instructions)
    assert len(list(instructions)) == 25


def test_loose_forgives_an_introduction_and_stars():
    ids = ["startend:quotation", "punctuation:no_comma"]
    found = measure("ifeval", predictions=['Sure, here:\n*"none here"*'], instruction_id_list=[ids], kwargs=[[{}, {}]])
    assert found["ifeval_prompt_strict"] == 0
    assert found["ifeval_prompt_loose"] == 1


ENDLESS = {
    "detectable_format:json_format": ("[", {}),
    "detectable_format:title": ("<<", {}),
    "detectable_format:number_bullet_lists": ("\n ", {"num_bullets": 1}),
    "detectable_content:number_placeholders": ("[", {"num_placeholders": 1}),
    "length_constraints:number_sentences": ("Mr. ", {"relation": "at least", "num_sentences": 2}),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_degenerate_answer_takes_no_time_and_raises_nothing(name):
    """Time grows with an answer's length, not with its square."""
    unit, arguments = ENDLESS[name]
    started = time.perf_counter()
    assert not followed(20_000 * unit + "a", name, arguments)
    assert time.perf_counter() - started < 1


def test_sentences():
    assert sentences("Mr. J. R. Smith paid 3.50 dollars. Did he? Yes!") == ["Mr. J. R. Smith paid 3.50 dollars.", "Did he?", "Yes!"]


def test_the_reward_is_the_share_of_instructions_followed():
    ids, arguments = ["punctuation:no_comma", "startend:quotation"], [{}, {"x": None}]
    assert follows(["no quotes", [{"role": "assistant", "content": '"quotes"'}], "x"], [ids, ids, None], [arguments] * 3) == [
        0.5,
        1,
        None,
    ]


def test_the_instructions_of_the_real_set_are_all_known(real):
    from align.data import load_rows

    rows = load_rows(real / "rlvr/ifeval_input_data.jsonl", "prompts").rows
    columns = {name: [row.columns[name] for row in rows] for name in ("instruction_id_list", "kwargs")}
    found = measure("ifeval", predictions=["My answer is yes."] * len(rows), **columns)
    assert 0 < found["ifeval_prompt_strict"] < 0.3
    assert found["ifeval_prompt_strict"] <= found["ifeval_prompt_loose"]


# -- what is refused -----------------------------------------------------------------------------------------------------------

PAIRED = (
    "accuracy",
    "precision",
    "recall",
    "f1",
    "matthews",
    "seqeval",
    "bleu",
    "chrf",
    "rouge",
    "meteor",
    "exact_match",
    "token_f1",
)


@pytest.mark.parametrize("name", PAIRED)
def test_unequal_lengths_and_nothing_are_refused(name):
    with pytest.raises(AlignError, match=f"{name}.*2 predictions, 1 references"):
        measure(name, predictions=["a", "b"], references=["a"])
    with pytest.raises(AlignError, match=f"{name}.*predictions is empty"):
        measure(name, predictions=[], references=[])
    with pytest.raises(AlignError, match=f"{name}.*needs 'references'; given: predictions"):
        measure(name, predictions=["a"])


def test_other_mistakes_are_explained():
    with pytest.raises(AlignError, match=r"unknown metric 'blue'.*did you mean 'bleu'"):
        measure("blue", predictions=["a"])
    with pytest.raises(AlignError, match=r"takes no 'order'.*max_order"):
        measure("bleu(order=2)", predictions=["a"], references=["a"])
    with pytest.raises(AlignError, match=r"predictions\[1\] is NoneType"):
        measure("bleu", predictions=["a", None], references=["a", "b"])
    with pytest.raises(AlignError, match=r"references\[0\] is \[\]"):
        measure("rouge", predictions=["a"], references=[[]])
    with pytest.raises(AlignError, match="sentence 1 has 1 predicted tags and 2"):
        measure("seqeval", predictions=[["O"], ["O"]], references=[["O"], ["O", "O"]])
    with pytest.raises(AlignError, match=r"2 predictions, sample=1; expected at least 2"):
        measure("self_bleu(sample=1)", predictions=["a", "b"])
    with pytest.raises(AlignError, match=r"pair 1 has the scores 0.5 and nan, expected numbers"):
        measure("calibration_error", chosen_scores=[1.0, 0.5], rejected_scores=[0.0, math.nan])
    with pytest.raises(AlignError, match="positive label 7"):
        measure("f1(positive=7)", predictions=[1], references=[1])
    with pytest.raises(AlignError, match=r"'bleu': tokenize='zhh': input should be '13a', .*'zh'"):
        measure("bleu(tokenize='zhh')", predictions=["a"], references=["a"])
    for spec in ("bleu(max_order=0)", "chrf(word_order=-1)", "rouge(stemmer='no')", "distinct(n='2')"):
        with pytest.raises(AlignError, match="input should be"):  # the first two gave a number, a wrong one
            measure(spec, predictions=["a b"], references=["a b"])
    with pytest.raises(AlignError, match=r"resamples=0: input should be greater than 0"):
        measure("win_rate(resamples=0)", scores=[1], baseline_scores=[0], lengths=[1], baseline_lengths=[1])
    with pytest.raises(AlignError, match=r"'ranking_accuracy': pair 0 has the scores nan and 0.0, expected numbers"):
        measure("ranking_accuracy", chosen_scores=[math.nan], rejected_scores=[0.0])
    with pytest.raises(AlignError, match=r"'length_bias': pair 0 has the scores nan and 0.0, expected numbers"):
        measure("length_bias", chosen_scores=[math.nan], rejected_scores=[0.0], chosen_lengths=[2], rejected_lengths=[1])
    with pytest.raises(AlignError, match=r"'win_rate': pair 0 has the scores nan and 0.0, expected numbers"):
        measure("win_rate", scores=[math.nan], baseline_scores=[0.0], lengths=[1], baseline_lengths=[1])
    with pytest.raises(AlignError, match=r"field kwargs: got '.{}.', expected a list"):
        measure("ifeval", predictions=["a"], instruction_id_list=[["startend:quotation"]], kwargs=["[{}]"])
    often = {"keyword": "a", "relation": "at least", "frequency": "x"}
    with pytest.raises(AlignError, match=r"'keywords:frequency': it cannot be checked with .*'frequency': 'x'"):
        measure("ifeval", predictions=["a"], instruction_id_list=[["keywords:frequency"]], kwargs=[[often]])
    assert followed("no", "punctuation:no_comma", None)  # Arrow's way to write no arguments
    with pytest.raises(AlignError, match="a row has 1 instruction ids and 2 kwargs"):
        measure("ifeval", predictions=["a"], instruction_id_list=[["startend:quotation"]], kwargs=[[{}, {}]])


def test_what_is_no_label_or_tag_is_refused():
    with pytest.raises(AlignError, match=r"predictions\[1\] is float nan, expected a label"):
        measure("accuracy", predictions=[1.0, math.nan], references=[1.0, 1.0])
    assert measure("accuracy", predictions=[None, None], references=[None, None]) == {"accuracy": 1.0}
    assert measure("accuracy", predictions=[0.5, 0.25], references=[0.5, 0.5]) == {"accuracy": 0.5}
    for tags in ("B-X O", [1, 2], None, ["O", ""]):
        with pytest.raises(AlignError, match=r"'seqeval': predictions\[0\] is .*, expected a list of tags"):
            measure("seqeval", predictions=[tags], references=[tags])
    with pytest.raises(AlignError, match=r"field kwargs: got 'x', expected an object"):
        measure("ifeval", predictions=["a"], instruction_id_list=[["startend:quotation"]], kwargs=[["x"]])


def test_words_that_sacrebleu_cannot_find_are_told_in_one_line(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "MeCab", None)
    with pytest.raises(AlignError, match=r"tokenize='ja-mecab' cannot be had: .*pip install sacrebleu\[ja\]$"):
        measure("bleu(tokenize='ja-mecab')", predictions=["a"], references=["a"])


def test_what_a_metric_stands_on_is_missed_before_any_work(monkeypatch):
    import sys

    from align.evaluation import Evaluation
    from align.stages import Evaluate
    from align.tasks import tasks

    refuse_missing([f"{name}(tokenize='zh')" if name == "bleu" else name for name in metrics])
    monkeypatch.setitem(sys.modules, "MeCab", None)
    monkeypatch.setitem(sys.modules, "evaluate", None)
    lacking = {"bleu(tokenize='ja-mecab')": "tokenize='ja-mecab' cannot be had", "hub:bleu": "needs the package 'evaluate'"}
    for spec, said in lacking.items():
        with pytest.raises(AlignError, match=said):
            Evaluation(Evaluate(models={"one": "nowhere"}, data="nowhere.jsonl", metrics=spec), None)
        with pytest.raises(AlignError, match=said):
            tasks["seq2seq"](None, 8, []).check_metrics([spec])


@pytest.mark.parametrize("broken", [ImportError("built for another numpy"), OSError("a library is not there"), RuntimeError("no")])
def test_what_a_metric_stands_on_and_is_broken_is_missed_before_any_work(monkeypatch, broken):
    def fails(*_, **__):
        raise broken

    monkeypatch.setattr("rouge_score.rouge_scorer.RougeScorer", fails)
    with pytest.raises(type(broken)):
        refuse_missing(["rouge"])


def test_meteor_keeps_the_marks_of_a_word():
    """Of two Hindi words one is the same. Cut at their vowels, which are marks, they are four pieces, three of which are."""
    day, gift, my = "\u0926\u093f\u0928", "\u0926\u093e\u0928", "\u092e\u0947\u0930\u0947"
    score = measure("meteor", predictions=[f"{my} {day}"], references=[f"{my} {gift}"])["meteor"]
    assert score == measure("meteor", predictions=["my day"], references=["my gift"])["meteor"]


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(AlignError, match=r"pip install 'align\[metrics\]'"):
        measure("bleu", predictions=["a"], references=["a"])


def test_every_metric_has_a_first_line():
    assert all((metrics[name].__doc__ or "").strip() for name in metrics)
