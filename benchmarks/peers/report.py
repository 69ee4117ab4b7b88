"""What benchmarks.peers prints and keeps: one table, and the same as CSV and JSON.

A ratio is of one round, in which all engines had the same requests one after the other: what the
machine does beside them slows a round as a whole, and falls out.
"""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.peers.contest import Standing

COLUMNS: tuple[str, ...] = (
    "requests",
    "dtype",
    "engine",
    "new tokens/s",
    "all tokens/s",
    "ours / it",
    "same tokens",
)


class Report(NamedTuple):
    """Where, when and of what; `peers` are the engines' versions, or why they were not there."""

    date: str
    machine: str
    versions: dict[str, str]
    command: str
    peers: dict[str, str]
    standings: list[Standing]


def make_report(peers: dict[str, str], standings: list[Standing]) -> Report:
    names = ("jax", "jaxlib", "flax", "numpy")
    return Report(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        versions={name: importlib.metadata.version(name) for name in names},
        command=shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]),
        peers=peers,
        standings=standings,
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def rows(standings: list[Standing]) -> list[dict[str, str]]:
    """The table's cells by column; an engine that failed says why."""
    return [row(standing, ours_of(standing, standings)) for standing in standings]


def ours_of(standing: Standing, standings: list[Standing]) -> Standing:
    """The first engine's, of the same requests and dtype."""
    key = standing.workload, standing.dtype
    return next(other for other in standings if (other.workload, other.dtype) == key)


def row(standing: Standing, ours: Standing) -> dict[str, str]:
    cells = [standing.workload, standing.dtype, standing.engine]
    if standing.why_absent or not standing.seconds:
        cells += ["-", "-", "-", standing.why_absent]
    else:
        seconds = statistics.median(standing.seconds)
        rates = (standing.n_new / seconds, (standing.n_new + standing.n_prompt) / seconds)
        cells += [f"{rate:.0f}" for rate in rates]
        cells += [spread(ratios(standing, ours)), f"{standing.same:.0%}"]
    return dict(zip(COLUMNS, cells, strict=True))


def ratios(standing: Standing, ours: Standing) -> list[float]:
    """Our throughput over theirs, a number per round that both ended."""
    return [a / b for a, b in zip(standing.seconds, ours.seconds, strict=False)]


def spread(values: Sequence[float]) -> str:
    """The median, and smallest and largest."""
    if not values:
        return "-"
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def markdown(report: Report) -> str:
    """The table with what it takes to judge it."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells.values()) + " |" for cells in rows(report.standings)]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    lines += ["", f"{report.date}, {report.machine}, {versions}: `{report.command}`.", ""]
    lines += [f"- {name}: {said}" for name, said in report.peers.items()]
    return "\n".join(lines) + "\n"


def save(report: Report, folder: Path) -> Path:
    """Writes peers-DATE.json, .csv and .md, and returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"peers-{report.date}"
    told = report._asdict() | {"standings": [s._asdict() for s in report.standings]}
    path = stem.with_suffix(".json")
    path.write_text(json.dumps(told, indent=1) + "\n")
    stem.with_suffix(".md").write_text(markdown(report))
    with stem.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows(report.standings))
    return path


def load(path: Path) -> Report:
    """What `save` wrote."""
    told: dict[str, Any] = json.loads(path.read_text())
    standings = [Standing(**s | {"seconds": tuple(s["seconds"])}) for s in told.pop("standings")]
    return Report(**told, standings=standings)
