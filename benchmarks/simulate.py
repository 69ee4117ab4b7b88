"""Serving by a virtual clock: any policy, chip, model and number of replicas, without any of them.

    python -m benchmarks.simulate run --chip h100 --model llama-3-8b --policy orca --rate 4
    python -m benchmarks.simulate run --chip a100 --chips 4 --clients 16 --replicas 16
    python -m benchmarks.simulate paper              # FastGen's evaluation, predicted
    python -m benchmarks.simulate scaling            # 1 to 1,024 replicas, and one that is lost
    python -m benchmarks.simulate validate           # against the engine, on this machine
    python -m benchmarks.simulate speed              # requests simulated a CPU second

The scheduler, placement and block pool are the product's own.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

from benchmarks import kept
from benchmarks.policies import POLICIES
from benchmarks.simulation import paper, scaling, workloads
from benchmarks.simulation.chips import CHIPS, MODELS
from benchmarks.simulation.cluster import ROUTERS
from benchmarks.simulation.measures import Record
from benchmarks.simulation.setup import Setup

RESULTS = Path(__file__).with_name("results")


def run(args: argparse.Namespace) -> None:
    setup = Setup(**{name: getattr(args, name) for name in Setup._fields if hasattr(args, name)})
    record = Record(one_in=max(args.requests // 10_000, 1))
    jobs = workloads.LENGTHS[args.lengths](
        args.prompt, args.new, longest=args.max_model_len, seed=args.seed
    )
    cluster = setup.cluster(record, seed=args.seed)
    if args.rate:
        cluster.run(workloads.arriving(jobs, args.rate, args.requests, args.seed))
    else:
        n = args.clients
        cluster.run(workloads.of_clients(jobs, n, args.requests, args.seed), n)
    print(f"{setup}")
    for name, value in record.summary().items():
        print(f"{name:16} {value:12.4g}")
    print(f"{'preemptions':16} {sum(r.placement.n_preemptions for r in cluster.replicas):12}")


def reproduce(args: argparse.Namespace) -> None:
    host = paper.implied_host() if args.host is None else args.host
    alone, waiting = paper.simulate(), paper.simulate(host)
    rows = paper.table(alone, waiting)
    text = paper.text(rows, alone, waiting)
    print(text)
    if args.save:
        points = [*paper.points(alone), *paper.points(waiting)]
        kept.save(RESULTS, "simulated_paper", rows, text, host=host, curves=points)


def scale(args: argparse.Namespace) -> None:
    rows = []
    for row in scaling.study(args.sizes, args.requests_each, args.load):
        rows.append(row)
        print(kept.markdown([row]).splitlines()[-1], flush=True)
        text = scaling.text(rows, args.load)
        if args.save:
            kept.save(RESULTS, "simulated_scaling", rows, text)
    print(text)


def speed(args: argparse.Namespace) -> None:
    """The paper's workload, 32 clients for each of 16 replicas."""
    setup = paper.FASTGEN._replace(n_replicas=16, routing="two-choices")
    record = Record(one_in=100)
    jobs = workloads.of_clients(workloads.normal(2600, 60), 32 * 16, args.requests)
    started, wall = time.process_time(), time.perf_counter()
    cluster = setup.cluster(record)
    cluster.run(jobs, 32 * 16)
    seconds = time.process_time() - started
    n_steps = sum(replica.n_steps for replica in cluster.replicas)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(record)} requests of 2600/60 by 512 clients of 16 replicas, {n_steps} steps")
    print(f"{len(record) / seconds:.0f} requests a CPU second ({seconds:.1f} s, {most:.2f} GiB; "
          f"{time.perf_counter() - wall:.1f} s passed)")  # fmt: skip


def validate(args: argparse.Namespace) -> None:
    from benchmarks.simulation import validation  # which needs jax's devices

    rows, surface = validation.compare(args.settings, args.requests, args.rounds)
    text = validation.text(rows, surface)
    print(text)
    if args.save:
        found = surface._asdict()
        kept.save(RESULTS, "simulated_validation", rows, text, is_measured=True, surface=found)
    if not validation.is_close(rows):
        sys.exit("some differ by more than 15 %")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(required=True)
    free = commands.add_parser("run", help="one setting")
    free.set_defaults(do=run)
    default = Setup()
    free.add_argument("--chip", choices=CHIPS, default=default.chip)
    free.add_argument("--model", choices=MODELS, default=default.model)
    free.add_argument("--chips", dest="n_chips", type=int, default=1, help="of a replica")
    free.add_argument("--step-time", choices=("roofline", "published"), default="roofline")
    free.add_argument("--share", type=float, default=1.0, help="of the roofline")
    free.add_argument("--host", type=float, default=0.0, help="seconds between steps")
    free.add_argument("--policy", choices=POLICIES, default=default.policy)
    free.add_argument("--budget", type=int, default=default.budget, help="tokens of a step")
    free.add_argument("--max-seqs", type=int, default=default.max_seqs)
    free.add_argument("--block-size", type=int, default=default.block_size)
    free.add_argument("--max-model-len", type=int, default=default.max_model_len)
    free.add_argument("--replicas", dest="n_replicas", type=int, default=1)
    free.add_argument("--routing", choices=ROUTERS, default="two-choices")
    free.add_argument("--lengths", choices=workloads.LENGTHS, default="normal")
    free.add_argument("--prompt", type=int, default=2600, help="mean tokens")
    free.add_argument("--new", type=int, default=60, help="mean tokens")
    free.add_argument("--rate", type=float, help="requests/s; without it clients ask")
    free.add_argument("--clients", type=int, default=16)
    free.add_argument("--requests", type=int, default=512)
    free.add_argument("--seed", type=int, default=42)
    same = commands.add_parser("paper", help="FastGen's evaluation, predicted")
    same.set_defaults(do=reproduce)
    same.add_argument("--host", type=float, help="seconds between steps, of the second column")
    same.add_argument("--save", action="store_true", help="below benchmarks/results")
    many = commands.add_parser("scaling", help="1 to 1,024 replicas")
    many.set_defaults(do=scale)
    many.add_argument("--sizes", type=int, nargs="+", default=scaling.SIZES)
    many.add_argument("--requests-each", type=int, default=100, help="of a replica")
    many.add_argument("--load", type=float, default=0.85, help="of what a replica can take")
    many.add_argument("--save", action="store_true")
    real = commands.add_parser("validate", help="against the engine, on this machine")
    real.set_defaults(do=validate)
    real.add_argument("--settings", type=int, default=8, help="how many of them")
    real.add_argument("--requests", type=int, default=160, help="of each setting")
    real.add_argument("--rounds", type=int, default=3)
    real.add_argument("--save", action="store_true")
    fast = commands.add_parser("speed", help="requests simulated a CPU second")
    fast.set_defaults(do=speed)
    fast.add_argument("--requests", type=int, default=20_000)
    return parser.parse_args(argv)


if __name__ == "__main__":
    arguments = parse()
    arguments.do(arguments)
