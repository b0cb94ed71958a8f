"""Figures for Prometheus, under vLLM's names where they mean the same, so that its dashboards work."""

import itertools
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from longforge.engine import EngineStats
from longforge.server.engine_loop import EngineLoop
from longforge.server.observed import Observed

__all__ = ["Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)

GAUGES = {
    "num_requests_running": ("Requests that generate", lambda s: s.running),
    "num_requests_waiting": ("Requests that wait for pages", lambda s: s.waiting),
    "kv_cache_usage_perc": (
        "Share of the pages that running requests hold, 0 to 1",
        lambda s: 1 - (s.free_pages + s.cached_pages) / s.pages,
    ),
}
COUNTERS = {
    "prefix_cache_queries": ("Prompt tokens looked up in the cache", lambda s: s.prefix_queried_tokens),
    "prefix_cache_hits": ("Prompt tokens found in the cache", lambda s: s.prefix_hit_tokens),
    "prompt_tokens": ("Prompt tokens that went through the model", lambda s: s.prompt_tokens),
    "generation_tokens": ("Tokens generated", lambda s: s.generated_tokens),
    "num_preemptions": ("Requests that had to give up their pages for a while", lambda s: s.preemptions),
    "spec_decode_num_drafts": ("Verifications of drafted tokens", lambda s: s.drafts),
    "spec_decode_num_draft_tokens": ("Tokens drafted", lambda s: s.drafted_tokens),
    "spec_decode_num_accepted_tokens": ("Drafted tokens accepted", lambda s: s.accepted_tokens),
}


class Metrics:
    """The figures of one served model.

    What the engine counts is read when it is asked for; `observe` is told of each answer that is over.
    """

    def __init__(self, loop: EngineLoop, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineFigures(loop, model_name))

        def histogram(name: str, what: str) -> Histogram:
            whole = Histogram(f"vllm:{name}", what, ["model_name"], buckets=SECONDS, registry=self.registry)
            return whole.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "From the request to its first token")
        self._between = histogram("inter_token_latency_seconds", "From one token to the next")
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its last token")
        self._model_name = model_name
        self._finished = Counter(
            "vllm:request_success",
            "Answers that are over, by how they ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)

    def observe(self, observed: Observed) -> None:
        """Counts an answer that is over."""
        self._finished.labels(self._model_name, observed.outcome).inc()
        arrivals = observed.arrivals
        if not arrivals:
            return
        self._first.observe(arrivals[0] - observed.opened)
        for before, after in itertools.pairwise(arrivals):
            self._between.observe(after - before)
        if observed.outcome in ("stop", "length"):
            self._whole.observe(arrivals[-1] - observed.opened)


class _EngineFigures(Collector):
    """What the engine counts, read when Prometheus asks."""

    def __init__(self, loop: EngineLoop, model_name: str) -> None:
        self._loop = loop
        self._label = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._loop.stats()
        for name, (what, read) in GAUGES.items():
            gauge = GaugeMetricFamily(f"vllm:{name}", what, labels=["model_name"])
            gauge.add_metric([self._label], read(stats))
            yield gauge
        for name, (what, read) in COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:{name}", what, labels=["model_name"])
            counter.add_metric([self._label], read(stats))
            yield counter
        yield self._accepted_by_place(stats)
        yield self._cache_config(stats)

    def _accepted_by_place(self, stats: EngineStats) -> Metric:
        counter = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Drafted tokens accepted, by their place in the draft",
            labels=["model_name", "position"],
        )
        for place, accepted in enumerate(stats.accepted_by_place):
            counter.add_metric([self._label, str(place)], accepted)
        return counter

    def _cache_config(self, stats: EngineStats) -> Metric:
        config = {
            "block_size": str(self._loop.engine.config.block_size),
            "num_gpu_blocks": str(stats.pages),
            "model_name": self._label,
        }
        info = GaugeMetricFamily("vllm:cache_config_info", "The pool of pages", labels=list(config))
        info.add_metric(list(config.values()), 1)
        return info
