"""The packed token forest: what every stage trains on.

A *tree* is one prompt and zero or more branches that continue it. A *forest* is a batch of trees laid end to end in one row of
tokens, without padding, each prompt stored once. Positions restart at each tree, and a branch continues from the end of its
prompt.

Layout of one tree with two branches (every cell is one token, counted once)::

    tokens     p p p p  a a a  b b
    positions  0 1 2 3  4 5 6  4 5

The last prompt token predicts the first token of *each* branch, so what is predicted is kept as pairs (source, target): the hidden
state at ``sources[i]`` predicts the token ``targets[i]``.

Neighbours of one prompt (several pairs that answer one question) are laid as one tree: the prompt is stored once for all of them,
and so is an answer that stands in several pairs.

This module knows nothing of transformers: it is lists in, tensors out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """One prompt and the branches that continue it, as token ids.

    Every branch token is a target. Prompt tokens are targets only where `prompt_mask` is true (documents, conversations).
    """

    prompt: list[int]
    branches: tuple[list[int], ...] = ()
    prompt_mask: list[bool] | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    """Numbers that travel with the tree, concatenated over the trees of a forest (reference log-probs, margins, advantages …)."""

    @property
    def tokens(self) -> int:
        """Unique tokens, the cost of the tree in a forest."""
        return len(self.prompt) + sum(map(len, self.branches))

    @property
    def shareable(self) -> bool:
        """Whether another tree may use this one's prompt: it leads to branches and carries no loss, which would count once."""
        return bool(self.prompt and self.branches) and self.prompt_mask is None

    @property
    def longest(self) -> int:
        """Length in tokens of the longest path from the root."""
        return len(self.prompt) + max(map(len, self.branches), default=0)

    @property
    def targets(self) -> int:
        """How many tokens are predicted. The very first token of a path has nothing before it, so it never counts."""
        rootless = not self.prompt
        branch_targets = sum(max(len(branch) - rootless, 0) for branch in self.branches)
        return branch_targets + (sum(self.prompt_mask[1:]) if self.prompt_mask else 0)


@dataclass(frozen=True)
class Segment:
    """A run of consecutive queries in the forest's row and the earlier keys that it sees besides its own."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Forest:
    """A batch of trees in one row of tokens. `sequences` are the paths that a loss speaks of: each branch, or a document without
    any.
    """

    input_ids: Tensor  # (tokens,)
    position_ids: Tensor  # (tokens,)
    sources: Tensor  # (targets,) index of the token whose hidden state predicts the target
    targets: Tensor  # (targets,) token id
    owner: Tensor  # (targets,) index of the sequence that the target belongs to
    ends: Tensor  # (sequences,) index of the last token of the sequence
    paths: tuple[tuple[int, int, int, int], ...]  # per sequence: prompt start, prompt length, branch start, branch length
    segments: tuple[Segment, ...]
    trees: int  # how many were planted; those that share a prompt count each
    longest: int
    values: dict[str, Tensor]

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def sequences(self) -> int:
        return len(self.paths)

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sum `values` (targets,) over each sequence: (sequences,)."""
        return values.new_zeros(self.sequences).index_add(0, self.owner, values)

    def target_counts(self) -> Tensor:
        """Targets of each sequence: (sequences,)."""
        # Not bincount: on a GPU it waits for the largest index.
        return self.owner.new_zeros(self.sequences).index_add(0, self.owner, torch.ones_like(self.owner))

    def to(self, device: torch.device | str) -> Forest:
        # To a GPU nothing is waited for: what it has still to do goes on meanwhile.
        move = partial(torch.Tensor.to, device=device, non_blocking=self.input_ids.is_cpu)
        moved: dict[str, Any] = {f.name: move(getattr(self, f.name)) for f in fields(self) if f.type == "Tensor"}
        return replace(self, **moved, values={name: move(value) for name, value in self.values.items()})


def plant(trees: Sequence[Tree]) -> Forest:
    """Lay `trees` end to end. Sequences keep their order; a prompt that is the one of the tree before is not stored again, nor is a
    branch that this prompt has already.

    Raises:
        ValueError: a path without tokens, a mask of another length, or trees that carry different `values`.
    """
    input_ids: list[int] = []
    position_ids: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    paths: list[tuple[int, int, int, int]] = []
    segments: list[Segment] = []
    root = 0
    grown: dict[tuple[int, ...], int] = {}  # branches of the prompt at `root`, and where they start

    for before, tree in zip([None, *trees], trees, strict=False):
        if not tree.prompt and not all(tree.branches or [[]]):
            raise ValueError("a path of a tree needs at least one token")
        prompt_length = len(tree.prompt)
        shared = before is not None and before.shareable and tree.shareable and before.prompt == tree.prompt
        if not shared:
            root, grown = len(input_ids), {}
            input_ids += tree.prompt
            position_ids += range(prompt_length)
        if tree.prompt_mask is not None:
            if len(tree.prompt_mask) != prompt_length:
                raise ValueError(f"the prompt has {prompt_length} tokens and its mask {len(tree.prompt_mask)}")
            predicted = [i for i in range(1, prompt_length) if tree.prompt_mask[i]]
            sources += [root + i - 1 for i in predicted]
            targets += [tree.prompt[i] for i in predicted]
            owner += [len(paths)] * len(predicted)
        if not tree.branches:
            segments.append(Segment(root, prompt_length))
            paths.append((root, prompt_length, root + prompt_length, 0))
        for number, branch in enumerate(tree.branches):
            start = grown.setdefault(tuple(branch), len(input_ids))
            new = start == len(input_ids)
            if new:
                input_ids += branch
                position_ids += range(prompt_length, prompt_length + len(branch))
            if branch:
                # The first token is predicted by the prompt's last one; with an empty prompt nothing predicts it.
                sources += [*([root + prompt_length - 1] if prompt_length else []), *range(start, start + len(branch) - 1)]
                predicted_tokens = branch if prompt_length else branch[1:]
                targets += predicted_tokens
                owner += [len(paths)] * len(predicted_tokens)
            # The prompt and its first branch are one plain causal run.
            if number == 0 and not shared:
                segments.append(Segment(root, prompt_length + len(branch)))
            elif new and branch:
                segments.append(Segment(start, len(branch), root, prompt_length))
            paths.append((root, prompt_length, start, len(branch)))

    return Forest(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        sources=torch.tensor(sources, dtype=torch.long),
        targets=torch.tensor(targets, dtype=torch.long),
        owner=torch.tensor(owner, dtype=torch.long),
        ends=torch.tensor([b + n - 1 if n else p + m - 1 for p, m, b, n in paths]),
        paths=tuple(paths),
        segments=tuple(segments),
        trees=len(trees),
        longest=max(tree.longest for tree in trees),
        values=_collect_values(trees),
    )


def _collect_values(trees: Sequence[Tree]) -> dict[str, Tensor]:
    names = trees[0].values.keys()
    if any(tree.values.keys() != names for tree in trees):
        raise ValueError("all trees of a forest must carry the same values")
    return {name: torch.tensor([number for tree in trees for number in tree.values[name]], dtype=torch.float) for name in names}


def cut(trees: Iterable[Tree], max_tokens: int | None) -> Iterator[list[Tree]]:
    """Cut `trees`, in order, into packs of at most `max_tokens` unique tokens; a larger tree gets a pack of its own.

    For those who need what comes out in the order of the trees; `pack` fills its packs better.
    """
    batch: list[Tree] = []
    size = 0
    for tree in trees:
        if batch and max_tokens is not None and size + tree.tokens > max_tokens:
            yield batch
            batch, size = [], 0
        batch.append(tree)
        size += tree.tokens
    if batch:
        yield batch


WINDOW = 1024
"""Trees that `pack` looks at together."""


def pack(trees: Sequence[Tree], max_tokens: int) -> list[list[int]]:
    """Indices of `trees`, each once, in packs of at most `max_tokens` unique tokens; a larger tree gets a pack of its own.

    First-fit decreasing over each window of 1024 trees: at most 11/9 of the fewest packs possible, and one more (Johnson 1973).
    Trees of one prompt lie side by side, so that `plant` stores it once.
    """
    packs: list[list[int]] = []
    for start in range(0, len(trees), WINDOW):
        window: list[list[int]] = []
        room: list[int] = []
        for size, group in _by_size(trees, range(start, min(start + WINDOW, len(trees))), max_tokens):
            place = next((number for number, left in enumerate(room) if size <= left), len(room))
            if place == len(room):
                window.append([])
                room.append(max_tokens)
            window[place] += group
            room[place] -= size
        packs += window
    return packs


def deal(trees: Sequence[Tree], hands: int) -> list[list[int]]:
    """The indices of `trees`, each once, in `hands` shares of about as many unique tokens: the largest first, each to whom has
    least.

    The largest share is at most 4/3 of what the best deal could make it (Graham 1969). Trees of one prompt stay together as long
    as they are no more than a fair share.
    """
    shares: list[list[int]] = [[] for _ in range(hands)]
    held = [0] * hands
    unique = sum(size for size, _ in _by_size(trees, range(len(trees)), sum(tree.tokens for tree in trees)))
    for size, group in _by_size(trees, range(len(trees)), unique // hands):
        least = held.index(min(held))
        shares[least] += group
        held[least] += size
    return shares


def _by_size(trees: Sequence[Tree], indices: Iterable[int], max_tokens: int) -> list[tuple[int, list[int]]]:
    """`indices` in groups that share a prompt and have at most `max_tokens` unique tokens, with those tokens, the largest first."""
    groups: list[tuple[int, list[int]]] = []
    latest: dict[tuple[int, ...], tuple[int, set[tuple[int, ...]]]] = {}  # prompt -> its latest group, and that one's branches
    for index in indices:
        tree = trees[index]
        if tree.shareable:
            prompt, branches = tuple(tree.prompt), set(map(tuple, tree.branches))
            number, known = latest.get(prompt, (len(groups), set()))
            size, group = groups[number] if known else (len(prompt), [])
            together = size + sum(map(len, branches - known))
            if group and together <= max_tokens:
                groups[number] = (together, [*group, index])
                known |= branches
                continue
            latest[prompt] = (len(groups), branches)
        groups.append((tree.tokens, [index]))
    return sorted(groups, key=lambda sized: -sized[0])


@dataclass(frozen=True)
class PaddedBatch:
    """The same sequences one to a row, padded on the right: what models get that cannot run on a forest."""

    input_ids: Tensor  # (sequences, longest)
    attention_mask: Tensor  # (sequences, longest)
    sources: Tensor  # (targets,) into the flattened rows
    ends: Tensor  # (sequences,) into the flattened rows


def similar(longest: int, length: int) -> bool:
    """Whether two lengths differ by at most a quarter (or 8 tokens, where a call costs more than padding)."""
    return abs(longest - length) <= max(8, longest // 4)


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """The indices of `lengths` in groups that are `similar`, the longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and similar(lengths[groups[-1][0]], lengths[i]):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def pad(forest: Forest, pad_token_id: int = 0) -> PaddedBatch:
    """Unfold `forest` into padded rows; prompts are repeated for each branch. Order of targets and sequences stays as it is."""
    device, longest = forest.input_ids.device, forest.longest
    input_ids = torch.full((forest.sequences, longest), pad_token_id, device=device)
    attention_mask = torch.zeros_like(input_ids)
    for row, (prompt, prompt_length, start, length) in enumerate(forest.paths):
        input_ids[row, :prompt_length] = forest.input_ids[prompt : prompt + prompt_length]
        input_ids[row, prompt_length : prompt_length + length] = forest.input_ids[start : start + length]
        attention_mask[row, : prompt_length + length] = 1
    # A token's column in its row is its position in the path.
    rows = torch.arange(forest.sequences, device=device) * longest
    return PaddedBatch(
        input_ids,
        attention_mask,
        sources=rows[forest.owner] + forest.position_ids[forest.sources],
        ends=rows + forest.position_ids[forest.ends],
    )
