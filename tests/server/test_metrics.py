"""What /metrics says of requests, under our names and under vLLM's."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.metrics import Metrics
from tests.server.running import TEXT, Running, serving, wait_until

# What vLLM's Grafana dashboards query of a server without speculation, adapters, images and remote
# caches: samples, and the labels by which they are chosen or grouped.
TIMES = ("time_to_first_token_seconds", "inter_token_latency_seconds",
         "request_time_per_output_token_seconds", "e2e_request_latency_seconds",
         "request_queue_time_seconds", "request_prefill_time_seconds",
         "request_decode_time_seconds", "request_inference_time_seconds")  # fmt: skip
SIZES = ("request_prompt_tokens", "request_generation_tokens", "request_params_n",
         "request_params_max_tokens", "request_max_num_generation_tokens",
         "request_prefill_kv_computed_tokens", "iteration_tokens_total")  # fmt: skip
QUERIED = {
    "num_requests_running": {},
    "num_requests_waiting": {},
    "num_requests_waiting_by_reason": {"reason": "capacity"},
    "kv_cache_usage_perc": {},
    "prompt_tokens_total": {},
    "prompt_tokens_cached_total": {},
    "generation_tokens_total": {},
    "num_preemptions_total": {},
    "prefix_cache_queries_total": {},
    "prefix_cache_hits_total": {},
    "request_success_total": {"finished_reason": "length"},
    "prompt_tokens_by_source_total": {"source": "local_compute"},
    "cache_config_info": {"block_size": "16", "num_gpu_blocks": "256", "cache_dtype": "float32"},
    **{f"{name}_sum": {} for name in TIMES + SIZES},
    **{f"{name}_count": {} for name in TIMES + SIZES},
    **{f"{name}_bucket": {"le": "+Inf"} for name in TIMES + SIZES},
}
# Bounds that are offered as service levels, each the edge of a bucket.
LEVELS = {
    "time_to_first_token_seconds": ("0.1", "0.25", "0.5", "0.75", "1.0", "2.5", "5.0", "10.0"),
    "request_time_per_output_token_seconds":
        ("0.025", "0.05", "0.075", "0.1", "0.15", "0.2", "0.3", "0.5"),
}  # fmt: skip


def samples(up: Running) -> list[Sample]:
    families = text_string_to_metric_families(up.get("/metrics").text)
    return [sample for family in families for sample in family.samples]


def values(up: Running, prefix: str = "vllm") -> dict[str, float]:
    """Of the samples that have no label of their own."""
    return {
        sample.name.removeprefix(f"{prefix}:"): sample.value
        for sample in samples(up)
        if set(sample.labels) <= {"engine", "model_name"}
    }


@pytest.fixture(scope="module")
def used(tokenizer):
    """A server after three samples of two prompts and a request that was refused."""
    with serving(tokenizer) as up:
        up.post("/v1/completions", {"prompt": [TEXT], "max_tokens": 5, "n": 2})
        up.post("/v1/completions", {"prompt": "a", "max_tokens": 50})
        up.post("/v1/completions", {"prompt": "a", "max_tokens": -1})
        yield up


@pytest.mark.parametrize(("name", "labels"), QUERIED.items())
def test_every_query_of_vllms_dashboards_finds_a_sample(used, name, labels):
    wanted = {"model_name": "fake", "engine": "0"} | labels
    found = [s for s in samples(used) if s.name == f"vllm:{name}"]
    assert any(wanted.items() <= sample.labels.items() for sample in found)


@pytest.mark.parametrize(("name", "level"), [(n, le) for n, all in LEVELS.items() for le in all])
def test_service_levels_of_the_dashboards_are_edges_of_buckets(used, name, level):
    edges = {s.labels["le"] for s in samples(used) if s.name == f"vllm:{name}_bucket"}
    assert level in edges


@pytest.mark.parametrize("prefix", ["fastgen", "vllm"])
def test_metrics_count_what_happened(used, tokenizer, prefix):
    seen = values(used, prefix)
    assert seen["generation_tokens_total"] == 10 + len(tokenizer.encode("a"))
    assert seen["prompt_tokens_total"] > 5
    assert seen["num_requests_running"] == seen["num_preemptions_total"] == 0
    ends = [s for s in samples(used) if s.name == f"{prefix}:request_success_total"]
    n_ended = {sample.labels["finished_reason"]: sample.value for sample in ends}
    assert n_ended == {"length": 2, "stop": 1, "abort": 0, "error": 0}


def test_samples_and_prompts_are_counted_where_they_end(used, tokenizer):
    n_long, n_short = len(tokenizer.encode(TEXT)), len(tokenizer.encode("a"))
    seen = values(used)
    for name in set(TIMES) - {"inter_token_latency_seconds"}:
        assert seen[f"{name}_count"] == 3, name
    assert seen["inter_token_latency_seconds_count"] == 10 + n_short - 3
    assert seen["request_prompt_tokens_sum"] == 2 * n_long + n_short
    assert seen["request_prefill_kv_computed_tokens_sum"] == 2 * n_long + n_short
    assert seen["request_generation_tokens_count"] == 3
    assert seen["request_generation_tokens_sum"] == 10 + n_short
    assert (seen["request_params_n_count"], seen["request_params_n_sum"]) == (2, 3)
    assert seen["request_params_max_tokens_sum"] == 55
    assert seen["request_max_num_generation_tokens_sum"] == 5 + n_short
    assert seen["iteration_tokens_total_sum"] == 10 + n_short


def test_the_parts_of_a_requests_time_add_up(used):
    seen = {name: value for name, value in values(used).items() if name.endswith("_sum")}
    queue, prefill, decode = (seen[f"request_{p}_time_seconds_sum"]
                              for p in ("queue", "prefill", "decode"))  # fmt: skip
    assert queue >= 0
    assert decode > 0
    assert seen["request_inference_time_seconds_sum"] == pytest.approx(prefill + decode)
    assert queue + prefill + decode <= seen["e2e_request_latency_seconds_sum"] + 1e-6
    assert decode == pytest.approx(seen["inter_token_latency_seconds_sum"])


def test_a_request_that_waits_has_queued(tokenizer):
    with serving(tokenizer) as up:
        up.engine.may_step.clear()
        with up.connect({"prompt": "a", "max_tokens": 1}) as waiting:
            wait_until(lambda: up.engine.live)
            up.engine.may_step.set()
            assert waiting.recv(65536).startswith(b"HTTP/1.1 200")
        seen = values(up)
    waited = seen["request_queue_time_seconds_sum"]
    assert waited > 0
    assert waited <= seen["time_to_first_token_seconds_sum"]


def test_buckets_of_every_histogram_only_grow(used):
    buckets: dict[str, list[float]] = {}
    for sample in samples(used):
        if sample.name.endswith("_bucket") and ":" in sample.name:
            buckets.setdefault(sample.name.removesuffix("_bucket"), []).append(sample.value)
    counts = {s.name: s.value for s in samples(used) if s.name.endswith("_count")}
    assert len(buckets) == 2 * len(TIMES + SIZES)
    for name, held in buckets.items():
        assert held == sorted(held), name
        assert held[-1] == counts[f"{name}_count"], name


@given(st.text(st.characters(codec="utf-8"), min_size=1))
@settings(max_examples=20, deadline=None)
def test_a_model_may_have_any_name(name):
    text = Metrics(name, ("vllm",)).render(None).decode()
    families = list(text_string_to_metric_families(text))
    named = [s for family in families for s in family.samples if s.name.startswith("vllm:")]
    assert len(named) > 100
    assert {sample.labels["model_name"] for sample in named} == {name}


def test_every_family_is_told_apart_and_explained(used):
    families = list(text_string_to_metric_families(used.get("/metrics").text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.type != "unknown" for family in families)


@pytest.mark.parametrize(("prefix", "shown"), [
    ("both", {"fastgen", "vllm"}), ("fastgen", {"fastgen"}), ("vllm", {"vllm"}),
])  # fmt: skip
def test_names_begin_as_asked(tokenizer, prefix, shown):
    with serving(tokenizer, metrics_prefix=prefix) as up:
        names = {s.name for s in samples(up) if s.name.startswith(("fastgen:", "vllm:"))}
    by_prefix = {p: {name for name in names if name.startswith(f"{p}:")} for p in shown}
    assert set.union(*by_prefix.values()) == names
    assert len({len(own) for own in by_prefix.values()}) == 1


def test_another_prefix_is_refused():
    with pytest.raises(ConfigError, match="one of both, fastgen, vllm, got 'sglang'"):
        ServerConfig(metrics_prefix="sglang")


def http(up: Running, name: str) -> dict[tuple[str, ...], float]:
    """Values by path and, where there is one, kind of status."""
    found = [sample for sample in samples(up) if sample.name == f"http_{name}"]
    return {tuple(s.labels[k] for k in ("handler", "status") if k in s.labels): s.value
            for s in found}  # fmt: skip


def test_answers_are_counted_by_route_and_kind_of_status(tokenizer, monkeypatch):
    path = "/v1/completions"
    with serving(tokenizer) as up:
        up.engine.step_time = 0.02
        up.post(path, {"prompt": "a b", "stream": True, "max_tokens": 4, "ignore_eos": True})
        up.post(path, {"prompt": 5.5})
        up.post("/nowhere", {})
        up.get(path)
        monkeypatch.setattr(up.service, "submit", lambda *args, **kwargs: 1 / 0)
        up.post(path, {"prompt": "a"})
        counted = http(up, "requests_total")
        seconds = http(up, "request_duration_seconds_sum")[(path,)]
        n_timed = http(up, "request_duration_seconds_count")[(path,)]
    assert {kind: n for (where, kind), n in counted.items() if where == path} == {
        "2xx": 1, "3xx": 0, "4xx": 1, "5xx": 1,
    }  # fmt: skip
    assert sum(counted.values()) == n_timed == 3
    assert seconds > 3 * 0.02  # from the first token to the last


def test_refusals_at_the_gate_are_counted(used):
    before = http(used, "requests_total")
    reply = used.post("/v1/completions", {"prompt": "a"}, headers={"host": "evil.example"})
    assert reply.status_code == 403
    after = http(used, "requests_total")
    assert after[("/v1/completions", "4xx")] == before[("/v1/completions", "4xx")] + 1


def test_the_process_is_measured(used):
    seen = values(used)
    assert seen["process_resident_memory_bytes"] > 2**20
    assert seen["process_open_fds"] > 3
    assert seen["process_cpu_seconds_total"] > 0
