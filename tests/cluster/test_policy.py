"""Where requests go, without Ray."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen_jax.cluster.policy import BUSIER, Budget, Placement, choose, wanted_replicas
from fastgen_jax.cluster.ticket import Ticket

NAMES = ["a", "b", "c", "d"]
LOADS = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 10_000))


def rng() -> random.Random:
    return random.Random(0)


@given(LOADS, st.integers(0, 2**32))
def test_of_two_replicas_the_one_with_fewer_outstanding_tokens_is_taken(loads, seed):
    pair = ["a", "b"]
    taken = choose(pair, loads, holder=None, n_saved=0, rng=random.Random(seed))
    assert loads.get(taken, 0) == min(loads.get(name, 0) for name in pair)


@given(LOADS, st.integers(0, 2**32))
def test_the_busiest_of_many_is_never_taken_unless_all_are_as_busy(loads, seed):
    taken = choose(NAMES, loads, holder=None, n_saved=0, rng=random.Random(seed))
    others = [loads.get(name, 0) for name in NAMES if name != taken]
    assert loads.get(taken, 0) <= max(others)


@given(LOADS, st.integers(0, 4096), st.integers(0, 2**32))
def test_who_holds_the_prefix_is_taken_unless_it_is_a_share_busier(loads, n_saved, seed):
    taken = choose(NAMES, loads, holder="c", n_saved=n_saved, rng=random.Random(seed))
    excess = loads.get("c", 0) - n_saved
    if excess <= (1 + BUSIER) * min(loads.get(name, 0) for name in NAMES):
        assert taken == "c"
    if excess > (1 + BUSIER) * max(loads.get(name, 0) for name in NAMES):
        assert taken != "c"


def test_a_holder_that_is_gone_is_not_taken():
    assert choose(["a"], {}, holder="c", n_saved=9999, rng=rng()) == "a"


def test_the_next_request_with_the_longest_known_prefix_goes_to_the_same_replica():
    placement = Placement(rng())
    placement.place("1", "d", Ticket(cost=10, prefixes=(b"x", b"xy")))
    placement.place("2", "b", Ticket(cost=10, prefixes=(b"x", b"xz")))
    assert placement.rank(NAMES, Ticket(prefixes=(b"x", b"xy", b"xyz")))[0] == "d"


def test_a_request_that_was_lost_goes_elsewhere_if_there_is_another_replica():
    placement, ticket = Placement(rng()), Ticket(prefixes=(b"x",), tried=["a", "b"])
    placement.place("1", "a", ticket)
    ranked = placement.rank(["a", "b", "c"], ticket)
    assert ranked[0] == "c"
    assert sorted(ranked) == ["a", "b", "c"]
    assert placement.rank(["a"], ticket) == ["a"]


@given(st.lists(st.tuples(st.sampled_from("123"), st.sampled_from(NAMES), st.integers(1, 99))))
def test_outstanding_tokens_are_those_of_open_requests_and_end_at_none(moves):
    placement, there = Placement(rng()), {}
    for request, replica, cost in moves:
        placement.place(request, replica, Ticket(cost=cost))
        there[request] = (replica, cost)
        total = {name: sum(c for r, c in there.values() if r == name) for name in NAMES}
        assert placement.outstanding == {name: n for name, n in total.items() if n}
    for request, (replica, _) in there.items():
        placement.end(request, "elsewhere")  # an earlier attempt, over late
        placement.end(request, replica)
        placement.end(request, replica)
    assert placement.outstanding == {}


def test_what_is_remembered_of_prefixes_is_bounded(monkeypatch):
    monkeypatch.setattr("fastgen_jax.cluster.policy.MAX_PREFIXES", 3)
    placement = Placement(rng())
    for i in range(9):
        placement.place(str(i), "a", Ticket(prefixes=(bytes([i]),)))
    assert len(placement._holders) == 3


@given(st.lists(st.booleans(), max_size=300))
def test_no_more_than_a_share_and_a_burst_is_sent_again(wants):
    budget, n_sent = Budget(burst=8), 0
    for n, wants_again in enumerate(wants, 1):
        budget.earn()
        n_sent += wants_again and budget.spend()
        assert n_sent <= 8 + Budget.SHARE * n


@pytest.mark.parametrize(("waiting", "requests", "wanted"), [
    (0, 0, 0), (0, 1, 1), (0, 9, 2), (100, 1, 1), (101, 1, 2), (1000, 3, 10)
])  # fmt: skip
def test_replicas_are_as_many_as_waiting_tokens_and_running_requests_need(
    waiting, requests, wanted
):
    found = wanted_replicas(
        n_waiting_tokens=waiting, n_requests=requests, waiting_tokens=100, max_num_seqs=8
    )
    assert found == wanted
