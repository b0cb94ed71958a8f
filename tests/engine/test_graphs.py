"""Batches padded into fixed buffers give what they give as they are, and touch nobody's pages."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from emulated_capture import EmulatedCapture, emulated_capture_for
from longforge.engine import Engine, GenerationRequest
from longforge.engine.draft_length import DraftCosts
from longforge.engine.graphs import Batch, Bucket, DecodeGraphs, bucket_of, capture_for
from longforge.model import CausalLM
from longforge.model.cache import KVCache
from small_batches import BATCHES, BLOCK, DRAFTS, PAGES, batch_of, layout_of, rows_of
from small_engine import one, run, tokens
from small_model import small_model


@dataclass
class Pair:
    """The same pages twice: for the eager passes, and for the graphs."""

    model: CausalLM
    eager: KVCache
    padded: KVCache
    graphs: DecodeGraphs
    capture: EmulatedCapture

    def refill(self) -> None:
        for mine, theirs in zip(self.eager.tensors, self.padded.tensors, strict=True):
            mine.fill_(torch.nan)
            theirs.fill_(torch.nan)

    def check(self) -> None:
        for mine, theirs in zip(self.eager.tensors, self.padded.tensors, strict=True):
            torch.testing.assert_close(theirs[:PAGES], mine[:PAGES], atol=1e-5, rtol=0, equal_nan=True)


def make(mixture: str) -> Pair:
    model = small_model(mixture)
    eager, padded = (KVCache(model.config, PAGES + 1, drafts=True) for _ in range(2))
    capture = EmulatedCapture()
    graphs = DecodeGraphs(model, padded, scratch=PAGES, rows_per_path=1 + DRAFTS, capture=capture)
    return Pair(model, eager, padded, graphs, capture)


def eager_step(pair: Pair, batch: Batch, cache: KVCache) -> Tensor:
    layout = layout_of(batch)
    hidden = pair.model.forward_packed(torch.from_numpy(batch.ids), layout, cache, expert_loads=False).hidden
    assert cache.tail is not None
    ends = layout.slots % BLOCK == BLOCK - 1
    cache.tail[layout.slots[ends] // BLOCK] = hidden[ends]
    return hidden


@pytest.mark.parametrize("mixture", ["sparse", "sliding"])
@torch.inference_mode()
def test_padded_steps_equal_those_as_they_are(mixture: str):
    pair = make(mixture)
    for turn in range(2):  # the second time every bucket holds what another batch left there
        for place, sizes in enumerate(BATCHES):
            pair.refill()
            whole = batch_of(sizes, 100 * turn + place)
            table, ids = whole.page_table, np.random.default_rng(turn).integers(0, 280, 4096)
            if any(total > now for total, now in sizes):
                spans = [(0, total - now) for total, now in sizes]
                for cache in (pair.eager, pair.padded):
                    eager_step(pair, rows_of(table, spans, ids), cache)
            now = rows_of(table, [(total - now, total) for total, now in sizes], ids)
            expected = eager_step(pair, now, pair.eager)
            given = pair.graphs.step(now)
            assert given is not None
            torch.testing.assert_close(given[0], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(given[1], pair.model.logits(expected), atol=1e-4, rtol=0)
            pair.check()
    assert pair.capture.replays == 2 * len(BATCHES) and pair.capture.captures == pair.graphs.captured


@pytest.mark.parametrize("mixture", ["sparse", "sliding"])
@torch.inference_mode()
def test_padded_passes_of_the_draft_module_equal_those_as_they_are(mixture: str):
    pair = make(mixture)
    for place, sizes in enumerate(BATCHES):
        pair.refill()
        whole = batch_of(sizes, place)
        ids = np.random.default_rng(place).integers(0, 280, 4096)
        spans = [[(0, total - now) for total, now in sizes], [(total - now, total) for total, now in sizes]]
        steps = [rows_of(whole.page_table, span, ids) for span in spans if any(b > a for a, b in span)]
        for batch in steps:
            before = torch.randn(len(batch.ids), 24)
            arguments = (before, torch.from_numpy(batch.ids), layout_of(batch))
            expected = pair.model.mtp_packed(*arguments, cache=pair.eager).hidden
            given = pair.graphs.draft(batch, before)
            if given is None:  # a prompt
                assert batch is not steps[-1]
                given = pair.model.mtp_packed(*arguments, cache=pair.padded).hidden
            torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
            pair.check()
    assert pair.capture.replays >= len(BATCHES)


def test_hidden_states_outlive_the_next_replay():
    pair = make("sparse")
    with torch.inference_mode():
        first = pair.graphs.step(batch_of([(3, 3)], 0))
        assert first is not None
        kept, copied = first[0], first[0].clone()
        pair.graphs.step(batch_of([(2, 2)], 1))
    assert torch.equal(kept, copied)


@pytest.mark.parametrize(
    ("paths", "rows", "blocks", "expected"),
    [
        (1, 1, 1, Bucket(1, 1, 1)),
        (1, 2, 1, Bucket(1, 4, 1)),
        (3, 3, 5, Bucket(4, 4, 8)),
        (3, 4, 5, Bucket(4, 4, 8)),
        (5, 9, 2, Bucket(8, 32, 8)),
        (64, 256, 9, Bucket(64, 256, 64)),
        (1, 5, 2, None),
        (65, 65, 2, None),
    ],
)
def test_a_batch_goes_to_the_smallest_bucket_that_holds_it(
    paths: int, rows: int, blocks: int, expected: Bucket | None
):
    some = np.zeros(rows, dtype=np.int64)
    batch = Batch(some, some, some, some, np.zeros((paths, blocks), dtype=np.int32))
    assert bucket_of(batch, BLOCK, 1 + DRAFTS) == expected


def emulate(monkeypatch: pytest.MonkeyPatch) -> EmulatedCapture:
    capture = EmulatedCapture()
    monkeypatch.setattr(
        "longforge.engine.runner.capture_for",
        lambda model, wanted: capture if emulated_capture_for(model, wanted) else None,
    )
    return capture


def test_decoding_is_replayed_and_prompts_are_not(monkeypatch: pytest.MonkeyPatch):
    capture = emulate(monkeypatch)
    engine = Engine(small_model(), pages=24)
    events = one(engine, tokens(9, 1))
    assert capture.replays == engine.stats().steps - 1 == len(events) - 1
    assert capture.captures <= 3  # one path, tables of 4, 8 and 16 pages


@pytest.mark.parametrize("drafts", [0, 2])
def test_warming_up_captures_short_prefixes_and_changes_nothing(monkeypatch: pytest.MonkeyPatch, drafts: int):
    capture = emulate(monkeypatch)
    # With costs that are given, not measured, both guess alike, and the same rows go together.
    costs = DraftCosts()
    cold = one(Engine(small_model(), pages=24, drafts=drafts, draft_costs=costs), tokens(3, 1))
    engine = Engine(small_model(), pages=24, max_running=3, drafts=drafts, draft_costs=costs)
    engine.warm_up()
    captured = capture.captures
    assert one(engine, tokens(3, 1)) == cold
    # Tables of 1, 2 and 4 pages: with drafts the graphs of all of them are new but the narrowest.
    assert capture.captures - captured <= (8 if drafts else 3)
    engine.check_pages()


def test_many_lengths_share_few_graphs(monkeypatch: pytest.MonkeyPatch):
    capture = emulate(monkeypatch)
    engine = Engine(small_model(), pages=80, drafts=2)
    run(engine, *(GenerationRequest(str(i), tokens(3 + i, i)) for i in range(12)))
    assert capture.replays > 2 * capture.captures


def test_reported_blocks_are_those_of_the_pass_without_a_graph(monkeypatch: pytest.MonkeyPatch):
    plain = one(Engine(small_model(), pages=24), tokens(9, 1), report_blocks=True)
    capture = emulate(monkeypatch)
    engine = Engine(small_model(), pages=24)
    assert [e.blocks for e in one(engine, tokens(9, 1), report_blocks=True)] == [e.blocks for e in plain]
    assert capture.replays == 0


def test_without_graphs_the_pool_has_no_page_for_padding(monkeypatch: pytest.MonkeyPatch):
    emulate(monkeypatch)
    with_page, without = (Engine(small_model(), pages=7, cuda_graphs=wanted) for wanted in (True, False))
    assert with_page.stats().pages == without.stats().pages == 7
    assert [engine._runner.cache.pages for engine in (with_page, without)] == [8, 7]


def test_models_on_a_cpu_have_no_graphs():
    assert capture_for(small_model(), True) is None
