"""Figures against numbers worked out by hand, and against slow twins."""

import itertools
import math
import random

import numpy as np
import pytest

from benchmarks.load import measures
from benchmarks.load.client import Record
from benchmarks.load.measures import Goodput, summarise
from fastgen_jax.server.attainment import SLA


def record(sent: float, times: list[float], counts: list[int] | None = None, **fields) -> Record:
    counts = counts or [1] * len(times)
    n = sum(counts)
    made = Record(512, sent=sent, end=times[-1], times=times, counts=counts, n_output=n)
    made.tells_ids = True
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def failed(sent: float, error: str = "status 500") -> Record:
    return Record(512, sent=sent, end=sent + 100.0, error=error)


def drawn(seed: int) -> list[Record]:
    draw, made = random.Random(seed), []
    for i in range(30):
        sent = draw.uniform(0, 10)
        gaps = [draw.expovariate(5) for _ in range(draw.randint(1, 20))]
        times = list(itertools.accumulate(gaps, initial=sent))[1:]
        counts = [draw.choice((1, 1, 2, 3)) for _ in times]
        made.append(record(sent, times, counts, n_prompt=draw.randint(1, 500)))
        if i % 7 == 0:
            made.append(failed(sent, draw.choice(("cut", "status 429"))))
    return made


def test_two_requests_by_hand():
    one = record(0.0, [0.5, 0.6, 0.8])
    two = record(1.0, [1.3, 1.5])
    found = summarise([one, two], n_clients=1)
    assert found["duration"] == 1.5
    assert (found["completed"], found["total_input_tokens"]) == (2, 1024)
    assert found["total_output_tokens"] == 5
    assert found["request_throughput"] == pytest.approx(2 / 1.5)
    assert found["output_throughput"] == pytest.approx(5 / 1.5)
    assert found["total_token_throughput"] == pytest.approx(1029 / 1.5)
    assert found["mean_ttft_ms"] == pytest.approx(400)
    assert found["mean_e2el_ms"] == pytest.approx(650)
    assert found["littles_law_throughput"] == pytest.approx(1 / 0.65)
    assert found["mean_tpot_ms"] == pytest.approx((150 + 200) / 2)
    assert found["mean_itl_ms"] == pytest.approx((100 + 200 + 200) / 3)
    assert found["p50_itl_ms"] == pytest.approx(200)
    assert found["max_concurrent_requests"] == 1


def test_failures_are_counted_and_averaged_nowhere():
    good = [record(0.0, [0.5, 0.6]), record(0.0, [0.5, 0.6])]
    found = summarise([*good, failed(0.0), failed(0.0, "cut"), failed(0.0)], n_clients=2)
    assert (found["completed"], found["failed"]) == (2, 3)
    assert found["errors"] == {"status 500": 2, "cut": 1}
    for name in ("mean_ttft_ms", "p99_itl_ms", "mean_e2el_ms", "littles_law_throughput"):
        assert found[name] == summarise(good, n_clients=2)[name]
    assert found["effective_throughput"]["4"]["attainment"] == 2 / 5


def test_a_run_without_an_answer_has_figures():
    found = summarise([failed(0.0)], n_clients=1)
    assert (found["completed"], found["mean_ttft_ms"]) == (0, 0.0)
    assert found["request_throughput"] == found["littles_law_throughput"] == 0.0
    assert summarise([])["duration"] == 0.0


def test_tokens_of_one_event_share_the_time_since_the_one_before():
    several = record(0.0, [1.0, 1.6, 1.8], counts=[2, 3, 1])
    assert measures.token_gaps(several) == pytest.approx([0.0, 0.2, 0.2, 0.2, 0.2])
    assert sum(measures.token_gaps(several)) == pytest.approx(0.8)


def test_events_of_unknown_tokens_are_told_as_such():
    unknown = record(0.0, [1.0, 1.6, 2.0], n_output=6, tells_ids=False, tells_usage=True)
    assert not unknown.is_counted
    assert measures.token_gaps(unknown) == pytest.approx([0.6, 0.4])
    assert not summarise([unknown])["is_itl_of_tokens"]
    # two tokens an event: the average of 0.3 and 0.2 never exceeds 0.3
    assert measures.slowest_pace(unknown) == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(5))
def test_the_sum_of_the_gaps_is_the_time_of_decoding(seed):
    for one in drawn(seed):
        if not one.error:
            gaps = measures.token_gaps(one)
            assert len(gaps) == one.n_output - 1
            assert sum(gaps) == pytest.approx(one.times[-1] - one.times[0])


def meets(one: Record, rate: float) -> bool:
    """Word by word from the benchmark of DeepSpeedExamples, with pandas' average written out."""
    if one.error or one.times[0] - one.sent > one.n_prompt / 512:
        return False
    gaps, kept = measures.token_gaps(one), 1 - 2 / 17
    for n in range(1, len(gaps) + 1):
        weights = [kept ** (n - 1 - i) for i in range(n)]
        if np.dot(weights, gaps[:n]) / sum(weights) >= 1 / rate:
            return False
    return True


@pytest.mark.parametrize("seed", range(5))
def test_effective_throughput_is_the_naive_one(seed):
    records = drawn(seed)
    seconds = max(r.end for r in records) - min(r.sent for r in records)
    rates = (2.0, 3.0, 4.0, 6.0)
    found = measures.effective_throughput(records, SLA(rates))
    for rate in rates:
        n = sum(meets(one, rate) for one in records)
        assert found[f"{rate:g}"]["requests_per_second"] == pytest.approx(n / seconds)
        assert found[f"{rate:g}"]["attainment"] == n / len(records)
    assert 0 < found["3"]["attainment"] < 1


def test_token_latency_drops_outer_requests_and_last_tokens():
    first, last = record(0.0, [1.0, 9.0, 99.0]), record(9.0, [10.0, 90.0])
    inner = record(1.0, [2.0, 2.1, 2.4, 7.0])
    assert measures.token_latency([last, inner, first]) == pytest.approx([0.1, 0.3])


def test_percentiles_interpolate():
    found = measures.statistics([0.1, 0.2, 0.3, 0.4])
    assert found["p50"] == pytest.approx(250)
    assert found["p90"] == pytest.approx(370)
    assert found["std"] == pytest.approx(math.sqrt(1.25) * 100)


@pytest.mark.parametrize("seed", range(3))
def test_peaks_are_the_naive_ones(seed):
    records = [one for one in drawn(seed) if not one.error]
    start = min(one.sent for one in records)
    at = [int(t - start) for one in records for t, n in zip(one.times, one.counts, strict=True)
          for _ in range(n)]  # fmt: skip
    assert measures.peak_tokens(records) == max(map(at.count, at))
    under_way = [sum(o.sent <= one.sent < o.end for o in records) for one in records]
    assert measures.peak_requests(records) == max(under_way)


def test_goodput_asks_for_all_bounds():
    one, two = record(0.0, [0.1, 0.2, 0.3]), record(0.0, [0.1, 0.2, 0.5])
    found = summarise([one, two], goodput=Goodput(ttft=150, tpot=150))
    assert found["request_goodput"] == pytest.approx(1 / 0.5)
    assert "request_goodput" not in summarise([one])
