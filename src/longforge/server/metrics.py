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
OWN_COUNTERS = {
    "page_check_failures": (
        "Times that the accounts of idle pages did not add up",
        lambda loop: loop.page_check_failures,
    ),
    "failed_requests": ("Answers broken off by a fault of their own", lambda loop: loop.stats().failed),
}
TIER_COUNTERS = {
    "hits": ("Pages restored", lambda tier: tier.hits),
    "misses": ("Pages looked for in vain", lambda tier: tier.misses),
    "loaded_bytes": ("Bytes restored", lambda tier: tier.bytes_loaded),
    "stored": ("Pages stored", lambda tier: tier.stored),
    "evicted": ("Pages that had to leave", lambda tier: tier.evicted),
    "dropped": ("Pages not stored", lambda tier: tier.dropped),
    "refused": ("Loads that computing would outrun", lambda tier: tier.refused),
    "damaged": ("Pages found damaged", lambda tier: tier.damaged),
    "failures": ("Errors of the file system", lambda tier: tier.failures),
}
TIER_GAUGES = {
    "pages": ("Pages held", lambda tier: tier.pages),
    "bytes": ("Bytes held", lambda tier: tier.bytes),
    "stopped": ("1 once it has stopped reading or storing", lambda tier: tier.reason is not None),
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
        self._queue = histogram(
            "request_queue_time_seconds", "From the request until it is first let in to run"
        )
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
        if observed.let_in is not None:
            self._queue.observe(observed.let_in - observed.opened)
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
        for name, (what, read) in OWN_COUNTERS.items():
            counter = CounterMetricFamily(f"longforge:{name}", what, labels=["model_name"])
            counter.add_metric([self._label], read(self._loop))
            yield counter
        yield from self._tiers()
        yield self._accepted_by_place(stats)
        yield self._cache_config(stats)

    def _tiers(self) -> Iterator[Metric]:
        """What the tiers that there are did, by tier."""
        stats = self._loop.engine.tier_stats()
        if stats is None:
            return
        tiers = [(name, tier) for name, tier in (("host", stats.host), ("files", stats.files)) if tier]
        kinds = [(TIER_COUNTERS, CounterMetricFamily), (TIER_GAUGES, GaugeMetricFamily)]
        for figures, family_of in kinds:
            for name, (what, read) in figures.items():
                family = family_of(f"longforge:tier_{name}", what, labels=["model_name", "tier"])
                for tier_name, tier in tiers:
                    family.add_metric([self._label, tier_name], read(tier))
                yield family

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
