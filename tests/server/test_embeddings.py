"""Embeddings over HTTP, of an engine that is made up here: a vector is drawn from its ids."""

import asyncio
import base64
import dataclasses

import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen_jax.errors import InvalidRequest, QueueFull
from fastgen_jax.server import embeddings
from fastgen_jax.server.embeddings import EmbeddingAsk, answer, shortened
from tests.server.fake_engine import MAX_TOKENS, VOCAB_SIZE
from tests.server.running import TEXT, Running, serving, wait_until

SIZE = 8  # the made-up model's hidden_size


def vector_of(ids: list[int]) -> np.ndarray:
    vector = np.random.default_rng(ids).normal(size=SIZE)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class FakeEmbed:
    """`embed` of a service. `error` is raised instead; without `may_answer` it never returns."""

    def __init__(self):
        self.asked: list[list[int]] = []
        self.error: Exception | None = None
        self.may_answer = True
        self.n_cancelled = 0

    async def __call__(self, prompts: list[list[int]], cache_salt: bytes) -> list[np.ndarray]:
        self.asked = prompts
        if self.error is not None:
            raise self.error
        try:
            while not self.may_answer:
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.n_cancelled += 1
            raise
        return [vector_of(ids) for ids in prompts]


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving(tokenizer, max_prompts=5) as up:
        up.embed = up.service.embed = FakeEmbed()
        yield up


@pytest.fixture
def up(served):
    yield served
    served.embed.error, served.embed.may_answer = None, True


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


@pytest.mark.parametrize(("given", "asked"), [
    ([5, 6], [[5, 6]]), ([[5, 6], [7]], [[5, 6], [7]]), ([0], [[0]]),
])  # fmt: skip
def test_token_ids_are_taken_as_they_are(up, given, asked):
    assert len(embed(up, input=given)["data"]) == len(asked)
    assert up.embed.asked == asked


def test_texts_and_ids_may_be_mixed_and_special_tokens_left_out(up, tokenizer):
    embed(up, input=["a", [5]], add_special_tokens=False, user="me")
    assert up.embed.asked == [tokenizer.encode("a", add_special_tokens=False), [5]]


def test_base64_holds_the_same_numbers_as_little_endian_floats(up):
    (plain,) = embed(up, input=[5, 6])["data"]
    (spelled,) = embed(up, input=[5, 6], encoding_format="base64")["data"]
    numbers = np.frombuffer(base64.b64decode(spelled["embedding"]), "<f4")
    assert np.array(plain["embedding"], np.float32).tobytes() == numbers.tobytes()


@pytest.mark.parametrize("n", [1, 3, SIZE])
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
    ({"input": "a", "dimensions": SIZE + 1}, "dimensions"),
    ({"input": "a", "dimensions": 2.5}, "dimensions"),
    ({"input": "a", "dimensions": "4"}, "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ({"input": "a", "encoding_format": 1}, "encoding_format"),
    ({"input": "a", "model": 1}, "model"),
    ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD)
def test_what_is_wrong_is_a_400_that_names_the_field(up, body, param):
    up.embed.asked = []
    status, found = error(up, **body)
    assert (status, found["param"]) == (400, param)
    assert up.embed.asked == []


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


@pytest.mark.parametrize(("raised", "status", "param", "code"), [
    (InvalidRequest("too odd", param="prompt"), 400, "input", None),
    (QueueFull("full; try again later"), 429, None, "queue_full"),
    (ZeroDivisionError("secret"), 500, None, "internal_error"),
])  # fmt: skip
def test_what_the_engine_refuses_has_its_status(up, raised, status, param, code):
    up.embed.error = raised
    found_status, found = error(up, input="a")
    assert (found_status, found["param"], found["code"]) == (status, param, code)
    assert "secret" not in found["message"]


def test_what_takes_too_long_is_a_504_and_cancelled(up, monkeypatch):
    route = next(r for r in up.server.config.app.app.routes if r.path == "/v1/embeddings")
    config = dataclasses.replace(up.service.config, queue_timeout=0.1)
    monkeypatch.setattr(route.endpoint.__self__, "config", config)
    up.embed.may_answer, n_before = False, up.embed.n_cancelled
    status, found = error(up, input="a")
    assert (status, found["code"]) == (504, "deadline_exceeded")
    wait_until(lambda: up.embed.n_cancelled == n_before + 1)


def test_who_leaves_is_not_worked_for(up):
    up.embed.may_answer, up.embed.asked, n_before = False, [], up.embed.n_cancelled
    with up.connect({"input": [5, 6]}, "/v1/embeddings"):
        wait_until(lambda: up.embed.asked)
    wait_until(lambda: up.embed.n_cancelled == n_before + 1)
    assert up.service.uploads.n_held == 0


def test_a_vector_that_is_not_finite_is_an_error():
    ask = EmbeddingAsk([[5]], "fake", False, 2)
    with pytest.raises(embeddings.ApiError, match="not finite"):
        answer(ask, [np.array([np.nan, 1.0], np.float32)])
