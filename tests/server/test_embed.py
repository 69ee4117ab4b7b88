"""Service.embed between the event loop and the engine's thread."""

import asyncio
from concurrent.futures import Future

import numpy as np
import pytest

from fastgen_jax.engine.pooling import normalized
from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError, unavailable
from tests.server.fake_engine import MAX_TOKENS, embedding_of
from tests.server.running import TEXT, Running, serving, wait_until

PROMPTS = [[5, 6, 7], [8], [9, 10]]


@pytest.fixture
def up(tokenizer):
    with serving(tokenizer, max_prompts=5) as up:
        yield up


def start(up: Running, prompts=PROMPTS, salt: bytes = b"") -> Future[list[np.ndarray]]:
    """`embed`, called on the event loop."""
    loop = up.server._loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(up.service.embed(prompts, salt), loop)


def refusal(future: Future) -> ApiError:
    with pytest.raises(ApiError) as caught:
        future.result(10)
    return caught.value


def hold(up: Running) -> Future[list[np.ndarray]]:
    """`embed`, whose prompts the engine has and does not work on."""
    up.engine.may_step.clear()
    future = start(up)
    wait_until(lambda: len(up.engine.live) == len(PROMPTS))
    return future


def test_vectors_have_length_one_and_the_order_of_their_prompts(up):
    vectors = start(up).result(10)
    expected = [normalized(embedding_of(prompt)) for prompt in PROMPTS]
    assert np.array_equal(vectors, expected)
    assert not up.service._live


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_engine_hears_the_pooling_and_the_salt(tokenizer, pooling):
    with serving(tokenizer, embedding_pooling=pooling) as up:
        start(up, salt=b"mine").result(10)
    heard = {(request.pooling, request.cache_salt) for request in up.engine.submitted}
    assert heard == {(pooling, b"mine")}


def test_unknown_pooling_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="embedding_pooling must be one of last, mean, got 'max'"):
        ServerConfig(embedding_pooling="max")


def test_a_full_queue_refuses_all_of_the_prompts(up):
    up.engine.max_queued_requests = len(PROMPTS) - 1
    error = refusal(start(up))
    assert (error.status, error.code) == (429, "queue_full")
    assert up.engine.submitted == []


def test_what_is_too_long_is_refused_by_the_name_of_its_field(up):
    error = refusal(start(up, [[5], [6] * (MAX_TOKENS + 1)]))
    assert (error.status, error.param) == (400, "input")
    assert up.engine.submitted == []


def test_a_caller_that_goes_away_cancels_the_work(up):
    future = hold(up)
    future.cancel()
    wait_until(lambda: sorted(up.engine.cancelled) == [0, 1, 2])
    assert not up.service._live


def test_a_vector_that_fails_ends_the_others_of_its_call(up):
    up.engine.poisoned.add(1)
    error = refusal(start(up))
    assert (error.status, error.message) == (500, "logits are not finite")
    assert not up.service._live


def test_a_server_that_shuts_down_ends_what_is_embedded(up):
    future = hold(up)
    shut_down = unavailable("the server is shutting down", "draining", 1)
    up.server._loop.call_soon_threadsafe(up.service.abort_all, shut_down)
    assert refusal(future).code == "draining"
    wait_until(lambda: sorted(up.engine.cancelled) == [0, 1, 2])


def test_what_waits_too_long_is_a_504(tokenizer):
    with serving(tokenizer, queue_timeout=0.1) as up:
        error = refusal(hold(up))
        assert (error.status, error.code) == (504, "deadline_exceeded")
        wait_until(lambda: sorted(up.engine.cancelled) == [0, 1, 2])


def test_embeddings_are_counted_as_samples_that_stopped(up):
    start(up).result(10)
    shown = up.get("/metrics").text
    labels = '{engine="0",model_name="fake"'
    assert f'fastgen:request_success_total{labels},finished_reason="stop"}} 3' in shown
    assert f"fastgen:request_prompt_tokens_sum{labels}}} 6.0" in shown
    assert f"fastgen:request_params_max_tokens_count{labels}}} 0" in shown


def test_openais_client_gets_the_vectors_as_floats_and_as_base64(up, tokenizer):
    with up.client() as client:
        plain = client.embeddings.create(model="fake", input=["a", TEXT], encoding_format="float")
        spelled = client.embeddings.create(model="fake", input=["a", TEXT])  # base64 on the wire
    expected = [normalized(embedding_of(tokenizer.encode(text))) for text in ("a", TEXT)]
    for reply in (plain, spelled):
        found = np.array([entry.embedding for entry in reply.data], np.float32)
        assert np.array_equal(found, expected)


def test_vectors_of_different_keys_share_no_cached_prompt(tokenizer):
    with serving(tokenizer, api_key=("one", "two")) as up:
        for key in ("one", "two", "one"):
            headers = {"authorization": f"Bearer {key}"}
            assert up.post("/v1/embeddings", {"input": "a"}, headers=headers).status_code == 200
    one, two, again = (request.cache_salt for request in up.engine.submitted)
    assert one == again != two


def test_a_full_queue_is_refused_before_the_body_is_read(up):
    hold(up)
    up.engine.max_queued_requests = len(PROMPTS)
    reply = up.post("/v1/embeddings", b"no JSON")
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "queue_full")
