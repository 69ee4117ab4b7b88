"""Pages of other origins: what browsers are told, byte by byte, and what they are not."""

import pytest

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig
from tests.server.fake_engine import FakeEngine
from tests.server.running import Running, raw_post, serving
from tests.server.test_wire import exchange

PAGE, OTHER = "https://chat.example", "https://evil.example"
ASKS = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n"
LOCAL = "Access-Control-Request-Private-Network: true\r\n"


def headers_of(received: bytes) -> dict[str, str]:
    """Status and headers of the one answer, after interim ones."""
    while received.startswith(b"HTTP/1.1 100 "):
        received = received.partition(b"\r\n\r\n")[2]
    status, *lines = received.partition(b"\r\n\r\n")[0].decode().split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    assert len(pairs) == len(dict(pairs)), pairs
    return {"status": status.split()[1]} | {name.lower(): value for name, value in pairs}


def ask(up: Running, method: str, path: str, extra: str = "", host: str = "localhost"):
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{extra}Connection: close\r\n\r\n"
    return headers_of(exchange(up.address, head.encode()))


def post(up: Running, path: str, body: bytes, extra: str) -> dict[str, str]:
    return headers_of(exchange(up.address, raw_post(path, body, extra + "Connection: close\r\n")))


def cors(answer: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in answer.items() if k.startswith("access-control") or k == "vary"}


@pytest.fixture(scope="module")
def open_to_page(tokenizer):
    with serving(tokenizer, allowed_origin=(PAGE,), api_key=("key",)) as up:
        yield up


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/livez", "/nowhere"])
def test_a_browser_that_asks_without_a_key_is_told_what_a_page_may_send(open_to_page, path):
    answer = ask(open_to_page, "OPTIONS", path, f"Origin: {PAGE}\r\n{ASKS}")
    assert answer["status"] == "204"
    assert cors(answer) == {
        "vary": "Origin",
        "access-control-allow-origin": PAGE,
        "access-control-allow-methods": "GET, HEAD, POST, DELETE",
        "access-control-allow-headers": "authorization, content-type, x-request-id, "
        "x-request-timeout, *",
        "access-control-max-age": "600",
    }


def test_a_page_of_a_public_network_may_reach_a_private_one_if_it_is_allowed(open_to_page):
    for origin, shown in ((PAGE, "true"), (OTHER, None)):
        answer = ask(open_to_page, "OPTIONS", "/", f"Origin: {origin}\r\n{ASKS}{LOCAL}")
        assert answer.get("access-control-allow-private-network") == shown


EXPOSED = ", ".join([
    "x-request-id", "retry-after", "x-ratelimit-limit-requests", "x-ratelimit-remaining-requests",
    "x-ratelimit-reset-requests", "x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens",
    "x-ratelimit-reset-tokens",
])  # fmt: skip
KEY = "Authorization: Bearer key\r\n"
STREAM = b'{"prompt": "a b", "stream": true}'
ANSWERS = [
    ("/v1/completions", b'{"prompt": "a b"}', KEY, "200"),
    ("/v1/completions", STREAM, KEY, "200"),
    ("/v1/completions", b"{", KEY, "400"),
    ("/v1/completions", b"{}", "", "401"),
    ("/nowhere", b"{}", KEY, "404"),
    ("/v1/models", b"{}", KEY, "405"),
    ("/v1/completions", b" " * 2_000_001, KEY, "413"),
]


@pytest.mark.parametrize(("path", "body", "key", "status"), ANSWERS)
def test_every_answer_to_an_allowed_page_can_be_read_by_it(open_to_page, path, body, key, status):
    answer = post(open_to_page, path, body, f"Origin: {PAGE}\r\n{key}")
    assert answer["status"] == status
    assert cors(answer) == {
        "vary": "Origin",
        "access-control-allow-origin": PAGE,
        "access-control-expose-headers": EXPOSED,
    }
    assert answer["x-request-id"]


def test_refusals_of_a_full_queue_and_faults_of_ours_can_be_read(open_to_page, monkeypatch):
    up, extra = open_to_page, f"Origin: {PAGE}\r\n{KEY}"
    monkeypatch.setattr(up.service, "submit", lambda *args, **kwargs: 1 / 0)
    fault = post(up, "/v1/completions", b'{"prompt": "a"}', extra)
    monkeypatch.setattr(FakeEngine, "is_full", True)
    full = post(up, "/v1/completions", b'{"prompt": "a"}', extra)
    assert (full["status"], fault["status"]) == ("429", "500")
    assert full["retry-after"]
    assert full["access-control-allow-origin"] == fault["access-control-allow-origin"] == PAGE


@pytest.mark.parametrize("origin", [OTHER, PAGE + ".evil.example", PAGE + ":8443", PAGE.upper(),
                                    "http://chat.example", "null", "", "*"])  # fmt: skip
def test_pages_of_other_origins_are_told_nothing(open_to_page, origin):
    extra = f"Origin: {origin}\r\n"
    assert ask(open_to_page, "OPTIONS", "/v1/models", extra + ASKS)["status"] == "401"
    for answer in (
        ask(open_to_page, "OPTIONS", "/v1/models", extra + ASKS + KEY),
        ask(open_to_page, "GET", "/v1/models", extra + KEY),
        post(open_to_page, "/v1/completions", b'{"prompt": "a"}', extra + KEY),
    ):
        assert cors(answer) == {"vary": "Origin"}


def test_a_star_allows_all_pages_and_never_credentials(tokenizer):
    with serving(tokenizer, allowed_origin=("*",)) as up:
        for origin in (PAGE, OTHER, "null"):
            answer = ask(up, "GET", "/v1/models", f"Origin: {origin}\r\n")
            assert answer["access-control-allow-origin"] == "*"
            asked = ask(up, "OPTIONS", "/v1/models", f"Origin: {origin}\r\n{ASKS}")
            assert asked["status"] == "204"
            for found in (answer, asked):
                assert "access-control-allow-credentials" not in found
                assert "vary" not in found
        assert cors(ask(up, "GET", "/v1/models")) == {}


def test_an_allowed_page_still_needs_a_known_host(tokenizer):
    with serving(tokenizer, allowed_origin=(PAGE,)) as up:
        answer = ask(up, "OPTIONS", "/", f"Origin: {PAGE}\r\n{ASKS}", host="rebound.example")
        assert answer["status"] == "403"


def test_a_question_that_is_no_preflight_is_routed(open_to_page):
    answer = ask(open_to_page, "OPTIONS", "/v1/models", f"Origin: {PAGE}\r\n{KEY}")
    assert (answer["status"], answer["allow"]) == ("405", "GET, HEAD")


@pytest.mark.parametrize("origin", ["http://localhost:3000", "http://[::1]:3000", "app://obsidian",
                                    "chrome-extension://abcdef", "https://a.b-c.example:8443",
                                    "*"])  # fmt: skip
def test_origins_are_taken_as_browsers_send_them(origin):
    assert ServerConfig(allowed_origin=(origin,)).allowed_origin == (origin,)


@pytest.mark.parametrize("origin", ["", "null", "chat.example", "https://chat.example/", "https://",
                                    "https://chat.example/a", "HTTPS://chat.example",
                                    "https://Chat.example", "https://chat.example:443",
                                    "http://localhost:80", "https://*.example", "https://a b",
                                    "https://a\r\nx: y", "https://a,https://b"])  # fmt: skip
def test_what_no_browser_sends_is_refused_as_an_origin(origin):
    with pytest.raises(ConfigError, match="as browsers send it"):
        ServerConfig(allowed_origin=(origin,))


def test_no_origin_is_allowed_unless_it_is_named(up):
    for extra in ("", f"Origin: {PAGE}\r\n"):
        assert cors(ask(up, "GET", "/v1/models", extra)) == {}
