"""Bodies beyond the bounds are refused by words, whatever their shape."""

import time

import orjson
import pytest

from fastgen_jax.server import json_body, protocol
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.json_body import MAX_CONTAINERS, MAX_DEPTH, MAX_FIELDS, load
from tests.server.running import PATHS


def nested(depth: int, inner=b"1") -> bytes:
    return b"[" * depth + inner + b"]" * depth


def refusal(body: bytes) -> str:
    with pytest.raises(ApiError) as caught:
        load(body)
    assert caught.value.status == 400
    return caught.value.message


def test_depth_is_bounded_to_the_level():
    assert load(b'{"a":%b}' % nested(MAX_DEPTH - 1))
    assert "nested too deeply; at most 64" in refusal(b'{"a":%b}' % nested(MAX_DEPTH))
    assert "nested too deeply" in refusal(b'{"a":{"b":%b}}' % nested(MAX_DEPTH - 1))
    assert load(b'{"a":[%b]}' % b",".join([nested(MAX_DEPTH - 2)] * 9))


def test_brackets_within_strings_are_text():
    text = '[{"\\' * MAX_CONTAINERS
    assert load(orjson.dumps({"prompt": text})) == {"prompt": text}


@pytest.mark.parametrize("piece", [b'\\"', b'"', b"\\", b'"\\', b'"a\\\\"[', b'\x00"'])
def test_strings_that_never_end_take_linear_time(piece):
    """The search for strings began anew at each quote: 4 s for 32 KB, hours for 2 MB."""
    body = b"[" * (MAX_CONTAINERS + 1) + piece * (10**6 // len(piece))
    started = time.perf_counter()
    refusal(body)
    assert time.perf_counter() - started < 1


def test_a_string_that_never_ends_hides_its_brackets_as_others_do():
    assert "not valid JSON" in refusal(b'{"a":"' + b"[" * 2 * MAX_CONTAINERS)
    assert "not valid JSON" in refusal(b'{"a":"' + b"[" * 2 * MAX_CONTAINERS + b"\\")


def test_the_number_of_containers_is_bounded():
    within = orjson.dumps({"a": [[]] * (MAX_CONTAINERS - 2), "b": "[" * 9})
    assert len(load(within)["a"]) == MAX_CONTAINERS - 2
    beyond = orjson.dumps({"a": [{}] * (MAX_CONTAINERS - 1), "b": "[" * 9})
    assert f"{MAX_CONTAINERS + 1} lists and objects" in refusal(beyond)


def test_the_number_of_fields_is_bounded():
    fields = {f"k{i}": i for i in range(MAX_FIELDS + 1)}
    assert f"{MAX_FIELDS + 1} fields" in refusal(orjson.dumps(fields))


@pytest.mark.parametrize("field", protocol.MAX_ENTRIES)
def test_long_lists_are_counted_before_their_entries_are_looked_at(field, monkeypatch):
    monkeypatch.setattr(
        protocol.CompletionRequest, "model_validate", lambda *a: pytest.fail("read")
    )
    monkeypatch.setitem(protocol.MAX_ENTRIES, field, min(protocol.MAX_ENTRIES[field], 399))
    for value in ([None] * 400, {str(i): None for i in range(400)}):
        with pytest.raises(ApiError, match=f"{field} has 400 entries; at most"):
            protocol.parse(protocol.CompletionRequest, orjson.dumps({field: value}))


@pytest.mark.parametrize("depth", [MAX_DEPTH, 990, 1020, 5000])
@pytest.mark.parametrize(("path", "body"), [
    ("/v1/chat/completions", b'{"messages":[{"role":"user","content":%b}]}'),
    ("/v1/chat/completions", b'{"messages":[{"role":%b,"content":"a"}]}'),
    ("/v1/chat/completions", b'{"messages":[{"role":"tool","content":"a","tool_calls":%b}]}'),
    ("/tokenize", b'{"messages":[{"role":"user","content":%b}]}'),
    ("/v1/completions", b'{"prompt":%b}'), ("/v1/completions", b'{"prompt":"a","x":%b}'),
    ("/v1/completions", b'{"prompt":"a","logit_bias":%b}'), ("/detokenize", b'{"tokens":%b}'),
])  # fmt: skip
def test_nesting_is_a_400_everywhere(up, path, body, depth):
    answer = up.post(path, body % nested(depth))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_recursion_is_never_left_to_the_input(up, monkeypatch):
    """What the bound keeps out made repr() overflow the stack: a 500 with a traceback."""
    monkeypatch.setattr(json_body, "MAX_DEPTH", 10**6)
    body = b'{"messages":[{"role":"user","content":%b}]}' % nested(1000)
    assert up.post("/v1/chat/completions", body).status_code == 400
    assert up.post("/v1/completions", PATHS["completions"]).status_code == 200
