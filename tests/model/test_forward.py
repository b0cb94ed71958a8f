"""One forward for training, prefill and decode: the same numbers however the tokens come."""

from itertools import pairwise

import pytest
import torch

from longforge.errors import ContextOverflow, InputError
from longforge.kernels.layout import PackedLayout
from longforge.model import KVCache

MIXERS = {
    "m2": ("full/moe", "full/moe"),
    "m3": ("full/dense", "sparse/moe", "sparse/moe"),
    "sliding": ("full/dense", "sliding/moe"),
    "lightning": ("lightning/moe", "full/moe"),
    "all": ("full/dense", "sliding/moe", "lightning/dense", "sparse/moe"),
}


def build(config, model, name, **changes):
    family = "m2" if name == "m2" else "m3"
    return model(config(family, layers=MIXERS[name], **changes)).eval()


@pytest.mark.parametrize("name", MIXERS)
def test_token_by_token_over_scattered_pages_equals_the_full_forward(config, model, layout, name):
    lm = build(config, model, name)
    ids = torch.randint(0, 61, (2, 30))
    lengths = [30, 23]
    with torch.no_grad():
        full = lm(ids, torch.tensor(lengths))
        cache = KVCache(lm.config, pages=20)
        table = torch.randperm(20)[:16].view(2, 8).to(torch.int32)
        for t in range(30):
            spans = [(p, t, t + 1) for p in range(2) if t < lengths[p]]
            step = layout(spans, table, 4)
            out = lm.forward_packed(torch.cat([ids[p, a:b] for p, a, b in spans]), step, cache)
            for row, (p, _, _) in enumerate(spans):
                torch.testing.assert_close(lm.logits(out.hidden[row]), full[p, t], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MIXERS)
def test_any_chunks_equal_the_full_forward(config, model, layout, name):
    lm = build(config, model, name)
    ids = torch.randint(0, 61, (29,))
    table = torch.tensor([[5, 0, 3, 7, 1, 2, 9, 8]], dtype=torch.int32)
    with torch.no_grad():
        full = lm(ids[None])[0]
        for cuts in ([0, 29], [0, 4, 8, 29], [0, 3, 17, 18, 29]):
            cache = KVCache(lm.config, pages=10)
            for tensors in (cache.k, cache.v, cache.index_k, cache.state):
                for held in tensors:
                    if held is not None:
                        held.fill_(float("nan"))
            parts = [
                lm.forward_packed(ids[a:b], layout([(0, a, b)], table, 4), cache).hidden
                for a, b in pairwise(cuts)
            ]
            torch.testing.assert_close(lm.logits(torch.cat(parts)), full, rtol=0, atol=1e-5)


def test_padding_on_the_right_changes_nothing(config, model):
    lm = model(config("m3"))
    ids = torch.randint(0, 61, (3, 21))
    lengths = torch.tensor([21, 1, 14])
    with torch.no_grad():
        batch = lm(ids, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = lm(ids[row : row + 1, :length])[0]
            torch.testing.assert_close(batch[row, :length], alone, rtol=0, atol=1e-5)
            assert not batch[row, length:].any()
    assert batch.dtype == torch.float32


def test_no_later_token_reaches_an_earlier_one(config, model):
    lm = model(config("m3", layers=MIXERS["all"]))
    ids = torch.randint(0, 61, (1, 25))
    changed = ids.clone()
    changed[0, 13:] = (changed[0, 13:] + 1) % 61
    with torch.no_grad():
        torch.testing.assert_close(lm(ids)[0, :13], lm(changed)[0, :13], rtol=0, atol=1e-6)


def test_warmup_equals_sparse_when_the_selection_covers_everything(config, model):
    lm = model(config("m3", top_k_blocks=8))
    ids = torch.randint(0, 61, (30,))
    spans = PackedLayout.from_lengths([30], 4)
    sparse = lm.forward_packed(ids, spans, index_loss=True)
    dense = lm.forward_packed(ids, spans, phase="warmup", index_loss=True)
    torch.testing.assert_close(sparse.hidden, dense.hidden, rtol=0, atol=1e-5)
    torch.testing.assert_close(sparse.index_loss, dense.index_loss, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_prompts_that_select_everything_compile_into_one_graph(config, model):
    lm = model(config("m3", top_k_blocks=8))
    ids = torch.randint(0, 61, (30,))
    spans = PackedLayout.from_lengths([30], 4)
    compiled = torch.compile(
        lambda ids: lm.forward_packed(ids, spans).hidden, fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(compiled(ids), lm.forward_packed(ids, spans).hidden, rtol=0, atol=1e-5)


def test_with_few_blocks_sparse_differs_from_dense_and_recall_says_how_much(config, model):
    ids = torch.randint(0, 61, (60,))
    spans = PackedLayout.from_lengths([40, 20], 4)
    few, all_blocks = model(config("m3")), model(config("m3", top_k_blocks=10))
    hidden = few.forward_packed(ids, spans).hidden
    assert (hidden - few.forward_packed(ids, spans, phase="warmup").hidden).abs().max() > 1e-2
    recall = few.selection_recall(ids, spans)
    assert len(recall) == 2 and all(0.2 < r < 0.999 for r in recall)
    assert all_blocks.selection_recall(ids, spans) == pytest.approx([1.0, 1.0])


def test_the_reference_backend_gives_the_same_logits(config, model):
    lm = model(config("m3", layers=MIXERS["all"]))
    ids = torch.randint(0, 61, (2, 33))
    with torch.no_grad():
        fast = lm(ids)
        lm.backend = "reference"
        torch.testing.assert_close(lm(ids), fast, rtol=0, atol=1e-5)


def test_a_narrow_model_keeps_fp32_logits(config, model):
    lm = model(config("m3"), dtype=torch.bfloat16)
    with torch.no_grad():
        assert lm(torch.randint(0, 61, (1, 9))).dtype == torch.float32
    assert lm.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("ids", "lengths", "kind", "message"),
    [
        (torch.zeros(5, dtype=torch.long), None, InputError, r"input_ids: shape \[batch, tokens\] is needed"),
        (torch.zeros(1, 0, dtype=torch.long), None, InputError, r"input_ids: shape .* got \[1, 0\]"),
        (torch.full((1, 3), 61), None, InputError, "input_ids: ids from 0 to 60 are needed, got 61 to 61"),
        (torch.zeros(1, 513, dtype=torch.long), None, ContextOverflow, "at most 512 tokens .* got 513"),
        (
            torch.zeros(1, 3, dtype=torch.long),
            torch.tensor([4]),
            InputError,
            r"lengths: 1 numbers from 1 to 3",
        ),
        (torch.zeros(1, 3, dtype=torch.long), torch.tensor([2, 2]), InputError, "lengths: 1 numbers"),
    ],
)
def test_wrong_ids_are_named(config, model, ids, lengths, kind, message):
    with pytest.raises(kind, match=message):
        model(config("m3"))(ids, lengths)


def test_wrong_layouts_are_named(config, model):
    lm = model(config("m3"))
    ids = torch.zeros(6, dtype=torch.long)
    with pytest.raises(InputError, match="the model's block size 4 is needed, got 8"):
        lm.forward_packed(ids, PackedLayout.from_lengths([6], 8))
    with pytest.raises(InputError, match=r"ids: shape \[5\] is needed, got \[6\]"):
        lm.forward_packed(ids, PackedLayout.from_lengths([5], 4))
    with pytest.raises(InputError, match="call under torch\\.no_grad"):
        lm.forward_packed(ids, PackedLayout.from_lengths([6], 4), KVCache(lm.config, 4))
    with pytest.raises(InputError, match="phase: sparse or warmup is needed, got dense"):
        lm.forward_packed(ids, PackedLayout.from_lengths([6], 4), phase="dense")
    with pytest.raises(InputError, match="pages: at least 1 is needed, got 0"):
        KVCache(lm.config, 0)
