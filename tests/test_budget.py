"""Budgets of tokens: backing off when memory runs out, growing to what memory holds."""

import pytest
import torch

from align.budget import START, Budget, measuring, out_of_memory
from align.errors import AlignError
from align.forest import Tree

NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
TREES = [Tree([5] * size) for size in (3, 4, 2, 9, 1, 1, 5)]


class Machine:
    """Work that needs a forest to be of at most `limit` tokens."""

    def __init__(self, limit, error=NO_MEMORY):
        self.limit, self.error, self.done = limit, error, []

    def __call__(self, packed):
        self.done.append([])
        for indices, forest in packed:
            if forest.tokens > self.limit:
                raise self.error
            self.done[-1].append(indices)
        return sum(forest.tokens for _, forest in packed)


def test_work_gets_forests_and_the_indices_of_their_trees():
    budget = Budget(9)
    assert budget.fit(TREES, lambda packed: [(indices, forest.tokens) for indices, forest in packed]) == [
        ([3], 9),
        ([6, 1], 9),
        ([0, 2, 4, 5], 7),
    ]
    assert budget.fit([], len) == 0
    assert budget.tokens == 9


@pytest.mark.parametrize(
    "error",
    [
        NO_MEMORY,
        torch.OutOfMemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_work_is_done_again_whole_with_half_the_tokens_and_the_budget_stays_low(error, capsys):
    """25 tokens fail, so do 12 (9 and 3 in one forest), and forests of 6 hold; the row of 9 is above that, and fits alone."""
    budget, machine = Budget(100), Machine(9, error)
    assert budget.fit(TREES, machine) == 25
    assert sorted(i for indices in machine.done[-1] for i in indices) == list(range(7))
    assert budget.tokens == 6
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "out of memory with forests of up to 25 tokens; doing it again, and going on, with 12",
        "out of memory with forests of up to 12 tokens; doing it again, and going on, with 6",
    ]
    again = Machine(9)
    budget.fit(TREES, again)
    assert len(again.done) == 1


def test_a_row_that_does_not_fit_by_itself_is_named():
    with pytest.raises(AlignError, match=r"out of memory on a row of 9 tokens by itself \(CUDA out of memory.*\)\. Lower"):
        Budget(100).fit(TREES, Machine(8))


def test_a_process_that_others_wait_for_does_not_go_back():
    budget = Budget(100)
    with pytest.raises(AlignError, match=r"up to 25 tokens .* set max_tokens_per_micro_batch to 12 or less"):
        budget.fit(TREES, Machine(9), alone=False)
    assert budget.fit(TREES, Machine(100), alone=False) == 25


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert not out_of_memory(error)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Budget(100).fit(TREES, Machine(9, error))


def test_auto_grows_to_what_memory_holds_and_never_beyond():
    """A made-up device: 2 GB in use, 1 GB of gradients and 1 MB a token in work, 20 GB to use: 17 GB / 1 MB tokens fit."""
    budget, most = Budget("auto"), 17_000
    assert budget.tokens == START
    seen = []
    for _ in range(12):
        seen.append(budget.tokens)
        budget.grow(budget.tokens, 2e9, 2e9 + 1e9 + 1e6 * budget.tokens, 20e9)
    assert seen[1] <= 2 * START
    assert seen == sorted(seen)
    assert most * 0.99 < budget.tokens <= most


def test_auto_shrinks_where_work_took_more_than_its_share():
    budget = Budget("auto")
    budget.grow(START, 1e9, 17e9, 9e9)  # half of the 16 GB
    assert budget.tokens == START // 2


def test_auto_learns_nothing_from_forests_that_are_nearly_empty():
    budget = Budget("auto")
    budget.grow(START // 2 - 1, 2e9, 3e9, 20e9)
    assert budget.tokens == START
    budget.grow(START // 2, 2e9, 3e9, 20e9)
    assert budget.tokens == 2 * START


def test_only_auto_grows():
    assert not Budget(100).grows
    assert Budget("auto").grows == torch.cuda.is_available()


def test_passes_without_gradients_take_more_on_a_gpu(monkeypatch):
    assert measuring(100).tokens == (400 if torch.cuda.is_available() else 100)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert measuring(100).tokens == 400
    assert measuring("auto").tokens == START


def test_auto_learns_from_work_that_tells_until_memory_runs_out(monkeypatch):
    """A made-up device: 1 GB in use, 3 GB of 100 free and 2 GB to be had back, and a peak of 2 GB: 3.25 of 1 times the forest."""
    memory = {"memory_allocated": 1e9, "max_memory_allocated": 2e9, "memory_reserved": 2e9, "mem_get_info": (3e9, 100e9)}
    for name, answer in {**memory, "reset_peak_memory_stats": None, "is_available": True}.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr("align.budget.clear_device_cache", lambda: None)
    budget, rows = Budget("auto"), [Tree([5] * 4000), Tree([5] * 1000)]
    budget.fit(rows, len, telling=False)
    assert budget.tokens == START
    budget.fit(rows, len)
    assert budget.tokens == int(5000 * (0.85 * 5 - 1)) == 16_250
    budget.fit(rows, Machine(4000))
    assert budget.tokens == 2500
    budget.fit(rows, len)
    assert budget.tokens == 2500, "what memory did not hold once, it is not asked to hold again"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_auto_on_a_device_fills_its_share_of_memory():
    """Work that takes 1 MiB a token: the budget settles below 85 % of what is free, and no work ever fails."""
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    budget, most = Budget("auto"), int(0.85 * free / 2**20)
    budget.tokens = max(most // 100, 1)
    for _ in range(12):
        eighths = [Tree([5] * max(budget.tokens // 8, 1))] * 8
        budget.fit(eighths, lambda packed: [hold(forest.tokens) for _, forest in packed])
    assert 0.9 * most < budget.tokens <= most * 1.01
    assert budget.grows


def hold(mebibytes):
    return torch.empty(mebibytes * 2**20, dtype=torch.uint8, device="cuda").numel()
