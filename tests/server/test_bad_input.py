"""What is wrong with a request is said with a 4xx and the field at fault, and changes nothing."""

import contextlib
import logging
import random
import select
import socket

import httpx
import openai
import orjson
import pytest

from tests.server.fake_engine import MAX_TOKENS, FakeEngine
from tests.server.running import (
    PATHS,
    TEXT,
    hold_encode,
    raw_post,
    read_all,
    serving,
    wait_until,
)

BAD = [
    ("completions", {"prompt": None}, "prompt"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": {"a": 1}}, "prompt"),
    ("completions", {"prompt": [1, "a"]}, "prompt"),
    ("completions", {"prompt": [True]}, "prompt"),
    ("completions", {"prompt": [[1], []]}, "prompt"),
    ("completions", {"prompt": [-1]}, "prompt"),
    ("completions", {"prompt": [10**6]}, "prompt"),
    ("completions", {"prompt": [2**63]}, "prompt"),
    ("completions", {"prompt": ["a"] * 257}, "prompt"),
    ("completions", {"n": 0}, "n"),
    ("completions", {"n": 10**9}, "n"),
    ("completions", {"n": -(2**63)}, "n"),
    ("completions", {"n": 1.5}, "n"),
    ("completions", {"n": "2"}, "n"),
    ("completions", {"max_tokens": "16"}, "max_tokens"),
    ("completions", {"max_tokens": 1e300}, "max_tokens"),
    ("completions", {"echo": True, "max_tokens": 0, "min_tokens": 1}, "max_tokens"),
    ("completions", {"n": True}, "n"),
    ("completions", {"n": 128, "prompt": ["a"] * 20}, "n"),
    ("completions", {"best_of": 3}, "best_of"),
    ("completions", {"suffix": "end"}, "suffix"),
    ("completions", {"echo": True, "logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": True}, "logprobs"),
    ("completions", {"prompt_logprobs": 21}, "prompt_logprobs"),
    ("completions", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ("completions", {"max_tokens": 0}, "max_tokens"),
    ("completions", {"max_tokens": -1}, "max_tokens"),
    ("completions", {"min_tokens": 17}, "min_tokens"),
    ("completions", {"temperature": -0.1}, "temperature"),
    ("completions", {"temperature": 1e308}, "temperature"),
    ("completions", {"top_p": 0}, "top_p"),
    ("completions", {"top_p": 1.1}, "top_p"),
    ("completions", {"top_k": -2}, "top_k"),
    ("completions", {"min_p": 2}, "min_p"),
    ("completions", {"repetition_penalty": 0}, "repetition_penalty"),
    ("completions", {"presence_penalty": 3}, "presence_penalty"),
    ("completions", {"seed": 2**64}, "seed"),
    ("completions", {"stop": ["a"] * 17}, "stop"),
    ("completions", {"stop": [""]}, "stop"),
    ("completions", {"stop": [1]}, "stop"),
    ("completions", {"stop": 5}, "stop"),
    ("completions", {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("completions", {"allowed_token_ids": []}, "allowed_token_ids"),
    ("completions", {"allowed_token_ids": ["a"]}, "allowed_token_ids"),
    ("completions", {"bad_words": ["a"] * 129}, "bad_words"),
    ("completions", {"bad_words": [""]}, "bad_words"),
    ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"cache_salt": "a" * 257}, "cache_salt"),
    ("completions", {"cache_salt": 1}, "cache_salt"),
    ("completions", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("completions", {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"stream": "yes"}, "stream"),
    ("completions", {"response_format": {"type": "xml"}}, "response_format"),
    ("completions", {"response_format": {"type": ["text"]}}, "response_format"),
    ("completions", {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
    ("completions", {"guided_regex": 5}, "guided_regex"),
    ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "hello"}, "messages"),
    ("chat/completions", {"messages": None}, "messages"),
    ("chat/completions", {"messages": ["hello"]}, "messages"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ("chat/completions", {"messages": [{"role": ["user"], "content": "x"}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, None),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None),
    ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format"),
    ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat/completions", {"chat_template": "{{ x }}"}, "chat_template"),
    ("chat/completions", {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ("chat/completions", {"guided_json": 1.5}, "guided_json"),
]  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize(("path", "change", "param"), BAD)
    def test_bad_field_is_named_in_a_400(self, up, path, change, param):
        n_before = len(up.engine.submitted)
        answer = up.post(f"/v1/{path}", PATHS[path] | change)
        error = answer.json()["error"]
        assert answer.status_code == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert param is None or error["param"] == param
        assert len(up.engine.submitted) == n_before

    def test_an_empty_text_is_the_bos_token_alone(self, up, tokenizer):
        assert up.post("/v1/completions", {"prompt": ""}).status_code == 200
        assert up.engine.submitted[-1].prompt_token_ids == [tokenizer.bos_token_id]
        no_bos = {"prompt": "", "add_special_tokens": False}
        assert up.post("/v1/completions", no_bos).status_code == 400

    @pytest.mark.parametrize("body", [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"prompt": "\xc3\x28"}',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": -Infinity}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"prompt": "\x00"}', b'{"prompt": "\\ud800"}', b'{"prompt": "x",}', b"\x80\x04.",
    ])  # fmt: skip
    def test_malformed_json_is_a_400(self, up, body):
        answer = up.post("/v1/completions", body)
        assert answer.status_code == 400
        assert "message" in answer.json()["error"]

    def test_mutated_bodies_never_make_a_500(self, up):
        rng = random.Random(0)
        good = orjson.dumps(PATHS["completions"] | {"stop": ["a"], "n": 1, "logit_bias": {"5": 1}})
        with httpx.Client(base_url=up.url, headers={"content-type": "application/json"}) as client:
            for _ in range(200):
                body = bytearray(good)
                for _ in range(rng.randint(1, 4)):
                    body[rng.randrange(len(body))] = rng.randrange(256)
                assert client.post("/v1/completions", content=bytes(body)).status_code in (200, 400)
        assert up.post("/v1/completions", PATHS["completions"]).status_code == 200

    @pytest.mark.parametrize("headers", [
        {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ])  # fmt: skip
    def test_other_content_is_a_415(self, up, headers):
        answer = up.post("/v1/completions", b"{}", headers=headers)
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"

    def test_too_long_a_context_is_refused_with_the_numbers(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="fake", prompt="a", max_tokens=5000)
        assert caught.value.code == "context_length_exceeded"
        expected = (
            f"maximum context length is {MAX_TOKENS} tokens. However, you requested 5002 tokens"
        )
        assert expected in caught.value.message
        assert "(2 in the prompt, 5000 in the completion)" in caught.value.message

    def test_a_long_prompt_is_tokenized_beside_the_event_loop(self, up, tokenizer, monkeypatch):
        go_on = hold_encode(tokenizer, monkeypatch)
        with up.connect({"prompt": "aaaa " * 10_000}) as connection:
            wait_until(lambda: up.service.n_inflight)
            assert up.get("/livez").status_code == 200
            go_on.set()
            assert b"context_length_exceeded" in connection.recv(65536)

    def test_chat_overflow_names_the_messages(self, up):
        body = {"messages": [{"role": "user", "content": "Ω" * 5000}]}
        error = up.post("/v1/chat/completions", body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert (
            " in the messages, 1 in the completion). Please reduce the length of the messages "
            in (error["message"])
        )

    def test_a_full_queue_is_a_429_for_all_prompts_of_the_body(self, tokenizer):
        engine = FakeEngine(tokenizer.eos_token_id, max_queued_requests=2)
        engine.may_step.clear()
        with serving(tokenizer, engine) as up, up.connect(PATHS["completions"]):
            wait_until(lambda: len(engine.live) == 1)
            answer = up.post("/v1/completions", {"prompt": ["a", "b"]})
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
            assert answer.json()["error"]["code"] == "queue_full"
            assert len(engine.live) == 1

    def test_a_declared_giant_body_is_refused_unread(self, up):
        with socket.create_connection(up.address, timeout=5) as connection:
            connection.sendall(raw_post("/v1/completions", b"{", length=10 * 2**30))
            head = connection.recv(65536)
            assert head.startswith(b"HTTP/1.1 413")
            assert b"connection: close" in head.lower()

    def test_an_endless_body_is_refused_at_the_limit(self, tokenizer):
        with serving(tokenizer, max_body_bytes=100_000) as up:
            with socket.create_connection(up.address, timeout=5) as connection:
                head = raw_post("/v1/completions", b"").replace(
                    b"Content-Length: 0", b"Transfer-Encoding: chunked"
                )
                connection.sendall(head)
                n_sent = 0
                with contextlib.suppress(OSError):
                    while not select.select([connection], [], [], 0)[0]:
                        connection.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
                        n_sent += 4096
                assert connection.recv(65536).startswith(b"HTTP/1.1 413")
                assert n_sent < 20_000_000  # what the sockets hold, and 16 times the limit
            assert up.post("/v1/completions", PATHS["completions"]).status_code == 200

    def test_the_openai_client_sees_the_413(self, client):
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="fake", prompt="x" * 2_500_000)
        assert caught.value.status_code == 413

    def test_too_many_or_too_large_headers_are_refused(self, up):
        many = "".join(f"X-{i}: y\r\n" for i in range(200))
        large = f"X-Large: {'y' * 100_000}\r\n"
        for extra in (many, large):
            with socket.create_connection(up.address, timeout=5) as connection:
                with contextlib.suppress(OSError):
                    connection.sendall(raw_post("/v1/completions", b"{}", extra))
                assert read_all(connection)[:12] in (b"HTTP/1.1 431", b"HTTP/1.1 400", b"")
        assert up.get("/livez").status_code == 200

    @pytest.mark.parametrize(
        "junk", [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01" * 50]
    )
    def test_what_is_not_http_is_refused(self, up, junk):
        with socket.create_connection(up.address, timeout=5) as connection:
            connection.sendall(junk)
            assert read_all(connection).startswith(b"HTTP/1.1 400")

    def test_unknown_paths_and_methods_get_the_error_object(self, up):
        assert up.get("/v1/nothing").status_code == 404
        assert "message" in up.get("/v1/nothing").json()["error"]
        for answer, allowed in (
            (up.get("/v1/completions"), "POST"), (up.post("/health", {}), "GET, HEAD"),
            (up.http.delete(up.url + "/v1/models/fake"), "GET, HEAD"),
            (up.post("/docs", {}), "GET, HEAD"),
        ):  # fmt: skip
            assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
            error = answer.json()["error"]
            assert error["code"] == "method_not_allowed"
            assert error["message"].endswith(f"; allowed: {allowed}")
        assert up.post("/v1/completions/", {}).status_code == 404

    def test_unknown_fields_are_warned_of_once(self, up, caplog):
        body = PATHS["completions"] | {"mirostat_\x1b[31m": 2, "user": "me", "cache_salt": None}
        logger = logging.getLogger("fastgen_jax")
        logger.addHandler(caplog.handler)
        try:
            for _ in range(2):
                assert up.post("/v1/completions", body).status_code == 200
        finally:
            logger.removeHandler(caplog.handler)
        messages = {record.getMessage() for record in caplog.records}
        assert len(messages) == 1
        assert "\x1b" not in messages.pop()

    def test_extras_reach_the_engine(self, up):
        extras = {
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True,
            "min_tokens": 2, "stop_token_ids": [7], "skip_special_tokens": False, "seed": 3,
            "bad_words": ["x y"], "allowed_token_ids": [5, 7],
            "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        }  # fmt: skip
        body = PATHS["completions"] | extras | {"logit_bias": {"9": -100}, "stop": None}
        assert up.post("/v1/completions", body).status_code == 200
        params = up.engine.submitted[-1].params
        expected = extras | {"stop_token_ids": (7,)}
        expected |= {"bad_words": ("x y",), "allowed_token_ids": (5, 7)}
        assert {name: getattr(params, name) for name in expected} == expected
        assert (params.logit_bias, params.stop) == ({9: -100.0}, ())

    def test_the_models_defaults_hold_where_the_request_is_silent(self, up):
        up.post("/v1/completions", PATHS["completions"])
        assert up.engine.submitted[-1].params.temperature == 0.0

    @pytest.mark.parametrize("path", PATHS)
    def test_integers_may_be_written_with_a_point(self, up, path):
        body = orjson.dumps(PATHS[path])[:-1] + b',"max_tokens":3.0,"n":2e0,"seed":-0.0}'
        answer = up.post(f"/v1/{path}", body)
        assert answer.json()["usage"]["completion_tokens"] == 6
        params = up.engine.submitted[-1].params
        assert [(type(v), v) for v in (params.max_tokens, params.n, params.seed)] == [
            (int, 3), (int, 2), (int, 0),
        ]  # fmt: skip

    def test_truncation_keeps_the_prompts_end(self, up, tokenizer):
        up.post("/v1/completions", PATHS["completions"] | {"truncate_prompt_tokens": 4})
        assert up.engine.submitted[-1].prompt_token_ids == tokenizer.encode(TEXT)[-4:]
