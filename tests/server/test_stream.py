"""Server-sent events: chunks, usage, order, and how a stream ends."""

import asyncio
import re
import select
import threading
import time

import orjson
import pytest

from tests.server.running import (
    CHAT,
    PATHS,
    TEXT,
    events_of,
    serving,
    wait_until,
)


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

    @pytest.mark.parametrize("path", PATHS)
    def test_a_long_backlog_of_logprobs_is_sent_in_pieces(self, up, path):
        wants = (
            {"logprobs": True, "top_logprobs": 20} if path.startswith("chat") else {"logprobs": 20}
        )
        body = PATHS[path] | {"max_tokens": 500, "n": 2, "ignore_eos": True} | wants
        whole = up.post(f"/v1/{path}", body).json()["choices"]
        up.engine.may_step.clear()
        with up.connect(body | {"stream": True}, f"/v1/{path}") as connection:
            wait_until(lambda: up.engine.live)
            # The loop is kept busy until all tokens are there, as by a reader that does not read.
            holds, n_wanted = threading.Event(), up.engine.n_generated + 1000
            asyncio.run_coroutine_threadsafe(self._hold(up, holds, n_wanted), up.server._loop)
            assert holds.wait(5)
            up.engine.may_step.set()
            received = b""
            while b"[DONE]" not in received:
                received += connection.recv(65536)
        events = re.findall(rb"data: (\{.*\})\n\n", received)
        chunks = [orjson.loads(event)["choices"][0] for event in events]
        for choice in whole:
            own = [chunk for chunk in chunks if chunk["index"] == choice["index"]]
            assert 5 <= len(own) < 10
            assert [chunk["finish_reason"] for chunk in own] == [None] * (len(own) - 1) + ["length"]
            assert self._tokens(own) == self._tokens([choice])

    async def _hold(self, up, holds, n_wanted):
        holds.set()
        while up.engine.n_generated < n_wanted:
            time.sleep(0.001)  # on purpose: nothing else runs on the loop

    def _tokens(self, choices):
        parts = [choice["logprobs"] for choice in choices]
        return [t for part in parts for t in part.get("tokens") or part["content"]]

    def test_unread_chunks_are_merged_into_one(self, tokenizer):
        # The reader reads nothing until all 3000 tokens were made.
        body = {"prompt": TEXT, "max_tokens": 3000, "stream": True, "ignore_eos": True}
        with serving(tokenizer) as up, up.connect(body) as slow:
            wait_until(lambda: up.engine.n_generated == 3000)
            received = slow.recv(65536)
            while b"[DONE]" not in received:
                received += slow.recv(65536)
        assert received.count(b'"text"') < 1500
