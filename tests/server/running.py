"""A server on a fake engine, in this process, and ways to talk to it."""

import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import openai
import orjson

from fastgen_jax.server.certificates import Certificates
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.lifecycle import Server
from fastgen_jax.server.listen import bind, unix_socket, url_of
from fastgen_jax.server.service import Backend, Service
from fastgen_jax.tokenizer import Tokenizer
from tests.server.fake_engine import FakeEngine

TEXT = "Anna has three apples and a red ball."
CHAT = [{"role": "user", "content": TEXT}]
PATHS = {"completions": {"prompt": TEXT}, "chat/completions": {"messages": CHAT}}


@dataclass
class Running:
    """A server in a thread."""

    service: Service
    server: Server
    thread: threading.Thread
    address: tuple[str, int]
    engine: FakeEngine
    http: httpx.Client
    url: str
    trusts: ssl.SSLContext | None  # where TLS is spoken
    rpc_address: str  # where gRPC is

    def post(self, path: str, body=None, **kwargs) -> httpx.Response:
        """POSTs a JSON value, or bytes as they are."""
        if isinstance(body, bytes):
            kwargs = {"content": body, "headers": {"content-type": "application/json"}} | kwargs
        else:
            kwargs["json"] = body
        return self.http.post(self.url + path, **kwargs)

    def get(self, path: str, **kwargs) -> httpx.Response:
        return self.http.get(self.url + path, **kwargs)

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=10)

    def open(self, buffer: int | None = None) -> socket.socket:
        """A connection, with TLS if that is spoken."""
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(10)
        connection.connect(self.address)
        if self.trusts is None:
            return connection
        return self.trusts.wrap_socket(connection, server_hostname="localhost")

    def connect(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A connection on which the request was sent."""
        connection = self.open()
        connection.sendall(raw_post(path, orjson.dumps(body)))
        return connection

    def begin_drain(self):
        loop = self.server._loop
        assert loop is not None
        loop.call_soon_threadsafe(self.server.begin_drain)


def raw_post(path: str, body: bytes, extra: str = "", length: int | None = None) -> bytes:
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {length}\r\n{extra}\r\n".encode() + body


def wait_until(condition: Callable[[], object], seconds: float = 5.0):
    """Polls; what did not become true in time fails the test."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
        while data := connection.recv(65536):
            received += data
    return received


def hold_encode(tokenizer: Tokenizer, monkeypatch, min_length: int = 0) -> threading.Event:
    """From now on a text of that many characters is encoded once the event is set."""
    go_on, encode = threading.Event(), tokenizer.encode

    def encode_late(text: str, **kwargs) -> list[int]:
        assert len(text) < min_length or go_on.wait(20)
        return encode(text, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", encode_late)
    return go_on


@contextlib.contextmanager
def serving(
    tokenizer: Tokenizer,
    engine: FakeEngine | None = None,
    *,
    load=None,
    wait=True,
    trusts: ssl.SSLContext | None = None,
    rpc=False,
    **options,
) -> Iterator[Running]:
    """A server on a free port, and gRPC on another; its threads are gone at the end. TLS is spoken
    with who `trusts`.
    """
    engine = engine or FakeEngine(tokenizer.eos_token_id or 0)
    place = {} if "uds" in options else {"port": 0}
    config = ServerConfig(**place | {"drain_timeout": 0.0} | options)
    listeners = contextlib.ExitStack()
    listener = listeners.enter_context(
        bind(config.host, config.port) if config.uds is None else unix_socket(config.uds)
    )
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    backend = Backend(engine, tokenizer)  # type: ignore[arg-type]
    service = Service(
        load or (lambda on_phase: backend), config, model_names=["fake"], model_aliases=["./fake"]
    )
    pair = (config.tls_cert, config.tls_key)
    certificates = Certificates(*pair) if all(pair) else None
    server, rpc_address = Server(service, config, certificates), ""
    if rpc:
        from fastgen_jax.server.rpc.server import RpcServer  # it needs packages of an extra

        rpc_listener = bind(config.host, 0)
        rpc_address = f"127.0.0.1:{rpc_listener.getsockname()[1]}"
        server.rpc = RpcServer(service, config, rpc_listener, certificates)
    address = listener.getsockname()
    url = url_of(listener, "127.0.0.1", "https" if all(pair) else "http")
    service.start()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    one_request_each = httpx.Limits(max_keepalive_connections=0)
    http_client = httpx.Client(
        timeout=10, limits=one_request_each, trust_env=False, verify=trusts or True
    )
    running = Running(
        service, server, thread, address, engine, http_client, url, trusts, rpc_address
    )
    try:
        wait_until(lambda: server.started)
        if wait:
            wait_until(lambda: service.phase.name == "ready")
        yield running
    finally:
        engine.stop()
        running.begin_drain() if thread.is_alive() else None
        thread.join(10)
        service.stop()
        http_client.close()
        listeners.close()
        assert not thread.is_alive()


def events_of(body: str) -> list:
    """The JSON of each event, "[DONE]" as that."""
    lines = [line for line in body.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]
