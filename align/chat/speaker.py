"""A model that answers, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextIteratorStreamer

from align.encode import Encoder, set_chat_template
from align.errors import AlignError
from align.models import best_device, load_causal_lm, load_tokenizer, stop_token_ids
from align.registry import Registry
from align.schema import Message
from align.tasks.base import is_task_model
from align.tasks.measure import TaskModel

COLDEST = 1e-6
"""At a lower temperature nothing but the greedy answer is drawn, and logits divided by it may be beyond float32."""


def context_of(model: Any) -> int | None:
    """The most tokens that `model` reads; None where there is no end."""
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return places if places is not None and places > 0 else None  # -1 is without an end


@dataclass(frozen=True)
class Decoding:
    """How an answer is drawn. A temperature below `COLDEST` is greedy; ``top_p=1`` and ``top_k=0`` switch those filters off."""

    max_completion_length: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0


class Speaker:
    """A loaded model and its chat template; an adapter is merged into its base.

    Args:
        reference: a registered NAME[@VERSION], an alias, a folder or a hub id.
        chat_template: as the stages take it; `auto` gives a base model without one the template `plain`.

    Raises:
        AlignError: there is no such model, or its template ends an answer with no token.
    """

    def __init__(
        self, reference: str, *, dtype: str = "float32", chat_template: str = "auto", trust_remote_code: bool = False
    ) -> None:
        self.name = reference
        path = Registry().resolve(reference).path
        self.tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        set_chat_template(self.tokenizer, chat_template)
        self.encoder = Encoder(self.tokenizer)
        self.model: Any = load_causal_lm(path, dtype=dtype, trust_remote_code=trust_remote_code).eval()
        self.model.to(best_device())
        self.stops = sorted({*stop_token_ids(self.model, self.tokenizer), self.encoder.end_of_turn})

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[str]:
        """The answer to the last of `messages`, in pieces, as they come; draws of chance are torch's global ones. It ends at the
        latest where the model's context does.

        Raises:
            AlignError: the conversation alone fills the context.
        """
        ids = self.encoder.prompt_ids(list(messages))
        room, context = decoding.max_completion_length, context_of(self.model)
        if context is not None:
            room = min(room, context - len(ids))
        if room < 1:
            raise AlignError(
                f"{self.name} reads {context} tokens, and the conversation has {len(ids)}: begin anew, or ask something shorter"
            )
        prompt = torch.tensor([ids], device=self.model.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampled = decoding.temperature >= COLDEST
        settings = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k} if sampled else {}
        failed: list[Exception] = []
        left = Event()  # nobody listens any more

        def generate() -> None:
            try:
                self.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=room,
                    do_sample=sampled,
                    eos_token_id=self.stops,
                    pad_token_id=self.stops[0],
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([lambda *_: torch.full((1,), left.is_set(), device=prompt.device)]),
                    **settings,
                )
            except Exception as error:  # raised below, in the thread of who asked
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:  # a thread that went on would take the processor from the next answer, and abort Python where it ends
            left.set()
            thread.join()
        if failed:
            raise failed[0]


class TaskSpeaker:
    """A model of the stage `task`: it answers each text by itself, always the same. Question answering reads the system prompt."""

    def __init__(self, reference: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> None:
        self.name = reference
        self._model = TaskModel(Registry().resolve(reference).path, dtype=dtype, trust_remote_code=trust_remote_code)

    def answer(self, messages: Sequence[Message], decoding: Decoding) -> Iterator[str]:
        """The answer to the last of `messages`, in one piece.

        Raises:
            AlignError: it cannot be read, or is a question without a text that it is about.
        """
        context = messages[0].content if messages[0].role == "system" else ""
        yield self._model.answer(messages[-1].content, context)


def speaker(reference: str, *, chat_template: str = "auto", **options: Any) -> Speaker | TaskSpeaker:
    """Whoever answers under the name `reference`; arguments as for `Speaker`."""
    if is_task_model(Registry().resolve(reference).path):
        return TaskSpeaker(reference, **options)
    return Speaker(reference, chat_template=chat_template, **options)
