"""The compiled forward of a few tokens: the torch forward's numbers, and the same bits in any company."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels import numba_host
from longforge.kernels.layout import PackedLayout
from longforge.kernels.select_blocks import reference
from longforge.kernels.tiles.engine import TILE_ENGINE
from longforge.model import CausalLM, KVCache, few_tokens
from longforge.model.few_tokens import FewTokens, Heads

MODELS = {
    "m2": {"family": "m2"},
    "m3": {},
    "sliding": {"layers": ("sliding/dense", "full/moe")},
    "plain": {"qk_norm": None, "gemma_norm": False, "shared_expert_size": 0, "rotary_dim": 0},
    "odd": {
        "hidden_size": 24,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 9,
        "rotary_dim": 4,
        "index_dim": 7,
        "expert_size": 5,
        "shared_expert_size": 33,
        "dense_size": 19,
        "vocab_size": 61,
        "block_size": 3,
        "tie_embeddings": True,
    },
    "wide": {
        "hidden_size": 96,
        "heads": 16,
        "kv_heads": 1,
        "head_dim": 48,
        "index_dim": 64,
        "expert_size": 40,
        "experts": 9,
        "experts_per_token": 3,
        "block_size": 16,
        "top_k_blocks": 2,
    },
    "tiles": {  # every matrix has a shape for matrix tiles, as the shipped model's
        "hidden_size": 64,
        "heads": 8,
        "kv_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "index_dim": 32,
        "expert_size": 96,
        "shared_expert_size": 32,
        "dense_size": 160,
        "block_size": 4,
    },
}


@pytest.fixture
def build(config, model):
    def built(name: str, dtype: torch.dtype = torch.float32, **more: object) -> CausalLM:
        changes = {"mtp_modules": 1} | MODELS[name] | more
        return model(config(changes.pop("family", "m3"), **changes), dtype=dtype).eval()

    return built


def new_cache(lm: CausalLM, pages: int, dtype: torch.dtype | None = None, fill: float = 0.0) -> KVCache:
    """A cache with an entry for each MTP module behind the layers."""
    cache = KVCache(lm.config, pages, dtype=dtype or lm.dtype)
    more = KVCache(lm.config, pages, dtype=dtype or lm.dtype)
    for name in ("k", "v", "index_k", "state"):
        tensors = getattr(cache, name)
        tensors += [getattr(more, name)[-1]] * len(lm.mtp)
        for held in tensors:
            if held is not None:
                held.fill_(fill)
    return cache


def run(few: FewTokens, ids: Tensor, layout: PackedLayout) -> Tensor:
    return few.hidden(ids.numpy(), *arrays(layout))


def arrays(layout: PackedLayout) -> tuple[np.ndarray, ...]:
    return tuple(x.numpy() for x in (layout.positions, layout.paths, layout.slots, layout.page_table))


def packed(chunks: Sequence[tuple[int, int, int]], ids: Tensor) -> Tensor:
    return torch.cat([ids[p, a:b] for p, a, b in chunks])


def chunks_of(lengths: Sequence[int], sizes: Sequence[int]):
    """Steps in which path p goes on by sizes[p] tokens (fewer at its end) until all have ended."""
    at = [0] * len(lengths)
    while any(a < n for a, n in zip(at, lengths, strict=True)):
        ends = [min(n, a + s) for a, n, s in zip(at, lengths, sizes, strict=True)]
        yield [(p, a, b) for p, (a, b) in enumerate(zip(at, ends, strict=True)) if a < b]
        at = ends


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_few_tokens_at_a_time_equal_the_torch_forward_of_the_same_weights(build, layout, name, dtype):
    """Unwritten slots hold NaN, pages are shuffled, and a table has holes behind a path's end."""
    lm = build(name, dtype)
    c = lm.config
    lengths = [30, 23, 41]
    ids = torch.randint(0, c.vocab_size, (3, 41))
    blocks = -(-41 // c.block_size)
    table = torch.randperm(3 * blocks + 4)[: 3 * blocks].view(3, blocks).to(torch.int32)
    for p, length in enumerate(lengths):
        table[p, -(-length // c.block_size) :] = -1
    cache = new_cache(lm, 3 * blocks + 4, fill=float("nan"))
    few = FewTokens(lm, cache)
    given = [[] for _ in lengths]
    for chunks in chunks_of(lengths, [1, 3, 2]):
        out = run(few, packed(chunks, ids), layout(chunks, table, c.block_size))
        for p, rows in zip([p for p, _, _ in chunks], out.split([b - a for _, a, b in chunks]), strict=True):
            given[p].append(rows)
    # bf16: keys in the cache are rounded (2^-9 each), and a rounded key may select another block.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        exact = lm.float()
        for p, length in enumerate(lengths):
            wanted = exact.forward_packed(
                ids[p, :length], PackedLayout.from_lengths([length], c.block_size)
            ).hidden
            got = torch.cat(given[p])
            worst = (got - wanted).norm(dim=1) / wanted.norm(dim=1)
            if dtype == torch.float32:
                assert float(worst.max()) < tolerance
            else:
                assert float(worst.median()) < tolerance


@pytest.mark.parametrize("name", ["m3", "tiles"])
def test_bf16_weights_meet_rows_that_are_not_rounded(build, layout, name):
    """Over an fp32 cache nothing but the weights is rounded; rounded rows would differ by 2^-9."""
    lm = build(name, torch.bfloat16)
    ids, table = torch.randint(0, 61, (1, 40)), torch.arange(12)[None].to(torch.int32)
    few = FewTokens(lm, new_cache(lm, 12, torch.float32))
    assert (few._tables.model["tiles"][0] == 1) == (name == "tiles" and TILE_ENGINE == "amx")
    got = torch.cat(
        [
            run(few, ids[0, a : a + 5], layout([(0, a, a + 5)], table, lm.config.block_size))
            for a in range(0, 40, 5)
        ]
    )
    with torch.no_grad():
        whole = PackedLayout.from_lengths([40], lm.config.block_size)
        wanted = lm.float().forward_packed(ids[0], whole).hidden
    assert float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) < 5e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_has_the_same_bits_alone_in_a_batch_and_among_drafts(build, layout, name, dtype):
    lm = build(name, dtype)
    size, vocab = lm.config.block_size, lm.config.vocab_size
    ids = torch.randint(0, vocab, (5, 37))
    blocks = -(-37 // size)
    table = torch.randperm(5 * blocks).view(5, blocks).to(torch.int32)
    results = []
    for sizes in ([1, 1, 1, 1, 1], [2, 3, 4, 5, 1], [37, 7, 6, 1, 8]):
        few = FewTokens(lm, new_cache(lm, 5 * blocks))
        rows = {}
        for chunks in chunks_of([37] * 5, sizes):
            out = run(few, packed(chunks, ids), layout(chunks, table, size))
            names = [(p, t) for p, a, b in chunks for t in range(a, b)]
            logits = few.logits(out)
            rows |= {at: (out[i], logits[i]) for i, at in enumerate(names)}
        results.append(rows)
    few = FewTokens(lm, new_cache(lm, 5 * blocks))
    alone = {(2, t): run(few, ids[2, t : t + 1], layout([(2, t, t + 1)], table, size))[0] for t in range(37)}
    for rows in results[1:]:
        for at, (hidden, logits) in rows.items():
            assert torch.equal(hidden, results[0][at][0])
            assert torch.equal(logits, results[0][at][1])
    for at, hidden in alone.items():
        assert torch.equal(hidden, results[0][at][0])


def test_a_row_beside_one_of_a_much_longer_prefix_has_its_own_bits(build, layout):
    """Beyond 32,768 positions spans are longer: a row before that has more spans than the last one."""
    lm = build("m2", block_size=64, max_positions=40_000)
    blocks = 33_000 // 64 + 1
    table = torch.arange(2 * blocks).view(2, blocks).to(torch.int32)
    cache = new_cache(lm, 2 * blocks)
    for pool in (*cache.k, *cache.v):
        assert pool is not None
        pool.normal_()
    few, ids = FewTokens(lm, cache), torch.tensor([5, 7])
    chunks = [(0, 32_700, 32_701), (1, 32_999, 33_000)]
    both = run(few, ids, layout(chunks, table, 64))
    for i, chunk in enumerate(chunks):
        assert torch.equal(both[i], run(few, ids[i : i + 1], layout([chunk], table, 64))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(build, layout, monkeypatch, dtype):
    lm = build("wide", dtype)
    ids, table = torch.randint(0, 61, (2, 60)), torch.randperm(8).view(2, 4).to(torch.int32)
    chunks = [(0, 0, 40), (1, 0, 20)]
    given = []
    monkeypatch.setattr(few_tokens, "ALONE", 0)
    monkeypatch.setattr(numba_host, "SMALL", 0)
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        few = FewTokens(lm, new_cache(lm, 8))
        given.append(run(few, packed(chunks, ids), layout(chunks, table, 16)))
    torch.set_num_threads(before)
    assert torch.equal(*given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_it_writes_serves_the_torch_forward_and_the_other_way_round(build, layout, dtype):
    """Both forwards take turns over one cache; each writes what the other would have."""
    lm = build("m3", dtype)
    ids, table = torch.randint(0, 61, (2, 40)), torch.randperm(20).view(2, 10).to(torch.int32)
    mixed, plain = new_cache(lm, 20), new_cache(lm, 20)
    few = FewTokens(lm, mixed)
    # In bf16 torch rounds between operators; where that changes a choice of experts or blocks, rows differ.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        worst = []
        for t in range(0, 40, 2):
            chunks = [(0, t, t + 2), (1, t, t + 2)]
            step, tokens = layout(chunks, table, 4), packed(chunks, ids)
            wanted = lm.forward_packed(tokens, step, plain).hidden.float()
            if t % 4:
                got = run(few, tokens, step)
            else:
                got = lm.forward_packed(tokens, step, mixed).hidden.float()
            worst.append(float((got - wanted).norm() / wanted.norm()))
    assert (max(worst) if dtype == torch.float32 else sorted(worst)[len(worst) // 2]) < tolerance
    for name in ("k", "v", "index_k"):
        for ours, theirs in zip(getattr(mixed, name), getattr(plain, name), strict=True):
            if ours is not None:
                ours, theirs = ours.float(), theirs.float()
                assert float((ours - theirs).norm()) <= 2 * tolerance * float(theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_selects_the_blocks_of_the_reference(build, layout, dtype):
    """On the index queries and keys that it made itself, at every layer."""
    lm = build("m3", dtype, layers=("sparse/dense", "full/moe", "sparse/moe"), index_dim=16)
    ids, table = torch.randint(0, 61, (2, 90)), torch.randperm(50)[:46].view(2, 23).to(torch.int32)
    cache = new_cache(lm, 50)
    few = FewTokens(lm, cache)
    differing = 0
    for chunks in chunks_of([90, 71], [5, 3]):
        step = layout(chunks, table, 4)
        run(few, packed(chunks, ids), step)
        n = len(step.positions)
        # The queries of the last sparse layer are still in their room.
        c = lm.config
        start = (c.heads + 2 * c.kv_heads) * c.head_dim
        queries = few._rooms.projected[:n, start : start + c.kv_heads * c.index_dim]
        queries = torch.from_numpy(queries.copy()).view(n, c.kv_heads, c.index_dim)
        wanted = reference.select_blocks(queries, cache.index_k[2], step, c.top_k_blocks)
        got = torch.from_numpy(few.selected[1, :n])
        differing += int((wanted != got).sum())
    assert differing == 0


@pytest.mark.parametrize("name", ["m2", "m3", "odd", "tiles"])
def test_an_mtp_module_equals_its_torch_forward(build, layout, name):
    lm = build(name)
    c = lm.config
    ids = torch.randint(0, c.vocab_size, (1, 30))
    table = torch.arange(-(-30 // c.block_size)).flip(0)[None].to(torch.int32)
    few = FewTokens(lm, new_cache(lm, table.numel()))
    with torch.no_grad():
        whole = PackedLayout.from_lengths([29], c.block_size)
        hidden = lm.forward_packed(ids[0, :29], whole).hidden
        wanted = lm.mtp_hidden(hidden, ids[0, 1:], whole)
    given = []
    for a, b in ((0, 1), (1, 4), (4, 6), (6, 20), (20, 29)):
        step = arrays(layout([(0, a, b)], table, c.block_size))
        given.append(few.mtp(0, hidden[a:b], ids[0, a + 1 : b + 1].numpy(), *step))
    torch.testing.assert_close(torch.cat(given), wanted, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["m2", "m3", "odd"])
def test_guesses_in_one_call_are_those_of_a_pass_at_a_time(build, layout, monkeypatch, name, threads):
    """Two paths: of the first three tokens, known by four pairs; of the second one token."""
    lm = build(name)
    c = lm.config
    monkeypatch.setattr(few_tokens, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ids = torch.randint(0, c.vocab_size, (2, 30))
    table = torch.arange(2 * -(-30 // c.block_size)).flip(0).view(2, -1).to(torch.int32)
    before = torch.randn(7, c.hidden_size)
    pairs = [(0, 0, 4), (1, 0, 3)]
    few = FewTokens(lm, new_cache(lm, table.numel()))
    hidden = few.mtp(0, before, packed(pairs, ids).numpy(), *arrays(layout(pairs, table, c.block_size)))
    wanted, last = [few.likeliest(hidden[[3, 6]])], hidden[3:4]
    for t in (4, 5):
        step = arrays(layout([(0, t, t + 1)], table, c.block_size))
        last = few.mtp(0, last, np.array(wanted[-1][:1]), *step)
        wanted.append(few.likeliest(last))
    rows = [(0, 0, 4), (1, 0, 3), (0, 4, 6)]
    positions, paths, slots, pages = arrays(layout(rows[:2], table, c.block_size))
    later = arrays(layout(rows[2:], table, c.block_size))
    packed_rows = [
        [*packed(pairs, ids).tolist(), 0, 0],
        *[
            [*now.tolist(), *then.tolist()]
            for now, then in zip((positions, paths, slots), later, strict=False)
        ],
    ]
    few = FewTokens(lm, new_cache(lm, table.numel()))
    passes = [Heads(7, [(3, 7), (6, -1)]), Heads(8, [(7, 8)]), Heads(9, [(8, -1)])]
    assert few.guesses([before[:4], before[4:]], packed_rows, pages, passes) == wanted


def test_a_steps_logits_are_those_of_its_hidden_states(build, layout):
    lm = build("odd")
    table, ids = torch.arange(20)[None].to(torch.int32), torch.randint(0, lm.config.vocab_size, (1, 9))
    few = FewTokens(lm, new_cache(lm, 20))
    rows = [
        ids[0].tolist(),
        *[x.tolist() for x in arrays(layout([(0, 0, 9)], table, lm.config.block_size))[:3]],
    ]
    hidden, logits = few.step(rows, table.numpy(), [2, 3, 8])
    assert torch.equal(logits, few.logits(hidden[[2, 3, 8]]))


def test_shared_pages_serve_both_paths(build, layout):
    """Two paths with the same first two pages: as if each had its own."""
    lm = build("m3")
    ids = torch.randint(0, 61, (2, 20))
    ids[1, :8] = ids[0, :8]
    own, shared = torch.arange(10).view(2, 5).to(torch.int32), torch.arange(10).view(2, 5).to(torch.int32)
    shared[1, :2] = shared[0, :2]
    given = []
    for table in (own, shared):
        few = FewTokens(lm, new_cache(lm, 10))
        for t in range(20):
            rows = [(0, t, t + 1)] if table is shared and t < 8 else [(0, t, t + 1), (1, t, t + 1)]
            out = run(few, packed(rows, ids), layout(rows, table, 4))
        given.append(out)
    assert torch.equal(*given)


def test_new_weights_are_seen_after_refresh(build, layout):
    lm, other = build("m3"), build("m3", torch.float32)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    table, ids = torch.arange(2)[None].to(torch.int32), torch.randint(0, 61, (1, 6))
    step = layout([(0, 0, 6)], table, 4)
    few = FewTokens(lm, new_cache(lm, 2))
    before = run(few, ids[0], step)
    lm.load_state_dict(other.state_dict())
    few.refresh()
    after = run(few, ids[0], step)
    assert not torch.equal(before, after)
    assert torch.equal(after, run(FewTokens(other, new_cache(other, 2)), ids[0], step))


def test_it_says_what_it_cannot_do(build, layout):
    assert not FewTokens.supports(build("m3", layers=("lightning/dense", "full/moe")))
    assert not FewTokens.supports(build("m3", torch.float64))
    assert FewTokens.supports(build("m2", torch.bfloat16))
    lm = build("m3")
    with pytest.raises(InputError, match="cache in float32 or bfloat16"):
        FewTokens(lm, new_cache(lm, 2, torch.float64))
    few = FewTokens(lm, new_cache(lm, 4), max_tokens=3)
    table = torch.arange(4)[None].to(torch.int32)
    with pytest.raises(InputError, match="from 1 to 3 tokens expected, got 4"):
        run(few, torch.zeros(4, dtype=torch.int64), layout([(0, 0, 4)], table, 4))
    step = arrays(layout([(0, 0, 1)], table, 4))
    with pytest.raises(InputError, match="MTP modules"):
        few.mtp(1, torch.zeros(1, 32), np.zeros(1, np.int64), *step)


def test_it_reads_nothing_behind_what_it_was_given(build, layout):
    """Compiled code checks no bounds: what would make it read on is refused before."""
    lm = build("m3")
    table, rows = np.arange(4, dtype=np.int32)[None], [[1, 1], [0, 1], [0, 0], [0, 1]]
    few = FewTokens(lm, new_cache(lm, 4))
    one, two = torch.zeros(1, 32), torch.zeros(2, 32)
    with pytest.raises(InputError, match="up to 2 different rows"):
        few.step(rows, table, [0, 1, 1])
    with pytest.raises(InputError, match="one for each of 2 tokens expected, got 1"):
        ids, positions, paths, slots = map(np.array, rows)
        few.mtp(0, one, ids, positions, paths, slots, table)
    with pytest.raises(InputError, match="one for each of 2 tokens expected, got 1"):
        few.guesses([one], rows, table, [Heads(2, [(1, -1)])])
    with pytest.raises(InputError, match="passes: from 1 to 3 expected, got 4"):
        few.guesses([two], rows, table, [Heads(2, [])] * 4)
    with pytest.raises(InputError, match="from 1 to 64 tokens expected, got 65"):
        longer = [[row[0]] * 67 for row in rows]
        few.guesses([two], longer, table, [Heads(2, []), Heads(67, [])])
    without = FewTokens(lm, KVCache(lm.config, 4))
    with pytest.raises(InputError, match="MTP modules"):
        without.guesses([two], rows, table, [Heads(2, [])])
