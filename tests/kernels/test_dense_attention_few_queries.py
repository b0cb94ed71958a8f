"""Dense attention of few queries: what it does on a GPU, under Triton's interpreter where there is none."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longforge.kernels.dense_attention import few_queries, reference
from longforge.kernels.dense_attention.cases import Case as DenseCase
from longforge.kernels.dense_attention.cases import make_inputs
from longforge.kernels.layout import PackedLayout
from triton_device import DEVICES, need, on

CASE = DenseCase((37, 5, 18, 64), 8, 2, 32, 1, 16, 1, tail=2)


@pytest.mark.parametrize("order", ["split", "query"])
@pytest.mark.parametrize("device", DEVICES)
def test_the_whole_prefix_as_blocks_equals_the_reference(
    device: str, order: str, monkeypatch: pytest.MonkeyPatch
):
    need(device)
    inputs = make_inputs(CASE, torch.float32)
    wanted = reference.dense_attention(inputs.q, inputs.k, inputs.v, inputs.layout, None, 0.2)
    i = on(device, inputs)
    monkeypatch.setattr(few_queries, "SPLIT_BYTES", 1 << 28 if order == "split" else 0)
    got = few_queries.by_blocks(i.q, i.k, i.v, i.layout, 0.2)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4 if device == "cuda" else 2e-5)


def test_all_blocks_are_those_of_each_prefix():
    layout = make_inputs(CASE, torch.float32).layout
    blocks = few_queries.all_blocks(layout, 2)
    assert blocks.shape == (len(layout.positions), 2, 4) and blocks.is_contiguous()
    for row, position in zip(blocks[:, 1].tolist(), layout.positions.tolist(), strict=True):
        count = position // 16 + 1
        assert row == [*range(count), *[-1] * (4 - count)]


@pytest.mark.parametrize("window", [None, 9])
def test_gathering_asks_nothing_of_the_values(window: int | None):
    """Fake tensors have none: a question would be an error."""
    i = make_inputs(CASE, torch.float32)
    with FakeTensorMode() as fake:
        q, k, v = (fake.from_tensor(x) for x in (i.q, i.k, i.v))
        *parts, size = i.layout.parts
        layout = PackedLayout(*(fake.from_tensor(part) for part in parts), size)
        out, lse = few_queries.by_gathering(q, k, v, layout, window, 0.2)
        assert out.shape == q.shape and lse.shape == q.shape[:2]
        assert few_queries.all_blocks(layout, 2).dtype == torch.int32
