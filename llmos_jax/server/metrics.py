"""Tell Prometheus what the engine and its requests do.

Each fact has a name of ours (`llmos_*`, base units) and, where vLLM has one for it,
vLLM's too, with the same value: dashboards, autoscalers and gateways ask for those
(names and buckets: vllm:tests/entrypoints/serve/instrumentator/test_metrics.py and
vllm:docs/design/metrics.md). Gauges and counters are read from the engine when somebody
asks; histograms are fed where requests end, so the engine's thread does nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from llmos_jax.scheduling import FinishReason, Times
from llmos_jax.serving.state import EngineState, Limits, Stage

# vLLM's buckets, so that its dashboards fit.
FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
    7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
INTER_TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
_HTTP_S = (0.01, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_FEW = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)

_VLLM_REASON: dict[FinishReason, str] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "deadline": "abort",
    "failed": "error",
}


@dataclass(frozen=True, slots=True)
class _Reading:
    """A number of the engine's state."""

    name: str
    help: str
    value: Callable[[EngineState, Limits], float]
    is_counter: bool = False
    vllm: str | None = None
    label: tuple[str, str] | None = None
    """One more label; readings of one name follow each other."""
    vllm_label: tuple[str, str] | None = None


def _gauge(name: str, help: str, value: Callable[[EngineState, Limits], float],
           **more: Any) -> _Reading:  # fmt: skip
    return _Reading(f"llmos_{name}", help, value, **more)


def _counter(name: str, help: str, field: str, vllm: str | None = None,
             label: tuple[str, str] | None = None) -> _Reading:  # fmt: skip
    return _Reading(
        f"llmos_{name}",
        help,
        lambda state, _: getattr(state, field),
        is_counter=True,
        vllm=vllm,
        label=label,
    )


_READINGS: tuple[_Reading, ...] = (
    *(
        _gauge(
            "stage",
            "1 for the stage that the engine is in.",
            lambda state, _, stage=stage: float(state.stage == stage),  # type: ignore[misc]
            label=("stage", stage),
        )
        for stage in get_args(Stage)
    ),
    _gauge(
        "running_requests",
        "Sequences that run.",
        lambda state, _: state.running,
        vllm="num_requests_running",
    ),
    _gauge(
        "waiting_requests",
        "Requests that wait.",
        lambda state, _: state.waiting,
        vllm="num_requests_waiting",
    ),
    _Reading(
        "",
        "Requests that wait, by what for.",
        lambda state, _: state.waiting,
        vllm="num_requests_waiting_by_reason",
        vllm_label=("reason", "capacity"),
    ),
    _gauge(
        "waiting_tokens",
        "Prompt tokens and answers that wait.",
        lambda state, _: state.waiting_tokens,
    ),
    _gauge("seats", "Sequences that can run at once.", lambda _, limits: limits.seats),
    _gauge(
        "kv_pages",
        "Pages of the KV cache: held by sequences, cached prefixes, free.",
        lambda state, _: state.pages_held,
        label=("state", "held"),
    ),
    _gauge(
        "kv_pages",
        "",
        lambda state, _: state.pages_cached,
        label=("state", "cached"),
    ),
    _gauge(
        "kv_pages",
        "",
        lambda state, limits: limits.pages - state.pages_held - state.pages_cached,
        label=("state", "free"),
    ),
    _gauge("kv_page_tokens", "Tokens of a page.", lambda _, limits: limits.page_size),
    _gauge(
        "kv_usage_ratio",
        "Share of the pages that sequences hold.",
        lambda state, limits: _ratio(state.pages_held, limits.pages),
        vllm="kv_cache_usage_perc",
    ),
    _gauge(
        "tokens_per_second",
        "Tokens of the last seconds.",
        lambda state, _: state.tokens_per_s,
    ),
    _gauge(
        "memory_bandwidth_bytes_per_second",
        "What decode steps read of weights and cache, over the last seconds.",
        lambda state, _: state.bandwidth,
    ),
    _gauge(
        "planned_memory_bandwidth_bytes_per_second",
        "What the plan's machine reads at most; 0: not known.",
        lambda state, _: state.planned_bandwidth,
    ),
    _gauge(
        "memory_bandwidth_utilization",
        "Bandwidth over the planned one; 0 where that is not known.",
        lambda state, _: _ratio(state.bandwidth, state.planned_bandwidth),
    ),
    _gauge("programs", "Programs compiled.", lambda state, _: state.programs),
    _counter("prompt_tokens", "Prompt tokens.", "prompt_tokens", "prompt_tokens"),
    _counter(
        "generated_tokens", "Tokens made.", "generated_tokens", "generation_tokens"
    ),
    _counter(
        "prefix_queried_tokens",
        "Prompt tokens looked up in the prefix cache.",
        "prefix_queries",
        "prefix_cache_queries",
    ),
    _counter(
        "prefix_hit_tokens",
        "Prompt tokens found in the prefix cache.",
        "prefix_hits",
        "prefix_cache_hits",
    ),
    _counter(
        "preemptions",
        "Times that a sequence lost its pages.",
        "preemptions",
        "num_preemptions",
    ),
    _counter("steps", "Steps of the engine.", "steps"),
    _counter(
        "step_seconds",
        "Seconds of steps, measured and as the plan predicted them (0: nothing).",
        "step_s",
        label=("kind", "measured"),
    ),
    _counter("step_seconds", "", "predicted_s", label=("kind", "predicted")),
    _counter("classified_texts", "Texts classified.", "texts"),
    _counter("host_seconds", "Seconds that the device waited for the host.", "host_s"),
    _counter(
        "drafted_tokens",
        "Tokens drafted.",
        "drafted_tokens",
        "spec_decode_num_draft_tokens",
    ),
    _counter(
        "accepted_tokens",
        "Drafted tokens that were right.",
        "accepted_tokens",
        "spec_decode_num_accepted_tokens",
    ),
    _counter(
        "unplanned_compiles",
        "Programs compiled while requests waited for them.",
        "unplanned_compiles",
    ),
)


class Metrics:
    """Everything that /metrics tells; safe to feed from any thread."""

    def __init__(
        self,
        model_name: str,
        limits: Limits,
        state: Callable[[], EngineState],
    ):
        self._labels = {"model_name": model_name, "engine": "0"}
        self._limits = limits
        self._state = state
        self._make_histograms()
        self._make_counters()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(self._collect))

    def ended(
        self,
        times: Times,
        prompt_tokens: int,
        generated_tokens: int,
        reason: FinishReason,
        n: int,
        max_tokens: int,
        preemptions: int,
        cached_tokens: int,
    ) -> None:
        """Take in a choice that ended; `n` and `max_tokens` are what was asked."""
        self._requests.labels(reason).inc()
        self._successes.labels(_VLLM_REASON[reason]).inc()
        counts = {
            "request_prompt_tokens": prompt_tokens,
            "request_cached_tokens": cached_tokens,
            "request_generated_tokens": generated_tokens,
            "request_n": n,
            "request_max_tokens": max_tokens,
            "request_longest_answer_tokens": generated_tokens,
            "request_preemptions": preemptions,
            **_durations(times, generated_tokens),
        }
        for name, value in counts.items():
            self._histograms[f"llmos_{name}"].observe(value)

    def inter_token(self, seconds: float) -> None:
        """Take in the time between two tokens of one answer."""
        self._histograms["llmos_inter_token_seconds"].observe(seconds)

    def http(self, path: str, method: str, status: int, seconds: float) -> None:
        """Take in a request that was answered; `path` is one of few, or `other`."""
        self._http_requests.labels(path, method, f"{status // 100}xx").inc()
        self._http_seconds.labels(path, method).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was turned down."""
        self._rejected.labels(reason).inc()

    def histograms(self) -> dict[str, dict[str, Any]]:
        """Return `ttft` and `itl` for the page: `buckets` with `le` (seconds, None for
        the last) and `count` (of all up to it), `count` and `sum`."""
        return {
            "ttft": _plain(self._histograms["llmos_time_to_first_token_seconds"]),
            "itl": _plain(self._histograms["llmos_inter_token_seconds"]),
        }

    def render(self) -> tuple[bytes, str]:
        """Return the text that Prometheus reads, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _make_histograms(self) -> None:
        sizes = _one_two_five(self._limits.context)
        self._vllm_names: dict[str, str] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, vllm, help, buckets in (
            ("time_to_first_token_seconds", "time_to_first_token_seconds",
             "From a request's arrival to its first token.", FIRST_TOKEN_S),
            ("inter_token_seconds", "inter_token_latency_seconds",
             "Between two tokens of one answer.", INTER_TOKEN_S),
            ("time_per_output_token_seconds", "request_time_per_output_token_seconds",
             "Mean of an answer, after its first token.", INTER_TOKEN_S),
            ("request_seconds", "e2e_request_latency_seconds",
             "From arrival to end.", REQUEST_S),
            ("queue_seconds", "request_queue_time_seconds",
             "From arrival to admission.", REQUEST_S),
            ("inference_seconds", "request_inference_time_seconds",
             "From admission to end.", REQUEST_S),
            ("prefill_seconds", "request_prefill_time_seconds",
             "From admission to the first token.", REQUEST_S),
            ("decode_seconds", "request_decode_time_seconds",
             "From the first token to the end.", REQUEST_S),
            ("request_prompt_tokens", "request_prompt_tokens",
             "Tokens of a prompt.", sizes),
            ("request_cached_tokens", None,
             "Tokens of a prompt that the prefix cache had.", (0, *sizes)),
            ("request_generated_tokens", "request_generation_tokens",
             "Tokens of an answer.", sizes),
            ("request_longest_answer_tokens", "request_max_num_generation_tokens",
             "Tokens of the longest answer of a request.", sizes),
            ("request_n", "request_params_n", "Answers asked for.", _FEW[1:]),
            ("request_max_tokens", "request_params_max_tokens",
             "Tokens asked for at most.", sizes),
            ("request_preemptions", "request_num_preemptions",
             "Times that a request lost its pages.", _FEW),
        ):  # fmt: skip
            name = f"llmos_{name}"
            self._histograms[name] = Histogram(
                name, help, registry=None, buckets=buckets
            )
            if vllm is not None:
                self._vllm_names[name] = f"vllm:{vllm}"

    def _make_counters(self) -> None:
        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(name, help, labels, registry=None)

        self._requests = counter("llmos_requests", "Requests that ended.", "reason")
        for reason in get_args(FinishReason):
            self._requests.labels(reason)
        self._successes = counter(
            "vllm:request_success", "Requests that ended.", "finished_reason"
        )
        for reason in sorted(set(_VLLM_REASON.values())):
            self._successes.labels(reason)
        self._rejected = counter(
            "llmos_rejected_requests", "Requests that were turned down.", "reason"
        )
        handled = ("handler", "method")
        self._http_requests = counter(
            "http_requests", "HTTP requests by what came of them.", *handled, "status"
        )
        self._http_seconds = Histogram(
            "http_request_duration_seconds",
            "HTTP requests, to the end of the answer.",
            handled,
            registry=None,
            buckets=_HTTP_S,
        )

    def _collect(self) -> Iterator[Metric]:
        state = self._state()
        yield from self._readings(state)
        yield self._cache_info()
        yield self._batches(state)
        for name, histogram in self._histograms.items():
            for metric in histogram.collect():
                yield self._copy(metric, name)
                if name in self._vllm_names:
                    yield self._copy(metric, self._vllm_names[name])
        for counter in (self._requests, self._successes, self._rejected):
            for metric in counter.collect():
                yield self._copy(metric, metric.name)
        for plain in (self._http_requests, self._http_seconds):
            for metric in plain.collect():
                yield self._copy(metric, metric.name, labels={})

    def _readings(self, state: EngineState) -> Iterator[Metric]:
        found: dict[str, Metric] = {}
        for one in _READINGS:
            value = float(one.value(state, self._limits))
            kind = "counter" if one.is_counter else "gauge"
            names = ((one.name, one.label), (f"vllm:{one.vllm}", one.vllm_label))
            for name, label in names:
                if not name or name == "vllm:None":
                    continue
                metric = found.setdefault(name, Metric(name, one.help, kind))
                metric.add_sample(
                    name + ("_total" if one.is_counter else ""),
                    {**self._labels, **dict([label] if label else [])},
                    value,
                )
        yield from found.values()

    def _cache_info(self) -> Metric:
        limits = self._limits
        tokens = limits.pages * limits.page_size
        metric = Metric("vllm:cache_config_info", "How large the KV cache is.", "gauge")
        labels = {
            **self._labels,
            "block_size": str(limits.page_size),
            "num_gpu_blocks": str(limits.pages),
            "kv_cache_size_tokens": str(tokens),
            "kv_cache_max_concurrency": f"{_ratio(tokens, limits.context):.4g}",
        }
        metric.add_sample(metric.name, labels, 1.0)
        return metric

    def _batches(self, state: EngineState) -> Metric:
        metric = Metric("llmos_batches", "Batches of texts, by their rows.", "counter")
        for rows, count in state.batches.items():
            labels = {**self._labels, "rows": str(rows)}
            metric.add_sample("llmos_batches_total", labels, float(count))
        return metric

    def _copy(
        self, metric: Metric, name: str, labels: dict[str, str] | None = None
    ) -> Metric:
        """The same under another name and with our labels; when it was made is left
        out."""
        copy = Metric(name, metric.documentation, metric.type)
        more = self._labels if labels is None else labels
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                suffix = sample.name.removeprefix(metric.name)
                copy.add_sample(name + suffix, {**more, **sample.labels}, sample.value)
        return copy


class _Collector(Collector):
    """A function in the dress that a registry wants."""

    def __init__(self, collect: Callable[[], Iterator[Metric]]):
        self._collect = collect

    def collect(self) -> Iterator[Metric]:
        return self._collect()


def _durations(times: Times, generated_tokens: int) -> dict[str, float]:
    """Seconds by name, of what a request came to."""
    found = {"request_seconds": times.ended - times.queued}
    if times.admitted is not None:
        found["queue_seconds"] = times.admitted - times.queued
        found["inference_seconds"] = times.ended - times.admitted
    if times.first_token is not None:
        found["time_to_first_token_seconds"] = times.first_token - times.queued
        decode_s = times.ended - times.first_token
        found["decode_seconds"] = decode_s
        if times.admitted is not None:
            found["prefill_seconds"] = times.first_token - times.admitted
        if generated_tokens > 1:
            found["time_per_output_token_seconds"] = decode_s / (generated_tokens - 1)
    return {name: max(0.0, seconds) for name, seconds in found.items()}


def _plain(histogram: Histogram) -> dict[str, Any]:
    buckets: list[dict[str, Any]] = []
    whole: dict[str, Any] = {"buckets": buckets}
    for metric in histogram.collect():
        for sample in metric.samples:
            if sample.name.endswith("_bucket"):
                edge = sample.labels["le"]
                buckets.append(
                    {
                        "le": None if edge == "+Inf" else float(edge),
                        "count": int(sample.value),
                    }
                )
            elif sample.name.endswith("_count"):
                whole["count"] = int(sample.value)
            elif sample.name.endswith("_sum"):
                whole["sum"] = sample.value
    return whole


def _one_two_five(most: int) -> Sequence[float]:
    """1, 2, 5, 10, ... up to `most`, as vLLM's build_1_2_5_buckets."""
    steps = (step * 10**power for power in range(10) for step in (1, 2, 5))
    return [float(one) for one in steps if one <= most] or [1.0]


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
