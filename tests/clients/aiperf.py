"""aiperf's benchmark of chat and completions, and what it reads of the server's metrics."""

import json
import tempfile
from pathlib import Path

from tests.clients.scenario import DEMO, MODEL, beside_python, main, run_command


def measure(url: str, kind: str, *flags: str) -> tuple[dict, dict]:
    """Its reports of requests and of the server."""
    with tempfile.TemporaryDirectory() as folder:
        run_command(
            *[beside_python("aiperf"), "profile", "--model", MODEL, "--url", url],
            *["--endpoint-type", kind, "--streaming", "--tokenizer", DEMO, "--ui", "none"],
            *["--synthetic-input-tokens-mean", 32, "--output-tokens-mean", 16, "--concurrency", 2],
            *["--request-count", 8, "--extra-inputs", "ignore_eos:true", "--artifact-dir", folder],
            *flags,
            HF_HUB_OFFLINE="",  # else it takes a directory for a name on the hub
        )
        files = (
            Path(folder) / name
            for name in ("profile_export_aiperf.json", "server_metrics_export.json")
        )
        requests, server = (json.loads(file.read_text()) for file in files)
        return requests, server


def measures_chat(url: str) -> None:
    requests, _ = measure(url, "chat")
    is_complete(requests)


def measures_completions(url: str) -> None:
    requests, _ = measure(url, "completions")
    is_complete(requests)


def is_complete(requests: dict) -> None:
    assert requests["request_count"]["avg"] == 8
    assert "error_request_count" not in requests or not requests["error_request_count"]["avg"]
    assert requests["time_to_first_token"]["avg"] > 0


def reads_the_metrics_of_the_server(url: str) -> None:
    _, server = measure(url, "chat")
    assert any("num_requests_running" in name for name in server["metrics"]), [*server["metrics"]]


if __name__ == "__main__":
    main(measures_chat, measures_completions, reads_the_metrics_of_the_server)
