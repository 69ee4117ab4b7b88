"""The arithmetic of traces, by hand."""

import doctest

import numpy as np
import pytest

from benchmarks import trace
from benchmarks.step_time import split
from benchmarks.trace import Trace, gaps, length, overlap, parse, union


def test_examples_of_intervals_hold():
    assert doctest.testmod(trace).failed == 0 and doctest.testmod(trace).attempted == 3


def test_intervals_agree_with_a_grid():
    rng = np.random.default_rng(0)
    for _ in range(50):
        pairs = [np.sort(rng.integers(0, 60, (n, 2)), axis=1) for n in rng.integers(0, 8, 2)]
        sets = [union((a * 1e6, b * 1e6) for a, b in x if a < b) for x in pairs]
        grids = [{i for a, b in x for i in range(a, b)} for x in pairs]
        assert [length(x) for x in sets] == [len(grid) for grid in grids]
        assert length(overlap(*sets)) == len(grids[0] & grids[1])
        assert length(gaps(sets[0], 10, 50)) == len(set(range(10, 50)) - grids[0])


def event(name: str, start: float, seconds: float, pid: int = 1) -> dict:
    return {"ph": "X", "pid": pid, "name": name, "ts": start * 1e6, "dur": seconds * 1e6}


STEP = [
    event("step", 0, 4),
    event("plan", 0, 0.5),
    event("dispatch", 0.5, 0.5),
    event("wait", 1, 2),
    event("commit", 3, 1),
    event("text", 3.5, 0.2),
    event("step", 4, 4),
    event("wait", 5, 2),
]
PROGRAMS = [event("ThunkExecutor::Execute", 1, 1), event("ThunkExecutor::Execute (wait)", 1.5, 1)]


def test_step_is_split_and_idle_time_has_a_cause():
    found = split(parse(STEP + PROGRAMS), event_loop=1.2)
    assert found.n_steps == 2 and found.step == 4
    want = {"plan": 0.25, "dispatch": 0.25, "wait": 2, "commit": 0.5, "download": 1.25}
    assert found.seconds == pytest.approx(want | {"pack": 0, "mask": 0, "text": 0.1, "HTTP": 0.5})
    assert found.busy == pytest.approx(1.5 / 8)
    idle = {"plan": 0.5, "dispatch": 0.5, "wait": 2.5, "commit": 1, "pack": 0, "mask": 0}
    assert found.idle == pytest.approx({k: v / 8 for k, v in idle.items()} | {"other": 2 / 8})


def test_device_with_tracks_of_its_own_is_busy_when_they_are():
    names = [{"name": "process_name", "ph": "M", "pid": 2, "args": {"name": "/device:GPU:0"}}]
    found: Trace = parse(names + STEP + PROGRAMS + [event("fusion", 6, 1, pid=2)])
    assert found.device.tolist() == [[6, 7]]


def test_folder_without_a_trace_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"expected one trace below .*, found 0"):
        trace.read(tmp_path)
