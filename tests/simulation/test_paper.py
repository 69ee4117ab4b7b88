"""Published numbers are read off simulated curves as they were read off the paper's."""

import pytest

from benchmarks.simulation import paper

CURVE = {
    n: {"mean latency": float(n), "little": 2.0 - 1 / n, "effective@4": 1.5 - n / 8,
        "requests/s": 1.5} for n in (1, 2, 4)
}  # fmt: skip


def test_a_rate_is_read_between_two_points_and_not_beyond():
    assert paper.rate_at(CURVE, 3.0) == pytest.approx((1.5 + 1.75) / 2)
    assert paper.latency_at(CURVE, 1.5) == pytest.approx(2.0)
    assert paper.rate_at(CURVE, 0.5) != paper.rate_at(CURVE, 0.5)  # nan
    assert paper.best_gain(CURVE, CURVE) == pytest.approx(1)


def test_who_fails_is_told_where_most_succeed():
    assert paper.missed(CURVE, 4) == pytest.approx(1 - (1.5 - 1 / 8) / 1.5)


def test_splitfuse_is_ahead_of_prompts_first_as_in_the_paper():
    ours, theirs = (paper.run(setup, 2600, 128, 16, 96) for setup in paper.SYSTEMS.values())
    assert ours["token P95"] < 0.5 * theirs["token P95"]
    assert ours["effective@4"] > 1.5 * theirs["effective@4"]
    assert ours["little"] > theirs["little"]


def test_the_hosts_share_of_a_step_is_what_the_curve_leaves_of_the_median():
    assert paper.implied_host() == pytest.approx(0.070 - 0.0317, abs=5e-4)


def test_every_published_number_has_a_row():
    found = {(row.what, row.system) for row in paper.rows()}
    assert len(found) == len(paper.rows()) == 24
