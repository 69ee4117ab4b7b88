"""Every state of a connection ends: silence, dripping, unread answers, half-closes, crowds."""

import contextlib
import http.client
import logging
import resource
import shutil
import socket
import subprocess
import time

import orjson
import pytest

from fastgen_jax.server import capacity, connection, peer
from tests.server.running import (
    PATHS,
    TEXT,
    Running,
    events_of,
    raw_post,
    read_all,
    serving,
    wait_until,
)

GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
SHORT = 0.15  # seconds of a timeout that is to pass
LONG = 30.0  # of one that is not
LARGE = {"prompt": TEXT, "max_tokens": 400, "ignore_eos": True, "logprobs": 20}  # 500 kB
SMALL = {"prompt": TEXT, "max_tokens": 100, "ignore_eos": True, "logprobs": 20}  # 50 kB


@pytest.fixture
def timeouts(monkeypatch):
    """Sets the named timeouts to SHORT and the others to LONG."""

    def shorten(*names: str):
        for name in ("KEEP_ALIVE", "HEADER_TIMEOUT", "BODY_TIMEOUT", "LINGER"):
            monkeypatch.setattr(connection, name, SHORT if name in names else LONG)

    return shorten


@pytest.fixture
def log(caplog):
    logger = logging.getLogger("fastgen_jax")
    logger.addHandler(caplog.handler)
    propagates, logger.propagate = logger.propagate, False  # else the root has each line again
    yield caplog
    logger.propagate = propagates
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def shared(tokenizer, wire):
    with serving(tokenizer, **wire) as running:
        yield running


def end_side(client: socket.socket):
    socket.socket.shutdown(client, socket.SHUT_WR)  # that of TLS would forget its keys


def n_unread(client: socket.socket) -> int:
    """Bytes that have come, encrypted or not."""
    client.setblocking(False)
    try:
        return len(socket.socket.recv(client, 65536, socket.MSG_PEEK))
    except BlockingIOError:
        return 0
    finally:
        client.settimeout(10)


def get(client: socket.socket) -> bytes:
    """The answer to one more request, which may come in pieces."""
    client.sendall(GET)
    received = b""
    while not received.endswith(b"}"):
        received += client.recv(65536)
    return received


def n_open(up: Running) -> int:
    return len(up.server.server_state.connections)


def drip(client: socket.socket, piece: bytes) -> float:
    """Sends pieces until the server closes; returns how long it took."""
    started = time.monotonic()
    client.settimeout(0.01)
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 5:
            client.sendall(piece)
            with contextlib.suppress(TimeoutError):
                while client.recv(65536):
                    pass
                break
    return time.monotonic() - started


class TestTimers:
    def test_a_silent_new_connection_is_closed(self, up, timeouts):
        timeouts("HEADER_TIMEOUT")
        with up.open() as client:
            assert read_all(client) == b""

    @pytest.mark.parametrize("stray", [b"\r\n", b""])
    def test_a_kept_connection_is_closed_however_often_a_line_ends(self, up, timeouts, stray):
        timeouts("KEEP_ALIVE")
        with up.open() as client:
            assert get(client).startswith(b"HTTP/1.1 200")
            assert SHORT / 2 < drip(client, stray) < 10 * SHORT

    def test_a_dripped_head_is_closed(self, up, timeouts):
        timeouts("HEADER_TIMEOUT")
        with up.open() as client:
            client.sendall(GET[:-2])
            assert drip(client, b"X: y\r\n") < 10 * SHORT

    @pytest.mark.parametrize("start", ["GET /livez", "POST /nowhere", "GET /nowhere"])
    def test_a_dripped_body_that_no_route_reads_is_closed(self, up, timeouts, start):
        timeouts("BODY_TIMEOUT")
        head = f"{start} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
        with up.open() as client:
            client.sendall(head.encode())
            assert drip(client, b"x") < 10 * SHORT

    def test_a_dripped_body_that_a_route_reads_is_closed(self, up, timeouts):
        timeouts("BODY_TIMEOUT")
        with up.open() as client:
            client.sendall(raw_post("/v1/completions", b"", length=1000))
            assert drip(client, b" ") < 10 * SHORT
        wait_until(lambda: not up.service.n_inflight)

    @pytest.mark.parametrize("next_bytes", [b"G", b"\r\n", GET[:-2], raw_post("/x", b"", length=9)])
    def test_a_started_next_request_does_not_cut_the_running_answer(self, up, timeouts, next_bytes):
        timeouts("HEADER_TIMEOUT", "KEEP_ALIVE", "BODY_TIMEOUT")
        up.engine.step_time = 0.01
        body = {"prompt": TEXT, "stream": True, "max_tokens": 60, "ignore_eos": True}
        with up.open() as client:
            client.sendall(raw_post("/v1/completions", orjson.dumps(body)))
            received = client.recv(65536)
            client.sendall(next_bytes)
            started = time.monotonic()
            received += read_all(client)
            assert time.monotonic() - started > 2 * SHORT
        assert b"data: [DONE]" in received

    def test_a_connection_lives_on_while_requests_come(self, up, timeouts):
        timeouts("HEADER_TIMEOUT", "KEEP_ALIVE", "BODY_TIMEOUT")
        client = http.client.HTTPConnection(*up.address, timeout=5)
        client.sock = up.open()
        first, started = client.sock, time.monotonic()
        while time.monotonic() - started < 3 * SHORT:
            client.request("GET", "/livez")
            assert client.getresponse().read()
            assert client.sock is first
        client.close()


class TestUnread:
    @pytest.mark.parametrize("body", [LARGE, SMALL])
    @pytest.mark.parametrize("extra", ["", "Connection: close\r\n"])
    def test_an_unread_answer_is_cut(self, tokenizer, wire, log, body, extra):
        with serving(tokenizer, stream_timeout=SHORT, **wire) as up, up.open(4096) as client:
            client.sendall(raw_post("/v1/completions", orjson.dumps(body), extra))
            wait_until(lambda: "left its answer unread" in log.text)
            wait_until(lambda: not n_open(up))
            with pytest.raises(ConnectionResetError):
                socket.socket.sendall(client, b"x")  # past TLS, which has another word for it

    def test_an_unread_answer_to_a_slow_body_is_cut(self, tokenizer, wire, log):
        request = raw_post("/v1/completions", orjson.dumps(LARGE))
        with serving(tokenizer, stream_timeout=SHORT, **wire) as up, up.open(4096) as client:
            client.sendall(request[:-1])
            wait_until(lambda: up.service.n_inflight)
            time.sleep(SHORT)  # several looks of the timer, with nothing to send
            client.sendall(request[-1:])
            wait_until(lambda: "left its answer unread" in log.text)
            wait_until(lambda: not n_open(up))

    def test_one_that_reads_slowly_gets_all(self, tokenizer, wire):
        body = orjson.dumps(LARGE | {"max_tokens": 300})
        with serving(tokenizer, stream_timeout=SHORT, **wire) as up, up.open(4096) as client:
            client.sendall(raw_post("/v1/completions", body, "Connection: close\r\n"))
            started, received = time.monotonic(), b""
            while data := client.recv(2048):
                received += data
                time.sleep(0.015)  # what makes this reader slow
            assert time.monotonic() - started > 3 * SHORT
        assert orjson.loads(received.partition(b"\r\n\r\n")[2])["choices"]

    def test_what_the_far_kernel_takes_is_progress(self, up):
        class Transport:  # whose buffer never shrinks, as when the kernel's is full
            def get_write_buffer_size(self) -> int:
                return 5

            def get_extra_info(self, name: str) -> socket.socket:
                return client

        with up.open() as client:
            timer = peer.UnreadTimer(Transport(), None, SHORT, lambda: True)
            timer._has_moved(5)
            assert not timer._has_moved(5)
            client.sendall(b"\r\n")
            wait_until(lambda: timer._has_moved(5))

    def test_a_refused_client_may_send_on_for_a_while(self, up):
        with up.open() as client:
            client.sendall(b"\0\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 400")
            for _ in range(10):
                client.sendall(b"x" * 1000)
                time.sleep(0.001)  # else a reset has no time to come
            while client.recv(65536):
                pass

    def test_a_refused_client_that_reads_nothing_leaves_nothing(self, up, timeouts):
        timeouts("LINGER")
        with up.open() as client:
            client.sendall(b"\0\r\n\r\n")
            wait_until(lambda: not n_open(up))


class TestHalfClose:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_ended_its_side_gets_its_answer(self, up, stream):
        up.engine.step_time = 0.005
        body = PATHS["completions"] | {"stream": stream, "max_tokens": 30, "ignore_eos": True}
        with up.open() as client:
            client.sendall(raw_post("/v1/completions", orjson.dumps(body)))
            end_side(client)
            interim, _, answer = read_all(client).partition(b"HTTP/1.1 200 OK")
        assert interim in {b"", *(connection.CONTINUE * n for n in range(1, 9))}
        assert (b"[DONE]" if stream else b'"finish_reason":"length"') in answer

    def test_all_pipelined_requests_are_answered_still(self, up):
        with up.open() as client:
            client.sendall(raw_post("/v1/completions", orjson.dumps(PATHS["completions"])) + GET)
            end_side(client)
            assert read_all(client).count(b"HTTP/1.1 200 OK") == 2

    def test_an_incomplete_request_ends_with_its_client(self, up, timeouts):
        timeouts()
        for part in (b"", GET[:9], raw_post("/v1/completions", b"{", length=9)):
            with up.open() as client:
                client.sendall(part)
                end_side(client)
                assert read_all(client) == b""

    def test_a_client_of_http_10_gets_no_interim_response(self, up):
        up.engine.step_time = 0.01
        request = raw_post("/v1/completions", orjson.dumps(PATHS["completions"]))
        with up.open() as client:
            client.sendall(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
            end_side(client)
            assert read_all(client).startswith(b"HTTP/1.1 200 OK")

    def test_http_client_skips_the_probes(self, up):
        up.engine.may_step.clear()
        client = http.client.HTTPConnection(*up.address, timeout=5)
        client.sock = up.open()
        headers = {"content-type": "application/json"}
        client.request("POST", "/v1/completions", orjson.dumps(PATHS["completions"]), headers)
        wait_until(lambda: up.engine.live)
        n_before = n_unread(client.sock)
        end_side(client.sock)
        wait_until(lambda: n_unread(client.sock) > n_before + 2 * len(connection.CONTINUE))
        up.engine.may_step.set()
        assert client.getresponse().status == 200
        client.close()

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_with_a_request_in_wait_cancels(self, up, stream):
        up.engine.step_time = 0.002
        body = {"prompt": TEXT, "stream": stream, "max_tokens": 4000, "ignore_eos": True}
        with up.open() as client:
            client.sendall(raw_post("/v1/completions", orjson.dumps(body)))
            wait_until(lambda: up.engine.live)
            client.sendall(GET)
            wait_until(lambda: any(c.pipeline for c in up.server.server_state.connections))
        wait_until(lambda: not up.engine.live)


class TestClients:
    """That each copes with what is above."""

    @pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
    @pytest.mark.parametrize("flag", ["--http2", "--http1.1", "--http1.0"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_curl(self, up, flag, stream):
        body = orjson.dumps(PATHS["completions"] | {"stream": stream, "max_tokens": 5})
        answer = subprocess.run(
            ["curl", "-sSk", flag, "--noproxy", "*", "-H", "Content-Type: application/json",
             "-H", "Expect: 100-continue", "--data-binary", "@-",
             f"{up.url}/v1/completions"],
            input=body, capture_output=True, timeout=10, check=True,
        ).stdout.decode()  # fmt: skip
        reply = events_of(answer)[-2] if stream else orjson.loads(answer)
        assert reply["choices"][0]["finish_reason"] == "length"


class TestCapacity:
    @pytest.fixture
    def small(self, tokenizer, wire, monkeypatch):
        monkeypatch.setattr(capacity, "of_process", lambda: capacity.Capacity(4))
        with serving(tokenizer, **wire) as up:
            yield up

    def test_the_longest_idle_connection_makes_room(self, small, log):
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(small.open()) for _ in range(4)]
            for client in idle:
                assert get(client).startswith(b"HTTP/1.1 200")
            assert small.get("/livez").status_code == 200
            assert idle[0].recv(1) == b""
            for client in idle[2:]:
                assert get(client).startswith(b"HTTP/1.1 200")
        assert log.text.count("are the most") == 1

    def test_without_an_idle_one_the_newest_is_refused(self, small, log):
        small.engine.may_step.clear()
        with contextlib.ExitStack() as stack:
            busy = [stack.enter_context(small.connect(PATHS["completions"])) for _ in range(4)]
            wait_until(lambda: small.service.n_inflight == 4)
            for _ in range(3):
                refused = small.get("/livez")
                assert (refused.status_code, refused.headers["connection"]) == (503, "close")
                assert refused.json()["error"]["code"] == "too_many_connections"
            small.engine.may_step.set()
            assert all(client.recv(65536).startswith(b"HTTP/1.1 200") for client in busy)
        wait_until(lambda: not small.server.capacity.n_open)
        assert small.get("/livez").status_code == 200
        assert log.text.count("are the most") == 1

    def test_a_crowd_of_silent_connections_leaves_health_reachable(self, small):
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(small.open())
            assert small.get("/livez").status_code == 200
        wait_until(lambda: not small.server.capacity.n_open)
        assert not small.server.capacity.waiting

    def test_the_limit_is_raised_and_leaves_a_reserve(self, log, monkeypatch):
        limits = [100, 300]
        monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
        monkeypatch.setattr(
            resource, "setrlimit", lambda kind, new: limits.__setitem__(slice(2), new)
        )
        assert capacity.of_process().max_connections < 300 - capacity.RESERVE
        assert limits == [300, 300]
        assert "ulimit -Hn" in log.text

    def test_an_unlimited_hard_limit_that_cannot_be_had_is_let_be(self, monkeypatch):
        def refuse(kind, new):
            raise ValueError("not allowed to raise maximum limit")

        monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, resource.RLIM_INFINITY))
        monkeypatch.setattr(resource, "setrlimit", refuse)
        assert capacity.raise_limit() == 256

    def test_exhausted_descriptors_are_logged_once_a_second(self, log, monkeypatch):
        def refuse(path, flags):
            raise OSError(24, "Too many open files")

        monkeypatch.setattr(capacity.os, "open", refuse)
        alarm = capacity.DescriptorAlarm()
        for _ in range(5):
            alarm.tick()
        assert log.text.count("Too many open files") == 1
