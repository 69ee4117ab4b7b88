"""Every number, id and list that a request may hold, at the values that break others.

The fields come from the models of the bodies, so a new one is tried as soon as it exists.
"""

import os
import subprocess
import sys
import time
import tracemalloc
import typing
from pathlib import Path

import orjson
import pytest

from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server.protocol import ChatRequest, CompletionRequest, GenerationRequest
from tests.server.fake_engine import VOCAB_SIZE, FakeEngine
from tests.server.running import PATHS, serving
from tests.server.test_bad_input import BAD

MODELS = {"completions": CompletionRequest, "chat/completions": ChatRequest}
ALIASES = {"max_completion_tokens": "max_tokens"}  # under which a refusal may name the field
NOT_IDS = [-1, VOCAB_SIZE, 2**31, 2**63, 2**64, 10**300, 1.5, True, None]
ROOT = Path(__file__).parents[2]


def fields(kind: type) -> list[tuple[str, str]]:
    """(path, field) for each field of that type."""
    return [
        (path, name)
        for path, model in MODELS.items()
        for name, hint in typing.get_type_hints(model).items()
        if name in model.model_fields and kind in typing.get_args(hint)
    ]


def ask(up, path: str, field: str, value: str):
    """The answer to a body in which the field has that JSON."""
    body = PATHS[path] | {"max_tokens": 2, "logprobs": path.startswith("chat") or None}
    body.pop(field, None)
    text = orjson.dumps(body)[:-1].decode() + f',"{field}":{value}}}'
    return up.post(f"/v1/{path}", text.encode())


@pytest.mark.parametrize(("path", "field"), fields(float))
def test_floats_that_are_no_numbers_or_too_large_are_refused(up, path, field):
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "-1e308"):
        answer = ask(up, path, field, value)
        assert (value, answer.status_code) == (value, 400)


@pytest.mark.parametrize(("path", "field"), fields(float))
def test_the_smallest_floats_are_served_or_refused_by_name(up, path, field):
    for value in ("-0.0", "5e-324", "-5e-324", "2.2e-308", "1e-400"):
        answer = ask(up, path, field, value)
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(("path", "field"), fields(int))
def test_integers_out_of_range_are_refused_by_name(up, path, field):
    allowed = {
        "seed": range(-(2**63), 2**63), "priority": range(-(2**63), 2**63), "top_k": [-1],
        "truncate_prompt_tokens": range(1, 2**65),  # no prompt is that long: nothing is cut
    }  # fmt: skip
    for value in (-1, -2, -(2**31), -(2**63), -(2**63) - 1, 2**63, 2**64, 10**300, -(10**300)):
        if value in allowed.get(field, ()):
            continue
        answer = ask(up, path, field, str(value))
        assert (value, answer.status_code) == (value, 400)
        assert answer.json()["error"]["param"] in (field, ALIASES.get(field))
    for value in (10**400, -(10**400)):  # beyond what JSON's numbers are read as
        assert ask(up, path, field, str(value)).status_code == 400


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [10**9, 2**31, 2**63 - 1])
def test_a_giant_n_is_refused_at_once_and_takes_no_memory(up, path, value):
    ask(up, path, "n", "0")  # what a first refusal imports
    tracemalloc.start()
    started = time.perf_counter()
    answer = ask(up, path, "n", str(value))
    elapsed = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status_code == 400
    assert elapsed < 0.5  # 3 ms; tracing and a busy machine take more
    assert peak < 2**20


@pytest.fixture(scope="module")
def strict(tokenizer):
    """A server whose engine checks ids as the real one does."""
    from fastgen_jax.engine.admission import check_ids

    class Strict(FakeEngine):
        def _check(self, request: Request):
            super()._check(request)
            check_ids("stop_token_ids", request.params.stop_token_ids, VOCAB_SIZE)
            check_ids("logit_bias", request.params.logit_bias or (), VOCAB_SIZE)
            check_ids("allowed_token_ids", request.params.allowed_token_ids or (), VOCAB_SIZE)

    with serving(tokenizer, Strict(tokenizer.eos_token_id)) as up:
        yield up


@pytest.mark.parametrize("id", NOT_IDS, ids=lambda id: f"{id!r:.12}")
@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/completions", '{"prompt":[%s]}', "prompt"),
    ("/v1/completions", '{"prompt":[5,5,%s,5]}', "prompt"),
    ("/v1/completions", '{"prompt":[[5],[5,%s]]}', "prompt"),
    ("/v1/completions", '{"prompt":"a","stop_token_ids":[%s]}', "stop_token_ids"),
    ("/v1/completions", '{"prompt":"a","logit_bias":{"%s":1}}', "logit_bias"),
    ("/v1/completions", '{"prompt":"a","bad_words":[%s]}', "bad_words"),
    ("/v1/completions", '{"prompt":"a","allowed_token_ids":[%s]}', "allowed_token_ids"),
    ("/v1/chat/completions", '{"messages":[{"role":"user","content":"a"}],"stop_token_ids":[%s]}',
     "stop_token_ids"),
    ("/v1/chat/completions", '{"messages":[{"role":"user","content":"a"}],"logit_bias":{"%s":1}}',
     "logit_bias"),
    ("/detokenize", '{"tokens":[%s]}', "tokens"), ("/detokenize", '{"tokens":[5,%s]}', "tokens"),
])  # fmt: skip
def test_what_is_no_id_of_the_vocabulary_is_refused_wherever_ids_stand(
    strict, path, body, param, id
):
    shown = str(id) if type(id) is int or param == "logit_bias" else orjson.dumps(id).decode()
    answer = strict.post(path, (body % shown).encode())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)
    assert not strict.engine.live


@pytest.mark.parametrize(("path", "body", "status"), [
    ("/v1/completions", {"prompt": ""}, 200), ("/v1/completions", {"prompt": "   \n\t"}, 200),
    ("/v1/completions", {"prompt": []}, 400), ("/v1/completions", {"prompt": [[]]}, 400),
    ("/v1/completions", {"prompt": [""]}, 200), ("/v1/completions", {"prompt": ["", ""]}, 200),
    ("/v1/completions", {"prompt": ["a", []]}, 400), ("/v1/completions", {}, 400),
    ("/v1/completions", {"prompt": [0]}, 200),  # the BOS alone
    ("/v1/completions", {"prompt": "", "add_special_tokens": False}, 400),
    ("/v1/completions", {"prompt": "a", "stop": []}, 200),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400),
    ("/v1/completions", {"prompt": "a", "best_of": 0}, 400),
    ("/v1/completions", {"prompt": "a", "best_of": 10**9}, 400),
    ("/v1/chat/completions", {"messages": []}, 400), ("/v1/chat/completions", {}, 400),
    ("/v1/chat/completions", {"messages": [{}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}]}, 200),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": " "}]}, 200),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": []}]}, 200),
    ("/tokenize", {"prompt": ""}, 200), ("/detokenize", {"tokens": []}, 400),
])  # fmt: skip
def test_nothing_at_all_is_served_or_refused(up, path, body, status):
    assert up.post(path, body).status_code == status
    assert up.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).status_code == 200


SHARED = [
    (change, param)
    for path, change, param in BAD
    if path == "completions" and param in GenerationRequest.model_fields and "prompt" not in change
]


@pytest.mark.parametrize(("change", "param"), SHARED)
def test_both_routes_give_the_same_verdict(up, change, param):
    verdicts = set()
    for path in PATHS:
        body = PATHS[path] | {"max_tokens": 16} | change
        error = up.post(f"/v1/{path}", body).json()["error"]
        verdicts.add((error["type"], error["code"], error["param"], error["message"]))
    assert len(verdicts) == 1
    assert {param for _, _, param, _ in verdicts} == {param}


URLS = ["http://127.0.0.1:9/x", "file:///etc/passwd", "data:image/png;base64,AAAA", "gopher://a"]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("kind", ["image_url", "video_url", "input_audio", "audio_url", "file"])
def test_content_that_would_have_to_be_fetched_is_refused(up, kind, url):
    for value in (url, {"url": url}):
        part = {"type": kind, kind: value}
        body = {"messages": [{"role": "user", "content": [part]}]}
        answer = up.post("/v1/chat/completions", body)
        assert answer.status_code == 400
        assert "may hold only" in answer.json()["error"]["message"]


@pytest.mark.parametrize("prompt", [
    {"prompt_embeds": "gASVAAAA"}, {"type": "tensor", "data": "AAAA"}, "b64:gASVAAAA", [[0.5, 0.5]],
])  # fmt: skip
def test_tensors_are_not_taken(up, prompt):
    answer = up.post("/v1/completions", {"prompt": prompt, "max_tokens": 1})
    assert answer.status_code == (200 if isinstance(prompt, str) else 400)  # text stays text
    n_before = len(up.engine.submitted)
    body = {"prompt_embeds": "gASVAAAA", "multi_modal_data": {"image": "AAAA"}}
    assert up.post("/v1/completions", body).status_code == 400  # for want of a prompt
    assert len(up.engine.submitted) == n_before


@pytest.mark.parametrize("path", PATHS)
def test_the_logprobs_that_an_answer_may_hold_are_bounded(up, path):
    many = {"max_tokens": 4000, "n": 60}
    many |= {"logprobs": True, "top_logprobs": 20} if path.startswith("chat") else {"logprobs": 20}
    error = up.post(f"/v1/{path}", PATHS[path] | many).json()["error"]
    assert error["param"] == "logprobs"
    assert "60 samples of up to 4000 tokens with 21 logprobs" in error["message"]
    assert "at most 4000000" in error["message"]
    few = many | {"max_tokens": 2, "n": 60}
    assert up.post(f"/v1/{path}", PATHS[path] | few).status_code == 200
    del few["max_tokens"], few["n"]
    assert up.post(f"/v1/{path}", PATHS[path] | few).status_code == 200


OPTIMISED = """
import pathlib, tempfile
from tests import tiny_tokenizers
from tests.server.running import PATHS, serving
from tests.server.test_bad_input import BAD
from tests.server.test_wire import CORPUS, exchange, statuses
from fastgen_jax.engine.admission import Admission
from fastgen_jax.engine.types import Request
from fastgen_jax.errors import RequestError
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.tokenizer import Tokenizer

assert False, "asserts run: this is no optimised Python"
with tempfile.TemporaryDirectory() as directory:
    tokenizer = Tokenizer(tiny_tokenizers.byte_level(pathlib.Path(directory)))
with serving(tokenizer) as up:
    for path, change, _ in BAD:
        status = up.post(f"/v1/{path}", PATHS[path] | change).status_code
        if status != 400:
            print(status, path, change)
    for name, wire in CORPUS.items():
        if statuses(exchange(up.address, wire)) != [400]:
            print(name)
    for body in (b"{", b"[]", b"\\xff", b"[" * 10**5, b'{"prompt": NaN}', b'{"prompt": "\\\\ud8"}'):
        if up.post("/v1/completions", body).status_code != 400:
            print(body[:20])
    if up.engine.submitted:
        print(len(up.engine.submitted), "requests reached the engine")
bounds = {"max_requests": 4, "max_model_len": 64, "n_blocks": 9, "block_size": 8, "vocab_size": 5}
for prompt, params in (
    ([], {}), ([5], {}), ([-1], {}), ([2**63], {}), ([1.5], {}), ([1] * 64, {}),
    ([1], {"n": 5}), ([1], {"stop_token_ids": [5]}), ([1], {"logit_bias": {5: 1.0}}),
):
    try:
        Admission(**bounds).check(Request(prompt, SamplingParams(**params)))
        print("admitted", prompt, params)
    except RequestError:
        pass
print("done")
"""


def test_no_check_is_an_assert():
    """What a request is refused for, it is refused for under `python -O` too."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-O", "-c", OPTIMISED]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "done\n", done.stdout + done.stderr


def test_sampling_params_take_no_number_that_is_none():
    """The library's door; the server's own is above."""
    from fastgen_jax.errors import InvalidRequest

    for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"):
        for value in (float("nan"), float("inf"), -float("inf"), 1e308):
            with pytest.raises(InvalidRequest, match=name):
                SamplingParams(**{name: value})
