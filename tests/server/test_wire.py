"""One request has one meaning: framing that is odd, split or hostile, over real sockets."""

import contextlib
import math
import random
import re
import socket

import orjson
import pytest

from fastgen_jax.server import framing
from fastgen_jax.server.connection import MAX_PIPELINED, Connection
from tests.server.running import PATHS, raw_post, read_all, serving, wait_until

BODY = orjson.dumps(PATHS["completions"] | {"max_tokens": 2})
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED_HEAD = raw_post("/v1/completions", b"").replace(
    b"Content-Length: 0", b"Transfer-Encoding: chunked"
)


def chunked(body: bytes, size: int = 7) -> bytes:
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def statuses(received: bytes) -> list[int]:
    """Of all final responses in what came."""
    found = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
    return [status for status in found if status >= 200]


def exchange(address: tuple[str, int], *packets: bytes) -> bytes:
    """All that comes for the packets until the server closes; our side ends after the last."""
    with socket.create_connection(address, timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            for packet in packets:
                connection.sendall(packet)
            connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


class TestUpgrade:
    @pytest.mark.parametrize("extra", [H2C, "Connection: Upgrade\r\nUpgrade: websocket\r\n"])
    def test_an_upgrade_is_ignored_and_the_body_read(self, up, extra):
        n_before = len(up.engine.submitted)
        request = raw_post("/v1/completions", BODY, extra)
        assert statuses(exchange(up.address, request)) == [200]
        chunks = CHUNKED_HEAD[:-2] + extra.encode() + b"\r\n" + chunked(BODY)
        assert statuses(exchange(up.address, chunks)) == [200]
        assert len(up.engine.submitted) == n_before + 2

    def test_a_body_in_its_own_packet_is_no_second_request(self, up):
        hidden = b"DELETE /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = raw_post("/v1/completions", b"", H2C, length=len(hidden))
        with socket.create_connection(up.address, timeout=5) as connection:
            connection.sendall(head)
            wait_until(lambda: up.service.n_inflight)
            connection.sendall(hidden)
            connection.shutdown(socket.SHUT_WR)
            assert statuses(read_all(connection)) == [400]

    @pytest.mark.parametrize("chunks", [False, True])
    def test_a_request_split_anywhere_means_the_same(self, up, monkeypatch, chunks):
        head = CHUNKED_HEAD[:-2] if chunks else raw_post("/v1/completions", b"")[:-2]
        head = head.replace(b"Content-Length: 0", b"Content-Length: %d" % len(BODY))
        request = head + H2C.encode() + b"\r\n" + (chunked(BODY) if chunks else BODY)
        request += GET + H2C.encode() + b"\r\n" + GET + b"Connection: close\r\n\r\n"
        receive, cut = Connection.data_received, 0

        def receive_in_two(connection, data):
            receive(connection, data[:cut])
            receive(connection, data[cut:])

        monkeypatch.setattr(Connection, "data_received", receive_in_two)
        for cut in range(0, len(request), 3):
            assert statuses(exchange(up.address, request)) == [200, 200, 200], cut

    def test_a_request_byte_by_byte_means_the_same(self, up, monkeypatch):
        receive = Connection.data_received

        def receive_in_bytes(connection, data):
            for i in range(len(data)):
                receive(connection, data[i : i + 1])

        monkeypatch.setattr(Connection, "data_received", receive_in_bytes)
        request = raw_post("/v1/completions", BODY, H2C)
        assert statuses(exchange(up.address, request + request)) == [200, 200]

    def test_what_is_offered_is_not_in_the_headers(self):
        headers = [(b"a", b"b"), (b"upgrade", b"h2c"), (b"connection", b"upgrade")]
        head = framing.without_upgrade(b"GET", "1.1", b"/x?y", headers)
        assert head == b"GET /x?y HTTP/1.1\r\na: b\r\nconnection: upgrade\r\n\r\n"

    def test_connect_is_refused(self, up):
        hidden = b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n" + GET + b"\r\n"
        assert statuses(exchange(up.address, hidden)) == [405]


def post(extra: bytes, rest: bytes) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + extra + b"\r\n\r\n" + rest


SMUGGLED = GET + b"\r\n"
TE = b"Transfer-Encoding: chunked"
CORPUS = {
    "length and chunks": post(b"Content-Length: 5\r\n" + TE, b"0\r\n\r\n" + SMUGGLED),
    "chunks and length": post(TE + b"\r\nContent-Length: 5", b"0\r\n\r\n" + SMUGGLED),
    "two lengths": post(b"Content-Length: 2\r\nContent-Length: 3", b"{}" + SMUGGLED),
    "one length twice": post(b"Content-Length: 2\r\nContent-Length: 2", b"{}" + SMUGGLED),
    "a list of lengths": post(b"Content-Length: 2, 2", b"{}" + SMUGGLED),
    "signed length": post(b"Content-Length: +2", b"{}" + SMUGGLED),
    "negative length": post(b"Content-Length: -2", b"{}" + SMUGGLED),
    "hexadecimal length": post(b"Content-Length: 0x2", b"{}" + SMUGGLED),
    "overflowing length": post(b"Content-Length: 18446744073709551618", b"{}" + SMUGGLED),
    "unknown coding": post(b"Transfer-Encoding: xchunked", b"0\r\n\r\n" + SMUGGLED),
    "chunked, then another": post(TE + b", gzip", b"0\r\n\r\n" + SMUGGLED),
    "another, then chunked": post(b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n" + SMUGGLED),
    "chunked twice": post(TE + b"\r\n" + TE, b"0\r\n\r\n" + SMUGGLED),
    "chunked with a tail": post(b"Transfer-Encoding: chunked\x0b", b"0\r\n\r\n" + SMUGGLED),
    "chunks in 1.0": post(TE, b"0\r\n\r\n" + SMUGGLED).replace(b"/1.1", b"/1.0", 1),
    "no chunk size": post(TE, b"\r\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "bad chunk size": post(TE, b"2x\r\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "prefixed chunk size": post(TE, b"0x2\r\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "negative chunk size": post(TE, b"-2\r\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "overflowing chunk size": post(TE, b"10000000000000002\r\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "spaced chunk size": post(TE, b"2 \r\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "bare LF after chunk size": post(TE, b"2\n{}\r\n0\r\n\r\n" + SMUGGLED),
    "bare LF after chunk": post(TE, b"2\r\n{}\n0\r\n\r\n" + SMUGGLED),
    "longer chunk than said": post(TE, b"2\r\n{}}}\r\n0\r\n\r\n" + SMUGGLED),
    "folded header": post(b"X: a\r\n b\r\nContent-Length: 2", b"{}" + SMUGGLED),
    "folded coding": post(b"Transfer-Encoding:\r\n chunked", b"0\r\n\r\n" + SMUGGLED),
    "bare LF": post(b"X: a\nContent-Length: 2", b"{}" + SMUGGLED),
    "bare CR": post(b"X: a\rContent-Length: 2", b"{}" + SMUGGLED),
    "NUL in a value": post(b"X: a\0b\r\nContent-Length: 2", b"{}" + SMUGGLED),
    "NUL in a name": post(b"X\0: a\r\nContent-Length: 2", b"{}" + SMUGGLED),
    "space before the colon": post(b"Content-Length : 2", b"{}" + SMUGGLED),
    "no colon": post(b"Content-Length 2", b"{}" + SMUGGLED),
    "no name": post(b": 2", b"{}" + SMUGGLED),
    "space in the target": b"GET /livez /x HTTP/1.1\r\nHost: localhost\r\n\r\n" + SMUGGLED,
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SMUGGLED,
}  # fmt: skip


class TestFraming:
    @pytest.mark.parametrize("name", CORPUS)
    def test_what_can_be_read_in_two_ways_is_refused(self, up, name):
        received = exchange(up.address, CORPUS[name])
        head, _, body = received.partition(b"\r\n\r\n")
        assert statuses(received) == [400], received
        assert b"connection: close" in head.lower()
        assert b"content-type: application/json" in head.lower()
        assert set(orjson.loads(body)["error"]) == {"message", "type", "param", "code"}

    @pytest.mark.parametrize("version", [b"0.9", b"2.0"])
    def test_other_versions_are_refused(self, up, version):
        request = GET.replace(b"1.1", version) + b"\r\n"
        assert statuses(exchange(up.address, request + GET + b"\r\n")) == [505]

    def test_a_malformed_next_request_waits_for_the_running_answer(self, up):
        up.engine.step_time = 0.005
        body = orjson.dumps(PATHS["completions"] | {"max_tokens": 20, "stream": True})
        with socket.create_connection(up.address, timeout=5) as connection:
            connection.sendall(raw_post("/v1/completions", body))
            received = connection.recv(65536)
            connection.sendall(b"\0\r\n\r\n")
            received += read_all(connection)
        stream, _, refusal = received.partition(b"0\r\n\r\nHTTP/1.1 400")
        assert stream.endswith(b"data: [DONE]\n\n\r\n")
        assert b'"error"' in refusal

    def test_a_refused_body_gets_one_answer(self, tokenizer):
        with serving(tokenizer, api_key=("k",)) as up:
            received = exchange(up.address, CHUNKED_HEAD, b"bad\n")
            assert len(statuses(received)) == 1

    def test_pipelined_requests_are_answered_in_order(self, up):
        request = raw_post("/v1/completions", BODY) + GET + b"\r\n" + raw_post("/nowhere", b"{}")
        assert statuses(exchange(up.address, request)) == [200, 200, 404]

    def test_pipelined_refusals_keep_their_turn_and_their_form(self, tokenizer):
        listing = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with serving(tokenizer, api_key=("k",)) as up:
            packet = listing + listing.replace(b"GET", b"HEAD") + GET + b"\r\n" + listing
            received = exchange(up.address, packet)
        assert statuses(received) == [401, 401, 200, 401]
        assert received.count(b'"invalid_api_key"') == 2  # none for HEAD

    def test_too_many_pipelined_requests_are_refused_after_the_others(self, up):
        found = statuses(exchange(up.address, (GET + b"\r\n") * 1000))
        assert found == [200] * (MAX_PIPELINED + 1) + [503]


class TestHost:
    """RFC 9112, 3.2: who routes by the Host header and who answers must read the same one."""

    @pytest.mark.parametrize("head", [
        "GET /livez HTTP/1.1\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        "GET /livez HTTP/1.0\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        "GET http://evil.example/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET http://localhost:1/livez HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ])  # fmt: skip
    def test_none_or_two_are_a_400(self, up, head):
        received = exchange(up.address, head.encode())
        assert statuses(received) == [400]
        assert b"Host header" in received

    @pytest.mark.parametrize("head", [
        "GET /livez HTTP/1.0\r\n\r\n",
        "GET /livez HTTP/1.1\r\nHost:\r\n\r\n",
        "GET http://localhost:1/livez HTTP/1.1\r\nHost: localhost:1\r\n\r\n",
    ])  # fmt: skip
    def test_one_is_enough_and_old_clients_need_none(self, up, head):
        assert statuses(exchange(up.address, head.encode())) == [200]


class TestLimits:
    @pytest.mark.parametrize("tail", [
        b"0\r\n" + b"T: %s\r\n" % (b"y" * 1000) * 99 + b"\r\n",
        b"0\r\n" + b"T: y\r\n" * 101 + b"\r\n",
        b"0\r\nT: " + b"y" * 10**6 + b"\r\n\r\n", b"2;" + b"y" * 10**6 + b"\r\n{}\r\n0\r\n\r\n",
    ])  # fmt: skip
    def test_endless_trailers_and_extensions_are_a_431(self, up, tail):
        received = exchange(up.address, CHUNKED_HEAD, tail)
        assert statuses(received) == [431]
        assert b"application/json" in received

    def test_trailers_within_the_limits_are_dropped(self, up):
        request = CHUNKED_HEAD + chunked(BODY)[:-2] + b"X-Request-Id: trailer\r\nA: b\r\n\r\n"
        received = exchange(up.address, request)
        assert statuses(received) == [200]
        assert b"trailer" not in received

    @pytest.mark.parametrize("piece", [b"X: %s\r\n" % (b"y" * 1000), b"X: y\r\n", b"\r\nX"])
    def test_an_endless_head_is_refused(self, up, piece):
        received = exchange(up.address, GET, *[piece * 100] * 100)
        assert statuses(received)[-1] in (400, 431)

    def test_a_body_in_single_bytes_is_read_within_flat_memory(self, tokenizer, monkeypatch):
        sizes, on_body = [0], Connection.on_body

        def measured(connection, body):
            on_body(connection, body)
            sizes[0] = max(sizes[0], len(connection.cycle.body))

        monkeypatch.setattr(Connection, "on_body", measured)
        with serving(tokenizer, max_body_bytes=50_000) as up:
            body = orjson.dumps({"prompt": "a", "max_tokens": 1, "user": "y" * 20_000})
            assert statuses(exchange(up.address, CHUNKED_HEAD, chunked(body, 1))) == [200]
            endless = b"1\r\n \r\n" * 400_000
            assert statuses(exchange(up.address, CHUNKED_HEAD, endless)) == [413]
        assert sizes[0] < 2**17


class TestMutations:
    @pytest.mark.parametrize("seed", range(3))
    def test_mutated_and_split_bytes_never_leave_a_connection_without_a_timer(
        self, up, monkeypatch, seed
    ):
        rng = random.Random(seed)
        receive, lonely = Connection.data_received, []

        def receive_in_pieces(connection, data):
            while data:
                n = rng.randint(1, 200)
                receive(connection, data[:n])
                data = data[n:]
                if not (has_timer(connection) or connection.transport.is_closing()):
                    lonely.append(connection)

        def has_timer(connection) -> bool:
            if connection._is_answering:
                return True
            now = connection.loop.time()
            return now < connection._deadline < math.inf and (
                now < connection._timer.when() < connection._deadline + 0.01  # rounded
            )

        monkeypatch.setattr(Connection, "data_received", receive_in_pieces)
        good = raw_post("/v1/completions", BODY, H2C) + CHUNKED_HEAD + chunked(BODY) + GET + b"\r\n"
        for _ in range(25):
            wire = bytearray(good)
            for _ in range(rng.randint(0, 3)):
                wire[rng.randrange(len(wire))] = rng.randrange(256)
            found = statuses(exchange(up.address, bytes(wire)))
            assert len(found) <= 4
            assert all(status != 500 for status in found)
        assert not lonely
        wait_until(lambda: not up.server.capacity.n_open)


class TestVersion10:
    def ask(self, up, body: dict, extra: str = "") -> tuple[bytes, bytes]:
        request = raw_post("/v1/completions", orjson.dumps(body), extra)
        with socket.create_connection(up.address, timeout=5) as connection:
            connection.sendall(request.replace(b"HTTP/1.1", b"HTTP/1.0"))
            head, _, body = read_all(connection).partition(b"\r\n\r\n")
            return head.lower(), body

    @pytest.mark.parametrize("extra", ["", "Connection: keep-alive\r\n"])
    def test_a_stream_ends_with_the_connection(self, up, extra):
        head, body = self.ask(up, PATHS["completions"] | {"stream": True}, extra)
        assert b"transfer-encoding" not in head
        assert b"connection: close" in head
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")

    def test_a_plain_answer_has_its_length(self, up):
        head, body = self.ask(up, PATHS["completions"])
        assert b"content-length: %d" % len(body) in head
        assert orjson.loads(body)["object"] == "text_completion"
