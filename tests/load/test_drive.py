"""Arrivals have the statistics that they should, and every turn ends in a record."""

import asyncio
import math
import time

import numpy as np
import pytest

from benchmarks.load.client import Asker
from benchmarks.load.drive import MAX_IN_VAIN, Run, arrival_gaps, closed, opened
from benchmarks.load.measures import peak_requests
from benchmarks.load.stub import Stub
from benchmarks.load.workloads import Turn
from tests.load.running import asker

ONE = [Turn("one two", 2, 4)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness(burstiness):
    gaps = arrival_gaps(40_000, 20.0, burstiness=burstiness, seed=1)
    assert np.mean(gaps) == pytest.approx(1 / 20, rel=0.03)
    variation = np.std(gaps) / np.mean(gaps)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.03)


def test_poisson_arrivals_of_a_second_vary_as_much_as_their_mean():
    times = np.cumsum(arrival_gaps(40_000, 20.0, seed=2)).astype(int)
    counts = np.bincount(times)[:-1]
    assert np.var(counts) == pytest.approx(np.mean(counts), rel=0.1)


def test_an_infinite_rate_is_all_at_once():
    assert arrival_gaps(3, math.inf) == [0.0] * 3


def drive(stub: Stub, load, **options) -> Run:
    async def run() -> Run:
        async with stub.listening() as port:
            made = Run(asker(port, **options))
            await load(made)
            return made

    return asyncio.run(run())


def test_a_closed_loop_has_no_more_requests_under_way_than_clients():
    run = drive(Stub(interval=0.003), lambda run: closed(run, [ONE] * 20, 4))
    assert len(run.records) == 20
    assert not any(record.error for record in run.records)
    assert 1 < peak_requests(run.records) <= 4


def test_an_open_loop_sends_whatever_becomes_of_earlier_ones():
    gaps = [0.01] * 10
    run = drive(Stub(interval=0.05), lambda run: opened(run, [ONE] * 10, gaps))
    assert peak_requests(run.records) > 2
    dues = [record.due for record in run.records]
    assert np.diff(dues) == pytest.approx(0.01)
    assert all(record.sent >= record.due for record in run.records)
    limited = drive(Stub(interval=0.01), lambda run: opened(run, [ONE] * 10, gaps, 2))
    assert peak_requests(limited.records) <= 2


def test_a_server_that_dies_ends_the_run_at_once():
    """Whose later arrivals are minutes away."""
    stub, started = Stub(faults={3: "dies"}), time.monotonic()
    gaps = [0.01] * 30 + [600.0] * 10
    run = drive(stub, lambda run: opened(run, [ONE] * 40, gaps))
    assert time.monotonic() - started < 60
    errors = [record.error for record in run.records]
    assert len(errors) == 40
    assert errors[:4] == ["", "", "", "cut"]
    assert errors.count("no connection") >= MAX_IN_VAIN
    assert errors[-10:] == ["not sent"] * 10


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_turn_continues_what_was_said(as_ids):
    turns = [Turn([1, 2] if as_ids else "one", 2, 3), Turn([3] if as_ids else " two", 1, 2)]
    stub = Stub()
    drive(stub, lambda run: closed(run, [turns], 1))
    prompts = [body["prompt"] for body in stub.bodies]
    assert prompts == ([[1, 2], [1, 2, 7, 7, 7, 3]] if as_ids else ["one", "one a a a two"])


def test_a_turn_of_a_chat_continues_its_messages():
    stub = Stub()
    turns = [Turn("one", 1, 2), Turn("two", 1, 2)]
    drive(stub, lambda run: closed(run, [turns], 1), backend="openai-chat")
    said = [(message["role"], message["content"]) for message in stub.bodies[1]["messages"]]
    assert said == [("user", "one"), ("assistant", " a a"), ("user", "two")]


def test_after_a_failed_turn_the_later_ones_are_not_sent():
    run = drive(Stub(faults={0: "500"}), lambda run: closed(run, [ONE * 3], 1))
    assert [record.error for record in run.records] == ["status 500", "not sent", "not sent"]


def test_bodies_ask_for_what_counts_tokens():
    fields = {"temperature": 0.5, "ignore_eos": True}
    one = asker(1)._replace(fields=fields)
    assert isinstance(one, Asker)
    body = one.body([], ONE[0])
    for wanted in (b'"include_usage":true', b'"return_token_ids":true', b'"ignore_eos":true'):
        assert wanted in body
    assert b"return_token_ids" not in one._replace(asks_ids=False).body([], ONE[0])
