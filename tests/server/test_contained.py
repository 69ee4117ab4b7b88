"""What goes wrong with one request stays with it: faults of ours, words of errors, what is kept."""

import contextlib
import hmac
import http.client
import itertools
import re
import sys
import threading

import httpx
import orjson
import pytest

from fastgen_jax.server import door, gate, protocol, service
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.formats import format
from fastgen_jax.server.formats.choices import ChoicesFormat
from fastgen_jax.server.reader import Reader
from fastgen_jax.server.web import PAGES
from fastgen_jax.tokenizer import Tokenizer
from fastgen_jax.tokenizer.stop_strings import StopMatcher
from tests.server.running import CHAT, PATHS, TEXT, hold_encode, read_all, serving, wait_until
from tests.server.test_bad_input import BAD
from tests.server.test_wire import CORPUS, exchange

# Where a machine shows through: paths, addresses of objects, tracebacks, names of our files.
LEAK = re.compile(rb"/(?:usr|home|root|tmp|proc|work|opt|var)/|site-packages|\.py\b|0x[0-9a-f]{6,}|"
                  rb"Traceback|File \\?\"|fastgen_jax\.|jinja2\.|pydantic|orjson")  # fmt: skip
MARK = 666  # the seed of the request at which a hook raises


def boom(*args, **kwargs):
    raise ZeroDivisionError("secret at 0x7f5c2a1b3c4d in /usr/lib/secret.py")


class TestHooks:
    """A fault in each thing that is done for one request fails that one, and leaves no trace."""

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize(("owner", "name"), [
        (protocol, "parse"), (protocol.CompletionRequest, "check_supported"),
        (protocol.CompletionRequest, "to_params"), (protocol.CompletionRequest, "prompts"),
        (protocol, "cache_salt"), (protocol, "check_token_ids"), (Tokenizer, "encode"),
        (service.TextStream, "of_samples"), (service, "Choice"), (service.TextStream, "push"),
        (StopMatcher, "feed"), (format, "usage_of"), (ChoicesFormat, "_logprobs"),
    ])  # fmt: skip
    def test_a_fault_fails_its_request_alone(self, up, monkeypatch, owner, name, stream):
        body = {"prompt": TEXT, "max_tokens": 20, "ignore_eos": True}
        up.engine.may_step.clear()
        with up.connect(body) as good:
            wait_until(lambda: len(up.engine.live) == 1)
            options = {
                "stream": stream,
                "stream_options": {"include_usage": True} if stream else None,
            }
            marked = body | {"seed": MARK, "stop": ["zzz"], "logprobs": 1} | options
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, self.for_marked(owner, name))
                with up.connect(marked) as bad:
                    if name in ("push", "feed", "usage_of", "_logprobs"):  # done once tokens come
                        wait_until(lambda: len(up.engine.live) == 2)
                    up.engine.may_step.set()
                    failed = read_all(bad) if stream and name == "usage_of" else bad.recv(65536)
            is_late = stream and name == "usage_of"  # after the last token
            assert failed.startswith(b"HTTP/1.1 200" if is_late else b"HTTP/1.1 500"), failed
            assert b"[DONE]" not in failed
            assert not (is_late and failed.endswith(b"0\r\n\r\n"))
            assert not LEAK.search(failed.replace(b"Content-Type", b""))
            assert good.recv(65536).startswith(b"HTTP/1.1 200")
        wait_until(lambda: not up.engine.live and not up.service._live)
        assert up.post("/v1/completions", body).status_code == 200

    def for_marked(self, owner, name):
        """The attribute, but it raises for the marked request; where what it is given does not say
        whose it is, for all, since the other one is beyond it.
        """
        if name == "push":
            plain = service.TextStream.push
            return lambda s, output: boom() if s._params.seed == MARK else plain(s, output)
        if name == "_logprobs":
            plain = ChoicesFormat._logprobs
            return lambda s, *args: boom() if s.logprobs is not None else plain(s, *args)
        if name == "usage_of":
            plain = format.usage_of
            return lambda g: boom() if g.choices[0].wants_logprobs else plain(g)
        return staticmethod(boom) if isinstance(owner, type) else boom


class TestWords:
    """What an error says is about the request."""

    def test_no_refusal_shows_anything_of_the_machine(self, up):
        answers = [up.post(f"/v1/{path}", PATHS[path] | change) for path, change, _ in BAD]
        for method, path in itertools.product(
            ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "HEAD"),
            ("/", "/v1/completions", "/nowhere", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/x%00y"),
        ):
            answers.append(up.http.request(method, up.url + path))
        for body in (b"{", b"[]", b"\xff", b"[" * 10**5, b'{"prompt": NaN}', b'{"prompt":{"a":1}}'):
            answers += [up.post(path, body) for path in ("/v1/completions", "/tokenize")]
        deep = {"role": "tool", "content": "a", "tool_calls": [{"function": 5}]}
        answers.append(up.post("/v1/chat/completions", {"messages": [deep], "max_tokens": 1}))
        assert {answer.status_code for answer in answers} <= {200, 400, 404, 405}
        for answer in answers:
            said = answer.content.replace(str(answer.request.url.path).encode(), b"")
            assert not LEAK.search(said), said

    def test_nor_does_a_refusal_of_framing(self, up):
        for wire in CORPUS.values():
            assert not LEAK.search(exchange(up.address, wire))

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_fault_is_said_without_its_words(self, up, monkeypatch, stream):
        monkeypatch.setattr(up.service, "submit", boom)
        for path in PATHS:
            answer = up.post(f"/v1/{path}", PATHS[path] | {"stream": stream})
            assert answer.status_code == 500
            assert not LEAK.search(answer.content)
            assert "secret" not in answer.text


class TestKept:
    """Values of which there are endlessly many are not remembered."""

    def test_distinct_values_of_every_field_leave_nothing(self, up):
        """100,000 unknown names, 40,000 stop strings, and so on, in 2500 bodies."""
        reader = Reader(up.service, ServerConfig(port=0))
        bodies = (self.body(i) for i in range(2600))
        for body in itertools.islice(bodies, 100):
            self.read(reader, body)
        before = sys.getallocatedblocks()
        for body in bodies:
            self.read(reader, body)
        assert sys.getallocatedblocks() - before < 2500
        assert len(protocol._warned) <= protocol.MAX_WARNED

    def body(self, i: int) -> dict:
        unknown = {f"unknown_{i}_{j}": j for j in range(40)}
        stops = [f"stop {i} {j}" for j in range(16)]
        bias = {str((i + j) % 335): 0.5 for j in range(20)}
        return unknown | {
            "prompt": f"prompt {i}", "stop": stops, "logit_bias": bias, "cache_salt": f"salt {i}",
            "user": f"user {i}", "seed": i, "temperature": i / 1e4,
            "model": f"m{i}" if i % 2 else None,
        }  # fmt: skip

    def read(self, reader: Reader, body: dict):
        with contextlib.suppress(ApiError):
            reader.completion(orjson.dumps(body))

    def test_distinct_paths_methods_headers_and_ids_leave_nothing(self, up):
        n_series = len(up.get("/metrics").text.splitlines())
        with contextlib.closing(http.client.HTTPConnection(*up.address, timeout=5)) as connection:
            self.check_requests(connection)
        assert len(up.get("/metrics").text.splitlines()) == n_series

    def check_requests(self, connection: http.client.HTTPConnection):

        def ask(i: int):
            headers = {f"X-Name-{i}": "v", "X-Request-Id": f"id-{i}", "User-Agent": f"agent {i}"}
            method = ("GET", "POST", "DELETE", f"M{'ABCDEFGHIJ'[i % 10]}")[i % 3]
            connection.request(method, f"/v1/models/name-{i}?query={i}", headers=headers)
            connection.getresponse().read()

        for i in range(200):
            ask(i)
        before = sys.getallocatedblocks()
        for i in range(200, 3200):
            ask(i)
        assert sys.getallocatedblocks() - before < 2000

    def test_what_the_tokenizer_remembers_is_bounded_by_its_vocabulary(self, up, tokenizer):
        for i in range(50):
            ids = [(i * 7 + j) % 331 for j in range(40)]
            body = {"prompt": ids, "max_tokens": 10, "logprobs": 5, "ignore_eos": True}
            assert up.post("/v1/completions", body).status_code == 200
            up.post("/v1/completions", body | {"prompt": [10**6 + i]})
        assert len(tokenizer._bytes) <= up.engine.model_config.vocab_size


class TestDoor:
    def test_a_key_is_compared_with_all_and_in_constant_time(self, tokenizer, monkeypatch):
        compared = []

        def compare(a, b, plain=hmac.compare_digest):
            compared.append((a, b))
            return plain(a, b)

        monkeypatch.setattr(door.hmac, "compare_digest", compare)
        with serving(tokenizer, api_key=("first", "second", "third")) as up:
            for key, status in (("first", 200), ("third", 200), ("x", 401), ("FIRST", 401)):
                compared.clear()
                headers = {"authorization": f"Bearer {key}"}
                assert up.get("/v1/models", headers=headers).status_code == status
                assert len(compared) == 3
                assert {len(digest) for pair in compared for digest in pair} == {32}

    def test_every_route_but_health_needs_a_key_however_it_is_spelled(self, tokenizer):
        with serving(tokenizer, api_key=("key",)) as up:
            app = up.server.config.app
            while not hasattr(app, "routes"):
                app = app.app
            paths = {route.path for route in app.routes}
            open_paths = gate.OPEN_PATHS | PAGES.keys()
            assert paths > open_paths
            assert {"/v1/completions", "/metrics", "/docs/oauth2-redirect"} < paths
            closed = [path.replace("{model_id:path}", "fake") for path in paths - open_paths]
            for path in closed:
                for target, extra in spellings(path):
                    for key in ("", "Authorization: Bearer bad\r\n", "Authorization: key\r\n"):
                        for method in ("GET", "POST", "HEAD", "OPTIONS"):
                            status = self.ask(up, method, target, extra + key)
                            assert status in (400, 401, 403), (method, target, extra, key)
                method = "HEAD" if path == "/debug/steps" else "GET"  # which would not end
                status = self.ask(up, method, path, "Authorization: Bearer key\r\n")
                assert status in (200, 404 if "{response_id}" in path else 405)
            for path in open_paths:
                assert self.ask(up, "GET", path, "") == 200

    def ask(self, up, method: str, target: str, extra: str) -> int:
        host = "" if "Host:" in extra else "Host: localhost\r\n"
        request = f"{method} {target} HTTP/1.1\r\n{host}{extra}Connection: close\r\n\r\n"
        return int(exchange(up.address, request.encode())[9:12])

    def test_a_web_page_cannot_use_a_server_on_loopback(self, up):
        """No CORS header, for no origin: a browser shows the page nothing, nor sends it JSON."""
        origin = {"origin": "https://evil.example"}
        preflight = origin | {
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
            "access-control-request-private-network": "true",
        }
        answers = [
            up.http.options(up.url + path, headers=preflight) for path in ("/", "/v1/models")
        ]
        answers.append(up.http.options(up.url + "/v1/completions", headers=preflight))
        assert all(answer.status_code in (404, 405) for answer in answers)
        answers.append(up.get("/v1/models", headers=origin))
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            answer = up.post("/v1/completions", b"{}", headers=origin | {"content-type": kind})
            assert answer.status_code == 415
            answers.append(answer)
        for answer in answers:
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert up.get("/livez", headers={"host": "evil.example"}).status_code == 403


def spellings(path: str):
    """Targets and headers under which a route has been reached past a guard elsewhere."""
    yield path, ""
    for host in ("x/?", "localhost/livez?", "localhost#", "/livez"):
        yield path, f"Host: {host}\r\n"
    for header in ("X-Original-URL", "X-Rewrite-URL", "X-Forwarded-Prefix", "X-Forwarded-For"):
        yield path, f"{header}: /livez\r\n"
    yield f"http://localhost{path}", ""
    yield f"http://localhost/livez/..{path}", ""
    yield f"/{path}", ""
    yield f"/livez/..{path}", ""
    yield f"/livez/%2e%2e{path}", ""
    yield f"/livez%2f..{path}", ""
    yield f"/livez;{path}", ""
    yield f"{path}?path=/livez", ""
    yield f"{path}#/livez", ""
    yield f"/%2e{path}", ""
    yield path.replace("/", "/%2f", 1), ""
    yield path.replace("m", "%6d").replace("v", "%76"), ""
    yield path.upper(), ""
    yield f"{path}/", ""
    yield f"{path}%00", ""
    yield f"{path}%20", ""
    yield path.replace("/", "\\", 1), ""


def test_tokenizing_while_the_server_ends_is_answered_or_refused(tokenizer):
    """No 500 and no silence for a text that is being read when the drain begins."""
    body, found, stopping = {"prompt": "Anna has " * 3000}, [], threading.Event()
    with serving(tokenizer, drain_timeout=5) as up:

        def ask(path: str, body: dict):
            with httpx.Client(base_url=up.url, trust_env=False, timeout=10) as client:
                while not stopping.is_set():
                    try:
                        answer = client.post(path, json=body)
                    except httpx.TransportError:  # nobody listens any more
                        return
                    code = answer.json()["error"]["code"] if answer.status_code != 200 else None
                    found.append((answer.status_code, code))

        chat = {"messages": [CHAT[0] | {"content": "Anna has " * 300}], "max_tokens": 1}
        asks = [("/tokenize", body), ("/tokenize", body), ("/v1/chat/completions", chat)]
        threads = [threading.Thread(target=ask, args=each) for each in asks]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(found) > 20)
        up.begin_drain()
        up.thread.join(10)
        stopping.set()
        for thread in threads:
            thread.join(10)
        assert not up.thread.is_alive()
    assert {(200, None)} < set(found) <= {(200, None), (503, "draining")}


def test_a_text_that_outlasts_the_drain_does_not_hold_the_server(tokenizer, monkeypatch):
    go_on = hold_encode(tokenizer, monkeypatch)
    with serving(tokenizer, drain_timeout=0.1) as up:
        with up.connect({"prompt": "a " * 2000}) as late:
            wait_until(lambda: up.service.uploads.n_held)
            up.begin_drain()
            up.thread.join(5)
            assert not up.thread.is_alive()
            received = read_all(late)
        go_on.set()
    assert not received or received.startswith(b"HTTP/1.1 5")
