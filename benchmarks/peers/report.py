"""What benchmarks.peers prints and keeps: one table, and the same as CSV and JSON.

A ratio is of one round, in which all engines had the same requests one after the other: what the
machine does beside them slows a round as a whole, and falls out.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import kept
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


def text(peers: dict[str, str], standings: list[Standing]) -> str:
    """The table, and which engines there were, or why not."""
    said = "\n".join(f"- {name}: {what}" for name, what in peers.items())
    return f"{kept.markdown(rows(standings))}\n\n{said}"


def save(folder: Path, peers: dict[str, str], standings: list[Standing]) -> None:
    """Writes peers.json, .csv and .md; the JSON has the seconds of all rounds too."""
    rounds = [standing._asdict() for standing in standings]
    table = f"# This engine beside others\n\n{text(peers, standings)}"
    kept.save(folder, "peers", rows(standings), table, is_measured=True, peers=peers, rounds=rounds)
