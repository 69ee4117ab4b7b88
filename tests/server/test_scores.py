"""Logprobs of prompts: completions' echo as OpenAI had it, and vLLM's prompt_logprobs."""

import itertools
from types import SimpleNamespace

import orjson
import pytest

from fastgen_jax.server.formats import choices
from fastgen_jax.server.formats.choices import PIECE_ENTRIES, PIECE_TOKENS
from fastgen_jax.server.reader import MAX_LOGPROB_ENTRIES
from tests.server.running import CHAT, TEXT, events_of
from tests.tiny_tokenizers import BOS

ECHO = {"prompt": TEXT, "echo": True, "logprobs": 1, "max_tokens": 1}


def choices_of(up, body) -> list[dict]:
    return up.post("/v1/completions", body).json()["choices"]


def streamed(up, body) -> dict[int, dict]:
    """What a stream's chunks say together, by choice."""
    answer, texts = up.post("/v1/completions", body | {"stream": True}), {}
    for chunk in events_of(answer.text)[:-1]:
        for choice in chunk["choices"]:
            whole = texts.setdefault(choice["index"], {"text": "", "logprobs": {}})
            whole["text"] += choice["text"]
            for name, values in (choice["logprobs"] or {}).items():
                whole["logprobs"].setdefault(name, []).extend(values)
            whole["finish_reason"] = choice["finish_reason"]
    return texts


class TestEcho:
    def test_logprobs_are_those_of_the_prompt_and_of_what_follows(self, up, tokenizer):
        (choice,), ids = choices_of(up, ECHO), tokenizer.encode(TEXT)
        told = choice["logprobs"]
        said = [*ids, ids[1]]
        assert told["tokens"] == [tokenizer.token_text(id) for id in said]
        assert told["token_logprobs"] == [None, *(-i / 8 for i in range(1, len(ids))), -0.5]
        assert told["top_logprobs"][0] is None
        for token, logprob, top in list(zip(*map(told.get, COLUMNS), strict=True))[1:]:
            assert top[token] == logprob == max(top.values())

    def test_offsets_are_places_in_the_text(self, up):
        (choice,) = choices_of(up, ECHO | {"max_tokens": 9})
        told, text = choice["logprobs"], choice["text"]
        assert told["tokens"][0] == BOS  # which the text does not show
        for token, start in list(zip(told["tokens"], told["text_offset"], strict=True))[1:]:
            assert text[start : start + len(token)] == token

    def test_offsets_count_characters_that_take_several_tokens(self, up):
        (choice,) = choices_of(up, ECHO | {"prompt": "é😀a", "max_tokens": 1})
        told = choice["logprobs"]
        assert told["text_offset"][told["tokens"].index("a")] == 2

    @pytest.mark.parametrize("form", ["text", "ids", "texts", "lists of ids"])
    def test_prompts_come_as_texts_or_ids_alone_or_in_lists(self, up, tokenizer, form):
        ids = tokenizer.encode(TEXT)
        prompt = {"text": TEXT, "ids": ids, "texts": [TEXT, "two"], "lists of ids": [ids, ids[:3]]}
        choices = choices_of(up, ECHO | {"prompt": prompt[form]})
        assert choices[0] == choices_of(up, ECHO)[0]
        assert len(choices) == (1 if form in ("text", "ids") else 2)
        n_last = {"texts": len(tokenizer.encode("two")), "lists of ids": 3}.get(form, len(ids))
        assert len(choices[-1]["logprobs"]["tokens"]) == n_last + 1

    def test_without_a_token_the_prompt_is_scored_alone(self, up, tokenizer):
        reply = up.post("/v1/completions", ECHO | {"max_tokens": 0}).json()
        (choice,), n_prompt = reply["choices"], len(tokenizer.encode(TEXT))
        assert (choice["text"], choice["finish_reason"]) == (TEXT, "length")
        assert len(choice["logprobs"]["tokens"]) == n_prompt
        assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (
            n_prompt,
            0,
        )

    @pytest.mark.parametrize("n", [1, 3])
    @pytest.mark.parametrize("max_tokens", [1, 20])
    def test_streams_say_the_same(self, up, n, max_tokens):
        ask = ECHO | {"prompt": [TEXT * 9, "two"], "n": n, "max_tokens": max_tokens}
        whole, parts = choices_of(up, ask), streamed(up, ask)
        assert len(whole) == len(parts) == 2 * n
        for choice in whole:
            assert len(choice["logprobs"]["tokens"]) > PIECE_TOKENS or choice["index"] >= n
            assert {name: choice[name] for name in parts[0]} == parts[choice["index"]]

    def test_a_stream_of_a_prompt_alone_ends_too(self, up):
        ask = ECHO | {"max_tokens": 0}
        (choice,) = choices_of(up, ask)
        assert streamed(up, ask)[0] == {name: choice[name] for name in streamed(up, ask)[0]}

    def test_each_sample_begins_with_its_prompt(self, up):
        one, *others = choices_of(up, ECHO | {"n": 3, "best_of": 3})
        assert [other | {"index": 0} for other in others] == [one, one]

    def test_stop_strings_are_not_looked_for_in_the_prompt(self, up):
        (choice,) = choices_of(up, ECHO | {"max_tokens": 99, "stop": "red"})
        assert choice["text"] == TEXT + TEXT.partition("red")[0]
        assert choice["stop_reason"] == "red"

    def test_ids_that_are_asked_for_are_the_samples(self, up, tokenizer):
        (choice,) = choices_of(up, ECHO | {"return_token_ids": True, "max_tokens": 2})
        ids = tokenizer.encode(TEXT)
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids[1:3])

    def test_what_truncation_cut_is_not_repeated(self, up):
        (choice,) = choices_of(up, ECHO | {"max_tokens": 0, "truncate_prompt_tokens": 3})
        assert choice["text"] == "".join(choice["logprobs"]["tokens"])
        assert len(choice["logprobs"]["tokens"]) == 3


COLUMNS = ("tokens", "token_logprobs", "top_logprobs")


class TestPromptLogprobs:
    def test_completions_tell_them_as_vllm_does(self, up, tokenizer):
        body = {"prompt": TEXT, "max_tokens": 2, "prompt_logprobs": 2, "n": 2}
        ids = tokenizer.encode(TEXT)
        for choice in choices_of(up, body):
            first, second, *rest = choice["prompt_logprobs"]
            assert first is None
            assert len(rest) == len(ids) - 2
            text = tokenizer.token_text(ids[1])
            assert second[str(ids[1])] == {"logprob": -0.125, "rank": 1, "decoded_token": text}
            assert list(second) == [str(ids[1]), str(ids[1] + 1)]
            assert choice["logprobs"] is None

    def test_chats_tell_them_beside_their_choices(self, up, tokenizer):
        body = {"messages": CHAT, "max_tokens": 0, "prompt_logprobs": 0}
        reply = up.post("/v1/chat/completions", body).json()
        ids = tokenizer.apply_chat_template(CHAT)
        told = reply["prompt_logprobs"]
        assert [list(entry) for entry in told[1:]] == [[str(id)] for id in ids[1:]]
        assert told[1][str(ids[1])]["rank"] is None  # with no rival nobody knows it
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["usage"]["completion_tokens"] == 0

    def test_they_are_told_to_who_asks(self, up):
        assert "prompt_logprobs" not in choices_of(up, {"prompt": TEXT})[0]
        reply = up.post("/v1/chat/completions", {"messages": CHAT})
        assert "prompt_logprobs" not in reply.json()

    def test_echo_and_they_have_their_own_numbers_of_rivals(self, up):
        (choice,) = choices_of(up, ECHO | {"prompt_logprobs": 3})
        assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {3}
        assert {len(entry) for entry in choice["logprobs"]["top_logprobs"][1:]} == {1}
        assert up.engine.submitted[-1].params.prompt_logprobs == 3


@pytest.mark.parametrize(("change", "param"), [
    ({"prompt_logprobs": 21}, "prompt_logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"echo": True, "logprobs": 21}, "logprobs"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
])  # fmt: skip
def test_what_cannot_be_scored_is_refused_by_name(up, change, param):
    reply = up.post("/v1/completions", {"prompt": TEXT} | change)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("ask", [
    {"echo": True, "logprobs": 20, "max_tokens": 1}, {"prompt_logprobs": 20, "max_tokens": 1},
])  # fmt: skip
def test_logprobs_of_prompts_count_before_any_is_made(up, ask):
    n_before = len(up.engine.submitted)
    n_prompts = MAX_LOGPROB_ENTRIES // (21 * 4000 * 8) + 1
    error = up.post("/v1/completions", {"prompt": [[5] * 4000] * n_prompts, "n": 8} | ask).json()[
        "error"
    ]
    assert "after prompts of" in error["message"]
    assert error["param"] == ("logprobs" if "echo" in ask else "prompt_logprobs")
    assert len(up.engine.submitted) == n_before


def test_two_tokens_that_look_the_same_are_both_told(up, tokenizer):
    """Parts of characters do, and lm-eval asks whether the token itself was the likeliest."""
    first, second = itertools.islice(
        (id for id in range(300) if tokenizer.token_text(id) == "\ufffd"), 2
    )
    assert second == first + 1  # the fake's rival of a token is the next one
    (choice,) = choices_of(up, ECHO | {"prompt": [5, first], "logprobs": 2, "max_tokens": 0})
    top = choice["logprobs"]["top_logprobs"][1]
    assert top == {"\ufffd": -0.125, f"token_id:{second}": -1.125}


@pytest.mark.parametrize("ask", [{"echo": True, "logprobs": 3}, {"prompt_logprobs": 3}])
def test_no_piece_of_a_long_answer_takes_long_to_spell(up, monkeypatch, ask):
    """orjson lets nobody else run meanwhile."""
    lengths: list[int] = []

    def dumps(value):
        lengths.extend([len(value)] if isinstance(value, list) else [])
        return orjson.dumps(value)

    monkeypatch.setattr(choices, "orjson", SimpleNamespace(dumps=dumps, Fragment=orjson.Fragment))
    prompt = [5] * (2 * PIECE_ENTRIES)
    (choice,) = choices_of(up, {"prompt": prompt, "max_tokens": 1} | ask)
    told = choice.get("prompt_logprobs") or choice["logprobs"]["tokens"]
    assert len(told) >= len(prompt)
    assert max(lengths) == PIECE_ENTRIES
