"""The web page behind ``align ui``: talk to a model, compare two blind and vote, read reports.

Gradio draws it. What models say is shown as plain text, never as markup.
"""

from __future__ import annotations

import html
import os
import random
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when it is imported

import gradio as gr

from align.chat.speaker import Decoding, Speaker, TaskSpeaker, speaker
from align.chat.votes import NO_VOTE, add_vote
from align.errors import AlignError, first_line
from align.progress import harmless
from align.schema import Message

KEPT = 2
"""Models held in memory."""
EMPTY = "(empty)"
"""What stands in the place of an answer without words."""
CSS = ".message-content .md { white-space: pre-wrap }"
"""Code in an answer keeps its indentation."""


class Speakers:
    """Loaded models, the least recently used one let go."""

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template
        self._loaded: OrderedDict[str, Speaker | TaskSpeaker] = OrderedDict()
        self._turn = Lock()  # each tab asks from a thread of its own

    def __getitem__(self, name: str) -> Speaker | TaskSpeaker:
        with self._turn:
            if name not in self._loaded:
                while len(self._loaded) >= KEPT:
                    self._loaded.popitem(last=False)
                self._loaded[name] = speaker(name, chat_template=self.chat_template)
            self._loaded.move_to_end(name)
            return self._loaded[name]


def build(
    names: list[str], *, votes: Path, runs: Path, decoding: Decoding, chat_template: str = "auto", seed: int = 0
) -> gr.Blocks:
    """The page.

    Args:
        names: models to choose from.
        votes: file that votes are appended to.
        runs: folder whose runs' reports can be read.
        seed: of which answer of a blind pair stands on the left.
    """
    speakers, draw = Speakers(chat_template), random.Random(seed)
    with gr.Blocks(title="align", analytics_enabled=False) as page:
        gr.Markdown("# align")
        settings = _settings(decoding)
        with gr.Tab("Talk"):
            _talk(names, speakers, settings)
        with gr.Tab("Compare blind"):
            _compare(names, speakers, settings, votes, draw)
        with gr.Tab("Reports"):
            _reports(page, runs)
    return page


def _settings(decoding: Decoding) -> list[Any]:
    """The controls that all tabs share: system prompt, temperature, top-p, top-k, most tokens."""
    with gr.Accordion("Settings", open=False):
        system = gr.Textbox("", label="System prompt", lines=1)
        with gr.Row():
            temperature = gr.Slider(0, 2, decoding.temperature, step=0.05, label="Temperature (0 is greedy)")
            top_p = gr.Slider(0.05, 1, decoding.top_p, step=0.05, label="Top-p")
            top_k = gr.Number(decoding.top_k, minimum=0, precision=0, label="Top-k (0 is all)")
            tokens = gr.Number(decoding.max_completion_length, minimum=1, precision=0, label="Most tokens in an answer")
    return [system, temperature, top_p, top_k, tokens]


def _decoding(temperature: float, top_p: float, top_k: float | None, tokens: float | None) -> Decoding:
    if top_k is None or tokens is None:  # an empty box
        raise _refusal("Top-k and the most tokens of the settings must be numbers.")
    return Decoding(int(tokens), temperature, top_p, int(top_k))


def _refusal(text: str) -> gr.Error:
    """What the page says of a question that is not answered. Gradio takes it for HTML."""
    return gr.Error(html.escape(text), print_exception=False)


def _failure(error: Exception) -> gr.Error:
    """What the page says of an answer that failed. Where that is nothing that who asks can mend, the terminal has the traceback."""
    if isinstance(error, AlignError):
        return _refusal(str(error))
    return gr.Error(html.escape(f"{type(error).__name__}: {first_line(error)}"))


def _messages(system: str, history: list[Message]) -> list[Message]:
    """What a model sees of a conversation."""
    return [Message(role="system", content=system.strip()), *history] if system.strip() else history


def _shown(history: list[Message]) -> list[dict[str, str]]:
    """A conversation as the page shows it. Gradio takes a turn for HTML, and would fetch the images in it, so it is escaped; it
    takes the indentation from lines, as from a docstring's, so it sees none.
    """
    texts = (html.escape(harmless(message.content) or EMPTY).replace("\n", "&#10;").replace("\t", "&#9;") for message in history)
    return [{"role": message.role, "content": text} for message, text in zip(history, texts, strict=True)]


def _chatbot(label: str, height: int) -> gr.Chatbot:
    return gr.Chatbot(label=label, height=height, render_markdown=False, feedback_options=None, buttons=[])


def _talk(names: list[str], speakers: Speakers, settings: list[Any]) -> None:
    model = gr.Dropdown(names, value=names[0], label="Model")
    shown, turns = _chatbot("Conversation", 340), gr.State([])
    said = gr.Textbox(label="You", placeholder="Ask something and press Enter", elem_id="talk-said")
    again = gr.Button("Begin anew", size="sm")

    def ask(name: str, text: str, history: list[Message], system: str, *decoding: float) -> Iterator[tuple[Any, ...]]:
        if not text.strip():
            raise _refusal("Ask something first.")
        how, asked = _decoding(*decoding), [*history, Message(role="user", content=text)]
        yield "", gr.skip(), _shown([*asked, Message(role="assistant", content="…")])
        answer = Message(role="assistant", content="")
        try:
            for piece in speakers[name].answer(_messages(system, asked), how):
                answer = Message(role="assistant", content=answer.content + piece)
                if answer.content:
                    yield "", gr.skip(), _shown([*asked, answer])
        except Exception as error:  # the question is taken back: the next one would fail with it
            yield text, gr.skip(), _shown(history)
            raise _failure(error) from error
        history = [*asked, Message(role="assistant", content=answer.content.strip())]
        yield "", history, _shown(history)

    one = "talk"  # one at a time: what is cleared stays empty, as the answer that was cut has ended before
    asking = said.submit(
        ask,
        [model, said, turns, *settings],
        [said, turns, shown],
        api_name="talk",
        concurrency_id=one,
        show_progress_on=again,  # elsewhere "Error" would stand over what is to be read, here as below
    )
    for event in (again.click, shown.clear, model.change):
        event(lambda: ([], []), None, [turns, shown], api_visibility="private", concurrency_id=one, cancels=asking)


def _compare(names: list[str], speakers: Speakers, settings: list[Any], votes: Path, draw: random.Random) -> None:
    with gr.Row():
        models = [gr.Dropdown(names, value=names[min(i, len(names) - 1)], label=f"Model {i + 1}") for i in range(2)]
    shown, turns = _chatbot("Conversation so far", 180), gr.State([])
    said = gr.Textbox(label="You", placeholder="Ask both and press Enter", elem_id="compare-said")
    again = gr.Button("Begin anew", size="sm")
    with gr.Row():
        sides = [
            gr.Textbox(label=label, lines=4, max_lines=12, interactive=False, elem_id=label.lower()) for label in ("Left", "Right")
        ]
    with gr.Row():
        choices = {"left": "Left is better", "right": "Right is better", "neither": "Neither"}
        buttons = [gr.Button(label, interactive=False, elem_id=f"vote-{side}") for side, label in choices.items()]
    purpose = f"Votes go to `{votes}` as preference rows."
    verdict = gr.Markdown(purpose, elem_id="verdict")
    answered = gr.State(([], []))  # what the models saw, and the (name, answer) of left and right
    off = [gr.update(interactive=False)] * len(choices)  # a gr.Button made here would stand on the page

    def ask(one: str, two: str, text: str, history: list[Message], system: str, *decoding: float) -> Iterator[tuple[Any, ...]]:
        if not text.strip():
            raise _refusal("Ask something first.")
        if one == two:
            raise _refusal("Choose two different models.")
        if history and history[-1].role == "user":  # the last question had no vote
            history = history[:-1]
        history = [*history, Message(role="user", content=text)]
        order = [one, two]
        draw.shuffle(order)
        prompt, how = _messages(system, history), _decoding(*decoding)
        answers: list[tuple[str, str]] = []
        yield *[gr.skip()] * 3, "", "", *off, "Both are answering …", ([], [])
        try:
            for name in order:
                pieces = []
                for piece in speakers[name].answer(prompt, how):
                    pieces.append(piece)
                    yield waiting  # a comparison that is cleared ends here
                answers.append((name, "".join(pieces).strip()))
        except Exception as error:
            yield *[gr.skip()] * 3, "", "", *off, purpose, ([], [])
            raise _failure(error) from error
        same = answers[0][1] == answers[1][1]
        ready = [gr.Button(interactive=side == "neither" or not same) for side in choices]
        question = "Both say the same." if same else "Which is better?"
        texts = [harmless(answer) or EMPTY for _, answer in answers]
        if any(isinstance(speakers[name], TaskSpeaker) for name in order):
            yield "", history, _shown(history), *texts, *off, f"{NO_VOTE} {_unveiled(answers)}", ([], [])
            return
        yield "", history, _shown(history), *texts, *ready, question, (prompt, answers)

    def vote(side: str) -> Any:
        def record(seen: tuple[list[Message], list[tuple[str, str]]], history: list[Message]) -> tuple[Any, ...]:
            prompt, answers = seen
            if not answers:
                raise _refusal("Ask something first.")
            text = _unveiled(answers)
            kept = ["left", "right"].index(side) if side != "neither" else 0
            if side != "neither" and answers[0][1] != answers[1][1]:
                try:
                    add_vote(votes, prompt, answers[kept], answers[1 - kept])
                except AlignError as error:
                    raise _failure(error) from error
                text += f" Saved to `{votes}`."
            history = [*history, Message(role="assistant", content=answers[kept][1])]
            return *off, text, history, _shown(history), ([], [])  # one vote an answer

        return record

    outputs = [said, turns, shown, *sides, *buttons, verdict, answered]
    waiting = tuple(gr.skip() for _ in outputs)
    asking = said.submit(ask, [*models, said, turns, *settings], outputs, api_name="ask", show_progress_on=again)
    for side, button in zip(choices, buttons, strict=True):
        voted = [*buttons, verdict, turns, shown, answered]
        button.click(vote(side), [answered, turns], voted, api_name=side, show_progress_on=again)
    anew = [turns, shown, *sides, *buttons, verdict, answered]
    for event in (again.click, shown.clear, *(model.change for model in models)):  # what was answered is no longer voted on
        event(lambda: ([], [], "", "", *off, purpose, ([], [])), None, anew, api_visibility="private", cancels=asking)


def _unveiled(answers: list[tuple[str, str]]) -> str:
    return f"Left was **{_plain(answers[0][0])}**, right was **{_plain(answers[1][0])}**."


def _plain(name: str) -> str:
    return html.escape(name).replace("*", "\\*")


def _reports(page: gr.Blocks, runs: Path) -> None:
    def found() -> list[str]:
        return sorted(report.parent.name for report in runs.glob("*/report.html"))

    def show(name: str | None) -> str:
        if name not in found():
            return "<p>No report yet: a finished pipeline writes one.</p>"
        text = (runs / str(name) / "report.html").read_text(encoding="utf-8")
        # In a frame of its own, without access to this page.
        return f'<iframe sandbox="allow-scripts" style="width:100%;height:80vh;border:0" srcdoc="{html.escape(text)}"></iframe>'

    def look() -> tuple[Any, str]:
        names = found()
        first = names[0] if names else None
        return gr.update(choices=names, value=first), show(first)

    run, frame = gr.Dropdown([], label="Run"), gr.HTML()
    run.input(show, run, frame)
    page.load(look, None, [run, frame], api_visibility="private")  # runs may have finished since the page was built


def launch(page: gr.Blocks, host: str, port: int | None = None) -> str:
    """Serve `page` from a thread of its own; returns its address. Without a `port` it takes a free one. Nothing is shared, and
    fonts are this machine's.
    """
    for name in ("no_proxy", "NO_PROXY"):  # gradio asks its own page whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", "127.0.0.1", host)))
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        theme=theme,
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
    )
    return str(page.local_url)
