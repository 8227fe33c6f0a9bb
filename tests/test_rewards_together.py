"""Several rewards with policies: weights, clips, gates, errors that are forgiven, time limits; and how a recipe writes them."""

import asyncio
import json
import math
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from align.cli import main
from align.data import write_rows
from align.errors import AlignError
from align.pipeline import Run
from align.recipe import Recipe, load_recipe
from align.rewards import Gate, RewardSet, RewardSpec, text_of
from align.rewards.calling import _event_loop
from align.rewards.trial import histogram
from align.rollout import Completion
from align.schema import PromptRow
from align.stages import PPO, Pairs

PROMPTS = ["first", "second", "third", "fourth"]
FILE = """
import time
calls = []

def values(completions, **columns): return [float(c) for c in completions]
def other(completions, **columns): return [10 * float(c) for c in completions]
def raises(completions, **columns): raise RuntimeError("the judge is asleep")
def leaves(completions, **columns): raise SystemExit(3)
async def leaves_async(completions, **columns): raise SystemExit(3)
def hangs(completions, **columns):
    while True:
        try:
            time.sleep(0.01)
        except Exception:
            pass
def swallows(completions, **columns):
    scores = []
    for _ in completions:
        try:
            time.sleep(2)
            scores.append(1.0)
        except:
            scores.append(0.0)
    return scores
def cancelled(completions, **columns):
    import asyncio
    raise asyncio.CancelledError("the judge hung up")
async def cancelled_async(completions, **columns): cancelled(completions)
def generator_exit(completions, **columns): raise GeneratorExit
async def generator_exit_async(completions, **columns): raise GeneratorExit
class Speechless(Exception):
    def __str__(self): raise RuntimeError
def speechless(completions, **columns): raise Speechless
class Unreadable:
    def __repr__(self): raise RuntimeError
    def tolist(self): raise RuntimeError
def unreadable(completions, **columns): return Unreadable()
def unreadables(completions, **columns): return [Unreadable()] * len(completions)
def no_numbers(completions, **columns):
    import fractions
    class NoFloat(fractions.Fraction):
        __repr__ = Unreadable.__repr__
        def __float__(self): raise RuntimeError
    return [NoFloat(1, 2)] * len(completions)
async def hangs_async(completions, **columns):
    import asyncio
    await asyncio.sleep(60)
async def blocks_async(completions, **columns):
    import time
    time.sleep(60)
def backtracks(completions, **columns):
    import re
    return [float(bool(re.match(r"(a+)+$", "a" * 40 + "b"))) for _ in completions]
def nothing(completions, **columns): return None
def not_a_number(completions, **columns): return [1.0, float("nan"), 3.0, 4.0][: len(completions)]
def too_few(completions, **columns): return [0.0] * (len(completions) - 1)
def strings(completions, **columns): return ["1.0"] * len(completions)
def abstains(completions, **columns): return [None] * len(completions)
def wants_answer(completions, answer): return [0.0] * len(completions)
def chance(completions, **columns):
    calls.append(1)
    return [float(len(calls))] * len(completions)
def raises_on_third(completions, **columns): return [1 / (float(c) - 3) for c in completions]
def compute_score(data_source, solution_str, ground_truth, extra_info=None): return float(solution_str == ground_truth)
def reward_func(queries, prompts, labels): return {"rewards": [float(q.endswith(str(l))) for q, l in zip(queries, labels)]}
def anything(**row): return 1.0
"""
COMPLETIONS = ["1", "2", "3", "4"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(FILE)


def score(*entries, weights=None, columns=None):
    return RewardSet(list(entries), weights).score(PROMPTS, COMPLETIONS, columns or {})


def of(function, **more):
    return {"reward": f"my.py:{function}", **more}


# -- what becomes of the numbers -------------------------------------------------------------------------------------------------


def test_the_steps_are_normalize_clip_weight():
    """1, 2, 3, 4 have mean 2.5 and deviation sqrt(1.25) = 1.118: -1.342, -.447, .447, 1.342; clipped to [-1, .25], times 2. The
    component that is logged is what the function said.
    """
    found = score(of("values", normalize="batch", clip=[-1, 0.25], weight=2))
    assert found.total == pytest.approx([-2, -2 * 0.5 / math.sqrt(1.25), 0.5, 0.5])
    assert found.components == {"values": [1, 2, 3, 4]}
    assert score(of("values", normalize=[1, 2])).total == [0, 0.5, 1, 1.5]


def test_by_itself_nothing_depends_on_what_else_is_scored():
    """What the batch normalizes counts as it is, unclipped; 1, 2, 3, 4 by [1, 2] are 0, 0.5, 1, 1.5, of which 1 is the most."""
    batch, fixed = of("values", normalize="batch", clip=[-1, 0.25], weight=2), of("values", normalize=[1, 2], clip=[0, 1])
    together = RewardSet([batch, fixed])
    assert together.by_itself().score(PROMPTS, COMPLETIONS).total == [2, 4.5, 7, 9]
    assert together.score(PROMPTS, COMPLETIONS).total == score(batch, fixed).total != [2, 4.5, 7, 9], "itself it stays"


def test_a_component_that_does_not_vary_is_normalized_to_nothing():
    assert RewardSet([of("values", normalize="batch")]).score(PROMPTS[:2], ["7", "7"]).total == [0, 0]


def test_a_gate_lets_a_component_count_only_where_another_is_enough():
    """Where `first` is below 3, 10 x the completion does not count."""
    found = score(of("values", name="first"), of("other", gate={"reward": "first", "at_least": 3}))
    assert found.total == [1, 2, 33, 44]
    assert found.components["other"] == [10, 20, 30, 40]


def test_a_gate_is_closed_where_the_other_abstained_and_closed_is_not_abstained():
    assert score(of("abstains"), of("values", gate={"reward": "abstains", "at_least": -9})).total == [0, 0, 0, 0]


def test_weights_stand_in_one_place():
    assert score(of("values", weight=2), "my.py:other").total == [12, 24, 36, 48]
    assert score(of("values"), "my.py:other", weights=[0, 1]).total == [10, 20, 30, 40]
    with pytest.raises(AlignError, match="the weight of 'values' is set twice"):
        score(of("values", weight=2), "my.py:other", weights=[1, 1])


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"reward": "repetition", "wieght": 2}, r"unknown key 'wieght' \(did you mean 'weight'\?\); a reward has: reward, name"),
        ({"weight": 2}, "a reward needs the key 'reward'"),
        ({"reward": "repetition", "gate": {"reward": "x", "atleast": 1}}, r"unknown key 'atleast' \(did you mean 'at_least'\?\)"),
        ({"reward": "repetition", "gate": {"reward": "x"}}, "a gate needs the key 'at_least'"),
        ({"reward": "repetition", "gate": 3}, "gate must name a reward and a number"),
        ({"reward": "repetition", "gate": {"reward": "values", "at_least": 0}}, r"names 'values'; the others are: none"),
        ({"reward": "repetition", "gate": {"reward": "repetition", "at_least": 0}}, "names 'repetition'; the others are: none"),
        ({"reward": "repetition", "clip": [1, 1]}, r"clip must be \[lowest, highest\]"),
        ({"reward": "repetition", "clip": 1}, r"clip must be \[lowest, highest\]"),
        ({"reward": "repetition", "normalize": "bach"}, r"normalize must be batch or \[mean, deviation\]"),
        ({"reward": "repetition", "normalize": [0, 0]}, r"normalize must be batch or \[mean, deviation\]"),
        ({"reward": "repetition", "on_error": "ignore"}, "on_error must be raise, abstain or a number, not 'ignore'"),
        ({"reward": "repetition", "timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"reward": "repetition", "weight": "2"}, "weight must be a finite number"),
        ({"reward": "repetition", "protocol": "verll"}, r"protocol must be trl, verl or openrlhf.*did you mean 'verl'"),
    ],
)
def test_mistakes_in_a_spec(entry, complaint):
    with pytest.raises(AlignError, match=complaint):
        RewardSet([entry])


def test_a_gate_names_the_near_miss():
    with pytest.raises(AlignError, match=r"names 'valuse' \(did you mean 'values'\?\)"):
        RewardSet([of("values"), of("other", gate={"reward": "valuse", "at_least": 0})])


def test_a_spec_and_its_shortest_form():
    spec = RewardSpec("repetition", clip=(-1.0, 0.0), gate=Gate("other", 1.0), weight=2.0)
    assert spec.plain() == {
        "reward": "repetition",
        "clip": [-1.0, 0.0],
        "gate": {"reward": "other", "at_least": 1.0},
        "weight": 2.0,
    }
    assert RewardSpec.of(spec.plain()) == spec
    assert RewardSpec.of("repetition").plain() == "repetition"


# -- what goes wrong --------------------------------------------------------------------------------------------------------------

BROKEN = {
    "raises": "reward 'raises' raised RuntimeError: the judge is asleep",
    "leaves": "reward 'leaves' raised SystemExit: 3",
    "leaves_async": "reward 'leaves_async' raised SystemExit: 3",
    "hangs": "reward 'hangs' took more than its timeout of 0.1 s",
    "swallows": "reward 'swallows' took more than its timeout of 0.1 s",
    "cancelled": "reward 'cancelled' raised CancelledError: the judge hung up",
    "cancelled_async": "reward 'cancelled_async' raised CancelledError: the judge hung up",
    "generator_exit": "reward 'generator_exit' raised GeneratorExit",
    "generator_exit_async": "reward 'generator_exit_async' raised GeneratorExit",
    "speechless": "reward 'speechless' raised Speechless: it cannot say what",
    "unreadable": "reward 'unreadable' returned <.*Unreadable object at .*; expected a list",
    "unreadables": r"reward 'unreadables', row 0 \(prompt 'first'\): got <.*Unreadable object",
    "no_numbers": r"reward 'no_numbers', row 0 \(prompt 'first'\): got <.*no_numbers.<locals>",
    "hangs_async": "reward 'hangs_async' took more than its timeout of 0.1 s",
    "blocks_async": "reward 'blocks_async' took more than its timeout of 0.1 s",
    "backtracks": "reward 'backtracks' took more than its timeout of 0.1 s",
    "nothing": "reward 'nothing' returned None; expected a list of 4 numbers",
    "not_a_number": r"reward 'not_a_number', row 1 \(prompt 'second'\): got nan",
    "too_few": r"reward 'too_few' returned 3 values; expected 4.*the first prompt is 'first'",
    "strings": r"reward 'strings', row 0 \(prompt 'first'\): got '1.0'",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_function_stops_the_run(name):
    start = time.monotonic()
    with pytest.raises(AlignError, match=BROKEN[name]):
        score("my.py:values", of(name, timeout=0.1))
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_function_abstains(name, capsys):
    """Only where it is broken: a NaN takes nothing from the rows that have a number."""
    found = score("my.py:values", of(name, timeout=0.1, on_error="abstain"))
    broken = [1] if name == "not_a_number" else range(4)
    assert [row for row in range(4) if found.components[name][row] is None] == list(broken)
    assert found.total == ([2, 2, 6, 8] if name == "not_a_number" else [1, 2, 3, 4])
    assert len(found.failures[name]) == len(broken)
    said = capsys.readouterr().err
    assert re.search(BROKEN[name], said)
    assert f"failed on {len(broken)} of 4 completions, which count as abstentions" in said


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_function_costs_a_penalty(name):
    found = score(of(name, timeout=0.1, on_error=-2))
    assert found.total == ([1, -2, 3, 4] if name == "not_a_number" else [-2, -2, -2, -2])


def test_what_only_trls_trainer_passes_is_no_missing_column():
    def scheduled(completions, trainer_state, **columns):
        return [float(trainer_state is not None)] * len(completions)

    with pytest.raises(AlignError, match=r"'scheduled' wants 'trainer_state', which TRL's trainer passes .*: give it a default"):
        RewardSet([scheduled]).score(PROMPTS, COMPLETIONS)
    given = RewardSet([scheduled]).score(PROMPTS, COMPLETIONS, {"trainer_state": [1, 2, 3, 4]})
    assert given.total == [1, 1, 1, 1], "a column of that name is one"


def test_nothing_left_to_score_by_says_why():
    told = r"on row 0 \(prompt 'first'\): one must score it; an on_error that is a number .*: reward 'raises' raised RuntimeE"
    with pytest.raises(AlignError, match=told):
        score(of("raises", on_error="abstain"))


def test_a_missing_column_is_never_forgiven():
    with pytest.raises(AlignError, match="needs a column 'answer'"):
        score("my.py:values", of("wants_answer", on_error="abstain"))


def test_failures_are_said_the_first_time_and_whenever_they_have_doubled(capsys):
    rewards = RewardSet(["my.py:values", of("raises", on_error="abstain")])
    for _ in range(9):
        rewards.score(PROMPTS, COMPLETIONS)
    assert capsys.readouterr().err.count("failed on 4 of 4") == 4  # at 4, 8, 16 and 32 failures


def test_each_functions_first_failure_is_said(capsys):
    """However often another one has failed before."""
    fails = ("raises", "hangs")
    rewards = RewardSet(["my.py:values", *(of(name, on_error="abstain", timeout=0.05) for name in fails)])
    for _ in range(3):
        rewards.score(PROMPTS, COMPLETIONS)
    said = capsys.readouterr().err
    assert [said.count(f"reward '{name}' failed on") for name in fails] == [2, 2]  # at 4 and 8 failures


def test_a_time_limit_off_the_main_thread():
    """There it cannot be an alarm; the function is left behind."""
    found = []
    thread = threading.Thread(
        target=lambda: found.append(score(of("hangs", timeout=0.05, on_error=0), of("values", timeout=5)).total)
    )
    thread.start()
    thread.join(10)
    assert found == [[1, 2, 3, 4]]


def test_a_time_limit_leaves_quick_functions_and_other_alarms_alone():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    assert score(of("values", timeout=10)).total == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_interruption_ends_what_is_awaited():
    """Ctrl-C left it behind on its thread, and the process waited for it at its end, for ever."""

    async def hangs(completions, **columns):
        while True:  # Python misses one that comes just before it waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            score(hangs)
    finally:
        signal.signal(signal.SIGINT, before)

    async def left():
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return others and (await asyncio.wait(others, timeout=4))[1]

    assert not asyncio.run_coroutine_threadsafe(left(), _event_loop()).result(timeout=60)


def test_an_interruption_leaves_a_blocked_loop_behind():
    """What was awaited next waited for it."""
    free = threading.Event()

    async def blocks(completions, **columns):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        free.wait(timeout=60)
        return [1.0] * len(completions)

    async def quick(completions, **columns):
        return [1.0] * len(completions)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            score(blocks)
        assert score(of("hangs_async", timeout=0.05, on_error=5), quick).total == [6, 6, 6, 6]
    finally:
        free.set()
        signal.signal(signal.SIGINT, before)


def test_async_functions_have_their_own_limits():
    async def quick(completions, **columns):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    found = score(of("hangs_async", timeout=0.05, on_error=5), quick)
    assert found.total == [6, 6, 6, 6]


# -- functions of other tools ------------------------------------------------------------------------------------------------------


def test_functions_of_other_tools_are_recognized_by_their_parameters():
    found = score(
        "my.py:compute_score", "my.py:reward_func(label_column='end')", columns={"ground_truth": list("1111"), "end": [1, 2, 9, 9]}
    )
    assert found.components == {"compute_score": [1, 0, 0, 0], "reward_func": [1, 1, 0, 0]}
    assert score("my.py:reward_func", columns={"label": [9, 2, 9, 9]}).total == [0, 1, 0, 0]


def test_or_named():
    assert score(of("anything", protocol="verl"), columns={"ground_truth": list("1111")}).total == [1, 1, 1, 1]
    with pytest.raises(AlignError, match=r"takes no 'label_column'"):
        RewardSet(["my.py:compute_score(label_column='end')"])


# -- in a recipe ------------------------------------------------------------------------------------------------------------------

RECIPE = """
name: r
stages:
  pairs:
    stage: pairs
    model: owner/name
    data: prompts.jsonl
    reward_funcs:
      - my.py:values
      - {reward: my.py:other, weight: 0.5, clip: [-1, 1], on_error: abstain, timeout: 5, gate: {reward: values, at_least: 0}}
"""


def test_a_recipe_holds_specs_beside_names_and_the_runner_fingerprints_them(tmp_path):
    write_rows("prompts.jsonl", [{"prompt": "a"}])
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = load_recipe("r.yaml")
    names, spec = recipe.stages["pairs"].reward_funcs
    assert names == "my.py:values"
    assert spec["gate"] == {"reward": "values", "at_least": 0}
    assert load_recipe("r.yaml", {"pairs.top_k": "5"}).stages["pairs"].reward_funcs == [names, spec]

    def identity():
        (step,) = Run(load_recipe("r.yaml"), tmp_path / "out").plan()
        return step.identity

    before = identity()
    assert identity() == before
    (tmp_path / "r.yaml").write_text(RECIPE.replace("weight: 0.5", "weight: 0.6"))
    assert identity() != before
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "my.py").write_text(FILE + "# edited")
    assert identity() != before


def test_the_example_of_the_documentation_is_a_set(tmp_path):
    page = (Path(__file__).parents[1] / "docs/rewards.md").read_text()
    (block,) = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "normalize" in block]
    stage = Pairs(model="m", data="d", **yaml.safe_load(block))
    assert [entry if isinstance(entry, str) else entry["reward"] for entry in stage.reward_funcs][1] == "reward_model"
    for name, source in (("my_rewards.py", "def cites_source(completions): ..."), ("judge.py", "def grade(completions): ...")):
        (tmp_path / name).write_text(source)
    assert list(RewardSet(stage.reward_funcs).components) == ["cites_source", "reward_model", "length", "grade"]


def test_a_mistake_in_a_recipe_is_one_line(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(RECIPE.replace("weight", "wieght"))
    assert main(["run", "r.yaml", "--plan"]) == 2
    assert "unknown key 'wieght' (did you mean 'weight'?)" in capsys.readouterr().err


def test_a_spec_on_the_command_line_and_a_function_in_python(tmp_path, capsys):
    write_rows("prompts.jsonl", [{"prompt": "a"}])
    spec = "{reward: my.py:values, weight: 2}"
    assert main(["ppo", "--model", "owner/name", "--data", "prompts.jsonl", "--reward_funcs", spec, "repetition", "--plan"]) == 0
    stage = Pairs(model="m", data="d", reward_funcs={"reward": test_or_named, "weight": 2})
    assert stage.reward_funcs == [{"reward": f"{__file__}:test_or_named", "weight": 2}]
    assert Pairs(model="m", data="d", reward_funcs=RewardSpec("repetition")).reward_funcs == ["repetition"]


def test_a_batch_without_a_column_that_other_rows_have_is_scored(tokenizer, tmp_path):
    """Where few rows have an answer, a batch of others stopped the run in its midst: their answer is None."""
    path = tmp_path / "right.py"
    path.write_text("def right(completions, answer): return [0.5 if said is None else 1.0 for said in answer]\n")
    rows = [PromptRow(prompt="one", columns={"answer": "1"}), PromptRow(prompt="two"), PromptRow(prompt="three")]
    stage = PPO(model="m", data="d", reward_funcs=f"{path}:right")
    judge = stage.judge(tokenizer, rows, dtype="float32", max_tokens=8)
    said = [Completion([1], True)] * 2
    assert judge(rows[:2], [[1], [1]], said)[0] == [1.0, 0.5]
    assert judge(rows[1:], [[1], [1]], said)[0] == [0.5, 0.5]
    with pytest.raises(AlignError, match="needs a column 'answer'; the rows have: none"):
        stage.judge(tokenizer, rows[1:], dtype="float32", max_tokens=8)


def test_a_completion_keeps_the_white_space_at_its_ends(tokenizer, tmp_path):
    """TRL decodes and does not strip; only special tokens are left out. In a conversation it is the content of one message."""
    path = tmp_path / "heard.py"
    path.write_text("heard = []\n\ndef hear(completions): heard.extend(completions); return [0.0] * len(completions)\n")
    rows = [PromptRow(prompt="one"), PromptRow(prompt=[{"role": "user", "content": "one"}])]
    judge = PPO(model="m", data="d", reward_funcs=f"{path}:hear").judge(tokenizer, rows, dtype="float32", max_tokens=8)
    said = Completion([*tokenizer("  two \n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], True)
    judge(rows, [[1], [1]], [said, said])
    heard = judge.rewards.components["hear"].function.__globals__["heard"]
    assert heard == ["  two \n", [{"role": "assistant", "content": "  two \n"}]]


class FakeTokenizer:
    def get_vocab(self):
        return {}


def test_the_stage_adds_its_reward_model_unless_it_is_named(monkeypatch):
    from align import scoring

    monkeypatch.setattr(scoring, "RewardScorer", lambda *args, **more: "scorer")

    def judge(**fields):
        return PPO(model="m", data="d", **fields).judge(FakeTokenizer(), [], dtype="float32", max_tokens=8)

    assert list(judge(reward_funcs="repetition", reward_model="rm").rewards.components) == ["repetition", "reward_model"]
    made = judge(reward_funcs=[{"reward": "reward_model", "weight": 0.5}, "repetition"], reward_model="rm")
    assert dict(zip(made.rewards.components, made.rewards.weights, strict=True)) == {"reward_model": 0.5, "repetition": 1.0}
    assert judge(reward_funcs="repetition", reward_model="rm", reward_weights=[1, 3]).rewards.weights == [1, 3]
    for fields, complaint in (
        ({}, "nothing judges"),
        ({"reward_funcs": "reward_model"}, "set the field reward_model, too"),
        ({"reward_funcs": "repetition", "reward_weights": [1, 2]}, "has 2 numbers; there are 1 rewards"),
    ):
        with pytest.raises(AlignError, match=complaint):
            judge(**fields)


# -- align reward test -------------------------------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"q{i}", "chosen": str(i + 5), "rejected": "1 word", "answer": i} for i in range(4)]
TWO = "def words(completions, **columns): return [float(len(c.split())) for c in completions]\n"


def report_of(capsys, *arguments):
    """What `align reward test` printed as JSON."""
    assert main(["reward", "test", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_pairs_are_told_apart(tmp_path, capsys):
    """`words` is 1 on the chosen and 2 on the rejected side; its correlation with length is 1 by construction."""
    write_rows("pairs.jsonl", PAIRS)
    (tmp_path / "my.py").write_text(TWO)
    report = report_of(capsys, "my.py:words", "--data", "pairs.jsonl")
    (words,) = report["components"]
    assert (report["completions"], report["pairs"], report["deterministic"]) == (8, 4, True)
    assert (words["separates"], words["mean"], words["abstained"], words["failed"]) == (0, 1.5, 0, 0)
    assert words["length_correlation"] == pytest.approx(1)
    assert words["histogram"] == [[1.0, 1.0, 4], [2.0, 2.0, 4]]


def test_ten_values_have_a_bar_each_and_eleven_share_ten_steps():
    assert histogram([*range(10), 9]) == (*((i, i, 1) for i in range(9)), (9, 9, 2))
    assert histogram(range(11)) == (*((i, i + 1, 1) for i in range(9)), (9, 10, 2))


def test_demonstrations_with_columns_several_rewards_and_failures(tmp_path, capsys):
    """3 of 4 completions are their answers; `not_a_number` fails on one."""
    rows = [{"prompt": f"q{i}", "completion": str(i), "answer": str(min(i, 2))} for i in range(4)]
    write_rows("rows.jsonl", rows)
    report = report_of(capsys, "exact_match", "{reward: my.py:not_a_number, on_error: -1}", "--data", "rows.jsonl")
    match, numbers, total = report["components"]
    assert (match["mean"], match["separates"]) == (0.75, None)
    assert (numbers["failed"], numbers["abstained"], numbers["lowest"]) == (0.25, 0, -1)
    assert (total["name"], total["mean"]) == ("total", pytest.approx(0.75 + 7 / 4))
    assert "row 1 (prompt 'q1'): got nan" in report["failure"]
    assert report_of(capsys, "my.py:abstains", "--data", "rows.jsonl")["components"][0]["abstained"] == 1


def test_rows_of_one_prompt_keep_their_own_columns(capsys):
    write_rows("rows.jsonl", [{"prompt": "q", "completion": text, "answer": text} for text in "abc"])
    assert report_of(capsys, "exact_match", "--data", "rows.jsonl")["components"][0]["mean"] == 1


def test_a_row_that_is_set_aside_leaves_its_columns_to_no_other(tmp_path, capsys):
    """Both rows ask the same, and the first is no pair."""
    (tmp_path / "my.py").write_text("def worth(completions, worth, **columns): return worth\n")
    write_rows("rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": said, "worth": i} for i, said in enumerate("ab")])
    report = report_of(capsys, "my.py:worth", "--data", "rows.jsonl")
    assert report["components"][0]["histogram"] == [[1.0, 1.0, 2]]


def test_the_last_turn_of_a_conversation_is_its_completion(capsys):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello you"}]
    write_rows("chat.jsonl", [{"messages": turns}, {"messages": [*turns, *turns]}])
    report = report_of(capsys, "length_band(low=2, high=2)", "--data", "chat.jsonl")
    assert (report["completions"], report["components"][0]["mean"]) == (2, 1)


def test_a_broken_row_is_set_aside_and_the_others_are_scored(tmp_path, capsys):
    """One broken pair among others was taken for a file without completions, or its file for demonstrations."""
    (tmp_path / "my.py").write_text(TWO)
    broken = ({"prompt": "q", "chosen": "a", "rejected": None}, {"instruction": "q", "output": "a", "chosen": "b"})
    for number, row in enumerate(broken):
        write_rows(f"rows{number}.jsonl", [row, *PAIRS])
        assert main(["reward", "test", "my.py:words", "--data", f"rows{number}.jsonl"]) == 0
        said = capsys.readouterr()
        assert "4 pairs" in said.out
        assert f"rows{number}.jsonl: 5 rows = 4 used + 1 set aside" in said.err


def test_chance_is_seen(capsys):
    write_rows("pairs.jsonl", PAIRS)
    report = report_of(capsys, "my.py:chance", "--data", "pairs.jsonl")
    assert not report["deterministic"]
    assert report["difference"] == "chance, row 0 (prompt 'q0'): 1.0 and then 2.0"


def test_what_a_reward_prints_is_no_part_of_the_report(tmp_path, capsys):
    write_rows("pairs.jsonl", PAIRS)
    (tmp_path / "loud.py").write_text(f"print('loaded')\n{TWO.replace(': return', ': print(1); return')}")
    assert report_of(capsys, "loud.py:words", "--data", "pairs.jsonl")["completions"] == 8


def test_the_report_for_people(capsys):
    write_rows("pairs.jsonl", PAIRS)
    assert main(["reward", "test", "length_band(low=1, high=1)", "--data", "pairs.jsonl"]) == 0
    text = capsys.readouterr().out
    for part in ("4 pairs", "deterministic: yes", "chosen above rejected: 100%", "correlation with length: -1.00", "█ 4"):
        assert part in text


def test_completions_are_sampled_from_a_model(tmp_path, capsys, tokenizer):
    from helpers import llama

    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows("prompts.jsonl", [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(3)])
    options = ["--data", "prompts.jsonl", "--model", "model", "--max_completion_length", "5"]
    report = report_of(capsys, "repetition", *options)
    assert (report["completions"], report["pairs"]) == (3, 0)
    capsys.readouterr()
    assert main(["reward", "test", "repetition", *options, "--plan"]) == 0
    assert "completions sampled from model, by repetition" in capsys.readouterr().out


def test_sampled_completions_keep_the_white_space_at_their_ends(tmp_path, capsys, tokenizer):
    """As in training: what is scored is what the tokens say."""
    from helpers import llama

    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "bare.py").write_text("def bare(completions): return [float(c == c.strip()) for c in completions]\n")
    write_rows("prompts.jsonl", [{"prompt": f"say {i}"} for i in range(24)])
    options = ["--data", "prompts.jsonl", "--model", "model", "--max_completion_length", "1"]
    (bare,) = report_of(capsys, "bare.py:bare", *options)["components"]
    assert bare["mean"] < 1


def test_a_reward_model_is_tried_beside_functions(tmp_path, capsys, tokenizer):
    """Its score of a completion is what the scorer of the stages says of the same tokens."""
    from helpers import llama

    from align.scoring import RewardScorer

    llama(score_head=True).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    write_rows("rows.jsonl", [{"prompt": "one", "completion": " two"}, {"prompt": "one", "completion": " three four"}])
    options = ["--data", "rows.jsonl", "--reward_model", "rm"]
    model, repetition, total = report_of(capsys, "{reward: reward_model, weight: 2}", "repetition", *options)["components"]
    scorer = RewardScorer("rm", tokenizer, dtype="float32", max_tokens=64, normalize=False)
    end = tokenizer.eos_token_id
    prompt = tokenizer("one", add_special_tokens=False)["input_ids"]
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in (" two", " three four")]
    assert (model["lowest"], model["highest"]) == pytest.approx(tuple(sorted(scorer([prompt] * 2, ids))))
    plain = scorer([prompt] * 2, ids)
    for mean, std, least in ((3.0, 0.5, 0.5), (3.0, 0.0, 1e-6)):
        (tmp_path / "rm" / "score_scale.json").write_text(json.dumps({"score_mean": mean, "score_std": std}))
        scaled = RewardScorer("rm", tokenizer, dtype="float32", max_tokens=64, normalize=True)([prompt] * 2, ids)
        assert scaled == pytest.approx([(score - mean) / least for score in plain])
    assert repetition["mean"] == 0
    assert total["mean"] == pytest.approx(2 * model["mean"])
    capsys.readouterr()
    assert main(["reward", "test", "reward_model", "--data", "rows.jsonl"]) == 2
    assert "stands for a reward model, and there is none: set reward_model" in capsys.readouterr().err


def test_a_reward_model_with_another_chat_template_is_told_of(tmp_path, capsys, tokenizer):
    from copy import deepcopy

    from helpers import llama

    from align.encode import set_chat_template
    from align.scoring import RewardScorer

    def said(learned, policy):
        own, asked = deepcopy(tokenizer), deepcopy(tokenizer)
        llama(score_head=True).save_pretrained(tmp_path / "rm")
        set_chat_template(own, learned)
        own.save_pretrained(tmp_path / "rm")
        set_chat_template(asked, policy)
        RewardScorer("rm", asked, dtype="float32", max_tokens=64, normalize=False)
        return capsys.readouterr().err

    assert "rm has another chat template than the policy" in said("chatml", "plain")
    assert said("plain", "plain") == ""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_function_is_one_line_and_exit_code_2(name, capsys):
    write_rows("rows.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)])
    assert main(["reward", "test", f"my.py:{name}", "--data", "rows.jsonl", "--timeout", "0.1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(BROKEN[name], line)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["my.py:raises_on_third", "--data", "rows.jsonl"], r"raised ZeroDivisionError: .* \(row 2, prompt 'third'\)"),
        (["my.py:valuse", "--data", "rows.jsonl"], "did you mean 'values'"),
        (["my.py:values", "--data", "prompts.jsonl"], "holds no completions to score; name a --model"),
        (["my.py:values", "--data", "rows.jsonl", "--max_rows", "0"], "--max_rows: got 0, expected at least 1"),
        (["my.py:values", "--data", "rows.jsonl", "--on_error", "ignore"], "on_error must be raise, abstain or a number"),
        (["my.py:values"], "the following arguments are required: --data"),
        (["{reward: my.py:values, wieght: 2}", "--data", "rows.jsonl"], "did you mean 'weight'"),
    ],
)
def test_mistakes_at_the_command_line(arguments, complaint, capsys):
    write_rows("rows.jsonl", [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, COMPLETIONS, strict=True)])
    write_rows("prompts.jsonl", [{"prompt": "only a prompt"}])
    assert main(["reward", "test", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(complaint, line), line


def test_the_stage_is_still_there(capsys):
    write_rows("pairs.jsonl", PAIRS)
    assert main(["reward", "--model", "owner/name", "--data", "pairs.jsonl", "--plan"]) == 0
    assert main(["reward", "--help"]) == 0
    assert "align reward test" in capsys.readouterr().out


@pytest.fixture
def prompts(tmp_path, tokenizer):
    """A random model, and four prompts."""
    from helpers import llama

    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows("prompts.jsonl", [{"prompt": [{"role": "user", "content": f"say {i}"}]} for i in range(4)])


def test_a_stage_that_finds_no_pair_fails(prompts, capsys):
    """What came out would be a stage that is done, and one after it without rows."""
    command = (
        "pairs --model model --data prompts.jsonl --reward_funcs repetition --max_completion_length 6 --held_out 0 --min_gap 9"
    )
    assert main([*command.split(), "--output_dir", "out"]) == 2
    assert "pairs: no pair came of 4 prompts: no two answers to one differ by more than min_gap (9)" in capsys.readouterr().err
    assert main([*command.split(), "--max_length", "8", "--output_dir", "short"]) == 2
    told = capsys.readouterr().err
    assert "none of the rows can be used: 4 rows = 0 used + 4 set aside (4 leave no room for an answer within 2 tokens)" in told
    assert not Path("out").exists()


def test_a_recipe_of_one_stage_runs_with_specs(prompts, tmp_path):
    """On-policy pairs from a random model: every component is there, and the pairs are the total's."""
    words = {"reward": "length_band(low=3, high=9)", "name": "words", "clip": [0, 0.5]}
    rewards = [words, {"reward": "repetition", "gate": {"reward": "words", "at_least": 0}, "weight": 0.1}]
    stage = Pairs(
        model="model",
        data="prompts.jsonl",
        reward_funcs=rewards,
        max_completion_length=24,
        num_generations=6,
        held_out=0.0,
        stop_strings=["e"],
    )
    artifacts = Run(Recipe("p", {"p": stage}), tmp_path / "out").execute()
    assert 0 <= artifacts["p"].metrics["preferences_mean_score"] <= 0.5
    assert "held_out_mean_score" not in artifacts["p"].metrics, "of no prompts there is none"


@pytest.mark.parametrize("conversation", [False, True])
def test_white_space_around_the_answers_of_a_pair(conversation, tmp_path, tokenizer):
    """Behind a raw prompt a pair trains on what was said, the space between prompt and answer included; around a message the
    template sets its own. Two answers that differ in nothing else are one.
    """
    from helpers import llama

    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"say {i}" for i in range(6)]
    write_rows("prompts.jsonl", [{"prompt": [{"role": "user", "content": t}] if conversation else t} for t in texts])
    (tmp_path / "spaced.py").write_text(
        "from align.rewards import text_of\n"
        "def spaced(completions): return [float(len(text_of(c))) + text_of(c).startswith(' ') for c in completions]\n"
    )
    fields = {"max_completion_length": 2, "num_generations": 8, "held_out": 0.0, "reward_funcs": "spaced.py:spaced"}
    stage = Pairs(model="model", data="prompts.jsonl", **fields)
    Run(Recipe("p", {"p": stage}), tmp_path / "out").execute()
    (file,) = (tmp_path / "out").rglob("comparisons.jsonl")
    pairs = [json.loads(line) for line in file.read_text().splitlines()]
    written = [text_of(pair[side]) for pair in pairs for side in ("chosen", "rejected")]
    assert any(text != text.strip() for text in written) is not conversation
    assert all(text_of(pair["chosen"]).strip() != text_of(pair["rejected"]).strip() for pair in pairs)
