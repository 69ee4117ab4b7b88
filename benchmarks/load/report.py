"""Figures of runs as text (vLLM's block, then FastGen's figures), JSON and CSV.

INVARIANT: a result says by itself when, where, with what and by which command it was measured.
"""

import csv
import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from benchmarks.load.client import Record

WIDTH = 50
TITLES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2el": ("End-to-end Latency", "E2EL"),
}
PACKAGES = ("fastgen-jax", "jax", "numpy")
OF_A_REQUEST = ("due", "sent", "end", "n_prompt", "n_output", "n_cached", "error", "note",
                "times", "counts")  # fmt: skip


def block(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[int]) -> str:
    """What `vllm bench serve` prints, and below it what DeepSpeed-FastGen's benchmark reports."""
    lines = [*_totals(result)]
    for name in metrics:
        title, short = TITLES[name]
        if name == "itl" and not result["is_itl_of_tokens"]:
            title = "Inter-chunk Latency (tokens a chunk unknown)"
        lines.append(f"{title:-^{WIDTH}}")
        lines.append(_line(f"Mean {short} (ms):", result[f"mean_{name}_ms"]))
        lines.append(_line(f"Median {short} (ms):", result[f"p50_{name}_ms"]))
        for p in percentiles:
            lines.append(_line(f"P{p} {short} (ms):", result[f"p{p}_{name}_ms"]))
    lines += [*_of_fastgen(result), "=" * WIDTH]
    return "\n".join(lines)


def _totals(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{' Serving Benchmark Result ':=^{WIDTH}}"
    yield _line("Successful requests:", result["completed"])
    yield _line("Failed requests:", result["failed"])
    if result.get("max_concurrency") is not None:
        yield _line("Maximum request concurrency:", result["max_concurrency"])
    if result.get("request_rate") not in (None, "inf"):
        yield _line("Request rate configured (RPS):", float(result["request_rate"]))
    yield _line("Benchmark duration (s):", result["duration"])
    yield _line("Total input tokens:", result["total_input_tokens"])
    yield _line("Total generated tokens:", result["total_output_tokens"])
    yield _line("Request throughput (req/s):", result["request_throughput"])
    if "request_goodput" in result:
        yield _line("Request goodput (req/s):", result["request_goodput"])
    yield _line("Output token throughput (tok/s):", result["output_throughput"])
    yield _line("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    yield _line("Peak concurrent requests:", result["max_concurrent_requests"])
    yield _line("Total token throughput (tok/s):", result["total_token_throughput"])


def _of_fastgen(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'DeepSpeed-FastGen':-^{WIDTH}}"
    if "littles_law_throughput" in result:
        yield _line("Clients / mean latency (req/s):", result["littles_law_throughput"])
    for p in (50, 90, 95):
        yield _line(f"P{p} token latency (ms):", result[f"p{p}_token_latency_ms"])
    for rate, found in result["effective_throughput"].items():
        name = f"Effective throughput at {rate} tok/s (req/s):"
        yield _line(name, found["requests_per_second"])
        yield _line("  share of requests that meet it:", found["attainment"])
    yield _line("Prompt tokens cached:", result["total_cached_tokens"])
    yield _line("P99 lateness of sending (ms):", result["p99_lateness_ms"])
    for kind, n in result["errors"].items():
        yield _line(f"Failed ({kind}):", n)


def _line(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}" if isinstance(value, float) else f"{name:<40} {value:<10}"


def machine() -> dict[str, Any]:
    """Where the load generator runs, which is where the server does if its address is local."""
    cpus = Path("/proc/cpuinfo")
    text = cpus.read_text() if cpus.exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "load_average": os.getloadavg()[0],
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def write_json(path: Path, result: Mapping[str, Any], records: Sequence[Record]) -> None:
    """The figures, and every request with the times of its events."""
    rows = [
        {name: value for name, value in dataclasses.asdict(record).items() if name in OF_A_REQUEST}
        for record in records
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = orjson.dumps(dict(result) | {"requests": rows}, option=orjson.OPT_INDENT_2)
    path.write_bytes(text)


def write_csv(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """A row for each run of a sweep; what is nested gets names with dots."""
    rows = [dict(_flat(result)) for result in results]
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, held in value.items():
        if isinstance(held, Mapping):
            yield from _flat(held, f"{prefix}{name}.")
        else:
            yield prefix + name, held
