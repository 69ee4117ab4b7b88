"""The service level: FastGen's moving average, the window by a clock of ours, the gauges."""

import math
import random

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastgen_jax.errors import ConfigError
from fastgen_jax.server.attainment import SLA, Attainment, Pace
from fastgen_jax.server.config import ServerConfig
from tests.server.running import TEXT, Running, serving, wait_until


def averages(times: list[float], span: int = 16) -> list[float]:
    """pandas' ewm(span).mean(), as its documentation defines it."""
    kept = 1 - 2 / (span + 1)
    found = []
    for n in range(1, len(times) + 1):
        weights = [kept ** (n - 1 - i) for i in range(n)]
        found.append(sum(w * t for w, t in zip(weights, times, strict=False)) / sum(weights))
    return found


def slowest(times: list[float]) -> float:
    pace = Pace()
    for seconds in times:
        pace.add(seconds)
    return pace.slowest


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_average_of_two_times_is_as_by_hand():
    # weights 15/17 and 1: (0.1 * 15/17 + 0.3) / (32/17) = 6.6 / 32
    assert slowest([0.1, 0.3]) == pytest.approx(0.20625)
    assert slowest([0.3, 0.1]) == pytest.approx(0.3)
    assert slowest([]) == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_slowest_is_the_greatest_of_all_averages(seed):
    draw = random.Random(seed)
    times = [draw.expovariate(5.0) for _ in range(draw.randint(1, 300))]
    assert slowest(times) == pytest.approx(max(averages(times)), rel=1e-12)


@pytest.mark.parametrize(
    ("n_prompt", "first", "pace", "met"),
    [
        (512, 1.0, 0.0, [True, True]),
        (512, 1.001, 0.0, [False, False]),
        (1024, 2.0, 0.25, [True, False]),
        (1024, 2.0, 0.249, [True, True]),
        (1024, 2.0, 0.5, [False, False]),
    ],
)
def test_a_level_asks_for_the_first_token_and_for_the_pace(n_prompt, first, pace, met):
    assert SLA(token_rates=(2.0, 4.0)).met(n_prompt, first, pace) == met


def test_a_time_for_the_first_token_takes_the_place_of_the_prompts_rate():
    sla = SLA(token_rates=(4.0,), first_token=0.2)
    assert sla.met(10**6, 0.2, 0.0) == [True]
    assert sla.met(10**6, 0.21, 0.0) == [False]


def test_samples_leave_the_window_with_the_second_in_which_they_ended(clock):
    attainment = Attainment(SLA(token_rates=(2.0, 4.0)), window=10, clock=clock)
    attainment.ended(512, 0.5, 0.3)  # slower than 4 tokens/s
    clock.now = 104.5
    attainment.ended(512, 0.5, 0.1)
    attainment.failed()
    assert attainment.shares() == [2 / 3, 1 / 3]
    assert attainment.throughputs() == [2 / 4.5, 1 / 4.5]
    clock.now = 109.9
    assert attainment.shares() == [2 / 3, 1 / 3]
    clock.now = 110.0  # the first one is out; the window began at 101
    assert attainment.shares() == [1 / 2, 1 / 2]
    assert attainment.throughputs() == [1 / 9, 1 / 9]
    clock.now = 200.0
    assert all(map(math.isnan, attainment.shares()))
    assert attainment.throughputs() == [0.0, 0.0]


def test_who_left_counts_only_where_he_was_late(clock):
    attainment = Attainment(SLA(token_rates=(2.0, 4.0)), clock=clock)
    attainment.ended(512, 0.5, 0.3, is_whole=False)
    assert math.isnan(attainment.shares()[0])
    assert attainment.shares()[1] == 0.0
    attainment.ended(512, 2.0, 0.0, is_whole=False)
    assert attainment.shares() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(5))
def test_the_window_is_what_a_list_of_all_samples_says(clock, seed):
    draw = random.Random(seed)
    attainment, ended = Attainment(SLA(token_rates=(4.0,)), window=7, clock=clock), []
    for _ in range(500):
        clock.now += draw.expovariate(3.0)
        is_met = draw.random() < 0.5
        attainment.ended(512, 0.1 if is_met else 2.0, 0.0)
        ended.append((int(clock.now), is_met))
        inside = [is_met for second, is_met in ended if second > int(clock.now) - 7]
        assert attainment.shares() == [sum(inside) / len(inside)]
    assert len(attainment._seconds) <= 7


def gauges(up: Running, name: str) -> dict[str, float]:
    """By token rate."""
    families = text_string_to_metric_families(up.get("/metrics").text)
    samples = [s for family in families for s in family.samples if s.name == f"fastgen:{name}"]
    return {sample.labels["token_rate"]: sample.value for sample in samples}


@pytest.fixture
def served(tokenizer):
    with serving(tokenizer, sla_ttft_ms=60000.0, sla_token_rate=(0.001, 1e9)) as up:
        yield up


class TestGauges:
    def test_before_any_request_the_share_is_no_number(self, served):
        assert all(map(math.isnan, gauges(served, "sla_attainment_ratio").values()))
        assert gauges(served, "effective_throughput_per_second") == {"0.001": 0.0, "1e+09": 0.0}

    def test_samples_that_ended_are_told_by_level(self, served):
        served.post("/v1/completions", {"prompt": TEXT, "max_tokens": 5, "n": 2})
        assert gauges(served, "sla_attainment_ratio") == {"0.001": 1.0, "1e+09": 0.0}
        throughput = gauges(served, "effective_throughput_per_second")
        assert throughput["0.001"] > 0
        assert throughput["1e+09"] == 0.0

    def test_a_request_that_fails_meets_nothing(self, served):
        served.engine.may_step.clear()
        with served.connect({"prompt": TEXT, "max_tokens": 5}) as failing:
            wait_until(lambda: served.engine.live)
            served.engine.poisoned |= {id for id, _ in served.engine.live}
            served.engine.may_step.set()
            assert failing.recv(65536).startswith(b"HTTP/1.1 500")
        served.post("/v1/completions", {"prompt": TEXT, "max_tokens": 5})
        assert gauges(served, "sla_attainment_ratio") == {"0.001": 0.5, "1e+09": 0.0}

    def test_a_client_that_leaves_in_time_is_not_counted(self, served):
        served.engine.may_step.clear()
        with served.connect({"prompt": TEXT, "max_tokens": 5}):
            wait_until(lambda: served.engine.live)
        wait_until(lambda: served.engine.cancelled)
        served.engine.may_step.set()
        assert math.isnan(gauges(served, "sla_attainment_ratio")["0.001"])

    def test_embeddings_and_scores_have_no_service_level(self, served):
        served.post("/v1/embeddings", {"input": TEXT})
        served.post("/v1/completions", {"prompt": TEXT, "max_tokens": 0, "prompt_logprobs": 1})
        assert math.isnan(gauges(served, "sla_attainment_ratio")["0.001"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sla_token_rate": (0.0,)}, "more than 0, got"),
        ({"sla_prompt_rate": math.inf}, "more than 0, got"),
        ({"sla_ttft_ms": -1.0}, "more than 0, got"),
        ({"sla_token_rate": (4.0, 4.0)}, "each rate once"),
        ({"sla_window": 0}, "from 1 to 3600 seconds, got 0"),
    ],
)
def test_levels_that_no_answer_can_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**options)
