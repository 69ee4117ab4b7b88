"""A serving process listens where it was told to, connects to nobody, starts nothing but the trial
of grammars and reads no model but its own: seen from outside, and by an audit hook within.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from fastgen_jax.built_in import DEMO
from tests.server.running import wait_until

ROOT = Path(__file__).parents[2]
FLAGS = "--port 0 --max-model-len 256 --max-num-seqs 2 --max-num-batched-tokens 32 --block-size 16"
FLAGS += " --compile all"  # a server that still compiles writes to the cache, and ends at once
CACHE = str(ROOT / ".pytest_cache/xla")
TRIAL = "'-m', 'fastgen_jax.server.trial']"
LISTEN = "0A"  # a state in /proc/net/tcp
# The real command with the demo model. A line on stdin says that it is ready; it tells at its end
# which files it has opened until then, and what it has done since that a server has no need of.
LAUNCH = """
import json, sys, threading
from fastgen_jax import serve

FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "socket.sendmsg", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty",
    "os.posix_spawn", "os.spawn", "pty.spawn", "os.remove", "os.rename", "shutil.rmtree")
is_serving, done, read = threading.Event(), [], set()

def hook(event, args):
    if is_serving.is_set():
        done.extend([f"{event} {args}"] if event in FORBIDDEN else [])
    elif event == "open" and isinstance(args[0], str):
        read.add(args[0])

sys.addaudithook(hook)
threading.Thread(target=lambda: sys.stdin.readline() and is_serving.set(), daemon=True).start()
code = serve.main(sys.argv[1:])
is_serving.clear()
print(json.dumps({"done": done, "read": sorted(read)}))
sys.exit(code)
"""


class Socket(NamedTuple):
    """A line of /proc/PID/net/tcp of the process itself."""

    port: int
    state: str


class Sealed:
    """The process."""

    def __init__(self):
        command = [sys.executable, "-c", LAUNCH, *FLAGS.split(), "--compilation-cache", CACHE]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": ""},
        )  # fmt: skip
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if "http://" in line)
        self.url = "http://" + line.split("http://")[1].split()[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def inodes(self) -> set[str]:
        found = set()
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
        return found

    def lines(self, kind: str) -> list[list[str]]:
        """Of /proc/PID/net/`kind`."""
        path = Path(f"/proc/{self.process.pid}/net/{kind}")
        return [line.split() for line in path.read_text().splitlines()[1:]] if path.exists() else []

    def sockets(self, *kinds: str) -> list[Socket]:
        """Its own ones, of these kinds."""
        own, found = self.inodes(), []
        for kind in kinds:
            for line in self.lines(kind):
                if line[9] in own:
                    found.append(Socket(int(line[1].rsplit(":", 1)[1], 16), line[3]))
        return found

    def check_sockets(self):
        tcp, udp = self.sockets("tcp", "tcp6"), self.sockets("udp", "udp6", "raw", "raw6")
        assert [s.port for s in tcp if s.state == LISTEN] == [self.port]
        assert {s.port for s in tcp} == {self.port}, "a connection that it did not accept"
        assert udp == []
        own = self.inodes()
        assert [
            line for line in self.lines("unix") if line[6] in own and line[3] != "00000000"
        ] == []

    def health(self) -> int:
        return httpx.get(self.url + "/health", trust_env=False).status_code

    def finish(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err
        return json.loads(out)


@pytest.fixture(scope="module")
def sealed() -> Iterator[Sealed]:
    if not Path("/proc/self/net/tcp").exists():
        pytest.skip("only Linux shows a process's sockets as files")
    sealed = Sealed()
    yield sealed
    sealed.process.kill()
    sealed.process.communicate()


def bodies(url: str) -> Iterator[tuple[str, dict]]:
    """Requests with a URL wherever one can stand."""
    names = [
        "user", "callback_url", "webhook", "image", "chat_template", "lora_path", "cache_salt",
        "tokenizer", "model_path", "guided_json", "response_format", "metadata", "stop",
    ]  # fmt: skip
    for path, body in (
        ("/v1/completions", {"prompt": url}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": url, "name": url}]}),
        ("/tokenize", {"prompt": url}),
    ):
        for name in names:
            yield path, {"max_tokens": 2} | body | {name: url}
        yield path, body | {"model": url}
        yield (
            path,
            body | {"response_format": {"type": "json_schema", "json_schema": {"$ref": url}}},
        )
        yield path, body | {"structured_outputs": {"json": {"$ref": url}}}
        yield path, body | {"tools": [{"type": "mcp", "server_url": url}]}
    for kind in ("image_url", "video_url", "audio_url"):
        part = {"type": kind, kind: {"url": url}}
        yield "/v1/chat/completions", {"messages": [{"role": "user", "content": [part]}]}


def test_nothing_listens_but_the_port_asked_for_nor_connects_anywhere(sealed):
    sealed.check_sockets()  # while it loads
    wait_until(lambda: sealed.health() == 200, 240)
    sealed.check_sockets()
    with socket.create_server(("127.0.0.1", 0)) as canary:
        url = f"http://127.0.0.1:{canary.getsockname()[1]}/x"
        sealed.process.stdin.write("ready\n")
        sealed.process.stdin.flush()
        headers = dict.fromkeys(("referer", "origin", "x-forwarded-for", "x-callback-url"), url)
        statuses = set()
        with httpx.Client(base_url=sealed.url, trust_env=False, headers=headers) as client:
            for i, (path, body) in enumerate(bodies(url)):
                statuses.add(client.post(path, json=body, timeout=20).status_code)
                if i % 10 == 0:
                    sealed.check_sockets()
            client.get("/v1/models/" + url)
        assert statuses == {200, 400, 404}
        assert not select.select([canary], [], [], 0)[0], "somebody came for what the URL names"
    ended = sealed.finish()
    [tried] = ended["done"]  # clients' grammars, in one process
    assert TRIAL in tried
    endings = (".json", ".safetensors", ".jinja", ".model", ".bin", ".pt", ".txt", ".gguf")
    models = [Path(name) for name in ended["read"] if name.endswith(endings)]
    assert {path.name for path in models if path.parent == DEMO} >= {"config.json"}
    elsewhere = {path for path in models if path.parent != DEMO}
    # What Python's packages say of themselves; that of an editable install lies beside the source.
    packages = {path for path in elsewhere if path.parent.suffix in (".egg-info", ".dist-info")}
    assert [p for p in elsewhere - packages if "site-packages" not in p.parts] == []
