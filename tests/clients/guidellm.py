"""GuideLLM's benchmark, with prompts that it makes with the model's tokenizer."""

import json
import tempfile
from pathlib import Path

from tests.clients.scenario import DEMO, beside_python, main, run_command


def measure(url: str, request_format: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        run_command(
            *[beside_python("guidellm"), "run", "--disable-console-interactive"],
            *["--backend", f"kind=openai_http,target={url},request_format={request_format}"],
            *["--profile", "kind=concurrent,streams=2"],
            *["--constraint", "kind=max_requests,count=6"],
            *["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=16"],
            *["--tokenizer", f"kind=hf_auto,model={DEMO}"],
            *["--output", f"kind=json,path={report}"],
        )
        return json.loads(report.read_text())


def measures_chat(url: str) -> None:
    is_complete(measure(url, "/v1/chat/completions"))


def measures_completions(url: str) -> None:
    is_complete(measure(url, "/v1/completions"))


def is_complete(report: dict) -> None:
    (benchmark,) = report["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (6, 0), totals
    outputs = benchmark["metrics"]["output_token_count"]["successful"]
    assert outputs["mean"] == 16, outputs


if __name__ == "__main__":
    main(measures_chat, measures_completions)
