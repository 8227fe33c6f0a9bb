"""Ten thousand broken rows: each is used as it stands, or set aside with a reason that names what is wrong. None is lost, none ends
the reading.
"""

import copy
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest

from align.data import RowStream
from align.errors import AlignError
from align.intake.account import Quarantine
from align.schema import KINDS

SAMPLES = Path(__file__).parents[1] / "data" / "samples"
FORMATS = {
    "alpaca.jsonl": "sft",
    "alpaca.preference.jsonl": "preference",
    "alpaca.ranked.jsonl": "preference",
    "alpaca.unpaired.jsonl": "unpaired",
    "choices.columns.jsonl": "prompts",
    "choices.jsonl": "prompts",
    "dolly.jsonl": "sft",
    "graded.jsonl": "unpaired",
    "hh.jsonl": "preference",
    "implicit.jsonl": "preference",
    "judged.jsonl": "preference",
    "labelled.jsonl": "classification",
    "native.preference.jsonl": "preference",
    "native.prompts.jsonl": "prompts",
    "native.sft.jsonl": "sft",
    "native.unpaired.jsonl": "unpaired",
    "oasst.jsonl": "preference",
    "openai.jsonl": "sft",
    "openai.parts.jsonl": "sft",
    "openai.preference.jsonl": "preference",
    "openai.unpaired.jsonl": "unpaired",
    "qa.jsonl": "sft",
    "questions.jsonl": "prompts",
    "saferlhf.jsonl": "preference",
    "scored.jsonl": "preference",
    "scored.nested.jsonl": "preference",
    "self_instruct.jsonl": "sft",
    "sharegpt.jsonl": "sft",
    "sharegpt.preference.jsonl": "preference",
    "sharegpt.tools.jsonl": "sft",
    "squad.jsonl": "qa",
    "stack_exchange.jsonl": "preference",
    "svamp.jsonl": "prompts",
    "tagged.jsonl": "tagging",
    "text.jsonl": "text",
    "ultrafeedback.jsonl": "preference",
}
ROWS = 10_000
ODD = [
    None,
    0,
    -1,
    3.5,
    True,
    math.nan,
    math.inf,
    "",
    " ",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "\u2028\x00\u202e\ufeff",
    "\ud83d",
    10**400,
]
LONG = "x" * 1_000_000


def places(value, path=()):
    """Every place in a row: of each key and each element, at any depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def parent_of(row, path):
    for key in path[:-1]:
        row = row[key]
    return row


def misspelled(word, chance):
    at = chance.randrange(len(word)) if word else 0
    return word[:at] + chance.choice("xq") + word[at + 1 :]


def remove(row, path, chance):
    del parent_of(row, path)[path[-1]]


def retype(row, path, chance):
    parent_of(row, path)[path[-1]] = copy.deepcopy(chance.choice(ODD))


def rename(row, path, chance):
    parent = parent_of(row, path)
    if isinstance(parent, dict):
        parent[misspelled(path[-1], chance)] = parent.pop(path[-1])


def misspell(row, path, chance):
    parent = parent_of(row, path)
    if isinstance(parent[path[-1]], str):
        parent[path[-1]] = misspelled(parent[path[-1]], chance)


def nest(row, path, chance):
    parent = parent_of(row, path)
    parent[path[-1]] = chance.choice([[parent[path[-1]]], {path[-1] if isinstance(path[-1], str) else "x": parent[path[-1]]}])


def repeat(row, path, chance):
    parent = parent_of(row, path)
    if isinstance(parent[path[-1]], list):
        parent[path[-1]] = parent[path[-1]] * chance.randint(2, 4)


def grow(row, path, chance):
    parent_of(row, path)[path[-1]] = LONG


def mutated(row, chance):
    """The line of a row after one to three changes, and perhaps flipped, cut or added bytes."""
    row = copy.deepcopy(row)
    kinds = [remove, retype, rename, misspell, nest, repeat]
    for _ in range(chance.randint(1, 3)):
        if found := list(places(row)):
            kind = grow if chance.random() < 0.004 else chance.choice(kinds)
            kind(row, chance.choice(found), chance)
    line = bytearray(json.dumps(row, ensure_ascii=chance.random() < 0.5).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.2:
        for _ in range(chance.randint(1, 3)):
            what, at = chance.random(), chance.randrange(len(line) or 1)
            if what < 0.6 and line:
                line[at] ^= 1 << chance.randrange(8)
            elif what < 0.8:
                del line[at:]
            else:
                line[at:at] = bytes([chance.randrange(256)])
    if chance.random() < 0.003:
        line = bytearray(b'{"a":' * 100_000)
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ").strip() or b"?"


@pytest.mark.parametrize("named", [True, False], ids=["kind given", "kind recognized"])
def test_no_broken_row_is_lost(tmp_path, named):
    chance = random.Random(1 if named else 0)
    per_format = ROWS // 2 // len(FORMATS) + 1
    seen = Counter()
    for name, kind in FORMATS.items():
        rows = [json.loads(line) for line in (SAMPLES / name).read_text(encoding="utf-8").splitlines()]
        lines = [mutated(chance.choice(rows), chance) for _ in range(per_format)]
        # As in real files, most rows are whole: by them the format is recognized.
        whole = [json.dumps(row).encode() for row in rows] * (64 // len(rows))
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in [*whole, *lines]))
        aside = tmp_path / "aside.jsonl"
        stream = RowStream(path, kind if named else None, on_bad_row="quarantine", quarantine=Quarantine(aside))
        used = list(stream)
        account = stream.account
        assert stream.kind == kind
        assert account.rows == len(whole) + len(lines) == account.used + sum(account.reasons.values())
        assert account.gave == len(used) >= account.used
        for row in used:  # whatever is used is a row in every respect, and can be written down as UTF-8
            assert type(row) is KINDS[kind]
            assert KINDS[kind].model_validate(row.model_dump()) == row or kind == "prompts"
            json.dumps(row.model_dump(), ensure_ascii=False).encode()
        kept = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()] if aside.exists() else []
        assert len(kept) == account.set_aside
        for entry in kept:
            told(entry, rows, seen)
    assert seen["a field"] > ROWS // 10
    assert seen["JSON"] > ROWS // 100


PLACED = ("field ", "fields ", "column ", "byte ", "invalid JSON", "prompt is", "the columns fit no format", "format ")
TEACHES_NOTHING = (
    "identical chosen and rejected",
    "chosen and rejected part before the last reply",
    "no turn before the assistant's",
    "the judge had no preference",
    "fewer than two",
    "all answers have the same score",
    "no two ranked replies",
    "no instances",
    "no turns",
)


def told(entry, rows, seen):
    """The reason names a field of the row, or the place in the line, or says that there is nothing to learn."""
    reason = entry["reason"]
    assert "Traceback" not in reason
    assert "Error" not in reason, f"a shape that the format did not foresee: {reason[:300]}"
    assert len(reason) < 1500, reason[:200]
    if reason.startswith(TEACHES_NOTHING):
        seen["nothing"] += 1
        return
    assert reason.startswith(PLACED), reason[:300]
    if "JSON" in reason or "UTF-8" in reason:
        seen["JSON"] += 1
    else:
        known = {str(key) for row in rows for path in places(row) for key in path} | set(map(str, entry["content"]))
        schema = {"prompt", "completion", "messages", "chosen", "rejected", "row", "label", "tool_calls", "arguments"}
        assert any(key in reason for key in known | schema), reason[:300]
        seen["a field"] += 1


@pytest.mark.parametrize("seed", range(20))
def test_strict_reading_stops_at_the_first_broken_row(tmp_path, seed):
    """Where nothing may be set aside, the message is that of the quarantine, with file and row before it."""
    chance = random.Random(seed)
    row = json.loads((SAMPLES / "sharegpt.tools.jsonl").read_text(encoding="utf-8").splitlines()[0])
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join(line + b"\n" for line in [json.dumps(row).encode()] * 64 + [mutated(row, chance) for _ in range(40)]))
    aside = tmp_path / "aside.jsonl"
    list(RowStream(path, "sft", on_bad_row="quarantine", quarantine=Quarantine(aside)))
    first = json.loads(aside.read_text(encoding="utf-8").splitlines()[0])
    with pytest.raises(AlignError) as caught:
        list(RowStream(path, "sft"))
    assert str(caught.value).startswith(f"data.jsonl row {first['row']}, {first['reason']}; mend")
