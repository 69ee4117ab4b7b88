"""What a client makes of a server's refusals and of its silence, with an engine that echoes."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from fastgen_jax import mii
from fastgen_jax.errors import ConfigError, EngineStopped, FastGenError, InvalidRequest, QueueFull
from fastgen_jax.mii.wire import Wire, _is_loopback
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.fake_engine import FakeEngine
from tests.server.running import Running, serving, wait_until

TEXT = "Anna has three apples."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def up(tokenizer) -> Iterator[Running]:
    engine = FakeEngine(tokenizer.eos_token_id or 0, max_queued_requests=4)
    with serving(tokenizer, engine) as running:
        yield running


class Canned(http.server.BaseHTTPRequestHandler):
    """Answers every request with the server's `status`, `kind` and `body`, and closes."""

    def do_GET(self):
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("content-type", self.server.kind)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(self.server.body)  # type: ignore[attr-defined]

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def canned() -> Iterator:
    """A function that makes a client of a server which says one thing only."""
    with http.server.HTTPServer(("127.0.0.1", 0), Canned) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def says(body: str, status: int = 200, kind: str = "application/json") -> mii.Client:
            vars(server).update(body=body.encode(), status=status, kind=kind)
            return mii.client(f"http://127.0.0.1:{server.server_port}")

        yield says
        server.shutdown()
        thread.join()


def test_a_full_queue_says_when_to_come_back(up):
    up.engine.may_step.clear()
    client, held = mii.client(up.url), []
    stream = threading.Thread(target=lambda: held.extend(client([[1, 2]] * 4, max_new_tokens=2)))
    stream.start()
    wait_until(lambda: len(up.engine.live) == 4)
    with pytest.raises(QueueFull, match="queue is full") as caught:
        client([1, 2], max_new_tokens=2)
    assert caught.value.retry_after == 1.0
    up.engine.may_step.set()
    stream.join()
    assert len(held) == 4


def test_one_request_that_fails_ends_the_others_of_its_call(up):
    up.engine.may_step.clear()
    client, errors = mii.client(up.url), []

    def ask():
        try:
            client([[1, 2], [1, 2, 3]], max_length=40)
        except FastGenError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: len(up.engine.live) == 2)
    up.engine.poisoned.add(min(id for id, _ in up.engine.live))
    up.engine.may_step.set()
    asking.join()
    assert [type(error) for error in errors] == [FastGenError]
    wait_until(lambda: not up.engine.live)


def test_a_server_that_drains_is_engine_stopped(up):
    client = mii.client(up.url)
    up.service.drain()
    assert client.status()["phase"] == "draining"
    with pytest.raises(EngineStopped, match="shutting down"):
        client(TEXT, max_new_tokens=1)


def test_a_stream_that_fails_under_way_is_an_error(up):
    stream = mii.client(up.url).stream(TEXT, max_new_tokens=100)
    up.engine.step_time = 0.02
    next(stream)
    up.engine.fault = TypeError("a fault of ours")
    with pytest.raises(FastGenError):
        list(stream)


EVENT = (
    '{"id":"x","choices":[{"index":0,"text":"a","token_ids":[1],"finish_reason":null,'
    '"stop_reason":null}]}'
)


@pytest.mark.parametrize(("after", "message"), [
    ("", "has cut its answer short"),
    ("data: [DONE", "has cut its answer short"),
    ('data: {"error":{"message":"it broke","type":"server_error"}}\n\n', "it broke"),
    ("data: {]\n\n", "no answer of a server of fastgen_jax"),
    ("data: {}\n\n", "without what a server of fastgen_jax tells"),
])  # fmt: skip
def test_a_stream_without_its_end_is_never_a_short_answer(canned, after, message):
    client = canned(f"data: {EVENT}\n\n{after}", kind="text/event-stream")
    stream = client.stream([1, 2], max_new_tokens=5)
    assert str(next(stream)) == "a"
    with pytest.raises(FastGenError, match=message):
        next(stream)


def test_a_line_separator_in_a_text_does_not_end_an_event(canned):
    body = EVENT.replace('"a"', '"\u2028\x85\x0b"').replace("\x0b", "\\u000b")
    client = canned(f"data: {body}\n\ndata: [DONE]\n\n", kind="text/event-stream")
    assert [str(piece) for piece in client.stream([1], max_new_tokens=1)] == ["\u2028\x85\x0b"]


@pytest.mark.parametrize(("body", "status", "message"), [
    ("<html>nginx</html>", 502, "answered 502 with b'<html>nginx</html>'"),
    ("<html>hello</html>", 200, "no answer of a server of fastgen_jax"),
    ("[1]", 200, "no answer of a server of fastgen_jax"),
    ("{}", 200, "without what a server of fastgen_jax tells"),
    ('{"choices": [{}]}', 200, "without what a server of fastgen_jax tells"),
    ('{"choices": []}', 200, "without what a server of fastgen_jax tells"),
    ('{"detail": "Not Found"}', 404, "answered 404"),
    ('{"error": "no"}', 500, "answered 500"),
])  # fmt: skip
def test_a_server_of_another_kind_is_told_as_such(canned, body, status, message):
    with pytest.raises(FastGenError, match=message):
        canned(body, status)([1, 2], max_new_tokens=1)


def test_a_server_that_is_not_there_is_an_error_that_names_it():
    client = mii.client("http://127.0.0.1:9")
    for call in (client.status, lambda: client("x", max_new_tokens=1)):
        with pytest.raises(FastGenError, match=r"http://127\.0\.0\.1:9 cannot be"):
            call()


def test_a_refusal_names_the_field(up):
    with pytest.raises(InvalidRequest) as caught:
        mii.client(up.url)([1, 2], max_new_tokens=1, stop=["x"] * 1000)
    assert caught.value.param == "stop"


def test_what_is_no_url_is_refused():
    for url in ("http://a:b", "ftp://host", "http://"):
        with pytest.raises(ConfigError, match="http://host:port"):
            mii.client(url)


def test_addresses_of_this_machine_are_known():
    near = ("127.0.0.1", "::1", "localhost", "127.8.8.8")
    assert all(map(_is_loopback, near))
    assert not any(map(_is_loopback, ("example.org", "10.0.0.1")))
    assert Wire("http://[::1]:80/").url == "http://[::1]:80"
