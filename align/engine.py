"""Runs a transformers model on a forest: ``model(forest=forest)``.

`enable_forest` gives a loaded model that call, after checking on random tokens that it answers as the model itself does. A model
that cannot run on a forest unfolds it into padded rows instead, and the caller is told why. Everything else about the model stays
as it is: ``save_pretrained``, ``generate``, wrapping by accelerate, gradient checkpointing, ``torch.compile``, DDP and FSDP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from align import last_layer
from align.attention import FOREST, AttentionPlan
from align.compiling import complaint, uncompiled
from align.errors import AlignError, first_line
from align.forest import Forest, PaddedBatch, Tree, alike, pad, plant
from align.heads import Head, TokenScores, head_of, token_scores
from align.layers import in_fewer_passes
from align.onednn import by_onednn
from align.ops import at_least_fp32, rows_at

PROBE_TOLERANCE = 2.0
"""How many times the noise of a model's own rounding its answers may differ by (means over the targets of the probe)."""

PROBE_BOUNDS = (1e-4, 0.5)
"""Mean differences (nats) that always and never pass. The lower is fp32 sums in another order, or TF32 products. Above the upper
rounding could hide a mistake; padded rows are safe.
"""

POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|positions_embed|wpe)$")
"""What families call a table of learned positions."""

TABLES = {"mpt": "max_seq_len", "ctrl": "n_positions"}
"""Families whose table of positions is no module, and where their config has its length."""

PROBE_ERRORS = (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError, AssertionError, IndexError)
"""What a model's code raises that does not run on plain rows of tokens, or not on a forest."""

PROBE_WINDOW = 6
"""Sliding window during the probe, so that its rows of up to 13 tokens are longer."""


def enable_forest(model: nn.Module, longest: int | None = None) -> str | None:
    """Let `model` be called with ``forest=`` and find its path. Returns None for the forest path, or why it takes the padded one.

    A causal language model then answers with `TokenScores` of the forest's targets. A model with a score head (sequence
    classification) answers with scores, at the ends of the sequences (``read="ends"``) or at the sources of the targets
    (``read="sources"``).

    Args:
        longest: tokens in the longest path to come, held against the reach of the model's attention and positions.

    Raises:
        AlignError: the model is not a causal decoder, has too few positions or answers that are no numbers, or neither path gives
            its own log-probs.
    """
    base = base_model(model)
    before = base.config._attn_implementation
    if getattr(base.config, "is_encoder_decoder", False):
        raise AlignError(f"{type(base).__name__} is an encoder and a decoder; take a decoder alone, as Llama, Qwen or GPT-2")
    if longest is not None:
        check_reach(model, longest)
    trunk = trunk_of(base)
    by_onednn(trunk)
    in_fewer_passes(trunk)
    if hasattr(model, "peft_config"):
        from align.low_rank import by_one_product  # here, as peft takes its time to import

        by_one_product(trunk)
    last_layer.answer_everywhere(trunk)
    model.forward = MethodType(_forward, model)
    with _evaluating(model), short_windows(base, longest), uncompiled():
        try:
            probe = _Probe(model)
            causal = probe.is_causal()
        except PROBE_ERRORS as error:
            raise AlignError(
                f"{type(base).__name__} cannot be trained: its own forward on random tokens gave {first_line(error)}"
            ) from error
        if not causal:
            raise AlignError(
                f"{type(base).__name__} is not causal: its tokens see those after them, so it would read the words that it is to "
                "predict. Take a decoder, as Llama, Qwen or GPT-2"
            )
        reason = refused_by_config(base, longest)
        if reason is None:
            try:
                base.set_attn_implementation(FOREST)
                model.forest_padded = False  # type: ignore[assignment]
                reason = probe.problem()
            except PROBE_ERRORS as error:
                reason = first_line(error)
        if reason is None:
            last_layer.answer_where_read(trunk)
            if _problem(probe):  # its feed-forward block does not treat each token by itself
                last_layer.answer_everywhere(trunk)
            return None
        base.set_attn_implementation(before)
        model.forest_padded = True  # type: ignore[assignment]
        if problem := _problem(probe):
            raise AlignError(
                f"{type(base).__name__} can be trained neither on the forest ({reason}) nor on padded rows ({problem})"
            )
    return reason


def compile_forest(model: nn.Module, precision: AbstractContextManager[Any]) -> str | None:
    """Compile the layers of an enabled model, each by itself: they share a graph, so it takes seconds, and forests of any shape use
    it. A step and a measurement are rehearsed within `precision`, so that what cannot be compiled shows now. Returns None, or why
    the model runs as it is.
    """
    if model.forest_padded:
        return "it trains on padded rows"
    base, was_training = base_model(model), model.training
    trunk, forest = trunk_of(base), _probe_forest(base)
    layers = [layer for stack in trunk.children() if isinstance(stack, nn.ModuleList) for layer in stack]
    last_layer.answer_everywhere(trunk)  # or it would be compiled by itself
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        for learning in (True, False):
            model.train(learning)
            with precision, torch.set_grad_enabled(learning):
                answers = model(forest=forest, read="sources")
            if learning:
                total = (answers.logps if isinstance(answers, TokenScores) else answers).sum()
                torch.autograd.grad(total, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except PROBE_ERRORS as error:
        for layer in layers:
            layer._compiled_call_impl = None
        last_layer.answer_where_read(trunk)
        return f"torch.compile gave {complaint(error)}"
    finally:
        model.train(was_training)
    return None


def _problem(probe: _Probe) -> str | None:
    try:
        return probe.problem()
    except PROBE_ERRORS as error:
        return first_line(error)


def check_reach(model: nn.Module, longest: int, *, what: str = "longest row has", field: str = "max_length") -> None:
    """Raise `AlignError` where `model` has its positions in a table (as GPT-2, BERT and BART have), and fewer than `longest` tokens
    need; or where a row so long would turn all rows of its pass by other rotary frequencies ("longrope", as in Phi-3, and
    "dynamic"), so that the answers to a row depended on what it is packed with.

    Args:
        what: that has so many tokens.
        field: that bounds them.
    """
    base = base_model(model)
    border = frequency_border(base)
    if border is not None and longest > border:
        raise AlignError(
            f"the {what} {longest} tokens, and one of more than {border} changes the rotary frequencies of "
            f"{type(base).__name__} for all rows beside it: set {field} to {border} or less"
        )
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    if (reach := min(_places(base), default=longest + virtual) - virtual) < longest:
        raise AlignError(
            f"the {what} {longest} tokens, and {type(base).__name__} has places for {reach}: set {field} to {reach} or less"
        )


def _places(base: Any) -> Iterator[int]:
    """Tokens that each of a model's tables of positions has room for."""
    for name, table in base.named_modules():
        if not POSITIONS.search(name) or not isinstance(table, nn.Embedding) or hasattr(table, "make_weight"):
            continue  # FSMT makes waves, longer as needed
        yield table.num_embeddings - getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
    if field := TABLES.get(base.config.model_type):
        yield getattr(base.config, field)


def frequency_border(base: Any) -> int | None:
    """Tokens of the longest row that leaves a model's rotary frequencies as they are; None where no row changes them."""
    borders = []
    for module in base.modules():
        kinds: Any = getattr(module, "rope_type", None) or {}
        for layer, kind in ({None: kinds} if isinstance(kinds, str) else kinds).items():
            if kind == "longrope":
                parameters: Any = module.config.rope_parameters
                borders.append((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
            elif "dynamic" in kind:
                borders.append(module.original_max_seq_len)
    return min(borders, default=None)


def base_model(model: nn.Module) -> Any:
    """The transformers model inside `model`, without the PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _forward(
    self: nn.Module,
    *args: Any,
    forest: Forest | None = None,
    read: Literal["sources", "ends"] = "ends",
    temperature: float = 1.0,
    with_entropy: bool = False,
    score_head: nn.Module | None = None,
    language_head: Head | None = None,
    with_logps: bool = True,
    **kwargs: Any,
) -> Any:
    """The forward of an enabled model. Bound to the outermost module so that DDP's and FSDP's hooks see every call.

    A causal language model reads a `score_head` of somebody else's (hidden to 1) besides its own head, from one pass through its
    trunk; with ``with_logps=False`` in place of it, and then answers as a model with a score head does. A model with a score head
    reads a `language_head` besides it. Who reads two answers with `TokenScores` that have the scores as `values`.
    """
    if forest is None:
        return type(self).forward(self, *args, **kwargs)
    base = base_model(self)
    if score_head is None and hasattr(base, "score"):
        score_head, with_logps = base.score, language_head is not None
    scored = forest.sources if read == "sources" else forest.ends
    everything = [*([forest.sources] if with_logps else []), *([] if score_head is None else [scored])]
    hidden, sources, ends = _hidden_states(base, forest, torch.cat(everything), padded=bool(self.forest_padded))
    values = None if score_head is None else score_head(rows_at(hidden, sources if read == "sources" else ends)).squeeze(-1).float()
    if not with_logps:
        return values
    # The head reads back whether there is a gradient of the entropy, which a compiled graph cannot.
    score = torch.compiler.disable(token_scores) if torch.compiler.is_compiling() else token_scores
    scores = score(rows_at(hidden, sources), forest.targets, language_head or head_of(base), temperature, with_entropy=with_entropy)
    return replace(scores, values=values)


def trunk_of(base: Any) -> Any:
    """`base` without its head. Llama 4 alone names it otherwise than its class says."""
    return getattr(base, "model", base) if base.base_model is base else base.base_model


def _hidden_states(base: Any, forest: Forest, read: Tensor, *, padded: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Last hidden states (rows, hidden), and where in them the forest's sources and ends lie. Those of the tokens `read` (n,) are
    right; others need not be.
    """
    if padded:
        return _on_padded_rows(trunk_of(base), pad(forest))
    # A four-dimensional mask is taken as ready-made by transformers, which would otherwise build one of (tokens, tokens).
    no_mask = torch.empty(1, 1, 0, 0, device=forest.input_ids.device)
    trunk, plan = trunk_of(base), _plan(forest)
    plan.read = last_layer.read_at(trunk, read, forest.tokens)
    output = trunk(
        input_ids=forest.input_ids[None],
        position_ids=forest.position_ids[None],
        attention_mask=no_mask,
        use_cache=False,
        forest=plan,
    )
    return output.last_hidden_state[0], forest.sources, forest.ends


def _on_padded_rows(trunk: Any, batch: PaddedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """`_hidden_states` of rows of similar length together: one long row would else pad all others to its length, far beyond the
    budget of tokens. Weights in shards come together for all processes at once, so there it is one pass whatever the lengths.
    """
    lengths, (rows, width) = batch.attention_mask.sum(1), batch.input_ids.shape
    sharded = any(isinstance(module, FSDPModule) for module in trunk.modules())
    groups = [range(rows)] if sharded else alike(lengths.tolist())
    starts, hidden, end = torch.empty_like(lengths), list[Tensor](), 0
    for group in groups:
        own = torch.tensor(group, device=lengths.device)
        longest = max(1, int(lengths[own].max()))
        seen = {"input_ids": batch.input_ids[own, :longest], "attention_mask": batch.attention_mask[own, :longest]}
        hidden.append(trunk(**seen, use_cache=False).last_hidden_state.flatten(0, 1))
        starts[own] = end + longest * torch.arange(len(own), device=own.device)
        end += longest * len(own)
    sources, ends = (starts[flat // width] + flat % width for flat in (batch.sources, batch.ends))
    return torch.cat(hidden), sources, ends


# Out of compiled graphs, which could not make it for forests of any shape.
@torch.compiler.disable
def _plan(forest: Forest) -> AttentionPlan:
    plan = AttentionPlan(forest)
    if plan.flash:
        _ = plan.runs
    return plan


# -- the check ---------------------------------------------------------------------------------------------------------------


def refused_by_config(base: Any, longest: int | None) -> str | None:
    """What class and config tell, and a short probe cannot show."""
    config = base.config
    if not type(base)._can_set_attn_implementation():
        return f"{type(base).__name__} does not use transformers' attention interface"
    if any("compressed" in kind for kind in getattr(config, "layer_types", None) or ()):  # DeepSeek-V4
        return "its attention sees stretches of a row as one key each, which would run from one sequence into the next"
    if getattr(config, "attn_temperature_tuning", False):
        return "its attention scales queries by their place in the row, not in the path"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and (longest is None or longest > chunk):
        rows = "rows of any length" if longest is None else f"the longest row ({longest} tokens)"
        return f"its attention is cut into chunks of {chunk} tokens, shorter than {rows}"
    return None


def _probe_forest(base: Any) -> Forest:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(base.config.vocab_size, (n,), generator=generator).tolist()

    forest = plant([Tree(tokens(7), (tokens(5), tokens(3), tokens(6))), Tree(tokens(4), (tokens(2), tokens(2)))])
    return forest.to(next(base.parameters()).device)


class _Probe:
    """A small forest of random tokens, what the model itself says of it as padded rows, and how much of that is rounding."""

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self.model, self.base = model, base_model(model)
        self.forest = _probe_forest(self.base)
        self.batch = pad(self.forest)
        self.own = self._own_answers(self.batch.input_ids)
        if not self.own.isfinite().all():
            raise AlignError(
                f"{type(self.base).__name__} answers random tokens with NaN or infinity in {self.base.dtype}: its weights are "
                "damaged, or too large for this precision. Take another checkpoint, or float32"
            )
        with rounding_twice(self.base):
            noise = self._distance(self._own_answers(self.batch.input_ids))
        lower, upper = PROBE_BOUNDS
        self.tolerance = min(max(lower, PROBE_TOLERANCE * noise), upper)

    @torch.no_grad()
    def problem(self) -> str | None:
        """How the enabled model's answers differ from its own. None where they do not."""
        answers = self.model(forest=self.forest, read="sources")
        distance = self._distance(answers.logps if isinstance(answers, TokenScores) else answers)
        if distance <= self.tolerance:
            return None
        return f"its log-probs on the probe differ by {distance:.1e} nats (at most {self.tolerance:.0e} is rounding)"

    @torch.no_grad()
    def is_causal(self) -> bool:
        """Whether another last token changes no answer before it."""
        ids = self.batch.input_ids.flatten().clone()
        ids[self.batch.ends] = (ids[self.batch.ends] + 1) % self.base.config.vocab_size
        return self._distance(self._own_answers(ids.view_as(self.batch.input_ids))) <= self.tolerance

    def _own_answers(self, input_ids: Tensor) -> Tensor:
        """Log-probs or scores of the forest's targets (targets,) by the model's own forward."""
        rows = {"input_ids": input_ids, "attention_mask": self.batch.attention_mask, "use_cache": False}
        if hasattr(self.base, "score"):
            # A score head answers once a row, at the last token that is not padding; read the trunk instead.
            hidden = trunk_of(self.base)(**rows).last_hidden_state.flatten(0, 1)[self.batch.sources]
            return self.base.score(hidden).squeeze(-1).float()
        logits = type(self.model).forward(self.model, **rows).logits.flatten(0, 1)[self.batch.sources]
        return logits.to(at_least_fp32(logits.dtype)).log_softmax(1).gather(1, self.forest.targets[:, None])[:, 0]

    def _distance(self, answers: Tensor) -> float:
        return (answers - self.own).abs().mean().item()


@contextmanager
def rounding_twice(model: nn.Module) -> Iterator[None]:
    """Within, every output of the innermost modules is off by up to one unit in its last place, at random: what their rounding does
    to the answers, seen by doing it again (Monte Carlo arithmetic; Parker 1997).
    """
    generators: dict[torch.device, torch.Generator] = {}

    def jitter(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        generator = generators.setdefault(output.device, torch.Generator(output.device).manual_seed(0))
        wide = at_least_fp32(output.dtype)
        shift = torch.rand(output.shape, generator=generator, device=output.device, dtype=wide).mul_(2).sub_(1)
        return (output.to(wide) * (1 + torch.finfo(output.dtype).eps * shift)).to(output.dtype)

    with ExitStack() as stack:
        for module in model.modules():
            if not any(True for _ in module.children()):
                stack.callback(module.register_forward_hook(jitter).remove)
        yield


@contextmanager
def short_windows(model: nn.Module, longest: int | None) -> Iterator[None]:
    """Within, sliding windows that `longest` tokens reach beyond are so short that the probe does too."""
    windows: dict[int, tuple[Any, int]] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            window = getattr(holder, "sliding_window", None)
            if isinstance(window, int) and (longest is None or longest > window):
                windows[id(holder)] = holder, window
    for holder, _ in windows.values():
        holder.sliding_window = PROBE_WINDOW
    try:
        yield
    finally:
        for holder, window in windows.values():
            holder.sliding_window = window


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
