"""Prometheus metrics: what requests took, counted by the event loop; the rest is the engine's.

Each family has the name and meaning that vLLM gives it, so that its dashboards and autoscalers
read them. Labels come from closed sets (the served model, reasons): no request can add a series.
The text is written here: prometheus_client's objects take the event loop ten times as long.
"""

import itertools
import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, ProcessCollector, generate_latest

from fastgen_jax.engine.types import STEP_SIZES, Stats
from fastgen_jax.server.attainment import Attainment
from fastgen_jax.server.generation import Choice, Generation
from fastgen_jax.server.limits import KINDS

CONTENT_TYPE = CONTENT_TYPE_LATEST
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
    7680,
)  # fmt: skip
SIZE_BUCKETS = (*(m * 10**e for e in range(6) for m in (1, 2, 5)), 10**6)
N_BUCKETS = (1, 2, 5, 10, 20)
STATUSES = ("2xx", "3xx", "4xx", "5xx")
FINISH_REASONS = ("stop", "length", "abort", "error")
GAUGES = (
    ("num_requests_running", "Sequences in the running batch", "n_running"),
    ("num_requests_waiting", "Sequences waiting to run", "n_waiting"),
    ("kv_cache_usage_perc", "Share of the KV blocks in use, from 0 to 1", "kv_usage"),
    ("engine_programs", "Programs of steps that there are to be", "n_programs_wanted"),
    ("engine_programs_compiled", "Those that are compiled", "n_programs"),
    ("engine_programs_failed", "Sizes of steps that cannot be compiled", "n_programs_failed"),
)
COUNTERS = (
    ("prompt_tokens_total", "Prompt tokens of the samples that got a token", "n_prompt_tokens"),
    ("prompt_tokens_cached_total", "Prompt tokens found in the prefix cache", "n_prefix_hits"),
    ("generation_tokens_total", "Tokens generated", "n_generated_tokens"),
    ("num_preemptions_total", "Sequences preempted", "n_preemptions"),
    (
        "prefix_cache_queries_total",
        "Prompt tokens looked up in the prefix cache",
        "n_prefix_queries",
    ),
    ("prefix_cache_hits_total", "Prompt tokens found in the prefix cache", "n_prefix_hits"),
    ("engine_steps_total", "Steps run", "n_steps"),
    ("engine_step_failures_total", "Steps that failed", "n_failed_steps"),
    ("nonfinite_samples_total", "Samples ended because of logits not finite", "n_nonfinite"),
)
HISTOGRAMS = (
    ("time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN_BUCKETS),
    ("inter_token_latency_seconds", "One token to the next of a sample", TOKEN_BUCKETS),
    ("request_time_per_output_token_seconds", "Mean of these times of a sample", TOKEN_BUCKETS),
    ("e2e_request_latency_seconds", "Arrival to the end of a sample", REQUEST_BUCKETS),
    ("request_queue_time_seconds", "Arrival to the first step", REQUEST_BUCKETS),
    ("request_prefill_time_seconds", "First step to first token", REQUEST_BUCKETS),
    ("request_decode_time_seconds", "First token to last", REQUEST_BUCKETS),
    ("request_inference_time_seconds", "First step to last token", REQUEST_BUCKETS),
    ("request_prompt_tokens", "Prompt tokens of a sample", SIZE_BUCKETS),
    ("request_prefill_kv_computed_tokens", "Those not found in the prefix cache", SIZE_BUCKETS),
    ("request_generation_tokens", "Tokens generated for a sample", SIZE_BUCKETS),
    ("request_max_num_generation_tokens", "Tokens of a prompt's longest sample", SIZE_BUCKETS),
    ("request_params_max_tokens", "max_tokens of a prompt, where it was given", SIZE_BUCKETS),
    ("request_params_n", "n of a prompt", N_BUCKETS),
)
SLEEPS = ("awake", "weights_offloaded", "discard_all")  # by level
N_NEWEST = {"time_to_first_token_seconds": 200, "inter_token_latency_seconds": 2000}


class Family(NamedTuple):
    """What is said of one name; a row is a line after the name."""

    kind: str
    name: str
    text: str
    rows: list[str]

    def shown(self, prefix: str = "") -> str:
        name = prefix + self.name
        lines = [f"# HELP {name} {self.text}", f"# TYPE {name} {self.kind}"]
        return "\n".join([*lines, *(name + row for row in self.rows), ""])


class Histogram:
    """Counts of observations per bucket, and the newest as they are. One writer: the event loop."""

    def __init__(self, buckets: tuple[float, ...], n_newest: int = 0):
        self.buckets = buckets
        self.newest: deque[float] = deque(maxlen=n_newest)
        self.edges = edges_of(buckets)
        self.counts = [0] * (len(buckets) + 1)
        self.sum = 0.0

    def observe(self, value: float):
        self.counts[bisect_left(self.buckets, value)] += 1
        self.sum += value
        self.newest.append(value)


class Metrics:
    """What the server counts itself. INVARIANT: one time to first token per sample that got one.

    Args:
        prefixes: under which every family is shown.
        attainment: of the service level.
    """

    def __init__(
        self, model_name: str, prefixes: tuple[str, ...], attainment: Attainment | None = None
    ):
        self.attainment = Attainment() if attainment is None else attainment
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.n_limited: dict[str, int] = dict.fromkeys(KINDS, 0)  # refused by a client's limits
        self.histograms = {
            name: Histogram(buckets, N_NEWEST.get(name, 0)) for name, _, buckets in HISTOGRAMS
        }
        self.answers: dict[tuple[str, str], int] = {}  # by path and kind of status
        self.answer_seconds: dict[str, float] = {}  # by path
        self.sleep_level = 0
        self.weight_updates = dict.fromkeys(("done", "refused"), 0)
        self.cache = ""  # labels of cache_config_info, once there is an engine
        self._labels = f'engine="0",model_name="{escaped(model_name)}"'
        self.prefixes = prefixes
        self._process = ProcessCollector(registry=None)

    def expect(self, paths: Sequence[str]):
        """Names further paths whose answers are counted; others are not."""
        self.answers |= dict.fromkeys(itertools.product(paths, STATUSES), 0)
        self.answer_seconds |= dict.fromkeys(paths, 0.0)

    def answered(self, path: str, status: int, seconds: float = 0.0):
        """One more answer, which took so long to its end."""
        key = path, f"{status // 100}xx"
        if key in self.answers:
            self.answers[key] += 1
            self.answer_seconds[path] += seconds

    def observe(self, name: str, value: float):
        """One more value of a histogram; none is negative, or its sum would fall."""
        self.histograms[name].observe(max(value, 0.0))

    def observe_sample(self, generation: Generation, choice: Choice, now: float):
        """What one sample took, which has ended."""
        n_prompt = len(generation.prompts[generation.prompt_of(choice)])
        self.observe("request_prompt_tokens", n_prompt)
        self.observe("request_prefill_kv_computed_tokens", n_prompt - choice.n_reused)
        self.observe("request_generation_tokens", choice.n_tokens)
        self.observe("e2e_request_latency_seconds", now - generation.arrival)
        if not choice.n_tokens:
            return
        decoding = choice.last_time - choice.first_time
        self.observe("request_queue_time_seconds", choice.start_time - generation.arrival)
        self.observe("request_prefill_time_seconds", choice.first_time - choice.start_time)
        self.observe("request_decode_time_seconds", decoding)
        self.observe("request_inference_time_seconds", choice.last_time - choice.start_time)
        n_times = max(choice.n_tokens - 1, 1)
        self.observe("request_time_per_output_token_seconds", decoding / n_times)
        first = choice.first_time - generation.arrival
        self.attainment.ended(n_prompt, first, choice.pace.slowest)

    def observe_failure(self, generation: Generation, *, is_fault: bool):
        """What the open samples of a generation met, which ends by a fault, or whose client left
        or was sent away.
        """
        for choice in generation.choices:
            if choice.finish_reason is not None or choice.is_silent:
                continue
            if is_fault:
                self.attainment.failed()
                continue
            n_prompt = len(generation.prompts[generation.prompt_of(choice)])
            first = (choice.first_time or time.monotonic()) - generation.arrival
            self.attainment.ended(n_prompt, first, choice.pace.slowest, is_whole=False)

    def observe_requests(self, generation: Generation):
        """What was asked for each prompt of a generation, which has ended."""
        n = generation.n_samples
        for first in range(0, len(generation.choices), n):
            longest = max(choice.n_tokens for choice in generation.choices[first : first + n])
            self.observe("request_params_n", n)
            self.observe("request_max_num_generation_tokens", longest)
            if generation.max_tokens is not None:
                self.observe("request_params_max_tokens", generation.max_tokens)

    def render(self, stats: Stats | None) -> bytes:
        """The exposition text; before the engine exists its values are zero."""
        families = list(self._families(stats))
        shown = [family.shown(f"{prefix}:") for prefix in self.prefixes for family in families]
        shown += [family.shown() for family in self._http_families()]
        return generate_latest(self._process) + "".join(shown).encode()

    def _families(self, stats: Stats | None) -> Iterator[Family]:
        def value(field: str) -> float:
            return getattr(stats, field) if stats else 0

        for name, text, field in GAUGES:
            yield self._family("gauge", name, text, {"": value(field)})
        for name, text, field in COUNTERS:
            yield self._family("counter", name, text, {"": value(field)})
        n_ended = {f',finished_reason="{reason}"': n for reason, n in self.finished.items()}
        yield self._family("counter", "request_success_total", "Samples finished", n_ended)
        n_limited = {f',limit="{kind}"': n for kind, n in self.n_limited.items()}
        text = "Requests refused by a limit of their API key"
        yield self._family("counter", "rate_limited_requests_total", text, n_limited)
        sleeps = {f',sleep_state="{s}"': int(i == self.sleep_level) for i, s in enumerate(SLEEPS)}
        yield self._family("gauge", "engine_sleep_state", "1 for the state that it is in", sleeps)
        updates = {f',outcome="{outcome}"': n for outcome, n in self.weight_updates.items()}
        yield self._family("counter", "weight_updates_total", "Of /update_weights", updates)
        waiting = {',reason="capacity"': value("n_waiting"), ',reason="deferred"': 0}
        yield self._family("gauge", "num_requests_waiting_by_reason", "Why they wait", waiting)
        n_prompt = self.histograms["request_prompt_tokens"].sum
        n_computed = self.histograms["request_prefill_kv_computed_tokens"].sum
        sources = {',source="local_compute"': n_computed,
                   ',source="local_cache_hit"': n_prompt - n_computed}  # fmt: skip
        text = "Prompt tokens of samples that ended"
        yield self._family("counter", "prompt_tokens_by_source_total", text, sources)
        if self.cache:
            yield self._family("gauge", "cache_config_info", "The KV cache", {self.cache: 1})
        yield from self._service_levels()
        for name, text, _ in HISTOGRAMS:
            histogram = self.histograms[name]
            yield self._histogram(name, text, histogram.edges, histogram.counts, histogram.sum)
        n_steps = stats.steps_by_size if stats else [0] * len(STEP_EDGES)
        name, text = "iteration_tokens_total", "Tokens of a step"
        yield self._histogram(name, text, STEP_EDGES, n_steps, value("n_step_tokens"))

    def _service_levels(self) -> Iterator[Family]:
        attainment = self.attainment
        labels = [f',token_rate="{rate:g}"' for rate in attainment.sla.token_rates]
        shares = dict(zip(labels, attainment.shares(), strict=True))
        text = "Share of the newest samples that meet the service level, from 0 to 1"
        yield self._family("gauge", "sla_attainment_ratio", text, shares)
        throughputs = dict(zip(labels, attainment.throughputs(), strict=True))
        text = "Samples a second that meet the service level"
        yield self._family("gauge", "effective_throughput_per_second", text, throughputs)

    def _http_families(self) -> Iterator[Family]:
        """Without a prefix, as the middleware that vLLM uses names them."""
        n_answers = dict.fromkeys(self.answer_seconds, 0)
        for (path, _), n in self.answers.items():
            n_answers[path] += n
        rows = [
            f'{{handler="{path}",method="POST",status="{status}"}} {n}'
            for (path, status), n in self.answers.items()
        ]
        yield Family("counter", "http_requests_total", "Answers by route", rows)
        rows = []
        for path, seconds in self.answer_seconds.items():
            labels, n = f'handler="{path}",method="POST"', n_answers[path]
            rows += [f'_bucket{{{labels},le="+Inf"}} {n}', f"_count{{{labels}}} {n}"]
            rows += [f"_sum{{{labels}}} {seconds}"]
        yield Family("histogram", "http_request_duration_seconds", "Their time, streams too", rows)

    def _family(self, kind: str, name: str, text: str, values: Mapping[str, float]) -> Family:
        """Gauges or counters by their further labels."""
        rows = [f"{{{self._labels}{more}}} {spelled(value)}" for more, value in values.items()]
        return Family(kind, name, text, rows)

    def _histogram(
        self, name: str, text: str, edges: Sequence[str], counts: Sequence[int], total: float
    ) -> Family:
        labels, n_all = self._labels, itertools.accumulate(counts)
        rows = [f"_bucket{{{labels}{edge}}} {n}" for edge, n in zip(edges, n_all, strict=True)]
        rows += [f"_count{{{labels}}} {sum(counts)}", f"_sum{{{labels}}} {total}"]
        return Family("histogram", name, text, rows)


def cache_labels(config: Any) -> str:
    """What cache_config_info tells of an EngineConfig."""
    values = {
        "block_size": config.block_size,
        "num_gpu_blocks": config.num_kv_blocks,
        "cache_dtype": config.cache_dtype,
        "enable_prefix_caching": config.enable_prefix_caching,
    }
    return "".join(f',{name}="{value}"' for name, value in values.items())


def spelled(value: float) -> str:
    """As the exposition format spells it."""
    return "NaN" if math.isnan(value) else str(value)


def edges_of(buckets: Sequence[float]) -> tuple[str, ...]:
    """The labels of a histogram's buckets."""
    return (*(f',le="{float(bound)}"' for bound in buckets), ',le="+Inf"')


def escaped(text: str) -> str:
    """The value of a label as the exposition format wants it."""
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


STEP_EDGES = edges_of(STEP_SIZES)
