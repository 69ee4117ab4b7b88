"""The HTTP server, through the openai package and raw sockets, over an engine that echoes."""

import contextlib
import http.client
import json
import logging
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
import openai
import orjson
import pytest

from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.lifecycle import Server
from fastgen_jax.server.listen import bind
from fastgen_jax.server.service import Backend, Service
from fastgen_jax.tokenizer import Tokenizer
from tests import tiny_tokenizers
from tests.server.fake_engine import MAX_TOKENS, FakeEngine

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

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

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

    def connect(self, body: dict, path: str = "/v1/completions") -> socket.socket:
        """A raw connection on which the request was sent."""
        connection = socket.create_connection(self.address, timeout=10)
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
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(65536):
            received += data
    return received


@contextlib.contextmanager
def serving(
    tokenizer: Tokenizer, engine: FakeEngine | None = None, *, load=None, wait=True, **options
) -> Iterator[Running]:
    """A server on a free port; its threads are gone at the end."""
    engine = engine or FakeEngine(tokenizer.eos_token_id or 0)
    config = ServerConfig(port=0, **{"drain_timeout": 0.0} | options)
    listener = bind(config.host, config.port)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    backend = Backend(engine, tokenizer)  # type: ignore[arg-type]
    service = Service(
        load or (lambda on_phase: backend), config, model_names=["fake"], model_aliases=["./fake"]
    )
    server = Server(service, config)
    address = listener.getsockname()
    service.start()
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    one_request_each = httpx.Limits(max_keepalive_connections=0)
    http_client = httpx.Client(timeout=10, limits=one_request_each, trust_env=False)
    running = Running(service, server, thread, address, engine, http_client)
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
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def shared(tokenizer) -> Iterator[Running]:
    with serving(tokenizer) as running:
        yield running


@pytest.fixture
def up(shared) -> Iterator[Running]:
    """The shared server, idle before and after."""
    yield shared
    shared.engine.may_step.set()
    shared.engine.step_time = 0.0
    wait_until(lambda: not shared.engine.live)
    wait_until(lambda: not shared.service._live and not shared.service.n_inflight)


@pytest.fixture
def client(up) -> Iterator[openai.OpenAI]:
    with up.client() as client:
        yield client


def events_of(body: str) -> list:
    """The JSON of each event, "[DONE]" as that."""
    lines = [line for line in body.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


class TestCompletions:
    def test_answer_has_the_form_that_openai_expects(self, client, tokenizer):
        answer = client.completions.create(model="fake", prompt=TEXT, max_tokens=100)
        choice, n_prompt = answer.choices[0], len(tokenizer.encode(TEXT))
        assert (choice.text, choice.finish_reason, choice.index) == (TEXT, "stop", 0)
        assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "fake", "cmpl-")
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (n_prompt, n_prompt)
        assert usage.total_tokens == 2 * n_prompt

    def test_max_tokens_defaults_to_sixteen_and_ends_with_length(self, client, tokenizer):
        answer = client.completions.create(model="fake", prompt=TEXT)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 16
        assert answer.choices[0].text == tokenizer.decode(tokenizer.encode(TEXT)[1:17])

    def test_stream_joins_to_the_same_text_under_one_id(self, client):
        chunks = list(
            client.completions.create(model="fake", prompt=TEXT, max_tokens=99, stream=True)
        )
        assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
        assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
        assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"
        assert {c.choices[0].finish_reason for c in chunks[:-1]} <= {None}

    def test_prompts_and_samples_are_numbered_prompt_first(self, client):
        prompts = ["one", "two", "three"]
        answer = client.completions.create(model="fake", prompt=prompts, n=2, max_tokens=99)
        assert [c.text for c in answer.choices] == ["one", "one", "two", "two", "three", "three"]
        assert [c.index for c in answer.choices] == list(range(6))

    def test_streamed_prompts_and_samples_keep_their_index(self, client):
        texts = dict.fromkeys(range(4), "")
        stream = client.completions.create(
            model="fake", prompt=["one", "two"], n=2, max_tokens=99, stream=True
        )
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == {0: "one", 1: "one", 2: "two", 3: "two"}

    def test_token_id_prompts_alone_and_in_lists(self, client, tokenizer):
        ids, others = tokenizer.encode(TEXT), tokenizer.encode("two")
        alone = client.completions.create(model="fake", prompt=ids, max_tokens=99)
        both = client.completions.create(model="fake", prompt=[ids, others], max_tokens=99)
        assert alone.choices[0].text == TEXT
        assert [choice.text for choice in both.choices] == [TEXT, "two"]

    def test_token_ids_are_returned_on_demand(self, up, tokenizer):
        body = {"prompt": TEXT, "max_tokens": 99, "return_token_ids": True}
        choice = up.post("/v1/completions", body).json()["choices"][0]
        ids = tokenizer.encode(TEXT)
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == [*ids[1:], tokenizer.eos_token_id]

    def test_echo_repeats_the_prompt_streamed_and_not(self, client):
        ask = {"model": "fake", "prompt": ["one", "two"], "max_tokens": 99, "echo": True}
        assert [c.text for c in client.completions.create(**ask).choices] == ["oneone", "twotwo"]
        texts = ["", ""]
        for chunk in client.completions.create(**ask, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == ["oneone", "twotwo"]

    def test_logprobs_hold_each_token_and_its_rivals(self, client, tokenizer):
        answer = client.completions.create(model="fake", prompt=TEXT, max_tokens=5, logprobs=2)
        logprobs, ids = answer.choices[0].logprobs, tokenizer.encode(TEXT)[1:6]
        assert logprobs.tokens == [tokenizer.token_text(id) for id in ids]
        assert logprobs.token_logprobs == [-0.5] * 5
        assert [len(top) for top in logprobs.top_logprobs] == [2] * 5
        assert all(
            t[k] == -0.5 for t, k in zip(logprobs.top_logprobs, logprobs.tokens, strict=True)
        )
        assert logprobs.text_offset == [sum(map(len, logprobs.tokens[:i])) for i in range(5)]

    def test_streamed_logprobs_equal_the_unstreamed(self, client):
        ask = {"model": "fake", "prompt": TEXT, "max_tokens": 12, "logprobs": 1}
        whole = client.completions.create(**ask).choices[0].logprobs
        tokens, offsets = [], []
        for chunk in client.completions.create(**ask, stream=True):
            if chunk.choices[0].logprobs:
                tokens += chunk.choices[0].logprobs.tokens
                offsets += chunk.choices[0].logprobs.text_offset
        assert (tokens, offsets) == (whole.tokens, whole.text_offset)


class TestChat:
    def test_answer_has_the_form_that_openai_expects(self, client):
        answer = client.chat.completions.create(model="fake", messages=CHAT)
        choice = answer.choices[0]
        assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
        assert choice.message.content.strip() == TEXT
        assert (answer.object, answer.id[:9]) == ("chat.completion", "chatcmpl-")
        assert (
            answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        )

    def test_stream_gives_the_role_once_and_the_same_text(self, client):
        whole = client.chat.completions.create(model="fake", messages=CHAT)
        chunks = list(client.chat.completions.create(model="fake", messages=CHAT, stream=True))
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
        assert [d.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}

    def test_content_parts_are_joined(self, client):
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        answer = client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": parts, "name": None}]
        )
        assert answer.choices[0].message.content.strip() == "one\ntwo"

    @pytest.mark.parametrize("content", [{}, {"content": None}], ids=repr)
    def test_assistant_may_have_called_tools_and_said_nothing(self, client, content):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        called = {"role": "assistant", "tool_calls": [call], **content}
        result = {"role": "tool", "tool_call_id": "1", "content": "7"}
        answer = client.chat.completions.create(
            model="fake", messages=[*CHAT, called, result, *CHAT]
        )
        assert answer.choices[0].message.content.strip() == TEXT

    def test_max_completion_tokens_limits_the_answer(self, client):
        answer = client.chat.completions.create(
            model="fake", messages=CHAT, max_completion_tokens=3, max_tokens=5
        )
        assert answer.usage.completion_tokens == 3
        assert answer.choices[0].finish_reason == "length"

    def test_logprobs_have_text_bytes_and_exactly_k_rivals(self, client, tokenizer):
        answer = client.chat.completions.create(
            model="fake", messages=CHAT, logprobs=True, top_logprobs=3, max_tokens=6
        )
        content = answer.choices[0].logprobs.content
        assert len(content) == 6
        for entry in content:
            assert (entry.logprob, len(entry.top_logprobs)) == (-0.5, 3)
            assert entry.top_logprobs[0].token == entry.token
        joined = b"".join(bytes(entry.bytes) for entry in content[1:])
        assert joined.decode().strip() in TEXT

    def test_logprobs_without_rivals_hold_the_sampled_token_alone(self, client):
        answer = client.chat.completions.create(
            model="fake", messages=CHAT, logprobs=True, max_tokens=2
        )
        assert [e.top_logprobs for e in answer.choices[0].logprobs.content] == [[], []]

    def test_developer_speaks_as_system(self, up, tokenizer):
        for role in ("developer", "system"):
            up.post("/v1/chat/completions", {"messages": [{"role": role, "content": "Be brief."}]})
        developer, system = up.engine.submitted[-2:]
        assert developer.prompt_token_ids == system.prompt_token_ids


class TestStream:
    @pytest.mark.parametrize("path", PATHS)
    def test_usage_comes_last_without_choices(self, up, path):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        answer = up.post(f"/v1/{path}", PATHS[path] | options | {"max_tokens": 5})
        *chunks, usage, done = events_of(answer.text)
        assert done == "[DONE]"
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 5)
        assert all(c["usage"] is None and c["choices"] for c in chunks)
        assert answer.headers["content-type"].startswith("text/event-stream")

    def test_continuous_usage_counts_up(self, up):
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": TEXT, "stream": True, "stream_options": options, "max_tokens": 8}
        *chunks, _ = events_of(up.post("/v1/completions", body).text)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == 8

    def test_without_options_no_chunk_mentions_usage(self, up):
        *chunks, done = events_of(up.post("/v1/completions", {"prompt": TEXT, "stream": True}).text)
        assert done == "[DONE]"
        assert all("usage" not in chunk for chunk in chunks)

    def test_nothing_is_sent_before_the_first_token(self, up):
        up.engine.may_step.clear()
        body = {"messages": CHAT, "stream": True}
        with up.connect(body, "/v1/chat/completions") as connection:
            wait_until(lambda: up.engine.live)
            assert not select.select([connection], [], [], 0.05)[0]
            up.engine.may_step.set()
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 OK")

    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("shown", [False, True])
    def test_stop_string_across_tokens_ends_the_sample(self, up, stream, shown):
        up.engine.finished.clear()
        extra = {"stop": ["ree app", "never"], "include_stop_str_in_output": shown}
        body = {"prompt": TEXT, "max_tokens": 99, "stream": stream} | extra
        answer = up.post("/v1/completions", body)
        replies = events_of(answer.text)[:-1] if stream else [answer.json()]
        choices = [reply["choices"][0] for reply in replies]
        text = "Anna has three app" if shown else "Anna has th"
        assert "".join(choice["text"] for choice in choices) == text
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "ree app")
        wait_until(lambda: len(up.engine.finished) == 1)

    def test_one_sample_that_stops_leaves_the_others(self, up):
        body = {"prompt": ["one two", "three"], "max_tokens": 99, "stop": "two"}
        choices = up.post("/v1/completions", body).json()["choices"]
        assert [choice["text"] for choice in choices] == ["one ", "three"]

    def test_characters_of_several_tokens_arrive_whole(self, client):
        prompt = "👩‍👩‍👧 Ω 漢字"
        chunks = client.completions.create(model="fake", prompt=prompt, max_tokens=99, stream=True)
        texts = [chunk.choices[0].text for chunk in chunks]
        assert "".join(texts) == prompt
        assert all("�" not in text for text in texts)

    def test_unread_chunks_are_merged_into_one(self, tokenizer):
        # The reader reads nothing until all 3000 tokens were made.
        body = {"prompt": TEXT, "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with serving(tokenizer) as up, up.connect(body) as slow:
            wait_until(lambda: up.engine.n_generated == 3000)
            received = slow.recv(65536)
            while b"[DONE]" not in received:
                received += slow.recv(65536)
        assert received.count(b'"text"') < 1500


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
    ("completions", {"n": True}, "n"),
    ("completions", {"n": 128, "prompt": ["a"] * 20}, "n"),
    ("completions", {"best_of": 3}, "best_of"),
    ("completions", {"suffix": "end"}, "suffix"),
    ("completions", {"echo": True, "logprobs": 1}, "echo"),
    ("completions", {"logprobs": 21}, "logprobs"),
    ("completions", {"logprobs": True}, "logprobs"),
    ("completions", {"prompt_logprobs": 1}, "prompt_logprobs"),
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
    ("completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"1": 101}}, "logit_bias"),
    ("completions", {"logit_bias": {"-1": 1}}, "logit_bias"),
    ("completions", {"logit_bias": {"9" * 400: 1}}, "logit_bias"),
    ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("completions", {"stream": "yes"}, "stream"),
    ("completions", {"response_format": {"type": "json_object"}}, "response_format"),
    ("completions", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ("completions", {"cache_salt": "s"}, "cache_salt"),
    ("chat/completions", {"messages": []}, "messages"),
    ("chat/completions", {"messages": "hello"}, "messages"),
    ("chat/completions", {"messages": None}, "messages"),
    ("chat/completions", {"messages": ["hello"]}, "messages"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "x"}]}, "messages"),
    ("chat/completions", {"messages": [{"role": ["user"], "content": "x"}]}, "messages"),
    ("chat/completions", {"messages": [{"role": "user", "content": 5}]}, None),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None),
    ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
    ("chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format"),
    ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
    ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ("chat/completions", {"chat_template": "{{ x }}"}, "chat_template"),
    ("chat/completions", {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    ("chat/completions", {"guided_json": {}}, "guided_json"),
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
        assert "(2 in the messages, 5000 in the completion)" in caught.value.message

    def test_a_long_prompt_is_tokenized_beside_the_event_loop(self, up, tokenizer, monkeypatch):
        go_on, encode = threading.Event(), tokenizer.encode

        def encode_late(text, **kwargs):
            assert go_on.wait(10)
            return encode(text, **kwargs)

        monkeypatch.setattr(tokenizer, "encode", encode_late)
        with up.connect({"prompt": "aaaa " * 10_000}) as connection:
            wait_until(lambda: up.service.n_inflight)
            assert up.get("/livez").status_code == 200
            go_on.set()
            assert b"context_length_exceeded" in connection.recv(65536)

    def test_chat_overflow_names_the_messages(self, up):
        body = {"messages": [{"role": "user", "content": "Ω" * 5000}]}
        error = up.post("/v1/chat/completions", body).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")

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
        assert up.get("/v1/completions").status_code == 405
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
            "temperature": 0.5, "top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        }  # fmt: skip
        body = PATHS["completions"] | extras | {"logit_bias": {"9": -100}, "stop": None}
        assert up.post("/v1/completions", body).status_code == 200
        params = up.engine.submitted[-1].params
        expected = extras | {"stop_token_ids": (7,)}
        assert {name: getattr(params, name) for name in expected} == expected
        assert (params.logit_bias, params.stop) == ({9: -100.0}, ())

    def test_the_models_defaults_hold_where_the_request_is_silent(self, up):
        up.post("/v1/completions", PATHS["completions"])
        assert up.engine.submitted[-1].params.temperature == 0.0

    def test_truncation_keeps_the_prompts_end(self, up, tokenizer):
        up.post("/v1/completions", PATHS["completions"] | {"truncate_prompt_tokens": 4})
        assert up.engine.submitted[-1].prompt_token_ids == tokenizer.encode(TEXT)[-4:]


class TestFaults:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("reset", [False, True])
    def test_a_client_that_leaves_while_queued_cancels(self, up, stream, reset):
        up.engine.may_step.clear()
        up.engine.cancelled.clear()
        connection = up.connect(PATHS["completions"] | {"stream": stream, "n": 3})
        wait_until(lambda: len(up.engine.live) == 3)
        if reset:
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
        wait_until(lambda: not up.engine.live)
        assert len(up.engine.cancelled) == 1

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_mid_answer_cancels(self, up, stream):
        up.engine.step_time = 0.002
        body = {"prompt": TEXT, "stream": stream, "max_tokens": 4000, "ignore_eos": True}
        n_before = up.engine.n_generated
        connection = up.connect(body)
        wait_until(lambda: up.engine.n_generated > n_before + 5)
        connection.close()
        wait_until(lambda: not up.engine.live)
        assert up.engine.n_generated < n_before + 2000

    def test_closing_the_openai_stream_cancels(self, up, client):
        up.engine.step_time = 0.002
        stream = client.completions.create(
            model="fake", prompt=TEXT, max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        wait_until(lambda: not up.engine.live)

    def test_a_slow_reader_delays_nobody_and_is_cut_at_last(self, tokenizer):
        slow_body = {
            "prompt": TEXT, "stream": True, "max_tokens": 4000, "ignore_eos": True, "logprobs": 20,
        }  # fmt: skip
        with serving(tokenizer, stream_timeout=0.5) as up:
            up.engine.step_time = 0.001
            slow = socket.socket()
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(up.address)
            slow.sendall(raw_post("/v1/completions", orjson.dumps(slow_body)))
            wait_until(lambda: up.engine.live)
            started = time.monotonic()
            assert up.post("/v1/completions", PATHS["completions"]).status_code == 200
            assert time.monotonic() - started < 1.0
            wait_until(lambda: not up.service.n_inflight)
            assert b"[DONE]" not in read_all(slow)
            slow.close()

    def test_the_death_of_the_engine_reaches_every_waiter(self, tokenizer):
        with serving(tokenizer) as up:
            up.engine.step_time = 0.005
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True}
            streaming = up.connect(body | {"stream": True})
            head = streaming.recv(65536)
            assert head.startswith(b"HTTP/1.1 200")
            waiting = up.connect(body)
            wait_until(lambda: len(up.engine.live) == 2)
            started = time.monotonic()
            up.engine.fault = RuntimeError("secret /path/of/machine")
            streamed, answered = read_all(streaming), waiting.recv(65536)
            assert time.monotonic() - started < 1.0
            assert b'data: {"error":' in streamed
            assert b"[DONE]" not in streamed
            assert not streamed.endswith(b"0\r\n\r\n")
            assert answered.startswith(b"HTTP/1.1 500")
            assert b"secret" not in streamed + answered
            assert up.get("/health").json()["phase"] == "failed"
            assert up.get("/health").status_code == 503
            assert up.get("/livez").status_code == 200
            assert up.post("/v1/completions", body).status_code == 503
            streaming.close()
            waiting.close()

    def test_openai_raises_on_an_error_within_a_stream(self, tokenizer):
        with serving(tokenizer) as up, up.client() as client:
            up.engine.step_time = 0.005
            stream = client.completions.create(
                model="fake", prompt=TEXT, max_tokens=50, stream=True
            )
            next(iter(stream))
            up.engine.fault = RuntimeError("boom")
            with pytest.raises(openai.APIError, match="engine stopped"):
                list(stream)

    def test_a_poisoned_request_fails_alone(self, up):
        up.engine.may_step.clear()
        with up.connect(PATHS["completions"]) as poisoned, up.connect({"prompt": "b"}) as good:
            wait_until(lambda: len(up.engine.live) == 2)
            (bad_id,) = (
                i
                for i, _ in up.engine.live
                if len(up.engine.live[i, 0].request.prompt_token_ids) > 2
            )
            up.engine.poisoned.add(bad_id)
            up.engine.may_step.set()
            assert poisoned.recv(65536).startswith(b"HTTP/1.1 500")
            assert good.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_fault_of_the_detokenizer_fails_its_request_alone(self, up, monkeypatch):
        from fastgen_jax.server import generation

        def push(self, output, push=generation.TextStream.push):
            if self._params.seed == 666:
                raise ValueError("boom")
            return push(self, output)

        monkeypatch.setattr(generation.TextStream, "push", push)
        up.engine.may_step.clear()
        with (
            up.connect(PATHS["completions"] | {"seed": 666}) as bad,
            up.connect({"prompt": "b"}) as good,
        ):
            wait_until(lambda: len(up.engine.live) == 2)
            up.engine.may_step.set()
            assert bad.recv(65536).startswith(b"HTTP/1.1 500")
            assert good.recv(65536).startswith(b"HTTP/1.1 200")

    def test_a_fault_of_ours_is_a_500_without_its_text(self, up, monkeypatch):
        monkeypatch.setattr(up.service, "submit", lambda *a, **k: 1 / 0)
        answer = up.post("/v1/completions", PATHS["completions"], headers={"x-request-id": "r-1"})
        assert answer.status_code == 500
        assert "r-1" in answer.json()["error"]["message"]
        assert "division" not in answer.text

    def test_deadlines_end_queued_and_running_requests(self, tokenizer):
        with serving(tokenizer, queue_timeout=0.1, request_timeout=0.4) as up:
            up.engine.may_step.clear()
            answer = up.post("/v1/completions", PATHS["completions"])
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                504,
                "deadline_exceeded",
            )
            up.engine.step_time = 0.01
            up.engine.may_step.set()
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
            with up.connect(body) as connection:
                received = read_all(connection)
            assert b"deadline_exceeded" in received
            assert b"[DONE]" not in received
            wait_until(lambda: not up.engine.live)

    def test_health_reports_a_step_that_hangs(self, tokenizer):
        with serving(tokenizer, step_timeout=0.1) as up:
            assert up.get("/health").status_code == 200
            up.engine.may_step.clear()
            with up.connect(PATHS["completions"]):
                wait_until(lambda: up.get("/health").json()["phase"] == "stalled")
                assert up.get("/health").status_code == 503
            up.engine.may_step.set()
            wait_until(lambda: up.get("/health").status_code == 200)

    def test_a_thousand_refusals_leave_nothing_behind(self, up):
        body = orjson.dumps({"prompt": [10**6]})
        with httpx.Client(base_url=up.url, headers={"content-type": "application/json"}) as client:
            assert {
                client.post("/v1/completions", content=body).status_code for _ in range(1000)
            } == {400}
        assert up.post("/v1/completions", PATHS["completions"]).status_code == 200
        assert not up.service._live


class TestLife:
    def test_while_loading_the_port_answers_and_refuses_work(self, tokenizer):
        go_on, phases = threading.Event(), threading.Event()

        def load(on_phase):
            on_phase("compiling", 3, 9)
            phases.set()
            assert go_on.wait(10)
            return Backend(engine, tokenizer)

        engine = FakeEngine(tokenizer.eos_token_id)
        with serving(tokenizer, engine, load=load, wait=False) as up:
            assert phases.wait(5)
            assert up.get("/livez").status_code == 200
            health = up.get("/health")
            assert health.status_code == 503
            assert health.json().items() >= {"phase": "compiling", "done": 3, "of": 9}.items()
            assert health.json()["elapsed_s"] >= 0
            assert up.get("/ready").status_code == 503
            assert up.get("/v1/models").json()["data"][0]["id"] == "fake"
            assert "fastgen:num_requests_running" in up.get("/metrics").text
            refused = up.post("/v1/completions", PATHS["completions"])
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
            assert int(refused.headers["retry-after"]) > 0
            go_on.set()
            wait_until(lambda: up.get("/health").status_code == 200)
            assert up.post("/v1/completions", PATHS["completions"]).status_code == 200

    def test_a_failed_load_ends_the_server(self, tokenizer):
        def load(on_phase):
            raise ValueError("no such file")

        with serving(tokenizer, load=load, wait=False) as up:
            up.thread.join(5)
            assert not up.thread.is_alive()
            assert isinstance(up.service.load_error, ValueError)

    def test_drain_finishes_what_runs_and_refuses_the_rest(self, tokenizer):
        with serving(tokenizer, drain_timeout=10) as up:
            up.engine.may_step.clear()
            body = PATHS["completions"] | {"max_tokens": 30}
            streaming, waiting = up.connect(body | {"stream": True}), up.connect(body)
            wait_until(lambda: len(up.engine.live) == 2)
            up.begin_drain()
            wait_until(lambda: up.get("/health").status_code == 503)
            refused = up.post("/v1/completions", body)
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert refused.json()["error"]["code"] == "draining"
            up.engine.may_step.set()
            assert b"[DONE]" in read_all(streaming)
            assert waiting.recv(65536).startswith(b"HTTP/1.1 200")
            streaming.close()
            waiting.close()
            up.thread.join(2)
            assert not up.thread.is_alive()

    def test_drain_ends_with_errors_when_time_is_over(self, tokenizer):
        with serving(tokenizer, drain_timeout=0.2) as up:
            up.engine.step_time = 0.01
            body = {"prompt": TEXT, "max_tokens": 4000, "ignore_eos": True}
            streaming = up.connect(body | {"stream": True})
            assert streaming.recv(65536).startswith(b"HTTP/1.1 200")
            waiting = up.connect(body)
            wait_until(lambda: len(up.engine.live) == 2)
            up.begin_drain()
            streamed = read_all(streaming)
            assert b"shutting down" in streamed
            assert b"[DONE]" not in streamed
            assert waiting.recv(65536).startswith(b"HTTP/1.1 503")
            streaming.close()
            waiting.close()
            up.thread.join(2.2)
            assert not up.thread.is_alive()

    def test_idle_drain_is_fast(self, tokenizer):
        with serving(tokenizer, drain_timeout=30) as up:
            up.begin_drain()
            up.thread.join(2)
            assert not up.thread.is_alive()


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

    def test_many_requests_on_one_connection(self, up):
        connection = http.client.HTTPConnection(*up.address, timeout=5)
        for _ in range(20):
            body = orjson.dumps({"prompt": "a", "max_tokens": 2})
            connection.request(
                "POST", "/v1/completions", body, {"content-type": "application/json"}
            )
            assert connection.getresponse().read().startswith(b'{"id":"cmpl-')
        connection.close()


class TestOtherRoutes:
    def test_models_are_listed_and_shown(self, client):
        (model,) = client.models.list().data
        assert (model.id, model.object, model.owned_by) == ("fake", "model", "fastgen_jax")
        assert model.model_dump()["max_model_len"] == MAX_TOKENS
        assert client.models.retrieve("fake").id == "fake"
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("org/other")
        assert caught.value.code == "model_not_found"

    def test_an_unknown_model_is_a_404_and_an_alias_is_not(self, client):
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.completions.create(model="other", prompt="x")
        assert client.completions.create(model="./fake", prompt="x").choices

    def test_tokenize_and_detokenize_are_inverse(self, up, tokenizer):
        answer = up.post("/tokenize", {"prompt": TEXT, "return_token_strs": True}).json()
        assert answer["tokens"] == tokenizer.encode(TEXT)
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), MAX_TOKENS)
        assert "".join(answer["token_strs"][1:]) == TEXT
        text = up.post("/detokenize", {"tokens": answer["tokens"][1:]}).json()["prompt"]
        assert text == TEXT

    def test_tokenize_renders_messages(self, up, tokenizer):
        ids = up.post("/tokenize", {"messages": CHAT}).json()["tokens"]
        assert ids == tokenizer.apply_chat_template(CHAT)

    @pytest.mark.parametrize(("path", "body"), [
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": 1}),
        ("/detokenize", {"tokens": [10**9]}), ("/detokenize", {"tokens": "x"}), ("/detokenize", {}),
    ])  # fmt: skip
    def test_bad_token_requests_are_400(self, up, path, body):
        assert up.post(path, body).status_code == 400

    def test_version_and_documentation(self, up):
        assert up.get("/version").json()["version"]
        assert "/v1/chat/completions" in up.get("/openapi.json").json()["paths"]
        assert "$defs" not in up.get("/openapi.json").text
        assert up.get("/docs").status_code == 200

    def test_metrics_count_what_happened(self, tokenizer):
        with serving(tokenizer) as up:
            up.post("/v1/completions", {"prompt": TEXT, "max_tokens": 5, "n": 2})
            up.post("/v1/completions", {"prompt": "a", "max_tokens": 50})
            text = up.get("/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        model = 'model_name="fake"'
        n_tokens = 10 + len(tokenizer.encode("a"))
        assert float(values[f"fastgen:generation_tokens_total{{{model}}}"]) == n_tokens
        assert float(values[f"fastgen:prompt_tokens_total{{{model}}}"]) > 5
        assert float(values[f"fastgen:num_requests_running{{{model}}}"]) == 0
        assert float(values[f"fastgen:num_preemptions_total{{{model}}}"]) == 0
        assert f"fastgen:kv_cache_usage_perc{{{model}}}" in values
        assert f"fastgen:prefix_cache_hits_total{{{model}}}" in values
        for reason, count in (("length", 2), ("stop", 1), ("abort", 0)):
            name = f'fastgen:request_success_total{{finished_reason="{reason}",{model}}}'
            assert float(values[name]) == count
        assert float(values[f"fastgen:time_to_first_token_seconds_count{{{model}}}"]) == 3
        assert (
            float(values[f"fastgen:inter_token_latency_seconds_count{{{model}}}"]) == n_tokens - 3
        )
        assert f'fastgen:time_to_first_token_seconds_bucket{{le="0.001",{model}}}' in values
        assert f'fastgen:e2e_request_latency_seconds_bucket{{le="0.3",{model}}}' in values

    def test_no_request_can_add_a_metric_series(self, up):
        n_before = len(up.get("/metrics").text.splitlines())
        for i in range(20):
            up.get(f"/path-{i}")
            up.post("/v1/completions", {"prompt": "a", "model": f"model-{i}"})
        assert len(up.get("/metrics").text.splitlines()) == n_before
