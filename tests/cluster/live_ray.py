"""The application on a real Ray of two nodes on this machine, met as its users meet it: over HTTP,
by its command line and its configuration file. Run by .ci/run, not by the suite.

python -m pytest -n 0 tests/cluster/live_ray.py           (needs the extra ray; 3 to 5 minutes)
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

import fastgen_jax
from fastgen_jax.cluster.arguments import read
from tests.server.running import wait_until

schema = pytest.importorskip("ray.serve.schema")

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
YAML = Path(fastgen_jax.__file__).parent / "cluster/serve.yaml"
CACHE = ROOT / ".pytest_cache/xla-replicas"
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "num_kv_blocks": 64,
         "max_model_len": 512, "replica_cpus": 1, "compilation_cache": str(CACHE),
         "api_key": "secret"}  # fmt: skip
START = 150.0  # seconds that a start may take
KEY = {"authorization": "Bearer secret"}
DONE, TOLD = "ended", "told of the failure"  # what may become of a stream
OUT_OF_ROTATION = 10.0  # seconds


class Room:
    """A Ray of two nodes with a CPU each, for a replica each."""

    def __init__(self, folder: str):
        self.port, self.gcs, self.dashboard = free_ports(3)
        self.url = f"http://127.0.0.1:{self.port}"
        self.begun: set[int] = set()  # numbers of streams that have brought something
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HOME": folder,  # for the token that Ray makes
            "RAY_AUTH_MODE": "token",
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
            "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
            "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }

    def start(self):
        node, home = ["--num-cpus=1", "--disable-usage-stats"], self.environment["HOME"]
        self.run("ray", "get-auth-token", "--generate")
        self.run("ray", "start", "--head", f"--port={self.gcs}", f"--temp-dir={home}/ray",
                 f"--dashboard-port={self.dashboard}", *node)  # fmt: skip
        self.run("ray", "start", f"--address=127.0.0.1:{self.gcs}", *node)

    def run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [BIN / program, *arguments], env=self.environment, cwd=ROOT, text=True, timeout=START,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def deploy(self, path: Path, **args):
        """The package's file, with what a test needs otherwise."""
        config = yaml.safe_load(YAML.read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["args"] |= SMALL | args
        path.write_text(yaml.safe_dump(config))
        self.run("serve", "deploy", str(path))

    def ask(self, n_tokens: int, number: int = 0) -> httpx.Response:
        body = {"prompt": f"{number} Once upon a time", "max_tokens": n_tokens, "ignore_eos": True}
        return self.post(body)

    def post(self, body: dict, **headers: str) -> httpx.Response:
        return httpx.post(
            self.url + "/v1/completions", json=body, headers=KEY | headers, timeout=START,
            trust_env=False,
        )  # fmt: skip

    def stream(self, number: int, n_tokens: int = 200) -> str:
        """What becomes of a stream."""
        body = {"prompt": f"{number} Once upon a time", "max_tokens": n_tokens, "stream": True,
                "ignore_eos": True}  # fmt: skip
        text = ""
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            httpx.stream(
                "POST",
                self.url + "/v1/completions",
                json=body,
                headers=KEY,
                timeout=START,
                trust_env=False,
            ) as response,
        ):
            for part in response.iter_text():
                self.begun.add(number)
                text += part
        events = text.strip().split("\n\n")
        if events[-1] == "data: [DONE]":
            return DONE
        return TOLD if '"error"' in events[-1] else f"ended silently: {text[-200:]!r}"

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(self.url + "/health", timeout=5, trust_env=False).status_code == 200
        return False


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [each.getsockname()[1] for each in taken]


def replicas() -> set[int]:
    """Processes of engines."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::ServeReplica:fastgen:replica"):
                found.add(int(path.parent.name))
    return found


def n_running(url: str) -> float:
    """Of the replica that happens to answer."""
    text = httpx.get(url + "/metrics", headers=KEY, trust_env=False).text
    (line,) = [x for x in text.splitlines() if x.startswith("fastgen:num_requests_running")]
    return float(line.split()[-1])


@pytest.fixture(scope="module")
def room() -> Iterator[Room]:
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets lie there, whose paths are short
    room = Room(folder)
    try:
        room.start()
        yield room
    finally:
        room.run("ray", "stop", "--force")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def command(room, tmp_path_factory) -> Iterator[subprocess.Popen]:
    """`python -m fastgen_jax.serve --replicas 2`, until its replicas are ready."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    path = tmp_path_factory.mktemp("log") / "log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastgen_jax.serve", "--replicas=2", f"--port={room.port}",
             f"--ray-address=127.0.0.1:{room.gcs}", *flags],
            env=room.environment, stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_until(lambda: b"ready    in" in path.read_bytes() or process.poll(), START)
        assert process.poll() is None, path.read_text()
        yield process
    finally:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("file", ["serve.yaml", "rayservice.yaml"])
def test_the_files_are_what_ray_reads(file):
    config = yaml.safe_load((YAML.parent / file).read_text())
    if file == "rayservice.yaml":
        config = yaml.safe_load(config["spec"]["serveConfigV2"])
    (application,) = schema.ServeDeploySchema.model_validate(config).applications
    assert application.import_path == "fastgen_jax.cluster:build"
    read(application.args)


def test_answers_and_streams_of_both_nodes_pass_through(room, command):
    assert len(replicas()) == 2
    answer = room.ask(8).json()
    assert answer["usage"]["completion_tokens"] == 8
    with ThreadPoolExecutor(8) as pool:
        assert Counter(pool.map(room.stream, range(8))) == {DONE: 8}
    bad = room.post({"prompt": 5})
    assert (bad.status_code, bad.json()["error"]["param"]) == (400, "prompt")
    assert room.post({"prompt": "a" * 2**21}).status_code == 413
    assert room.post({"prompt": "a" * 2**21}, authorization="Bearer guess").status_code == 401


def test_a_client_that_leaves_frees_what_it_had(room, command):
    body = {"prompt": "Once", "max_tokens": 480, "stream": True, "ignore_eos": True}
    for _ in range(4):
        with httpx.stream(
            "POST", room.url + "/v1/completions", json=body, headers=KEY, trust_env=False
        ) as response:
            next(response.iter_text())
    wait_until(lambda: not any(n_running(room.url) for _ in range(6)), 20.0)


def test_what_a_killed_replica_had_is_sent_again_or_told_and_it_is_replaced(room, command):
    before = replicas()
    room.begun.clear()
    with ThreadPoolExecutor(24) as pool:
        streams = [pool.submit(room.stream, number, 400) for number in range(24)]
        wait_until(lambda: len(room.begun) > SMALL["max_num_seqs"], 20.0)  # so both run some
        os.kill(min(before), signal.SIGKILL)
        killed = time.monotonic()
        found = Counter(stream.result() for stream in streams)
    assert found.keys() <= {DONE, TOLD}
    assert 0 < found[TOLD] <= SMALL["max_num_seqs"]  # it ran no more of them
    assert time.monotonic() - killed < START
    wait_until(lambda: all(room.ask(1).status_code == 200 for _ in range(10)), OUT_OF_ROTATION)
    wait_until(lambda: len(replicas() - {min(before)}) == 2, START)


def test_a_signal_lets_running_streams_end(room, command):
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(room.stream, number) for number in range(4)]
        wait_until(lambda: n_running(room.url) > 0, 20.0)
        command.send_signal(signal.SIGTERM)
        assert Counter(stream.result() for stream in streams) == {DONE: 4}
    assert command.wait(60) == 0
    wait_until(lambda: not replicas(), 30.0)


def test_the_file_deploys_and_a_new_version_replaces_replicas_without_loss(room, tmp_path):
    room.run("serve", "shutdown", "-y")
    room.deploy(tmp_path / "serve.yaml", replicas=2, version="1")
    wait_until(lambda: room.is_ready() and len(replicas()) == 2, START)
    old, answers = replicas(), []
    room.deploy(tmp_path / "serve.yaml", replicas=2, version="2")
    deadline = time.monotonic() + START
    with ThreadPoolExecutor(3) as pool:
        while old & replicas() or len(replicas()) < 2:
            assert time.monotonic() < deadline
            answers += pool.map(lambda number: room.stream(number, 20), range(3))
    assert len(answers) > 3
    assert set(answers) == {DONE}


def test_nobody_there_is_no_replica_and_the_next_request_waits_for_one(room, tmp_path):
    room.deploy(
        tmp_path / "serve.yaml",
        replicas=0, max_replicas=2, scale_down_delay=3, waiting_tokens=64, version="3",
    )  # fmt: skip
    wait_until(lambda: not replicas(), START)
    assert room.ask(4).status_code == 200
    with ThreadPoolExecutor(32) as pool:
        streams = [pool.submit(room.stream, number, 200) for number in range(32)]
        wait_until(lambda: len(replicas()) == 2, 60.0)
        assert {stream.result() for stream in streams} == {DONE}
