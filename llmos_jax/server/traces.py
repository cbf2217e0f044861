"""A span of OpenTelemetry for each request, where somebody wants them.

On where `OTEL_EXPORTER_OTLP_ENDPOINT` (or the one for traces) is set; the SDK reads its
other variables itself. Attributes are named as OpenTelemetry's conventions for
generative AI say (status: development), and a `traceparent` that comes is continued.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from llmos_jax.errors import ConfigError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NAME = "llmos_jax.server"


class Traces:
    """Makes spans of requests that have ended."""

    def __init__(self, provider: Any):
        """Take a TracerProvider of the SDK."""
        from opentelemetry.trace.propagation.tracecontext import (
            TraceContextTextMapPropagator,
        )

        self._provider = provider
        self._tracer = provider.get_tracer(_NAME)
        self._incoming = TraceContextTextMapPropagator()

    @classmethod
    def of_environment(cls) -> Traces | None:
        """What the environment asks for; None: nothing.

        Raises:
            ConfigError: it asks, and OpenTelemetry is not installed.
        """
        if not any(os.environ.get(name) for name in _ENDPOINTS):
            return None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as problem:
            raise ConfigError(
                f"{_ENDPOINTS[0]} is set, and {problem.name} is not installed. Get it "
                "with pip install llmos_jax[traces], or unset the variable."
            ) from None
        provider = TracerProvider()
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def ended(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        seconds: float,
        attributes: Mapping[str, Any],
    ) -> None:
        """Tell of a request that ended just now and took so many seconds."""
        end = time.time_ns()
        span = self._tracer.start_span(
            f"{method} {path}",
            context=self._incoming.extract(dict(headers)),
            start_time=end - int(seconds * 1e9),
            attributes={"http.request.method": method, "url.path": path, **attributes},
        )
        span.end(end)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()
