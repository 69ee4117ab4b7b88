"""What one tenant has asked is neither told to another nor faster for it: a real scheduler and
prefix cache, on the device of integers, behind the server.
"""

import itertools

import pytest

from fastgen_jax.server.protocol import cache_salt
from tests.engine.simulation import fake_engine
from tests.server.running import serving

PROMPT = [0, 1] * 6  # six blocks, of which five can be shared
KEYS = ("one", "two")


@pytest.fixture
def up(tokenizer):
    engine = fake_engine(num_kv_blocks=60, max_model_len=48)
    with serving(tokenizer, engine, api_key=KEYS) as running:
        yield running


def ask(up, key, salt=None, path="/v1/completions", field="prompt"):
    """The answer, and the prompt's tokens that the engine found cached."""
    n_hits = up.engine.stats().n_prefix_hits
    body = {field: PROMPT, "cache_salt": salt}
    body |= {"max_tokens": 1} if field == "prompt" else {}
    answer = up.post(path, body, headers={"authorization": f"Bearer {key}"})
    assert answer.status_code == 200, answer.text
    return answer.json(), up.engine.stats().n_prefix_hits - n_hits


def test_usage_and_counters_tell_a_tenant_its_own_prompts_only(up):
    for key, salt, n_cached in [
        ("one", None, 0), ("one", None, 10), ("two", None, 0), ("one", "x", 0), ("two", "x", 0),
        ("one", "x", 10), ("one", "", 10), ("two", None, 10),
    ]:  # fmt: skip
        answer, n_hits = ask(up, key, salt)
        details = answer["usage"]["prompt_tokens_details"]
        assert (key, salt, details["cached_tokens"], n_hits) == (key, salt, n_cached, n_cached)
    shown = up.get("/metrics", headers={"authorization": "Bearer two"}).text
    assert "fastgen:prefix_cache_hits_total" in shown


def test_vectors_tell_a_tenant_its_own_prompts_only(up):
    for key, salt, n_cached in [
        ("one", None, 0), ("two", None, 0), ("one", "x", 0), ("one", "x", 10), ("two", None, 10),
    ]:  # fmt: skip
        _, n_hits = ask(up, key, salt, "/v1/embeddings", "input")
        assert (key, salt, n_hits) == (key, salt, n_cached)


def test_prompts_that_were_embedded_are_cached_for_their_tenant_only(up):
    ask(up, "one", None, "/v1/embeddings", "input")
    assert ask(up, "two")[1] == 0
    assert ask(up, "one")[1] == 10


def test_no_salt_of_a_tenant_is_one_of_another():
    tenants = [b"", b"a", b":", b"a:", b"\x00\x01a", bytes(32), b"\x3a" * 32]
    salts = [None, "a", ":", "::", "a:", ":a", "\x00", "\x00\x01a", ":" * 33, "\x00" * 34, "\ud800"]
    made = [cache_salt(salt, tenant) for salt, tenant in itertools.product(salts, tenants)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("salt", [1, True, ["a"], {"a": 1}, "x" * 257])
@pytest.mark.parametrize(("path", "field"), [
    ("/v1/completions", "prompt"), ("/v1/embeddings", "input"),
])  # fmt: skip
def test_what_is_no_salt_is_a_400_that_names_the_field(up, path, field, salt):
    body = {field: PROMPT, "cache_salt": salt}
    answer = up.post(path, body, headers={"authorization": "Bearer one"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")
