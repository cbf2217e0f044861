"""A span for each request, in the trace that it came with."""

from __future__ import annotations

import sys

import pytest
from fake_engine import FakeEngine
from serving_here import NAME, client_of

from llmos_jax.errors import ConfigError
from llmos_jax.server.traces import Traces

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_a_request_is_a_span_of_the_trace_it_came_with() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        InMemorySpanExporter,
    )

    kept, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    with client_of(FakeEngine()) as client:
        client.app.room.traces = Traces(provider)
        client.post(
            "/v1/completions",
            {"model": NAME, "prompt": "hello", "max_tokens": 4},
            headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"},
        )
        client.post("/v1/completions", {"model": "other", "prompt": "hello"})
        client.get("/health")
    first, second = kept.get_finished_spans()
    assert first.name == "POST /v1/completions"
    assert f"{first.context.trace_id:032x}" == TRACE
    assert first.attributes["gen_ai.request.model"] == NAME
    assert first.attributes["gen_ai.usage.input_tokens"] == 5
    assert first.attributes["gen_ai.usage.output_tokens"] == 4
    assert first.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert 0 <= first.end_time - first.start_time < 20e9
    assert second.attributes["http.response.status_code"] == 404
    assert f"{second.context.trace_id:032x}" != TRACE


def test_traces_are_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", raising=False)
    assert Traces.of_environment() is None


def test_traces_that_cannot_be_sent_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    name = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="is not installed. Get it with pip install"):
        Traces.of_environment()
