"""On a GPU the host waits for sampled tokens and for nothing else.

Torch's fake tensors on "meta" stand for those of a GPU: they hold nothing, a question about their values is
an error, and copies between them and the host are seen. Operators are taken by their shapes here; that they
do not ask is what tests/gpu shows.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from longforge.engine import sampler_torch
from longforge.engine.graphs import Batch
from longforge.engine.runner import Runner
from longforge.engine.sampler import Row, TokenCounts
from longforge.kernels import rotary
from longforge.model import CausalLM
from longforge.protocol import SamplingParams
from small_model import small_config

VOCAB = 300


class Copies(TorchDispatchMode):
    """Lists what the host waits for: copies from the device, and copies to it that block."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "_to_copy" and "device" in kwargs:
            self._note(name, args[0].device, torch.device(kwargs["device"]), kwargs.get("non_blocking"))
        if name == "copy_":
            self._note(name, args[1].device, args[0].device, args[2] if len(args) > 2 else None)
        return func(*args, **kwargs)

    def _note(self, name: str, source: torch.device, target: torch.device, free: bool | None) -> None:
        if source.type != target.type and not (free and source.type == "cpu"):
            self.waits.append(f"{name} {source.type} -> {target.type}")


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Copies]:
    # Autocast knows no such device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    # Tensors that are made once in a process must not be fake ones afterwards, nor of another test.
    constants = [
        kept
        for room in (rotary, sampler_torch)
        for kept in vars(room).values()
        if hasattr(kept, "cache_clear")
    ]
    assert len(constants) == 2
    for cached in constants:
        cached.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True), Copies() as seen:
        yield seen
    for cached in constants:
        cached.cache_clear()


def rows(*params: SamplingParams) -> list[Row]:
    mask = np.full(-(-VOCAB // 32), 2**32 - 1, dtype=np.uint32)
    return [
        Row(p, seed=at, position=7, counts=TokenCounts([1, 2, 3]), mask=mask if at % 2 else None)
        for at, p in enumerate(params)
    ]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1),
        SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, logit_bias=((3, 1.0),)),
        SamplingParams(min_tokens=4, stop_token_ids=(2,)),
    ],
    ids=["greedy", "filters", "penalties", "min tokens"],
)
def test_the_sampler_asks_the_device_nothing_before_its_result(copies: Copies, params: SamplingParams):
    logits = torch.empty(3, VOCAB, device="meta")
    found = sampler_torch.drawn(logits, rows(params, params, params))
    assert found.shape == (4, 3) and found.device.type == "meta" and copies.waits == []
    found.cpu()
    assert copies.waits == ["_to_copy meta -> cpu"]


def decoding(model: CausalLM, drafts: int) -> tuple[Runner, Batch]:
    runner = Runner(model, pages=9, max_running=4, context=36, drafts=drafts)
    two, four = np.arange(2), np.array([4, 5])
    table = np.array([[1, 3, -1], [4, 5, -1]], dtype=np.int32)
    return runner, Batch(two, four, two, table[:, 1] * np.int64(4) + four % 4, table)


@pytest.mark.parametrize("mixture", ["sparse", "sliding"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_decode_step_asks_the_device_nothing(
    copies: Copies, mixture: str, graphs: bool, monkeypatch: pytest.MonkeyPatch
):
    with torch.device("meta"):
        model = CausalLM(small_config(mixture)).eval()
    if graphs:
        monkeypatch.setattr("longforge.engine.runner.capture_for", lambda *_: lambda function: function)
    runner, batch = decoding(model, 2)
    copies.waits.clear()
    with torch.inference_mode():
        if runner._graphs is not None:
            given = runner._graphs.step(batch)
            assert given is not None
            hidden, logits = given
            assert runner._graphs.draft(batch, hidden) is not None
        else:
            ids, layout = runner._moved(batch)
            hidden = model.forward_packed(ids, layout, runner.cache, expert_loads=False).hidden
            runner._keep_tails(hidden, batch.slots)
            model.mtp_packed(hidden, ids, layout, cache=runner.cache)
            logits = runner.logits(runner.rows(hidden, [0, 1]))
    assert logits.shape == (2, model.config.vocab_size) and logits.device.type == "meta"
    assert copies.waits == []


def test_questions_to_fake_tensors_are_errors(copies: Copies):
    """What the tests above rest on."""
    some = torch.empty(3, device="meta")
    with pytest.raises(DataDependentOutputException):
        some[0].item()
    with pytest.raises(DynamicOutputShapeException):
        some.nonzero()
    with pytest.raises(DynamicOutputShapeException):
        some[some > 0]
    torch.ones(2).to("meta")
    torch.ones(2).to("meta", non_blocking=True)
    some.cpu()
    some.copy_(torch.ones(3))
    assert copies.waits == ["_to_copy cpu -> meta", "_to_copy meta -> cpu", "copy_ cpu -> meta"]
