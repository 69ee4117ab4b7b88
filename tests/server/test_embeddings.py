"""Embeddings over HTTP: from bodies to the engine, and from its hidden states to the answer."""

import base64
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.engine.pooling import normalized
from fastgen_jax.errors import ConfigError, InvalidRequest
from fastgen_jax.server import embeddings
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.embeddings import EmbeddingAsk, answer, shortened
from fastgen_jax.server.errors import unavailable
from tests.server.fake_engine import HIDDEN_SIZE, MAX_TOKENS, VOCAB_SIZE, embedding_of
from tests.server.running import TEXT, Running, serving, wait_until


def vector_of(ids: list[int]) -> np.ndarray:
    return normalized(embedding_of(ids))


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving(tokenizer, max_prompts=5) as up:
        yield up


@pytest.fixture
def up(served):
    yield served
    served.engine.may_step.set()
    wait_until(lambda: not served.engine.live)
    served.engine.submitted.clear()
    served.engine.cancelled.clear()


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as pool:
        yield pool


def asked(up: Running) -> list[list[int]]:
    return [request.prompt_token_ids for request in up.engine.submitted]


def held(up: Running, pool: ThreadPoolExecutor) -> Future[httpx.Response]:
    """A post of three texts, which the engine has and does not work on."""
    up.engine.may_step.clear()
    future = pool.submit(up.post, "/v1/embeddings", {"input": ["a", "b", "c"]})
    wait_until(lambda: len(up.engine.live) == 3)
    return future


def embed(up: Running, **body) -> dict:
    reply = up.post("/v1/embeddings", body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def error(up: Running, **body) -> tuple[int, dict]:
    reply = up.post("/v1/embeddings", body)
    return reply.status_code, reply.json()["error"]


def test_openais_client_reads_the_vectors_of_texts_in_their_order(up, tokenizer):
    with up.client() as client:
        reply = client.embeddings.create(model="fake", input=[TEXT, "a"])
    expected = [vector_of(tokenizer.encode(text)) for text in (TEXT, "a")]
    assert [entry.index for entry in reply.data] == [0, 1]
    assert [entry.embedding for entry in reply.data] == [v.tolist() for v in expected]
    n_tokens = len(tokenizer.encode(TEXT)) + len(tokenizer.encode("a"))
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (n_tokens, n_tokens)
    assert (reply.model, reply.object, reply.data[0].object) == ("fake", "list", "embedding")


@pytest.mark.parametrize(("given", "expected"), [
    ([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]]), ([0], [[0]]),
])  # fmt: skip
def test_token_ids_are_taken_as_they_are(up, given, expected):
    assert len(embed(up, input=given)["data"]) == len(expected)
    assert asked(up) == expected


def test_texts_and_ids_may_be_mixed_and_special_tokens_left_out(up, tokenizer):
    embed(up, input=["a", [5]], add_special_tokens=False, user="me")
    assert asked(up) == [tokenizer.encode("a", add_special_tokens=False), [5]]


def test_base64_holds_the_same_numbers_as_little_endian_floats(up):
    (plain,) = embed(up, input=[5, 6])["data"]
    (spelled,) = embed(up, input=[5, 6], encoding_format="base64")["data"]
    numbers = np.frombuffer(base64.b64decode(spelled["embedding"]), "<f4")
    assert np.array(plain["embedding"], np.float32).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("n", [1, 3, HIDDEN_SIZE])
def test_dimensions_are_the_first_ones_of_length_one_again(up, n):
    (entry,) = embed(up, input=[5, 6], dimensions=n)["data"]
    first = vector_of([5, 6])[:n]
    assert np.allclose(entry["embedding"], first / np.linalg.norm(first), atol=1e-6)


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_what_is_left_of_a_vector_points_the_same_way(numbers, data):
    vector = np.array(numbers, np.float32)
    n = data.draw(st.integers(1, len(numbers)))
    cut = shortened(vector, n)
    assert (cut.dtype, len(cut)) == (np.float32, n)
    if n < len(numbers):
        length = np.linalg.norm(vector[:n].astype(np.float64))
        assert np.allclose(cut * length, vector[:n], rtol=1e-5, atol=1e-30)
        assert np.linalg.norm(cut) == pytest.approx(1 if length else 0, abs=1e-5)


BAD = [
    ({}, "input"), ({"input": None}, "input"), ({"input": []}, "input"), ({"input": [[]]}, "input"),
    ({"input": {"a": 1}}, "input"), ({"input": 5}, "input"), ({"input": [1, "a"]}, "input"),
    ({"input": [True]}, "input"), ({"input": [1.5]}, "input"), ({"input": [["a"]]}, "input"),
    ({"input": ["a"] * 6}, "input"), ({"input": [VOCAB_SIZE]}, "input"), ({"input": [-1]}, "input"),
    ({"input": [[5], [2**70]]}, "input"), ({"messages": []}, "input"),
    ({"input": "", "add_special_tokens": False}, "input"),
    ({"input": "a", "dimensions": 0}, "dimensions"),
    ({"input": "a", "dimensions": -1}, "dimensions"),
    ({"input": "a", "dimensions": HIDDEN_SIZE + 1}, "dimensions"),
    ({"input": "a", "dimensions": 2.5}, "dimensions"),
    ({"input": "a", "dimensions": "4"}, "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "encoding_format": 1}, "encoding_format"),
    ({"input": "a", "model": 1}, "model"),
    ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD)
def test_what_is_wrong_is_a_400_that_names_the_field(up, body, param):
    status, found = error(up, **body)
    assert (status, found["param"]) == (400, param)
    assert asked(up) == []


@pytest.mark.parametrize("given", [[5] * (MAX_TOKENS + 1), "Ω" * 60_000])
def test_what_does_not_fit_is_refused_as_too_long(up, given):
    status, found = error(up, input=given)
    assert (status, found["code"], found["param"]) == (400, "context_length_exceeded", "input")
    assert f"maximum context length is {MAX_TOKENS} tokens" in found["message"]


def test_an_answer_of_too_many_numbers_is_refused_before_it_is_made(up, monkeypatch):
    monkeypatch.setattr(embeddings, "MAX_NUMBERS", 20)
    assert len(embed(up, input=["a"] * 4, dimensions=5)["data"]) == 4
    status, found = error(up, input=["a"] * 3)
    assert (status, found["param"]) == (400, "input")
    assert "3 vectors of 8 numbers" in found["message"]


def test_a_large_answer_is_built_beside_the_event_loop(up, monkeypatch):
    monkeypatch.setattr(embeddings, "INLINE_NUMBERS", 0)
    (entry,) = embed(up, input=[5])["data"]
    assert np.array_equal(np.float32(entry["embedding"]), vector_of([5]))


def test_an_unknown_model_is_a_404(up):
    with up.client() as client, pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(model="other", input="a")


def test_a_full_queue_refuses_all_of_the_prompts(tokenizer):
    with serving(tokenizer) as up:
        up.engine.max_queued_requests = 2
        status, found = error(up, input=["a", "b", "c"])
        assert (status, found["code"]) == (429, "queue_full")
        assert up.engine.submitted == []


def test_a_full_queue_is_refused_before_the_body_is_read(tokenizer, pool):
    with serving(tokenizer) as up:
        held(up, pool)
        up.engine.max_queued_requests = 3
        reply = up.post("/v1/embeddings", b"no JSON")
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
        up.engine.may_step.set()


def test_what_the_engine_refuses_names_the_field_that_held_it(up, monkeypatch):
    def refuse(requests):
        raise InvalidRequest("too odd", param="prompt")

    monkeypatch.setattr(up.engine, "submit_all", refuse)
    status, found = error(up, input="a")
    assert (status, found["param"], found["message"]) == (400, "input", "too odd")


def test_a_vector_that_fails_ends_the_others_of_its_call(tokenizer):
    with serving(tokenizer) as up:
        up.engine.poisoned.add(1)
        status, found = error(up, input=["a", "b", "c"])
        assert (status, found["message"]) == (500, "logits are not finite")
        assert not up.service._live


def test_what_waits_too_long_is_a_504_and_cancelled(tokenizer, pool):
    with serving(tokenizer, queue_timeout=0.1) as up:
        reply = held(up, pool).result(10)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
        wait_until(lambda: sorted(up.engine.cancelled) == [0, 1, 2])


def test_who_leaves_is_not_worked_for(up):
    up.engine.may_step.clear()
    with up.connect({"input": [[5, 6], [7]]}, "/v1/embeddings"):
        wait_until(lambda: len(up.engine.live) == 2)
    wait_until(lambda: len(up.engine.cancelled) == 2)
    assert up.service.uploads.n_held == 0
    assert not up.service._live


def test_a_server_that_shuts_down_ends_what_is_embedded(tokenizer, pool):
    with serving(tokenizer) as up:
        future = held(up, pool)
        shut_down = unavailable("the server is shutting down", "draining", 1)
        loop = up.server._loop
        assert loop is not None
        loop.call_soon_threadsafe(up.service.abort_all, shut_down)
        assert future.result(10).json()["error"]["code"] == "draining"
        wait_until(lambda: sorted(up.engine.cancelled) == [0, 1, 2])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_engine_hears_the_pooling(tokenizer, pooling):
    with serving(tokenizer, embedding_pooling=pooling) as up:
        embed(up, input="a")
    assert [request.pooling for request in up.engine.submitted] == [pooling]


def test_unknown_pooling_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="embedding_pooling must be one of last, mean, got 'max'"):
        ServerConfig(embedding_pooling="max")


def test_embeddings_are_counted_as_samples_that_stopped(tokenizer):
    with serving(tokenizer) as up:
        embed(up, input=[[5, 6, 7], [8], [9, 10]])
        shown = up.get("/metrics").text
    labels = '{engine="0",model_name="fake"'
    assert f'fastgen:request_success_total{labels},finished_reason="stop"}} 3' in shown
    assert f"fastgen:request_prompt_tokens_sum{labels}}} 6.0" in shown
    assert f"fastgen:request_params_max_tokens_count{labels}}} 0" in shown


def test_vectors_of_different_keys_share_no_cached_prompt(tokenizer):
    with serving(tokenizer, api_key=("one", "two")) as up:
        for key in ("one", "two", "one"):
            headers = {"authorization": f"Bearer {key}"}
            assert up.post("/v1/embeddings", {"input": "a"}, headers=headers).status_code == 200
    one, two, again = (request.cache_salt for request in up.engine.submitted)
    assert one == again != two


def test_a_vector_that_is_not_finite_is_an_error():
    ask = EmbeddingAsk([[5]], "fake", False, 2)
    with pytest.raises(embeddings.ApiError, match="not finite"):
        answer(ask, [np.array([np.nan, 1.0], np.float32)])
