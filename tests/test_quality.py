"""Cleaning rules, personal data, near duplicates, decontamination and splits."""

import json
import random
import time
from pathlib import Path

import pytest

from align.cli import main
from align.data import load_rows, write_rows
from align.errors import AlignError
from align.quality.cleaning import clean
from align.quality.duplicates import NearDuplicates, leaders, pieces, similarity
from align.quality.overlap import Overlap
from align.quality.personal import mask, patterns
from align.quality.rules import DEFAULT, rules
from align.quality.splits import split_rows
from align.quality.texts import key, mojibake
from align.schema import LabelledRow, LabelledText, Message, PreferenceRow, PromptRow, QARow, SFTRow, TaggedTokens, TextRow
from benchmarks.duplicates import SMALL, made_up, planted, precision_and_recall


def sft(prompt, completion):
    return SFTRow(prompt=prompt, completion=completion)


def pair(prompt, chosen, rejected):
    return PreferenceRow(prompt=prompt, chosen=chosen, rejected=rejected)


def removed(rows, *specs):
    """Numbers of the rows that go, and why."""
    return [(number, why) for number, _, why, _ in clean(rows, specs).removed]


# -- the rules, each on a row that it should take and one that it should not ------------------------------------------------------

FINE = [sft("Who wrote it?", "Mina did."), sft("", "A text without a prompt."), sft("2 + 2", "4")]


@pytest.mark.parametrize("rule", DEFAULT)
def test_nothing_is_found_in_fine_rows(rule):
    assert removed([*FINE, pair("a", "b", "c"), TextRow(text="naïve café, 日本 – “quoted” £5, Ångström, NÃO")], rule) == []


def test_empty():
    rows = [sft("a", " \n"), sft("a", "..."), pair("a", "", "b"), TextRow(text="\u200b"), sft("a", "👍"), sft("a", ">"), *FINE]
    assert removed(rows, "empty") == [
        (1, "completion is empty"),
        (2, "completion has no letter, digit, sign or emoji"),
        (3, "chosen is empty"),
        (4, "text has no letter, digit, sign or emoji"),
    ]


def test_the_assistants_turns_of_a_conversation_are_its_reply():
    row = SFTRow(messages=[Message(role="user", content="words"), Message(role="assistant", content="")])
    assert removed([row], "empty") == [(1, "reply is empty")]
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = SFTRow(messages=[Message(role="user", content="words"), Message(role="assistant", content="", tool_calls=[call])])
    assert removed([row], "empty") == []


@pytest.mark.parametrize("text", ["“quoted”", "it’s", "café", "10 €", "日本", "naïve – yes", "Ünïcödé"])
@pytest.mark.parametrize("wrong", ["cp1252", "latin-1"])
def test_mojibake_is_what_reading_utf8_as_something_else_makes(text, wrong):
    assert mojibake(text) is None
    try:
        garbled = text.encode().decode(wrong)
    except UnicodeDecodeError:
        pytest.skip("Windows-1252 has no character for one of the bytes")
    assert mojibake(f"before {garbled} after")


def test_lost_characters():
    assert removed([sft("a", "na\ufffdve")], "mojibake_rows") == [(1, "completion has '\ufffd'")]


def test_boilerplate():
    sentence = "I have no idea what you would like me to say."
    rows = [
        sft("a", "As an AI language model, I cannot."),
        sft("b", "I am {{name}}."),
        sft("c", "Dear [Your Name], hello"),
        *(sft(f"question {i}", sentence) for i in range(5)),
        *(sft(f"is it {i}?", "Yes.") for i in range(9)),
    ]
    assert [number for number, _ in removed(rows, "boilerplate")] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert removed(rows, "boilerplate(repeats=6)")[-1][0] == 3


def test_identical_and_contradictory_pairs():
    rows = [pair("a", "One two.", "one two"), pair("b", "x", "y"), pair("B?", "y", "x!"), pair("c", "x", "y")]
    assert [number for number, _ in removed(rows, "identical_pairs")] == [1]
    assert [number for number, _ in removed(rows, "contradictory_pairs")] == [2, 3]
    labelled = [LabelledRow(prompt="a", completion="b", label=label) for label in (True, False)]
    assert len(removed([*labelled, LabelledRow(prompt="a", completion="c", label=True)], "contradictory_pairs")) == 2
    assert removed(labelled, "exact_duplicates") == []
    said = [("Good.", "1"), ("fine", "1"), ("good", "0"), ("Fine!", "1")]
    classes = [LabelledText(text=text, label=label) for text, label in said]
    assert [number for number, _ in removed(classes, "contradictory_pairs")] == [1, 3]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("It is -5.", "It is 5."),
        ("3 * 4", "3 + 4"),
        ("x > 3", "x < 3"),
        ("Pay $5", "Pay 5%"),
        ("1/2", "1-2"),
        ("Done 👍", "Done 👎"),
        ("Hello!", "Hello! 😊"),
    ],
)
def test_signs_and_emoji_are_no_punctuation(one, other):
    """Right and wrong answers that differ in a sign were taken for the same, and went."""
    rows = [PreferenceRow(prompt="Which?", chosen=one, rejected=other), PreferenceRow(prompt=one, chosen="a", rejected="b")]
    rows.append(PreferenceRow(prompt=other, chosen="a", rejected="b"))
    assert clean(rows, ["identical_pairs", "exact_duplicates"]).kept == rows
    same = [PreferenceRow(prompt="Which?", chosen="a well-known *one*", rejected="A well known one!")]
    assert not clean(same, ["identical_pairs"]).kept


def test_exact_duplicates_keep_the_first():
    rows = [sft("Who?", "Mina."), sft("who", " mina"), sft("Who?", "Ada."), sft("1 + 1", "2"), sft("1 - 1", "0")]
    assert removed(rows, "exact_duplicates") == [(2, "the same as 'Who?\\nMina.'")]


def test_rows_that_are_labelled_otherwise_are_no_copies():
    """The second of each three is a near copy with another verdict, the third one with the same."""
    said = "The wren of the old mill sings every morning before the bell of the church is heard"
    texts = [said, said + "!", said + "?"]
    labels = ("good", "bad", "good")
    sentences = [LabelledText(text=text, label=label) for text, label in zip(texts, labels, strict=True)]
    answers = [LabelledRow(prompt="Who?", completion=t, label=label == "good") for t, label in zip(texts, labels, strict=True)]
    tagged = [TaggedTokens(tokens=said.split(), tags=["O", "B-bird" if label == "good" else "O", *["O"] * 15]) for label in labels]
    for rows in (sentences, answers, tagged):
        for rule in ("exact_duplicates", "near_duplicates"):
            assert [number for number, _ in removed(rows, rule)] == [3]


def test_the_vowels_of_indian_and_thai_words_count():
    """Day and gift in Hindi: without their vowels, which are marks, they are one word."""
    day, gift, thai = "\u0926\u093f\u0928", "\u0926\u093e\u0928", ("\u0e14\u0e35", "\u0e14\u0e38")
    assert key(day) == day != key(gift)
    assert key(thai[0]) != key(thai[1])
    assert key("\u00c9t\u00e9, e\u0301te\u0301") == "\u00e9t\u00e9 \u00e9t\u00e9"
    assert removed([pair("a", day, gift)], "identical_pairs") == []
    assert removed([sft("a", day), sft("a", gift)], "exact_duplicates") == []


def test_questions_about_one_context_are_no_copies():
    """More than half of XQuAD's went for their context, and every question without an answer as an empty text."""
    context = "The wrens of Bergen nest in May, and Mina has counted them for nine years from the roof of the old mill. " * 3
    asked = [
        "Where do the wrens nest?",
        "Who counts them?",
        "From which of all the roofs of the old town are they counted?",
        "Who counts them!",
    ]
    rows = [QARow(question=question, context=context, answers=["Mina"]) for question in asked]
    cleaned = clean([*rows, QARow(question="Which owls are there?", context=context), QARow(question="?", context=context)])
    assert [(number, rule) for number, rule, _, _ in cleaned.removed] == [(6, "empty"), (4, "exact_duplicates")]
    nearly = [*rows, rows[2].model_copy(update={"question": "From which of all the roofs of the old town were they counted?"})]
    assert [number for number, _ in rules["near_duplicates"](nearly)] == [3, 4]


def test_length_outliers():
    rows = [sft("a", "word " * n) for n in range(20, 60)]
    assert removed(rows, "length_outliers") == []
    assert [number for number, _ in removed([*rows, sft("a", "word " * 20_000)], "length_outliers")] == [41]


def test_wrong_language():
    english = "The lighthouse keeper wrote a letter to his sister every Sunday evening."
    german = "Der Leuchtturmwärter schrieb jeden Sonntagabend einen Brief an seine Schwester."
    chinese = "灯塔看守人每个星期天晚上都给他的妹妹写一封信，告诉她大海的样子和远方的船。"
    rows = [sft("a", english), sft("a", german), sft("a", chinese), sft("a", "Ja."), sft(german, english)]
    assert removed(rows, "wrong_language(expected='en')") == [(2, "completion is de, not en"), (3, "completion is zh, not en")]
    assert removed(rows, "wrong_language(expected=('en', 'de'))") == [(3, "completion is zh, not de or en")]


def test_each_rule_sees_what_is_left_and_everything_adds_up():
    rows = [sft("a", ""), sft("a", ""), *FINE]
    cleaned = clean(rows, ["empty", "exact_duplicates"])
    assert cleaned.account([("a.jsonl", n) for n in range(1, 10)])["rules"]["exact_duplicates"]["count"] == 0
    assert cleaned.kept == FINE
    assert cleaned.summary() == "5 rows = 3 kept + 2 removed (2 empty)"


def test_unknown_rules_and_arguments():
    with pytest.raises(AlignError, match=r"unknown cleaning rule 'emtpy' \(did you mean 'empty'\?\)"):
        clean(FINE, ["emtpy"])
    with pytest.raises(AlignError, match=r"takes no 'treshold' \(did you mean 'threshold'\?\)"):
        clean(FINE, ["near_duplicates(treshold=0.9)"])
    with pytest.raises(AlignError, match="needs 'expected'"):
        clean(FINE, ["wrong_language"])
    with pytest.raises(AlignError, match="threshold: got 0, expected"):
        clean(FINE, ["near_duplicates(threshold=0)"])
    for spec in (
        "near_duplicates(threshold='high')",
        "length_outliers(deviations=0)",
        "boilerplate(repeats=2.5)",
        "wrong_language(expected=3)",
        "contaminated(against='eval.jsonl', n=0)",
    ):
        with pytest.raises(AlignError, match=r"^cleaning rule '\w+': \w+=\S+: input should be [^\n]+$"):
            clean(FINE, [spec])
    assert set(DEFAULT) <= set(rules)


# -- personal data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text", "masked"),
    [
        ("email", "write to mina.k+x@sea.example.org.", "write to [EMAIL]."),
        ("email", "@mina is a handle, a@b has no domain", None),
        ("phone", "call +49 170 123 4567 now, or (030) 901 820 00", "call [PHONE] now, or [PHONE]"),
        ("phone", "on 2024-05-17 10 20 30 of 1000 2000 people; 3.14.159; 12 34", None),
        ("ip", "from 8.8.8.8, not 127.0.0.1, 999.1.1.1 or 1.2.3.4.5", "from [IP], not 127.0.0.1, 999.1.1.1 or 1.2.3.4.5"),
        ("phone", "Call 030 901 8200. Or 555.123.4567.", "Call [PHONE]. Or [PHONE]."),
        ("phone", "Call (415) 555-2671, +1 (415) 555-2671 or 1 (415)555.2671.", "Call [PHONE], [PHONE] or [PHONE]."),
        ("phone", "tel:+14155552671, +4917012345678 or +49 170 1234567", "tel:[PHONE], [PHONE] or [PHONE]"),
        ("phone", "id 4155552671, +1700000000, $1,234,567.89, +1.2345678901, 1999-2004, (2019) 2020-2021, 12/05/2024", None),
        ("phone", "f(415) 555-2671; x = a+14155552671; y((100) 200-3000); (415) 55-2671; +2000000", None),
        ("ip", "It is 8.8.8.8. Or 8.8.4.4... Never 8.8.8.8.8", "It is [IP]. Or [IP]... Never 8.8.8.8.8"),
        ("ip", "Version 1.2.3.4, v1.2.3.4 and build: 1.2.3.4 at 1.2.3.4", "Version 1.2.3.4, v1.2.3.4 and build: 1.2.3.4 at [IP]"),
        ("credit_card", "4111 1111 1111 1111, not 4111 1111 1111 1112", "[CREDIT_CARD], not 4111 1111 1111 1112"),
        ("iban", "DE89 3704 0044 0532 0130 00, not DE88 3704 0044 0532 0130 00", "[IBAN], not DE88 3704 0044 0532 0130 00"),
        ("ssn", "123-45-6789, not 000-45-6789", "[SSN], not 000-45-6789"),
        ("secret", "AKIAIOSFODNN7EXAMPLE and ghp_" + "a1" * 18, "[SECRET] and [SECRET]"),
        ("secret", "key=sk-proj-" + "aB3_" * 10 + " or 'hf_" + "aB3" * 12 + "'", "key=[SECRET] or '[SECRET]'"),
        ("secret", "risk-assessment-methodology-2024, task-oriented-dialogue-systems-2, sk-fading-circle-container", None),
        ("secret", "half_hf_" + "a" * 9 + " shf_" + "a" * 30 + " keyJ" + "a" * 10 + ".eyJ" + "a" * 10 + "." + "a" * 10, None),
        ("secret", "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY----- end", "[SECRET] end"),
    ],
)
def test_personal_data_is_told_by_its_form_and_check_sum(kind, text, masked):
    found, counts = mask(text, [kind])
    assert found == (masked or text)
    assert counts[kind] == found.count("[")


def test_masking_a_context_moves_the_places_of_its_answers():
    context = "Bergen? Write to someone@example.org. Mina lives in Bergen, 203.0.113.7 is not hers."
    row = QARow(question="Where?", context=context, answers=["Bergen", "Bergen"], starts=[0, context.rindex("Bergen")])
    (kept,) = clean([row], (), ["email"]).kept
    assert kept.context.startswith("Bergen? Write to [EMAIL]. Mina lives in Bergen,")
    assert kept.starts == [0, kept.context.rindex("Bergen")]


def test_a_long_word_is_looked_through_once():
    """Every letter of it was taken for the beginning of an address: Base64 took minutes, twice as long four times that."""
    blob = "QmFzZTY0-" * 20_000
    began = time.process_time()
    assert mask(f"{blob} a@b.org", ["email"])[0] == f"{blob} [EMAIL]"
    assert time.process_time() - began < 5


def test_masking_goes_into_messages_and_leaves_the_rest():
    call = {"type": "function", "function": {"name": "mail", "arguments": {"to": "a@b.org"}}}
    turns = [Message(role="user", content="I am a@b.org"), Message(role="assistant", content="", tool_calls=[call])]
    cleaned = clean([SFTRow(messages=turns), FINE[0]], [], list(patterns))
    assert cleaned.masked == {"email": 2}
    assert cleaned.masked_rows == [1]
    assert cleaned.kept[0].messages[1].tool_calls[0]["function"]["arguments"] == {"to": "[EMAIL]"}
    assert cleaned.kept[1] == FINE[0]


# -- near duplicates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edits", [1, 2])
def test_copies_with_small_edits(edits):
    """200 of 600 texts have a copy with typos, a word more, less or changed, other case; a fifth share their first half with
    another text, which makes them no copies.
    """
    texts = made_up(600)
    precision, recall = precision_and_recall(texts, planted(texts, SMALL, edits), 0.7)
    assert precision >= 0.95
    assert recall >= 0.95


def test_copies_among_real_rows(real):
    from align.quality.texts import whole

    rows = load_rows(real / "sft" / "alpaca_en_demo.jsonl", "sft").rows
    texts = list({key(text): text for row in rows if len((text := whole(row)).split()) >= 12}.values())[:400]
    precision, recall = precision_and_recall(texts, planted(texts, SMALL, 1), 0.7)
    assert min(precision, recall) >= 0.95


def test_texts_with_other_numbers_are_not_even_compared(monkeypatch):
    """Of sums in one wording each was compared with every other: minutes for some thousands."""
    compared = []
    monkeypatch.setattr(NearDuplicates, "_repeats", lambda self, *texts: compared.append(texts) or True)
    sums = [f"What is the sum of the two numbers {i} and {7 * i}? Please answer with a number alone." for i in range(40)]
    assert leaders(sums) == list(range(40))
    assert not compared
    assert leaders([*sums, sums[3].replace("alone", "only")])[-1] == 3


def test_texts_in_one_wording_are_not_each_compared_with_all(monkeypatch):
    compared, repeats = [], NearDuplicates._repeats
    monkeypatch.setattr(NearDuplicates, "_repeats", lambda self, *texts: compared.append(texts) or repeats(self, *texts))
    wording = "Please write a long and detailed story for children about the animal that lives in the old wood: "
    texts = [wording + "".join(chr(97 + (i // 26**n) % 26) for n in range(3)) for i in range(80)]
    assert leaders(texts) == [0] * 80
    assert len(compared) == 79
    compared.clear()
    split = split_rows([PromptRow(prompt=text) for text in texts], 0.5)
    assert 80 in (len(split.train), len(split.held_out))
    assert len(compared) == 79


def test_texts_in_one_wording_that_share_too_little_are_not_compared_piece_by_piece(monkeypatch):
    """20,000 rows of one template would take hours: every pair is a candidate, and none is alike enough."""
    compared, repeats = [], NearDuplicates._repeats
    monkeypatch.setattr(NearDuplicates, "_repeats", lambda self, *texts: compared.append(texts) or repeats(self, *texts))
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(200)]

    def some(count):
        return " ".join(chance.choices(words, k=count))

    texts = [
        f"please write a short friendly note to {some(3)} about the visit that we planned together with {some(3)}"
        for _ in range(90)
    ]
    texts += [text.replace("friendly", "kind") for text in texts[:10]]
    of = [pieces(text) for text in texts]
    alike = [(i, j) for i in range(len(texts)) for j in range(i) if similarity(of[i], of[j]) >= 0.7]
    assert [(i, next((j for j in range(i) if (i, j) in alike), i)) for i in range(100)] == list(enumerate(leaders(texts)))
    assert len(compared) <= 2 * len(alike) < 40


def test_groups_do_not_change_when_texts_are_added():
    texts = made_up(90)
    texts += planted(texts, SMALL, 1)
    assert leaders(texts)[:60] == leaders(texts[:60])
    assert leaders(["a", "A!", "b", "", ""]) == [0, 0, 2, 3, 3]
    assert leaders(["What is 12 + 7, in words?", "What is 12 + 8, in words?", "What is 12 + 7 in word?"]) == [0, 1, 0]


# -- decontamination -----------------------------------------------------------------------------------------------------------

QUESTION = "A train leaves the old station at nine and arrives in the harbour town at noon, how long did it take?"


def test_overlap():
    seen = Overlap([QUESTION, "Who wrote the letter to the king in May?", "Yes?"])
    assert seen.with_text(f"Solve this. {QUESTION.upper()} Show your work.")
    assert seen.with_text("Tell me: who wrote the letter to the king, in may")
    assert seen.with_text("yes")
    assert seen.with_text("yes it is") is None  # a text of one word is no evidence inside another
    assert seen.with_text("A train leaves the old station at nine and arrives somewhere else at noon") is None  # 11 words in common
    assert seen.with_text("") is None
    assert Overlap(["灯塔看守人每个星期天晚上都写一封信"]).with_text("请翻译：灯塔看守人每个星期天晚上都写一封信。")


def test_decontamination_is_a_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("eval.jsonl", [{"prompt": QUESTION}])
    rows = [sft("Hello", "there"), sft(f"Again: {QUESTION}", "3 hours"), sft("Tell me one", f"{QUESTION} Three.")]
    assert [number for number, _ in removed(rows, "contaminated(against='eval.jsonl')")] == [2, 3]


# -- splits --------------------------------------------------------------------------------------------------------------------


def test_copies_stay_together_and_nothing_moves_when_rows_are_added():
    texts = made_up(300)
    copies = planted(texts, SMALL, 1)
    rows = [PromptRow(prompt=text) for text in [*texts, *copies]]
    split = split_rows(rows, 0.3)
    assert len(split.train) + len(split.held_out) + len(split.between) == len(rows)
    assert 0.2 < len(split.held_out) / len(rows) < 0.4
    held = {row.prompt for row in split.held_out}
    apart = sum((copy in held) != (texts[source] in held) for copy, source in copies.items())
    assert apart <= 0.02 * len(copies)
    by_chance = split_rows([PromptRow(prompt=text) for text in copies], 0.3)
    assert {row.prompt for row in by_chance.held_out} != held & set(copies)  # alone, the copies would go elsewhere
    before = split_rows(rows[:250], 0.3)
    assert [row for row in split.held_out if row in rows[:250]] == before.held_out


def test_a_prompt_near_both_sides_is_on_neither():
    """The middle text is near to both ends, which are not near to each other; some seed puts the ends apart."""
    shared, first, second = ([f"{letter}{i}" for i in range(count)] for letter, count in (("w", 30), ("x", 10), ("y", 10)))
    one, other = " ".join([*shared, *first]), " ".join([*shared, *second])
    middle = " ".join([*shared, *first[:5], *second[5:]])
    assert leaders([one, other], 0.7) == [0, 1]
    rows = [PromptRow(prompt=text) for text in (one, other, middle)]
    splits = [split_rows(rows, 0.5, seed, threshold=0.7) for seed in range(20)]
    assert any(split.between for split in splits)
    for split in splits:
        assert (len(split.between) == 1) == (len(split.train) == len(split.held_out) == 1)
        assert split.between in ([], [rows[2]])


# -- the commands --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dirty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("eval.jsonl", [{"prompt": QUESTION}])
    rows = [pair(f"Question {i}?", f"good answer {i} by a@b.org", f"bad answer {i}") for i in range(4)]
    write_rows("dirty.jsonl", [*rows, rows[0], pair("x", "garbled â€œ text", "y"), pair(QUESTION, "three hours", "two")])
    return tmp_path


def test_nothing_is_written_without_an_output(dirty, capsys):
    before = sorted(dirty.iterdir())
    assert main(["data", "clean", "dirty.jsonl"]) == 0
    page = capsys.readouterr().out
    assert "7 rows = 5 kept + 2 removed" in page
    assert "dirty.jsonl row 6: chosen has 'â€œ'" in page
    assert "nothing was written" in page
    assert sorted(dirty.iterdir()) == before


@pytest.mark.parametrize("command", [["clean", "odd.jsonl"], ["check", "odd.jsonl"], ["stats", "odd.jsonl"]])
def test_no_row_steers_the_terminal(dirty, capsys, command):
    rows = [{"text": f"film {i}", "label": "\x1b[31mred"} for i in range(3)]
    write_rows(
        "odd.jsonl",
        [*rows, rows[0] | {"text": "\x1b[2J as an AI model"}, rows[0] | {"text": "\x1b[2J lorem ipsum"}, {"\x1b[2J": 1}],
    )
    main(["data", *command])
    page = capsys.readouterr().out
    assert ("\x1b" in page, "\\x1b" in page) == (False, True)


def test_clean_writes_what_is_kept_and_what_is_not(dirty, capsys):
    arguments = ["--against", "eval.jsonl", "--mask", "all", "--out", "clean.jsonl", "--json"]
    assert main(["data", "clean", "dirty.jsonl", *arguments]) == 0
    account = json.loads(capsys.readouterr().out)
    assert {rule: found["count"] for rule, found in account["rules"].items() if found["count"]} == {
        "mojibake_rows": 1,
        "exact_duplicates": 1,
        "contaminated": 1,
    }
    assert account["masked"] == {"counts": {"email": 4}, "rows": 4}
    assert len(load_rows("clean.jsonl", "preference").rows) == account["kept"] == 4
    assert "[EMAIL]" in (dirty / "clean.jsonl").read_text()
    aside = [json.loads(line) for line in (dirty / "clean.removed.jsonl").read_text().splitlines()]
    assert [(row["number"], row["rule"]) for row in aside] == [(6, "mojibake_rows"), (5, "exact_duplicates"), (7, "contaminated")]


def test_rows_that_cannot_be_read_count_and_are_kept_with_the_removed(dirty, capsys):
    """Row 3 has half of a surrogate pair, row 5 is cut off; the mojibake of row 6 is the eighth row then."""
    lines = (dirty / "dirty.jsonl").read_text().splitlines()
    lines[2:2] = ['{"prompt": "p", "chosen": "\\ud800", "rejected": 5}']
    lines[4:4] = ['{"prompt": "cut']
    (dirty / "dirty.jsonl").write_text("\n".join(lines))
    assert main(["data", "clean", "dirty.jsonl", "--rules", "mojibake_rows", "--out", "clean.jsonl", "--json"]) == 0
    (example,) = json.loads(capsys.readouterr().out)["rules"]["mojibake_rows"]["examples"]
    assert (example["file"], example["row"]) == ("dirty.jsonl", 8)
    aside = [json.loads(line) for line in (dirty / "clean.removed.jsonl").read_text().splitlines()]
    assert [(row["file"], row["number"], row["rule"]) for row in aside] == [
        ("dirty.jsonl", 3, "reading"),
        ("dirty.jsonl", 5, "reading"),
        ("dirty.jsonl", 8, "mojibake_rows"),
    ]
    assert [row["row"] for row in aside[:2]] == [json.loads(lines[2]), lines[4]]
    assert "expected" in aside[0]["why"]
    assert len((dirty / "clean.jsonl").read_text().splitlines()) + len(aside) == len(lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["clean", "train.jsonl", "--out", "train.jsonl"],
        ["clean", "train.removed.jsonl", "--out", "train.jsonl"],
        ["clean", "eval.jsonl", "--against", "train.jsonl", "--out", "train.jsonl"],
        ["clean", ".", "--out", "train.jsonl"],
        ["split", "train.jsonl", "--out", "."],
        ["convert", "link.jsonl", "--to", "openai", "--out", "train.jsonl"],
        ["convert", "train.quarantine.jsonl", "--to", "openai", "--out", "train.jsonl", "--on_bad_row", "quarantine"],
        ["augment", "train.jsonl", "--how", "paraphrases", "--out", "./train.jsonl"],
        ["check", "eval.jsonl", "train.jsonl", "--quarantine", "train.jsonl"],
    ],
)
def test_no_command_writes_over_what_it_reads(dirty, capsys, arguments):
    for name in ("train.jsonl", "train.removed.jsonl", "train.quarantine.jsonl"):
        (dirty / name).write_text((dirty / "dirty.jsonl").read_text() + "no row\n")
    (dirty / "link.jsonl").symlink_to("train.jsonl")
    before = {path.name: path.read_text() for path in dirty.iterdir()}
    assert main(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert "is what is read, and would be overwritten" in error
    assert error.count("\n") == 1
    assert {path.name: path.read_text() for path in dirty.iterdir()} == before


def test_rows_that_cannot_be_read_are_in_the_account_of_what_is_written(dirty, capsys):
    with (dirty / "dirty.jsonl").open("a") as file:
        file.write('{"prompt": "cut')
    for arguments in (["split", "dirty.jsonl", "--out", "parts"], ["augment", "dirty.jsonl", "--how", "paraphrases"]):
        assert main(["data", *arguments, "--json", *(["--out", "more.jsonl"] if "--how" in arguments else [])]) == 0
        assert json.loads(capsys.readouterr().out)["loaded"].startswith("8 rows = 7 used + 1 set aside")


def test_a_split_leaves_no_file_of_an_earlier_one(dirty, capsys):
    """Rows between the sides of one split are on a side of the next."""
    (dirty / "parts").mkdir()
    write_rows("parts/between.jsonl", [{"prompt": QUESTION}])
    assert main(["data", "split", "dirty.jsonl", "--out", "parts"]) == 0
    assert "0 near prompts of both sides" in capsys.readouterr().out
    assert sorted(path.name for path in (dirty / "parts").iterdir()) == ["test.jsonl", "train.jsonl"]
    assert main(["data", "split", "dirty.jsonl", "--threshold", "0", "--out", "parts"]) == 2
    assert "threshold: got 0.0, expected a similarity above 0" in capsys.readouterr().err


def test_split_writes_two_files(dirty, capsys):
    assert main(["data", "split", "dirty.jsonl", "--held_out", "0.5", "--seed", "1", "--out", "parts", "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["train"] + account["test"] + account["between"] == account["rows"] == 7
    loaded = {side: load_rows(f"parts/{side}.jsonl", "preference").rows for side in ("train", "test")}
    assert not {row.prompt for row in loaded["train"]} & {row.prompt for row in loaded["test"]}


def test_other_columns_stay_with_their_rows(tmp_path, monkeypatch):
    """Masked where rows are; one that would say something to another format under another name, as `data convert` writes it."""
    monkeypatch.chdir(tmp_path)
    told = [("2 and 2", "4 it is"), ("the sea", "blue"), ("2 and 2", "4 it is"), ("a cat's voice", "meow")]
    rows = [
        {"instruction": f"Tell me of {what}", "output": said, "id": i, "text": f"by a{i}@b.org"}
        for i, (what, said) in enumerate(told)
    ]
    write_rows("rows.jsonl", rows)
    commands = {
        "clean --mask email --rules exact_duplicates --out out/clean.jsonl": {"clean": [0, 1, 3], "clean.removed": [2]},
        "augment --how paraphrases --out out/more.jsonl": {"more": [*range(4), *range(4)]},
        "split --held_out 0.5 --out out": {},
    }
    for command, files in commands.items():
        verb, *flags = command.split()
        assert main(["data", verb, "rows.jsonl", *flags]) == 0
        for file, ids in files.items():
            written = [json.loads(line) for line in Path(f"out/{file}.jsonl").read_text().splitlines()]
            written = [row.get("row", row) for row in written]
            assert [row["id"] for row in written] == ids
            for row in written:
                assert row["messages"][-1]["content"] == told[row["id"]][1]
                assert row["source_text"] == ("by [EMAIL]" if file == "clean" else f"by a{row['id']}@b.org")
    sides = [json.loads(line) for side in ("train", "test") for line in Path(f"out/{side}.jsonl").read_text().splitlines()]
    assert {(row["id"], row["messages"][-1]["content"]) for row in sides} == {(i, said) for i, (_, said) in enumerate(told)}


@pytest.mark.parametrize(
    "arguments", [["check", "dirty.jsonl", "--quarantine", "."], ["stats", "dirty.jsonl", "--plot", "lengths.txt"]]
)
def test_outputs_that_are_none_are_refused_in_one_line(dirty, capsys, arguments):
    assert main(["data", *arguments]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_wrong_output_is_refused_before_the_work(dirty, capsys):
    assert main(["data", "clean", "dirty.jsonl", "--out", "clean.csv"]) == 2
    assert "rows are written as .jsonl" in capsys.readouterr().err
