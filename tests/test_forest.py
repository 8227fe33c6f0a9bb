"""Laying trees end to end: what is predicted from where, what sees what, how a batch is cut."""

import random
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from helpers import sequences, tokens

from align.forest import WINDOW, Segment, Tree, alike, cut, deal, pack, pad, plant


def random_trees(seed, count=12):
    """Every shape: no branches, many, empty ones, empty prompts, losses on prompts."""
    draw = random.Random(seed)
    trees = []
    for _ in range(count):
        prompt = tokens(draw, draw.choice([0, 1, 2, 9, 30]))
        branches = tuple(
            tokens(draw, draw.choice([0, 1, 2, 17] if prompt else [1, 2, 17])) for _ in range(draw.choice([0, 1, 2, 16]))
        )
        if not prompt and not branches:
            branches = ([5, 6],)
        trees.append(Tree(prompt, branches, prompt_mask=[draw.random() < 0.5 for _ in prompt] if draw.random() < 0.5 else None))
    return trees


def test_the_layout_of_the_module_s_picture():
    """Prompt p p p p at 0-3, branch a a a at 4-6, branch b b at 7-8.

    The first token of a and of b is predicted by the prompt's last (3); the others by the token before them. The prompt and a are
    one causal run; b is a run of 2 that also sees the 4 of the prompt.
    """
    forest = plant([Tree([10, 11, 12, 13], ([20, 21, 22], [30, 31]))])
    assert forest.input_ids.tolist() == [10, 11, 12, 13, 20, 21, 22, 30, 31]
    assert forest.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert forest.sources.tolist() == [3, 4, 5, 3, 7]
    assert forest.targets.tolist() == [20, 21, 22, 30, 31]
    assert forest.owner.tolist() == [0, 0, 0, 1, 1]
    assert forest.ends.tolist() == [6, 8]
    assert forest.segments == (Segment(0, 7), Segment(7, 2, 0, 4))
    assert forest.paths == ((0, 4, 4, 3), (0, 4, 7, 2))
    assert (forest.tokens, forest.sequences, forest.trees, forest.longest) == (9, 2, 1, 7)
    assert forest.target_counts().tolist() == [3, 2]
    assert forest.per_sequence(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])).tolist() == [7, 24]


def test_a_document_with_a_loss_on_some_tokens():
    """The first token has nothing before it, whatever its mask says."""
    forest = plant([Tree([5, 6], ([7],)), Tree([10, 11, 12, 13], prompt_mask=[True, False, True, True])])
    assert forest.sources.tolist() == [1, 4, 5]
    assert forest.targets.tolist() == [7, 12, 13]
    assert forest.owner.tolist() == [0, 1, 1]
    assert forest.ends.tolist() == [2, 6]
    assert forest.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(10))
def test_random_forests_predict_what_their_paths_do(seed):
    trees = random_trees(seed)
    forest = plant(trees)
    paths = [(whole, wanted, tree, number) for tree in trees for number, (whole, wanted) in enumerate(sequences(tree))]
    assert forest.sequences == len(paths)
    assert forest.tokens == sum(tree.tokens for tree in trees)
    assert forest.longest == max(len(whole) for whole, *_ in paths)
    for index, (whole, wanted, tree, number) in enumerate(paths):
        wanted = [i for i in wanted if number == 0 or i >= len(tree.prompt)]  # a prompt's own targets are counted once
        mine = forest.owner == index
        assert forest.targets[mine].tolist() == [whole[i] for i in wanted]
        assert forest.input_ids[forest.sources[mine]].tolist() == [whole[i - 1] for i in wanted]
        assert forest.position_ids[forest.sources[mine]].tolist() == [i - 1 for i in wanted]
        assert forest.input_ids[forest.ends[index]] == whole[-1]
        assert forest.position_ids[forest.ends[index]] == len(whole) - 1
    assert forest.owner.tolist() == sorted(forest.owner.tolist())
    assert forest.targets.numel() == sum(tree.targets for tree in trees)


@pytest.mark.parametrize("seed", range(10))
def test_every_token_is_a_query_once_and_sees_its_path_alone(seed):
    trees = random_trees(seed)
    forest = plant(trees)
    sees = {}
    for segment in forest.segments:
        for i in range(segment.length):
            assert segment.start + i not in sees
            prefix = range(segment.prefix_start, segment.prefix_start + segment.prefix_length)
            sees[segment.start + i] = [*prefix, *range(segment.start, segment.start + i + 1)]
    assert sorted(sees) == list(range(forest.tokens))
    for start, length, branch, more in forest.paths:
        whole = [*range(start, start + length), *range(branch, branch + more)]
        for position, token in enumerate(whole):
            assert sees[token] == whole[: position + 1]


@pytest.mark.parametrize("seed", range(5))
def test_padding_unfolds_the_same_sequences(seed):
    trees = random_trees(seed)
    forest = plant(trees)
    batch = pad(forest, pad_token_id=999)
    wholes = [whole for tree in trees for whole, _ in sequences(tree)]
    assert batch.input_ids.shape == (len(wholes), forest.longest)
    for row, mask, whole in zip(batch.input_ids.tolist(), batch.attention_mask.tolist(), wholes, strict=True):
        assert row == whole + [999] * (forest.longest - len(whole))
        assert mask == [1] * len(whole) + [0] * (forest.longest - len(whole))
    flat = batch.input_ids.flatten()
    assert flat[batch.sources].tolist() == forest.input_ids[forest.sources].tolist()
    assert flat[batch.sources + 1].tolist() == forest.targets.tolist()
    assert flat[batch.ends].tolist() == [whole[-1] for whole in wholes]


def test_rows_of_similar_length_go_together():
    assert alike([]) == []
    assert alike([5, 100, 13, 75, 74, 0]) == [[1, 3], [4], [2, 0], [5]]


class TestCutting:
    SIZES = (3, 4, 2, 9, 1, 1, 5)
    TREES = tuple(Tree([5] * size) for size in SIZES)

    @pytest.mark.parametrize(
        ("budget", "packs"),
        [
            (1, [[3], [4], [2], [9], [1], [1], [5]]),  # a tree above the budget gets a pack of its own, and one of it fits
            (7, [[3, 4], [2], [9], [1, 1, 5]]),
            (9, [[3, 4, 2], [9], [1, 1, 5]]),
            (25, [[3, 4, 2, 9, 1, 1, 5]]),
            (None, [[3, 4, 2, 9, 1, 1, 5]]),
        ],
    )
    def test_by_hand(self, budget, packs):
        assert [[tree.tokens for tree in pack] for pack in cut(self.TREES, budget)] == packs

    @pytest.mark.parametrize("budget", [1, 20, 50, None])
    def test_nothing_is_lost_or_moved(self, budget):
        trees = random_trees(3, 40)
        packs = list(cut(iter(trees), budget))
        assert [tree for pack in packs for tree in pack] == trees
        assert all(packs)
        if budget:
            assert all(len(pack) == 1 or sum(tree.tokens for tree in pack) <= budget for pack in packs)
            # No pack could have taken the first tree of the next.
            for pack, following in pairwise(packs):
                assert sum(tree.tokens for tree in pack) + following[0].tokens > budget

    def test_a_prompt_is_counted_once(self):
        assert Tree([5] * 10, ([6] * 3, [7] * 4)).tokens == 17
        assert Tree([5] * 10, ([6] * 3, [7] * 4)).longest == 14

    def test_nothing_gives_nothing(self):
        assert list(cut([], 5)) == []


class TestPacking:
    @pytest.mark.parametrize(
        ("budget", "packs"),
        [
            (1, [[9], [5], [4], [3], [2], [1], [1]]),
            (7, [[9], [5, 2], [4, 3], [1, 1]]),  # in order it would be 3 4 | 2 | 9 | 1 1 5
            (9, [[9], [5, 4], [3, 2, 1, 1]]),
            (25, [[9, 5, 4, 3, 2, 1, 1]]),
        ],
    )
    def test_by_hand(self, budget, packs):
        """The largest first, each into the first pack with room."""
        found = pack(TestCutting.TREES, budget)
        assert [[TestCutting.SIZES[i] for i in indices] for indices in found] == packs

    @pytest.mark.parametrize("budget", [1, 20, 50, 10_000])
    def test_every_tree_is_in_one_pack_within_the_budget(self, budget):
        trees = random_trees(3, 40)
        packs = pack(trees, budget)
        assert sorted(i for indices in packs for i in indices) == list(range(40))
        assert all(len(indices) == 1 or plant([trees[i] for i in indices]).tokens <= budget for indices in packs)
        assert pack(trees, budget) == packs

    def test_packs_are_fuller_than_cuts(self):
        """Lengths as in preference data, a few long among many short: no more than one pack above the fewest possible."""
        draw = random.Random(0)
        trees = [Tree([5] * min(int(draw.lognormvariate(5.5, 0.8)), 1024)) for _ in range(256)]
        fewest = -(-sum(tree.tokens for tree in trees) // 2048)
        assert fewest <= len(pack(trees, 2048)) <= fewest + 1
        assert len(list(cut(trees, 2048))) > fewest + 3

    def test_a_long_list_is_packed_in_windows(self):
        packs = pack([Tree([5] * 3)] * (WINDOW + 2), 6)
        assert len(packs) == WINDOW // 2 + 1
        assert packs[-1] == [WINDOW, WINDOW + 1]
        assert pack([], 6) == []

    def test_trees_of_one_prompt_are_packed_together(self):
        """Prompts of 4, branches of 2: three trees of one prompt are 4 + 3 * 2 = 10 tokens, not 18."""
        trees = [Tree([7 + i % 2] * 4, ([5, i],)) for i in range(6)]
        assert pack(trees, 10) == [[0, 2, 4], [1, 3, 5]]
        assert [plant([trees[i] for i in indices]).tokens for indices in pack(trees, 10)] == [10, 10]
        assert pack(trees, 8) == [[0, 2], [1, 3], [4], [5]]  # four tokens and two branches fit, a third does not

    def test_an_answer_of_several_trees_counts_once(self):
        """Prompt of 4, answers a, b, c of 2 in the three comparisons ab, ac, bc: 4 + 3 * 2 = 10 tokens."""
        a, b, c = [5, 1], [5, 2], [5, 3]
        trees = [Tree([7] * 4, pair) for pair in ((a, b), (a, c), (b, c))]
        assert pack(trees, 10) == [[0, 1, 2]]
        assert pack(trees, 9) == [[0], [1], [2]]  # two comparisons have all three answers


class TestDealing:
    def test_by_hand(self):
        """9 | 5, 5 + 4 = 9 | then 3 to the first, 2 to the second, 1 and 1 where less is: 13 and 12."""
        hands = deal(TestCutting.TREES, 2)
        assert [[TestCutting.TREES[i].tokens for i in hand] for hand in hands] == [[9, 3, 1], [5, 4, 2, 1]]

    @pytest.mark.parametrize("hands", [1, 2, 3, 8])
    def test_every_tree_is_dealt_once_and_shares_are_even(self, hands):
        trees = random_trees(4, 64)
        shares = deal(trees, hands)
        assert sorted(index for share in shares for index in share) == list(range(64))
        held = [sum(trees[index].tokens for index in share) for share in shares]
        assert max(held) - min(held) <= max(tree.tokens for tree in trees)
        assert deal(trees, hands) == shares

    def test_trees_of_one_prompt_stay_together_up_to_a_fair_share(self):
        trees = [Tree([7 + i % 2] * 4, ([5, i],)) for i in range(6)]
        assert deal(trees, 2) == [[0, 2, 4], [1, 3, 5]]
        same = [Tree([7] * 4, ([5, i],)) for i in range(6)]
        # 16 unique tokens, so a fair share is 8: two trees a group.
        assert [len(share) for share in deal(same, 2)] == [4, 2]

    def test_more_hands_than_trees(self):
        assert deal([Tree([5])], 3) == [[0], [], []]


class TestSharing:
    A, B = Tree([7, 8, 9], ([10], [11, 12]), values={"a": [1.0]}), Tree([7, 8, 9], ([13, 14], [15]), values={"a": [2.0]})

    def test_neighbours_of_one_prompt_are_laid_as_one_tree(self):
        ours = plant([Tree([5], ([6],), values={"a": [0.0]}), self.A, self.B])
        branches = (*self.A.branches, *self.B.branches)
        theirs = plant([Tree([5], ([6],), values={"a": [0.0]}), Tree([7, 8, 9], branches, values={"a": [1.0, 2.0]})])
        assert ours.trees == 3
        assert ours.sequences == 5
        for field in fields(ours):
            mine, other = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(mine, torch.Tensor):
                assert mine.tolist() == other.tolist(), field.name
            elif field.name in ("paths", "segments", "longest"):
                assert mine == other
        assert ours.values["a"].tolist() == theirs.values["a"].tolist()

    @pytest.mark.parametrize(
        "other",
        [
            Tree([7, 8], ([9],)),
            Tree([7, 8, 9], ([10],), prompt_mask=[False, True, True]),  # its prompt's own targets are counted for it
            Tree([7, 8, 9]),
        ],
    )
    def test_others_keep_a_prompt_of_their_own(self, other):
        first = Tree([7, 8, 9], ([10], [11, 12]))
        assert plant([first, other]).tokens == plant([other, first]).tokens == first.tokens + other.tokens
        assert plant([other, other]).tokens == (1 if other.shareable else 2) * other.tokens

    def test_an_answer_of_several_pairs_is_stored_once(self):
        """Prompt 7 8, answers a = 10 11, b = 12, c = 13 in the pairs ab, cb, ca: the prompt, then each answer where it is first."""
        a, b, c = [10, 11], [12], [13]
        forest = plant([Tree([7, 8], pair) for pair in ((a, b), (c, b), (c, a))])
        assert forest.input_ids.tolist() == [7, 8, *a, *b, *c]
        assert forest.position_ids.tolist() == [0, 1, 2, 3, 2, 2]
        assert forest.ends.tolist() == [3, 4, 5, 4, 5, 3]
        assert forest.targets.tolist() == [*a, *b, *c, *b, *c, *a]
        assert forest.sources.tolist() == [1, 2, 1, 1, 1, 1, 1, 2]
        assert forest.segments == (Segment(0, 4), Segment(4, 1, 0, 2), Segment(5, 1, 0, 2))

    @pytest.mark.parametrize("seed", range(5))
    def test_shared_prompts_change_neither_targets_nor_what_sequences_see(self, seed):
        draw = random.Random(seed)
        prompts = [tokens(draw, n) for n in (1, 4, 9)]
        answers = [tokens(draw, n) for n in (0, 1, 3, 3)]
        trees = [Tree(draw.choice(prompts), (tokens(draw, draw.randint(0, 4)), draw.choice(answers))) for _ in range(12)]
        shared, apart = plant(trees), pad(plant(trees))
        assert shared.tokens < sum(tree.tokens for tree in trees)
        wholes = [whole for tree in trees for whole, _ in sequences(tree)]
        assert [row[: len(whole)] for row, whole in zip(apart.input_ids.tolist(), wholes, strict=True)] == wholes
        assert shared.targets.numel() == sum(tree.targets for tree in trees)
        seen = [
            [*range(s.prefix_start, s.prefix_start + s.prefix_length), *range(s.start, s.start + i + 1)]
            for s in shared.segments
            for i in range(s.length)
        ]
        assert [places[-1] for places in seen] == list(range(shared.tokens))
        for start, length, branch, more in shared.paths:
            whole = [*range(start, start + length), *range(branch, branch + more)]
            assert all(seen[token] == whole[: position + 1] for position, token in enumerate(whole))


def test_values_travel_in_order():
    forest = plant([Tree([5], ([6],), values={"a": [1.0, 2.0], "b": [3.0]}), Tree([5], ([6],), values={"b": [4.0], "a": [5.0]})])
    assert forest.values["a"].tolist() == [1, 2, 5]
    assert forest.values["b"].tolist() == [3, 4]
    assert forest.values["a"].dtype == torch.float


@pytest.mark.parametrize(
    ("trees", "message"),
    [
        ([Tree([])], "at least one token"),
        ([Tree([], ([5], []))], "at least one token"),
        ([Tree([5, 6], prompt_mask=[True])], "the prompt has 2 tokens and its mask 1"),
        ([Tree([5], values={"a": [1.0]}), Tree([5])], "must carry the same values"),
    ],
)
def test_trees_that_make_no_sense(trees, message):
    with pytest.raises(ValueError, match=message):
        plant(trees)


def test_moving_takes_every_tensor_along():
    forest = plant([Tree([5, 6], ([7], [8]), values={"a": [1.0]})]).to("meta")
    tensors = [value for value in vars(forest).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 6
    assert all(tensor.is_meta for tensor in [*tensors, forest.values["a"]])
