"""HTTP and gRPC are two doors to one room: the same verdict, field and tokens for every request."""

import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from fastgen_jax.server.rpc import fastgen_pb2 as messages
from fastgen_jax.server.rpc.fastgen_pb2_grpc import FastGenStub
from fastgen_jax.server.rpc.statuses import CODES
from tests.server.fake_engine import VOCAB_SIZE
from tests.server.running import TEXT, Running, serving
from tests.server.test_grpc import channel_to, field_of

N_REQUESTS = 400
N_RIVALS = 3
FLOATS = (-0.0, 0.0, 0.5, 1.0, 1.5, 2.1, -2.0, -2.1, 1e308, 5e-324)
INTEGERS = (-(2**63), -1, 0, 1, 2, 3, 5, 2**31, 2**63 - 1)
IDS = (0, 5, VOCAB_SIZE - 1, VOCAB_SIZE, -1, 2**31, 2**62)
WORDS = ("", "red", "a", "\n", "x" * 2000, "é", "\0")
FIELDS: dict[str, tuple] = {
    "model": ("fake", "./fake", "other", ""),
    **dict.fromkeys(("temperature", "top_p", "min_p", "presence_penalty"), FLOATS),
    **dict.fromkeys(("frequency_penalty", "repetition_penalty"), FLOATS),
    **dict.fromkeys(("max_tokens", "min_tokens", "n", "top_k", "seed"), INTEGERS),
    **dict.fromkeys(("logprobs", "truncate_prompt_tokens", "priority"), INTEGERS),
    **dict.fromkeys(("ignore_eos", "include_stop_str_in_output"), (True, False)),
    **dict.fromkeys(("skip_special_tokens", "add_special_tokens", "echo"), (True, False)),
    "cache_salt": WORDS,
}
LISTS = {"stop": WORDS, "bad_words": WORDS, "stop_token_ids": IDS, "allowed_token_ids": IDS}
FORMS = (
    {"json": '{"type": "integer"}'}, {"json": "{"}, {"regex": "[0-9]+"}, {"regex": "["},
    {"choice": ["a", "b"]}, {"choice": [""]}, {"json_object": True}, {"grammar": "nonsense"},
)  # fmt: skip
CHAT_HAS_NOT = ("echo", "add_special_tokens")


@pytest.fixture(scope="module")
def shared(tokenizer) -> Iterator[Running]:
    with serving(tokenizer, rpc=True) as running:
        yield running


def bodies(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Bodies of /v1/completions: each of the fields' values alone, then some together."""
    for name, values in FIELDS.items():
        yield from ({name: value} for value in values)
    for name, values in LISTS.items():
        yield from ({name: [value]} for value in values)
    yield from ({"logit_bias": {str(id): bias}} for id in IDS for bias in (1.0, -200.0))
    yield from ({"structured_outputs": form} for form in FORMS)
    while True:
        names = rng.sample(sorted(FIELDS), rng.randint(1, 4))
        body = {name: rng.choice(FIELDS[name]) for name in names}
        name = rng.choice(sorted(LISTS))
        yield body | {name: rng.choices(LISTS[name], k=rng.randint(1, 40))}


def prompts(rng: random.Random) -> Any:
    choices = (TEXT, "", "\0", [1, 2, 3], [VOCAB_SIZE], [-1], "a " * 5000)
    if rng.random() < 0.6:
        return TEXT
    return rng.choice(choices) if rng.random() < 0.6 else rng.choices(choices, k=rng.randint(2, 4))


def as_message(body: dict[str, Any]) -> messages.GenerateRequest:
    body = dict(body)
    given = body.pop("prompt", None)
    if "messages" not in body:
        entries = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        body["prompt"] = [as_prompt(entry) for entry in entries]
    if "logit_bias" in body:
        body["logit_bias"] = {int(id): bias for id, bias in body["logit_bias"].items()}
    if "choice" in body.get("structured_outputs", {}):
        texts = body["structured_outputs"]["choice"]
        body["structured_outputs"] = {"choice": {"texts": texts}}
    return messages.GenerateRequest(**body)


def as_prompt(entry: Any) -> messages.Prompt:
    if isinstance(entry, str):
        return messages.Prompt(text=entry)
    return messages.Prompt(token_ids=messages.TokenIds(ids=entry))


def by_http(up: Running, path: str, body: dict[str, Any]) -> Any:
    """The field at fault and the code, or the tokens."""
    reply = up.post(path, body | {"return_token_ids": True})
    if reply.status_code != 200:
        return CODES[reply.status_code], reply.json()["error"]["param"]
    return [(c["token_ids"], c["finish_reason"]) for c in reply.json()["choices"]]


def by_grpc(stub: FastGenStub, body: dict[str, Any]) -> Any:
    try:
        answer = stub.Generate(as_message(body))
    except grpc.RpcError as error:
        return error.code(), field_of(error)  # type: ignore[attr-defined]
    return [(list(choice.token_ids), choice.finish_reason) for choice in answer.choices]


def test_prompts_have_the_same_verdict_and_tokens(up):
    rng, n_good = random.Random(0), 0
    with channel_to(up) as channel:
        stub = FastGenStub(channel)
        for _, body in zip(range(N_REQUESTS), bodies(rng), strict=False):
            body = {"prompt": prompts(rng)} | body
            expected = by_http(up, "/v1/completions", body)
            assert by_grpc(stub, body) == expected, body
            n_good += isinstance(expected, list)
    assert N_REQUESTS * 0.1 < n_good < N_REQUESTS * 0.9


def test_chats_have_the_same_verdict_and_tokens(up):
    rng, n_good = random.Random(1), 0
    with channel_to(up) as channel:
        stub = FastGenStub(channel)
        for _, body in zip(range(N_REQUESTS), bodies(rng), strict=False):
            if body.keys() & {*CHAT_HAS_NOT}:
                continue
            role = rng.choice(("user", "system", "assistant", "nobody"))
            body = {"max_tokens": 8} | body | {"messages": [{"role": role, "content": TEXT}]}
            http = {k: v for k, v in body.items() if k != "logprobs"}
            if "logprobs" in body:
                http |= {"logprobs": True, "top_logprobs": body["logprobs"]}
            expected = by_http(up, "/v1/chat/completions", http)
            if expected == (CODES[400], "top_logprobs"):
                expected = (CODES[400], "logprobs")
            assert by_grpc(stub, body) == expected, body
            n_good += isinstance(expected, list)
    assert n_good > N_REQUESTS * 0.05


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "presence_penalty",
                                   "frequency_penalty", "repetition_penalty"])  # fmt: skip
def test_numbers_that_json_has_not_are_refused_by_name(up, field):
    with channel_to(up) as channel:
        for value in (float("nan"), float("inf"), float("-inf")):
            told = by_grpc(FastGenStub(channel), {"prompt": TEXT, field: value})
            assert told == (grpc.StatusCode.INVALID_ARGUMENT, field)
