"""The benchmarks: what is counted, what is generated, what is refused. The measuring itself is `make bench`."""

import json
import shutil
import statistics
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from align.errors import AlignError  # noqa: E402
from align.forest import Tree  # noqa: E402
from benchmarks import gpu, probe, processes, reward_kl, rollouts, run, theirs, work  # noqa: E402
from benchmarks.compare import Case, loss_difference, row, table  # noqa: E402
from benchmarks.gemm import Arithmetic, gemm_rate, keys_seen  # noqa: E402
from benchmarks.training import Outcome  # noqa: E402

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PAIR = Tree([5, 6, 7], ([8, 2], [9]))


def few(kind="preference"):
    """Two batches of short rows."""
    answers = (work.Length(4, 5), work.Length(3, 4)) if kind == "preference" else (work.Length(4, 5),)
    return work.batches(work.Data("", kind, 16, work.Length(5, 6), answers).generated(64, 32), 2, by_length=False)


def test_keys_seen():
    """Prompt of 3: 1 + 2 + 3. Branch of 2: 4 + 5. Branch of 1: 4."""
    assert keys_seen(PAIR) == 6 + 9 + 4


def test_the_best_of_n():
    """Two of four values: of six pairs the second smallest is the larger in one, the third in two, the largest in three."""
    assert reward_kl.best_weights(4, 2) == [0, 1 / 6, 2 / 6, 3 / 6]
    assert reward_kl.best_weights(4, 1) == [1 / 4] * 4


def test_arithmetic_of_a_hand_counted_model():
    """Heads are 4 wide, so keys and values have 8 channels. Each layer: query and output 16 x 16, key and value 16 x 8, gate and
    up 16 x 24, down 24 x 16: 2 * 256 + 2 * 128 + 3 * 384 = 1920 weights. Two layers: 3840.

    Forward on `PAIR`, 6 tokens with 3 targets from 2 of them: 2 * 6 * 3840 for the body, less 4 tokens in the last 3 * 384,
    2 layers * 2 products * 2 * 19 keys * 16 for attention, 2 * 3 * 16 * 64 for the head.
    """
    count = Arithmetic.of(work.Job("dpo", TINY, []))
    assert count.linears == Counter({(16, 16): 4, (16, 8): 4, (16, 24): 4, (24, 16): 2})
    forward = 2 * (6 * 3840 - 4 * 3 * 384) + 2 * 2 * 2 * 19 * 16 + 2 * 3 * 16 * 64
    assert count.forward(PAIR) == forward
    assert count.training([PAIR, PAIR], reference=False) == 2 * 3 * forward
    assert count.training([PAIR], reference=True) == 4 * forward


def test_a_reward_model_reads_its_head_at_the_ends():
    count = Arithmetic.of(work.Job("reward", TINY, []))
    assert count.head == (16, 1)
    assert count.head_rows(PAIR) == 2


def test_the_rate_of_products_is_positive():
    assert gemm_rate(Arithmetic.of(work.Job("dpo", TINY, [])), [PAIR]) > 0


def test_the_model_has_14_million_parameters():
    model = work.build(work.Job("dpo", work.LLAMA_14M, [], device="meta"))
    assert 13.5e6 < sum(p.numel() for p in model.parameters()) < 14.5e6


@pytest.mark.parametrize("name", work.DATA)
def test_generated_rows_have_the_stated_lengths(name):
    data = work.DATA[name]
    trees = data.generated(work.VOCABULARY)
    assert len(trees) == data.count
    assert max(tree.longest for tree in trees) <= work.MAX_LENGTH
    if data.kind == "sft":
        columns = [[t.prompt_mask.count(False) for t in trees], [t.prompt_mask.count(True) for t in trees]]
    else:
        columns = [[len(t.prompt) for t in trees], *([len(t.branches[i]) for t in trees] for i in (0, 1))]
    for length, drawn in zip((data.prompt, *data.answers), columns, strict=True):
        assert statistics.median(drawn) == pytest.approx(length.median, rel=0.05)
        assert statistics.fmean(drawn) == pytest.approx(length.mean, rel=0.1)


def test_real_rows_have_the_lengths_that_generated_ones_copy(real, monkeypatch):
    monkeypatch.setattr(work, "REAL", real)
    trees = work.DATA["hh"].trees()
    assert len(trees) == 160
    assert statistics.fmean(len(t.prompt) for t in trees) == pytest.approx(work.DATA["hh"].prompt.mean, rel=0.02)
    assert all(branch[-1] == work.EOS for tree in trees for branch in tree.branches)


def test_batches():
    trees = work.DATA["hh"].generated(work.VOCABULARY)
    plan = work.batches(trees, 20, by_length=False)
    assert sorted(map(id, (t for batch in plan for t in batch))) == sorted(map(id, trees)), "a whole pass takes every row once"
    assert plan == work.batches(trees, 20, by_length=False)
    longest = [tree.longest for batch in work.batches(trees, 4, by_length=True) for tree in batch]
    assert longest == sorted(longest)
    assert max(t.longest for t in work.heaviest_last(plan, 3)[-1]) == max(t.longest for t in trees)


def test_what_is_timed_comes_behind_the_heaviest_batch():
    plan = few()
    job = work.Job("dpo", TINY, []).over(plan)
    heaviest = max(plan, key=lambda batch: max(tree.longest for tree in batch))
    assert job.batches == [heaviest, heaviest, *plan]
    assert job.warm_up == 2
    assert job.trees[job.warm_up_rows :] == [tree for batch in plan for tree in batch]


def test_the_pass_over_the_reference_is_the_same_in_two_parts():
    """What TRL gives for the rows that warm up and for those that are timed, beside the policy's own, which are the reference's."""
    job = work.Job("dpo", TINY, few() * 2, precompute=True)
    losses = [probe.train(replace(job, warm_up=warm_up), "theirs").metric("loss") for warm_up in (1, 3)]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(probe.train(job, "ours").metric("loss"), rel=1e-3)


def test_a_job_survives_the_way_to_another_process(tmp_path):
    for kind in ("preference", "sft"):
        job = work.Job("dpo", TINY, few(kind), bf16=True)
        job.write(tmp_path / "job.json")
        assert work.Job.read(tmp_path / "job.json") == job


def test_their_tokenizer_reads_the_same_tokens():
    ids = [5, 12, 2, 0, 63, 1]
    tokenizer = theirs.word_tokenizer(64)
    assert tokenizer(theirs.words(ids))["input_ids"] == ids
    assert tokenizer(theirs.words(ids) + theirs.words([7, 2]))["input_ids"] == [*ids, 7, 2]


@pytest.mark.parametrize("case", [case for case in run.CASES if not case.ours.bf16], ids=lambda case: case.name)
def test_both_sides_compute_the_same_loss(case):
    """From the same weights on the same rows in the same order, with a step between them."""
    batches = few(work.DATA[case.data].kind)
    outcomes = []
    for side in (case.ours, case.theirs):
        job = side.job(work.Job(case.method, TINY, batches))
        outcomes.append(probe.train(job, side.engine))
    assert all(outcome.seconds > 0 for outcome in outcomes)
    assert loss_difference(replace(case, checked_steps=min(case.checked_steps, 2)), *outcomes) <= case.tolerance


def test_200_steps_of_dpo_have_the_loss_curve_of_trl():
    """From the same weights on the same rows in the same order, to less than half of the first loss."""
    rows = work.Data("", "preference", 160, work.Length(5, 6), (work.Length(4, 5), work.Length(4, 5))).generated(64, 32)
    job = work.Job("dpo", {**TINY, "hidden_size": 32}, work.batches(rows, 200, by_length=False), learning_rate=1e-3)
    curves = [probe.train(job, side).metric("loss") for side in ("ours", "theirs")]
    assert [len(curve) for curve in curves] == [200, 200]
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)
    assert curves[1][-1] < curves[1][0] / 2


def test_another_loss_is_refused():
    ours_, theirs_ = (Outcome(1.0, [{"loss": 0.5}, {"loss": second}]) for second in (0.4, 0.401))
    case = Case("dpo_hh", "hh", "dpo", 2, checked_steps=2)
    with pytest.raises(AlignError, match=r"dpo_hh: the two sides do not compute the same thing: loss differs by 2.5e-03"):
        loss_difference(case, ours_, theirs_)
    with pytest.raises(AlignError, match="'loss' was logged in 2 steps, not in 3"):
        loss_difference(replace(case, checked_steps=3), ours_, theirs_)


FIELDS = ("name", "ours", "theirs", "ratio", "memory_ours_mb", "memory_theirs_mb", "memory_ratio", "gemm_fraction")


def test_rows_and_table():
    """Medians of 2 and 8 seconds over 4 pairs; 1e9 operations in 2 s at 1e9 a second."""
    case = Case("dpo_hh", "hh", "dpo", 1, note="as it comes")
    seconds = ((2.0, 1.0, 9.0), (8.0, 8.0, 1.0))
    made = row(case, [PAIR] * 4, seconds, (1000.0, 4000.0), arithmetic=1e9, rates=[1e9], difference=1e-6)
    assert [getattr(made, name) for name in FIELDS] == ["dpo_hh", 2.0, 0.5, 4.0, 1000.0, 4000.0, 0.25, 0.5]
    text = table([made])
    assert [word in text for word in ("dpo_hh", "pairs/s", "4.00x", "0.25x", "50%", "dpo_hh: as it comes")] == [True] * 6


def test_the_speed_of_sft_counts_unique_tokens():
    tree = Tree([3, 4, 5, 2], prompt_mask=[False, False, True, True])
    case = Case("sft_alpaca", "alpaca", "sft", 1)
    made = row(case, [tree] * 3, ([2.0], [4.0]), (1.0, 1.0), arithmetic=1.0, rates=[1.0], difference=0.0)
    assert (made.unit, made.ours, made.theirs) == ("tokens/s", 6.0, 3.0)


def test_every_named_benchmark_is_there():
    named = "dpo_hh dpo_hh_best dpo_long orpo_hh simpo_hh reward_hh sft_alpaca sft_alpaca_best bf16_dpo_hh vocabulary"
    rollouts_ = "rollout_16 rollout_64 rollout_16_best rollout_64_best"
    ppo = "ppo_separate ppo_shared ppo_lora"
    assert set(run.NAMES) == {*named.split(), *rollouts_.split(), *ppo.split()}


def test_a_side_alone_in_its_own_process(tmp_path):
    """Its peak memory is its own, not that of the process that started it, which has held a gigabyte more."""
    ballast = torch.ones(2**28)
    del ballast
    found = probe.probe(work.Job("dpo", TINY, few()), "ours", tmp_path)
    assert 50 < found.peak_mb < 1024 < probe.peak_mb()
    assert found.outcome.metric("loss")[0] == pytest.approx(0.6931, abs=1e-3)


def test_memory_is_estimated_for_every_stage_that_is_measured(tmp_path, monkeypatch):
    """A stage of the table with LoRA holds less besides activations than one that trains all weights."""
    from benchmarks import memory

    monkeypatch.setitem(memory.SIZES, "tiny", {**memory.LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1})
    memory.prepare(tmp_path, "tiny")
    for method in memory.STAGES:
        full, lora = (memory.estimated(tmp_path, method, lora) for lora in (False, True))
        assert 1000 < full.tokens == lora.tokens <= memory.BUDGET
        assert 0 < lora.made_of["optimizer"] < full.made_of["optimizer"] < full.peak


def test_a_side_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(AlignError, match="dpo, theirs: the process ended with code 1"):
        probe.probe(work.Job("dpo", TINY, few()), "theirs", tmp_path)


@pytest.mark.parametrize("name", ["dpo_hh_best", "bf16_dpo_hh", "vocabulary"])
def test_a_run_from_end_to_end(name, monkeypatch, tmp_path, capsys):
    rows = [tree for batch in few() for tree in batch]
    monkeypatch.setattr(work.Data, "trees", lambda self: rows)
    monkeypatch.setattr(run, "LLAMA_14M", TINY)
    monkeypatch.setattr(run, "VOCABULARY", 64)
    monkeypatch.setattr(run, "LARGE_VOCABULARY", 128)
    memory = iter((700.0, 900.0, 1000.0, 1600.0))  # those of timed runs do not count
    monkeypatch.setattr(run, "probe", lambda job, side, folder: probe.Probe(next(memory), probe.train(job, side)))
    assert run.main(["--only", name, "--steps", "1", "--repeats", "1", "--out", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out
    (made,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert made.keys() >= set(FIELDS)
    if name == "vocabulary":  # 64 rows of 16 in embedding and head, 16 bytes each, are weights and their kin
        kin = 64 * 16 * 2 * 16 / 2**20
        assert (made["memory_ours_mb"], made["memory_theirs_mb"]) == pytest.approx((200 - kin, 600 - kin))
    else:
        assert (made["memory_ratio"], made["ratio"]) == (700 / 900, made["ours"] / made["theirs"])


@pytest.mark.parametrize("case", rollouts.CASES[1:3], ids=lambda case: case.name)
def test_rollouts_from_end_to_end(case, monkeypatch, tmp_path):
    """On a tiny model: each side's tokens are counted up to and with the first stop token."""
    monkeypatch.setattr(rollouts, "LLAMA_14M", TINY)
    monkeypatch.setattr(rollouts, "prompts", lambda: [tree.prompt[:12] for batch in few() for tree in batch])
    monkeypatch.setattr(rollouts, "MAX_NEW_TOKENS", 8)
    monkeypatch.setattr(rollouts, "STOP_SHARE", 8)
    memory = iter((700.0, 900.0))
    monkeypatch.setattr(rollouts, "_alone", lambda *which: next(memory))
    made = rollouts.measure(case, 2, tmp_path)
    assert made.ours > 0
    assert made.ratio == made.ours / made.theirs
    assert (made.memory_ratio, len(made.runs_theirs)) == (700 / 900, 2)
    assert rollouts._until([5, 3, 0, 0], [3, 4]) == [5, 3]


def test_rollouts_that_differ_are_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(rollouts, "LLAMA_14M", TINY)
    monkeypatch.setattr(rollouts, "prompts", lambda: [[5, 6, 7]])
    monkeypatch.setattr(rollouts, "_alone", lambda *which: 1.0)
    monkeypatch.setattr(rollouts, "theirs", lambda *which, **more: [[1]])
    with pytest.raises(AlignError, match="greedy completions of the two sides differ"):
        rollouts.measure(rollouts.CASES[0], 1, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_wants_a_gpu(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_rollouts_of_the_gpu_benchmark(monkeypatch):
    """Its code, on this machine: only the device's own memory counters are missing."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2 * probe.MB)
    monkeypatch.setattr(rollouts, "PROMPTS", 6)
    monkeypatch.setattr(rollouts, "LONGEST_PROMPT", 12)
    monkeypatch.setattr(rollouts, "MAX_NEW_TOKENS", 8)
    row = rollouts.on_device(rollouts.Case("rollout_4", 4), {**work.LLAMA_14M, "num_hidden_layers": 2}, "cpu", 1)
    assert row.name == "rollout_4"
    assert row.ours > 0
    assert row.theirs > 0
    assert row.memory_ratio == 1.0


def test_gpu_cases():
    assert list(gpu.measurements(1, "float32", 1e15)) == [
        "qwen_0.5b_rollout_64",
        "qwen_0.5b_dpo",
        "qwen_0.5b_dpo_best",
        "qwen_0.5b_dpo_plain",
        "llama_1b_dpo",
    ]
    trees = gpu.ULTRAFEEDBACK.generated(1000, gpu.MAX_LENGTH)
    assert max(tree.longest for tree in trees) <= 1024
    assert statistics.median(len(tree.prompt) for tree in trees) == pytest.approx(180, rel=0.05)
    assert statistics.median(len(tree.branches[0]) for tree in trees) == pytest.approx(300, rel=0.05)


def test_fsdp2_halves_the_parameters_and_the_optimizer_state_of_a_process():
    model = work.build(work.Job("sft", TINY, []))
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    told = processes.measure(processes.WAYS["two, fsdp2"], processes.WARM_UP + 1, TINY)
    assert [process["parameters"] for process in told] == [whole / 2] * 2
    counters = 4 * len(list(model.parameters()))  # AdamW's, of steps
    assert [process["optimizer"] for process in told] == [whole + counters] * 2
    assert processes.table({"two": [told]})[-1].startswith("| two | ")
