"""Block selection: the rule itself, and that every way of asking gives the same blocks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels.layout import PackedLayout, as_pages
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.select_blocks.api import BACKENDS
from longforge.kernels.select_blocks.cases import CASES, Case, Inputs, make_inputs, take

# "triton" has tests of its own, on a GPU or in the interpreter.
each_backend = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def choose(inputs: Inputs, top_k: int, backend: str | None = None) -> Tensor:
    return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, top_k, backend=backend)


def chosen_by_hand(inputs: Inputs, top_k: int) -> list[list[list[int]]]:
    """The rule, one number at a time: no tensors, sorting by (-score, block)."""
    layout, size = inputs.layout, inputs.layout.block_size
    q, k = inputs.index_q.float().numpy(), inputs.index_k.float().numpy()
    result = []
    for n, (position, path) in enumerate(zip(layout.positions.tolist(), layout.paths.tolist(), strict=True)):
        own, groups = position // size, []
        for query in q[n]:
            ranked = []
            for block in range(own):
                page = int(layout.page_table[path, block])
                best = -np.inf
                for key in k[page]:
                    score = np.float32(0)
                    for x, y in zip(query, key, strict=True):
                        score = np.float32(score + np.float32(x * y))
                    best = max(best, float(score))
                ranked.append((-best, block))
            ids = sorted([block for _, block in sorted(ranked)[: top_k - 1]] + [own])
            groups.append(ids + [-1] * (top_k - len(ids)))
        result.append(groups)
    return result


@each_backend
def test_choice_is_the_rule_computed_by_hand(backend: str):
    for seed, case in enumerate(CASES[:2]):
        inputs = make_inputs(case, seed=seed)
        assert choose(inputs, case.top_k, backend).tolist() == chosen_by_hand(inputs, case.top_k)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_fast_path_chooses_exactly_what_the_reference_chooses(case: Case, dtype: torch.dtype):
    inputs = make_inputs(case, dtype)
    assert torch.equal(choose(inputs, case.top_k, "cpu"), choose(inputs, case.top_k, "reference"))


@each_backend
@each_case
def test_own_block_takes_one_slot_and_ids_ascend_before_the_padding(case: Case, backend: str):
    inputs = make_inputs(case)
    blocks = choose(inputs, case.top_k, backend)
    own = inputs.layout.positions // case.block_size
    assert blocks.dtype == torch.int32
    assert blocks.shape == (*inputs.index_q.shape[:2], case.top_k)
    for row, mine in zip(blocks.tolist(), own.tolist(), strict=True):
        for ids in row:
            real = [b for b in ids if b >= 0]
            assert ids == real + [-1] * (case.top_k - len(real)), "padding stands at the end"
            assert real == sorted(set(real)) and real[-1] == mine, "ascending, own block last"
            assert len(real) == min(case.top_k, mine + 1), "no slot is wasted, none is added"


@each_backend
def test_ties_go_to_the_lower_block(backend: str):
    layout = PackedLayout.from_lengths([50], 4)
    equal = as_pages(torch.ones(50, 3), layout)
    blocks = select_blocks(torch.ones(50, 1, 3), equal, layout, 4, backend=backend)
    assert blocks[-1, 0].tolist() == [0, 1, 2, 12]
    # One better block takes the first place, the tie fills what is left from the front.
    better = equal.clone()
    better[7, 2] = 2.0
    blocks = select_blocks(torch.ones(50, 1, 3), better, layout, 4, backend=backend)
    assert blocks[-1, 0].tolist() == [0, 1, 7, 12]


@each_backend
def test_a_block_counts_by_its_best_token_not_by_its_mean(backend: str):
    layout = PackedLayout.from_lengths([16], 4)
    keys = torch.zeros(16, 1)
    keys[4:8] = 1.0
    keys[1], keys[0], keys[2] = 1.5, -9.0, -9.0
    blocks = select_blocks(torch.ones(16, 1, 1), as_pages(keys, layout), layout, 2, backend=backend)
    assert blocks[-1, 0].tolist() == [0, 3]


@each_backend
def test_groups_choose_for_themselves(backend: str):
    layout = PackedLayout.from_lengths([24], 4)
    keys = torch.zeros(24, 2)
    keys[2, 0], keys[13, 1] = 1.0, 1.0
    q = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(24, 2, 2)
    blocks = select_blocks(q, as_pages(keys, layout), layout, 2, backend=backend)
    assert blocks[-1].tolist() == [[0, 5], [3, 5]]


@each_backend
def test_no_query_is_moved_by_a_key_after_it(backend: str):
    case = CASES[1]
    inputs = make_inputs(case)
    before = choose(inputs, case.top_k, backend)
    late = inputs.layout.slots[inputs.layout.positions >= 10]
    loud = inputs.index_k.clone().flatten(0, 1).index_fill(0, late, 1e6).view_as(inputs.index_k)
    after = choose(replace(inputs, index_k=loud), case.top_k, backend)
    early = inputs.layout.positions < 10
    assert torch.equal(before[early], after[early])


@each_backend
@each_case
def test_physical_places_of_pages_do_not_matter(case: Case, backend: str):
    inputs = make_inputs(case)
    order = torch.randperm(inputs.index_k.shape[0], generator=torch.Generator().manual_seed(5))
    table = inputs.layout.page_table
    moved = torch.where(table < 0, -1, order[table.long().clamp(min=0)]).int()
    pages = torch.empty_like(inputs.index_k)
    pages[order] = inputs.index_k
    other = replace(inputs, layout=replace(inputs.layout, page_table=moved), index_k=pages)
    assert torch.equal(choose(inputs, case.top_k, backend), choose(other, case.top_k, backend))


@each_backend
@each_case
def test_chunks_choose_what_the_whole_chooses(case: Case, backend: str):
    inputs = make_inputs(case)
    whole = choose(inputs, case.top_k, backend)
    for step in (1, 7, 64):
        for rows in torch.arange(len(whole)).split(step)[:: max(1, 24 // step)]:
            assert torch.equal(choose(take(inputs, rows), case.top_k, backend), whole[rows])


def test_number_of_threads_does_not_matter():
    case = Case((900, 700), 8, 4, 32, 32, 16, 8)
    inputs = make_inputs(case)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = choose(inputs, case.top_k)
        torch.set_num_threads(2)
        together = choose(inputs, case.top_k)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@each_backend
def test_a_budget_of_all_blocks_selects_all(backend: str):
    inputs = make_inputs(CASES[1])
    blocks = choose(inputs, 40, backend)
    own = inputs.layout.positions // CASES[1].block_size
    everything = torch.arange(40)
    wanted = torch.where(everything <= own[:, None], everything, -1)
    assert torch.equal(blocks, wanted[:, None, :].expand_as(blocks).int())


def test_a_slab_of_scores_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    case = CASES[3]
    inputs = make_inputs(case)
    whole = choose(inputs, case.top_k)
    monkeypatch.setattr("longforge.kernels.select_blocks.cpu.SCRATCH", 1)
    assert torch.equal(choose(inputs, case.top_k), whole)


def test_selection_has_no_gradient():
    inputs = make_inputs(CASES[1])
    inputs.index_q.requires_grad_()
    assert not choose(inputs, 3).requires_grad


def test_what_does_not_fit_is_refused_in_one_line():
    inputs = make_inputs(CASES[1])
    with pytest.raises(InputError, match=r"top_k of at least 1 expected .* got 0"):
        choose(inputs, 0)
    with pytest.raises(InputError, match=r"one of reference, cpu.* expected, got 'gpu'"):
        choose(inputs, 2, "gpu")
    with pytest.raises(InputError, match=r"index_k_pages \[S, Bk, Di\] = \[any, any, 5\] expected"):
        choose(replace(inputs, index_k=inputs.index_k[..., :4]), 2)
    with pytest.raises(InputError, match=r"index_k_pages \[S, 4, ...\] expected"):
        choose(replace(inputs, index_k=inputs.index_k[:, :3]), 2)
    with pytest.raises(InputError, match="index_k_pages like index_q"):
        choose(replace(inputs, index_k=inputs.index_k.double()), 2)
    with pytest.raises(InputError, match="as many queries as the layout has tokens"):
        choose(replace(inputs, index_q=inputs.index_q[1:]), 2)
