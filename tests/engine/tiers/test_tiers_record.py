"""Records: a page comes back bit for bit, or nothing is touched."""

import numpy as np
import pytest
import torch

from longforge.engine.tiers import RecordFormat
from longforge.engine.tiers.record import HEADER_BYTES, HostRows, Record, StagedRows, is_whole, sealed_header
from longforge.errors import InputError
from longforge.model import KVCache
from small_model import small_config
from small_tiers import PAGES, digest, empty_like, name_of, page_bytes, small_format, small_pool

NAME = name_of(0)


def sealed(record: Record) -> Record:
    return np.concatenate([np.frombuffer(sealed_header(record), np.uint8), record[HEADER_BYTES:]])


def test_a_page_of_any_dtype_comes_back_bit_for_bit_and_alone():
    pool = small_pool()
    target = empty_like(pool)
    record = RecordFormat(pool).pack(2, NAME)
    assert RecordFormat(target).unpack(record, 4, NAME)
    assert page_bytes(target, 4) == page_bytes(pool, 2)
    for page in set(range(PAGES)) - {4}:
        assert page_bytes(target, page) == page_bytes(empty_like(pool), page)


@pytest.mark.parametrize("mixture", ["sparse", "sliding", "lightning"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_of_a_cache_travels(mixture: str, dtype: torch.dtype):
    def cache(seed: int) -> list[torch.Tensor]:
        pool = KVCache(small_config(mixture), 3, dtype=dtype)
        held = [t for kind in (pool.k, pool.v, pool.index_k, pool.state) for t in kind if t is not None]
        generator = torch.Generator().manual_seed(seed)
        return [t.copy_(torch.randn(t.shape, generator=generator)) for t in held]

    source, target = cache(1), cache(2)
    assert RecordFormat(target).unpack(RecordFormat(source).pack(0, NAME), 2, NAME)
    assert page_bytes(target, 2) == page_bytes(source, 0)


def test_a_record_is_a_copy():
    pool = small_pool()
    record = RecordFormat(pool).pack(1, NAME)
    before = page_bytes(pool, 1)
    for tensor in pool:
        tensor.zero_()
    assert RecordFormat(pool).unpack(record, 1, NAME)
    assert page_bytes(pool, 1) == before


def test_rows_through_a_staging_page_are_the_rows():
    pool = small_pool()
    rows = [tensor.reshape(PAGES, -1).view(torch.uint8) for tensor in pool]
    direct, staged = (np.empty(sum(row.shape[1] for row in rows), np.uint8) for _ in range(2))
    HostRows(rows).read(3, direct)
    staging = StagedRows(rows)
    staging.read(3, staged)
    assert staged.tobytes() == direct.tobytes() == b"".join(page_bytes(pool, 3))
    staging.write(5, direct)
    assert page_bytes(pool, 5) == page_bytes(pool, 3)


def test_a_sealed_record_is_whole_and_an_unsealed_one_is_not():
    record = small_format().pack(0, NAME)
    assert is_whole(sealed(record), NAME)
    assert not is_whole(record, NAME)
    assert not is_whole(sealed(record), name_of(1))
    assert not is_whole(sealed(record), name_of(0, digest("another namespace")))


def test_no_flipped_bit_goes_unseen():
    record = sealed(small_format().pack(0, NAME))
    for position in range(record.size):
        for bit in (0, 7):
            damaged = record.copy()
            damaged[position] ^= 1 << bit
            assert not is_whole(damaged, NAME), position


def test_no_other_length_is_whole():
    record = sealed(small_format().pack(0, NAME))
    for length in range(record.size):
        assert not is_whole(record[:length], NAME), length
    assert not is_whole(np.append(record, np.uint8(0)), NAME)


def test_what_does_not_fit_changes_nothing():
    pool = small_pool()
    form = RecordFormat(pool)
    record = form.pack(0, NAME)
    wider = RecordFormat(small_pool(width=4)).pack(0, NAME)
    before = [page_bytes(pool, page) for page in range(PAGES)]
    assert not form.unpack(record, 1, name_of(1))
    assert not form.unpack(record, 1, name_of(0, digest("another namespace")))
    assert not form.unpack(wider, 1, NAME)
    for length in (0, 1, HEADER_BYTES - 1, HEADER_BYTES, record.size - 1):
        assert not form.unpack(record[:length], 1, NAME)
    assert [page_bytes(pool, page) for page in range(PAGES)] == before


def test_the_layout_names_what_is_in_a_record_and_in_which_order():
    pool = [torch.zeros(3, 4, 2, dtype=torch.bfloat16), torch.zeros(3)]
    assert RecordFormat(pool).layout == "1:bfloat16[4,2];float32[]"
    assert RecordFormat(pool[::-1]).layout == "1:float32[];bfloat16[4,2]"


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ([], "at least one tensor"),
        ([torch.zeros(3, 2), torch.zeros(2, 2)], r"tensor 1: \[3, \.\.\.\] with values"),
        ([torch.zeros(3, 2), torch.zeros(3, 0)], r"tensor 1: \[3, \.\.\.\] with values"),
        ([torch.zeros(())], r"tensor 0: \[pages, \.\.\.\]"),
        ([torch.zeros(3, 2), torch.zeros(3, 2, device="meta")], "tensor 1: device cpu"),
        ([torch.zeros(2, 3).T], "tensor 0: contiguous memory"),
    ],
)
def test_pools_that_are_not_pages_are_refused(tensors: list[torch.Tensor], told: str):
    with pytest.raises(InputError, match=told):
        RecordFormat(tensors)
