"""The command, against a stub and against our server: what it prints, keeps and returns."""

import csv
import json
import math

import pytest

from benchmarks import serve
from benchmarks.load import arguments, report
from benchmarks.load.measures import PERCENTILES
from benchmarks.load.stub import Stub
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.load.running import stubbed
from tests.server.running import serving

SHORT = ("--mean-prompt-length", "30", "--mean-max-new-tokens", "6")
RANDOM = ("--dataset-name", "random", "--random-input-len", "20", "--random-output-len", "5")


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizers.byte_level(path)
    return str(path)


@pytest.fixture
def command(tokenizer_path, tmp_path):
    """Runs it against a port; the exit code and the results that it kept."""

    def run(port: int, *arguments: str) -> tuple[int, list[dict]]:
        code = serve.main([
            *("--base-url", f"http://127.0.0.1:{port}/v1", "--tokenizer", tokenizer_path),
            *("--save-result", "--result-dir", str(tmp_path), *arguments),
        ])  # fmt: skip
        kept = sorted(tmp_path.glob("*.json"), key=lambda path: path.stat().st_mtime)
        return code, [json.loads(path.read_text()) for path in kept]

    return run


def test_a_sweep_of_clients_prints_vllms_block_and_fastgens_figures(command, capsys):
    with stubbed(Stub()) as port:
        code, results = command(port, *SHORT, "--num-clients", "1", "3", "--num-prompts", "6")
    assert code == 0
    assert [result["num_clients"] for result in results] == [1, 3]
    assert all(result["completed"] == len(result["requests"]) == 6 for result in results)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == f"{'Successful requests:':<40} {6:<10}"
    assert [line for line in lines if line.startswith("---")][:5] == [
        "---------------Time to First Token----------------",
        "-----Time per Output Token (excl. 1st token)------",
        "---------------Inter-token Latency----------------",
        "----------------End-to-end Latency----------------",
        "----------------DeepSpeed-FastGen-----------------",
    ]
    for name in ("Effective throughput at 4 tok/s", "Clients / mean latency", "P95 token latency"):
        assert sum(line.startswith(name) for line in lines) == 2


def test_what_is_kept_says_how_it_was_measured(command, tmp_path):
    with stubbed(Stub()) as port:
        _, (result,) = command(
            port, *SHORT, "--num-clients", "2", "--num-prompts", "3", "--api-key", "secret",
            "--metadata", "replicas=2",
        )  # fmt: skip
    assert result["machine"]["packages"]["fastgen-jax"]
    assert result["metadata"] == {"replicas": "2"}
    assert "--num-prompts 3" in result["command"]
    assert "secret" not in json.dumps(result)
    (path,) = tmp_path.glob("*.csv")
    with path.open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["mean_ttft_ms"]) == result["mean_ttft_ms"]
    assert float(row["effective_throughput.4.attainment"]) == 1.0


def test_runs_of_a_sweep_ask_different_things_and_a_second_sweep_the_same(command):
    stub = Stub()
    with stubbed(stub) as port:
        for _ in range(2):
            command(port, *RANDOM, "--request-rate", "500", "inf", "--num-prompts", "4")
    prompts = [json.dumps(body["prompt"]) for body in stub.bodies if len(body["prompt"]) == 20]
    assert len(prompts) == 2 * 2 * (1 + 4)  # a warm-up for each run
    assert sorted(prompts[:10]) == sorted(prompts[10:])
    assert len(set(prompts)) == 10


def test_an_open_loop_tells_its_rate_and_goodput(command, capsys):
    with stubbed(Stub()) as port:
        arguments = ("--request-rate", "200", "--num-prompts", "5", "--goodput", "ttft:0.0001")
        code, (result,) = command(port, *RANDOM, *arguments)
    assert (code, result["request_rate"], result["request_goodput"]) == (0, "200", 0.0)
    assert "littles_law_throughput" not in result
    assert f"{'Request rate configured (RPS):':<40} {200.0:<10.2f}" in capsys.readouterr().out


def test_refusals_are_counted_and_fail_nothing(command, capsys):
    faults = dict.fromkeys(range(3, 6), "429")  # after the probe and the warm-up
    with stubbed(Stub(faults=faults)) as port:
        code, (result,) = command(port, *SHORT, "--num-clients", "1", "--num-prompts", "6")
    assert (code, result["completed"], result["errors"]) == (0, 3, {"status 429": 3})
    assert f"{'Failed (status 429):':<40} {3:<10}" in capsys.readouterr().out


@pytest.mark.parametrize("load", [("--num-clients", "2"), ("--request-rate", "300")])
def test_a_server_that_dies_ends_in_a_report_and_exit_code_1(command, capsys, load):
    with stubbed(Stub(faults={6: "dies"})) as port:
        code, (result,) = command(port, *SHORT, *load, "--num-prompts", "40")
    assert code == 1
    assert result["completed"] + result["failed"] == 40
    assert result["errors"]["not sent"] > 0
    assert "Serving Benchmark Result" in capsys.readouterr().out


def test_a_server_that_refuses_ids_is_measured_by_usage(command, capsys):
    with stubbed(Stub(per_event=3, tells_ids=False)) as port:
        code, (result,) = command(port, *SHORT, "--num-clients", "1", "--num-prompts", "3")
    assert (code, result["is_itl_of_tokens"]) == (0, False)
    assert "Inter-chunk Latency" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_told_at_once(command, capsys):
    with stubbed(Stub()) as port:
        pass
    assert command(port) == (2, [])
    assert "is the server ready?" in capsys.readouterr().err


def test_a_first_request_that_fails_is_told_with_its_reason(command, capsys):
    with stubbed(Stub(faults={0: "404"})) as port:
        assert command(port)[0] == 2
    assert "status 404" in capsys.readouterr().err


@pytest.mark.parametrize(
    "workload",
    [
        SHORT,
        (*SHORT, "--backend", "openai-chat"),
        (*RANDOM, "--turns", "2"),
        (*RANDOM, "--turns", "2", "--prompt-form", "text"),
        ("--dataset-name", "prefix_repetition", "--prefix-repetition-output-len", "5"),
    ],
)
def test_our_server_is_measured(command, tokenizer_path, workload):
    tokenizer = Tokenizer(tokenizer_path)
    with serving(tokenizer) as up:
        code, (result,) = command(
            up.address[1], *workload, "--num-clients", "2", "--num-prompts", "4"
        )
        gauges = up.get("/metrics").text
    assert (code, result["failed"]) == (0, 0)
    assert result["is_itl_of_tokens"]
    n_asked = sum(request["n_output"] for request in result["requests"])
    assert result["total_output_tokens"] == n_asked > 4
    assert sum(sum(request["counts"]) for request in result["requests"]) == n_asked
    assert 'sla_attainment_ratio{engine="0",model_name="fake",token_rate="4"}' in gauges


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--num-clients", "1", "--request-rate", "1"), "give one"),
        (("--dataset-name", "sharegpt"), "needs --dataset-path"),
        (("--turns", "2"), "random and sharegpt"),
        (("--backend", "openai-chat", "--prompt-form", "ids"), "which are text"),
        (("--goodput", "itl:5"), "as ttft:500"),
        (("--percentile-metrics", "ttft,x"), "expected some of"),
        (("--metadata", "replicas"), "NAME=VALUE"),
        (("--request-rate", "0"), "more than 0, got 0"),
        (("--num-clients", "0"), "1 or more, got 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(capsys, given, message):
    with pytest.raises(SystemExit):
        arguments.parse(given, "")
    assert message in capsys.readouterr().err


def test_help_names_every_group_and_the_examples(capsys):
    with pytest.raises(SystemExit):
        serve.main(["--help"])
    shown = capsys.readouterr().out
    for part in ("server:", "load:", "what is asked:", "results:", "python -m benchmarks.serve"):
        assert part in shown


def test_a_block_of_no_answers_is_a_block(command, capsys):
    with stubbed(Stub(faults=dict.fromkeys(range(1, 100), "500"))) as port:
        code, (result,) = command(port, *SHORT, "--num-clients", "1", "2", "--num-prompts", "3")
    assert (code, result["completed"]) == (1, 0)  # and the sweep went no further
    assert not math.isnan(result["mean_ttft_ms"])
    assert "told so" in capsys.readouterr().err
    assert report.block(result, ["ttft"], PERCENTILES[1:])
