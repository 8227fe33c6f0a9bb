"""Rows to token trees: chat templates, end tokens, loss masks, lengths."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from align.errors import AlignError
from align.forest import Tree
from align.schema import LabelledRow, Message, PreferenceRow, PromptRow, SFTRow, Text, TextRow

Tools = list[dict[str, Any]] | None
"""Descriptions of functions that the chat template shows to the model."""

TEMPLATES = Path(__file__).parent / "templates" / "chat"

MARK = "\ue000"
"""A character of Unicode's private use area, to find out where a template puts a turn's words."""


class Refused(AlignError):
    """One row cannot be encoded; others may."""


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give `tokenizer` the chat template `choice`: None keeps its own; ``auto`` keeps its own or else takes ``plain``; otherwise
    the name of a shipped template or a file.

    Raises:
        AlignError: no such template or file.
    """
    if choice is None or (choice == "auto" and tokenizer.chat_template):
        return
    shipped = {path.stem: path for path in sorted(TEMPLATES.glob("*.jinja"))}
    path = shipped.get("plain" if choice == "auto" else choice, Path(os.path.expanduser(choice)))
    if not path.is_file():
        raise AlignError(f"chat_template {choice!r} is neither a file nor one of: auto, {', '.join(shipped)}")
    tokenizer.chat_template = path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Encoded:
    """Token trees and what became of the rows: rows in = rows used + set aside."""

    trees: Sequence[Tree]
    rows: list[Any]
    """The row behind each tree (a document may give several trees); none where they are not kept."""
    set_aside: Counter[str] = field(default_factory=Counter)
    cut_rows: int = 0
    cut_tokens: int = 0
    used_before: int = 0
    """Rows used that are not kept in `rows`."""

    @property
    def used(self) -> int:
        """Rows that gave a tree."""
        return len({id(row) for row in self.rows}) + self.used_before

    def counted(self, part: Encoded) -> Encoded:
        """These counts and those of `part`, without its trees and rows."""
        return replace(
            self,
            set_aside=self.set_aside + part.set_aside,
            cut_rows=self.cut_rows + part.cut_rows,
            cut_tokens=self.cut_tokens + part.cut_tokens,
            used_before=self.used_before + part.used,
        )

    def summary(self) -> str:
        """One line that adds up."""
        used, aside = self.used, sum(self.set_aside.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.set_aside.items())
        line = f"{used + aside} rows = {used} used + {aside} set aside{f' ({reasons})' if reasons else ''}"
        return line + (f"; {self.cut_tokens} tokens cut from {self.cut_rows} rows by max_length" if self.cut_rows else "")


class Encoder:
    """Turns schema rows into token trees with one tokenizer and one maximum length.

    Strings are raw text. Lists of messages go through the tokenizer's chat template, and answers end with the token that the
    template puts behind an assistant turn.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._end_of_turn: int | None = None
        self._look_up()
        self._known: dict[tuple[bool, str], list[int]] = {}
        self._rendered: dict[tuple[Any, ...], str] = {}

    def _look_up(self) -> None:
        """Begin and end token, for which the tokenizer takes longer than for a short text."""
        self._begin, self._end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id

    # -- what ends an answer ------------------------------------------------------------------------------------------------

    @property
    def end_of_turn(self) -> int:
        """The token that the chat template puts behind an assistant turn.

        Raises:
            AlignError: the template ends the turn with no special token, so a model could not learn to stop.
        """
        if self._end_of_turn is None:
            marker = "\u2603"
            turn = [Message(role="user", content="a"), Message(role="assistant", content=marker)]
            tail = self.render(turn).rpartition(marker)[2]
            # A base model's tokenizer may have the token without naming it among its special tokens (Llama 3's <|eot_id|>).
            added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            special = [i for i in self._ids(tail) if i in added or i in self.tokenizer.all_special_ids]
            if not special:
                raise AlignError(
                    f"the chat template puts no end token of this tokenizer behind an assistant turn (it puts {tail!r}), so the "
                    "model would never learn to stop; set chat_template to 'plain', or to a template with {{ eos_token }} there"
                )
            self._end_of_turn = special[0]
        return self._end_of_turn

    @property
    def end_of_text(self) -> int:
        """The tokenizer's end token, put behind raw text."""
        if self._end is None:
            raise AlignError(
                "the tokenizer has no end token (eos_token), so the model would never learn to stop; set one in its folder"
            )
        return self._end

    def end_of_answer(self, row: Any) -> int:
        """The token that ends an answer in `row`: `end_of_turn` of a conversation, `end_of_text` of raw text.

        Raises:
            AlignError: there is none.
        """
        conversational = getattr(row, "messages", None) is not None or isinstance(row.prompt, list)
        return self.end_of_turn if conversational else self.end_of_text

    # -- rendering -----------------------------------------------------------------------------------------------------------

    def render(self, messages: Iterable[Message], *, generate: bool = False, tools: Tools = None) -> str:
        """`messages` through the chat template; with `generate` up to where the assistant begins to speak.

        Raises:
            AlignError: the tokenizer has no chat template.
            Refused: the template refuses these messages.
        """
        messages = list(messages)
        if (known := self._rendered.get(_identity(messages, generate, tools))) is not None:
            return known
        if not self.tokenizer.chat_template:
            raise AlignError(
                "the data are conversations, but the tokenizer has no chat template; set chat_template to 'plain' (or 'chatml' for "
                "a tokenizer that has its tokens) or a .jinja file"
            )
        plain = [message.model_dump(exclude_none=True) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, tools=tools, tokenize=False, add_generation_prompt=generate)
        except TemplateError as error:
            raise Refused(f"the chat template refuses the row ({error})") from error

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of `text`, with a begin token at most once: a template writes it, some tokenizers add it, some texts hold it."""
        known = self._known.get((special, text))
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"] if known is None else known
        return ids[self._doubled(ids) :]

    def _doubled(self, ids: list[int]) -> int:
        """How many begin tokens stand in front of another one at the start of `ids`."""
        count = 0
        while ids[count : count + 1] == ids[count + 1 : count + 2] == [self._begin]:
            count += 1
        return count

    def prompt_ids(self, prompt: Text, tools: Tools = None) -> list[int]:
        """Tokens of a prompt, up to where the answer begins."""
        if isinstance(prompt, str):
            return self._ids(prompt, special=True) if prompt else []
        return self._ids(self.render(prompt, generate=True, tools=tools))

    def answer_ids(self, prompt: Text, answer: Text, tools: Tools = None) -> list[int]:
        """Tokens of `answer` behind `prompt`, with the end token."""
        if isinstance(answer, str):
            assert isinstance(prompt, str)
            head, tail, end = prompt, answer, self.end_of_text
            prefix, whole = self.prompt_ids(prompt), self._ids(head + tail, special=True)
        else:
            turns = [*prompt, *answer]
            head, text = self.render(prompt, generate=True, tools=tools), self.render(turns, tools=tools)  # type: ignore[arg-type]
            end = self.end_of_turn
            if not text.startswith(head):
                raise AlignError(
                    "the chat template renders a conversation differently once it is answered; its prompt is not a prefix"
                )
            tail = text[len(head) :]
            prefix, whole = self._ids(head), self._ids(text)
        # The tokenizer may merge across the border; then the answer is tokenized alone, as the model will meet it when it
        # generates.
        ids = whole[len(prefix) :] if whole[: len(prefix)] == prefix else self._ids(tail)
        # What a template puts behind the end token ("\n") is the next turn's, not the answer's; of plain text all is.
        if end in ids and not isinstance(answer, str):
            ids = ids[: len(ids) - ids[::-1].index(end)]
        return ids if ids[-1:] == [end] else [*ids, end]

    # -- one function a kind of row --------------------------------------------------------------------------------------------

    def text(self, rows: Iterable[TextRow]) -> Encoded:
        """Documents in blocks of at most `max_length` tokens; every token but a block's first is a target.

        A last block of one token has none and is cut.
        """
        trees: list[Tree] = []
        kept: list[TextRow] = []
        set_aside: Counter[str] = Counter()
        cut_rows = 0
        for row in self._ahead(rows):
            ids = self._document(row)
            step = self.max_length or max(len(ids), 1)
            blocks = [ids[i : i + step] for i in range(0, len(ids), step)]
            new = [Tree(block, prompt_mask=[True] * len(block)) for block in blocks if len(block) > 1]
            trees += new
            kept += [row] * len(new)
            if not new:
                set_aside["have no token to predict"] += 1
            elif len(new) < len(blocks):
                cut_rows += 1
        return Encoded(trees, kept, set_aside, cut_rows, cut_tokens=cut_rows)

    def _document(self, row: TextRow) -> list[int]:
        """Tokens of a text, with the end token."""
        ids = self._ids(row.text, special=True)
        return [*ids, self._end] if self._end is not None and ids[-1:] != [self._end] else ids

    def windows(self, rows: Iterable[TextRow], stride: int | None = None) -> Encoded:
        """Documents for measuring: every token but a document's first is a target exactly once, in windows of `max_length` tokens
        that move by `stride` (half a window by default), so each target has at least the rest of the window before it.

        Raises:
            AlignError: windows that move by `stride` leave no token before a target.
        """
        length = self.max_length
        step = stride or max((length or 2) // 2, 1)
        if length is not None and step >= length:
            raise AlignError(f"stride {step} must be below max_length {length}, so that windows overlap")
        trees: list[Tree] = []
        kept: list[TextRow] = []
        set_aside: Counter[str] = Counter()
        for row in self._ahead(rows):
            ids = self._document(row)
            if len(ids) < 2:
                set_aside["have no token to predict"] += 1
                continue
            window, done = length or len(ids), 0
            for end in (*range(window, len(ids), step), len(ids)):
                start = max(0, end - window)
                trees.append(Tree(ids[start:end], prompt_mask=[i >= done for i in range(start, end)]))
                kept.append(row)
                done = end
        return Encoded(trees, kept, set_aside)

    def sft(self, rows: Iterable[SFTRow]) -> Encoded:
        """Conversations with the loss on assistant turns, or prompt + completion with the loss on the completion."""
        return self._collect(rows, self._sft_tree)

    def _sft_tree(self, row: SFTRow) -> Tree:
        if row.messages is None:
            prompt, completion = row.prompt, row.completion
            assert prompt is not None
            assert completion is not None
            if isinstance(prompt, list) and isinstance(completion, list) and len(completion) > 1:  # tools spoke in between
                said = [len(prompt) + i for i, message in enumerate(completion) if message.role == "assistant"]
                return self._conversation([*prompt, *completion], said, row.tools)
            head, answer = self.prompt_ids(prompt, row.tools), self.answer_ids(prompt, completion, row.tools)
            return Tree(head + answer, prompt_mask=[False] * len(head) + [True] * len(answer))
        turns = row.messages
        answered = [i for i, message in enumerate(turns) if message.role == "assistant"]
        if answered == [len(turns) - 1] and len(turns) > 1:
            head = self.prompt_ids(turns[:-1], row.tools)
            answer = self.answer_ids(turns[:-1], turns[-1:], row.tools)
            return Tree(head + answer, prompt_mask=[False] * len(head) + [True] * len(answer))
        return self._conversation(turns, answered, row.tools)

    def _conversation(self, turns: list[Message], answered: list[int], tools: Tools) -> Tree:
        """Several assistant turns: the characters that each adds to the rendered text, mapped to tokens by their offsets."""
        text = self.render(turns, tools=tools)
        spans = [self._span(text, turns, i, tools) for i in answered]
        if not self.tokenizer.is_fast:
            raise AlignError(
                "conversations of several answers need a fast tokenizer, which knows where each token stands in the text"
            )
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        doubled = self._doubled(encoding["input_ids"])
        mask = [any(start < stop and end > begin for begin, stop in spans) for start, end in encoding["offset_mapping"]]
        return Tree(encoding["input_ids"][doubled:], prompt_mask=mask[doubled:])

    def _span(self, text: str, turns: Sequence[Message], i: int, tools: Tools) -> tuple[int, int]:
        """Where in `text`, the rendered `turns`, the words of the assistant's turn `i` and their end token stand."""
        begin, stop = self._added(text, turns, i, tools) or self._found(text, turns, i, tools)
        end = self.tokenizer.convert_ids_to_tokens(self.end_of_turn)
        # What a template puts behind the end token ("\n") is the next turn's.
        last = text.rfind(end, begin, stop)
        if last >= 0:
            return begin, last + len(end)
        behind = len(text) - len(text[stop:].lstrip())
        return begin, behind + len(end) if text.startswith(end, behind) else stop

    def _added(self, text: str, turns: Sequence[Message], i: int, tools: Tools) -> tuple[int, int] | None:
        """What the turn adds to the text before it; None where the template writes that differently later on."""
        if i == 0:
            return None
        before = self.render(turns[:i], generate=True, tools=tools)
        after = self.render(turns[: i + 1], tools=tools)
        return (len(before), len(after)) if text.startswith(after) and after.startswith(before) else None

    def _found(self, text: str, turns: Sequence[Message], i: int, tools: Tools) -> tuple[int, int]:
        """Where `text` changes when the turn does, for templates that rewrite earlier turns (Mistral's shows tools in front of the
        latest question only; others leave out earlier reasoning).

        Raises:
            AlignError: the template shows the turn's words not at all, or more than once.
        """
        turn = turns[i]
        calls = [{**call, "function": {**call["function"], "name": MARK}} for call in turn.tool_calls or []]
        changed = turn.model_copy(update={"tool_calls": calls} if calls else {"content": MARK})
        other = self.render([*turns[:i], changed, *turns[i + 1 :]], tools=tools)
        start = other.find(MARK)  # the text before it is the same in both
        if other.count(MARK) == max(len(calls), 1) and text[:start] == other[:start]:
            if i:
                before, alone = self.render(turns[:i], generate=True, tools=tools), self.render(turns[: i + 1], tools=tools)
                added = alone[len(before) :] if alone.startswith(before) else ""
                begin = text.find(added, max(start - len(added), 0)) if added else -1
                if 0 <= begin <= start:
                    return begin, begin + len(added)
            behind = other[start + len(MARK) :]
            if not calls and text.endswith(behind):
                return start, len(text) - len(behind)
        raise AlignError(
            "the chat template renders earlier turns differently later in the conversation, so turns cannot be told apart"
        )

    def preference(self, rows: Iterable[PreferenceRow]) -> Encoded:
        """A prompt with two branches, chosen first; the value ``margin`` is the row's, 0 where it has none."""
        return self._collect(rows, self._preference_tree)

    def _preference_tree(self, row: PreferenceRow) -> Tree:
        branches = tuple(self.answer_ids(row.prompt, answer, row.tools) for answer in (row.chosen, row.rejected))
        return Tree(self.prompt_ids(row.prompt, row.tools), branches, values={"margin": [row.margin or 0.0]})

    def unpaired(self, rows: Iterable[LabelledRow]) -> Encoded:
        """A prompt with one branch; the value ``desirable`` is 1 for a wanted answer, 0 for an unwanted one."""
        return self._collect(rows, self._unpaired_tree)

    def _unpaired_tree(self, row: LabelledRow) -> Tree:
        answer = self.answer_ids(row.prompt, row.completion, row.tools)
        return Tree(self.prompt_ids(row.prompt, row.tools), (answer,), values={"desirable": [float(row.label)]})

    def prompts(self, rows: Iterable[PromptRow]) -> Encoded:
        """Prompts alone; one that leaves no room within `max_length`, or has no token for an answer to follow, is set aside.

        Raises:
            AlignError: there is no room for any: all of it is for answers.
        """
        if self.max_length is not None and self.max_length < 1:
            raise AlignError("max_completion_length takes all of max_length, and leaves no token for a prompt; raise max_length")
        return self._collect(rows, self._prompt_tree)

    def _prompt_tree(self, row: PromptRow) -> Tree:
        ids = self.prompt_ids(row.prompt, row.tools)
        if not ids:
            raise Refused("have an empty prompt, which no answer can follow")
        return Tree(ids)

    # -- many texts at once ----------------------------------------------------------------------------------------------------

    def _ahead(self, rows: Iterable[Any]) -> Iterator[Any]:
        """`rows`, with the texts of the next thousand tokenized in one call: several times faster than one by one."""
        rows = iter(rows)
        try:
            while group := list(islice(rows, 1024)):
                self._known, self._rendered = {}, {}
                self._look_up()
                wanted = dict.fromkeys(text for row in group for text in self._texts(row)) if self._tokenizes_plainly else {}
                for special in (False, True):
                    texts = [text for kind, text in wanted if kind is special]
                    found = self.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=special)
                    self._known.update(zip(((special, text) for text in texts), (encoding.ids for encoding in found), strict=True))
                yield from group
        finally:  # also where a row is refused: what is known goes by the place of messages in memory, which others then take
            self._known, self._rendered = {}, {}

    @property
    def _tokenizes_plainly(self) -> bool:
        """Whether the tokenizer's engine alone does what the tokenizer does."""
        engine = getattr(self.tokenizer, "backend_tokenizer", None)
        return self.tokenizer.is_fast and engine is not None and engine.truncation is None and engine.padding is None

    def _texts(self, row: Any) -> Iterator[tuple[bool, str]]:
        """What `_ids` will be asked for on behalf of `row`, as far as that is plain to see."""
        if isinstance(row, TextRow):
            yield True, row.text
            return
        turns = getattr(row, "messages", None)
        if turns is None:
            prompt = row.prompt
            answers = [getattr(row, name) for name in ("completion", "chosen", "rejected") if getattr(row, name, None) is not None]
        elif [message.role for message in turns].index("assistant") != len(turns) - 1 or len(turns) == 1:
            return  # several answers: `_conversation` needs to know where each token stands
        else:
            prompt, answers = turns[:-1], [turns[-1:]]
        if isinstance(prompt, str):
            yield from ((True, prompt + answer) for answer in ("", *answers) if prompt + answer)
            return
        try:
            yield False, self._render_ahead(prompt, True, row.tools)
            for answer in answers:
                yield False, self._render_ahead([*prompt, *answer], False, row.tools)
        except AlignError:  # it comes again when it is the row's turn
            return

    def _render_ahead(self, messages: list[Message], generate: bool, tools: Tools) -> str:
        text = self.render(messages, generate=generate, tools=tools)
        self._rendered[_identity(messages, generate, tools)] = text
        return text

    # -- lengths -------------------------------------------------------------------------------------------------------------

    def _collect(self, rows: Iterable[Any], encode: Callable[[Any], Tree]) -> Encoded:
        trees: list[Tree] = []
        kept: list[Any] = []
        set_aside: Counter[str] = Counter()
        cut_rows = cut_tokens = 0
        for row in self._ahead(rows):
            try:
                tree = encode(row)
            except Refused as refusal:
                set_aside[str(refusal)] += 1
                continue
            whole = tree
            if self.max_length is not None and tree.longest > self.max_length:
                shorter = _shorten(tree, self.max_length)
                if shorter is None:
                    set_aside[f"leave no room for an answer within {self.max_length} tokens"] += 1
                    continue
                tree = shorter
            if len(tree.branches) == 2 and tree.branches[0] == tree.branches[1]:  # nothing to prefer
                set_aside[f"have twice the same answer{'' if tree is whole else f' within {self.max_length} tokens'}"] += 1
                continue
            if tree is not whole:
                cut_rows, cut_tokens = cut_rows + 1, cut_tokens + whole.tokens - tree.tokens
            trees.append(tree)
            kept.append(row)
        return Encoded(trees, kept, set_aside, cut_rows, cut_tokens)


def _identity(messages: Sequence[Message], generate: bool, tools: Tools) -> tuple[Any, ...]:
    """What makes a rendered text the same as long as the messages live."""
    return (generate, id(tools), *map(id, messages))


def _shorten(tree: Tree, max_length: int) -> Tree | None:
    """Cut the end of `tree`'s paths to `max_length` tokens; None when nothing is left to learn from."""
    if tree.prompt_mask is not None:
        mask = tree.prompt_mask[:max_length]
        return Tree(tree.prompt[:max_length], prompt_mask=mask, values=tree.values) if any(mask[1:]) else None
    room = max_length - len(tree.prompt)
    if room < 1 or not tree.branches:
        return None
    return Tree(tree.prompt, tuple(branch[:room] for branch in tree.branches), values=tree.values)
