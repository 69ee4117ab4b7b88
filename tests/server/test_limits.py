"""What one key may have at once and in a minute: counted, told, and nobody else's."""

import concurrent.futures

import pytest

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.config import ServerConfig
from fastgen_jax.server.errors import ApiError
from fastgen_jax.server.limits import KINDS, Account, Limits, spelled
from tests.server.fake_engine import FakeEngine
from tests.server.running import serving, wait_until
from tests.server.test_deadlines import ROUTES
from tests.server.test_deadlines import ask as late

KEYS = ("one", "two")
BODY = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True}


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def account(max_requests=None, max_tokens=None):
    """An account, its clock, and what it has refused."""
    clock, n_refused = Clock(), dict.fromkeys(KINDS, 0)
    return Account(max_requests, max_tokens, n_refused, clock), clock, n_refused


class TestAccount:
    def test_requests_at_once_are_as_many_as_there_may_be(self):
        mine, _, n_refused = account(max_requests=2)
        for _ in range(2):
            mine.check()
            mine.enter(5)
        with pytest.raises(ApiError, match="2 requests of this API key run or wait, the limit is"):
            mine.check()
        mine.leave()
        mine.check()
        assert n_refused == {"requests": 1, "tokens": 0}

    def test_tokens_used_up_come_back_with_time(self):
        mine, clock, n_refused = account(max_tokens=60)
        mine.check()
        mine.enter(90)  # more than there are: who is let in is let in
        with pytest.raises(ApiError, match="has used up its 60 tokens a minute; try again in 31s"):
            mine.check()
        assert n_refused == {"requests": 0, "tokens": 1}
        clock.now += 31
        mine.check()
        mine.charge(1)
        with pytest.raises(ApiError):
            mine.check()

    def test_no_more_is_saved_than_a_minutes_tokens(self):
        mine, clock, _ = account(max_tokens=60)
        clock.now += 1e9
        mine.enter(60)
        with pytest.raises(ApiError):
            mine.check()

    def test_headers_tell_the_limits_that_there_are(self):
        mine, clock, _ = account(max_requests=3, max_tokens=600)
        mine.enter(100)
        clock.now += 1
        assert mine.headers() == {
            "x-ratelimit-limit-requests": "3", "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "1s", "x-ratelimit-limit-tokens": "600",
            "x-ratelimit-remaining-tokens": "510", "x-ratelimit-reset-tokens": "9s",
        }  # fmt: skip
        assert account()[0].headers() == {}

    def test_an_account_without_limits_refuses_nobody(self):
        mine, _, _ = account()
        for _ in range(1000):
            mine.check()
            mine.enter(10**9)

    def test_each_client_has_one_account(self):
        limits = Limits(1, 1, dict.fromkeys(KINDS, 0))
        assert limits.of(b"a") is limits.of(b"a") is not limits.of(b"b")


@pytest.mark.parametrize(("seconds", "text"), [
    (0, "0s"), (0.0001, "1ms"), (0.25, "250ms"), (1, "1s"), (1.2, "2s"), (59.5, "1m0s"),
    (360, "6m0s"), (7322, "122m2s"),
])  # fmt: skip
def test_times_are_spelled_as_openai_spells_them(seconds, text):
    assert spelled(seconds) == text


@pytest.mark.parametrize("name", ["max_requests_per_key", "max_tokens_per_minute"])
@pytest.mark.parametrize("value", [-1, 10**12 + 1, 10**400])
def test_a_limit_that_is_none_is_refused_at_the_start(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be from 0 to 1000000000000"):
        ServerConfig(**{name: value})


def ask(up, key="one", path="/v1/completions", body=BODY):
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    return up.post(path, body, headers=headers)


def freeze(up) -> Clock:
    """Makes the accounts that a server opens from now on live at one time, which may be moved."""
    clock = Clock()
    up.service.limits._of_each = (*up.service.limits._of_each[:-1], clock)
    return clock


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_key_that_has_its_requests_is_refused_before_the_body_and_others_are_not(
    tokenizer, path, body
):
    with serving(tokenizer, api_key=KEYS, max_requests_per_key=1) as up:
        up.engine.may_step.clear()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            held = [pool.submit(ask, up, key, path, body) for key in KEYS]
            wait_until(lambda: len(up.engine.live) == 2)
            answer = ask(up, "one", path, b"no JSON, and nobody sees it")
            up.engine.may_step.set()
            assert [future.result(10).status_code for future in held] == [200, 200]
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert error["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == answer.headers["x-ratelimit-reset-requests"][:-1]
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert ask(up, "one", path, body).status_code == 200


def test_a_burst_overshoots_no_limit(tokenizer):
    with serving(tokenizer, max_requests_per_key=3) as up:
        up.engine.may_step.clear()
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            asked = [pool.submit(ask, up) for _ in range(20)]
            wait_until(lambda: sum(future.done() for future in asked) == 17)
            assert len(up.engine.live) == 3
            up.engine.may_step.set()
            statuses = sorted(future.result(10).status_code for future in asked)
        assert statuses == [200] * 3 + [429] * 17
        assert up.service.metrics.n_limited == {"requests": 17, "tokens": 0}
        assert up.service.limits.of(b"").n_requests == 0


def test_whatever_ends_a_request_ends_its_count(tokenizer):
    with serving(tokenizer, max_requests_per_key=1) as up:
        up.engine.poisoned.add(0)
        assert ask(up).status_code == 500
        up.engine.may_step.clear()
        assert late(up, "0.05").status_code == 504
        with up.connect(BODY | {"stream": True}):
            wait_until(lambda: up.service.limits.of(b"").n_requests == 1)
        wait_until(lambda: up.service.limits.of(b"").n_requests == 0)
        assert ask(up, body={"prompt": [10**6]}).status_code == 400
        up.engine.may_step.set()
        wait_until(lambda: not up.engine.live)
        assert ask(up, body=BODY | {"prompt": ["a", "b"], "n": 3}).status_code == 200  # is one
        assert up.service.limits.of(b"").n_requests == 0


def test_a_request_that_the_engine_refuses_costs_nothing(tokenizer):
    engine = FakeEngine(tokenizer.eos_token_id, max_queued_requests=1)
    with serving(tokenizer, engine, max_requests_per_key=5, max_tokens_per_minute=100) as up:
        up.engine.may_step.clear()
        assert ask(up, body=BODY | {"prompt": ["a", "b"]}).status_code in (400, 429)
        assert up.service.limits.of(b"").headers()["x-ratelimit-remaining-tokens"] == "100"
        assert up.service.limits.of(b"").n_requests == 0


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_a_key_is_charged_what_usage_says(tokenizer, path, body):
    with serving(tokenizer, api_key=KEYS, max_tokens_per_minute=1000) as up:
        freeze(up)
        answer = ask(up, path=path, body=body)
        n_left = 1000 - answer.json()["usage"]["total_tokens"]
        assert answer.headers["x-ratelimit-remaining-tokens"] == str(n_left)
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert "x-ratelimit-limit-requests" not in answer.headers


def test_a_key_without_tokens_waits_and_others_do_not(tokenizer):
    with serving(tokenizer, api_key=KEYS, max_tokens_per_minute=6) as up:
        clock = freeze(up)
        assert ask(up).status_code == 200  # 3 and 4 tokens
        refused = ask(up, body=b"{")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "20")
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert refused.headers["x-ratelimit-reset-tokens"] == "1m10s"
        assert ask(up, "two").status_code == 200
        clock.now += 20
        assert ask(up).status_code == 200
        shown = up.get("/metrics", headers={"authorization": "Bearer one"}).text
    labels = 'engine="0",model_name="fake"'
    assert f'fastgen:rate_limited_requests_total{{{labels},limit="tokens"}} 1' in shown
    assert f'fastgen:rate_limited_requests_total{{{labels},limit="requests"}} 0' in shown


def test_an_answer_without_limits_tells_none(up):
    assert not [name for name in ask(up).headers if name.startswith("x-ratelimit")]


def test_other_routes_are_not_counted(tokenizer):
    with serving(tokenizer, max_tokens_per_minute=1, max_requests_per_key=1) as up:
        up.service.limits.of(b"").enter(100)
        assert up.post("/tokenize", {"prompt": "a"}).status_code == 200
        assert up.get("/v1/models").status_code == 200
        assert ask(up).status_code == 429
