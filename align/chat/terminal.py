"""A conversation at the terminal, with one model or with two side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path

from align.budget import out_of_memory
from align.chat.speaker import Decoding, Speaker, TaskSpeaker
from align.chat.votes import NO_VOTE, add_vote
from align.errors import AlignError, first_line
from align.progress import harmless, say
from align.schema import Message

HELP = "/reset begins anew, /undo takes back the last turn, /system TEXT sets a system prompt, Ctrl-C cuts an answer, /quit ends"


class Talk:
    """What has been said so far. With two speakers both answer, and the conversation goes on from the better answer."""

    def __init__(
        self, speakers: Sequence[Speaker | TaskSpeaker], decoding: Decoding, *, system: str | None = None, votes: Path | None = None
    ):
        self.speakers, self.decoding, self.votes = speakers, decoding, votes
        self.votable = len(speakers) == 2 and not any(isinstance(speaker, TaskSpeaker) for speaker in speakers)
        self.messages: list[Message] = []
        self.set_system(system)

    def set_system(self, text: str | None) -> None:
        """Begin anew, with `text` as the system prompt."""
        self.messages = [Message(role="system", content=text)] if text else []

    def undo(self) -> None:
        """Take back the last question and its answer."""
        while self.messages and self.messages[-1].role != "user":
            if self.messages[-1].role == "system":
                return
            self.messages.pop()
        if self.messages:
            self.messages.pop()

    def ask(self, text: str, write: Callable[[str], object], vote: Callable[[], str] | None = None) -> list[str]:
        """The answers to `text`, written as they come; the first one, or the one that `vote` (a or b) prefers, is kept. There is no
        vote on the same answer twice, nor on those of a task's model.
        """
        self.messages.append(Message(role="user", content=text))
        answers: list[str] = []
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                write(f"[{'ab'[len(answers)]}] ")
            answer = ""
            for piece in speaker.answer(self.messages, self.decoding):
                piece = piece if answer else piece.lstrip()
                answer += piece
                write(harmless(piece))
            answers.append(answer.rstrip())
            write("\n")
        kept = 0
        if self.votable and vote is not None and answers[0] != answers[1]:  # the same twice leaves nothing to prefer
            choice = vote()
            if choice in ("a", "b"):
                kept = "ab".index(choice)
                if self.votes is not None:
                    named = [(speaker.name, answer) for speaker, answer in zip(self.speakers, answers, strict=True)]
                    add_vote(self.votes, self.messages, named[kept], named[1 - kept])
        self.messages.append(Message(role="assistant", content=answers[kept]))
        return answers


def talk_at_terminal(talk: Talk) -> None:
    """Read questions from stdin until it ends. A question that cannot be answered is taken back, and a line says why."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a pipe may hold any bytes
    with suppress(ImportError):  # without it a terminal cuts a line after 4,095 bytes; Windows has none
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one question, whatever lines it has

    def write(text: str) -> None:
        print(text, end="", flush=True)

    def read(prompt: str) -> str:
        """A line; the prompt only where a person reads it."""
        return input(prompt if sys.stdin.isatty() else "")

    def vote() -> str:
        while (choice := read("better (a, b, or Enter for neither): ").strip().lower()) not in ("a", "b", ""):
            if choice == "/quit":
                raise EOFError
            write(f"{harmless(choice)} is no vote.\n")
        return choice

    if len(talk.speakers) > 1 and not talk.votable:
        say(NO_VOTE)
    if sys.stdin.isatty():
        print(" against ".join(speaker.name for speaker in talk.speakers) + f". {HELP}.")
    try:
        _converse(talk, read, write, vote)
    except EOFError:
        write("\n")


def _converse(talk: Talk, read: Callable[[str], str], write: Callable[[str], object], vote: Callable[[], str]) -> None:
    while True:
        line = read("> ").strip()
        command, _, rest = line.partition(" ")
        command = command.lower()
        if command == "/quit":
            return
        if command == "/reset":
            talk.set_system(talk.messages[0].content if talk.messages and talk.messages[0].role == "system" else None)
        elif command == "/undo":
            talk.undo()
        elif command == "/system":
            talk.set_system(rest.strip() or None)
        elif command.startswith("/"):
            print(f"{command} is no command. {HELP}.")
        elif line:
            try:
                talk.ask(line, write, vote)
            except AlignError as error:
                talk.undo()
                say(str(error))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                talk.undo()
                say(first_line(error))
            except KeyboardInterrupt:  # an answer or a vote is cut; where a question is waited for, the conversation ends
                if not sys.stdin.isatty():
                    raise
                talk.undo()
                write("\n")
