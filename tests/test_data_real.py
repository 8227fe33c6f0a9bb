"""The real data sets, in their published formats with their oddities; skipped where the folder is absent.

The traps are those that its README lists.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from align.data import RowStream, load_rows, prompt_key, split_by_prompt, write_rows
from align.errors import AlignError

REAL = Path(os.environ.get("ALIGN_REAL_DATA", Path(__file__).parents[2] / "shared" / "real"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")

REAL_ROWS = {
    "sft/alpaca_en_demo.jsonl": ("sft", 697, 0),
    "sft/alpaca_zh_demo.jsonl": ("sft", 708, 0),
    "sft/code_alpaca_2k.jsonl": ("sft", 1412, 0),
    "sft/fastchat_dummy_conversation.jsonl": ("sft", 267, 0),
    "sft/glaive_toolcall_en_demo.jsonl": ("sft", 212, 0),
    "sft/glaive_toolcall_zh_demo.jsonl": ("sft", 210, 0),
    "sft/identity.jsonl": ("sft", 66, 0),
    "sft/lima.jsonl.gz": ("sft", 734, 0),
    "sft/litgpt_dolly_fixture.jsonl": ("sft", 3, 0),
    "sft/llms_from_scratch_instruction_data.jsonl": ("sft", 780, 0),
    "sft/oaast_sft_zh.jsonl": ("sft", 472, 0),
    "sft/openai_toy_chat_fine_tuning.jsonl": ("sft", 10, 0),
    "sft/reason_tool_use_demo_50.jsonl": ("sft", 36, 0),
    "sft/self_instruct_user_oriented.jsonl": ("sft", 176, 0),
    "sft/stanford_alpaca_seed_tasks.jsonl": ("sft", 112, 0),
    "sft/v1_sft_demo.jsonl": ("sft", 345, 0),
    "pref/alpaca_eval_alpaca7b_gpt4_annotations.jsonl": ("preference", 561, 13),
    "pref/alpaca_eval_alpaca7b_weighted_annotations.jsonl.gz": ("preference", 571, 3),
    "pref/dpo_en_demo.jsonl": ("preference", 212, 0),
    "pref/dpo_zh_demo.jsonl": ("preference", 204, 0),
    "pref/hh_rlhf_harmless_base_test.jsonl.gz": ("preference", 1573, 0),
    "pref/llms_from_scratch_preference.jsonl": ("preference", 777, 3),
    "pref/medicalgpt_dpo_zh_500.jsonl": ("preference", 361, 0),
    "pref/oaast_rm_zh.jsonl": ("preference", 495, 1),
    "pref/oasst_en_100_tree.jsonl": ("preference", 145, 0),
    "pref/pku_saferlhf_sample.jsonl": ("preference", 23, 0),
    "pref/stack_exchange_paired_tiny.jsonl": ("preference", 21, 0),
    "pref/ultrafeedback_messages_sample.jsonl": ("preference", 11, 0),
    "pref/ultrafeedback_study_eval_clean.jsonl": ("preference", 127, 1),
    "pref/ultrafeedback_study_label_flip_20.jsonl.gz": ("preference", 694, 3),
    "pref/ultrafeedback_study_train_clean.jsonl.gz": ("preference", 694, 3),
    "pref/v1_dpo_demo.jsonl": ("preference", 8, 0),
    "kto/gsm8k_example_model_solutions.jsonl": ("unpaired", 3716, 0),
    "kto/kto_en_demo.jsonl": ("unpaired", 218, 0),
    "rlvr/gsm8k_test.jsonl": ("prompts", 929, 0),
    "rlvr/gsm8k_train.jsonl.gz": ("prompts", 5203, 0),
    "rlvr/ifeval_input_data.jsonl": ("prompts", 375, 0),
    "rlvr/open_instruct_rlvr_test.jsonl": ("prompts", 69, 0),
    "prompts/alpaca_eval_outputs_alpaca-7b.jsonl": ("prompts", 574, 0),
    "prompts/alpaca_eval_outputs_gpt-3.5-turbo-0301.jsonl": ("prompts", 574, 0),
    "prompts/alpaca_eval_outputs_gpt4.jsonl": ("prompts", 574, 0),
    "prompts/alpaca_eval_outputs_text_davinci_003.jsonl": ("prompts", 574, 0),
    "prompts/alpaca_farm_outputs_baseline.jsonl": ("prompts", 176, 0),
    "prompts/alpaca_farm_outputs_rlhf.jsonl": ("prompts", 176, 0),
    "prompts/alpaca_farm_outputs_sft.jsonl": ("prompts", 176, 0),
    "prompts/anthropic_evals_agreeableness.jsonl": ("prompts", 705, 0),
    "prompts/arena_hard_v0_1_question.jsonl": ("prompts", 338, 0),
    "prompts/mt_bench_question.jsonl": ("prompts", 61, 0),
    "rlvr/svamp.jsonl": ("prompts", 710, 0),
    "rlvr/commonsenseqa_dev.jsonl": ("prompts", 849, 0),
    "qa/squad_v2_dev_normans.json": ("qa", 137, 0),
    "qa/xquad_de.json": ("prompts", 887, 0),
    "cls/sst2_train.tsv": ("classification", 6917, 0),
    "ner/wnut17_train.conll": ("tagging", 3394, 0),
    "text/c4_demo.jsonl": ("text", 216, 0),
    "text/tinyshakespeare.txt": ("text", 5534, 0),
    "text/tinystories_train_head.txt": ("text", 3390, 0),
    "text/wiki_demo.txt": ("text", 21, 0),
    "text/wikitext2_valid.txt": ("text", 1160, 0),
}


@pytest.mark.parametrize("name", REAL_ROWS)
def test_real_data(name: str) -> None:
    kind, used, set_aside = REAL_ROWS[name]
    loaded = load_rows(REAL / name, kind)
    assert (len(loaded.rows), loaded.account.set_aside) == (used, set_aside)


BY_THEMSELVES = {"sft": "sft", "pref": "preference", "kto": "unpaired", "text": "text", "qa": "qa", "cls": "classification"}
BY_THEMSELVES |= {"ner": "tagging", "rlvr": "prompts", "prompts": "prompts"}
"""The kind that the files of a folder have by themselves."""
DEMONSTRATE = ("gsm8k_t", "alpaca_eval_outputs", "alpaca_farm_outputs")
"""Files of the last two folders that hold answers in full, so that they are demonstrations unless asked for as prompts."""


def published_counts() -> dict[str, int]:
    """Each file of the README's table, and how many rows of it are here."""
    table = (REAL / "README.md").read_text(encoding="utf-8").split("## Files")[1].split("## Details")[0]
    counts = {}
    for name, here in re.findall(r"^\| (\S+) \|[^|]*\|[^|]*\| *([\d,]+) *(?:lines)? *\|", table, flags=re.MULTILINE):
        name = name.replace("{valid,test}", "valid")
        if (REAL / name).is_file():
            counts[name] = int(here.replace(",", ""))
    return counts


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data sets are not here")
def test_every_real_file_is_what_its_readme_says() -> None:
    """Recognised without a word, the rows that the README counts, each used or set aside for a reason."""
    counts = published_counts()
    here = {path.relative_to(REAL).as_posix() for folder in BY_THEMSELVES for path in (REAL / folder).iterdir()}
    assert counts.keys() == here
    for name, rows in counts.items():
        stream = RowStream(REAL / name, on_bad_row="quarantine")
        gave = sum(1 for _ in stream)
        account, (folder, file) = stream.account, name.split("/")
        kind = "sft" if file.startswith(DEMONSTRATE) else BY_THEMSELVES[folder]
        assert (name, account.rows) == (name, rows)
        assert account.rows == account.used + sum(account.reasons.values())
        if file == "mt_bench_reference_gpt4.jsonl":  # answers whose questions are in another file
            assert (gave, list(account.reasons)) == (0, ["an answer without its question: join it to its question by question_id"])
            continue
        assert (name, stream.kind) == (name, kind)
        assert gave == account.gave >= account.used * (folder != "text")
        taught_nothing = {"identical chosen and rejected", "the judge had no preference"}
        assert set(account.reasons) <= taught_nothing


def prompts(rows: list[Any]) -> set[str]:
    return {prompt_key(row) for row in rows}


def real_rows(name: str) -> list[Any]:
    return load_rows(REAL / name, REAL_ROWS[name][0]).rows


def test_real_empty_replies_are_kept() -> None:
    """Trap 1: empty replies are legal, only identical pairs carry nothing."""
    assert sum(not row.messages[-1].content for row in real_rows("sft/code_alpaca_2k.jsonl")) > 0
    empty = [row for row in real_rows("pref/hh_rlhf_harmless_base_test.jsonl.gz") if not row.chosen[-1].content]
    assert len(empty) == 4
    assert sum(row.margin == 0 for row in real_rows("pref/ultrafeedback_messages_sample.jsonl")) == 4


@pytest.mark.parametrize(
    "name",
    [
        "sft/fastchat_dummy_conversation.jsonl",
        "pref/oaast_rm_zh.jsonl",
        "sft/alpaca_en_demo.jsonl",
        "sft/glaive_toolcall_zh_demo.jsonl",
    ],
)
def test_real_duplicates_stay_on_one_side(name: str) -> None:
    """Trap 2: one prompt with many rows."""
    rows = real_rows(name)
    assert len(prompts(rows)) < len(rows)
    train, held_out = split_by_prompt(rows, 0.25)
    assert train
    assert held_out
    assert not prompts(train) & prompts(held_out)


def test_real_conversations_of_odd_shape() -> None:
    """Trap 3: no user turn; a system turn inside; two turns of one role."""
    toy = real_rows("sft/openai_toy_chat_fine_tuning.jsonl")
    assert [[message.role for message in row.messages] for row in toy].count(["system", "assistant"]) == 3
    assert sum(row.prompt[0].role == "system" for row in real_rows("pref/dpo_en_demo.jsonl")) == 53
    in_a_row = [row for row in real_rows("pref/hh_rlhf_harmless_base_test.jsonl.gz") if len(row.chosen) > 1]
    assert [[message.role for message in row.chosen] for row in in_a_row] == [["assistant", "assistant"]]


def test_real_content_in_parts() -> None:
    """Trap 4: text, reasoning and tool_call parts."""
    rows = real_rows("sft/reason_tool_use_demo_50.jsonl")
    assert sum(len(message.tool_calls or []) for row in rows for message in row.messages) == 41
    assert sum(message.content.startswith("<think>\n") for row in rows for message in row.messages) == 70


def test_real_rows_longer_than_any_context() -> None:
    """Trap 5."""
    assert (
        max(len(message.content) for row in real_rows("sft/openai_toy_chat_fine_tuning.jsonl") for message in row.messages)
        >= 26_000
    )


def test_real_unicode_is_unchanged(tmp_path: Path) -> None:
    """Trap 6: U+2028 in GSM8K, a BOM inside a text, special-token look-alikes; also through a file written here."""
    gsm = real_rows("rlvr/gsm8k_train.jsonl.gz")
    assert sum("\u2028" in row.prompt[0].content for row in gsm) == 1
    write_rows(tmp_path / "gsm.jsonl", gsm)
    assert load_rows(tmp_path / "gsm.jsonl", "prompts").rows == gsm
    assert "\ufeff" in (REAL / "pref/dpo_en_demo.jsonl").read_text(encoding="utf-8")
    assert any("\ufeff" in row.model_dump_json() for row in real_rows("pref/dpo_en_demo.jsonl"))
    assert any("<unk>" in row.text for row in real_rows("text/wikitext2_valid.txt"))


def test_real_columns_for_rewards() -> None:
    """Trap 7: sparse dictionaries stay sparse, odd keys and odd labels as published."""
    kwargs = real_rows("rlvr/ifeval_input_data.jsonl")[0].columns["kwargs"]
    assert kwargs == [{}, {"num_highlights": 3}, {"relation": "at least", "num_words": 300}]
    assert real_rows("prompts/anthropic_evals_agreeableness.jsonl")[0].columns["answer_matching_behavior"] == " Yes"
    assert sum(row.label for row in real_rows("kto/gsm8k_example_model_solutions.jsonl")) > 1000


def test_real_data_set_used_for_another_stage() -> None:
    path = REAL / "pref/oaast_rm_zh.jsonl"
    assert len(load_rows(path, "sft").rows) == 496
    assert len(load_rows(path, "prompts").rows) == 496
    assert len(load_rows(path, "unpaired").rows) == 2 * 495
    assert len(load_rows(REAL / "rlvr/gsm8k_test.jsonl", "sft").rows) == 929
    pairs = load_rows(REAL / "kto/kto_en_demo.jsonl", "preference")  # few prompts have answers of both labels
    assert pairs.account.used == 2 * len(pairs.rows)
    assert pairs.account.rows == 218 == pairs.account.used + sum(pairs.account.reasons.values())
    with pytest.raises(AlignError, match="of kind prompts, good for prompts"):
        load_rows(REAL / "rlvr/svamp.jsonl", "sft")


def test_real_solutions_make_pairs() -> None:
    """Four solutions to a question, each right or wrong: as many pairs as there are of the rarer label."""
    rows = [json.loads(line) for line in (REAL / "kto/gsm8k_example_model_solutions.jsonl").read_text("utf-8").splitlines()]
    right = [sum(each["is_correct"] for each in row.values() if isinstance(each, dict)) for row in rows]
    loaded = load_rows(REAL / "kto/gsm8k_example_model_solutions.jsonl", "preference")
    parts, whole = sum(loaded.account.parts.values()), loaded.account
    same = whole.parts["identical chosen and rejected"]
    assert len(loaded.rows) + same == sum(min(n, 4 - n) for n in right)
    assert (whole.rows, whole.used) == (929, sum(0 < n < 4 for n in right))
    assert parts - same == sum(abs(2 * n - 4) for n in right if 0 < n < 4)
