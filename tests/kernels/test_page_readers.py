"""The selection turned round, against the plain loop over queries."""

import pytest
import torch

from longforge.kernels.msa_cases import Case, make_inputs
from longforge.kernels.page_readers import cut, readers
from longforge.kernels.select_blocks import select_blocks

CASES = (
    Case((1,), 1, 1, 3, 3, 4, 1),
    Case((37, 5, 18), 6, 3, 7, 5, 4, 3),
    Case((130, 16, 1, 33), 4, 2, 16, 8, 16, 4),
    Case((90, 41), 4, 2, 16, 8, 16, 3, tail=2),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def read_of(case: Case):
    inputs = make_inputs(case)
    blocks = select_blocks(inputs.index_q, inputs.index_k, inputs.layout, case.top_k, backend="reference")
    return inputs, blocks, readers(blocks, inputs.layout, inputs.k.shape[0])


@each_case
def test_each_page_and_group_has_its_readers_in_order(case: Case):
    inputs, blocks, read = read_of(case)
    layout, size = inputs.layout, case.block_size
    wanted: dict[int, list[tuple[int, int]]] = {}
    for n in range(blocks.shape[0]):
        for g in range(case.groups):
            for slot, block in enumerate(blocks[n, g].tolist()):
                if block >= 0:
                    page = int(layout.page_table[layout.paths[n], block])
                    seen = min(size, int(layout.positions[n]) - block * size + 1)
                    entry = (n * case.groups + g) * blocks.shape[2] + slot
                    wanted.setdefault(page * case.groups + g, []).append((entry, seen))
    for segment in range(inputs.k.shape[0] * case.groups):
        mine = slice(int(read.starts[segment]), int(read.starts[segment + 1]))
        got = list(zip(read.entries[mine].tolist(), read.seen[mine].tolist(), strict=True))
        assert got == wanted.get(segment, [])
        assert int(read.deepest[segment]) == max((seen for _, seen in got), default=0)
    assert torch.equal(read.shown > 0, blocks >= 0)


@each_case
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_pieces_cover_every_segment_once(case: Case, size: int):
    _, _, read = read_of(case)
    pieces = cut(read, size)
    covered, rooms = [], []
    for segment, first, count, room in zip(
        *(x.tolist() for x in (pieces.segment, pieces.first, pieces.count, pieces.room)), strict=True
    ):
        assert 0 <= count <= size
        if count:
            assert int(read.starts[segment]) <= first and first + count <= int(read.starts[segment + 1])
            covered += range(first, first + count)
            several = int(pieces.segment_pieces[segment]) > 1
            assert (room >= 0) == several
            if several:
                begin = int(pieces.segment_room[segment])
                assert begin <= room < begin + int(pieces.segment_pieces[segment])
                rooms.append(room)
    assert sorted(covered) == list(range(int(read.starts[-1])))
    assert sorted(rooms) == list(range(len(rooms))) and len(rooms) <= pieces.rooms


def test_a_missing_page_is_not_read():
    case = CASES[1]
    inputs, blocks, _ = read_of(case)
    inputs.layout.page_table[0, 1] = -1
    read = readers(blocks, inputs.layout, inputs.k.shape[0])
    hidden = (blocks == 1) & (inputs.layout.paths == 0)[:, None, None]
    assert bool(hidden.any()) and torch.equal(read.shown > 0, (blocks >= 0) & ~hidden)


def test_no_queries_have_no_readers():
    inputs, _, _ = read_of(CASES[0])
    empty = torch.empty((0, 1, 2), dtype=torch.int32)
    layout = type(inputs.layout)(
        *(x[:0] for x in (inputs.layout.positions, inputs.layout.paths, inputs.layout.slots)),
        inputs.layout.page_table,
        inputs.layout.block_size,
    )
    read = readers(empty, layout, 3)
    assert read.entries.numel() == 0 and not read.starts.any() and not cut(read, 4).count.any()
