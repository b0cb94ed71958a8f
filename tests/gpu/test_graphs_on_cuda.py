"""On a CUDA device decoding runs as CUDA graphs, never waits but for tokens, and says the same. Run by
`make gpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch

from longforge.engine import Engine, GenerationRequest, sampler_torch
from longforge.engine.draft_length import DraftCosts
from longforge.engine.graphs import DecodeGraphs, capture_for
from longforge.engine.sampler import Row, sample
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.dense_attention.cases import Case, make_inputs
from longforge.kernels.select_blocks.api import BACKENDS
from longforge.model import CausalLM, shipped
from longforge.model.cache import KVCache
from longforge.protocol import SamplingParams
from small_batches import BATCHES, BLOCK, DRAFTS, PAGES, batch_of, layout_of, rows_of
from small_engine import run
from small_model import small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton"),
]

FREE = DraftCosts(rows=(1,), step=(1.0,), draft=(0.0,))


@contextmanager
def no_waiting() -> Iterator[None]:
    """What makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cache
def micro(dtype: torch.dtype) -> CausalLM:
    return CausalLM.from_pretrained(shipped.path(), dtype=dtype, device="cuda")


@pytest.mark.parametrize("mixture", ["sparse", "sliding"])
@torch.inference_mode()
def test_replays_equal_the_passes_they_captured_and_never_wait(mixture: str):
    model = small_model(mixture).to("cuda")
    eager, padded = (KVCache(model.config, PAGES + 1, "cuda", drafts=True) for _ in range(2))
    capture = capture_for(model, True)
    assert capture is not None
    graphs = DecodeGraphs(model, padded, scratch=PAGES, rows_per_path=1 + DRAFTS, capture=capture)
    for turn in range(2):
        for place, sizes in enumerate(BATCHES):
            table, ids = batch_of(sizes, place).page_table, np.random.default_rng(turn).integers(0, 280, 4096)
            before = rows_of(table, [(0, total - now) for total, now in sizes], ids)
            for pool in (eager, padded):
                for tensor in pool.tensors:
                    tensor.fill_(torch.nan)
                if len(before.ids):
                    prefix, where = torch.from_numpy(before.ids).cuda(), layout_of(before, "cuda")
                    hidden = model.forward_packed(prefix, where, pool).hidden
                    model.mtp_packed(hidden, prefix, where, cache=pool)
            batch = rows_of(table, [(total - now, total) for total, now in sizes], ids)
            layout, on_device = layout_of(batch, "cuda"), torch.from_numpy(batch.ids).cuda()
            expected = model.forward_packed(on_device, layout, eager).hidden
            drafted = model.mtp_packed(expected, on_device, layout, cache=eager).hidden
            if turn == 0:  # captures, which waits
                graphs.step(batch)
                graphs.draft(batch, expected)
            with no_waiting():
                given, draft = graphs.step(batch), graphs.draft(batch, expected)
            assert given is not None and draft is not None
            torch.testing.assert_close(given[0], expected, atol=2e-4, rtol=0)
            torch.testing.assert_close(given[1], model.logits(expected), atol=2e-3, rtol=0)
            torch.testing.assert_close(draft, drafted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drafts", [0, 3])
def test_tokens_with_graphs_are_those_without(drafts: int, dtype: torch.dtype):
    prompts = [tuple(np.random.default_rng(i).integers(300, 330, 5 + 9 * i).tolist()) * 3 for i in range(5)]
    asked = [
        GenerationRequest(str(i), prompt, SamplingParams(max_tokens=40, temperature=0.5 * (i % 2), seed=i))
        for i, prompt in enumerate(prompts)
    ]
    answers = []
    for cuda_graphs in (True, False):
        engine = Engine(
            micro(dtype), pages=200, max_running=4, drafts=drafts, draft_costs=FREE, cuda_graphs=cuda_graphs
        )
        engine.warm_up()
        assert (engine._runner._graphs is not None) == cuda_graphs
        answers.append(run(engine, *asked))
    with_graphs, without = answers
    for name, events in with_graphs.items():
        others = without[name]
        same = sum(a.token_id == b.token_id for a, b in zip(events, others, strict=True))
        # Products of other sizes are rounded otherwise: in bf16 that may turn a token, and all behind it.
        assert same == len(events) if dtype == torch.float32 else same >= 1
        assert abs(events[0].logprob - others[0].logprob) < (1e-3 if dtype == torch.float32 else 0.3)


def test_the_sampler_waits_for_its_result_alone():
    logits = torch.randn(3, 500, device="cuda")
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, logit_bias=((3, 1.0),))
    mask = np.full(-(-500 // 32), 0x55555555, dtype=np.uint32)
    rows = [Row(params, seed=at, position=at, mask=mask if at else None) for at in range(3)]
    expected = sample(logits.cpu(), rows)
    sample(logits, rows)  # tables go to the device
    with no_waiting():
        found = sampler_torch.drawn(logits, rows)
    assert found[0].tolist() == expected.token_ids == sample(logits, rows).token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 40])
@torch.no_grad()
def test_dense_attention_of_few_queries_equals_the_reference_and_never_waits(
    window: int | None, dtype: torch.dtype
):
    i = make_inputs(Case((300, 5, 18, 64), 8, 2, 64, 1, 32, 1, tail=3), dtype)
    layout = i.layout
    moved = type(layout)(*(part.cuda() for part in layout.parts[:4]), layout.block_size)
    inputs = i.q.cuda(), i.k.cuda(), i.v.cuda()
    dense_attention(*inputs, moved, window=window)
    with no_waiting():
        got = dense_attention(*inputs, moved, window=window)
    wanted = dense_attention(i.q, i.k, i.v, layout, window=window, backend="reference")
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-2)


@torch.no_grad()
def test_logits_in_bf16_are_those_of_the_head_in_fp32():
    model = micro(torch.bfloat16)
    hidden = torch.randn(7, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    wanted = torch.nn.functional.linear(hidden.double(), model.head_weight.double())
    got = model.logits(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


def test_pages_are_of_the_small_models_size():
    """What the batches above take for granted."""
    assert small_model().config.block_size == BLOCK
