import asyncio
import hashlib
import math
import pickle
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import align.rewards
from align.errors import AlignError
from align.rewards import RewardSet, from_openrlhf, from_verl, load_reward, reward_fingerprint, rewards, text_of

PROMPTS = ["first prompt", "second prompt"]
COMPLETIONS = ["one two three", "one"]


def words(completions, **columns):
    return [len(text_of(completion).split()) for completion in completions]


def score(function, prompts=PROMPTS, completions=COMPLETIONS, columns=None, **more):
    return RewardSet([function]).score(prompts, completions, columns, **more).total


def returning(value):
    def function(completions, **columns):
        return value

    return function


def message(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture
def reward_file(tmp_path, monkeypatch):
    """Write a module into the working directory and return its path."""
    monkeypatch.chdir(tmp_path)

    def write(source, name="my_rewards.py"):
        (tmp_path / name).write_text(textwrap.dedent(source))
        return tmp_path / name

    return write


BRIEF = """
    def brief(completions, limit=2, **columns):
        return [float(len(c.split()) <= limit) for c in completions]

    threshold = 3

    class Judge:
        def __init__(self, scale=1): ...
        def __call__(self, completions, **columns):
            return [1.0] * len(completions)
"""


class TestBuiltIns:
    def test_exact_match(self):
        function = load_reward("exact_match")
        assert function(["42", " 4\n2", "41", "x"], ["42", "4 2", 42, None]) == [1, 1, 0, None]
        assert function([message("Paris")], ["paris"]) == [0]
        assert load_reward("exact_match(ignore_case=True)")([message("Paris")], ["paris"]) == [1]

    def test_length_band(self):
        function = load_reward("length_band(low=2, high=4)")
        assert function([" ".join("x" * n) for n in (0, 1, 2, 4, 5, 8, 20)]) == [0, 0.5, 1, 1, 0.75, 0, 0]
        assert load_reward("length_band(low=0, high=4)")([""]) == [1]

    def test_keyword(self):
        function = load_reward("keyword(words=['cat', 'c++'])")
        assert function(["A Cat writes C++.", "concatenate", "c++"]) == [1, 0, 0.5]
        assert load_reward("keyword(words='Cat', ignore_case=False)")(["Cat", "cat"]) == [1, 0]

    def test_regex_format(self):
        function = load_reward(r"regex_format(pattern='<think>.*</think>\\s*\\S+')")
        assert function(["<think>a\nb</think> 7", "7", "x <think></think> 7"]) == [1, 0, 0]

    def test_repetition(self):
        """bigrams of "a b a b a": ab ba ab ba, two of four are repeats."""
        assert load_reward("repetition(ngram=2, penalty=2.0)")(["a b a b a", "a b c", "a", ""]) == [-1, 0, 0, 0]

    @pytest.mark.parametrize("name", rewards)
    def test_all_read_messages_as_they_read_text(self, name):
        if name in ("reward_model", "sentence_similarity"):
            pytest.skip("has tests of its own")
        arguments = {"length_band": "(low=2, high=3)", "keyword": "(words=['two'])", "regex_format": "(pattern='one')"}
        function = load_reward(name + arguments.get(name, ""))
        columns = {"answer": COMPLETIONS, "prompts": PROMPTS, "completion_ids": None}
        assert function(completions=[message(c) for c in COMPLETIONS], **columns) == function(completions=COMPLETIONS, **columns)

    @pytest.mark.parametrize(
        ("spec", "complaint"),
        [
            ("length_band(low=5, high=2)", "low=5, high=2"),
            ("keyword(words=[])", "at least one word"),
            ("regex_format(pattern='(')", "no regular expression"),
            ("repetition(ngram=0)", "ngram >= 1"),
        ],
    )
    def test_impossible_settings(self, spec, complaint):
        with pytest.raises(AlignError, match=complaint):
            score(spec)


class TestLoading:
    def test_file(self, reward_file):
        path = reward_file(BRIEF)
        for spec in ("my_rewards.py:brief", f"{path}:brief"):
            assert load_reward(spec)(["a b", "a b c"]) == [1, 0]

    def test_arguments(self, reward_file):
        reward_file(BRIEF)
        assert score("my_rewards.py:brief(limit=3)") == [1, 1]
        reward_file("def brief(completions, limit=2): ...")
        with pytest.raises(AlignError, match=r"takes no 'limt'.*did you mean 'limit'"):
            load_reward("my_rewards.py:brief(limt=3)")

    def test_arguments_do_not_go_into_the_columns(self, reward_file):
        """They were lost there without a word, and the function was called with its default."""
        reward_file("""
            def brief(completions, limit=2, **columns):
                return [len(text) <= limit for text in completions]
            def handed_on(*args, **kwargs):
                return brief(*args, **kwargs)
        """)
        for key in ("limt", "columns"):
            with pytest.raises(AlignError, match=rf"takes no '{key}'.* takes: completions, limit; \*\* holds columns of the rows"):
                load_reward(f"my_rewards.py:brief({key}=3)")
        assert load_reward("my_rewards.py:handed_on(limit=3)")(["abc"]) == [True]

    @pytest.mark.parametrize("spec", ["align.rewards:text_of", "align.rewards.text_of"])
    def test_module(self, spec):
        assert load_reward(spec) is text_of

    def test_a_file_runs_once_and_again_after_an_edit(self, reward_file):
        reward_file("def f(completions, seen=[]): seen.append(1); return [len(seen)] * len(completions)")
        assert score("my_rewards.py:f") == [1, 1]
        assert score("my_rewards.py:f") == [2, 2]
        reward_file("def f(completions): return [7] * len(completions)")
        assert score("my_rewards.py:f") == [7, 7]

    def test_a_file_named_like_a_module_shadows_nothing(self, reward_file):
        reward_file("import json\ndef f(completions): return [len(json.dumps(c)) for c in completions]", name="json.py")
        import json

        assert score("json.py:f") == [15, 5]
        assert sys.modules["json"] is json

    def test_a_file_may_hold_dataclasses(self, reward_file):
        reward_file("""
            from __future__ import annotations
            from dataclasses import dataclass
            @dataclass
            class Length:
                scale: float = 2.0
                def __call__(self, completions, **columns):
                    return [self.scale * len(c.split()) for c in completions]
            length = Length()
        """)
        assert score("my_rewards.py:length") == [6, 2]

    def test_a_file_is_compiled_by_its_own_future_imports(self, reward_file):
        reward_file("def f(completions: list): return [0] * len(completions)")
        assert load_reward("my_rewards.py:f").__annotations__ == {"completions": list}

    @pytest.mark.parametrize(
        ("spec", "complaint"),
        [
            ("exact_mach", r"unknown reward 'exact_mach' \(did you mean 'exact_match'\?\); known: exact_match, "),
            ("nothing_like_it", "package.module:function"),
            ("length_band(low=1, hgh=2)", "takes no 'hgh' .did you mean 'high'."),
            ("length_band(low=1)", "needs 'high'"),
            ("length_band(1, 2)", "key=value"),
            ("length_band(low=open('x'), high=2)", "plain values"),
            ("my_rewards.py", "add the function, my_rewards.py:function"),
            ("my_reward.py:brief", "does not exist.*did you mean 'my_rewards.py'"),
            ("my_rewards.py:breif", "has no 'breif' .did you mean 'brief'."),
            ("my_rewards.py:threshold", "no function but a int"),
            ("my_rewards.py:Judge", r"is a class: make an object of it there \(judge = Judge\(\)\)"),
            ("my_rewards.py:Judge(scale=2)", "is a class"),
            ("my_rewards.py:", "incomplete"),
            ("no_such_module:f", "no module 'no_such_module'; for a file"),
            ("align.no_such_module:f", "no module 'align.no_such_module'"),
            ("align.rewards:txt_of", "did you mean 'text_of'"),
        ],
    )
    def test_mistakes(self, reward_file, spec, complaint):
        reward_file(BRIEF)
        with pytest.raises(AlignError, match=complaint):
            load_reward(spec)

    def test_a_broken_file_keeps_its_cause_and_leaves_no_module(self, reward_file):
        before = set(sys.modules)
        reward_file("1 / 0")
        with pytest.raises(AlignError, match="ZeroDivisionError") as caught:
            load_reward("my_rewards.py:f")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert set(sys.modules) == before

    def test_a_file_that_imports_its_neighbour_is_told_what_to_do(self, reward_file, tmp_path):
        reward_file("import helper_of_mine\n" + textwrap.dedent(BRIEF))
        with pytest.raises(AlignError, match=r"No module named 'helper_of_mine'$"):
            load_reward("my_rewards.py:brief")
        (tmp_path / "helper_of_mine.py").write_text("")
        with pytest.raises(AlignError, match="cannot import its neighbours: make them a package that PYTHONPATH leads to"):
            load_reward("my_rewards.py:brief")

    def test_a_script_that_leaves_is_no_reward(self, reward_file, tmp_path, monkeypatch):
        """It does not take the run along, with its own exit code."""
        reward_file("def f(): ...\nraise SystemExit(5)")
        reward_file("raise SystemExit(0)", name="reward_script.py")
        monkeypatch.syspath_prepend(tmp_path)
        for spec, complaint in (("my_rewards.py:f", "running the .*: SystemExit: 5"), ("reward_script:f", "failed: SystemExit: 0")):
            with pytest.raises(AlignError, match=complaint):
                load_reward(spec)

    def test_a_missing_import_inside_a_module_is_not_taken_for_the_module(self, reward_file, tmp_path, monkeypatch):
        reward_file("import not_installed_anywhere", name="reward_with_import.py")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(AlignError, match=r"importing the reward module 'reward_with_import' failed.*not_installed_anywhere"):
            load_reward("reward_with_import:f")

    def test_a_built_in_travels_to_another_process(self):
        function = pickle.loads(pickle.dumps(load_reward("length_band(low=1, high=3)")))
        assert function(["a b"]) == [1]


class TestProtocol:
    def test_functions_written_for_trl_work_unchanged(self):
        from trl.rewards import get_soft_overlong_punishment, think_format_reward

        thought = [message("<think>so</think> 7"), message("7")]
        assert score(think_format_reward, completions=thought) == [1, 0]
        overlong = get_soft_overlong_punishment(max_completion_len=4, soft_punish_cache=2)
        assert score(overlong, completion_ids=[[1, 2], [1, 2, 3, 4, 5]]) == [0, -1]

    def test_a_function_gets_columns_and_ids_and_not_what_collides(self):
        seen = {}

        def spy(prompts, completions, completion_ids=None, **columns):
            seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
            return [0] * len(prompts)

        columns = {"answer": ["a", "b"], "prompt": ["x", "y"], "completions": ["x", "y"], "completion_ids": [0, 0]}
        score(spy, columns=columns, completion_ids=[[1], [2]])
        expected = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": [[1], [2]], "answer": ["a", "b"]}
        assert seen == expected

    def test_a_function_without_kwargs_gets_what_it_names(self):
        def function(completions, bonus):
            return [b + len(c) for b, c in zip(bonus, completions, strict=True)]

        assert score(function, columns={"bonus": [10, 20], "other": [0, 0]}) == [23, 23]

    def test_a_column_does_not_override_a_setting(self):
        assert score("length_band(low=3, high=3)", columns={"low": [9, 9]}) == score("length_band(low=3, high=3)")
        assert score("repetition", columns={"ngram": [9, 9]}) == [0, 0]

    def test_a_missing_column_is_named(self):
        with pytest.raises(
            AlignError, match=r"'exact_match' needs a column 'answer' \(did you mean 'answers'\?\); the rows have: answers"
        ):
            score("exact_match", columns={"answers": ["a", "b"]})

    def test_a_function_that_changes_its_lists_harms_no_other(self):
        def greedy(prompts, completions, **columns):
            prompts.clear()
            completions.clear()
            return [0, 0]

        assert RewardSet([greedy, words]).score(PROMPTS, COMPLETIONS, {}).components["words"] == [3, 1]

    def test_nor_one_that_changes_what_is_in_them(self):
        """Ids are what is trained on, and both completions have one row's cell."""

        def greedy(prompts, completions, completion_ids, tests, **columns):
            for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True):
                prompt[0]["content"] = "gone"
                prompt.append(completion.pop())
                ids.clear()
            return [len(cell.pop()) for cell in tests]

        prompts, completions = ([[{"role": role, "content": text}] for text in "ab"] for role in ("user", "assistant"))
        ids, cell = [[5, 2], [6, 2]], ["one", "two"]
        found = RewardSet([greedy, words]).score(prompts, completions, {"tests": [cell, cell]}, ids)
        assert found.components == {"greedy": [3, 3], "words": [1, 1]}
        assert (ids, cell, prompts[0]) == ([[5, 2], [6, 2]], ["one", "two"], [{"role": "user", "content": "a"}])

    def test_async_functions_run_together(self):
        both_started = []

        async def waits(completions, **columns):
            both_started.append(1)
            while len(both_started) < 2:  # ends only if the other one runs meanwhile
                await asyncio.sleep(0)
            return [1.0] * len(completions)

        async def meets(completions, **columns):
            both_started.append(1)
            return [2.0] * len(completions)

        assert RewardSet([waits, words, meets]).score(PROMPTS, COMPLETIONS).total == [6, 4]

    def test_async_functions_work_within_a_running_loop_and_keep_their_own(self):
        loops = []

        async def function(completions, **columns):
            loops.append(asyncio.get_running_loop())
            return [1.0] * len(completions)

        async def notebook():
            return score(function)

        assert asyncio.run(notebook()) == score(function) == [1, 1]
        assert loops[0] is loops[1]

    @pytest.mark.parametrize(
        "values",
        [
            [1, 0.5],
            (1, 0.5),
            np.array([1, 0.5]),
            torch.tensor([1, 0.5]),
            [np.float32(1), torch.tensor(0.5)],
            [True, np.float64(0.5)],
        ],
        ids=["list", "tuple", "array", "tensor", "scalars", "bool"],
    )
    def test_numbers_of_any_kind(self, values):
        total = score(returning(values))
        assert total == [1, 0.5]
        assert [type(number) for number in total] == [float, float]


class TestSet:
    def test_total_is_the_weighted_sum_of_those_that_do_not_abstain(self):
        def partial(completions, **columns):
            return [10, None]

        scores = RewardSet([words, partial], weights=[1, 0.5]).score(PROMPTS, COMPLETIONS)
        assert scores.total == [8, 1]
        assert scores.components == {"words": [3, 1], "partial": [10, None]}

    def test_specs_and_functions_mix_and_names_stay_apart(self):
        reward_set = RewardSet(["keyword(words='one')", "keyword(words='two')", words])
        assert list(reward_set.components) == ["keyword", "keyword_2", "words"]
        assert reward_set.score(PROMPTS, COMPLETIONS).components == {"keyword": [1, 1], "keyword_2": [1, 0], "words": [3, 1]}

    def test_a_component_is_called_as_it_was_named(self, reward_file):
        """Their own names are ``<lambda>`` for two of them, ``within`` and ``Judge``."""
        reward_file(
            """
            def twice(function):
                def within(completions, **columns):
                    return [2 * value for value in function(completions)]
                return within

            class Judge:
                def __call__(self, completions, **columns):
                    return [0.5 for _ in completions]

            short = lambda completions, limit=2, **columns: [float(len(c.split()) <= limit) for c in completions]
            long = lambda completions, **columns: [float(len(c.split()) > 2) for c in completions]
            doubled, judge = twice(long), Judge()
            """
        )
        specs = ["my_rewards.py:short(limit=1)", *(f"my_rewards.py:{name}" for name in ("long", "doubled", "judge", "long"))]
        components = RewardSet(specs).score(PROMPTS, COMPLETIONS).components
        assert components == {"short": [0, 1], "long": [1, 0], "doubled": [2, 0], "judge": [0.5, 0.5], "long_2": [1, 0]}

    def test_one_spec_is_no_list_of_letters(self):
        assert list(RewardSet("repetition").components) == ["repetition"]

    def test_no_rows(self):
        assert RewardSet([words]).score([], []).total == []

    @pytest.mark.parametrize("weights", [[1], [1, 2, 3], [1, math.nan]])
    def test_weights_must_fit(self, weights):
        with pytest.raises(AlignError, match="2 finite numbers"):
            RewardSet([words, "repetition"], weights)

    def test_no_function(self):
        with pytest.raises(AlignError, match="no reward function"):
            RewardSet([])

    def test_lengths_must_fit(self):
        with pytest.raises(ValueError, match="2 prompts, but 1 answer"):
            score(words, columns={"answer": ["a"]})


class TestErrors:
    @pytest.mark.parametrize(
        ("value", "complaint"),
        [
            ([1.0], r"returned 1 values; expected 2.*first prompt"),
            (1.0, r"returned 1.0; expected a list of 2 numbers"),
            (None, r"returned None; expected a list"),
            ({"a": 1}, r"expected a list"),
            (torch.tensor(1.0), r"expected a list"),
            ([10**400, 1.0], r"row 0 \(prompt 'first prompt'\): got 1000.*expected a finite number"),
            ([1.0, math.nan], r"row 1 \(prompt 'second prompt'\): got nan; expected a finite number .*, or None"),
            ([1.0, 1e39], r"row 1 .*: got 1e\+39; expected a finite number \(of float32\)"),
            ([math.inf, 1.0], r"row 0 \(prompt 'first prompt'\): got inf"),
            ([1.0, "0.5"], r"row 1 .*got '0.5'"),
            ([1.0, [2.0]], r"row 1 .*got \[2.0\]"),
            (np.array([1.0, np.nan]), r"row 1 .*got nan"),
        ],
    )
    def test_a_bad_result_names_function_row_prompt_and_value(self, value, complaint):
        with pytest.raises(AlignError, match=f"reward 'function'.*{complaint}"):
            score(returning(value))

    def test_long_and_conversational_prompts_are_shown_short(self):
        prompts = [[{"role": "system", "content": "be brief"}, {"role": "user", "content": "Why? " * 100}], "b"]
        with pytest.raises(AlignError, match=r"prompt 'Why\? ") as caught:
            score(returning([math.nan, 1.0]), prompts=prompts)
        assert len(str(caught.value)) < 200

    def test_an_abstention_of_all_is_an_error(self):
        with pytest.raises(AlignError, match=r"every reward function abstained on row 1 \(prompt 'second prompt'"):
            score(returning([1.0, None]))

    def test_an_exception_names_the_function_and_keeps_its_cause(self):
        def broken(completions, **columns):
            return [columns["nothing"]]

        where = rf"\(test_rewards\.py line {broken.__code__.co_firstlineno + 1}\)"
        with pytest.raises(AlignError, match=f"reward 'broken' raised KeyError: 'nothing' {where}") as caught:
            score(broken)
        assert isinstance(caught.value.__cause__, KeyError)

    def test_an_exception_of_an_async_function_likewise(self):
        async def broken(completions, **columns):
            raise TimeoutError("judge is down")

        where = rf"\(test_rewards\.py line {broken.__code__.co_firstlineno + 1}\)"
        with pytest.raises(AlignError, match=f"reward 'broken' raised TimeoutError: judge is down {where}") as caught:
            score(broken)
        assert isinstance(caught.value.__cause__, TimeoutError)

    def test_a_coroutine_that_an_error_leaves_behind_is_closed(self):
        async def judge(completions, **columns):
            return [0, 0]

        def broken(completions, **columns):
            raise RuntimeError

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(AlignError, match="broken"):
                RewardSet([judge, broken]).score(PROMPTS, COMPLETIONS)


class TestFingerprint:
    def test_is_the_digest_of_the_file(self, reward_file):
        path = reward_file(BRIEF)
        before = reward_fingerprint("my_rewards.py:brief")
        assert before == hashlib.sha256(path.read_bytes()).hexdigest() == reward_fingerprint("my_rewards.py:brief(limit=3)")
        reward_file(textwrap.dedent(BRIEF) + "# edited")
        assert reward_fingerprint("my_rewards.py:brief") != before

    def test_of_a_built_in(self):
        assert reward_fingerprint("repetition") == hashlib.sha256(Path(align.rewards.builtin.__file__).read_bytes()).hexdigest()
        assert reward_fingerprint("math_answer") != reward_fingerprint("repetition")

    def test_covers_what_the_file_imports_from_beside_it(self, tmp_path, monkeypatch):
        """A recipe may import modules that lie beside it, and so may a module that PYTHONPATH leads to."""
        monkeypatch.syspath_prepend(tmp_path)
        (tmp_path / "listed_words.py").write_text("WORDS = ['fox']\n")
        (tmp_path / "own_judge.py").write_text(
            "from listed_words import WORDS\ndef f(completions, **columns): return [float(c in WORDS) for c in completions]\n"
        )
        before = reward_fingerprint("own_judge:f")
        (tmp_path / "listed_words.py").write_text("WORDS = ['cat']\n")
        assert reward_fingerprint("own_judge:f") != before

    def test_an_imported_function_depends_on_both_files(self, reward_file):
        prints = set()
        for comment in ("# one", "# two"):
            reward_file(f"from align.rewards import from_verl\nreward = from_verl(lambda **row: 1.0)  {comment}")
            prints.add(reward_fingerprint("my_rewards.py:reward"))
        assert len(prints) == 2

    def test_without_source(self):
        with pytest.raises(AlignError, match="no Python source"):
            reward_fingerprint("math:fsum")


class TestOtherProtocols:
    def test_verl(self):
        def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            right = float(solution_str == ground_truth)
            return {"score": right, "source": data_source} if extra_info else right

        reward = from_verl(compute_score)
        columns = {"data_source": ["d", "d"], "reward_model": [{"ground_truth": "one"}] * 2, "extra_info": [{"index": 0}, None]}
        assert score(reward, columns=columns) == [0, 1]
        assert score(reward, completions=[message(c) for c in COMPLETIONS], columns={"ground_truth": ["one", "one"]}) == [0, 1]
        assert list(RewardSet([reward]).components) == ["compute_score"]

    def test_verl_async(self):
        async def compute_score(data_source, solution_str, ground_truth, extra_info=None):
            return {"score": len(solution_str)}

        assert score(from_verl(compute_score), columns={"ground_truth": ["", ""]}) == [13, 3]

    def test_verl_needs_a_ground_truth(self):
        with pytest.raises(AlignError, match="'ground_truth' or 'reward_model'; the rows have: answer"):
            score(from_verl(lambda **row: 1.0), columns={"answer": ["a", "b"]})

    @pytest.mark.parametrize("wrap", [lambda r: r, lambda r: {"rewards": r, "scores": r, "extra_logs": {}}])
    def test_openrlhf(self, wrap):
        def reward_func(queries, prompts, labels):
            assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts, strict=True))
            return wrap(torch.tensor([float(q.endswith(label)) for q, label in zip(queries, labels, strict=True)]))

        assert score(from_openrlhf(reward_func, label_column="answer"), columns={"answer": ["three", "two"]}) == [1, 0]
        assert score(from_openrlhf(reward_func)) == [1, 1]
        with pytest.raises(AlignError, match="column 'answer', which is not there"):
            score(from_openrlhf(reward_func, label_column="answer"))


def test_the_example_in_the_documentation_runs(reward_file):
    page = (Path(__file__).parents[1] / "docs/rewards.md").read_text()
    example, session, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    reward_file(example)
    exec(session, {})


def test_importing_rewards_is_light():
    code = "import align.rewards, sys; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'trl', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
