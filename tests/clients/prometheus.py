"""Prometheus' own parsers, of its text format and of OpenMetrics, on /metrics."""

import urllib.request

from prometheus_client import parser
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics

from tests.clients.scenario import main

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
SCRAPE = (
    f"{OPENMETRICS};q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"  # as Prometheus 2 and 3 ask
)


def scrape(url: str, accept: str) -> tuple[str, str]:
    request = urllib.request.Request(f"{url}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def reads_all_that_is_there(url: str) -> None:
    kind, text = scrape(url, "text/plain")
    assert kind.startswith("text/plain")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    assert families["fastgen:num_requests_running"].type == "gauge"
    assert all(family.documentation for family in families.values())


def reads_what_a_scraper_is_given(url: str) -> None:
    kind, text = scrape(url, SCRAPE)
    read = read_openmetrics if "openmetrics" in kind else parser.text_string_to_metric_families
    assert any(family.name == "fastgen:num_requests_running" for family in read(text))


def finds_the_names_of_vllm(url: str) -> None:
    _, text = scrape(url, "text/plain")
    families = {family.name: family for family in parser.text_string_to_metric_families(text)}
    kinds = {
        "num_requests_running": "gauge",
        "num_requests_waiting": "gauge",
        "kv_cache_usage_perc": "gauge",
        "prompt_tokens": "counter",
        "generation_tokens": "counter",
        "request_success": "counter",
        "time_to_first_token_seconds": "histogram",
        "e2e_request_latency_seconds": "histogram",
        "request_prompt_tokens": "histogram",
        "request_generation_tokens": "histogram",
    }
    found = {name: families.get(f"vllm:{name}") for name in kinds}
    assert {name: family and family.type for name, family in found.items()} == kinds


if __name__ == "__main__":
    main(reads_all_that_is_there, reads_what_a_scraper_is_given, finds_the_names_of_vllm)
