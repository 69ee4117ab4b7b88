"""SGLang's bench_serving, which vLLM's `bench serve` shares its origin with, against /v1."""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from tests.clients.scenario import DEMO, MODEL, main, run_command


def measure(url: str, backend: str) -> dict:
    """As a file: importing the package would need its engine."""
    folder = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        run_command(
            *[sys.executable, folder / "bench_serving.py", "--backend", backend],
            *["--base-url", url, "--model", MODEL, "--tokenizer", DEMO, "--num-prompts", 8],
            *["--dataset-name", "random-ids", "--random-input-len", 32, "--random-output-len", 16],
            *["--random-range-ratio", 1.0, "--disable-tqdm", "--output-file", report],
        )
        return json.loads(report.read_text())


def measures_completions(url: str) -> None:
    is_complete(measure(url, "vllm"))


def measures_chat(url: str) -> None:
    is_complete(measure(url, "vllm-chat"))


def is_complete(report: dict) -> None:
    assert report["completed"] == 8, report["completed"]
    assert report["total_output_tokens"] == 8 * 16
    assert report["median_ttft_ms"] > 0


if __name__ == "__main__":
    main(measures_completions, measures_chat)
