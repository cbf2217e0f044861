"""What /metrics says: every name, the values that were fed, readable by a parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from llmos_jax.scheduling import Times
from llmos_jax.server.metrics import Metrics
from llmos_jax.serving.state import EngineState, Limits

LIMITS = Limits(
    context=2048, seats=8, page_size=16, pages=512, max_queue=32,
    max_queued_tokens=4096, vocab_size=1000,
)  # fmt: skip
STATE = EngineState(
    stage="ready", running=3, waiting=2, waiting_tokens=70, pages_held=128,
    pages_cached=64, tokens_per_s=123.5, bandwidth=5e9, planned_bandwidth=2e10,
    prompt_tokens=900, generated_tokens=400, prefix_queries=800, prefix_hits=600,
    preemptions=4, steps=50, step_s=2.5, host_s=0.25, predicted_s=2.0,
    drafted_tokens=10, accepted_tokens=7, unplanned_compiles=1, programs=6,
)  # fmt: skip
VLLM = {
    "gauge": "num_requests_running num_requests_waiting num_requests_waiting_by_reason "
    "kv_cache_usage_perc cache_config_info",
    "counter": "prefix_cache_queries prefix_cache_hits num_preemptions prompt_tokens "
    "generation_tokens request_success spec_decode_num_draft_tokens "
    "spec_decode_num_accepted_tokens",
    "histogram": "request_prompt_tokens request_generation_tokens request_params_n "
    "request_params_max_tokens request_max_num_generation_tokens "
    "time_to_first_token_seconds inter_token_latency_seconds "
    "request_time_per_output_token_seconds e2e_request_latency_seconds "
    "request_queue_time_seconds request_inference_time_seconds "
    "request_prefill_time_seconds request_decode_time_seconds request_num_preemptions",
}
OURS = {
    "gauge": "stage running_requests waiting_requests waiting_tokens seats kv_pages "
    "kv_page_tokens kv_usage_ratio tokens_per_second programs "
    "memory_bandwidth_bytes_per_second planned_memory_bandwidth_bytes_per_second "
    "memory_bandwidth_utilization",
    "counter": "prompt_tokens generated_tokens prefix_queried_tokens prefix_hit_tokens "
    "preemptions steps step_seconds host_seconds drafted_tokens accepted_tokens "
    "classified_texts batches unplanned_compiles requests rejected_requests",
    "histogram": "time_to_first_token_seconds inter_token_seconds request_seconds "
    "time_per_output_token_seconds queue_seconds inference_seconds prefill_seconds "
    "decode_seconds request_prompt_tokens request_cached_tokens request_preemptions "
    "request_generated_tokens request_longest_answer_tokens request_n "
    "request_max_tokens",
}


def fed() -> Metrics:
    metrics = Metrics('small "one"', LIMITS, lambda: STATE)
    times = Times(queued=10.0, admitted=10.5, first_token=11.0, ended=13.0)
    metrics.ended(times, 100, 5, "stop", 2, 64, 1, 48)
    never = Times(queued=1.0, admitted=None, first_token=None, ended=2.0)
    metrics.ended(never, 30, 0, "deadline", 1, 16, 0, 0)
    metrics.inter_token(0.03)
    metrics.inter_token(0.06)
    metrics.http("/v1/completions", "POST", 200, 0.7)
    metrics.http("/v1/completions", "POST", 429, 0.001)
    metrics.rejected("overloaded")
    return metrics


def families(metrics: Metrics):
    text, kind = metrics.render()
    assert kind.startswith("text/plain; version=")
    found = list(text_string_to_metric_families(text.decode()))
    names = [one.name for one in found]
    assert len(names) == len(set(names))
    return {one.name: one for one in found}


def value(metrics: Metrics, sample: str, **labels: str) -> float:
    found = [
        one.value
        for family in families(metrics).values()
        for one in family.samples
        if one.name == sample and labels.items() <= one.labels.items()
    ]
    assert len(found) == 1, (sample, found)
    return found[0]


def test_every_name_is_there_with_its_kind_and_nothing_else():
    wanted = {
        prefix + name: kind
        for prefix, table in (("vllm:", VLLM), ("llmos_", OURS))
        for kind, names in table.items()
        for name in names.split()
    }
    wanted["http_requests"] = "counter"
    wanted["http_request_duration_seconds"] = "histogram"
    assert {one.name: one.type for one in families(fed()).values()} == wanted
    assert all(one.documentation for one in families(fed()).values())


def test_every_series_of_the_model_carries_its_labels():
    for family in families(fed()).values():
        for sample in family.samples:
            if not family.name.startswith("http_"):
                assert sample.labels["model_name"] == 'small "one"'
                assert sample.labels["engine"] == "0"
            assert not sample.name.endswith("_created")


@pytest.mark.parametrize(
    ("sample", "labels", "wanted"),
    [
        ("vllm:num_requests_running", {}, 3),
        ("llmos_waiting_requests", {}, 2),
        ("vllm:num_requests_waiting_by_reason", {"reason": "capacity"}, 2),
        ("vllm:kv_cache_usage_perc", {}, 0.25),
        ("llmos_kv_pages", {"state": "held"}, 128),
        ("llmos_kv_pages", {"state": "cached"}, 64),
        ("llmos_kv_pages", {"state": "free"}, 320),
        ("llmos_stage", {"stage": "ready"}, 1),
        ("llmos_stage", {"stage": "draining"}, 0),
        ("llmos_memory_bandwidth_utilization", {}, 0.25),
        ("llmos_step_seconds_total", {"kind": "measured"}, 2.5),
        ("llmos_step_seconds_total", {"kind": "predicted"}, 2.0),
        ("llmos_host_seconds_total", {}, 0.25),
        ("llmos_unplanned_compiles_total", {}, 1),
        ("vllm:prompt_tokens_total", {}, 900),
        ("vllm:generation_tokens_total", {}, 400),
        ("vllm:prefix_cache_queries_total", {}, 800),
        ("vllm:prefix_cache_hits_total", {}, 600),
        ("vllm:num_preemptions_total", {}, 4),
        ("vllm:spec_decode_num_accepted_tokens_total", {}, 7),
        ("vllm:request_success_total", {"finished_reason": "stop"}, 1),
        ("vllm:request_success_total", {"finished_reason": "abort"}, 1),
        ("vllm:request_success_total", {"finished_reason": "length"}, 0),
        ("llmos_requests_total", {"reason": "deadline"}, 1),
        ("llmos_rejected_requests_total", {"reason": "overloaded"}, 1),
        ("vllm:time_to_first_token_seconds_sum", {}, 1.0),
        ("vllm:time_to_first_token_seconds_count", {}, 1),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "0.75"}, 0),
        ("vllm:time_to_first_token_seconds_bucket", {"le": "1.0"}, 1),
        ("vllm:inter_token_latency_seconds_bucket", {"le": "0.05"}, 1),
        ("vllm:inter_token_latency_seconds_sum", {}, 0.09),
        ("vllm:e2e_request_latency_seconds_sum", {}, 4.0),
        ("vllm:request_queue_time_seconds_sum", {}, 0.5),
        ("vllm:request_inference_time_seconds_sum", {}, 2.5),
        ("vllm:request_prefill_time_seconds_sum", {}, 0.5),
        ("vllm:request_decode_time_seconds_sum", {}, 2.0),
        ("vllm:request_time_per_output_token_seconds_sum", {}, 0.5),
        ("vllm:request_prompt_tokens_sum", {}, 130),
        ("vllm:request_params_max_tokens_bucket", {"le": "20.0"}, 1),
        ("vllm:request_num_preemptions_sum", {}, 1),
        ("llmos_request_cached_tokens_sum", {}, 48),
        ("http_requests_total", {"handler": "/v1/completions", "status": "2xx"}, 1),
        ("http_requests_total", {"method": "POST", "status": "4xx"}, 1),
        ("http_request_duration_seconds_count", {}, 2),
    ],
)
def test_a_value_is_what_was_fed(sample, labels, wanted):
    assert value(fed(), sample, **labels) == pytest.approx(wanted)


def test_the_cache_is_described_by_labels():
    (sample,) = families(fed())["vllm:cache_config_info"].samples
    assert sample.value == 1
    assert sample.labels["block_size"] == "16"
    assert sample.labels["num_gpu_blocks"] == "512"
    assert sample.labels["kv_cache_size_tokens"] == "8192"
    assert sample.labels["kv_cache_max_concurrency"] == "4"


def test_an_alias_has_the_value_of_ours():
    found = families(fed())
    ours = found["llmos_time_to_first_token_seconds"].samples
    theirs = found["vllm:time_to_first_token_seconds"].samples
    assert [one.value for one in ours] == [one.value for one in theirs]


def test_gauges_are_read_when_they_are_asked_for():
    now = [EngineState(stage="starting")]
    metrics = Metrics("m", LIMITS, lambda: now[0])
    assert value(metrics, "llmos_memory_bandwidth_utilization") == 0
    now[0] = STATE
    assert value(metrics, "llmos_memory_bandwidth_utilization") == 0.25


def test_the_page_gets_latencies_as_plain_numbers():
    found = fed().histograms()
    assert found["ttft"]["count"] == 1 and found["ttft"]["sum"] == 1.0
    buckets = found["itl"]["buckets"]
    assert buckets[0] == {"le": 0.01, "count": 0}
    assert {"le": 0.05, "count": 1} in buckets
    assert buckets[-1] == {"le": None, "count": 2}
