"""Prometheus metrics: latencies counted by the event loop, the rest read from the engine.

Labels come from closed sets (the served model, finish reasons): no request can add a series.
"""

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from fastgen_jax.engine.types import Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
BETWEEN_TOKENS_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
    7680,
)  # fmt: skip
FINISH_REASONS = ("stop", "length", "abort", "error")
LABELS = ("model_name",)


class Histogram:
    """Counts of observations per bucket. One writer: the event loop."""

    def __init__(self, buckets: tuple[float, ...]):
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float):
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, observations up to it) as Prometheus wants them."""
        total, rows = 0, []
        bounds = [*(str(float(bound)) for bound in self.buckets), "+Inf"]
        for bound, count in zip(bounds, self.counts, strict=True):
            total += count
            rows.append((bound, float(total)))
        return rows


class Metrics:
    """What the server counts itself. INVARIANT: one first_token entry per sample that got one."""

    def __init__(self, model_name: str):
        self.model_name = model_name
        self.first_token = Histogram(FIRST_TOKEN_BUCKETS)
        self.between_tokens = Histogram(BETWEEN_TOKENS_BUCKETS)
        self.request = Histogram(REQUEST_BUCKETS)
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)

    def render(self, stats: Stats | None) -> bytes:
        """The exposition text; before the engine exists its values are zero."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(self, stats))
        return generate_latest(registry)


class _Collector:
    def __init__(self, metrics: Metrics, stats: Stats | None):
        self.metrics = metrics
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats, label = self.stats, [self.metrics.model_name]
        for name, text, field in GAUGES:
            gauge = GaugeMetricFamily(f"fastgen:{name}", text, labels=LABELS)
            gauge.add_metric(label, getattr(stats, field) if stats else 0)
            yield gauge
        for name, text, field in COUNTERS:
            counter = CounterMetricFamily(f"fastgen:{name}", text, labels=LABELS)
            counter.add_metric(label, getattr(stats, field) if stats else 0)
            yield counter
        finished = CounterMetricFamily(
            "fastgen:request_success", "Samples finished", labels=(*LABELS, "finished_reason")
        )
        for reason, count in self.metrics.finished.items():
            finished.add_metric([*label, reason], count)
        yield finished
        for name, text, field in HISTOGRAMS:
            histogram: Histogram = getattr(self.metrics, field)
            family = HistogramMetricFamily(f"fastgen:{name}", text, labels=LABELS)
            family.add_metric(label, histogram.cumulative(), histogram.sum)
            yield family


GAUGES = (
    ("num_requests_running", "Sequences in the running batch", "n_running"),
    ("num_requests_waiting", "Sequences waiting to run", "n_waiting"),
    ("kv_cache_usage_perc", "Share of the KV blocks in use, from 0 to 1", "kv_usage"),
)
COUNTERS = (
    ("prompt_tokens", "Prompt tokens computed", "n_prompt_tokens"),
    ("generation_tokens", "Tokens generated", "n_generated_tokens"),
    ("num_preemptions", "Sequences preempted", "n_preemptions"),
    ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", "n_prefix_queries"),
    ("prefix_cache_hits", "Prompt tokens found in the prefix cache", "n_prefix_hits"),
    ("engine_steps", "Steps run", "n_steps"),
    ("engine_step_failures", "Steps that failed", "n_failed_steps"),
    ("nonfinite_samples", "Samples ended because of logits not finite", "n_nonfinite"),
)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "Arrival to first token", "first_token"),
    ("inter_token_latency_seconds", "One token to the next of a sample", "between_tokens"),
    ("e2e_request_latency_seconds", "Arrival to the end of a sample", "request"),
)
