"""Who may enter: keys, hosts, sizes."""

import http.client
import subprocess
import sys
from pathlib import Path

import openai
import orjson
import pytest

from tests.server.running import serving
from tests.server.test_wire import exchange

ROOT = Path(__file__).parents[2]


class TestDoor:
    def test_keys_guard_all_but_the_health_routes(self, tokenizer):
        with serving(tokenizer, api_key=("first", "second")) as up:
            for path in ("/livez", "/health", "/ready"):
                assert up.get(path).status_code == 200
            paths = ["/v1/models", "/metrics", "/version", "/docs", "/openapi.json", "/nowhere",
                     "//livez", "/health/", "/LIVEZ", "/%2e/health"]  # fmt: skip
            for path in paths:
                answer = up.get(path)
                assert answer.status_code == 401, path
                assert answer.json()["error"]["code"] == "invalid_api_key"
            for key in ("", "First", "first ", "firstsecond", "third"):
                headers = {"authorization": f"Bearer {key}".strip()}
                status = 200 if key.strip() == "first" else 401
                assert up.get("/v1/models", headers=headers).status_code == status
            for key in ("first", "second"):
                with up.client(key) as client:
                    assert client.models.list().data[0].id == "fake"
            with up.client("bad") as client, pytest.raises(openai.AuthenticationError):
                client.completions.create(model="fake", prompt="x")

    def test_cached_prompts_are_shared_within_a_key_only(self, tokenizer):
        def salts(up, *requests):
            for key, salt in requests:
                headers = {"authorization": f"Bearer {key}"}
                body = {"prompt": "a", "max_tokens": 1} | ({"cache_salt": salt} if salt else {})
                assert up.post("/v1/completions", body, headers=headers).status_code == 200
            return [request.cache_salt for request in up.engine.submitted]

        keys = {"api_key": ("first", "second")}
        with serving(tokenizer, **keys) as up:
            got = salts(up, ("first", None), ("second", None), ("first", None), ("first", "x"),
                        ("second", "x"), ("first", "x"))  # fmt: skip
        assert len(set(got)) == 4
        assert got[0] == got[2]
        assert got[3] == got[5]
        with serving(tokenizer, **keys, share_prefix_cache=True) as up:
            got = salts(up, ("first", None), ("second", None), ("first", "x"), ("second", "x"))
        assert got[0] == got[1] == b"" != got[2] == got[3]
        with serving(tokenizer) as up:
            assert salts(up, ("any", None), ("other", None)) == [b"", b""]

    def test_request_ids_are_echoed_if_well_formed(self, up):
        assert (
            up.get("/livez", headers={"x-request-id": "a.B-9_"}).headers["x-request-id"] == "a.B-9_"
        )
        for bad in ("", "x" * 129, "a b", "<script>"):
            made = up.get("/livez", headers={"x-request-id": bad}).headers["x-request-id"]
            assert len(made) == 32
        refused = up.post("/v1/completions", b"{", headers={"x-request-id": "mine"})
        assert refused.status_code == 415
        assert refused.headers["x-request-id"] == "mine"

    def test_foreign_host_names_are_refused_on_loopback(self, tokenizer):
        with serving(tokenizer, allowed_host=("proxy.example",)) as up:
            for host, status in {
                "evil.example": 403, "localhost:1": 200, "127.0.0.1": 200, "[::1]:80": 200,
                "proxy.example:80": 200,
            }.items():  # fmt: skip
                assert up.get("/livez", headers={"host": host}).status_code == status

    @pytest.mark.parametrize(("host", "named"), [
        ("GPU-1.lan:8000", "gpu-1.lan"), ("evil.example", "evil.example"), ("a" * 253, "a" * 253),
        ("a" * 254, "NAME"), ("a;rm", "NAME"), ("$(id).lan", "NAME"), ("-x", "NAME"),
        ("a\x1b[31m", "NAME"), ("caf\xe9.lan", "NAME"), ("<b>", "NAME"), ("a b", "NAME"),
    ])  # fmt: skip
    def test_a_refused_host_is_told_the_flag_and_its_value_if_that_is_a_name(self, up, host, named):
        request = f"GET /livez HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        received = exchange(up.address, request.encode("latin-1"))
        if host.isprintable():
            assert received.startswith(b"HTTP/1.1 403")
            assert f'--allowed-host {named}"'.encode() in received
        else:
            assert received.startswith(b"HTTP/1.1 400")

    def test_loopback_is_known_by_all_its_names(self):
        names = ["localhost", "LOCALHOST", "127.0.0.1", "127.1", "2130706433", "::ffff:127.0.0.1"]
        others = ["0.0.0.0", "0", "192.0.2.1"]
        code = "import sys; from fastgen_jax.server.gate import is_loopback as f"
        code += "; print(*[f(host) for host in sys.argv[1:]])"
        # In a process of its own: tests may not resolve names, though these need no network.
        command = [sys.executable, "-c", code, *names, *others]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert found.stdout.split() == ["True"] * len(names) + ["False"] * len(others)

    def test_many_requests_on_one_connection(self, up):
        connection = http.client.HTTPConnection(*up.address, timeout=5)
        for _ in range(20):
            body = orjson.dumps({"prompt": "a", "max_tokens": 2})
            connection.request(
                "POST", "/v1/completions", body, {"content-type": "application/json"}
            )
            assert connection.getresponse().read().startswith(b'{"id":"cmpl-')
        connection.close()
