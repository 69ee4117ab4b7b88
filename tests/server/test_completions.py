"""/v1/completions as the openai client sees it."""

import pytest

from tests.server.running import TEXT, events_of


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

    @pytest.mark.parametrize("stream", [False, True])
    def test_echo_may_be_all_that_is_asked_for(self, up, stream):
        body = {"prompt": ["one", "two"], "max_tokens": 0, "echo": True, "stream": stream}
        answer = up.post("/v1/completions", body)
        replies = events_of(answer.text)[:-1] if stream else [answer.json()]
        choices = [choice for reply in replies for choice in reply["choices"]]
        assert [choice["text"] for choice in choices] == ["one", "two"]
        assert {choice["finish_reason"] for choice in choices} == {"length"}
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == 0

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
