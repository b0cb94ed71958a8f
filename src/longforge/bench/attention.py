"""`longforge bench attention`: MSA against dense attention and transformers' own MSA, on the same
tensors, in one process."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from longforge.bench.clock import Step, Timing, captured, interleaved, matmul_rate, read_rate, sample
from longforge.bench.contestants import INDEX_BYTES, RIVALS, Unusable, our_parts, selections
from longforge.bench.inputs import DTYPES, Inputs, make_inputs
from longforge.bench.selfcheck import check_operation
from longforge.bench.work import Phase, Shape, Work
from longforge.errors import InputError
from longforge.kernels.checks import backend_name
from longforge.kernels.sparse_attention.api import BACKENDS
from longforge.observe import passport

__all__ = ["Options", "bench_attention", "device_of"]

CHUNK = {"cuda": 8192, "cpu": 512}
"""Queries of a prefill chunk: on a CPU a larger one takes minutes on the dense side."""
LONGEST = {"cuda": 10.0, "cpu": 60.0}
"""Seconds that one step of a contestant may take by estimate; longer ones are left out and named."""
EFFICIENCY = 0.3
"""Of the measured rates, for that estimate."""
HOPELESS = 5
"""A rival this many times as slow as the best is named and not timed, where its steps take WORTH_SAVING."""
LONG = 5.0
"""Seconds from which on a step is not run again only to be warm, where as many are to be expected of it."""
WORTH_SAVING = 0.1
"""Seconds."""


@dataclass(frozen=True)
class Options:
    """What to measure. Lengths in tokens."""

    device: torch.device
    lengths: Sequence[int]
    phases: Sequence[Phase]
    dtype: str = "bf16"
    shape: Shape = field(default_factory=Shape)
    chunk: int | None = None
    """Queries of a prefill chunk; None: 8192 on CUDA, 512 on a CPU."""
    minutes: float | None = None
    """No new point is begun after this long."""
    longest: float | None = None
    """Seconds of one step, by estimate, above which a contestant is left out; None: 10 on CUDA, 60 on CPU."""
    seconds: float = 4.0
    """About how long the rounds of one point take together."""


def device_of(name: str | None) -> torch.device:
    """The named device; None: CUDA where there is some. Raises InputError for one that is not here."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in CHUNK:
        raise InputError(f"device: cuda or cpu expected, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"device: {name} expected to be here, but torch finds no CUDA device; say --device cpu"
        )
    return device


def bench_attention(options: Options) -> Iterator[list[dict[str, Any]]]:
    """Point after point (phase and length): its rows, one for each rival and index dtype. See `Bench.row` for
    the columns.

    What happens, and what is left out and why, is told on stderr. Raises CheckError where our path differs
    from the reference, InputError for options that do not go together.
    """
    begun, device = time.monotonic(), options.device
    chosen = backend_name("sparse_attention", BACKENDS, None, device, DTYPES[options.dtype])
    if chosen == "reference":
        raise InputError(
            f"bench: a fast backend on {device} expected (Triton on CUDA), got the reference only"
        )
    if options.dtype == "fp16" and device.type == "cpu":
        raise InputError(
            "bench: bf16 or fp32 on a CPU expected (its fp16 is hundreds of times slower), got fp16"
        )
    for phase in options.phases:
        check_operation(phase, options.shape, DTYPES[options.dtype], device)
    _say(f"check against the reference passed: {', '.join(options.phases)}")
    bench = Bench(options, chosen, begun)
    for phase in options.phases:
        for length in sorted(options.lengths):
            if bench.out_of_time():
                _say(f"{phase} {length}: left out, the time is up")
                continue
            yield bench.point(Work.of(phase, length, options.chunk or CHUNK[device.type]))
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Bench:
    """The measured machine and what it has been asked."""

    def __init__(self, options: Options, backend: str, begun: float) -> None:
        self.options, self.backend, self.begun = options, backend, begun
        self._said: set[tuple[str, str]] = set()
        device = options.device
        self.dtype = DTYPES[options.dtype]
        self.width = self.dtype.itemsize
        self.longest = LONGEST[device.type] if options.longest is None else options.longest
        self.bandwidth = read_rate(device)
        self.rate = matmul_rate(device, self.dtype)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        about = passport(name)
        self.about = {key: about[key] for key in ("device", "utc", "commit", "dirty")}
        self.about |= {key: about["versions"][key] for key in ("torch", "triton", "numba")}
        _say(
            f"{self.about['device']}: {self.bandwidth / 1e9:.0f} GB/s, {self.rate / 1e12:.2f} TFLOP/s "
            f"{options.dtype}, both measured"
        )

    def out_of_time(self) -> bool:
        minutes = self.options.minutes
        return minutes is not None and time.monotonic() - self.begun > 60 * minutes

    def point(self, work: Work) -> list[dict[str, Any]]:
        """The rows of one phase and length, one per rival; none where it does not fit."""
        options, shape = self.options, self.options.shape
        title = f"{work.phase} {work.length}"
        needed = self._bytes_needed(work)
        if needed > self._memory():
            _say(f"{title}: left out, it needs about {needed / 2**30:.0f} GiB")
            return []
        if self._seconds(work.flops(shape), work.bytes(shape, self.width, self.width)) > self.longest:
            _say(f"{title}: left out, our side alone would take more than {self.longest:.0f} s")
            return []
        inputs = make_inputs(shape, work, self.dtype, options.device)
        try:
            parts = {kind: our_parts(inputs, select) for kind, select in selections(inputs).items()}
            for ours in parts.values():
                ours["whole"]()  # and whatever is compiled the first time
        except torch.OutOfMemoryError:
            _say(f"{title}: left out, our side ran out of memory")
            return []
        rivals, seconds = self._rivals(inputs, title)
        contestants = dict(rivals)
        for kind, ours in parts.items():
            contestants |= {f"{kind} {name}": step for name, step in ours.items()}
        graphs: dict[str, bool] = {}
        if work.phase == "decode":
            pairs = {name: captured(step, options.device) for name, step in contestants.items()}
            contestants = {name: step for name, (step, _) in pairs.items()}
            graphs = {name: worked for name, (_, worked) in pairs.items()}
        timings = interleaved(contestants, options.device, options.seconds, warm=seconds)
        told = [f"{name} {timings[name].ms:.3g}" for name in rivals]
        rows = []
        for kind, ours in parts.items():
            mine = {name: timings[f"{kind} {name}"] for name in ours}
            combine = _combine_ms(ours["attention"], options.device)
            graph = graphs.get(f"{kind} whole", False)
            for name in rivals:
                row = self.row(work, kind, mine, combine, name, timings[name])
                rows.append({**row, "cuda_graph": graph, "rival_cuda_graph": graphs.get(name, False)})
            told.append(f"msa with {kind} index keys {mine['whole'].ms:.3g} ms")
        _say(f"{title}: {', '.join(told)}")
        return rows

    def _rivals(self, inputs: Inputs, title: str) -> tuple[dict[str, Step], dict[str, float]]:
        """Steps, and the seconds of those that need no second warming up."""
        shape, work = self.options.shape, inputs.work
        expected = self._seconds(work.dense_flops(shape), work.dense_bytes(shape, self.width))
        if expected > self.longest:
            _say(f"{title}: every rival left out, a step would take more than {self.longest:.0f} s")
            return {}, {}
        steps: dict[str, Step] = {}
        seconds: dict[str, float] = {}
        for name, build in RIVALS.items():
            try:
                step = build(inputs)
                taken = sample(step, 1, self.options.device)
                if min(taken, expected) < LONG:  # what is compiled the first time may be most of it
                    taken = sample(step, 1, self.options.device)
                steps[name], seconds[name] = step, taken
            except (Unusable, RuntimeError, ValueError, TypeError, ImportError, AttributeError) as error:
                # The others are what packages and torch itself say where they cannot take a shape or device,
                # or where a package has other functions than the version this was written for.
                self._leave_out(title, name, str(error).strip().splitlines()[0][:120])
        for name, taken in seconds.items():
            if taken > max(WORTH_SAVING, HOPELESS * min(seconds.values())):
                del steps[name]
                self._leave_out(title, name, f"more than {HOPELESS} times as slow as another rival")
        long = {name: t for name, t in seconds.items() if name in steps and min(t, expected) >= LONG}
        return steps, long

    def _leave_out(self, title: str, name: str, why: str) -> None:
        if (name, why) not in self._said:
            _say(f"{title}: no {name} ({why})")
        self._said.add((name, why))

    def _seconds(self, flops: int, size: int) -> float:
        return max(flops / self.rate, size / self.bandwidth) / EFFICIENCY

    def _bytes_needed(self, work: Work) -> int:
        """Pages, the rivals' copies and, in training, gradients of both."""
        shape = self.options.shape
        keys = work.keys * (2 * shape.groups * shape.dim + shape.index_dim) * self.width
        queries = work.queries * shape.heads * shape.dim * self.width
        return (5 if work.phase == "train" else 2) * keys + (8 if work.phase == "train" else 4) * queries

    def _memory(self) -> int:
        """Bytes that may be used: part of what is free."""
        device = self.options.device
        if device.type == "cuda":
            return int(0.8 * torch.cuda.mem_get_info(device)[0])
        return int(0.5 * (passport()["memory_bytes"] or 8 << 30))

    def row(
        self,
        work: Work,
        kind: str,
        ours: dict[str, Timing],
        combine: float | None,
        rival: str,
        theirs: Timing,
    ) -> dict[str, Any]:
        """What one comparison says.

        Times are medians of one step in milliseconds, `_low` and `_high` quartiles over `rounds`. speedup is
        rival_ms / ms; limit is what remains of it against dense attention at the hardware's limit
        (`Work.limit`). rival_bytes and rival_flops are those of dense attention whatever the rival
        (transformers-msa computes no less: dense attention under a mask). The parts are timed
        alone; combine_ms, the merging of partial results, is part of attention where a backend has no kernel
        of its own for it, and null then. Fractions are of the bandwidth and matmul rate measured in this run.
        """
        options, shape, whole = self.options, self.options.shape, ours["whole"]
        index_width = INDEX_BYTES[kind]
        flops, size = work.flops(shape), work.bytes(shape, self.width, index_width)
        dense_flops, dense_size = work.dense_flops(shape), work.dense_bytes(shape, self.width)
        loss = ours.get("index loss")
        return {
            "device": self.about["device"],
            "phase": work.phase,
            "length": work.length,
            "queries": work.queries,
            "keys": work.keys,
            "dtype": options.dtype,
            "index_dtype": kind,
            "rival": rival,
            "rival_ms": theirs.ms,
            "rival_ms_low": theirs.low,
            "rival_ms_high": theirs.high,
            "ms": whole.ms,
            "ms_low": whole.low,
            "ms_high": whole.high,
            "rounds": whole.rounds,
            "speedup": theirs.ms / whole.ms,
            "limit": work.limit(shape, self.width, index_width),
            "selection_ms": ours["selection"].ms,
            "attention_ms": ours["attention"].ms - (combine or 0.0),
            "combine_ms": combine,
            "index_loss_ms": loss and loss.ms,
            "bytes": size,
            "rival_bytes": dense_size,
            "flops": flops,
            "rival_flops": dense_flops,
            "bandwidth_fraction": size / (whole.ms / 1e3) / self.bandwidth,
            "rival_bandwidth_fraction": dense_size / (theirs.ms / 1e3) / self.bandwidth,
            "matmul_fraction": flops / (whole.ms / 1e3) / self.rate,
            "rival_matmul_fraction": dense_flops / (theirs.ms / 1e3) / self.rate,
            "bandwidth_bytes_per_second": self.bandwidth,
            "matmul_flops_per_second": self.rate,
            "backend": self.backend,
            "shape": f"{shape.heads}/{shape.groups}/{shape.dim} index {shape.index_dim} "
            f"block {shape.block_size} k {shape.top_k}",
            **{key: self.about[key] for key in ("utc", "commit", "dirty", "torch", "triton", "numba")},
        }


def _combine_ms(attention: Step, device: torch.device) -> float | None:
    """Time of the kernels that merge partial results, read off a profile by their names."""
    if device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as told:
        attention()
        torch.cuda.synchronize()
    events: Any = told.key_averages()
    merging = [e for e in events if "combine" in e.key or "merge" in e.key]
    return sum(e.self_device_time_total for e in merging) / 1e3 if merging else None
