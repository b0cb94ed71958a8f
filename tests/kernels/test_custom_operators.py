"""Every operation is an operator that the compiler can trust, and calls it where the compiler looks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longforge.errors import InputError
from longforge.kernels.dense_attention import dense_attention
from longforge.kernels.grouped_experts import grouped_experts
from longforge.kernels.grouped_experts.api import BACKENDS as EXPERTS
from longforge.kernels.grouped_experts.cases import Case as ExpertsCase
from longforge.kernels.grouped_experts.cases import make_inputs as make_experts
from longforge.kernels.index_loss import index_loss
from longforge.kernels.lightning_attention import lightning_attention
from longforge.kernels.lightning_attention.cases import Case as LightningCase
from longforge.kernels.lightning_attention.cases import make_inputs as make_lightning
from longforge.kernels.msa_cases import Case, make_inputs
from longforge.kernels.select_blocks import select_blocks
from longforge.kernels.sparse_attention import sparse_attention

BACKENDS = ("reference", "cpu")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
CASE = Case((13, 1, 6), 4, 2, 6, 5, 4, 2)

Call = Callable[..., Any]
"""The public function of an operation on its differentiable tensors alone."""


def msa_inputs(dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """Rows without a token hold zeros: the operator's own tests compare results, and NaN equals nothing."""
    inputs = make_inputs(CASE, dtype)
    inputs = replace(inputs, **{n: torch.nan_to_num(getattr(inputs, n)) for n in ("index_k", "k", "v")})
    return inputs, select_blocks(inputs.index_q, inputs.index_k, inputs.layout, CASE.top_k)


def _sparse(backend: str) -> tuple[Call, list[Tensor]]:
    i, blocks = msa_inputs()
    return lambda q, k, v: sparse_attention(q, k, v, blocks, i.layout, backend=backend), [i.q, i.k, i.v]


def _dense(backend: str) -> tuple[Call, list[Tensor]]:
    i, _ = msa_inputs()
    return lambda q, k, v: dense_attention(q, k, v, i.layout, window=5, backend=backend), [i.q, i.k, i.v]


def _index(backend: str) -> tuple[Call, list[Tensor]]:
    i, blocks = msa_inputs()
    weights = torch.linspace(0, 2, len(i.q))

    def loss(index_q: Tensor, index_k: Tensor) -> Tensor:
        return index_loss(index_q, index_k, i.q, i.k, blocks, i.layout, weights=weights, backend=backend)

    return loss, [i.index_q, i.index_k]


def _warm_up(backend: str) -> tuple[Call, list[Tensor]]:
    i, _ = msa_inputs()
    return lambda iq, ik: index_loss(iq, ik, i.q, i.k, None, i.layout, backend=backend), [
        i.index_q,
        i.index_k,
    ]


def _lightning(backend: str) -> tuple[Call, list[Tensor]]:
    i = make_lightning(LightningCase((19, 1, 6), 2, 4, 4))
    return lambda q, k, v: lightning_attention(q, k, v, i.slopes, i.layout, backend=backend), [i.q, i.k, i.v]


def _experts(backend: str) -> tuple[Call, list[Tensor]]:
    case = ExpertsCase(7, 8, 4, 5, 2, 3) if backend == "torch" else ExpertsCase(7, 6, 3, 5, 2, 3)
    x, gate_up, down, ids, weights = make_experts(case)

    def out(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        return grouped_experts(x, gate_up, down, ids, weights, activation="swiglu_oai", backend=backend)

    return out, [x, gate_up, down, weights]


DIFFERENTIABLE = {
    "sparse_attention": _sparse,
    "dense_attention": _dense,
    "index_loss": _index,
    "index_loss, warm-up": _warm_up,
    "lightning_attention": _lightning,
    "grouped_experts": _experts,
}
each_operation = pytest.mark.parametrize("make", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
FURTHER = [
    pytest.param(make, name, id=f"{make.__name__.strip('_')}-{name}")
    for make, name in ((_lightning, "triton"), (_experts, "triton"), (_experts, "torch"))
    if name in EXPERTS
]
"""Backends of single operations; Triton's run under its interpreter."""
each_further = pytest.mark.parametrize("make, backend", FURTHER)


def need(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton_device").need("cpu")


def operator_call(make: Callable[[str], tuple[Call, list[Tensor]]], backend: str) -> tuple[Any, tuple]:
    """(operator, arguments) that the public function puts into a graph; what it trains requires gradients."""
    call, tensors = make(backend)
    found: list[tuple[Any, tuple]] = []

    def look(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        class Watch(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                if "longforge" in str(target):
                    found.append((target, args))
                return super().call_function(target, args, kwargs)

        return lambda *given: Watch(graph).run(*given)

    torch._dynamo.reset()
    torch.compile(call, backend=look, fullgraph=True)(*[t.clone().requires_grad_() for t in tensors])
    [(operator, arguments)] = found
    leaves = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in arguments
    ]
    assert sum(isinstance(x, Tensor) and x.requires_grad for x in leaves) == len(tensors)
    return operator, tuple(leaves)


@each_backend
@each_operation
def test_the_operator_keeps_torchs_contract(make: Callable[..., Any], backend: str):
    operator, arguments = operator_call(make, backend)
    torch.library.opcheck(operator, arguments)


@each_further
def test_the_operators_of_further_backends_keep_it_too(make: Callable[..., Any], backend: str):
    need(backend)
    operator, arguments = operator_call(make, backend)
    torch.library.opcheck(operator, arguments)


@each_backend
def test_the_operators_without_a_gradient_keep_it_too(backend: str):
    inputs, _ = msa_inputs()

    def select() -> Tensor:
        return select_blocks(inputs.index_q, inputs.index_k, inputs.layout, CASE.top_k, backend=backend)

    operator, arguments = operator_call(lambda _: (select, []), backend)
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_the_lightning_operator_that_overwrites_states_keeps_it_too(backend: str):
    need(backend)
    i = make_lightning(LightningCase((9, 1, 6), 2, 4, 4))
    states = torch.zeros(i.layout.pages, 2, 4, 4)
    step = torch.ops.longforge.lightning_attention_step.default
    torch.library.opcheck(step, (i.q, i.k, i.v, i.slopes, states, *i.layout.parts, backend))


@each_further
def test_further_backends_compile_without_a_break_too(make: Callable[..., Any], backend: str):
    need(backend)
    compare_compiled(*make(backend))


@each_backend
@each_operation
def test_compiled_without_a_break_gives_the_same_values_and_gradients(make: Callable[..., Any], backend: str):
    compare_compiled(*make(backend))


def compare_compiled(call: Call, tensors: list[Tensor]) -> None:
    torch._dynamo.reset()
    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(*leaves)
        first = out[0] if isinstance(out, tuple) else out
        (first * torch.linspace(0.5, 1.5, first.numel()).view(first.shape)).sum().backward()
        results.append([first.detach(), *(x.grad for x in leaves)])
        if isinstance(out, tuple):
            assert not out[1].requires_grad
            results[-1].append(out[1])
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_selection_and_attention_compile_into_one_graph():
    inputs, wanted = msa_inputs()

    def both(i):
        blocks = select_blocks(i.index_q, i.index_k, i.layout, CASE.top_k)
        return blocks, sparse_attention(i.q, i.k, i.v, blocks, i.layout)[0]

    torch._dynamo.reset()
    with torch.no_grad():
        blocks, out = torch.compile(both, backend="eager", fullgraph=True)(inputs)
    assert torch.equal(blocks, wanted)
    assert torch.equal(out, sparse_attention(inputs.q, inputs.k, inputs.v, wanted, inputs.layout)[0])


def test_compiled_lightning_writes_its_states():
    i = make_lightning(LightningCase((9, 1, 6), 2, 4, 4))
    states = [torch.zeros(i.layout.pages, 2, 4, 4) for _ in range(2)]

    def step(states: Tensor) -> Tensor:
        return lightning_attention(i.q, i.k, i.v, i.slopes, i.layout, states=states)

    torch._dynamo.reset()
    with torch.no_grad():
        wanted = step(states[0])
        got = torch.compile(step, backend="aot_eager", fullgraph=True)(states[1])
    assert torch.equal(got, wanted) and torch.equal(states[0], states[1]) and bool(states[0].any())


def test_compiled_experts_follow_autocast_as_they_do_outside():
    x, gate_up, down, ids, weights = make_experts(ExpertsCase(7, 6, 3, 5, 2, 3))

    def out(x: Tensor) -> Tensor:
        return grouped_experts(x, gate_up, down, ids, weights, activation="silu")

    torch._dynamo.reset()
    compiled = torch.compile(out, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = out(x), compiled(x)
    assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    assert not torch.equal(out(x), wanted)


def test_fake_tensors_get_shapes_and_dtypes_and_compute_nothing():
    inputs, _ = msa_inputs(torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(getattr(inputs, n)) for n in ("index_q", "index_k", "q", "k", "v")}
        layout = replace(
            inputs.layout,
            **{
                n: mode.from_tensor(getattr(inputs.layout, n))
                for n in ("positions", "paths", "slots", "page_table")
            },
        )
        chosen = select_blocks(fake["index_q"], fake["index_k"], layout, 3)
        out, lse = sparse_attention(fake["q"], fake["k"], fake["v"], chosen, layout)
        loss = index_loss(fake["index_q"], fake["index_k"], fake["q"], fake["k"], chosen, layout)
    n = len(inputs.q)
    assert (chosen.shape, chosen.dtype) == ((n, 2, 3), torch.int32)
    assert (out.shape, out.dtype, lse.dtype) == ((n, 4, 6), torch.bfloat16, torch.float32)
    assert (loss.shape, loss.dtype) == ((), torch.float32)


def test_outside_a_compiler_the_backend_is_called_without_the_dispatcher():
    """What a decode step pays for the operators is one look at a flag."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.namespace)
            return func(*args, **(kwargs or {}))

    inputs, blocks = msa_inputs()
    with Watch(), torch.no_grad():
        sparse_attention(inputs.q, inputs.k, inputs.v, blocks, inputs.layout)
    assert "longforge" not in seen


@pytest.mark.parametrize("operation", ["sparse", "index", "dense"])
@each_backend
def test_autocast_lowers_nothing(operation: str, backend: str):
    make = {"sparse": _sparse, "index": _index, "dense": _dense}[operation]
    call, tensors = make(backend)
    wanted = call(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = call(*tensors)
    for g, w in zip(got, wanted, strict=True) if isinstance(got, tuple) else [(got, wanted)]:
        assert g.dtype == w.dtype and torch.equal(g, w)


def test_the_default_backend_follows_the_device():
    from longforge.kernels.checks import backend_name

    backends = {"reference": print, "cpu": print, "triton": print}
    cuda, cpu, other = torch.device("cuda"), torch.device("cpu"), torch.device("meta")

    def default(device: torch.device, dtype: torch.dtype = torch.bfloat16, **less: Any) -> str:
        return backend_name("x", less or backends, None, device, dtype)

    assert [default(d) for d in (cuda, cpu, other)] == ["triton", "cpu", "reference"]
    assert default(cuda, torch.float64) == "reference"
    assert default(cuda, reference=print, cpu=print) == "reference"
    assert default(cpu, reference=print, triton=print) == "reference"


def test_a_backend_by_name_is_on_its_own_device_or_refused(monkeypatch: pytest.MonkeyPatch):
    from longforge.kernels.checks import backend_name

    backends = {"reference": print, "triton": print}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="x backend 'triton': CUDA tensors expected, got cpu"):
        backend_name("x", backends, "triton", torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_name("x", backends, "triton", torch.device("cpu")) == "triton"
    with pytest.raises(InputError, match="x backend: one of reference expected, got 'triton'; triton is not"):
        backend_name("x", {"reference": print}, "triton", torch.device("cuda"))


def test_mixed_dtypes_devices_and_strides_are_refused_by_name():
    from longforge.kernels.checks import check_strides

    inputs, blocks = msa_inputs()
    layout = inputs.layout
    with pytest.raises(
        InputError, match=r"k_pages like q \(torch.float32 on cpu\) expected, got torch.float64"
    ):
        sparse_attention(inputs.q, inputs.k.double(), inputs.v, blocks, layout)
    with pytest.raises(InputError, match=r"blocks in int32 on cpu expected, got torch.float32 on cpu"):
        sparse_attention(inputs.q, inputs.k, inputs.v, blocks.float(), layout)
    with pytest.raises(InputError, match=r"layout.page_table on cpu like the queries expected, got meta"):
        elsewhere = replace(layout, page_table=layout.page_table.to("meta"))
        select_blocks(inputs.index_q, inputs.index_k, elsewhere, 2)
    with pytest.raises(InputError, match=r"backend 'triton': k_pages with stride 1 in its last dimension"):
        check_strides("x", "triton", k_pages=inputs.k.transpose(2, 3))
    check_strides("x", "cpu", k_pages=inputs.k.transpose(2, 3))
    with pytest.raises(InputError, match="gate_up, expert_ids and weights on cpu like x expected, got meta"):
        x, gate_up, down, ids, weights = make_experts(ExpertsCase(7, 6, 3, 5, 2, 3))
        with torch.autocast("cpu"):
            grouped_experts(x, gate_up.to("meta"), down.to("meta"), ids, weights, activation="silu")


def test_compiled_lightning_refuses_gradients_through_states():
    i = make_lightning(LightningCase((9, 1, 6), 2, 4, 4))
    states = torch.zeros(i.layout.pages, 2, 4, 4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(InputError, match="no gradients"):
        q = mode.from_tensor(i.q.requires_grad_())
        lightning_attention(q, i.k, i.v, i.slopes, i.layout, states=states)
