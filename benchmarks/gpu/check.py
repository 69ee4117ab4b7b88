"""Everything worth a GPU minute in one command and one Markdown table: numerics of the attention
kernels, their speed, CUDA graphs, whole steps, whole engine.

    python -m benchmarks.gpu.check --out benchmarks/results/h200.md     # at most 8 minutes
    python -m benchmarks.gpu.check                                      # no GPU: toy size on CPU
    python -m benchmarks.gpu.check --sections ceilings,decode

Every section runs in a process of its own, with a time limit: one that fails, hangs or breaks the
device leaves the others alone, and what it had measured before is in the table. Sections whose
time is not measured run at once. `share` is of the ceilings that the first section measures: the
bytes that must move, or operations, at those rates over the time taken. Exits with 1 if anything
failed or was stopped, or if numerics were not started; a missed target is only told.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.table import FULL, TOY, Row, Sizes, ceilings, table

ROOT = Path(__file__).resolve().parents[2]
TOTAL_SECONDS = 465.0
MIN_SECONDS = 15.0  # with less left a section is not started
PACKAGES = "jax", "jaxlib", "flax", "torch", "triton", "jax-triton", "numpy"


class Section(NamedTuple):
    """A function of numerics, kernels or engine, and its process."""

    module: str
    function: str
    seconds: float  # its limit on a GPU
    is_numerics: bool = False
    xla_flags: str = ""  # {} becomes a folder for dumps


COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
DUMP = "--xla_dump_to={} --xla_dump_hlo_as_text"
GRAPHS = f"{COMMAND_BUFFERS}FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL"
SECTIONS = {  # in the order of their worth
    "ceilings": Section("kernels", "ceilings", 60),
    "numerics": Section("numerics", "numerics", 150, is_numerics=True),
    "far blocks": Section("numerics", "far_blocks", 150, is_numerics=True),
    "decode": Section("kernels", "decode", 120),
    "chunks": Section("kernels", "chunks", 60),
    "torch": Section("kernels", "torch_chunks", 40),
    "graphs default": Section("kernels", "graph_step", 40, xla_flags=DUMP),
    "engine": Section("engine", "engine", 200),
    "graphs off": Section("kernels", "graph_step", 40, xla_flags=f"{DUMP} {COMMAND_BUFFERS}"),
    "graphs on": Section("kernels", "graph_step", 40, xla_flags=f"{DUMP} {GRAPHS}"),
}


# In a section's process.


def run_section(name: str, sizes: Sizes, dump: Path | None = None) -> Iterator[Row]:
    """The section's rows as they come; the last one tells of an error."""
    section = SECTIONS[name]
    module = importlib.import_module(f"benchmarks.gpu.{section.module}")
    options = {"dump": dump} if section.xla_flags else {}
    try:
        yield from getattr(module, section.function)(sizes, **options)
    except Exception as error:  # the other sections are to be seen as well
        text = (str(error).strip().splitlines() or [""])[0][:300]
        yield Row("error", note=f"{type(error).__name__}: {text}", is_ok=False)
        raise


def child(name: str, sizes: Sizes, folder: Path) -> None:
    """Writes rows to a file, each at once."""
    with (folder / "rows").open("w") as file:
        for row in run_section(name, sizes, folder):
            file.write(json.dumps(row) + "\n")
            file.flush()


# In the process that starts them.


class Started(NamedTuple):
    """A running section."""

    name: str
    process: subprocess.Popen
    folder: Path
    end: float  # when it is stopped


def start(name: str, folder: Path, *, is_toy: bool, deadline: float, is_alone: bool) -> Started:
    """Starts a section; several at once share the device's memory."""
    folder.mkdir()
    section = SECTIONS[name]
    flags = section.xla_flags.replace("{}", str(folder))
    environment = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    if not is_alone:
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--child", name, str(folder)]
    command += ["--toy"] if is_toy else []
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    return Started(name, process, folder, min(time.monotonic() + section.seconds, deadline))


def finish(started: Started) -> list[Row]:
    """The rows of a section, once it has ended or its time is over."""
    problem = ""
    try:
        if started.process.wait(max(started.end - time.monotonic(), 1.0)):
            problem = last_line(started.folder / "log")
    except subprocess.TimeoutExpired:
        started.process.kill()
        started.process.wait()
        problem = "stopped, its time was over"
    file = started.folder / "rows"
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [Row(*json.loads(line)) for line in lines]
    if problem and (not rows or rows[-1].what != "error"):
        rows.append(Row("error", note=problem, is_ok=False))
    return rows


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it died without a word"])[-1].strip()[:300]


def run_all(names: list[str], *, is_toy: bool, deadline: float) -> Iterator[tuple[str, list[Row]]]:
    """Rows of each section: numerics side by side, timed ones one after the other."""
    numerics = [name for name in names if SECTIONS[name].is_numerics]
    groups = [numerics] + [[name] for name in names if name not in numerics]
    groups.sort(key=lambda group: names.index(group[0]) if group else -1)
    with tempfile.TemporaryDirectory() as scratch:
        for group in groups:
            if deadline - time.monotonic() < MIN_SECONDS:
                for name in group:
                    note = "not started: no time was left"
                    yield name, [Row("skipped", note=note, is_ok=not SECTIONS[name].is_numerics)]
                continue
            options = {"is_toy": is_toy, "deadline": deadline, "is_alone": len(group) == 1}
            running = [
                start(name, Path(scratch) / name.replace(" ", "-"), **options) for name in group
            ]
            for started in running:
                yield started.name, finish(started)


HEADER = """# GPU check{toy}

- date: {date}
- device: {device}
- host: {host}
- versions: {versions}
- command: `python -m benchmarks.gpu.check {arguments}`
- source: {commit}
"""
TOY_NOTE = """
**Toy size on CPU: times mean nothing.**
"""


def header(*, is_toy: bool, device: str) -> str:
    """Where and how the table was made."""
    found = {name: _version(name) for name in PACKAGES}
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {version}" for name, version in found.items() if version]
    described = ["git", "describe", "--always", "--dirty"]
    text = HEADER.format(
        toy=": toy size on CPU" if is_toy else "",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        device=device,
        host=f"{platform.machine()}, {os.cpu_count()} cores",
        versions=", ".join(versions),
        arguments=" ".join(sys.argv[1:]),
        commit=_output(described) or "no git here",
    )
    return text + (TOY_NOTE if is_toy else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(command: list[str]) -> str:
    """The first line that a command prints; empty if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.strip().splitlines() or [""])[0] if done.returncode == 0 else ""


def gpu() -> str:
    """Name, memory and driver of the first GPU; empty without one."""
    query = "--query-gpu=name,memory.total,driver_version"
    found = _output(["nvidia-smi", query, "--format=csv,noheader"])
    return f"{found} (name, memory, driver)" if found else ""


def report(head: str, done: dict[str, list[Row]]) -> str:
    """The whole text: header and table."""
    measured = ceilings(done.get("ceilings", []))
    return f"{head}\n{table([(name, row) for name in done for row in done[name]], measured)}\n"


def exit_code(done: dict[str, list[Row]]) -> int:
    """1 unless every row is ok."""
    return int(not all(row.is_ok for rows in done.values() for row in rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, help="a file for the table, which grows with it")
    add("--sections", help=f"of {', '.join(SECTIONS)} (default: all)")
    add("--toy", action="store_true", help="toy size on CPU, as without a GPU")
    add("--seconds", type=float, default=TOTAL_SECONDS, help="for everything together")
    add("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sections = args.sections.split(",") if args.sections else list(SECTIONS)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = parse_args()
    if args.child:
        name, folder = args.child
        child(name, TOY if args.toy else FULL, Path(folder))
        return
    deadline = time.monotonic() + args.seconds
    device = "" if args.toy else gpu()
    is_toy = not device
    if is_toy:
        os.environ["JAX_PLATFORMS"] = "cpu"
    head, done = header(is_toy=is_toy, device=device or "CPU"), {}
    for name, rows in run_all(args.sections, is_toy=is_toy, deadline=deadline):
        done[name] = rows
        print(f"{args.seconds - deadline + time.monotonic():5.0f} s  {name}", file=sys.stderr)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(report(head, done))
    print(report(head, done))
    sys.exit(exit_code(done))


if __name__ == "__main__":
    main()
