"""What MII's users do, in our words: serve, clients, streams, stress, terminate; on the demo."""

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from fastgen_jax import mii
from fastgen_jax.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineStopped,
    FastGenError,
    InvalidRequest,
    RequestError,
)
from fastgen_jax.mii import Client, Pipeline, Response

ROOT = Path(__file__).parents[2]
SIZES = {
    "max_length": 96, "dtype": "float32", "num_kv_blocks": 64, "max_num_seqs": 8,
    "max_num_batched_tokens": 32, "compilation_cache": str(ROOT / ".pytest_cache/xla"),
}  # fmt: skip
NAME = "fastgen-demo-mii-deployment"
GREEDY = {"do_sample": False, "max_new_tokens": 12}
LONG = {"max_new_tokens": 80, "ignore_eos": True}
PROMPTS = ["DeepSpeed is", "Seattle is"]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    pipe = mii.pipeline(**SIZES)
    yield pipe
    pipe.destroy()


@pytest.fixture(scope="module")
def client(session) -> Iterator[Client]:
    client = mii.serve(max_prompts=6, max_body_bytes=2000, **SIZES)
    yield client
    client.terminate_server()


@pytest.fixture
def doomed(session) -> Iterator[Client]:
    """A server for one test, which it may end."""
    sizes = SIZES | {"max_num_seqs": 1, "max_num_batched_tokens": 16}
    client = mii.serve(deployment_name="doomed", drain_timeout=0.0, **sizes)
    yield client
    client.terminate_server()


def told(responses: list[Response]) -> list[tuple]:
    """All that a user sees."""
    return [
        (r.prompt, r.prompt_token_ids, r.generated_text, r.prompt_length, r.generated_length,
         r.finish_reason, r.outputs[0].token_ids)
        for r in responses
    ]  # fmt: skip


def wait_until(condition: Callable[[], object], seconds: float = 20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def n_running(client: Client) -> int:
    headers = {"authorization": f"Bearer {client.api_key}"}
    metrics = httpx2.get(client.url + "/metrics", headers=headers, trust_env=False).text
    return int(float(re.findall(r"^fastgen:num_requests_running{.*} (.*)$", metrics, re.M)[0]))


def ragged(seed: int, n: int) -> list[str]:
    """Prompts of random lengths, from one word to more than a step takes."""
    rng = random.Random(seed)
    words = ["Tom", "had", "a", "red", "ball", "and", "went", "to", "the", "farm", "by", "Anna"]
    return [" ".join(rng.choices(words, k=rng.randint(1, 45))) for _ in range(n)]


class TestAnswers:
    def test_the_first_script_of_miis_users_runs(self, client, pipe, capsys):
        response = client.generate(PROMPTS, max_new_tokens=12, do_sample=False)
        print(response)
        texts = [r.generated_text for r in pipe(PROMPTS, **GREEDY)]
        assert capsys.readouterr().out == f"[{texts[0]}, {texts[1]}]\n"

    def test_a_client_answers_as_the_pipeline_does(self, client, pipe):
        assert told(client(PROMPTS, **GREEDY)) == told(pipe(PROMPTS, **GREEDY))
        assert told(client("Tom", **GREEDY)) == told(pipe("Tom", **GREEDY))
        ids = pipe("Tom", **GREEDY)[0].prompt_token_ids
        for prompts in (ids, [ids, "Tom"], {"prompt_token_ids": ids}):
            assert told(client(prompts, **GREEDY)) == told(pipe(prompts, **GREEDY))
        assert client([]) == []

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"ignore_eos": True},
            {"max_length": 20},
            {"max_new_tokens": 7, "min_new_tokens": 7, "return_full_text": True},
            {"stop": " a"},
            {"stop": ["boy", "girl"], "max_new_tokens": 20, "max_length": 3},
        ],
    )
    def test_options_mean_what_they_mean_to_the_pipeline(self, client, pipe, options):
        options |= {"do_sample": False}
        prompts = ["Tom", "Once upon a time there"]
        assert told(client(prompts, **options)) == told(pipe(prompts, **options))

    def test_more_prompts_than_a_request_may_have_come_back_in_order(self, client, pipe):
        prompts = ragged(1, 20)
        for options in (GREEDY, {"do_sample": False, "max_length": 90}):
            assert told(client(prompts, **options)) == told(pipe(prompts, **options))

    def test_more_text_than_a_request_may_have_is_sent_in_several(self, client, pipe):
        prompts = ["Tom had a ball. " * 25] * 6
        assert sum(map(len, prompts)) > 2000
        options = {"max_new_tokens": 2, "do_sample": False}
        with pytest.raises(ContextLengthExceeded):
            pipe(prompts, **options)
        with pytest.raises(ContextLengthExceeded):
            client(prompts, **options)
        ids = [[100 + i] * 85 for i in range(6)]
        assert told(client(ids, **options)) == told(pipe(ids, **options))

    def test_ragged_prompts_from_several_threads_are_answered_as_alone(self, client, pipe):
        batches = [ragged(seed, 6) for seed in range(8)]
        expected = [told(pipe(batch, **GREEDY)) for batch in batches]
        clients = [client, mii.client(NAME)]
        with ThreadPoolExecutor(8) as pool:
            jobs = [pool.submit(clients[i % 2], b, **GREEDY) for i, b in enumerate(batches)]
        assert [told(job.result()) for job in jobs] == expected

    def test_awaited_calls_run_at_once_and_beside_a_loop_that_runs(self, client, pipe):
        async def main():
            both = asyncio.gather(*(client.generate_async(p, **GREEDY) for p in PROMPTS))
            return [*await both, client(PROMPTS, **GREEDY)]  # the last as in a notebook

        first, second, both = asyncio.run(main())
        assert told([*first, *second]) == told(both) == told(pipe(PROMPTS, **GREEDY))


class TestStreams:
    def test_the_pieces_are_the_answer(self, client, pipe):
        pieces = list(client.stream("Tom", return_full_text=True, **GREEDY))
        [whole] = pipe("Tom", return_full_text=True, **GREEDY)
        assert len(pieces) > 3
        assert "".join(map(str, pieces)) == str(whole)
        assert [id for p in pieces for id in p.outputs[0].token_ids] == whole.outputs[0].token_ids
        assert [p.finished for p in pieces] == [False] * (len(pieces) - 1) + [True]
        assert {p.prompt_length for p in pieces} == {whole.prompt_length}
        assert pieces[-1].finish_reason == "length"

    def test_miis_callback_gets_the_pieces_and_the_caller_the_whole(self, client, pipe):
        seen = []
        whole = client.generate("Tom", streaming_fn=seen.extend, **GREEDY)
        assert told(whole) == told(pipe("Tom", **GREEDY))
        assert "".join(map(str, seen)) == str(whole[0])
        with pytest.raises(InvalidRequest, match="streaming_fn takes one prompt, not 2"):
            client.generate(PROMPTS, streaming_fn=seen.extend)

    def test_a_stream_that_is_left_ends_on_the_server(self, client):
        stream = client.stream("Tom", **LONG)
        next(stream)
        stream.close()
        wait_until(lambda: n_running(client) == 0)

    def test_a_call_that_is_cancelled_ends_on_the_server(self, client):
        async def main():
            call = asyncio.create_task(client.generate_async(["Tom"] * 4, **LONG))
            while not await asyncio.to_thread(n_running, client):
                assert not call.done()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

        with contextlib.suppress(AssertionError):  # it was faster than we looked
            asyncio.run(main())
        wait_until(lambda: n_running(client) == 0)

    def test_a_stream_that_is_refused_is_an_error_at_its_first_piece(self, client):
        with pytest.raises(InvalidRequest, match="temperature"):
            next(client.stream("Tom", temperature=-1.0))


class TestErrors:
    def test_options_and_prompts_that_cannot_be_served(self, client):
        with pytest.raises(ConfigError, match="'max_new_token'; did you mean 'max_new_tokens'"):
            client("Tom", max_new_token=3)
        with pytest.raises(InvalidRequest, match="max_length=1 must exceed the prompt's"):
            client("Tom", max_length=1)
        with pytest.raises(InvalidRequest, match="prompt 1: a prompt is a text or") as caught:
            client(["Tom", 5.0])
        with pytest.raises(ContextLengthExceeded, match="maximum context length is 96") as caught:
            client("Tom", max_new_tokens=96)
        assert caught.value.param == "prompt"
        with pytest.raises(ContextLengthExceeded, match="maximum context length is 96"):
            client(["Tom", [100] * 96])
        with pytest.raises(InvalidRequest, match="token ids must be in"):
            client([1 << 30], max_new_tokens=2)
        with pytest.raises(InvalidRequest, match="not valid JSON"):
            client("\udc80", max_new_tokens=2)

    def test_none_of_a_list_is_run_if_one_cannot_be(self, client):
        with pytest.raises(ContextLengthExceeded):
            client(["Tom", "Tom", [100] * 96], **GREEDY)
        assert n_running(client) == 0

    def test_a_name_that_is_taken_is_refused_and_leaves_the_first_alone(self, client):
        with pytest.raises(FastGenError, match=f"'{NAME}' is deployed already, at {client.url}"):
            mii.serve()
        assert client.status()["phase"] == "ready"

    def test_a_name_that_nobody_has_is_told_with_those_there_are(self, client):
        with pytest.raises(FastGenError, match=f"no deployment 'other' runs; known: {NAME}"):
            mii.client("other")


class TestClients:
    def test_a_client_is_found_by_the_deployments_name_and_by_the_models(self, client, pipe):
        for name in (NAME, "fastgen-demo"):
            other = mii.client(name)
            assert other.url == client.url
            assert told(other("Tom", **GREEDY)) == told(pipe("Tom", **GREEDY))

    def test_a_url_and_its_key_are_enough(self, client, pipe):
        far = mii.client(client.url + "/", api_key=client.api_key)
        assert told(far(PROMPTS, **GREEDY)) == told(pipe(PROMPTS, **GREEDY))
        with pytest.raises(FastGenError, match="cannot be ended by a client that knows its URL"):
            far.terminate_server()

    def test_without_the_key_nothing_is_said_but_health(self, client):
        for far in (mii.client(client.url), mii.client(client.url, api_key="wrong")):
            assert far.status()["phase"] == "ready"
            with pytest.raises(RequestError, match="a valid API key is needed"):
                far("Tom", max_new_tokens=1)

    def test_proxies_of_the_environment_see_nothing_of_a_server_here(self, client, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
        assert client("Tom", max_new_tokens=1)
        assert client.status()["phase"] == "ready"

    def test_a_server_outlives_who_started_it_and_ends_with_nothing_left(self, session):
        sizes = SIZES | {"max_num_seqs": 1, "max_num_batched_tokens": 16}
        script = f"from fastgen_jax import mii; mii.serve(deployment_name='heir', **{sizes})"
        path = "import sys; sys.path[:] = " + repr(sys.path)
        subprocess.run([sys.executable, "-W", "error", "-c", f"{path}; {script}"], check=True)
        heir = mii.client("heir")
        assert len(heir("Tom", **GREEDY)) == 1
        process = heir._deployment.process
        assert (session / "heir.log").exists()
        heir.terminate_server()
        heir.terminate_server()
        assert not process.is_running
        assert not list(session.glob("heir*"))
        assert heir.status() == {"phase": "ended"}
        with pytest.raises(FastGenError, match="no deployment 'heir' runs"):
            mii.client("heir")


class TestEnd:
    def test_what_runs_when_the_server_ends_is_an_error_never_a_short_answer(self, doomed):
        stream = doomed.stream("Tom", **LONG)
        next(stream)
        ending = threading.Thread(target=doomed.terminate_server)
        ending.start()
        with contextlib.suppress(FastGenError):
            pieces = list(stream)
            assert pieces[-1].finished, "the stream was cut and nobody told"
        ending.join()
        with pytest.raises(EngineStopped, match="the server of 'doomed' has ended"):
            doomed("Tom")

    def test_a_server_that_was_killed_is_told_by_its_log_and_may_be_started_again(
        self, doomed, session
    ):
        stream = doomed.stream("Tom", **LONG)
        next(stream)
        os.kill(doomed._deployment.process.pid, signal.SIGKILL)
        with pytest.raises(FastGenError, match="cannot be reached, or no more"):
            list(stream)

        def has_ended():
            # A killed process has no socket before it is gone.
            with contextlib.suppress(FastGenError):
                return doomed.status() == {"phase": "ended"}

        wait_until(has_ended)
        with pytest.raises(EngineStopped, match=r"(?s)its last lines:.*ready    in"):
            doomed("Tom")
        assert (session / "doomed.log").exists()
        with pytest.raises(FastGenError, match="no deployment 'doomed' runs"):
            mii.client("doomed")
        assert not (session / "doomed.json").exists()
