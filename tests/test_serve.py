"""The command line: flags, errors, and the life of the process, with an engine that echoes."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fastgen_jax import serve
from fastgen_jax.built_in import DEMO
from fastgen_jax.config import LIBRARY
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.errors import CheckpointError, ConfigError
from fastgen_jax.server import loading
from fastgen_jax.server.config import ADMIN_VARIABLE, KEY_VARIABLE, ServerConfig
from fastgen_jax.server.listen import bind, inherited, url_of
from fastgen_jax.server.report import curl
from tests import tiny_tokenizers
from tests.server.pairs import certified

ROOT = Path(serve.__file__).parent.parent
LAUNCH = """
import sys, time
from fastgen_jax import serve
from fastgen_jax.server import loading
def load(engine_config, server_config, on_phase):
    from fastgen_jax.errors import CheckpointError
    from fastgen_jax.server.service import Backend
    from fastgen_jax.tokenizer import Tokenizer
    from tests.server.fake_engine import FakeEngine
    on_phase("compiling", 1, 2)
    if engine_config.seed == 1:
        raise CheckpointError("model.safetensors is cut short; download it again")
    if engine_config.seed == 2:
        time.sleep(60)
    tokenizer = Tokenizer(engine_config.model)
    engine = FakeEngine(tokenizer.eos_token_id, step_time=0.02)
    if engine_config.seed == 3:
        engine.fault = TypeError("a fault of ours")
    return Backend(engine, tokenizer)
loading.load = load
sys.exit(serve.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def launch() -> Iterator:
    """Starts the command with the echoing engine; what still runs at the end is killed."""
    started: list[subprocess.Popen] = []

    def start(
        *args: str, stderr: int = subprocess.PIPE, pass_fds: tuple = (), **environment: str
    ) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH, *args],
            cwd=ROOT,
            env=os.environ | environment,
            stderr=stderr,
            stdout=subprocess.PIPE,
            pass_fds=pass_fds,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def url_when_open(process: subprocess.Popen) -> str:
    """Reads the log up to the line with the address."""
    assert process.stderr is not None
    for line in process.stderr:
        if match := re.search(r"https?://\S+", line):
            return match[0]
    raise AssertionError("no address was logged")


def wait_for(url: str, status: int) -> httpx.Response:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.ConnectError):
            answer = httpx.get(url)
            if answer.status_code == status:
                return answer
        time.sleep(0.02)
    raise AssertionError(f"{url} never answered {status}")


class TestFlags:
    def test_every_field_of_both_configs_is_a_flag_with_help(self):
        shown = serve.make_parser().format_help()
        for config in (EngineConfig, ServerConfig):
            for field in dataclasses.fields(config):
                flag = "--" + field.name.replace("_", "-")
                assert (flag in shown) == (field.metadata["group"] != LIBRARY), flag
                assert field.metadata["help"]
        assert shown.index("KV cache:") < shown.index("server:") < shown.index("limits")

    def test_values_reach_the_configs(self):
        engine, server, _ = serve.parse(
            ["some/model", "--max-model-len", "32K", "--no-enable-prefix-caching",
             "--dtype=bfloat16", "--memory-fraction", "0.5", "--port", "0", "--api-key", "a",
             "--api-key=b"]
        )  # fmt: skip
        assert (engine.model, engine.max_model_len, engine.dtype) == (
            "some/model",
            32768,
            "bfloat16",
        )
        assert (engine.enable_prefix_caching, engine.memory_fraction) == (False, 0.5)
        assert (server.port, server.api_key) == (0, ("a", "b"))

    def test_a_key_of_the_environment_is_one_more_and_goes_no_further(self, monkeypatch):
        monkeypatch.setenv(KEY_VARIABLE, "c")
        assert serve.parse(["--api-key", "a"])[1].api_key == ("a", "c")
        assert serve.parse(["--api-key", "a"])[1].api_key == ("a",)
        monkeypatch.setenv(KEY_VARIABLE, "two words")
        with pytest.raises(ConfigError, match="api_key may hold only visible ASCII"):
            serve.parse([])

    def test_the_admin_key_may_come_from_the_environment_and_is_one(self, monkeypatch):
        monkeypatch.setenv(ADMIN_VARIABLE, "k")
        assert serve.parse([])[1].admin_key == "k"
        assert serve.parse([])[1].admin_key is None
        monkeypatch.setenv(ADMIN_VARIABLE, "k")
        with pytest.raises(ConfigError, match="are two keys; give one"):
            serve.parse(["--admin-key", "other"])

    def test_no_arguments_mean_the_demo_on_loopback(self):
        engine, server, _ = serve.parse([])
        assert engine.model == str(DEMO)
        assert (server.host, server.port) == ("127.0.0.1", 8000)
        assert engine == EngineConfig(model=str(DEMO))

    @pytest.mark.parametrize(("argv", "message"), [
        (["--max-modl-len", "5"], r"unknown flag --max-modl-len; did you mean --max-model-len\?"),
        (["--xyzzy=1"], "unknown flag --xyzzy; --help lists all"),
        (["a/b", "c/d"], "unexpected argument 'c/d'"),
        (["a/b", "--model", "c/d"], "named twice"),
        (["--port", "http"], "expected a whole number"),
        (["--port", "70000"], "port must be"),
        (["--fd", "-1"], "fd must be the number of an open file"),
        (["--max-model-len", "0"], "max_model_len must be"),
        (["--dtype", "int3"], "dtype must be one of"),
        (["--uds", "a.sock", "--port", "1"], "uds takes the place of host and port"),
        (["--log-format", "xml"], "log_format must be one of"),
        (["--log-level", "loud"], "log_level must be one of"),
        (["--drain-timeout", "nan"], "drain_timeout must be"),
        (["--queue-timeout", "0"], "queue_timeout must be more than 0"),
        (["--request-timeout", "0"], "request_timeout must be more than 0"),
        (["--stream-timeout", "0"], "stream_timeout must be more than 0"),
        (["--step-timeout", "0"], "step_timeout must be more than 0"),
        (["--served-model-name", "bad\udcff"], "served_model_name must be text"),
        (["--served-model-name", ""], "served_model_name must be text"),
        (["--api-key", ""], "api_key must not be empty"),
        (["--api-key", "two words"], "api_key may hold only visible ASCII"),
        (["--api-key", "key\n"], "api_key may hold only visible ASCII"),
        (["--api-key", "schlüssel"], "api_key may hold only visible ASCII"),
        (["--max-body-bytes", "2K", "--max-upload-bytes", "1K"], "at least max_body_bytes=2048"),
        (["--max-model-len", "1"], "max_model_len must be at least 2"),
        (["--num-kv-blocks", "1"], "num_kv_blocks must be at least 2"),
        (["--port"], "expected one argument"),
    ])  # fmt: skip
    def test_a_bad_flag_is_an_error_that_says_why(self, argv, message):
        with pytest.raises(ConfigError, match=message):
            serve.parse(argv)

    def test_markdown_lists_every_flag_once(self, capsys):
        with pytest.raises(SystemExit) as caught:
            serve.main(["--help=markdown"])
        assert caught.value.code == 0
        lines = capsys.readouterr().out.strip().splitlines()
        fields = [field for config in serve.CONFIGS for field in dataclasses.fields(config)]
        n_flags = sum(field.metadata["group"] != LIBRARY for field in fields)
        assert len(lines) == n_flags + 2
        assert all(line.count(" | ") == 2 for line in lines[2:])

    def test_an_error_is_one_line_of_cause_and_one_of_remedy(self, capsys):
        assert serve.main(["--prot", "1"]) == 2
        captured = capsys.readouterr()
        assert captured.err == "error: unknown flag --prot\n  fix: did you mean --port?\n"

    @pytest.mark.parametrize(("error", "cause", "fix"), [
        (MemoryError(), "not enough memory to load and compile", "smaller model"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nAllocator report"),
         "not enough memory to load and compile", "--max-num-batched-tokens"),
        (RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), "not enough memory",
         "--memory-fraction"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory", "--dtype bfloat16"),
        (PermissionError(errno.EACCES, "Permission denied", "/models/x"),
         "PermissionError: [Errno 13] Permission denied: '/models/x'", "check that /models/x"),
        (OSError(errno.ENOSPC, "No space left", "/cache/y"), "No space left", "make room"),
        (OSError(errno.EMFILE, "Too many open files", "/models/x"), "Too many", "ulimit -n"),
        (OSError("odd"), "OSError: odd", "FASTGEN_DEBUG=1"),
        (RuntimeError("odd"), "RuntimeError: odd", "FASTGEN_DEBUG=1"),
        (CheckpointError("cut short"), "cut short", "FASTGEN_DEBUG=1"),
        (CheckpointError("cut short; download it"), "cut short", "download it"),
        (ConfigError("bad"), "bad", "--help"),
    ])  # fmt: skip
    def test_each_kind_of_error_has_a_cause_and_a_remedy(
        self, monkeypatch, capsys, error, cause, fix
    ):
        def run(argv):
            raise error

        monkeypatch.setattr(serve, "run", run)
        assert serve.main([]) == (2 if isinstance(error, ConfigError) else 1)
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 2
        assert cause in shown[0]
        assert fix in shown[1]

    def test_a_missing_directory_is_an_error_at_once(self, capsys):
        assert serve.main(["/no/such/model"]) == 2
        assert "no directory '/no/such/model'" in capsys.readouterr().err

    def test_a_missing_template_is_an_error(self):
        with pytest.raises(ConfigError, match="cannot read --chat-template"):
            loading.chat_template("/no/such/file")

    def test_clients_never_see_a_path(self, tmp_path):
        config = ServerConfig()
        assert serve.model_names(str(tmp_path), config) == [tmp_path.name]
        assert serve.model_names("org/name", config) == ["org/name"]
        assert serve.model_names(str(DEMO), config) == ["fastgen-demo"]
        named = ServerConfig(served_model_name=("a", "b"))
        assert serve.model_names(str(tmp_path), named) == ["a", "b"]
        assert (loading.hub_id(str(tmp_path)), loading.hub_id("org/name")) == (None, "org/name")

    def test_a_directory_whose_name_is_no_text_has_a_name_that_json_holds(self, tmp_path):
        path = tmp_path / "model\udcff"
        path.mkdir()
        assert serve.model_names(str(path), ServerConfig()) == ["model?"]

    def test_help_imports_nothing_of_weight(self):
        code = """import sys
from fastgen_jax import serve
try:
    serve.main(["--help"])
except SystemExit:
    print(sorted({"jax", "numpy", "fastapi", "transformers", "pydantic"} & set(sys.modules)))
"""
        command = [sys.executable, "-c", code]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["plain", "$(touch x)", "a';touch x;'", "`id`\n", 'q"uote'])
def test_the_line_to_paste_runs_nothing_that_a_name_says(name):
    line = curl("http://127.0.0.1:1", name)
    command = shlex.split(line)
    assert command[:2] == ["curl", "http://127.0.0.1:1/v1/completions"]
    assert len(command) == 6
    assert json.loads(command[-1])["model"] == name


class TestProcess:
    def test_a_taken_port_is_named_before_the_model_loads(self, model, launch):
        with bind("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            started = time.monotonic()
            process = launch(model, "--port", str(port))
            _, errors = process.communicate(timeout=10)
        assert process.returncode == 2
        assert time.monotonic() - started < 5
        *_, cause, remedy = errors.splitlines()
        assert cause.startswith(f"error: cannot listen on 127.0.0.1 port {port}: ")
        assert "--port" in remedy

    def test_a_taken_port_of_grpc_is_named_before_the_model_loads(self, model, launch):
        with bind("127.0.0.1", 0) as taken:
            port = taken.getsockname()[1]
            process = launch(model, "--port", "0", "--grpc-port", str(port), "--seed", "2")
            _, errors = process.communicate(timeout=10)
        assert process.returncode == 2
        *_, cause, remedy = errors.splitlines()
        assert cause.startswith(f"error: cannot listen on 127.0.0.1 port {port}: ")
        assert "--grpc-port" in remedy

    def test_grpc_is_served_beside_http_and_ends_with_it(self, model, launch):
        with bind("127.0.0.1", 0) as free:
            port = str(free.getsockname()[1])
        process = launch(model, "--port", "0", "--grpc-port", port)
        wait_for(url_when_open(process) + "/health", 200)
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            asked = HealthCheckRequest(service="fastgen.v1.FastGen")
            assert HealthStub(channel).Check(asked).status == HealthCheckResponse.SERVING
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "gRPC" in errors

    def test_grpc_without_its_packages_names_the_extra(self, monkeypatch):
        monkeypatch.setattr(serve, "RPC_PACKAGES", ("json", "no_such_package"))
        with pytest.raises(ConfigError, match=r"needs no_such_package; .*fastgen-jax\[grpc\]"):
            serve.listen_to_rpc(ServerConfig(grpc_port=1))

    @pytest.mark.parametrize("flag", ["--grpc-port=8001", "--uds=a", "--fd=0"])
    def test_replicas_have_no_sockets_of_their_own(self, flag):
        with pytest.raises(ConfigError, match="is for a single server"):
            serve.parse(["--replicas", "2", flag])

    def test_an_inherited_socket_is_listened_on(self, model, launch):
        with bind("127.0.0.1", 0) as listener:
            url, fd = url_of(listener, "127.0.0.1"), listener.fileno()
            process = launch(model, "--fd", str(fd), pass_fds=(fd,))
        assert url_when_open(process) == url
        wait_for(url + "/health", 200)

    def test_an_inherited_file_that_cannot_be_listened_on_is_an_error(self):
        with open(os.devnull) as file, pytest.raises(ConfigError, match="is no socket"):
            inherited(file.fileno())
        with socket.socket() as idle, pytest.raises(ConfigError, match="does not listen"):
            inherited(os.dup(idle.fileno()))

    def test_an_ipv6_address_serves_where_the_machine_has_one(self):
        try:
            listener = bind("::1", 0)
        except ConfigError:
            pytest.skip("this machine has no IPv6 loopback")
        with listener:
            assert url_of(listener, "::1").startswith("http://[::1]:")

    def test_a_unix_socket_and_its_line_to_paste(self, model, launch, tmp_path):
        path = f"{tmp_path}/a b.sock"
        process = launch(model, "--uds", path)
        for line in process.stderr:
            if line.startswith("curl "):
                break
        answer = subprocess.run(shlex.split(line), capture_output=True, timeout=10, check=True)
        assert json.loads(answer.stdout)["choices"]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode == 0
        assert not os.path.exists(path)

    def test_a_log_for_machines_is_one_to_its_end(self, model, launch):
        process = launch(model, "--port", "0", "--seed", "1", "--log-format", "json")
        _, errors = process.communicate(timeout=10)
        *_, last = [json.loads(line) for line in errors.splitlines()]
        assert (last["level"], process.returncode) == ("critical", 1)
        assert last["message"] == "model.safetensors is cut short"
        assert last["fix"] == "download it again"

    def test_https_is_told_and_spoken(self, model, launch, tmp_path):
        tls = certified(tmp_path)
        process = launch(
            model, "--port", "0", "--tls-cert", tls["tls_cert"], "--tls-key", tls["tls_key"]
        )
        url = url_when_open(process)
        assert url.startswith("https://")
        assert httpx.get(url + "/livez", verify=tls["trusts"]).status_code == 200

    def test_files_of_tls_are_read_before_the_model_loads(self, model, launch):
        process = launch(model, "--port", "0", "--tls-cert", "/none", "--tls-key", "/none")
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 2
        assert "error: cannot read --tls-cert /none: No such file" in errors

    def test_start_is_told_and_sigterm_ends_what_runs_with_exit_0(self, model, launch):
        process = launch(model, "--port", "0")
        url = url_when_open(process)
        assert httpx.get(url + "/livez").status_code == 200
        wait_for(url + "/health", 200)
        body = {"prompt": "Anna has three apples", "max_tokens": 20, "stream": True}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=10) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        _, log = process.communicate(timeout=5)
        assert process.returncode == 0
        for word in ("compile", "model", "KV cache", "ready", "curl http://127.0.0.1:"):
            assert word in log

    def test_sigterm_while_loading_ends_at_once_with_exit_0(self, model, launch):
        process = launch(model, "--port", "0", "--seed", "2")
        url = url_when_open(process)
        health = wait_for(url + "/health", 503).json()
        assert health["phase"] in ("starting", "compiling")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0

    def test_a_second_signal_ends_at_once(self, model, launch):
        process = launch(model, "--port", "0")
        url = url_when_open(process)
        wait_for(url + "/health", 200)
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        with socket.create_connection(address) as connection:
            body = b'{"prompt": "a", "max_tokens": 4000, "ignore_eos": true, "stream": true}'
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGTERM)
            wait_for(url + "/health", 503)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=10) == 128 + signal.SIGTERM  # a third of drain_timeout

    def test_a_model_that_cannot_load_is_the_last_thing_said(self, model, launch):
        process = launch(model, "--port", "0", "--seed", "1")
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 1
        assert errors.splitlines()[-2:] == [
            "error: model.safetensors is cut short",
            "  fix: download it again",
        ]
        assert "Traceback" not in errors

    @pytest.mark.parametrize("policy", ["exit", "stay"])
    def test_an_engine_that_gave_up_ends_the_process_with_exit_1(self, model, launch, policy):
        process = launch(model, "--port", "0", "--seed", "3", "--on-engine-failure", policy)
        if policy == "stay":
            url = url_when_open(process)
            assert "gave up" in wait_for(url + "/livez", 503).json()["reason"]
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 1
        assert "Traceback" in errors
        assert errors.count("TypeError: a fault of ours") == 1
        assert errors.splitlines()[-2].startswith("error: the engine gave up after 0 failed steps")

    def test_debug_shows_the_traceback(self, model, launch):
        process = launch(model, "--port", "0", "--seed", "1", FASTGEN_DEBUG="1")
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 1
        assert "Traceback" in errors
        assert errors.splitlines()[-1].endswith("download it again")

    def test_closed_standard_files_are_no_place_for_sockets_and_logs(self):
        code = (
            "import os; from fastgen_jax import serve; code = serve.main(['--xyzzy']);"
            "os._exit(code if os.open(os.devnull, os.O_RDONLY) > 2 else 9)"
        )
        command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
        assert subprocess.run(command, cwd=ROOT, timeout=20, check=False).returncode == 2

    def test_an_unread_stderr_stops_neither_the_service_nor_its_end(self, model, launch):
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_end, b"." * 512)
        os.set_blocking(write_end, True)
        with bind("127.0.0.1", 0) as probe:
            port = probe.getsockname()[1]
        process = launch(model, "--port", str(port), stderr=write_end)
        url = f"http://127.0.0.1:{port}"
        wait_for(url + "/health", 200)
        bodies = [{"prompt": "a", "max_tokens": 1, f"unknown-{i}": 1} for i in range(20)]
        assert {httpx.post(url + "/v1/completions", json=b).status_code for b in bodies} == {200}
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == 0
        os.close(read_end)
        os.close(write_end)
