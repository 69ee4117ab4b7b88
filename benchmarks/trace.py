"""A profile of the server, as jax.profiler writes it: intervals by name, and what lies in which.

All times are seconds. An interval set is an array "N 2" of starts and ends, in order, of which no
two touch: `union` makes one of any intervals, and the others expect them.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What runs programs: on CPU these events, of any thread; elsewhere all that a device's tracks hold.
CPU_PROGRAM = "ThunkExecutor::Execute"
DEVICE = "/device:"


class Trace(NamedTuple):
    """Interval sets of events by name, of the host's threads, and of the device at work."""

    events: dict[str, np.ndarray]
    counts: dict[str, int]
    device: np.ndarray


def read(folder: Path) -> Trace:
    """The only trace below a folder.

    Raises:
        ValueError: there is none, or several.
    """
    found = [*folder.rglob("*.trace.json.gz")]
    if len(found) != 1:
        raise ValueError(f"expected one trace below {folder}, found {len(found)}")
    return parse(json.loads(gzip.decompress(found[0].read_bytes()))["traceEvents"])


def parse(events: list[dict[str, Any]]) -> Trace:
    """From events in Chrome's format (microseconds)."""
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    by_name, on_device = defaultdict(list), []
    for event in events:
        if event.get("ph") != "X":
            continue
        interval = event["ts"], event["ts"] + event.get("dur", 0.0)
        if processes.get(event["pid"], "").startswith(DEVICE):
            on_device.append(interval)
        else:
            by_name[event["name"]].append(interval)
    on_device = on_device or [
        interval
        for name, intervals in by_name.items()
        if name.startswith(CPU_PROGRAM)
        for interval in intervals
    ]
    sets = {name: union(intervals) for name, intervals in by_name.items()}
    return Trace(sets, {name: len(x) for name, x in by_name.items()}, union(on_device))


def union(intervals: Iterable[tuple[float, float]]) -> np.ndarray:
    """Of microseconds, in seconds.

    >>> union([(5e6, 6e6), (0.0, 2e6), (1e6, 3e6)]).tolist()
    [[0.0, 3.0], [5.0, 6.0]]
    """
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return np.array(merged, np.float64).reshape(-1, 2) / 1e6


def length(intervals: np.ndarray) -> float:
    return float((intervals[:, 1] - intervals[:, 0]).sum())


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What is in both.

    >>> overlap(np.array([[0.0, 3.0], [5.0, 6.0]]), np.array([[2.0, 5.5]])).tolist()
    [[2.0, 3.0], [5.0, 5.5]]
    """
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i, 0], b[j, 0]), min(a[i, 1], b[j, 1])
        if start < end:
            found.append((start, end))
        if a[i, 1] < b[j, 1]:
            i += 1
        else:
            j += 1
    return np.array(found, np.float64).reshape(-1, 2)


def gaps(intervals: np.ndarray, start: float, end: float) -> np.ndarray:
    """What is in none of them, from start to end.

    >>> gaps(np.array([[0.0, 3.0], [5.0, 6.0]]), 1.0, 8.0).tolist()
    [[3.0, 5.0], [6.0, 8.0]]
    """
    edges = np.concatenate([[start], intervals.ravel(), [end]]).reshape(-1, 2)
    return overlap(edges[edges[:, 0] < edges[:, 1]], np.array([[start, end]]))
