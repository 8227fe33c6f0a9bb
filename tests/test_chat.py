"""Talking to models: what is answered, what a vote leaves behind, and the server that speaks OpenAI's protocol."""

import errno
import json
import os
import pty
import resource
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path

import httpx
import pytest
import torch
from helpers import llama
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from align.chat.speaker import Decoding, Speaker, context_of
from align.chat.terminal import Talk, talk_at_terminal
from align.chat.votes import add_vote
from align.cli import main
from align.data import load_rows
from align.errors import AlignError
from align.models import save_model
from align.schema import Message
from align.tuning.strategies import Tuning
from align.tuning.tune import tune

ROOT = Path(__file__).parent.parent
GREEDY = Decoding(max_completion_length=8, temperature=0.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Two models, a LoRA adapter on the first, the first without an end to its context, and one that looks up no place beyond its
    64.
    """
    root = tmp_path_factory.mktemp("chat")
    for seed, name in enumerate(("one", "two")):
        save_model(llama(seed), tokenizer, root / name)
    save_model(llama(0, max_position_embeddings=2**30), tokenizer, root / "endless")
    learned = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=8, n_layer=1, n_head=1)
    save_model(GPT2LMHeadModel(learned), tokenizer, root / "learned@64")
    base = llama(0)
    base.name_or_path, base.rows_on_disk = str(root / "one"), base.get_input_embeddings().weight.shape[0]
    adapter = tune(base, Tuning("lora", {"r": 4}))
    torch.manual_seed(5)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_model(adapter, tokenizer, root / "adapter")
    return root


def expected(folder, messages, tokens=8):
    """The greedy answer, by forward passes alone."""
    speaker = Speaker(str(folder))
    ids = speaker.encoder.prompt_ids(messages)
    for _ in range(tokens):
        ids = [*ids, int(speaker.model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in speaker.stops:
            break
    return speaker.tokenizer.decode(ids[len(speaker.encoder.prompt_ids(messages)) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["one", "adapter"])
def test_the_answer_is_the_models_greedy_one(folders, name):
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="How are you?")]
    pieces = list(Speaker(str(folders / name)).answer(messages, GREEDY))
    assert "".join(pieces).strip() == expected(folders / name, messages)


def test_at_next_to_no_temperature_the_answer_is_greedy(folders):
    asked = [Message(role="user", content="Hi")]
    cold = Decoding(max_completion_length=8, temperature=1e-320)
    speaker = Speaker(str(folders / "one"))
    assert [*speaker.answer(asked, cold)] == [*speaker.answer(asked, GREEDY)]


def test_an_adapter_answers_otherwise_than_its_base(folders):
    asked = [Message(role="user", content="How are you?")]
    assert expected(folders / "one", asked) != expected(folders / "adapter", asked)


def test_a_failure_while_answering_is_not_swallowed(folders):
    speaker = Speaker(str(folders / "one"))

    def broken(*args, **kwargs):
        raise ValueError("out of ideas")

    speaker.model.forward = broken
    with pytest.raises(ValueError, match="out of ideas"):
        list(speaker.answer([Message(role="user", content="Hi")], GREEDY))


def test_who_stops_listening_stops_the_model(folders):
    speaker = Speaker(str(folders / "one"))
    speaker.stops = [speaker.tokenizer.pad_token_id]
    passes: list[int] = []
    speaker.model.register_forward_hook(lambda *_: passes.append(1))
    pieces = speaker.answer([Message(role="user", content="Hi")], Decoding(max_completion_length=10_000, temperature=0.0))
    before = set(threading.enumerate())  # a server of another test may still be ending
    next(pieces)
    (thread,) = set(threading.enumerate()) - before
    pieces.close()
    assert not thread.is_alive()
    assert len(passes) < context_of(speaker.model) / 2  # nor did it end by itself


def test_an_answer_ends_with_the_context_and_a_longer_question_is_refused(folders, tokenizer):
    speaker = Speaker(str(folders / "learned@64"))
    speaker.stops = [tokenizer.pad_token_id]
    assert "".join(speaker.answer([Message(role="user", content="Hi")], Decoding(200, temperature=0.0)))
    talk = Talk([speaker], GREEDY)
    with pytest.raises(AlignError, match="reads 64 tokens, and the conversation has"):
        talk.ask("one two " * 64, lambda text: None)


# -- a conversation ------------------------------------------------------------------------------------------------------------


class Parrot:
    """Says its name and how much it has heard."""

    def __init__(self, name):
        self.name = name

    def answer(self, messages, decoding):
        yield from (self.name, " ", str(len(messages)))


def test_history_goes_on_from_the_better_answer(tmp_path):
    votes = tmp_path / "votes.jsonl"
    talk = Talk([Parrot("x"), Parrot("y")], GREEDY, system="Be brief.", votes=votes)
    choices = iter(["b", "", "a"])
    for question in ("1", "2", "3"):
        talk.ask(question, lambda text: None, lambda: next(choices))
    said = [(message.role, message.content) for message in talk.messages]
    assert said == [
        ("system", "Be brief."),
        *(("user", "1"), ("assistant", "y 2")),
        *(("user", "2"), ("assistant", "x 4")),
        *(("user", "3"), ("assistant", "x 6")),
    ]
    rows = load_rows(votes, "preference").rows  # in the project's own schema
    assert [(row.chosen[0].content, row.rejected[0].content) for row in rows] == [("y 2", "x 2"), ("x 6", "y 6")]
    assert [message.content for message in rows[1].prompt] == ["Be brief.", "1", "y 2", "2", "x 4", "3"]
    assert json.loads(votes.read_text().splitlines()[0])["chosen_model"] == "y"


def test_an_answer_does_not_steer_the_terminal():
    """Tokens of bytes spell any control character; the conversation keeps what was said."""
    said, written = "\x1b[2J\x9bgone\r\n\t\u202eكلا \u2067👩‍🔬", []
    assert Talk([Parrot(said)], GREEDY).ask("?", written.append) == [f"{said} 1"]
    assert "".join(written) == "\\x1b[2J\\x9bgone\\r\n\t\\u202eكلا \\u2067👩‍🔬 1\n"


def test_undo_takes_back_a_turn_and_never_the_system_prompt():
    talk = Talk([Parrot("x")], GREEDY, system="Be brief.")
    talk.ask("1", lambda text: None)
    talk.ask("2", lambda text: None)
    talk.undo()
    assert [message.content for message in talk.messages] == ["Be brief.", "1", "x 2"]
    talk.undo()
    talk.undo()
    assert [message.content for message in talk.messages] == ["Be brief."]


def test_what_is_no_vote_is_asked_again_and_quit_ends(tmp_path, monkeypatch, capsys):
    lines = iter(["1", "bb", "B", "2", "/QUIT", "3"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk_at_terminal(Talk([Parrot("x"), Parrot("y")], GREEDY, votes=tmp_path / "v.jsonl"))
    assert next(lines) == "3", "nothing was asked after /quit"
    assert capsys.readouterr().out.count("bb is no vote") == 1
    (row,) = load_rows(tmp_path / "v.jsonl", "preference").rows
    assert (row.prompt[-1].content, row.chosen[0].content) == ("1", "y 1")


def test_the_same_answer_twice_is_not_voted_on(tmp_path):
    talk = Talk([Parrot("x"), Parrot("x")], GREEDY, votes=tmp_path / "v.jsonl")
    talk.ask("1", lambda text: None, lambda: pytest.fail("a vote was asked for"))
    assert [message.content for message in talk.messages] == ["1", "x 1"]
    assert not talk.votes.exists()


def test_a_vote_begins_a_line_of_its_own(tmp_path):
    """The last line was written by hand, without its end."""
    file = tmp_path / "v.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    for number in ("1", "2"):
        add_vote(file, [Message(role="user", content=number)], ("m", "yes"), ("n", "no"))
    assert [row.prompt if isinstance(row.prompt, str) else row.prompt[0].content for row in load_rows(file, "preference").rows] == [
        *("a", "1", "2")
    ]


def test_votes_hold_any_text(tmp_path):
    answer = 'line\nbreak "quote" \u2028 <script>'
    add_vote(tmp_path / "v.jsonl", [Message(role="user", content="a\tb")], ("m", answer), ("n", "no"))
    (row,) = load_rows(tmp_path / "v.jsonl", "preference").rows
    assert (row.prompt[0].content, row.chosen[0].content) == ("a\tb", answer)


def test_a_vote_that_finds_no_room_leaves_no_half_row(tmp_path):
    """The largest size that this process may give a file is reached within the row: as on a full disk, a part is written."""
    file, asked = tmp_path / "v.jsonl", [Message(role="user", content="?")]
    add_vote(file, asked, ("m", "yes"), ("n", "no"))
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
    try:
        with pytest.raises(AlignError, match=r"the disk of .*v\.jsonl is full"):
            add_vote(file, asked, ("m", "yes"), ("n", "no"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before


def test_a_vote_on_a_full_disk_does_not_end_the_conversation(tmp_path, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    lines = iter(["1", "a", "2", "a", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("os.fsync", full)
    talk_at_terminal(Talk([Parrot("x"), Parrot("y")], GREEDY, votes=tmp_path / "v.jsonl"))
    assert capsys.readouterr().err.count("v.jsonl is full") == 2
    assert (tmp_path / "v.jsonl").read_bytes() == b""


def test_votes_train_dpo(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        add_vote(Path("v.jsonl"), [Message(role="user", content=f"Say {number}.")], ("a", "one two"), ("b", "cat sat"))
    flags = ["--learning_rate", "1e-3", "--beta", "0.1", "--held_out", "0", "--max_steps", "1", "--output_dir", "out"]
    assert main(["dpo", "--model", str(folders / "one"), "--data", "v.jsonl", *flags]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


# -- the command line ----------------------------------------------------------------------------------------------------------


def test_one_prompt_as_json(folders, capsys):
    flags = ["--prompt", "How are you?", "--temperature", "0", "--max_completion_length", "8", "--json"]
    assert main(["chat", str(folders / "one"), str(folders / "two"), *flags]) == 0
    said = json.loads(capsys.readouterr().out)
    asked = [Message(role="user", content="How are you?")]
    assert [row["answer"] for row in said["answers"]] == [expected(folders / name, asked) for name in ("one", "two")]


def test_a_conversation_from_a_pipe(folders, tmp_path, monkeypatch, capsys):
    lines = iter(["Hello", "b", "/UNDO", "/nonsense", "Hello", "a", "/Quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = ["--temperature", "0", "--max_completion_length", "8", "--votes", str(tmp_path / "v.jsonl")]
    assert main(["chat", str(folders / "one"), str(folders / "two"), *flags]) == 0
    out = capsys.readouterr().out
    assert "/nonsense is no command" in out
    first, second = load_rows(tmp_path / "v.jsonl", "preference").rows
    assert (first.prompt, first.chosen, first.rejected) == (second.prompt, second.rejected, second.chosen)


@pytest.mark.parametrize("ends", ["Hello\n", "Hello\na\nagain\n"])
def test_a_pipe_may_end_before_the_vote_and_hold_any_bytes(folders, tmp_path, ends):
    command = [sys.executable, "-m", "align.cli", "chat", str(folders / "one"), str(folders / "two"), "--temperature", "0"]
    command += ["--max_completion_length", "4", "--votes", str(tmp_path / "v.jsonl")]
    done = subprocess.run(command, cwd=ROOT, input=b"\xff\xfe " + ends.encode(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"[b]") == ends.count("H") + ends.count("again")


PASTED = """
import sys
from align.chat.speaker import Decoding
from align.chat.terminal import Talk, talk_at_terminal

class Echo:
    name = "echo"

    def answer(self, messages, decoding):
        yield f"heard {messages[-1].content!r} "

talk_at_terminal(Talk([Echo()], Decoding()))
"""


def test_what_is_pasted_is_one_question():
    pytest.importorskip("readline")
    child, terminal = pty.fork()
    if not child:
        os.execve(sys.executable, [sys.executable, "-c", PASTED], {**os.environ, "TERM": "xterm", "PYTHONPATH": str(ROOT)})
    said = b""

    def until(text):
        nonlocal said
        while text not in said:
            said += os.read(terminal, 65536)

    try:
        until(b"> ")
        assert b"\x1b[?2004h" in said, "the terminal was not asked to mark what is pasted"
        os.write(terminal, b"\x1b[200~one\n  two\n\nthree\x1b[201~\n")
        until(b"three'")
        os.write(terminal, b"/quit\n")
        assert b"heard 'one\\n  two\\n\\nthree'" in said
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def test_a_question_that_cannot_be_answered_is_taken_back(monkeypatch, capsys):
    class Refuses(Parrot):
        def answer(self, messages, decoding):
            if messages[-1].content == "long":
                raise AlignError("too long")
            yield from super().answer(messages, decoding)

    lines = iter(["1", "long", "2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk = Talk([Refuses("x")], GREEDY)
    talk_at_terminal(talk)
    assert [message.content for message in talk.messages] == ["1", "x 1", "2", "x 3"]
    assert "too long" in capsys.readouterr().err


def test_an_answer_without_memory_is_told_and_the_conversation_goes_on(monkeypatch, capsys):
    class Full(Parrot):
        def answer(self, messages, decoding):
            if messages[-1].content != "2":
                raise RuntimeError("out of memory\nand more" if messages[-1].content == "1" else "out of ideas")
            yield from super().answer(messages, decoding)

    lines = iter(["1", "2", "3"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    talk = Talk([Full("x")], GREEDY)
    with pytest.raises(RuntimeError, match="out of ideas"):
        talk_at_terminal(talk)
    assert [message.content for message in talk.messages] == ["2", "x 1", "3"]
    assert capsys.readouterr().err == "out of memory\n"


def test_a_command_without_memory_is_told_in_a_line(folders, monkeypatch, capsys):
    """It was a traceback."""
    monkeypatch.setattr(Speaker, "answer", lambda *_: torch.empty(1 << 55))
    assert main(["chat", str(folders / "one"), "--prompt", "Hello"]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("align: error: out of memory; take a smaller model")
    assert "can't allocate memory" in told


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_cuts_an_answer_at_a_terminal_and_ends_what_reads_a_pipe(terminal, monkeypatch, capsys):
    class Cut(Parrot):
        def answer(self, messages, decoding):
            yield " What I"
            if messages[-1].content == "long":
                raise KeyboardInterrupt
            yield " mean"

    class Keyboard:
        def isatty(self):
            return terminal

    lines = iter(["1", "long", "2", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin", Keyboard())
    talk = Talk([Cut("x")], GREEDY)
    if terminal:
        talk_at_terminal(talk)
        assert [message.content for message in talk.messages] == ["1", "What I mean", "2", "What I mean"]
        assert capsys.readouterr().out.endswith("What I mean\nWhat I\nWhat I mean\n"), "no answer begins with a space"
    else:
        with pytest.raises(KeyboardInterrupt):
            talk_at_terminal(talk)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["chat", "nowhere"], "no model 'nowhere'"),
        (["chat", "a", "--temperature", "nan"], "0 is greedy"),
        (["chat", "a", "--seed", "-1"], "--seed -1"),
        (["chat", "a", "--prompt", "\udcff"], "--prompt holds bytes that are no UTF-8"),
        (["chat", "a", "b", "--votes", "/"], "/ is a folder: name a file in it"),
        (["chat", "a", "b", "c"], "compares two models, not 3"),
        (["chat", "a", "--json"], "--json needs --prompt"),
        (["chat", "a", "--temperature", "-1"], "0 is greedy"),
        (["chat", "a", "--top_p", "0"], "a probability above 0"),
        (["chat", "a", "--max_completion_length", "0"], "--max_completion_length at least 1"),
        (["chat", "a", "--top_k", "-1"], "--top_k is at least 0"),
        (["serve", "nowhere"], "no model 'nowhere'"),
        (["ui", "--max_completion_length", "0"], "--max_completion_length 0"),
        (["serve", "one", "--rollouts"], "are for --engine vllm"),
    ],
)
def test_mistakes_are_one_line(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_conversation_needs_a_stdin(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # as after `<&-`
    assert main(["chat", "a"]) == 2
    assert capsys.readouterr().err == "align: error: there is no stdin to read questions from: --prompt TEXT asks one\n"


# -- serving -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["serve", "ui"])
def test_an_address_where_nothing_can_listen_is_refused_before_a_model_is_loaded(verb, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        addresses = (
            ("127.0.0.1", port, "Address already in use"),
            ("127.0.0.1", 99_999, "0-65535"),
            ("no.such.host.invalid", port, ""),
        )
        for host, number, why in addresses:
            assert main([verb, "one", "--host", host, "--port", str(number)]) == 2
            error = capsys.readouterr().err
            assert f"nothing can listen at {host}:{number} (" in error
            assert why in error
            assert error.count("\n") == 1


@contextmanager
def served(model):
    """`align serve` in a process of its own; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "align.cli", "serve", str(model), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "Uvicorn running" in line:
                break
        else:
            pytest.fail(f"the server ended: {process.wait()}")
        assert "Warning" not in "".join(said), "of an adapter, peft asks by an old name"
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.mark.parametrize("name", ["one", "adapter"])
def test_the_served_answer_is_the_local_greedy_one_or_drawn_as_asked(folders, name, tmp_path, monkeypatch):
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    asked = [{"role": "user", "content": "How are you?"}]
    with served(folders / name) as address:
        assert list(tmp_path.glob("align-serve-*"))
        client = openai.OpenAI(base_url=address, api_key="none")
        stream = client.chat.completions.create(model=str(name), messages=asked, max_tokens=8, temperature=0, stream=True)
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        asks = {"model": name, "messages": asked, "max_tokens": 8}
        draws = [client.chat.completions.create(**asks, temperature=1.0, seed=seed) for seed in (1, 1, 2, 3)]
        again, first, *others = [draw.choices[0].message.content for draw in draws]
        listed = [model.id for model in client.models.list()]
        assert client.models.retrieve(name).id == name
        with pytest.raises(openai.NotFoundError, match="there is no model 'a/b' here, only"):
            client.models.retrieve("a/b")
    assert not list(tmp_path.glob("align-serve-*")), "the copy that was served is gone with the server"
    assert listed == [name]
    assert {answer.model for answer in (*chunks, *draws)} == {name}
    assert again == first, "one seed, one answer"
    assert {first, *others} != {text}, "a temperature is one, though the model's own settings are silent"
    assert text.strip() == expected(folders / name, [Message(**asked[0])])


ASKED = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
REFUSED = {
    "no JSON": (b"{", 400, "EOF while parsing"),
    "no object": (b"[1]", 400, "Input should be an object"),
    "nothing asked": ({}, 400, "messages: Field required"),
    "no message": ({**ASKED, "messages": []}, 400, "messages: List should have at least 1 item"),
    "no role": ({"messages": [{"content": "Hi"}]}, 400, "messages.0.role: Field required"),
    "a role that is none": ({"messages": [{"role": "User", "content": "Hi"}]}, 400, "messages.0.role: Input should be 'system', "),
    "a text for a list": ({"messages": "Hi"}, 400, "messages: Input should be a valid array"),
    "no tokens": ({**ASKED, "max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 1"),
    "words for a number": ({**ASKED, "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
    "next to no temperature": ({**ASKED, "temperature": 1e-320}, 400, "temperature: 0 is greedy, and the least above it is 1e-06"),
    "to stop at nothing": ({**ASKED, "stop": ""}, 400, "stop: a text of at least one character"),
    "to stop at no number": ({**ASKED, "stop": [5], "stream": True}, 400, "Input should be a valid string"),
    "several answers": ({**ASKED, "n": 1000}, 400, "n: Input should be 1"),
    "a penalty on tokens' counts": ({**ASKED, "frequency_penalty": 0.5}, 400, "frequency_penalty: nothing here does what it asks"),
    "a bias for no number": ({**ASKED, "logit_bias": {"x": 1}}, 400, "logit_bias: 'x' is no token's number, which are 0 to 319"),
    "a bias for no token": ({**ASKED, "logit_bias": {"320": 1}}, 400, "logit_bias: '320' is no token's number"),
    "a bias out of bounds": ({**ASKED, "logit_bias": {"5": 101}}, 400, "logit_bias.5: Input should be less than or equal to 100"),
    "log-probs": ({**ASKED, "logprobs": True}, 400, "logprobs: nothing here does what it asks for; leave it out"),
    "settings of theirs": (
        {**ASKED, "generation_config": '{"num_beams": 2}', "stream": True},
        400,
        "generation_config: nothing here",
    ),
    "JSON": ({**ASKED, "response_format": {"type": "json_object"}}, 400, "response_format: nothing here does what it asks for"),
    "half a pair": (json.dumps({"messages": [{"role": "user", "content": "\ud800"}]}).encode(), 400, "hex escape"),
    "a part without a type": ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}, 400, "KeyError"),
    "a picture": (
        {"messages": [{"role": "user", "content": [PICTURE]}]},
        400,
        "reads text alone, and here is a part of type 'image_url'",
    ),
    "more than it reads": ({"messages": [{"role": "user", "content": "cat " * 5000}]}, 400, "the model reads 512 tokens, and"),
    "too much": ({"messages": [{"role": "user", "content": "cat " * 2**20}]}, 413, "at most 4194304 bytes"),
}


def test_a_wrong_request_is_refused_in_one_line(folders):
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    with served(folders / "one") as address:

        def post(content, path="/chat/completions", **headers):
            content = content if isinstance(content, bytes) else json.dumps({"model": "one", **content}).encode()
            headers = {"content-type": "application/json", **headers}
            return httpx.post(f"{address}{path}", content=content, headers=headers, timeout=60)

        for name, (content, status, said) in REFUSED.items():
            answer = post(content)
            assert (answer.status_code, said in answer.json()["error"]["message"]) == (status, True), (name, answer.text)
        assert post(ASKED).status_code == 200
        assert post({**ASKED, "response_format": {"type": "text"}, "logprobs": False, "frequency_penalty": 0}).status_code == 200
        five = post({**ASKED, "logit_bias": {"5": 100}}).json()["choices"][0]["message"]["content"]
        assert five == AutoTokenizer.from_pretrained(folders / "one").decode([5, 5]), "OpenAI's clients write whole numbers"
        assert post({**ASKED, "logit_bias": {}}, **{"content-type": "application/json; charset=utf-8"}).status_code == 200
        plain = post(ASKED, **{"content-type": "text/plain"})
        assert (plain.status_code, plain.json()["error"]["message"]) == (
            415,
            "the content type is 'text/plain': send it as application/json",
        )
        assert "logit_bias: nothing here" in post({"prompt": "Hi", "logit_bias": {"5": 1}}, "/completions").text
        assert post(ASKED, Host="evil.example:80").status_code == 400
        assert httpx.post(f"{address.removesuffix('/v1')}/load_model", json={"model": "owner/other"}).status_code == 404
        sound = httpx.post(f"{address}/audio/transcriptions", data={"model": str(folders / "two")}, files={"file": b"RIFF"})
        assert sound.status_code == 404, "it would load the other model"
        assert post({"prompt": 3}, "/completions").json()["error"]["message"].startswith("prompt: Input should be a valid string")
        assert post({"prompt": "Hi", "max_tokens": 2}, "/completions").status_code == 200
        asked = {"prompt": "Hi", "max_tokens": 2, "logprobs": 0}
        assert "logprobs: nothing here" in post(asked, "/completions").text, "0 asks for those of the answer"
        assert "previous_response_id" in post({"input": "And?", "previous_response_id": "resp_1"}, "/responses").text
        assert "reads text alone" in post({"input": [{"role": "user", "content": [PICTURE]}]}, "/responses").text
        assert post({"input": "Hi", "max_output_tokens": 2}, "/responses").json()["status"] == "completed", (
            "no stream, unless asked"
        )
        other = post({**ASKED, "model": "other"})
        assert (other.status_code, other.json()["error"]["message"]) == (400, "Server is pinned to 'one'; requested 'other'.")


def test_a_stream_ends_as_openais_do(folders):
    """`[DONE]` comes last, and before it the usage, in a chunk without choices, where it was asked for."""
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    asks = {"max_tokens": 2, "temperature": 0, "stream": True}
    with served(folders / "one") as address:
        for path, asked in {"chat/completions": ASKED, "completions": {"prompt": "Hi"}}.items():
            for options in (None, {"include_usage": False}, {"include_usage": True}):
                content = {**asked, **asks, "stream_options": options}
                events = httpx.post(f"{address}/{path}", json=content, timeout=60).text.split("\n\n")
                *chunks, done, nothing = [event.removeprefix("data: ") for event in events]
                assert (done, nothing) == ("[DONE]", "")
                last, counts = map(json.loads, chunks[-2:])
                counted = options == {"include_usage": True}
                assert [len(chunk["choices"]) for chunk in (last, counts)] == [1, not counted]
                assert (last if counted else counts)["choices"][0]["finish_reason"] == "length"
                assert "usage" not in last
                assert counts.get("usage", {}).get("completion_tokens") == (2 if counted else None)


def test_a_served_answer_ends_with_the_context(folders):
    """Without `max_tokens` theirs writes 1,024, and this model reads 64."""
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    with served(folders / "learned@64") as address:
        told = httpx.post(
            f"{address}/chat/completions", json={"messages": ASKED["messages"], "logit_bias": {"2": -100}}, timeout=60
        )
        assert (told.json()["usage"]["total_tokens"], told.json()["choices"][0]["finish_reason"]) == (64, "length")
        assert told.json()["model"] == "learned-64", "what follows an @ theirs takes for a revision"
        streamed = {"prompt": "Hi", "stream": True, "temperature": 0}
        assert httpx.post(f"{address}/completions", json=streamed, timeout=60).text.endswith("data: [DONE]\n\n")
        for prompt, said in (("cat " * 70, "the model reads 64 tokens, and the request has 71"), ("", "the request has no token")):
            for stream in (True, False):
                answer = httpx.post(f"{address}/completions", json={"prompt": prompt, "stream": stream}, timeout=60)
                assert (answer.status_code, said in answer.json()["error"]["message"]) == (400, True), answer.text


def test_no_answer_goes_on_for_nobody(folders):
    """Who leaves does not keep the next one waiting, and the server ends though it is in the middle of an answer."""
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    endless = {**ASKED, "model": "endless", "max_tokens": 10**6, "logit_bias": {"2": -100.0}}
    with ExitStack() as after, served(folders / "endless") as address:
        client = after.enter_context(httpx.Client(base_url=address, timeout=60))
        with pytest.raises(httpx.ReadTimeout):
            client.post("/chat/completions", json=endless, timeout=1)
        assert client.post("/chat/completions", json=ASKED).status_code == 200
        stream = after.enter_context(client.stream("POST", "/chat/completions", json={**endless, "stream": True}))
        assert next(stream.iter_lines()).startswith("data: ")


def test_a_base_model_that_is_served_takes_no_conversation_and_says_what_to_do(folders, tokenizer):
    from align.chat.server import REQUESTS, Guard

    base = deepcopy(tokenizer)
    base.chat_template = None
    for path, asked in {"chat/completions": ASKED, "responses": {"input": "Hi"}, "completions": {"prompt": "Hi"}}.items():
        wrong = Guard(None, base).wrong(REQUESTS[f"/v1/{path}"], json.dumps(asked).encode())
        assert (wrong is None) == (path == "completions")
        assert wrong is None or "no chat template, as base models have none: ask /v1/completions" in wrong


def test_a_model_that_is_not_there_is_not_served(capsys):
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    assert main(["serve", "owner/nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("align: error: cannot load a config from 'owner/nothing': no folder of that name")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForSequenceClassification", "BertForMaskedLM", "BertForTokenClassification", "T5ForConditionalGeneration"],
)
def test_a_model_that_is_not_causal_is_not_served(capsys, tmp_path, architecture):
    """The server would begin, and fail at each request; of T5 it would say nothing."""
    pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    kind = next(kind for kind in ("llama", "bert", "t5") if architecture.lower().startswith(kind))
    AutoConfig.for_model(kind, architectures=[architecture]).save_pretrained(tmp_path)
    assert main(["serve", str(tmp_path)]) == 2
    assert f"{tmp_path} is no causal language model, which the server takes; `align chat` asks" in capsys.readouterr().err


def test_vllm_that_is_not_there_is_one_line(folders, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("ALIGN_VLLM", raising=False)
    assert main(["serve", str(folders / "one"), "--engine", "vllm"]) == 2
    assert "there is no vLLM" in capsys.readouterr().err
    monkeypatch.setenv("ALIGN_VLLM", str(folders / "python"))
    assert main(["serve", str(folders / "one"), "--engine", "vllm"]) == 2
    assert "is no interpreter of an environment with vLLM" in capsys.readouterr().err


def test_vllm_is_not_started_for_a_model_that_is_nowhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "vllm.py").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("ALIGN_VLLM", sys.executable)
    for nowhere in ("owner/nothing", str(tmp_path / "empty")):
        assert main(["serve", nowhere, "--engine", "vllm"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"align: error: cannot load a config from '{nowhere}'")
        assert error.count("\n") == 1
