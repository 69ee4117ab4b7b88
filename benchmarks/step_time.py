"""Where a step's time goes while a server serves: phase by phase, and what the device waits for.

    python -m benchmarks.step_time
    python -m benchmarks.step_time --sequences 32 --model PATH --flags "--dtype bfloat16"
    python -m benchmarks.step_time --alone --sequences 32

A real server (the demo model, unless --model says otherwise) streams to as many callers as
sequences run, and records a profile of itself (--profile). Milliseconds are of a step: the phases
of the engine's thread (dispatch includes the upload; download is what `wait` takes after the device
has ended), text (ids to text, in the event loop) and HTTP (the rest of the event loop's CPU time).
Then the device: the share of the time that it is busy, and what the engine's thread did while it
was not. Callers are a process beside the server: on few cores they take their share of them, and
so does the event loop. With --alone the engine runs in this process, and nothing else does.
"""

import argparse
import asyncio
import dataclasses
import shlex
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.server import load
from benchmarks.server.child import Child
from benchmarks.server.client import Address, Call, perform
from benchmarks.trace import Trace, gaps, length, overlap, read
from fastgen_jax.built_in import DEMO
from fastgen_jax.engine.config import EngineConfig
from fastgen_jax.engine.engine import Engine
from fastgen_jax.engine.phases import PHASES
from fastgen_jax.engine.types import Request
from fastgen_jax.sampling_params import SamplingParams
from fastgen_jax.server.flags import FlagParser, add_flags, build

BODY = {"prompt": "Once upon a time", "max_tokens": 256, "temperature": 0, "ignore_eos": True}
PROMPT, LONGEST = range(10, 40), 1900  # --alone: ids, and more tokens than are recorded
SETTLE = 2.0  # seconds of load before what is recorded


class Split(NamedTuple):
    """Of what was recorded.

    Attributes:
        seconds: per step, by phase.
        busy: share of the time in which the device is at work.
        idle: share of the time in which it is not, by what the engine's thread does then; "" is
            what lies between steps.
    """

    n_steps: int
    step: float
    seconds: dict[str, float]
    busy: float
    idle: dict[str, float]


def split(trace: Trace, event_loop: float) -> Split:
    """
    Args:
        event_loop: seconds of CPU time of its thread while the trace was recorded.
    """
    nothing = np.empty((0, 2))
    steps = trace.events["step"]
    n_steps = trace.counts["step"]
    start, end = float(steps[0, 0]), float(steps[-1, 1])
    at_rest = gaps(trace.device, start, end)
    phases = {name: trace.events.get(name, nothing) for name in PHASES}
    seconds = {name: length(intervals) / n_steps for name, intervals in phases.items()}
    seconds["download"] = length(overlap(phases["wait"], at_rest)) / n_steps
    text = length(trace.events.get("text", nothing))
    seconds["text"] = text / n_steps
    seconds["HTTP"] = max(event_loop - text, 0.0) / n_steps
    idle = {name: length(overlap(at_rest, x)) / (end - start) for name, x in phases.items()}
    busy = 1.0 - length(at_rest) / (end - start)
    idle["other"] = max(1.0 - busy - sum(idle.values()), 0.0)
    return Split(n_steps, (end - start) / n_steps, seconds, busy, idle)


async def call_for_ever(address: Address) -> None:
    call = Call(load.COMPLETIONS, load.encode(BODY | {"stream": True}), load.MAY_FAIL, True)
    while True:
        await perform(address, call, 600)


async def record(child: Child, n_seqs: int, seconds: float) -> float:
    """The event loop's CPU seconds while the server was profiled under load."""
    callers = [asyncio.create_task(call_for_ever(child.address)) for _ in range(n_seqs)]
    await asyncio.sleep(SETTLE)
    await asyncio.to_thread(post, child.address, "/start_profile")
    before = child.event_loop_seconds()
    await asyncio.sleep(seconds)
    event_loop = child.event_loop_seconds() - before
    await asyncio.to_thread(post, child.address, "/stop_profile")
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    return event_loop


def post(address: Address, path: str) -> None:
    url = f"http://{address[0]}:{address[1]}{path}"
    with urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=60):
        pass


def measure(args: argparse.Namespace, n_seqs: int) -> Split:
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *args.model,
            "--profile",
            folder,
            "--log-level",
            "warning",
            *shlex.split(args.flags),
        ]
        flags += ["--max-num-seqs", str(n_seqs), "--max-queued-requests", str(2 * n_seqs)]
        with Child(flags, module="fastgen_jax.serve") as child:
            event_loop = asyncio.run(record(child, n_seqs, args.seconds))
        return split(read(Path(folder)), event_loop)


def measure_alone(args: argparse.Namespace, n_seqs: int) -> Split:
    parser = FlagParser()
    add_flags(parser, [EngineConfig])
    config = build(EngineConfig, parser.parse_args(shlex.split(args.flags)))
    model = args.model[0] if args.model else str(DEMO)
    params = SamplingParams(max_tokens=LONGEST, temperature=0.0, ignore_eos=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(dataclasses.replace(config, model=model, max_num_seqs=n_seqs)) as engine,
    ):
        engine.submit_all([Request([*PROMPT], params) for _ in range(n_seqs)])
        run_for(engine, SETTLE)
        with jax.profiler.trace(folder):
            run_for(engine, args.seconds)
        return split(read(Path(folder)), 0.0)


def run_for(engine: Engine, seconds: float) -> None:
    """Or until nothing is left to do."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and engine.has_work:
        engine.step()


def show(splits: dict[int, Split]) -> None:
    def line(name: str, values: list[str]) -> None:
        print(f"{name:34}" + "".join(f"{value:>10}" for value in values))

    line("sequences", [str(n) for n in splits])
    line("steps", [str(s.n_steps) for s in splits.values()])
    line("milliseconds of a step", [f"{1e3 * s.step:.2f}" for s in splits.values()])
    for name in next(iter(splits.values())).seconds:
        line(f"  {name}", [f"{1e3 * s.seconds[name]:.3f}" for s in splits.values()])
    line("device busy", [f"{s.busy:.1%}" for s in splits.values()])
    for name in next(iter(splits.values())).idle:
        line(f"  idle, host in {name}", [f"{s.idle[name]:.1%}" for s in splits.values()])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--seconds", type=float, default=4.0, help="that are recorded")
    parser.add_argument("--model", nargs=1, default=[], help="default: the demo")
    parser.add_argument("--flags", default="--dtype float32", help="more, of fastgen_jax.serve")
    parser.add_argument("--alone", action="store_true", help="the engine, without a server")
    args = parser.parse_args()
    measured = measure_alone if args.alone else measure
    show({n_seqs: measured(args, n_seqs) for n_seqs in args.sequences})
    return 0


if __name__ == "__main__":
    sys.exit(main())
