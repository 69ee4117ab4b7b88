"""What the engine's record of steps is made into, and the simulator fed with the engine's steps."""

import pytest

from benchmarks.simulation import validation
from benchmarks.simulation.measures import Record
from benchmarks.simulation.replica import Job
from fastgen_jax.engine.history import StepRecord
from fastgen_jax.engine.surface import Surface, Work
from tests.tiny import make_engine

SETTING = validation.Setting(20, 10, 3)


def test_work_of_a_step_counts_what_attention_computes():
    chunks = [(1, 1, 9, 9), (2, 4, 6, 10)]
    step = StepRecord(1, 0.0, 0.1, 8, 2, 0, 0, chunks)
    assert step.work == Work(5, 15, 9 + (3 + 4 + 5 + 6))


@pytest.fixture(scope="module")
def driver(folder):
    return validation.Driver(make_engine(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


def jobs(n, n_clients):
    return [Job(0.001 * i if i < n_clients else 0.0, 20, 10) for i in range(n)]


def test_every_token_of_clients_is_timed_and_all_steps_but_the_last_are_noted(driver):
    record = Record()
    driver.run(asked := jobs(12, 3), 3, record)
    assert [len(job.times) for job in asked] == [10] * 12
    assert min(record.first) > 0
    computed = sum(work.n_tokens for work, _ in driver.steps)
    assert 12 * 29 - 32 <= computed <= 12 * 29
    assert all(seconds > 0 for _, seconds in driver.steps)


def test_arrivals_are_not_before_their_time(driver):
    asked = [Job(0.02 * i, 5, 2) for i in range(6)]
    driver.run(asked, None, Record())
    assert all(job.times[0] > job.time for job in asked)
    assert [round(job.time, 3) for job in asked] == [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]


def test_rows_are_judged_by_rate_and_latency():
    real = dict.fromkeys(validation.SHOWN, 1.0)
    close, far = real | {"token P95": 3.0}, real | {"latency P95": 1.2}
    rows = [validation._row(SETTING, real, found, None) for found in (close, far)]
    assert validation.is_close(rows[:1])
    assert not validation.is_close(rows)
    text = validation.text(rows, Surface(1e-3, 1e-3, 1e-5, 0, 0, (8, 16)))
    assert "1 differ by more than 15%" in text
