"""Figures for Prometheus: under the expected names, and true."""

import threading
import time
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from longforge.engine import Engine
from longforge.server.engine_loop import EngineLoop
from longforge.server.metrics import Metrics
from longforge.server.observed import Observed
from small_model import small_model
from small_server import HTTP

GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info")
COUNTERS = (
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "num_preemptions",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "request_queue_time_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
)


def scrape(served: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    reply = HTTP.get(f"{served.url}/metrics")
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def value(figures: Any, name: str, **labels: str) -> float:
    return figures[f"vllm:{name}", frozenset({"model_name": "small", **labels}.items())]


def test_the_names_are_those_that_dashboards_ask_for(served: Any):
    names = {name for name, _ in scrape(served)}
    expected = [f"vllm:{name}" for name in GAUGES] + [f"vllm:{name}_total" for name in COUNTERS]
    expected += [f"vllm:{name}_{end}" for name in HISTOGRAMS for end in ("count", "sum", "bucket")]
    assert set(expected) <= names


def test_an_answer_is_counted_once_with_its_tokens_and_times(served: Any):
    before = scrape(served)
    body = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 5}
    HTTP.post(f"{served.url}/v1/completions", json={**body, "n": 2}).raise_for_status()
    HTTP.post(f"{served.url}/v1/completions", json={**body, "stream": True}).raise_for_status()
    after = scrape(served)

    def gained(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    ended = [gained("request_success_total", finished_reason=reason) for reason in ("stop", "length")]
    assert sum(ended) == 3
    assert gained("time_to_first_token_seconds_count") == 3
    assert gained("request_queue_time_seconds_count") == 3
    assert gained("e2e_request_latency_seconds_count") == 3
    assert gained("inter_token_latency_seconds_count") == gained("generation_tokens_total") - 3
    assert gained("prompt_tokens_total") > 0 and value(after, "num_requests_running") == 0


def test_the_time_in_the_queue_is_that_before_the_scheduler_lets_a_request_in(served: Any):
    before = scrape(served)
    body = {"model": "small", "prompt": [1, 2, 3], "max_tokens": 2}
    served.loop.pause()
    client = threading.Thread(target=HTTP.post, args=(f"{served.url}/v1/completions",), kwargs={"json": body})
    client.start()
    while not served.loop.stats().waiting:
        assert client.is_alive()
    paused = time.perf_counter()
    time.sleep(0.3)
    waited = time.perf_counter() - paused  # and nothing was let in
    served.loop.resume()
    client.join()
    after = scrape(served)

    def gained(name: str) -> float:
        return value(after, name) - value(before, name)

    assert gained("request_queue_time_seconds_count") == 1
    queued = gained("request_queue_time_seconds_sum")
    assert waited <= queued <= gained("time_to_first_token_seconds_sum")


def test_times_are_from_the_request_and_from_token_to_token():
    metrics = Metrics(EngineLoop(Engine(small_model(), pages=4)), "small")
    metrics.observe(Observed("length", opened=10.0, arrivals=(12.0, 12.5, 14.0), let_in=10.5))
    metrics.observe(Observed("abort", opened=10.0, arrivals=()))
    read = metrics.registry.get_sample_value
    label = {"model_name": "small"}
    assert read("vllm:time_to_first_token_seconds_sum", label) == 2.0
    assert read("vllm:request_queue_time_seconds_sum", label) == 0.5
    assert read("vllm:request_queue_time_seconds_count", label) == 1
    assert read("vllm:inter_token_latency_seconds_sum", label) == 2.0
    assert read("vllm:inter_token_latency_seconds_count", label) == 2
    assert read("vllm:e2e_request_latency_seconds_sum", label) == 4.0
    assert read("vllm:request_success_total", label | {"finished_reason": "abort"}) == 1


def test_two_servers_in_one_process_count_apart():
    loop = EngineLoop(Engine(small_model(), pages=4))
    one, other = Metrics(loop, "small"), Metrics(loop, "small")
    one.observe(Observed("stop", 0.0, (1.0,)))
    label = {"model_name": "small", "finished_reason": "stop"}
    assert one.registry.get_sample_value("vllm:request_success_total", label) == 1
    assert other.registry.get_sample_value("vllm:request_success_total", label) == 0
