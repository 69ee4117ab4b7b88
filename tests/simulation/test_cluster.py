"""Replicas by a virtual clock: queueing theory, conservation, one seed one result."""

import itertools

import numpy as np
import pytest

from benchmarks.simulation import prefixes, workloads
from benchmarks.simulation.cluster import ROUTERS, Cluster, Failure, round_robin
from benchmarks.simulation.measures import Record, worst_average
from benchmarks.simulation.replica import Job, Replica, sizes
from benchmarks.simulation.setup import Setup

SMALL = Setup(chip="h100", model="llama-3-8b", n_chips=1, budget=512)


def run(setup: Setup, n: int, *, rate=None, clients=None, failures=(), seed=1):
    record = Record()
    cluster = setup.cluster(record, failures=failures)
    jobs = workloads.skewed(400, 30, seed=seed)
    if rate:
        cluster.run(workloads.arriving(jobs, rate, n, seed), None)
    else:
        cluster.run(workloads.of_clients(jobs, clients, n, seed), clients)
    return record, cluster


@pytest.mark.parametrize("routing", ROUTERS)
def test_every_request_ends_and_every_replica_is_left_empty(routing):
    record, cluster = run(SMALL._replace(n_replicas=5, routing=routing), 400, rate=150)
    assert len(record) == 400
    assert min(record.first) > 0
    for replica in cluster.replicas:
        pool = replica.placement.blocks.pool
        assert pool.n_free == pool.n_usable
        assert (replica.jobs, replica.n_outstanding, replica.due) == ({}, 0, None)
        assert 0 < replica.busy <= cluster.now


def test_littles_law_holds_for_clients():
    """Those that are open, on average over time, are rate times latency; here they are known."""
    record, _ = run(SMALL, 2000, clients=16)
    rate = len(record) / record.elapsed
    assert rate * np.mean(record.seconds) == pytest.approx(16, rel=0.02)


def test_a_lone_server_of_random_arrivals_waits_as_theory_says():
    """One row and one step a request make an M/D/1 queue: wait = rho / (2 (1 - rho)) services, as
    Pollaczek and Khinchine found; here nothing is planned ahead.
    """
    config = sizes(budget=8, max_seqs=1, n_blocks=9, block_size=8, max_model_len=16)
    record = Record()
    replica = Replica("0", config, lambda work: 1.0, is_ahead=False)
    jobs = (Job(0.0, 4, 1) for _ in itertools.count())
    rho = 0.7
    Cluster([replica], round_robin(0), record.add).run(workloads.arriving(jobs, rho, 20_000))
    assert np.mean(record.seconds) - 1 == pytest.approx(rho / (2 * (1 - rho)), rel=0.05)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    setup = SMALL._replace(n_replicas=4, routing="two-choices")
    first, again, other = (run(setup, 300, rate=100, seed=s)[0].summary() for s in (1, 1, 2))
    assert first == again
    assert first["mean latency"] != other["mean latency"]


def test_what_a_lost_replica_had_begun_has_failed_and_the_rest_goes_elsewhere():
    lost = (Failure(1.0, 0, 0.5),)
    record, cluster = run(SMALL._replace(n_replicas=3), 600, rate=250, failures=lost)
    assert record.n_failed > 0
    assert cluster.n_resent > 0
    assert len(record) + record.n_failed == 600
    quiet, _ = run(SMALL._replace(n_replicas=3), 600, rate=250)
    assert len(quiet) == 600
    assert np.percentile(record.first, 99) > np.percentile(quiet.first, 99)


def test_requests_fail_while_no_replica_is_there():
    record, _ = run(SMALL, 100, rate=50, failures=(Failure(0.5, 0, 0.5),))
    assert record.n_failed > 10
    assert len(record) + record.n_failed == 100


def test_fewest_tokens_make_first_tokens_wait_less_than_turns_do():
    late = {}
    for routing in ("least-tokens", "round-robin"):
        record, _ = run(SMALL._replace(n_replicas=8, routing=routing), 800, rate=650)
        late[routing] = np.percentile(record.first, 95)
    assert late["least-tokens"] < 0.9 * late["round-robin"]


@pytest.mark.parametrize("router", prefixes.ROUTERS)
def test_requests_that_share_documents_end_under_every_router(router):
    record = Record()
    cluster = prefixes.make_cluster(3, prefixes.ROUTERS[router](4), record)
    cluster.run(prefixes.requests(100, rate=50, seed=3))
    assert len(record) == 100
    assert record.n_reused > prefixes.DOCUMENT // 2
    assert min(record.first) > prefixes.STEP


def test_moving_average_is_the_weighted_mean_of_all_gaps_so_far():
    gaps = [0.1, 0.4, 0.05, 0.3, 0.02]
    weights = (1 - 2 / 17) ** np.arange(len(gaps))
    means = [np.average(gaps[: i + 1][::-1], weights=weights[: i + 1]) for i in range(len(gaps))]
    assert worst_average(gaps) == pytest.approx(max(means))
    assert worst_average([]) == 0


def test_a_service_level_asks_for_the_first_token_and_for_the_pace():
    record = Record()
    for first, gap in ((1.0, 0.2), (1.0, 0.3), (3.0, 0.2)):
        record.add(Job(0.0, 1024, 3, times=[first, first + gap, first + 2 * gap]))
    record.add(Job(0.0, 1024, 3, has_failed=True))
    assert record.has_met(4).tolist() == [True, False, False]
    assert record.has_met(2).tolist() == [True, True, False]
    assert record.summary()["effective@4"] == pytest.approx(1 / 3.4)
    assert record.summary()["failed"] == 1
