"""Replay holds its share, probes measure what they say, and on real text replay keeps what a model knew."""

import json
import math

import pytest
import torch
from helpers import llama

from align.cli import main
from align.data import write_rows
from align.encode import Encoder
from align.engine import enable_forest
from align.errors import AlignError
from align.metrics.probes import POSITIONS, Probe
from align.schema import SFTRow, TextRow

SENTENCES = ["the cat sat on a mat", "hello to me. How are you?", "one two three four five", "Fine, thanks! six seven eight"]
OLD = [TextRow(text=" ".join(SENTENCES[i % 4 :] + SENTENCES[: i % 3])) for i in range(12)]


@pytest.fixture
def folder(tmp_path, tokenizer, monkeypatch):
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "new.jsonl", [{"text": f"{a} {b}"} for a in SENTENCES for b in SENTENCES[:2]])
    write_rows(tmp_path / "old.jsonl", [{"text": row.text[::-1]} for row in OLD * 3])
    write_rows(tmp_path / "sft.jsonl", [{"prompt": f"{a}:", "completion": " hello to me"} for a in SENTENCES])
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": f"{a}:", "chosen": " one", "rejected": " two two"} for a in SENTENCES])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, command):
    assert main([*command.split(), "--json"]) == 0, capsys.readouterr().err
    captured = capsys.readouterr()
    return json.loads(captured.out)["metrics"], captured.err


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_replay_is_a_share_of_the_tokens(capsys, folder, tokenizer, share):
    command = f"pretrain --model model --data new.jsonl --held_out 0 --max_steps 1 --replay_data old.jsonl --replay {share}"
    _, said = run(capsys, command)
    (line,) = [line for line in said.splitlines() if "(replay): " in line and "of the tokens" in line]
    found = float(line.split("%")[0].split()[-1]) / 100
    longest = max(len(tokenizer(row.text[::-1])["input_ids"]) for row in OLD) + 1
    new = sum(len(tokenizer(f"{a} {b}")["input_ids"]) + 1 for a in SENTENCES for b in SENTENCES[:2])
    assert found == pytest.approx(share, abs=longest / new)


def test_replay_that_runs_out_says_so(capsys, folder):
    (folder / "few.txt").write_text("hello to me\n")
    _, said = run(capsys, "pretrain --model model --data new.jsonl --held_out 0 --max_steps 1 --replay_data few.txt --replay 0.9")
    assert "asked for 90%, and there are no more" in said


def test_replay_has_a_format_of_its_own(capsys, folder):
    """The `data_format` of the new rows was asked of the old ones."""
    (folder / "asked.jsonl").write_text('{"instruction": "hello", "output": "hello to me"}\n' * 8)
    command = "sft --model model --data asked.jsonl --data_format alpaca --held_out 0 --max_steps 1 --replay_data sft.jsonl"
    _, said = run(capsys, command)
    assert "(replay): sft.jsonl: " in said


def test_replay_of_no_rows_is_refused(capsys, folder):
    for verb, data in (("pretrain", "new.jsonl"), ("sft", "sft.jsonl")):
        assert main(f"{verb} --model model --data {data} --replay 0.3 --plan".split()) == 2
        assert "set replay_data" in capsys.readouterr().err
        assert main(f"{verb} --model model --data {data} --replay 0 --plan".split()) == 0, "nothing is asked for"


def enabled(seed=0):
    model = llama(seed)
    enable_forest(model)
    return model


@pytest.mark.parametrize("kind", ["text", "sft"])
def test_a_probe_is_the_direct_computation(tokenizer, kind):
    rows = OLD[:6] if kind == "text" else [SFTRow(prompt=f"{text}:", completion=" hello to me") for text in SENTENCES]
    encoder, before, after = Encoder(tokenizer, 32), enabled(0), enabled(1)
    probe = Probe("old", rows, kind, encoder, 64)
    probe.begin(before)
    found = probe.end(after)
    nll = right = count = 0
    kls = []
    for tree in probe.trees:
        ids = torch.tensor([tree.prompt])
        with torch.no_grad():
            first, second = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (before, after))
        for i in range(1, len(tree.prompt)):
            if tree.prompt_mask[i]:
                nll -= second[i - 1, tree.prompt[i]].item()
                right += second[i - 1].argmax().item() == tree.prompt[i]
                count += 1
                kls.append((first[i - 1].exp() * (first[i - 1] - second[i - 1])).sum().item())
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert found["accuracy"] == pytest.approx(right / count)
    assert count <= POSITIONS
    assert found["kl"] == pytest.approx(sum(kls) / count, rel=1e-4)
    assert found["perplexity_before"] != pytest.approx(found["perplexity"], rel=1e-3)


def test_a_model_that_did_not_change_has_forgotten_nothing(tokenizer):
    probe, model = Probe("old", OLD, "text", Encoder(tokenizer, 32), 64), enabled()
    probe.begin(model)
    found = probe.end(model)
    assert found["kl"] == pytest.approx(0, abs=1e-7)
    assert found["perplexity"] == found["perplexity_before"]
    assert found["accuracy"] == found["accuracy_before"]


def test_a_probe_without_rows_is_refused(tokenizer):
    with pytest.raises(AlignError, match="probe 'old': none of the rows can be used"):
        Probe("old", [TextRow(text="")], "text", Encoder(tokenizer, 32), 64)


STAGES = {
    "pretrain": "pretrain --data new.jsonl --held_out 0",
    "sft": "sft --data sft.jsonl --held_out 0",
    "sft with lora": "sft --data sft.jsonl --held_out 0 --tuning lora",
    "dpo": "dpo --beta 0.1 --data pairs.jsonl --held_out 0",
    "kto": "kto --beta 0.1 --data pairs.jsonl --held_out 0",
}
STAGES = {name: f"{command} --max_steps 2" for name, command in STAGES.items()}
SAMPLED = "--data sft.jsonl --held_out 0 --reward_funcs length_band(low=3,high=6) --max_completion_length 8"
STAGES["ppo"] = f"ppo {SAMPLED} --total_episodes 8 --episodes_per_step 4 --num_mini_batches 2"


@pytest.mark.parametrize("command", STAGES.values(), ids=STAGES)
def test_every_stage_reports_its_probes(capsys, folder, command):
    probes = "--probes.general old.jsonl --probes.earlier sft.jsonl --probe_rows 5"
    found, _ = run(capsys, f"{command} --model model --learning_rate 1e-2 --warmup_ratio 0 {probes}")
    for name in ("general", "earlier"):
        keys = ("perplexity_before", "perplexity", "accuracy_before", "accuracy", "kl")
        assert all(math.isfinite(found[f"probe/{name}/{key}"]) for key in keys)
        assert found[f"probe/{name}/kl"] > 0


def test_probes_need_the_forest(capsys, folder):
    assert main(["sft", "--engine", "trl", "--model", "model", "--data", "sft.jsonl", "--probes.general", "old.jsonl"]) == 2
    assert "probes are measured by engine 'forest' only" in capsys.readouterr().err


def test_replay_keeps_what_a_real_model_knew(real, tmp_path):
    """stories260k learns Wikipedia. With 10 % of stories mixed in it forgets less of them, and learns it, too."""
    from benchmarks.forgetting import SHARES, measure

    found = measure(tmp_path, steps=25, real=real, max_length=128, rows=800, shares=SHARES[:2])
    for metrics in found.values():
        assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.3
    without, replayed = (found[share]["probe/stories/perplexity"] for share in SHARES[:2])
    assert found[0.0]["probe/stories/perplexity_before"] < replayed < 0.9 * without
    assert found[0.1]["probe/stories/kl"] < found[0.0]["probe/stories/kl"]
