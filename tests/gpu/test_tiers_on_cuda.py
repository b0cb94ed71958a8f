"""Pages of a pool on a CUDA device leave it and come back bit for bit. Run by `make gpu`."""

import pytest
import torch

from longforge.engine.tiers import RecordFormat
from small_tiers import PAGES, empty_like, name_of, page_bytes, small_pool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_records_do_not_depend_on_the_device():
    pool = small_pool()
    on_cuda = RecordFormat([tensor.cuda() for tensor in pool])
    name = name_of(0)
    assert on_cuda.layout == RecordFormat(pool).layout
    for page in range(PAGES):
        assert on_cuda.pack(page, name).tobytes() == RecordFormat(pool).pack(page, name).tobytes()


def test_a_page_comes_back_onto_the_device_alone():
    pool = small_pool()
    target = [tensor.cuda() for tensor in empty_like(pool)]
    assert RecordFormat(target).unpack(RecordFormat(pool).pack(2, name_of(0)), 4, name_of(0))
    back = [tensor.cpu() for tensor in target]
    assert page_bytes(back, 4) == page_bytes(pool, 2)
    for page in set(range(PAGES)) - {4}:
        assert page_bytes(back, page) == page_bytes(empty_like(pool), page)
