"""On a CUDA device MSA gives what it gives on the CPU, and a decode step never waits for the device. Run by
`make gpu`."""

from typing import Any

import pytest
import torch

from longforge.bench.inputs import DTYPES, make_inputs
from longforge.bench.selfcheck import check_operation
from longforge.bench.work import PHASES, Shape, Work
from longforge.kernels import msa_attention
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.select_blocks.api import BACKENDS as SELECTORS
from longforge.kernels.sparse_attention import sparse_attention
from longforge.kernels.sparse_attention.api import BACKENDS as ATTENTIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not {"triton"} <= set(SELECTORS) & set(ATTENTIONS), reason="no Triton"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("phase", PHASES)
def test_the_layer_of_m3_is_right_in_every_phase(phase: Any, dtype: str):
    check_operation(phase, Shape(), DTYPES[dtype], torch.device("cuda"))


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_values_and_gradients_equal_those_on_the_cpu(phase: Any):
    rng = torch.Generator().manual_seed(0)
    shapes = {"q": (8, 64), "k": (2, 64), "v": (2, 64), "index_q": (2, 32), "index_k": (32,)}
    given = {name: torch.randn(700, *shape, generator=rng) for name, shape in shapes.items()}
    results = []
    for device in ("cpu", "cuda"):
        leaves = {name: x.to(device).requires_grad_() for name, x in given.items()}
        ends = torch.tensor([0, 450, 700], device=device)
        out = msa_attention(**leaves, cu_seqlens=ends, block_size=32, top_k=4, phase=phase, index_loss=True)
        assert out.index_loss is not None
        (out.out.square().sum() + out.index_loss).backward()
        values = [out.out.detach(), out.lse, out.index_loss.detach(), *(x.grad for x in leaves.values())]
        results.append([x.cpu() for x in values if x is not None])
    assert len(results[0]) == len(results[1]) == 8
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-4)


@torch.no_grad()
def test_a_decode_step_runs_as_a_cuda_graph():
    shape = Shape()
    i = make_inputs(shape, Work.of("decode", 20_000, 1), torch.bfloat16, torch.device("cuda"))

    def step() -> torch.Tensor:
        blocks = select_blocks(i.index_q, i.index_k_pages, i.layout, shape.top_k)
        return sparse_attention(i.q, i.k_pages, i.v_pages, blocks, i.layout)[0]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    i.q.normal_()
    i.index_q.normal_()
    graph.replay()
    torch.testing.assert_close(out, step())
