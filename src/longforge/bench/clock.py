"""Time: contestants take turns, so that whatever else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Timing", "captured", "interleaved", "matmul_rate", "read_rate", "sample"]

Step = Callable[[], object]
SHORTEST = 2e-3
"""Seconds that one sample lasts at least: shorter steps are repeated inside it."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one step: the median over rounds and the quartiles."""

    ms: float
    low: float
    high: float
    rounds: int


def interleaved(
    contestants: Mapping[str, Step],
    device: torch.device,
    seconds: float,
    most_rounds: int = 40,
    warm: Mapping[str, float] | None = None,
) -> dict[str, Timing]:
    """Each contestant's timing, from at least 3 rounds of about `seconds` together.

    warm: seconds of a step, of contestants that have run before. The others run once more, for whatever is
    compiled, cached or allocated the first time.
    """
    repeats = {}
    total, known = 0.0, warm or {}
    for name, step in contestants.items():
        if name not in known:
            step()
        once = known[name] if name in known else sample(step, 1, device)
        repeats[name] = max(1, round(SHORTEST / max(once, 1e-7)))
        total += once * repeats[name]
    rounds = max(3, min(most_rounds, int(seconds / max(total, 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            samples[name].append(1e3 * sample(step, repeats[name], device))
    return {name: _timing(values) for name, values in samples.items()}


def _timing(samples: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(middle, low, high, len(samples))


def sample(step: Step, repeats: int, device: torch.device) -> float:
    """Seconds of one step, from `repeats` of them in a row."""
    if device.type != "cuda":
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        return (time.perf_counter() - begin) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def captured(step: Step, device: torch.device) -> tuple[Step, bool]:
    """The step as a CUDA graph, as an engine runs decode (no host time for each launch), and whether that
    worked. A step that waits for the device cannot be captured and stays as it is."""
    if device.type != "cuda":
        return step, False
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return step, False
    return graph.replay, True


def read_rate(device: torch.device) -> float:
    """Bytes a second that this device moves: the faster of reading (a sum) and copying (read and written)."""
    count = 1 << (30 if device.type == "cuda" else 26)
    numbers = torch.ones(count, dtype=torch.float32, device=device)
    copy = torch.empty_like(numbers)
    steps: dict[str, Step] = {"sum": lambda: numbers.sum(), "copy": lambda: copy.copy_(numbers)}
    timings = interleaved(steps, device, 2.0, most_rounds=15)
    return 4e3 * count * max(1 / timings["sum"].ms, 2 / timings["copy"].ms)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matrix product of normal numbers."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in "ab")
    timing = interleaved({"product": lambda: a @ b}, device, 2.0, most_rounds=15)["product"]
    return 2e3 * size**3 / timing.ms
