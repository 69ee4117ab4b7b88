"""The simulation that routers are compared in loses no request and no token."""

import pytest

from benchmarks import simulated_replicas as simulation


@pytest.mark.parametrize("make", [
    simulation.by_tokens_and_prefixes, simulation.by_tokens, simulation.by_requests,
])  # fmt: skip
def test_every_request_is_read_and_written_to_its_end(make):
    asked = simulation.requests(150, rate=50, seed=3)
    last_arrival = asked[-1].time
    seconds, n_hits = simulation.simulate(asked, 3, make(4))
    assert all((each.n_prompt, each.n_output) == (0, 0) for each in asked)
    assert all(each.first >= simulation.STEP for each in asked)
    assert seconds > last_arrival
    assert 0 < n_hits < len(asked)


def test_a_step_is_a_token_of_each_who_owes_one_and_then_chunks_up_to_its_budget():
    replica = simulation.Replica("a")
    asked = simulation.requests(40, rate=1e6, seed=3)
    for request in asked:
        request.n_prompt = 0 if request is asked[-1] else request.n_prompt
        replica.add(request)
    assert replica.step() == pytest.approx(simulation.STEP + simulation.TOKEN * 512)
    assert replica.chunks[0] == (asked[-1], 1)
    assert sum(n_new for _, n_new in replica.chunks) == 512
