"""Offline throughput of this engine beside others, on one machine, checkpoint and set of requests.

    python -m benchmarks.peers
    python -m benchmarks.peers --engines fastgen_jax openvino --dtype bfloat16 --rounds 7
    python -m benchmarks.peers --out benchmarks/results

A random 125M Llama, greedy, end of sequence ignored; lengths as in benchmarks.engine.throughput.
Every engine has an environment of its own, made at its first use (build/peers, gigabytes); one that
does not install or does not run is listed as absent, with what it said. A round is one turn of
each at the same requests; every round has new ones, so that no prefix cache helps. Ratios are of
single rounds. First all engines generate a little in float32, to see that they compute the same:
the share of tokens that are ours, in each request up to where they part, is a column too.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from benchmarks.engine.throughput import SHAPE, make_workload, write_checkpoint
from benchmarks.peers.contest import Contest, Standing, Worker
from benchmarks.peers.environments import PEERS, Absent, python_of
from benchmarks.peers.report import save, text

CHECK = "8x64+16"


def main() -> None:
    args = parse_args()
    peers: dict[str, str] = {}
    standings: list[Standing] = []
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or folder
        if not args.model:
            write_checkpoint(Path(folder), SHAPE)
        for dtype in args.dtype:
            standings += contest(args, str(model), dtype, peers)
    print(text(peers, standings))
    if args.out:
        save(args.out, peers, standings)


def contest(
    args: argparse.Namespace, model: str, dtype: str, peers: dict[str, str]
) -> list[Standing]:
    """All workloads at one dtype; notes in `peers` who was there."""
    with ExitStack() as stack:
        workers: list[Worker] = []
        for name in args.engines:
            try:
                command = [python_of(name), "-m", f"benchmarks.peers.{name}_worker", model, dtype]
                workers.append(stack.enter_context(Worker(name, command)))
                peers[name] = workers[-1].versions
            except Absent as error:
                peers[name] = f"absent: {error}"
                print(f"  {name} is absent: {error}", file=sys.stderr)
        found = Contest(workers, dtype)
        return [
            standing
            for name in (CHECK, *args.workload)
            for standing in found.standings(name, workloads(name, args.rounds, args.new_std))
        ]


def workloads(name: str, n_rounds: int, new_std: float):
    if name == CHECK:
        return [make_workload(name, 0, 0.0)]
    return [make_workload(name, seed + 1, new_std) for seed in range(n_rounds)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--engines", nargs="+", default=list(PEERS), choices=PEERS, help="the first one is `ours`")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add("--workload", nargs="+", default=["32x256+64", "12x1024+64"], help="REQUESTSxPROMPT+NEW")
    add("--new-std", type=float, default=0.3, help="of output lengths, as a share of their mean")
    add("--rounds", type=int, default=3)
    add("--model", type=Path, help="a Llama checkpoint to measure instead of the random one")
    add("--out", type=Path, help="folder that keeps the table as Markdown, CSV and JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
