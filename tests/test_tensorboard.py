"""What TensorBoard is told, by its own reader."""

import json
from pathlib import Path

import pytest
from helpers import llama

from align.cli import main
from align.data import write_rows

reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

COMMANDS = {
    "loss": "sft --data sft.jsonl --learning_rate 1e-3 --max_steps 3 --logging_steps 1 --held_out 0",
    "objective/kl": "ppo --data prompts.jsonl --max_completion_length 4 --episodes_per_step 4 --num_mini_batches 1 "
    "--total_episodes 12 --reward_funcs mine.py:short",
}


@pytest.mark.parametrize(("metric", "title"), [("loss", "train/loss"), ("objective/kl", "objective/kl")])
def test_its_files_hold_what_was_logged_and_outlive_the_checkpoints(tmp_path, monkeypatch, tokenizer, capsys, metric, title):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("model")
    tokenizer.save_pretrained("model")
    write_rows("sft.jsonl", [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(8)])
    write_rows("prompts.jsonl", [{"prompt": f"say {i}"} for i in range(8)])
    Path("mine.py").write_text("def short(completions): return [-float(len(c)) for c in completions]\n")
    assert main(f"{COMMANDS[metric]} --model model --report_to tensorboard --json".split()) == 0
    folder = Path(json.loads(capsys.readouterr().out)["path"])
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    logged = {record["step"]: pytest.approx(record[metric], rel=1e-6) for record in records if metric in record}
    (file,) = folder.rglob("events.out.tfevents.*")
    assert file.relative_to(folder).parts[0] == "tracking"
    told = reader.EventAccumulator(str(file.parent)).Reload()
    assert "step" not in told.Tags()["scalars"]
    found = told.Scalars(title)
    assert len(found) == 3
    assert {event.step: event.value for event in found} == logged
