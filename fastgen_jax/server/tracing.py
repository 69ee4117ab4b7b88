"""Tracing: requests that have ended, as spans, to a collector of OpenTelemetry's protocol (OTLP).

Spans are made once, from the times that a request has left behind, and sent by a thread of the SDK
from a bounded queue; nothing is done while a request runs. Attributes have the names of the
semantic conventions for generative AI. Texts are never among them.

Needs the packages of the extra `otel`: only the command line imports this file, where it is asked
for.
"""

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any, cast

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from fastgen_jax.server.generation import Generation
from fastgen_jax.server.origin import Origin

log = logging.getLogger("fastgen_jax.server")

CLOSE_SECONDS = 2.0  # that the last spans may take
OPERATIONS = {
    "/v1/chat/completions": "chat", "/v1/responses": "chat", "/v1/embeddings": "embeddings",
}  # fmt: skip
SERVICE = "fastgen_jax"  # unless OTEL_SERVICE_NAME has another


class Tracer:
    """Makes a span of each request, and in it one each of queue, prefill and decode.

    Args:
        endpoint: URL that takes traces, as http://localhost:4318/v1/traces.
        model_name: what clients call the model.
    """

    def __init__(self, endpoint: str, model_name: str):
        self.model_name = model_name
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        exporter = Exporter(OTLPSpanExporter(endpoint), endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(SERVICE)
        self._propagator = TraceContextTextMapPropagator()

    def request(self, origin: Origin, status: int):
        """A request has ended, and its answer with it."""
        generation = origin.generation
        if generation is None:
            return
        now, offset = time.monotonic(), time.time_ns() - time.monotonic_ns()

        def at(seconds: float) -> int:
            """Nanoseconds since 1970 at a time of time.monotonic()."""
            return offset + int(seconds * 1e9)

        span = self._tracer.start_span(
            "llm_request", self._parent(origin), SpanKind.SERVER, start_time=at(generation.arrival)
        )
        if span.is_recording():
            span.set_attributes(self._attributes(origin, generation, status))
            if status >= 500 or (generation.error is not None and generation.error.status >= 500):
                span.set_status(StatusCode.ERROR)
            inside = set_span_in_context(span)
            for name, start, end in phases(generation):
                phase = self._tracer.start_span(name, inside, start_time=at(start))
                phase.end(at(end))
        span.end(at(now))

    def close(self):
        """Sends what is left, and waits CLOSE_SECONDS at most for who takes it."""
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        ending.join(CLOSE_SECONDS)

    def _parent(self, origin: Origin) -> Context:
        """The client's span, if it named one that can be read; never ours."""
        fields = {"traceparent": origin.traceparent, "tracestate": origin.tracestate}
        return self._propagator.extract(fields, Context())

    def _attributes(self, origin: Origin, generation: Generation, status: int) -> dict[str, Any]:
        path = origin.route.partition(" ")[2]
        reasons = [choice.finish_reason or "error" for choice in generation.choices]
        first_times = [choice.first_time for choice in generation.choices if choice.first_time]
        attributes = {
            "gen_ai.operation.name": OPERATIONS.get(path, "text_completion"),
            "gen_ai.provider.name": SERVICE,
            "gen_ai.request.model": self.model_name,
            "gen_ai.response.model": self.model_name,
            "gen_ai.request.choice.count": generation.n_samples,
            "gen_ai.request.stream": generation.is_streaming,
            "gen_ai.response.finish_reasons": reasons,
            "gen_ai.usage.input_tokens": generation.n_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": generation.n_reused_tokens,
            "gen_ai.usage.output_tokens": generation.n_tokens,
            "gen_ai.usage.reasoning.output_tokens": generation.n_thought_tokens,
            "http.route": path,
            "http.response.status_code": status,
            "fastgen.request_id": origin.request_id,
        }
        if generation.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = generation.max_tokens
        if first_times:
            first = min(first_times) - generation.arrival
            attributes["gen_ai.response.time_to_first_chunk"] = first
        if generation.error is not None:
            attributes["error.type"] = generation.error.code or generation.error.type
        return attributes


def phases(generation: Generation) -> list[tuple[str, float, float]]:
    """Name, start and end: one after the other, each as soon as one sample has come so far."""
    begun = [choice for choice in generation.choices if choice.n_tokens]
    if not begun:
        return []
    start = max(min(choice.start_time for choice in begun), generation.arrival)
    first = min(choice.first_time for choice in begun)
    last = max(choice.last_time for choice in begun)
    return [
        ("queue", generation.arrival, start), ("prefill", start, first), ("decode", first, last)
    ]  # fmt: skip


class Exporter(SpanExporter):
    """The SDK's, whose failures are told once until it works again."""

    def __init__(self, inner: SpanExporter, endpoint: str):
        self._inner = inner
        self._endpoint = endpoint
        self._n_lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._inner.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._n_lost:
                log.warning("traces do not reach %s; until they do, they are lost", self._endpoint)
            self._n_lost += len(spans)
        elif self._n_lost:
            log.warning("traces reach %s again; %d spans were lost", self._endpoint, self._n_lost)
            self._n_lost = 0
        return result

    def shutdown(self):
        self._inner.shutdown()


def _resource() -> Resource:
    """What OpenTelemetry's environment variables say of this service, which has a name at least."""
    found = Resource.create()
    name = cast(str, found.attributes.get(SERVICE_NAME, ""))
    return found.merge(Resource({SERVICE_NAME: SERVICE})) if "unknown" in name else found
