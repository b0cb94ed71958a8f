"""MSA on tensors of one's own: the function and the layer."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longforge.errors import InputError
from longforge.kernels import MsaAttention, MsaOutput, PackedLayout, msa_attention
from longforge.kernels.index_loss import index_loss
from longforge.kernels.layout import as_pages
from longforge.kernels.rotary import rotary_table
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention

NAMES = ("q", "k", "v", "index_q", "index_k")


def tensors(
    tokens: int,
    heads: int = 4,
    groups: int = 2,
    dim: int = 6,
    index_dim: int = 5,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (groups, dim), (groups, dim), (groups, index_dim), (index_dim,))
    return {
        name: torch.randn(tokens, *shape, generator=rng, dtype=torch.float64).to(dtype)
        for name, shape in zip(NAMES, shapes, strict=True)
    }


def ends(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def reference(given: dict[str, Tensor], lengths: Sequence[int], block_size: int, top_k: int) -> MsaOutput:
    """The operations' references, one sequence at a time; the losses averaged by tokens."""
    outs, lses, picks, losses, at = [], [], [], [], 0
    for length in lengths:
        if length == 0:
            continue
        q, k, v, index_q, index_k = (given[name][at : at + length] for name in NAMES)
        layout = PackedLayout.from_lengths([length], block_size)
        k_pages, v_pages, index_pages = (as_pages(x, layout) for x in (k, v, index_k))
        picks.append(select_blocks(index_q, index_pages, layout, top_k, backend="reference"))
        out, lse = sparse_attention(q, k_pages, v_pages, picks[-1], layout, backend="reference")
        outs.append(out)
        lses.append(lse)
        loss = index_loss(index_q, index_pages, q, k_pages, picks[-1], layout, backend="reference")
        losses.append(loss * length / sum(lengths))
        at += length
    return MsaOutput(torch.cat(outs), torch.cat(lses), torch.cat(picks), torch.stack(losses).sum())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 23), min_size=1, max_size=4).filter(any),
    block_size=st.integers(1, 7),
    top_k=st.integers(1, 5),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_it_is_the_composition_of_the_references(lengths, block_size, top_k, groups, share, seed):
    given = tensors(sum(lengths), groups * share, groups, seed=seed)
    got = msa_attention(
        **given, cu_seqlens=ends(lengths), block_size=block_size, top_k=top_k, index_loss=True
    )
    wanted = reference(given, lengths, block_size, top_k)
    assert torch.equal(got.blocks, wanted.blocks)
    torch.testing.assert_close(got.out, wanted.out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(got.lse, wanted.lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.index_loss, wanted.index_loss, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("top_k, phase", [(9, "sparse"), (2, "warmup")])
def test_with_every_block_or_in_the_warm_up_it_is_causal_attention(top_k: int, phase: Any):
    lengths = (17, 1, 30)
    given = tensors(sum(lengths))
    result = msa_attention(**given, cu_seqlens=ends(lengths), block_size=4, top_k=top_k, phase=phase)
    assert (result.blocks is None) == (phase == "warmup") and result.index_loss is None
    at = 0
    for length in lengths:
        q, k, v = (given[n][at : at + length].transpose(0, 1)[None] for n in ("q", "k", "v"))
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(result.out[at : at + length], wanted[0].transpose(0, 1))
        at += length


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_neither_loss_reaches_what_is_the_others(phase: Any):
    given = {name: x.requires_grad_() for name, x in tensors(40).items()}
    result = msa_attention(**given, block_size=4, top_k=3, phase=phase, index_loss=True)
    of_output = torch.autograd.grad(
        result.out.sum(), list(given.values()), allow_unused=True, retain_graph=True
    )
    assert [g is None for g in of_output] == [False, False, False, True, True]
    of_loss = torch.autograd.grad(result.index_loss, list(given.values()), allow_unused=True)
    assert [g is None for g in of_loss] == [True, True, True, False, False]
    assert all(bool(g.any()) for g in (*of_output[:3], *of_loss[3:]))


def test_gradients_are_those_of_the_references():
    lengths, results = (21, 8), []
    for compute in (
        lambda x: msa_attention(**x, cu_seqlens=ends(lengths), block_size=4, top_k=2, index_loss=True),
        lambda x: reference(x, lengths, 4, 2),
    ):
        given = {name: x.requires_grad_() for name, x in tensors(sum(lengths)).items()}
        out = compute(given)
        (out.out.square().sum() + out.index_loss).backward()
        results.append([x.grad for x in given.values()])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_autocast_changes_nothing(phase: Any):
    given = tensors(30, dtype=torch.float32)
    wanted = msa_attention(**given, block_size=4, top_k=3, phase=phase, index_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = msa_attention(**given, block_size=4, top_k=3, phase=phase, index_loss=True)
    assert torch.equal(got.out, wanted.out) and torch.equal(got.index_loss, wanted.index_loss)


def test_strides_a_prepared_layout_and_empty_sequences_make_no_difference():
    given = tensors(30)
    options = {"block_size": 4, "top_k": 2, "index_loss": True}
    wanted = msa_attention(**given, cu_seqlens=[0, 11, 30], **options)
    layout = PackedLayout.from_cu_seqlens(torch.tensor([0, 11, 30]), 4)
    strided = {n: x.movedim(0, -1).contiguous().movedim(-1, 0) for n, x in given.items()}
    assert not strided["q"].is_contiguous()
    for ends_, x in ((layout, given), ([0, 0, 11, 11, 30, 30], given), ([0, 11, 30], strided)):
        got = msa_attention(**x, cu_seqlens=ends_, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_no_tokens_at_all_give_empty_results():
    result = msa_attention(**tensors(0), block_size=4, top_k=3)
    assert result.out.shape == (0, 4, 6) and result.blocks.shape == (0, 2, 3)


def test_weights_count_tokens_in_the_index_loss():
    given = tensors(20)
    weights = torch.arange(20.0)
    halves = [0, 12, 20]
    both = msa_attention(**given, cu_seqlens=halves, block_size=4, top_k=2, index_loss=True, weights=weights)
    second = {n: x[12:] for n, x in given.items()}
    first = {n: x[:12] for n, x in given.items()}
    parts = [
        msa_attention(**x, block_size=4, top_k=2, index_loss=True, weights=w).index_loss * w.sum()
        for x, w in ((first, weights[:12]), (second, weights[12:]))
    ]
    torch.testing.assert_close(both.index_loss, sum(parts) / weights.sum())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"q": torch.zeros(20, 4)},
            r"msa_attention: q \[T, Hq, D\] = \[any, any, any\] expected, got \[20, 4\]",
        ),
        ({"k": torch.zeros(19, 2, 6)}, r"k \[T, Hkv, D\] = \[20, any, 6\] expected, got \[19, 2, 6\]"),
        ({"v": torch.zeros(20, 1, 6)}, r"v \[T, Hkv, D\] like k = \[20, 2, 6\] expected, got \[20, 1, 6\]"),
        ({"q": torch.zeros(20, 5, 6)}, "query heads a multiple of k's 2 expected, got 5"),
        ({"index_q": torch.zeros(20, 4, 5)}, r"index_q \[T, Hkv, Di\] = \[20, 2, any\] expected"),
        ({"index_k": torch.zeros(20, 1, 5)}, r"index_k \[T, Di\] = \[20, 5\] expected, got \[20, 1, 5\]"),
        (
            {"v": torch.zeros(20, 2, 6).bfloat16()},
            r"v like q \(torch.float64 on cpu\) expected, got torch.bf",
        ),
        ({"k": torch.zeros(20, 2, 6).to("meta")}, "k like q .* expected, got torch.float32 on meta"),
        ({"cu_seqlens": [0, 19]}, "cu_seqlens that ends with q's 20 tokens expected, got 19"),
        ({"cu_seqlens": [1, 20]}, "start at 0 and never fall expected, got"),
        ({"cu_seqlens": [0, 12, 9, 20]}, "start at 0 and never fall expected, got"),
        ({"cu_seqlens": torch.tensor([0.0, 20.0])}, r"integers \[B \+ 1\] expected, got torch.float32 \[2\]"),
        ({"block_size": 0}, "block_size of at least 1 expected, got 0"),
        ({"top_k": 0}, "top_k of at least 1 expected"),
        ({"phase": "dense"}, "phase 'sparse' or 'warmup' expected, got 'dense'"),
        ({"weights": torch.ones(20)}, "no weights expected without index_loss=True"),
        ({"index_loss": True, "weights": torch.ones(3)}, r"weights \[N\] = \[20\] expected, got \[3\]"),
        ({"backend": "cuda"}, "one of .* expected, got 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_name_the_expected_and_the_given(
    change: dict[str, Any], said: str
):
    with pytest.raises(InputError, match=said):
        msa_attention(**{**tensors(20), **change})


def test_a_layout_of_other_blocks_is_refused():
    layout = PackedLayout.from_lengths([20], 4)
    with pytest.raises(InputError, match="block_size 4 like the layout's expected, got 128"):
        msa_attention(**tensors(20), cu_seqlens=layout)


def test_it_compiles_into_one_graph_over_a_prepared_layout():
    given = tensors(20, dtype=torch.float32)
    layout = PackedLayout.from_cu_seqlens([0, 13, 20], 4)

    def compute(**x: Tensor) -> tuple[Tensor, Tensor | None]:
        result = msa_attention(**x, cu_seqlens=layout, block_size=4, top_k=2, index_loss=True)
        return result.out, result.index_loss

    torch._dynamo.reset()
    for got, wanted in zip(
        torch.compile(compute, backend="aot_eager", fullgraph=True)(**given), compute(**given), strict=True
    ):
        torch.testing.assert_close(got, wanted)


# --- the layer ----------------------------------------------------------------------------------------------


def layer(seed: int = 0, **options: Any) -> MsaAttention:
    torch.manual_seed(seed)
    options = {"head_dim": 8, "block_size": 4, "top_k": 3, **options}
    return MsaAttention(24, 4, 2, **options).double()


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def test_a_batch_is_its_sequences_side_by_side():
    attention, x = layer(), hidden(3, 19)
    whole = attention(x)
    assert whole.shape == x.shape
    torch.testing.assert_close(attention(x.flatten(0, 1), [0, 19, 38, 57]), whole.flatten(0, 1))
    for row, wanted in zip(x, whole, strict=True):
        torch.testing.assert_close(attention(row), wanted)


def test_padding_on_the_right_changes_nothing_before_it():
    attention, x = layer(), hidden(2, 19)
    weights = torch.ones(2, 19)
    weights[1, 11:] = 0
    out = attention(x, weights=weights)
    loss = attention.index_loss
    packed = torch.cat([x[0], x[1, :11]])
    wanted = attention(packed, torch.tensor([0, 19, 30]))
    torch.testing.assert_close(torch.cat([out[0], out[1, :11]]), wanted)
    torch.testing.assert_close(loss, attention.index_loss)


@pytest.mark.parametrize("phase", ["sparse", "warmup"])
def test_the_models_loss_and_the_index_loss_train_different_weights(phase: Any):
    attention = layer()
    attention.phase = phase
    x = hidden(30).requires_grad_()
    out = attention(x)
    index = {n for n, _ in attention.named_parameters() if n.startswith("index_")}
    assert len(index) == 4
    out.square().sum().backward(retain_graph=True)
    assert {n for n, p in attention.named_parameters() if p.grad is None} == index
    attention.zero_grad(set_to_none=True)
    x.grad = None
    attention.index_loss.backward()
    assert {n for n, p in attention.named_parameters() if p.grad is not None} == index and x.grad is None


def test_the_loss_is_there_in_training_and_nowhere_else():
    attention, x = layer(), hidden(12)
    attention(x)
    assert attention.index_loss is not None and attention.index_loss.requires_grad
    with torch.no_grad():
        attention(x)
    assert attention.index_loss is None
    attention.eval()(x)
    assert attention.index_loss is None


def test_a_checkpointed_layer_learns_the_same():
    gradients = []
    for run in (
        lambda a, x: a(x),
        lambda a, x: torch.utils.checkpoint.checkpoint(a, x, use_reentrant=False),
    ):
        attention = layer()
        out = run(attention, hidden(15))
        (out.sum() + attention.index_loss).backward()
        gradients.append([p.grad for p in attention.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


def test_warm_up_teaches_the_selector_to_find_the_attentions_mass():
    attention = layer(top_k=2)
    attention.phase = "warmup"
    with torch.no_grad():
        attention.q_proj.weight.mul_(4)
    x = hidden(2, 60)
    index = [p for n, p in attention.named_parameters() if n.startswith("index_")]
    optimiser = torch.optim.Adam(index, lr=0.03)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        attention(x)
        attention.index_loss.backward()
        optimiser.step()
        losses.append(attention.index_loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_it_computes_what_the_models_sparse_layer_computes():
    # Imported here: the kernels' tests also run where the model's other needs are not installed.
    from longforge.model import PRESETS
    from longforge.model.attention import SparseAttention
    from longforge.model.norms import RMSNorm
    from longforge.model.step import Step

    config = replace(PRESETS["micro"], block_size=4, top_k_blocks=3)
    torch.manual_seed(0)
    theirs = SparseAttention(config, 1).double()
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, RMSNorm):
                module.weight.normal_(0, 0.2)
    ours = MsaAttention(
        config.hidden_size, config.heads, config.kv_heads, head_dim=config.head_dim, block_size=4, top_k=3,
        index_dim=config.index_dim, rotary_dim=config.rotary_dim, rope_theta=config.rope_theta,
        norm_eps=config.norm_eps,
    ).double()  # fmt: skip
    q, k, v = theirs.qkv_proj.weight.split(theirs.sizes)
    index_q, index_k = theirs.index_proj.weight.split(
        [config.index_heads * config.index_dim, config.index_dim]
    )
    norms = ("q_norm", "k_norm", "index_q_norm", "index_k_norm")
    weights = {f"{n}.weight": getattr(theirs, n).scale() for n in norms}
    weights |= {
        "q_proj.weight": q,
        "k_proj.weight": k,
        "v_proj.weight": v,
        "o_proj.weight": theirs.o_proj.weight,
    }
    weights |= {"index_q_proj.weight": index_q, "index_k_proj.weight": index_k}
    ours.load_state_dict(weights)
    x = torch.randn(41, config.hidden_size, dtype=torch.float64)
    layout = PackedLayout.from_lengths([30, 11], 4)
    table = rotary_table(layout.positions, config.rotary_dim, config.rope_theta, torch.float64)
    step = Step(layout, table, index_loss=True)
    torch.testing.assert_close(ours(x, [0, 30, 41]), theirs(x, step), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours.index_loss, step.index_losses[0], rtol=1e-9, atol=1e-9)


def test_it_runs_under_autocast_and_learns_there():
    attention = layer().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(hidden(20).float())
    assert out.dtype == torch.bfloat16
    (out.float().sum() + attention.index_loss).backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in attention.parameters())


def test_the_layer_compiles_into_one_graph_over_a_prepared_layout():
    attention, x = layer().eval(), hidden(20)
    layout = PackedLayout.from_cu_seqlens([0, 13, 20], 4)
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(attention, backend="eager", fullgraph=True)(x, layout)
        torch.testing.assert_close(got, attention(x, layout))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "heads a multiple of the 3 kv_heads expected, got 4"),
        ({"rotary_dim": 3}, "an even rotary_dim of at most 6"),
        ({"rotary_dim": 6, "index_dim": 4}, "an even rotary_dim of at most 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], said: str):
    with pytest.raises(InputError, match=said):
        MsaAttention(**{"hidden_size": 24, "heads": 4, "kv_heads": 2, **options})


def test_hidden_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"hidden \[T, 24\] or \[B, T, 24\] expected, got \[5, 23\]"):
        layer()(torch.zeros(5, 23))
    with pytest.raises(InputError, match=r"cu_seqlens with hidden \[T, 24\] expected, got \[2, 5, 24\]"):
        layer()(hidden(2, 5), [0, 5, 10])


def test_the_room_loads_nothing_heavy_before_a_name_is_used():
    code = (
        "import sys, longforge.kernels as kernels\n"
        "assert not {'torch', 'numba', 'triton'} & set(sys.modules)\n"
        "assert set(kernels.__all__) <= set(dir(kernels))\n"
        "try:\n    kernels.nothing\nexcept AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "from longforge.kernels import msa_attention\n"
        "assert 'torch' in sys.modules and msa_attention.__module__ == 'longforge.kernels.msa'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
