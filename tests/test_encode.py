"""Rows to trees: what carries a loss, what ends an answer, what becomes of rows that are too long."""

import copy
import random
from itertools import compress

import pytest
from helpers import add_begin, learned

from align.encode import Encoder, set_chat_template
from align.errors import AlignError
from align.schema import Message, PreferenceRow, PromptRow, SFTRow, TextRow


def chat(*turns):
    """Messages from ``"user: text"`` strings."""
    return [Message(role=role, content=content) for role, content in (turn.split(": ", 1) for turn in turns)]


@pytest.fixture(params=["plain", "chatml"])
def encoder(tokenizer, request):
    """An encoder with each shipped template; chatml's tokens are special, as in models that use it."""
    tokenizer = copy.deepcopy(tokenizer)
    set_chat_template(tokenizer, request.param)
    if request.param == "chatml":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return Encoder(tokenizer)


@pytest.fixture
def plain(tokenizer):
    return Encoder(copy.deepcopy(tokenizer))


def test_what_was_rendered_ahead_of_a_mistake_is_forgotten(plain):
    plain.tokenizer.chat_template = "{{ (tools or [{}])[0].name }} {{ messages[-1]['content'] }}"  # it puts no end token anywhere
    row = SFTRow(prompt=chat("user: a"), completion=chat("assistant: b"), tools=[{"name": "one"}])
    with pytest.raises(AlignError, match="end"):
        plain.sft([row])
    row.tools[0]["name"] = "two"
    assert plain.render(row.prompt, generate=True, tools=row.tools) == "two a"


def test_a_template_in_the_users_folder(tokenizer, tmp_path, monkeypatch):
    """``--chat_template=~/t.jinja`` and a config file come here as they were written: no shell has read the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    mine = copy.deepcopy(tokenizer)
    set_chat_template(mine, "~/t.jinja")
    assert mine.chat_template == "{{ messages[0]['content'] }}"


def end(encoder):
    return encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn)


class TestChat:
    def test_the_end_of_a_turn_is_found_in_the_template(self, encoder):
        assert end(encoder) == ("<|im_end|>" if "<|im_end|>" in encoder.tokenizer.chat_template else "<|eos|>")

    def test_one_answer(self, encoder):
        """The answer and its end token carry the loss; nothing of the prompt, its header or what stands behind the end does."""
        (tree,) = encoder.sft([SFTRow(messages=chat("system: be nice", "user: How are you?", "assistant: Fine, thanks!"))]).trees
        (answer,) = learned(encoder, tree)
        assert answer.strip() == "Fine, thanks!" + end(encoder)
        assert tree.prompt[-1] == encoder.end_of_turn
        assert tree.prompt_mask[-1]

    def test_several_answers(self, encoder):
        turns = ["user: hello", "assistant: one two", "user: and?", "assistant: three", "user: four"]
        (tree,) = encoder.sft([SFTRow(messages=chat(*turns))]).trees
        assert [answer.strip() for answer in learned(encoder, tree)] == ["one two" + end(encoder), "three" + end(encoder)]
        assert encoder.tokenizer.decode(tree.prompt) == encoder.render(chat(*turns))

    def test_several_answers_have_the_tokens_of_one_at_a_time(self, encoder):
        """Each answer of a conversation is what it would be as the last one."""
        turns = chat("user: hello", "assistant: one two", "user: and?", "assistant: three")
        (whole,) = encoder.sft([SFTRow(messages=turns)]).trees
        (last,) = encoder.sft([SFTRow(prompt=turns[:3], completion=turns[3:])]).trees
        (first,) = encoder.sft([SFTRow(messages=turns[:2])]).trees
        assert whole.prompt[: len(last.prompt)] == last.prompt
        assert learned(encoder, whole) == learned(encoder, first) + learned(encoder, last)

    def test_prompt_and_completion_equal_messages(self, encoder):
        turns = chat("user: hello", "assistant: one two")
        split = SFTRow(prompt=turns[:1], completion=turns[1:])
        assert encoder.sft([split]).trees == encoder.sft([SFTRow(messages=turns)]).trees

    @pytest.mark.parametrize("answer", ["Fine, thanks!", " led by a space", "\nled by a line", "", "two\nlines\n", "naïve 日本 🙂"])
    def test_what_is_trained_is_the_generation_prompt_and_the_answer(self, encoder, answer):
        """Training sees the tokens that generation starts from, then the answer: prompt and branch render to the conversation."""
        prompt, reply = chat("user: How are you?"), [Message(role="assistant", content=answer)]
        (asked,) = encoder.prompts([PromptRow(prompt=prompt)]).trees
        (pair,) = encoder.preference([PreferenceRow(prompt=prompt, chosen=reply, rejected=chat("assistant: no"))]).trees
        (shown,) = encoder.sft([SFTRow(prompt=prompt, completion=reply)]).trees
        assert asked.prompt == pair.prompt
        assert encoder.tokenizer.decode(asked.prompt) == encoder.render(prompt, generate=True)
        assert shown.prompt == pair.prompt + pair.branches[0]
        assert shown.prompt_mask == [False] * len(pair.prompt) + [True] * len(pair.branches[0])
        text = encoder.render([*prompt, *reply])
        assert encoder.tokenizer.decode(shown.prompt) == text[: text.rindex(end(encoder)) + len(end(encoder))]
        assert [branch[-1] for branch in pair.branches] == [encoder.end_of_turn] * 2
        assert all(branch.count(encoder.end_of_turn) == 1 for branch in pair.branches)

    def test_a_pair_carries_its_margin(self, encoder):
        prompt = chat("user: hello")
        rows = [
            PreferenceRow(prompt=prompt, chosen=chat("assistant: one"), rejected=chat("assistant: two"), margin=m)
            for m in (None, 2.5)
        ]
        assert [tree.values for tree in encoder.preference(rows).trees] == [{"margin": [0.0]}, {"margin": [2.5]}]

    def test_no_begin_token_comes_twice(self, tokenizer):
        """The template writes it, so the tokenizer must not add it again."""
        encoder = Encoder(add_begin(copy.deepcopy(tokenizer)))
        rows = [SFTRow(messages=chat("user: hello", "assistant: one"))]
        rows.append(SFTRow(messages=chat("user: hello", "assistant: one", "user: two", "assistant: three")))
        for tree in [*encoder.sft(rows).trees, *encoder.prompts([PromptRow(prompt=chat("user: hello"))]).trees]:
            assert tree.prompt[0] == tokenizer.bos_token_id
            assert tree.prompt.count(tokenizer.bos_token_id) == 1

    def test_tools_reach_the_template(self, tokenizer):
        """A row's tools are part of what the model is shown, in training and when asked."""
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = (
            "{% if tools %}{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% endif %}" + tokenizer.chat_template
        )
        encoder = Encoder(tokenizer)
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
        turns = chat("user: hello", "assistant: one")
        more = [*turns, *chat("user: two", "assistant: three")]
        trees = [
            *encoder.sft([SFTRow(messages=turns, tools=tools), SFTRow(messages=more, tools=tools)]).trees,
            *encoder.sft([SFTRow(prompt=turns[:1], completion=turns[1:], tools=tools)]).trees,
            *encoder.preference(
                [PreferenceRow(prompt=turns[:1], chosen=turns[1:], rejected=chat("assistant: no"), tools=tools)]
            ).trees,
            *encoder.prompts([PromptRow(prompt=turns[:1], tools=tools)]).trees,
        ]
        assert len(trees) == 5
        for tree in trees:
            assert tokenizer.decode(tree.prompt).startswith("[weather]<|bos|>")
        assert tokenizer.decode(encoder.sft([SFTRow(messages=turns)]).trees[0].prompt).startswith("<|bos|>")

    def test_without_a_template_the_message_names_the_knob(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = None
        with pytest.raises(AlignError, match="the tokenizer has no chat template; set chat_template to"):
            Encoder(tokenizer).sft([SFTRow(messages=chat("user: hello", "assistant: one"))])

    def test_a_template_without_an_end_token_is_refused(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        with pytest.raises(AlignError, match=r"puts no end token of this tokenizer .* \(it puts '\\n'\).*never learn to stop"):
            Encoder(tokenizer).sft([SFTRow(messages=chat("user: hello", "assistant: one"))])

    def test_a_template_that_rewrites_the_past_is_refused(self, tokenizer):
        """One that shows only the last user turn once the answer is there: the prompt would not be a prefix."""
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
        with pytest.raises(AlignError, match="its prompt is not a prefix"):
            Encoder(tokenizer).sft([SFTRow(messages=chat("user: hello", "assistant: one"))])


class TestChoiceOfTemplate:
    def test_auto_keeps_what_is_there_and_none_changes_nothing(self, tokenizer):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = "own"
        for choice in (None, "auto"):
            set_chat_template(tokenizer, choice)
            assert tokenizer.chat_template == "own"
        tokenizer.chat_template = None
        set_chat_template(tokenizer, None)
        assert tokenizer.chat_template is None
        set_chat_template(tokenizer, "auto")
        assert "Assistant:" in tokenizer.chat_template

    def test_a_name_or_a_file(self, tokenizer, tmp_path):
        tokenizer = copy.deepcopy(tokenizer)
        set_chat_template(tokenizer, "chatml")
        assert "<|im_start|>" in tokenizer.chat_template
        (tmp_path / "mine.jinja").write_text("mine")
        set_chat_template(tokenizer, str(tmp_path / "mine.jinja"))
        assert tokenizer.chat_template == "mine"
        with pytest.raises(AlignError, match="chat_template 'chatlm' is neither a file nor one of: auto, chatml, plain"):
            set_chat_template(tokenizer, "chatlm")


class TestRawText:
    def test_the_end_token_is_put_behind_once_and_carries_the_loss(self, plain):
        row = SFTRow(prompt="one two", completion=" three")
        (tree,) = plain.sft([row]).trees
        assert learned(plain, tree) == [" three<|eos|>"]
        assert plain.tokenizer.decode(tree.prompt) == "one two three<|eos|>"
        (again,) = plain.sft([SFTRow(prompt="one two", completion=" three<|eos|>")]).trees
        assert again == tree

    def test_what_stands_behind_an_end_token_within_an_answer_stays(self, plain):
        (tree,) = plain.sft([SFTRow(prompt="one", completion=" two<|eos|> three")]).trees
        assert learned(plain, tree) == [" two<|eos|> three<|eos|>"]

    def test_tokens_that_merge_across_the_border_are_cut_there(self, plain):
        """ "three" is one token after "one two ", but the prompt ends in a space of its own that the merged text would not have."""
        prompt, completion = "one two ", "three"
        whole = plain.tokenizer(prompt + completion)["input_ids"]
        head = plain.tokenizer(prompt)["input_ids"]
        assert whole[: len(head)] != head
        (tree,) = plain.sft([SFTRow(prompt=prompt, completion=completion)]).trees
        assert tree.prompt[: len(head)] == head
        assert learned(plain, tree) == ["three<|eos|>"]
        assert plain.prompts([PromptRow(prompt=prompt)]).trees[0].prompt == head

    def test_an_empty_prompt(self, plain):
        (tree,) = plain.preference([PreferenceRow(prompt="", chosen="one", rejected="two three")]).trees
        assert tree.prompt == []
        assert [plain.tokenizer.decode(branch) for branch in tree.branches] == ["one<|eos|>", "two three<|eos|>"]

    def test_an_empty_prompt_cannot_be_answered(self, plain):
        """One stopped PPO and evaluations, whatever on_bad_row was."""
        rows = [PromptRow(prompt="one"), PromptRow(prompt="", columns={"answer": "two"})]
        encoded = plain.prompts(rows)
        assert encoded.rows == rows[:1]
        assert encoded.summary() == "2 rows = 1 used + 1 set aside (1 have an empty prompt, which no answer can follow)"

    def test_a_begin_token_comes_once(self, tokenizer):
        encoder = Encoder(add_begin(copy.deepcopy(tokenizer)))
        (tree,) = encoder.preference([PreferenceRow(prompt="one", chosen=" two", rejected=" three")]).trees
        assert tree.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in [*tree.prompt[1:], *tree.branches[0], *tree.branches[1]]

    def test_a_document_is_measured_on_the_tokens_that_it_is_trained_on(self, tokenizer):
        """One that writes its begin token itself was measured with two."""
        encoder, rows = Encoder(add_begin(copy.deepcopy(tokenizer))), [TextRow(text="<|bos|>one two")]
        (trained,), (measured,) = encoder.text(rows).trees, encoder.windows(rows).trees
        assert measured.prompt == trained.prompt
        assert measured.prompt.count(tokenizer.bos_token_id) == 1

    def test_a_tokenizer_without_an_end_token_is_refused(self, plain):
        plain.tokenizer.eos_token = None
        with pytest.raises(AlignError, match=r"no end token \(eos_token\)"):
            plain.sft([SFTRow(prompt="one", completion=" two")])


class TestDocuments:
    def test_blocks(self, plain):
        """Nothing is lost at a cut: the blocks put together are the text and its end token, all but a block's first with a loss."""
        text = "one two three four five six seven eight " * 4
        ids = plain.tokenizer(text)["input_ids"]
        plain.max_length = 7
        result = plain.text([TextRow(text=text)])
        assert [token for tree in result.trees for token in tree.prompt] == [*ids, plain.tokenizer.eos_token_id]
        assert [len(tree.prompt) for tree in result.trees[:-1]] == [7] * (len(ids) // 7)
        assert all(tree.prompt_mask == [True] * len(tree.prompt) and not tree.branches for tree in result.trees)
        assert len(result.rows) == len(result.trees)

    def test_a_document_without_a_limit_is_one_block(self, plain):
        (tree,) = plain.text([TextRow(text="one two<|eos|>")]).trees
        assert plain.tokenizer.decode(tree.prompt) == "one two<|eos|>"

    def test_what_predicts_nothing_is_counted(self, plain):
        """An empty document is only an end token; a block of one token has nothing before it."""
        result = plain.text([TextRow(text=""), TextRow(text="one two")])
        assert len(result.trees) == 1
        assert sum(result.set_aside.values()) == 1
        assert "2 rows = 1 used + 1 set aside" in result.summary()
        plain.max_length = len(plain.tokenizer("one two")["input_ids"])
        lone = plain.text([TextRow(text="one two")])
        assert len(lone.trees) == 1
        assert (lone.cut_rows, lone.cut_tokens) == (1, 1)

    def test_a_document_in_several_blocks_is_one_row(self, plain):
        plain.max_length = 3
        result = plain.text([TextRow(text="one two three four five"), TextRow(text="")])
        assert len(result.trees) > 1
        assert result.summary().startswith("2 rows = 1 used + 1 set aside")

    def test_an_empty_document_without_an_end_token(self, plain):
        plain.tokenizer.eos_token = None
        assert plain.text([TextRow(text="")]).summary().startswith("1 rows = 0 used + 1 set aside")


class TestLengths:
    """In these texts each number word behind a space is one token; see `test_each_word_is_one_token`."""

    @staticmethod
    def answers(n, rng=None):
        words = ["one", "two", "three", "four", "five", "six"]
        return "".join(f" {(rng or random).choice(words)}" for _ in range(n))

    def test_each_word_is_one_token(self, plain):
        assert len(plain.tokenizer(self.answers(50))["input_ids"]) == 50

    def test_a_row_cut_to_its_first_token_has_nothing_to_learn(self, plain):
        """No token is before it, so it is no target, though it is the assistant's."""
        plain.max_length = 1
        result = plain.sft([SFTRow(prompt="", completion=" one two")])
        assert not result.trees
        assert result.set_aside == {"leave no room for an answer within 1 tokens": 1}

    def test_a_prompt_may_take_all_the_room_there_is(self, plain):
        plain.max_length = 1
        result = plain.prompts([PromptRow(prompt=" one"), PromptRow(prompt=" one two")])
        assert [len(tree.prompt) for tree in result.trees] == [1]
        plain.max_length = 0
        with pytest.raises(AlignError, match="leaves no token for a prompt; raise max_length"):
            plain.prompts([PromptRow(prompt=" one")])

    def test_counts_add_up(self, plain):
        """Prompts of 1 to 12 words, answers of 1 to 9 words and an end token, at most 10 tokens: counted by hand. Two pairs have
        the same beginnings, and nothing else is left of them.
        """
        rng = random.Random(0)
        sizes = [(rng.randint(1, 12), rng.randint(1, 9), rng.randint(1, 9)) for _ in range(60)]
        rows = [
            PreferenceRow(prompt=self.answers(p, rng), chosen=self.answers(c, rng), rejected=self.answers(r, rng))
            for p, c, r in sizes
        ]
        plain.max_length = 10
        result = plain.preference(rows)
        read = [
            [f"{answer} end".split()[: 10 - p] for answer in (row.chosen, row.rejected)]
            for row, (p, _, _) in zip(rows, sizes, strict=True)
        ]
        same = [p < 10 and chosen == rejected for (p, _, _), (chosen, rejected) in zip(sizes, read, strict=True)]
        used = [p < 10 and not twice for (p, _, _), twice in zip(sizes, same, strict=True)]
        assert sum(same) == result.set_aside["have twice the same answer within 10 tokens"] == 2
        kept = [(p, c + 1, r + 1) for p, c, r in compress(sizes, used)]
        cut = [max(0, p + c - 10) + max(0, p + r - 10) for p, c, r in kept]
        assert len(result.trees) == len(result.rows) == len(kept)
        assert sum(result.set_aside.values()) == 60 - len(kept) > 0
        assert (result.cut_rows, result.cut_tokens) == (sum(n > 0 for n in cut), sum(cut))
        assert result.cut_rows > 0
        assert max(tree.longest for tree in result.trees) == 10
        assert all(all(tree.branches) for tree in result.trees)
        assert result.rows == [*compress(rows, used)]
        assert f"60 rows = {len(kept)} used + {60 - len(kept)} set aside" in result.summary()
        assert f"{sum(cut)} tokens cut from {result.cut_rows} rows" in result.summary()

    def test_a_pair_that_is_no_longer_one_is_set_aside(self, plain):
        plain.max_length = 4
        rows = [
            PreferenceRow(prompt=" one", chosen=f" two two two{end}", rejected=" two two two six")
            for end in (" five", " four five")
        ]
        result = plain.preference([*rows, PreferenceRow(prompt=" one", chosen=" two two six", rejected=" two two two two")])
        assert [len(branch) for tree in result.trees for branch in tree.branches] == [3, 3]
        assert (result.cut_rows, result.cut_tokens) == (1, 3)
        assert "3 rows = 1 used + 2 set aside (2 have twice the same answer within 4 tokens)" in result.summary()
        plain.max_length = None
        assert len(plain.preference(rows).trees) == 2

    def test_an_answer_is_cut_and_a_prompt_is_not(self, plain):
        plain.max_length = 6
        result = plain.sft(
            [SFTRow(prompt=self.answers(4), completion=self.answers(4)), SFTRow(prompt=self.answers(6), completion=" one")]
        )
        (tree,) = result.trees
        assert tree.prompt_mask == [False] * 4 + [True] * 2
        assert (result.cut_rows, result.cut_tokens) == (1, 3)
        assert list(result.set_aside.values()) == [1]

    def test_prompts_that_are_too_long_are_set_aside_and_never_cut(self, plain):
        plain.max_length = 5
        result = plain.prompts([PromptRow(prompt=self.answers(n)) for n in (4, 5, 6, 7)])
        assert [len(tree.prompt) for tree in result.trees] == [4, 5]
        assert "4 rows = 2 used + 2 set aside (2 leave no room for an answer within 5 tokens)" in result.summary()
        assert result.cut_rows == 0

    def test_rows_that_fit_are_not_mentioned(self, plain):
        plain.max_length = 100
        assert plain.prompts([PromptRow(prompt="one")]).summary() == "1 rows = 1 used + 0 set aside"
