"""Long text is read beside the event loop, and what cannot fit is not tokenised at all."""

import threading

import orjson
import pytest

from fastgen_jax.server.service import INLINE_BYTES
from tests.server.fake_engine import MAX_TOKENS
from tests.server.running import hold_encode, serving
from tests.tiny_tokenizers import ASSISTANT

LONGEST = len(ASSISTANT)  # bytes of the vocabulary's longest token
BOUND = LONGEST * MAX_TOKENS
IDS = [5] * (INLINE_BYTES // 2)
TEXT = "Anna " * (INLINE_BYTES // 5)
LONG = [
    ("/v1/completions", {"prompt": TEXT}, "encode"),
    ("/v1/completions", {"prompt": ["Anna"] * 9 + [TEXT]}, "encode"),
    ("/v1/completions", {"prompt": IDS, "echo": True, "max_tokens": 1}, "decode"),
    ("/tokenize", {"prompt": TEXT}, "encode"),
    ("/tokenize", {"prompt": TEXT, "return_token_strs": True}, "token_text"),
    ("/tokenize", {"messages": [{"role": "user", "content": TEXT}]}, "apply_chat_template"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]},
     "apply_chat_template"),
    ("/detokenize", {"tokens": IDS}, "decode"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 100},
     "apply_chat_template"),
]  # fmt: skip


def messages(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


@pytest.fixture
def calls(tokenizer, monkeypatch) -> list[tuple[str, str]]:
    """What was called of the tokenizer, and in which thread."""
    calls = []

    def record(name, call):
        def recorded(*args, **kwargs):
            calls.append((name, threading.current_thread().name))
            return call(*args, **kwargs)

        return recorded

    for name in ("encode", "decode", "token_text", "apply_chat_template"):
        monkeypatch.setattr(tokenizer, name, record(name, getattr(tokenizer, name)))
    return calls


@pytest.mark.parametrize(("path", "body", "call"), LONG)
def test_long_bodies_are_read_beside_the_event_loop(up, calls, path, body, call):
    body = body | ({"max_tokens": 1} if "completions" in path else {})
    up.post(path, body)
    threads = {thread for name, thread in calls if name == call}
    assert threads
    assert all(thread.startswith("fastgen-tokenize") for thread in threads)


@pytest.mark.parametrize("field", ["parse", "check_token_ids", "is_ids"])
def test_checks_of_long_bodies_run_there_too(up, monkeypatch, field):
    from fastgen_jax.server import protocol

    threads, check = set(), getattr(protocol, field)

    def recorded(*args):
        threads.add(threading.current_thread().name)
        return check(*args)

    monkeypatch.setattr(protocol, field, recorded)
    assert up.post("/v1/completions", {"prompt": [IDS] * 4, "max_tokens": 1}).status_code == 200
    assert threads
    assert all(thread.startswith("fastgen-tokenize") for thread in threads)


def test_long_answers_are_built_beside_the_event_loop(up, monkeypatch):
    from fastgen_jax.server.formats.completion import CompletionFormat

    threads, result = [], CompletionFormat.result

    def recorded(self, generation):
        threads.append(threading.current_thread())
        return result(self, generation)

    monkeypatch.setattr(CompletionFormat, "result", recorded)
    for ask in ({"echo": True}, {"return_token_ids": True}):
        body = {"prompt": [5] * 700, "n": 3, "max_tokens": 1} | ask
        assert up.post("/v1/completions", body).status_code == 200
        assert threads.pop() is not up.thread
    assert up.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
    assert threads.pop() is up.thread


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/completions", {"prompt": "a" * (BOUND + 1)}, "prompt"),
    ("/v1/completions", {"prompt": ["a", "é" * (BOUND // 2 + 1)]}, "prompt"),
    ("/v1/chat/completions", messages("a" * (BOUND + 1)), "messages"),
    ("/v1/chat/completions", {"messages": messages("a" * 1000)["messages"] * 60}, "messages"),
    ("/tokenize", {"prompt": "a" * (BOUND + 1)}, "prompt"),
    ("/tokenize", messages("a" * (BOUND + 1)), "messages"),
])  # fmt: skip
def test_text_that_cannot_fit_is_refused_untokenized(up, calls, path, body, param):
    error = up.post(path, body).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert f"maximum context length is {MAX_TOKENS} tokens" in error["message"]
    assert f"at most {BOUND} bytes of text" in error["message"]
    assert "shorten it, or have truncate_prompt_tokens cut it" in error["message"]
    assert not calls


def test_text_that_may_fit_is_not_refused(up, tokenizer):
    """As many of the longest token as the context holds are tokenised, trimmed spaces ignored."""
    text = ASSISTANT * (MAX_TOKENS - 2)
    assert up.post("/v1/completions", {"prompt": text, "max_tokens": 1}).status_code == 200
    assert len(up.engine.submitted[-1].prompt_token_ids) == MAX_TOKENS - 1
    assert up.post("/tokenize", {"prompt": ASSISTANT * MAX_TOKENS}).status_code == 200
    trimmed = messages("a" + " " * BOUND) | {"max_tokens": 1}
    assert up.post("/v1/chat/completions", trimmed).status_code == 200


def test_without_a_bound_every_text_is_tokenized(up, tokenizer, calls, monkeypatch):
    monkeypatch.setattr(tokenizer, "longest_token", None)
    error = up.post("/v1/completions", {"prompt": "a" * (BOUND + 1)}).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"you requested {BOUND + 1 + 1 + 16} tokens" in error["message"]
    assert [name for name, _ in calls] == ["encode"]


@pytest.mark.parametrize("n_kept", [1, 7, MAX_TOKENS - 1])
def test_truncation_cuts_the_text_before_it_is_tokenized(up, tokenizer, monkeypatch, n_kept):
    text = "The code of Anna is 7312. " * (BOUND // 10)
    expected, seen, encode = tokenizer.encode(text)[-n_kept:], [], tokenizer.encode

    def recorded(text, **kwargs):
        seen.append(text)
        return encode(text, **kwargs)

    monkeypatch.setattr(tokenizer, "encode", recorded)
    body = {"prompt": text, "truncate_prompt_tokens": n_kept, "max_tokens": 1}
    assert up.post("/v1/completions", body).status_code == 200
    assert up.engine.submitted[-1].prompt_token_ids == expected
    assert len(seen[0]) < len(text) / 2


def test_a_conversation_is_cut_after_it_is_rendered(up):
    body = messages("a" * (BOUND + 1)) | {"truncate_prompt_tokens": 9, "max_tokens": 1}
    assert up.post("/v1/chat/completions", body).status_code == 200
    assert len(up.engine.submitted[-1].prompt_token_ids) == 9


def test_ids_are_checked_before_they_are_cut(up):
    body = {"prompt": [2**63, 5], "truncate_prompt_tokens": 1, "echo": True}
    assert up.post("/v1/completions", orjson.dumps(body)).status_code == 400


def test_the_loop_answers_while_every_reader_is_busy(tokenizer, monkeypatch):
    go_on = hold_encode(tokenizer, monkeypatch, min_length=INLINE_BYTES)
    with serving(tokenizer) as up:
        connections = [up.connect({"prompt": TEXT, "max_tokens": 1}) for _ in range(5)]
        assert up.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200
        go_on.set()
        for connection in connections:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
            connection.close()
