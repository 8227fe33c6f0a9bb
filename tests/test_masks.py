"""What carries the loss: exactly the assistants' words and their end token, in the template styles that models come with."""

import copy

import pytest
from helpers import add_begin, learned

from align.encode import Encoder, set_chat_template
from align.errors import AlignError
from align.schema import Message, PreferenceRow, PromptRow, SFTRow

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}

LLAMA3 = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nKnowledge cutoff: December 2023\n\n' }}
{%- if tools %}{% for t in tools %}{{ t | tojson }}{{ '\n\n' }}{% endfor %}{% endif %}{{ system + '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + (m.content | tojson) + '<|eot_id|>' }}
{%- elif m.tool_calls %}
{%- set f = m.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + f.name + '", "parameters": ' }}
{{- f.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

QWEN25 = """
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}{{ 'You are helpful.' }}{% endif %}
{{- '\n\n# Tools\n<tools>' }}{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}{{ '\n<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' }}
{{- c.function.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ raise_exception('Gemma knows no tools') }}{% endif %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + (first if loop.first else '') }}
{{- (m.content | trim) + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

MISTRAL = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' }}{% if system is defined and m == users[-1] %}{{ system + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + m.content + '}[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""

CHATML = """
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

IM = ["<|im_start|>", "<|im_end|>"]
JSON_CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
STYLES = {  # template (or the name of a shipped one), its special tokens, its end token, how it writes a call
    "llama3": (
        LLAMA3,
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
        '{"name": "weather", "parameters": {"city": "Oslo"}}',
    ),
    "qwen2.5": (QWEN25, IM, "<|im_end|>", f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
    "gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>", None),
    "mistral": (
        MISTRAL,
        ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
        "<|eos|>",
        f"[TOOL_CALLS] [{JSON_CALL}]",
    ),
    "chatml": (CHATML, IM, "<|im_end|>", None),
    "shipped chatml": ("chatml", IM, "<|im_end|>", f"<tool_call>\n{JSON_CALL}\n</tool_call>"),
    "shipped plain": ("plain", [], "<|eos|>", f"Call: {JSON_CALL}"),
}


def message(role, content="", **more):
    return Message(role=role, content=content, **more)


CHAT = [
    message("system", "Be brief."),
    message("user", "hello to you"),
    message("assistant", "one two"),
    message("user", "one two"),  # the assistant's own words, said by the user
    message("assistant", "Fine, thanks!"),
    message("user", "and now?"),
    message("assistant", "three\n\nfour"),
]
TOOL_CHAT = [
    message("system", "Be brief."),
    message("user", "hello"),
    message("assistant", "How are you?"),
    message("user", "Is it cold in Oslo?"),
    message("assistant", tool_calls=[CALL]),
    message("tool", '{"degrees": 7}', name="weather"),
    message("assistant", "Seven."),
    message("user", "thanks"),
    message("assistant", "Fine!"),
]


@pytest.fixture(params=STYLES)
def style(request, tokenizer):
    """An encoder, its end token and the text of a tool call."""
    template, special, end, call = STYLES[request.param]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if "{" in template:
        tokenizer.chat_template = template
    else:
        set_chat_template(tokenizer, template)
    return Encoder(tokenizer), end, call


def words_of(encoder, tree):
    """What is learned, without the line ends that some templates put around it."""
    return [run.strip() for run in learned(encoder, tree)]


def test_several_turns(style):
    encoder, end, _ = style
    (tree,) = encoder.sft([SFTRow(messages=CHAT)]).trees
    assert words_of(encoder, tree) == [f"one two{end}", f"Fine, thanks!{end}", f"three\n\nfour{end}"]
    assert encoder.tokenizer.decode(tree.prompt) == encoder.render(CHAT)


def test_tool_calls_are_the_assistants_words(style):
    encoder, end, call = style
    if call is None:
        pytest.skip("the template writes no calls")
    (tree,) = encoder.sft([SFTRow(messages=TOOL_CHAT, tools=TOOLS)]).trees
    assert words_of(encoder, tree) == [f"How are you?{end}", f"{call}{end}", f"Seven.{end}", f"Fine!{end}"]
    (last,) = encoder.sft([SFTRow(prompt=TOOL_CHAT[:4], completion=TOOL_CHAT[4:5], tools=TOOLS)]).trees
    assert words_of(encoder, last) == [f"{call}{end}"]


def test_what_a_tool_says_within_a_completion_is_not_learned(style):
    """Nor the header behind it, which the assistant is given."""
    encoder, end, call = style
    if call is None:
        pytest.skip("the template writes no calls")
    (tree,) = encoder.sft([SFTRow(prompt=TOOL_CHAT[:4], completion=TOOL_CHAT[4:7], tools=TOOLS)]).trees
    assert words_of(encoder, tree) == [f"{call}{end}", f"Seven.{end}"]


def test_a_conversation_that_the_assistant_opens(style):
    """Its header, which nobody asks it to write, carries no loss."""
    encoder, end, _ = style
    turns = [message("assistant", "hello"), message("user", "one"), message("assistant", "two")]
    result = encoder.sft([SFTRow(messages=turns)])
    if result.set_aside:  # Gemma's template refuses it, and says so
        assert list(result.set_aside) == ["the chat template refuses the row (Roles must alternate user/assistant)"]
        assert result.summary().startswith("1 rows = 0 used + 1 set aside")
        return
    assert words_of(encoder, result.trees[0]) == [f"hello{end}", f"two{end}"]


def test_empty_answers_teach_to_stop(style):
    encoder, end, _ = style
    turns = [message("user", "one"), message("assistant", ""), message("user", "two"), message("assistant", "")]
    (tree,) = encoder.sft([SFTRow(messages=turns)]).trees
    assert words_of(encoder, tree) == [end, end]


def test_training_and_chat_render_the_same_text(style):
    """What a model is asked with at inference is what it was trained behind, token for token; only its answers follow."""
    encoder, _, _ = style
    asked = CHAT[:-1]
    plain = [turn.model_dump(exclude_none=True) for turn in asked]
    chat = encoder.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    (prompt,) = encoder.prompts([PromptRow(prompt=asked)]).trees
    (shown,) = encoder.sft([SFTRow(prompt=asked, completion=CHAT[-1:])]).trees
    (pair,) = encoder.preference([PreferenceRow(prompt=asked, chosen=CHAT[-1:], rejected=[message("assistant", "no")])]).trees
    assert prompt.prompt == pair.prompt == chat
    assert shown.prompt == chat + pair.branches[0]
    assert shown.prompt_mask == [False] * len(chat) + [True] * len(pair.branches[0])


def test_a_begin_token_comes_once(style):
    """Though the tokenizer adds it, the template writes it, and the first message brings one along."""
    encoder, _, _ = style
    begin = encoder.tokenizer.bos_token
    rows = [SFTRow(messages=turns) for turns in (CHAT, CHAT[1:3])]
    before = encoder.sft(rows).trees
    add_begin(encoder.tokenizer)
    assert encoder.sft(rows).trees == before
    encoder.tokenizer.chat_template = "{{ bos_token }}" + encoder.tokenizer.chat_template
    for tree in encoder.sft(rows).trees:
        assert tree.prompt.count(encoder.tokenizer.bos_token_id) == 1
        assert len(tree.prompt) == len(tree.prompt_mask)
    (tree,) = encoder.sft([SFTRow(prompt=f"{begin}one", completion=" two")]).trees
    assert tree.prompt.count(encoder.tokenizer.bos_token_id) == 1


def test_the_masks_are_those_of_generation_tags(tokenizer):
    """Where a template marks the assistant's words itself, transformers' own mask is the same."""
    encoder = Encoder(copy.deepcopy(tokenizer))
    tokenizer = encoder.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": IM})
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    plain = [turn.model_dump(exclude_none=True) for turn in CHAT]
    theirs = tokenizer.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    (ours,) = encoder.sft([SFTRow(messages=CHAT)]).trees
    assert ours.prompt == theirs["input_ids"]
    assert ours.prompt_mask == [bool(counts) for counts in theirs["assistant_masks"]]


def test_reasoning_that_later_turns_leave_out(tokenizer):
    """A template in the style of Qwen3: earlier thoughts are dropped, so what carries the loss is what is left."""
    encoder = Encoder(copy.deepcopy(tokenizer))
    encoder.tokenizer.chat_template = (
        "{%- for m in messages %}{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
        "{{ m.role + ':' + text + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    thought = [message("user", "one"), message("assistant", "<think>a cat</think>two")]
    (tree,) = encoder.sft([SFTRow(messages=[*thought, message("user", "three"), message("assistant", "four")])]).trees
    assert words_of(encoder, tree) == ["two<|eos|>", "four<|eos|>"]


def test_an_end_token_that_a_base_model_has_but_does_not_name(tokenizer, tmp_path):
    """As Llama 3's base tokenizer has <|eot_id|>: special, but neither eos_token nor in a list."""
    from tokenizers import AddedToken

    encoder = Encoder(copy.deepcopy(tokenizer))
    encoder.tokenizer.add_tokens([AddedToken(token, special=True) for token in STYLES["llama3"][1]])
    encoder.tokenizer.chat_template = LLAMA3
    assert "<|eot_id|>" not in encoder.tokenizer.all_special_tokens
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.end_of_turn) == "<|eot_id|>"


def test_a_template_that_says_an_answer_twice_is_refused(tokenizer):
    encoder = Encoder(copy.deepcopy(tokenizer))
    encoder.tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content + m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(AlignError, match="turns cannot be told apart"):
        encoder.sft([SFTRow(messages=CHAT)])
