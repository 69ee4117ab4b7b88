"""Results of benchmarks.serve as the pictures of DeepSpeed-FastGen's evaluation. Extra: bench.

    python -m benchmarks.load.figures build/results/*.json --out build/results

A line or bar for each label (--label of benchmarks.serve). Points are what was measured, in order
of load: nothing is fitted, and throughput and latency of a point are of one run.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

Result = Mapping[str, Any]
BAR = 0.8  # of the room that a group of bars has
SIZE = (6.4, 4.0)  # inches
DOTS = 150  # to the inch


class MissingMatplotlib(RuntimeError):
    """There is no matplotlib."""


def figure() -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        message = "pictures need matplotlib; pip install 'fastgen-jax[bench]'"
        raise MissingMatplotlib(message) from error
    made = Figure(figsize=SIZE, dpi=DOTS, layout="constrained")
    return made, made.subplots()


def by_label(
    results: Sequence[Result], name: Callable[[Result], str] = lambda result: result["label"]
) -> dict[str, list[Result]]:
    """Each label's results, in order of load."""
    labels = dict.fromkeys(map(name, results))
    return {label: sorted((r for r in results if name(r) == label), key=load) for label in labels}


def with_replicas(result: Result) -> str:
    n = result["metadata"].get("replicas")
    return result["label"] + (f", {n} replicas" if n else "")


def load(result: Result) -> float:
    """Clients, or requests a second of an open loop."""
    clients = result.get("num_clients")
    return float(result["request_rate"]) if clients is None else float(clients)


def throughput_latency(results: Sequence[Result]) -> "Figure":
    """Mean latency over requests a second, a point for each load."""
    made, axes = figure()
    for label, runs in by_label(results, with_replicas).items():
        throughputs = [run["request_throughput"] for run in runs]
        latencies = [run["mean_e2el_ms"] / 1e3 for run in runs]
        axes.plot(throughputs, latencies, marker="o", label=label)
    return labelled(made, axes, "throughput, requests/s", "mean latency, s")


def effective_throughput(results: Sequence[Result]) -> "Figure":
    """The best of a sweep at each service level, and the load at which it was."""
    made, axes = figure()
    groups = by_label(results, with_replicas)
    rates = [rate for rate in results[0]["effective_throughput"]
             if all(rate in result["effective_throughput"] for result in results)]  # fmt: skip
    for i, (label, runs) in enumerate(groups.items()):
        best = [max(runs, key=lambda run, rate=rate: effective(run, rate)) for rate in rates]
        heights = [effective(run, rate) for run, rate in zip(best, rates, strict=True)]
        bars = axes.bar(places(i, len(groups), len(rates)), heights, BAR / len(groups), label=label)
        axes.bar_label(
            bars, [f"{h:.3g}\n@ {load(r):g}" for h, r in zip(heights, best, strict=True)]
        )
    axes.margins(y=0.2)
    axes.set_xticks(range(len(rates)), rates)
    y = "effective throughput, requests/s\n(and the load at which it was)"
    return labelled(made, axes, "service level, tokens/s", y)


def effective(result: Result, rate: str) -> float:
    return result["effective_throughput"][rate]["requests_per_second"]


def token_latency(results: Sequence[Result]) -> "Figure":
    """Percentiles of the time between tokens, at the greatest load that all labels have."""
    made, axes = figure()
    groups = by_label(results, with_replicas)
    common = set.intersection(*({load(run) for run in runs} for runs in groups.values()))
    names = ("p50", "p90", "p95")
    for i, (label, runs) in enumerate(groups.items()):
        at = max(common, default=load(runs[-1]))
        (run, *_) = [run for run in runs if load(run) == at]
        heights = [run[f"{name}_token_latency_ms"] for name in names]
        title = f"{label} @ {at:g}"
        bars = axes.bar(places(i, len(groups), len(names)), heights, BAR / len(groups), label=title)
        axes.bar_label(bars, fmt="{:.3g}")
    axes.margins(y=0.1)
    axes.set_xticks(range(len(names)), [name.upper() for name in names])
    return labelled(made, axes, "percentile", "time between tokens, ms")


def replica_scaling(results: Sequence[Result]) -> "Figure":
    """The best throughput with each number of replicas, and what so many times the fewest's is."""
    made, axes = figure()
    for label, runs in by_label([r for r in results if "replicas" in r["metadata"]]).items():
        best: dict[int, float] = {}
        for run in runs:
            n = int(run["metadata"]["replicas"])
            best[n] = max(best.get(n, 0.0), run["request_throughput"])
        numbers = sorted(best)
        axes.plot(numbers, [best[n] for n in numbers], marker="o", label=label)
        ideal = [best[numbers[0]] * n / numbers[0] for n in numbers]
        axes.plot(numbers, ideal, linestyle=":", color="grey")
        axes.set_xticks(numbers)
    return labelled(made, axes, "replicas", "throughput, requests/s (dotted: linear)")


def places(i: int, n_series: int, n_groups: int) -> list[float]:
    """Where the bars of one series stand."""
    return [group + BAR * ((i + 0.5) / n_series - 0.5) for group in range(n_groups)]


def labelled(made: "Figure", axes: "Axes", x: str, y: str) -> "Figure":
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.set_axisbelow(True)
    axes.grid(alpha=0.3)
    made.legend(loc="outside upper center", ncols=3)
    return made


FIGURES: dict[str, Callable[[Sequence[Result]], "Figure"]] = {
    "throughput-latency": throughput_latency,
    "effective-throughput": effective_throughput,
    "token-latency": token_latency,
}


def draw(results: Sequence[Result], directory: Path) -> list[Path]:
    """Writes the pictures that these results can fill.

    Raises:
        MissingMatplotlib: the extra is not installed.
    """
    wanted = dict(FIGURES)
    if len({result["metadata"].get("replicas") for result in results} - {None}) > 1:
        wanted["replica-scaling"] = replica_scaling
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, make in wanted.items():
        paths.append(directory / f"{name}.png")
        make(results).savefig(paths[-1])
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of benchmarks.serve")
    parser.add_argument("--out", type=Path, default=Path(), help="directory of the pictures")
    args = parser.parse_args()
    results = [orjson.loads(path.read_bytes()) for path in args.results]
    try:
        paths = draw(results, args.out)
    except MissingMatplotlib as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, paths)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
